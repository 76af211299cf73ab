"""What one step computes: chunks of the requests that are in slots."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

from gemloom.adapters.request_adapters import Active
from gemloom.models.config import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of the request in ``slot``, the first at position ``start``.

    ``wanted`` are the rows of this chunk whose logits are wanted, ascending; ``adapters`` those at
    work in the request. ``until`` has the last position that each row sees, for the kinds of
    layer where that is not the row's own: the rows of an image see one another. No row may see
    beyond the chunk's end.
    """

    slot: int
    start: int
    tokens: abc.Sequence[int]
    wanted: abc.Sequence[int] = ()
    adapters: tuple[Active, ...] = ()
    until: abc.Mapping[Kind, abc.Sequence[int]] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.start + len(self.tokens)


Batch = abc.Sequence[Chunk]
