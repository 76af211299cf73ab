"""What one step computes: a ragged batch of chunks, each some rows of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of the sequence in ``slot``, the first at position ``start``.

    ``wanted`` are the rows of this chunk whose logits somebody wants, ascending.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    wanted: Sequence[int] = ()

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + len(self.tokens)


Batch = Sequence[Chunk]


def split(slot: int, start: int, tokens: Sequence[int], size: int) -> list[Chunk]:
    """Chunks of at most ``size`` rows; only the very last row's logits are wanted."""
    chunks = [Chunk(slot, start + i, tokens[i : i + size]) for i in range(0, len(tokens), size)]
    last = chunks[-1]
    return [*chunks[:-1], Chunk(slot, last.start, last.tokens, (len(last.tokens) - 1,))]
