"""Which sequence sits in which slot of the K/V cache. Pure bookkeeping: no tensor is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gemloom.errors import RequestError


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence's place in every store. ``tokens`` are those whose K/V its cells hold."""

    index: int
    tokens: list[int] = field(default_factory=list)
    busy: bool = False
    last_used: int = 0


class Slots:
    """Hands out slots, the one that already holds most of a prompt first.

    ``window`` and ``ring`` are those of the sliding layers, in positions.
    """

    def __init__(self, count: int, window: int, ring: int) -> None:
        self.all = [Slot(index) for index in range(count)]
        self._window, self._ring = window, ring
        self._clock = 0

    def acquire(self, tokens: Sequence[int]) -> Slot:
        """A free slot, cut back to what of ``tokens`` it holds; never all of them.

        Among those that hold equally much, the one unused for longest. RequestError if none is
        free.
        """
        free = [slot for slot in self.all if not slot.busy]
        if not free:
            raise RequestError(f"all {len(self.all)} slots are in use; load the model with more")
        slot = max(free, key=lambda slot: (self.reusable(slot, tokens), -slot.last_used))
        del slot.tokens[self.reusable(slot, tokens) :]
        slot.busy = True
        return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back; what it holds stays there to be found again."""
        self._clock += 1
        slot.last_used, slot.busy = self._clock, False

    def latest(self) -> Slot:
        """Of the free slots that hold something, the one used last. RequestError if none does."""
        held = [slot for slot in self.all if slot.tokens and not slot.busy]
        if not held:
            raise RequestError("no finished request is held in the K/V cells")
        return max(held, key=lambda slot: slot.last_used)

    def reusable(self, slot: Slot, tokens: Sequence[int]) -> int:
        """How many of the first ``tokens`` need not be computed again in this slot.

        One is always left, since its logits are wanted. And the ring must still hold the window
        before the cut: positions older than ``ring`` from the end have been written over.
        """
        limit = max(0, min(len(slot.tokens), len(tokens) - 1))
        common = next((i for i in range(limit) if slot.tokens[i] != tokens[i]), limit)
        oldest = len(slot.tokens) - self._ring
        return common if oldest <= max(0, common - self._window + 1) else 0
