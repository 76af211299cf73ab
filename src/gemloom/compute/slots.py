"""Which sequence sits in which slot of the K/V cache, and what of a prompt is there already.

Pure bookkeeping: no tensor is touched. A full layer has a cell for every position, so any prefix
of a slot's tokens can be kept. A sliding layer has a ring: what lies further back than it holds
has been written over, and a prefix can be resumed only if the window before its end is intact,
or a snapshot of it was taken.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gemloom.adapters.request_adapters import Marks, agreed
from gemloom.errors import RequestError


@dataclass(slots=True, eq=False, kw_only=True)
class Slot:
    """One sequence's place in every store."""

    index: int
    tokens: list[int] = field(default_factory=list)  # those whose K/V the cells hold
    marks: Marks = frozenset()  # of the adapters that these were computed with
    intact: int = 0  # the oldest position that the rings still hold
    busy: bool = False
    last_used: int = 0


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first ``length`` tokens of a prompt, found in the cells of ``slot``.

    ``window`` is the snapshot of its rings there, None where they are intact.
    """

    slot: Slot
    length: int
    window: bytes | None = None


class Slots:
    """Hands out slots, with as much of a prompt as some slot holds.

    ``window`` and ``ring`` are those of the sliding layers, in positions; ``budget`` bounds the
    bytes of all snapshots, of which the one unused for longest goes first.
    """

    def __init__(self, count: int, window: int, ring: int, budget: int = 0) -> None:
        self.all = [Slot(index=index) for index in range(count)]
        self._window, self._ring, self._budget = window, ring, budget
        self._clock = 0
        self._snapshots: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    # -- handing out ---------------------------------------------------------------------------

    @property
    def free(self) -> list[Slot]:
        """The slots that nobody uses."""
        return [slot for slot in self.all if not slot.busy]

    def acquire(self, tokens: Sequence[int], marks: Marks = frozenset()) -> tuple[Slot, Prefix]:
        """A free slot for a prompt, and the prefix of it that some slot holds.

        ``marks`` tell which adapters are at work in it: no other's cells are of use.

        The slot is made ready to hold that prefix; where the prefix is another slot's, the caller
        copies the cells, and where it has a window, puts it back. RequestError if none is free.
        """
        if not self.free:
            raise RequestError(f"all {len(self.all)} slots are in use; load the model with more")
        prefix = max(
            (self.find(slot, tokens, marks) for slot in self.all),
            key=lambda found: (found.length, not found.slot.busy, -found.slot.last_used),
        )
        slot = self._target(prefix)
        if slot is prefix.slot:
            self.cut(slot, prefix.length)
        else:
            self.cut(slot, 0)
            slot.tokens.extend(prefix.slot.tokens[: prefix.length])
        if slot is not prefix.slot or prefix.window is not None:
            slot.intact = max(0, prefix.length - self._window)
        if slot is not prefix.slot and prefix.window is None:
            slot.intact = max(slot.intact, prefix.slot.intact)  # a copy is no better than that
        slot.busy, slot.marks = True, marks
        return slot, prefix

    def _target(self, prefix: Prefix) -> Slot:
        """The slot that holds the prefix, unless it is in use or would lose more than it keeps."""
        source = prefix.slot
        if not source.busy and 2 * prefix.length >= len(source.tokens):
            return source
        return min(self.free, key=lambda slot: (slot.last_used, slot.index))

    def find(self, slot: Slot, tokens: Sequence[int], marks: Marks = frozenset()) -> Prefix:
        """The longest prefix of ``tokens`` that can be resumed from this slot.

        At least one token is left over, since its logits are wanted.
        """
        limit = max(0, min(len(slot.tokens), len(tokens) - 1))
        limit = agreed(slot.marks, marks, limit)
        common = next((i for i in range(limit) if slot.tokens[i] != tokens[i]), limit)
        if slot.intact <= max(0, common - self._window + 1):
            return Prefix(slot, common)
        taken = [at for index, at in self._snapshots if index == slot.index and at <= common]
        if not taken:
            return Prefix(slot, 0)
        self._snapshots.move_to_end((slot.index, max(taken)))
        return Prefix(slot, max(taken), self._snapshots[slot.index, max(taken)])

    def release(self, slot: Slot) -> None:
        """Give a slot back; what it holds stays there to be found again."""
        self._clock += 1
        slot.last_used, slot.busy = self._clock, False

    def latest(self) -> Slot:
        """Of the free slots that hold something, the one used last. RequestError if none does."""
        held = [slot for slot in self.free if slot.tokens]
        if not held:
            raise RequestError("no finished request is held in the K/V cells")
        return max(held, key=lambda slot: slot.last_used)

    # -- what a slot holds ---------------------------------------------------------------------

    def extend(self, slot: Slot, tokens: Sequence[int], marks: Marks | None = None) -> None:
        """Note that the K/V of more tokens are in the cells; ``marks`` as in ``acquire``."""
        if marks is not None:
            slot.marks = marks
        slot.tokens.extend(tokens)
        slot.intact = max(slot.intact, len(slot.tokens) - self._ring)

    def hold(self, slot: Slot, tokens: Sequence[int], intact: int) -> None:
        """Note that a slot's cells were replaced by those of ``tokens``."""
        self.cut(slot, 0)
        slot.tokens.extend(tokens)
        slot.intact = intact

    def cut(self, slot: Slot, length: int) -> None:
        """Forget what comes after the first ``length`` tokens."""
        del slot.tokens[length:]
        if not length:
            slot.intact = 0
        for index, at in list(self._snapshots):
            if index == slot.index and at > length:
                del self._snapshots[index, at]

    # -- snapshots -----------------------------------------------------------------------------

    def wants_snapshot(self, slot: Slot, at: int) -> bool:
        """Whether the window before position ``at`` can be lost and is not kept yet."""
        return bool(self._budget) and (slot.index, at) not in self._snapshots

    def keep(self, slot: Slot, at: int, window: bytes) -> None:
        """Keep a snapshot of a slot's rings as they are before position ``at``."""
        self._snapshots[slot.index, at] = window
        while self.snapshot_bytes > self._budget:
            self._snapshots.popitem(last=False)

    @property
    def snapshot_bytes(self) -> int:
        """Memory of all snapshots."""
        return sum(map(len, self._snapshots.values()))
