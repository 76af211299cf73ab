"""What a caller gets from a request: a Run to iterate over, or a finished Completion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Self

from gemloom.sequence import Piece, Sequence


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost so far."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the K/V cells
    prompt_seconds: float  # until the first token was picked
    decode_seconds: float  # for the tokens after it

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of prefill, over the tokens that had to be computed."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding, the first token not counted."""
        if not self.decode_seconds:
            return 0.0
        return (self.completion_tokens - 1) / self.decode_seconds


@dataclass(frozen=True, slots=True)
class Completion:
    """Generated text. ``finish_reason`` is "stop" or "length", None where it was cancelled."""

    text: str
    tokens: list[int]
    finish_reason: str | None
    usage: Usage
    pieces: list[Piece] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """An assistant's answer; ``message`` can be appended to the conversation as it is."""

    message: dict[str, str]
    finish_reason: str | None
    usage: Usage


class Run(Iterator[Piece]):
    """A request under way: iterate over its pieces; ``close()``, or leave ``with``, to stop early.

    ``step`` computes something of the sequence and gives a piece if that made one; ``finish`` is
    called once, when no more will be asked for.
    """

    def __init__(
        self,
        sequence: Sequence,
        step: Callable[[Sequence], Piece | None],
        finish: Callable[[Sequence], None],
    ) -> None:
        self._sequence, self._step, self._finish = sequence, step, finish
        self._open, self._cancelled = True, False
        self._started = self._first = self._last = 0.0

    def __next__(self) -> Piece:
        if not self._open:
            raise StopIteration
        self._started = self._started or perf_counter()
        try:
            piece = self._compute()
        except BaseException:  # Ctrl-C among them: the slot must be free again
            self.close()
            raise
        self._last = perf_counter()
        if self._sequence.n_generated == 1:
            self._first = self._last
        if piece.finish_reason:
            self.close()
        return piece

    def _compute(self) -> Piece:
        """The next piece. StopIteration if cancelled before there is one."""
        piece = None
        while piece is None:
            if self._cancelled or not self._open:  # another thread may have closed it
                raise StopIteration
            piece = self._step(self._sequence)
        return piece

    @property
    def usage(self) -> Usage:
        """Counts and times so far."""
        return Usage(
            self._sequence.n_prompt,
            self._sequence.n_generated,
            self._sequence.n_cached,
            self._first - self._started,
            self._last - self._first,
        )

    @property
    def times(self) -> dict[str, float]:
        """Seconds so far by what was done outside the model's steps: sample, text."""
        return dict(self._sequence.times)

    def completion(self) -> Completion:
        """Run to the end and put the pieces together."""
        pieces = list(self)
        return Completion(
            "".join(piece.text for piece in pieces),
            [piece.token for piece in pieces],
            pieces[-1].finish_reason if pieces else None,
            self.usage,
            pieces,
        )

    def cancel(self) -> None:
        """End the iteration before the next step; a signal handler or another thread may call it.

        What has been computed stays in the cells, which an exception in the middle of a step does
        not give.
        """
        self._cancelled = True

    def close(self) -> None:
        """Stop, and free the slot; a second call does nothing."""
        if self._open:
            self._open = False
            self._finish(self._sequence)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
