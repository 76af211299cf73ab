"""What a dialect is: a body, its translation, and an answer that frames its own events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from gemloom.engine.generation import Usage
from gemloom.engine.request import Piece
from gemloom.errors import GemloomError
from gemloom.server.backend import Backend
from gemloom.server.bodies import error_body
from gemloom.server.fields import Json
from gemloom.server.protocol import Sampling
from gemloom.text.compose import Composed
from gemloom.text.tokenizer import Tokenizer

Asked = TypeVar("Asked", bound=Sampling)


class Answer(Protocol):
    """One answer as it grows. It is fed the pieces of its runs, in whatever order they come.

    ``begin``, ``push`` and ``end`` give the events of a stream, which ``encode`` writes. ``body``
    gives the whole answer, once all pieces are in.
    """

    media_type: str  # of a stream
    beat: bytes  # what shows that a silent stream lives; empty where clients take no such thing
    done: bytes  # what follows the last event; empty for nothing

    def encode(self, event: Json) -> bytes:
        """An event as it is sent."""

    def begin(self) -> list[Json]:
        """The events before the first piece."""

    def push(self, index: int, piece: Piece) -> list[Json]:
        """The events of one piece of the run ``index``."""

    def end(self, usages: Sequence[Usage]) -> list[Json]:
        """The events after the last piece, with one usage a run."""

    def body(self, usages: Sequence[Usage]) -> Json:
        """The whole answer."""

    def failed(self, error: GemloomError) -> Json:
        """The event that ends a stream which an error cut short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect(Generic[Asked]):
    """How one kind of client asks for text and is answered.

    compose: the runs that a request needs. Raises what is wrong with it.
    answer: makes the answer of these runs, under the name of the model that was asked for.
    error: the body of an answer that is an error.
    """

    name: str  # of its route, and what that does
    about: str
    body: type[Asked]
    compose: Callable[[Asked, Backend], list[Composed]]
    answer: Callable[[Asked, Sequence[Composed], str, Tokenizer], Answer]
    error: Callable[[GemloomError], Json] = error_body
