"""Slots and the K/V bytes behind them: one object, so that neither is changed without the other.

Which slot holds what is decided in ``slots.py``; the bytes are in ``kv_store.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from gemloom.adapters.request_adapters import Marks
from gemloom.compute.kv_shape import KVShape
from gemloom.compute.kv_store import KVStore
from gemloom.compute.slots import Slot, Slots

_log = logging.getLogger("gemloom.cells")


@dataclass(frozen=True, slots=True)
class Saved:
    """What a slot holds, as it can be put back into a model of the same cells."""

    tokens: list[int]
    intact: int  # the oldest position that the rings hold
    cells: memoryview  # K and V of each layer that owns them, one behind the other


class Cells:
    """A model's slots. Only the thread that computes uses it.

    ``snapshots`` bounds the bytes of kept sliding windows.
    """

    def __init__(self, store: KVStore, snapshots: int) -> None:
        shape = store.shape
        budget = snapshots if shape.cells.sliding < shape.cells.full else 0
        if 0 < budget < store.window_bytes:
            _log.warning(
                "a snapshot takes %d MiB, more than the %d allowed: edited chats are computed anew",
                store.window_bytes >> 20,
                snapshots >> 20,
            )
            budget = 0
        self._store = store
        self._slots = Slots(shape.slots, shape.window, shape.cells.sliding, budget)

    @property
    def shape(self) -> KVShape:
        """How many cells there are, and where positions lie."""
        return self._store.shape

    @property
    def kv_type(self) -> str:
        """The type of the cells."""
        return self._store.kv_type

    @property
    def all(self) -> Sequence[Slot]:
        """Every slot, by its index. To be read only."""
        return self._slots.all

    @property
    def free(self) -> Sequence[Slot]:
        """The slots that nobody uses."""
        return self._slots.free

    @property
    def busy(self) -> int:
        """How many slots are in use."""
        return len(self._slots.all) - len(self._slots.free)

    @property
    def snapshot_bytes(self) -> int:
        """Memory of all snapshots."""
        return self._slots.snapshot_bytes

    def acquire(self, tokens: Sequence[int] = (), marks: Marks = frozenset()) -> Slot:
        """A free slot whose cells hold as many of the first ``tokens`` as some slot has.

        ``slot.tokens`` are those. ``marks`` tell which adapters are at work. RequestError where
        no slot is free.
        """
        slot, prefix = self._slots.acquire(tokens, marks)
        self._store.clear(slot.index, prefix.length if slot is prefix.slot else 0)
        window = prefix.window
        if slot is not prefix.slot and prefix.length:
            self._store.copy_full(prefix.slot.index, slot.index, prefix.length)
            window = window or self._store.window_before(prefix.slot.index, prefix.length)
        if window:
            self._store.restore_window(slot.index, prefix.length, window)
        return slot

    def extend(self, slot: Slot, tokens: Sequence[int], marks: Marks | None = None) -> None:
        """Note that a step has written the K/V of more tokens; ``marks`` as in ``acquire``."""
        self._slots.extend(slot, tokens, marks)

    def cut(self, slot: Slot, length: int) -> None:
        """Forget what comes after the first ``length`` tokens."""
        self._slots.cut(slot, length)

    def snapshot(self, slot: Slot, at: int) -> None:
        """Keep the window before position ``at``, unless it is kept or can never be lost."""
        if self._slots.wants_snapshot(slot, at):
            self._slots.keep(slot, at, self._store.window_before(slot.index, at))

    def release(self, slot: Slot, *, forget: bool = False) -> None:
        """Give a slot back. What it holds can be found again, unless it is to ``forget`` it."""
        if forget:
            self._slots.cut(slot, 0)
        self._slots.release(slot)

    def latest(self) -> Slot:
        """Of the free slots that hold something, the one used last. RequestError if none does."""
        return self._slots.latest()

    def forget(self) -> None:
        """Forget what every slot holds."""
        for slot in self._slots.all:
            self._slots.cut(slot, 0)

    def saved_bytes(self, count: int) -> int:
        """Bytes of the cells of a slot that holds ``count`` tokens."""
        return sum(self._store.export_sizes(count))

    def save(self, slot: Slot) -> Saved:
        """What a slot holds."""
        cells = b"".join(self._store.export(slot.index, len(slot.tokens)))
        return Saved(list(slot.tokens), slot.intact, memoryview(cells))

    def restore(self, slot: Slot, saved: Saved) -> None:
        """Have an empty slot hold what was saved."""
        self._store.restore(slot.index, len(saved.tokens), saved.cells)
        self._slots.hold(slot, saved.tokens, saved.intact)
