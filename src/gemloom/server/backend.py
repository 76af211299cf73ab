"""What the server needs of a model: a Backend. ``gemloom.Model`` is one.

The server knows nothing else of what it serves, so that tests run it without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gemloom.adapters.info import AdapterInfo, Scales
from gemloom.engine.generation import Run
from gemloom.text.compose import Composed, Composer
from gemloom.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemloom.engine.engine import Stats
    from gemloom.model import Model
    from gemloom.text.constraint import Grammars


class ModelSizes(Protocol):
    """The sizes that clients are told."""

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""

    @property
    def n_embd(self) -> int:
        """Numbers in an embedding."""


class LoadedAdapters(Protocol):
    """The adapters that requests can name (``adapters/registry.py``)."""

    def load(self, name: str, source: Any, scale: float = 1.0) -> AdapterInfo:
        """Load an adapter under a name, or load it again."""

    def unload(self, name: str) -> None:
        """Take a name away. UnknownAdapterError."""

    def list(self) -> list[AdapterInfo]:
        """All that requests can name."""

    def check(self, name: str) -> None:
        """UnknownAdapterError unless requests can name it."""


class Backend(Protocol):
    """A model as the server uses it. Any thread may call it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""

    @property
    def grammars(self) -> Grammars:
        """Makes constraints of answers."""

    @property
    def composer(self) -> Composer:
        """Makes prompts and bounds of chats."""

    @property
    def adapters(self) -> LoadedAdapters:
        """Its adapters."""

    @property
    def config(self) -> ModelSizes:
        """Its sizes."""

    @property
    def context(self) -> int:
        """Positions that a request may fill."""

    def answer(
        self, composed: Composed, adapters: Scales | None = None, after: Run | None = None
    ) -> Run:
        """Start an answer; never blocks. ``after`` another run it has the turn of that.

        Raises QueueFullError, EngineError and what is wrong with the request.
        """

    def embed(self, text: str | Sequence[int], adapters: Scales | None = None) -> np.ndarray:
        """The vector of a text or of ids, of length 1: float32 [n_embd]."""

    def stats(self) -> Stats:
        """What is running and waiting, and why it stopped if it did."""

    def memory(self) -> dict[str, int]:
        """Bytes by kind."""

    def save_state(self) -> bytes:
        """The state of the request that ended last. RequestError if none is held."""

    def load_state(self, data: bytes) -> int:
        """Restore saved state, and tell how many tokens it has. StateError if it cannot be."""

    def close(self) -> None:
        """Free everything. Requests under way end with ClosedError."""


if TYPE_CHECKING:

    def _as_backend(model: Model) -> Backend:
        return model  # mypy says here what a Model lacks
