"""Which prefix a slot can keep: pure bookkeeping, checked against a naive model of the cells."""

from ast import literal_eval

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemloom.compute.slots import Slot, Slots
from gemloom.errors import RequestError

ids = st.lists(st.integers(0, 1), min_size=1, max_size=40)


class Cells:
    """What the cells of each slot really hold: token prefixes, as they were written."""

    def __init__(self, count: int, window: int, ring: int) -> None:
        self.window, self.ring = window, ring
        self.full = [dict[int, tuple[int, ...]]() for _ in range(count)]
        self.sliding = [dict[int, tuple[int, tuple[int, ...]]]() for _ in range(count)]

    def write(self, slot: int, tokens: list[int], start: int) -> None:
        for at in range(start, len(tokens)):
            self.full[slot][at] = tuple(tokens[: at + 1])
            self.sliding[slot][at % self.ring] = (at, tuple(tokens[: at + 1]))

    def window_before(self, slot: int, end: int) -> bytes:
        held = [
            self.sliding[slot].get(at % self.ring) for at in range(max(0, end - self.window), end)
        ]
        return repr(held).encode()

    def restore_window(self, slot: int, data: bytes) -> None:
        for cell in literal_eval(data.decode()):
            if cell:
                self.sliding[slot][cell[0] % self.ring] = cell

    def holds(self, slot: int, tokens: list[int]) -> bool:
        """Whether a row after ``tokens`` would see exactly their K/V."""
        n = len(tokens)
        full = all(self.full[slot].get(at) == tuple(tokens[: at + 1]) for at in range(n))
        seen = range(max(0, n - self.window + 1), n)
        return full and all(
            self.sliding[slot].get(at % self.ring) == (at, tuple(tokens[: at + 1])) for at in seen
        )


def admit(slots: Slots, cells: Cells, tokens: list[int]) -> Slot:
    """What the engine does to begin a request."""
    slot, prefix = slots.acquire(tokens)
    window = prefix.window
    if slot is not prefix.slot and prefix.length:
        for at in range(prefix.length):
            cells.full[slot.index][at] = cells.full[prefix.slot.index][at]
        window = window or cells.window_before(prefix.slot.index, prefix.length)
    if window:
        cells.restore_window(slot.index, window)
    return slot


@given(
    prompts=st.lists(st.tuples(ids, st.integers(0, 30), st.booleans()), max_size=12),
    count=st.integers(1, 3),
    window=st.integers(1, 6),
    spare=st.integers(1, 8),
    budget=st.sampled_from([0, 500, 100_000]),
)
def test_a_prefix_is_what_the_cells_hold(
    prompts: list[tuple[list[int], int, bool]], count: int, window: int, spare: int, budget: int
) -> None:
    """Requests that share prefixes, some ended early, some left running: reuse never lies."""
    slots, cells = (
        Slots(count, window, window + spare, budget),
        Cells(count, window, window + spare),
    )
    for tokens, cut, stays in prompts:
        if not slots.free:
            break
        slot = admit(slots, cells, tokens)
        held = len(slot.tokens)
        assert held < len(tokens)
        assert slot.tokens == tokens[:held]
        assert cells.holds(slot.index, slot.tokens)
        done = max(held, len(tokens) - cut)  # as if cancelled before the end
        for at in range(held, done):
            cells.write(slot.index, tokens[: at + 1], at)
            slots.extend(slot, [tokens[at]])
            if at % 5 == 4 and slots.wants_snapshot(slot, at):
                slots.keep(slot, at, cells.window_before(slot.index, at))
        assert slots.snapshot_bytes <= budget
        if not stays:
            slots.release(slot)


def finished(slots: Slots, tokens: list[int]) -> Slot:
    slot, _ = slots.acquire(tokens)
    slots.extend(slot, tokens[len(slot.tokens) :])
    slots.release(slot)
    return slot


def test_a_chat_goes_on_in_its_own_slot() -> None:
    slots = Slots(2, 8, 16)
    one, other = finished(slots, [1, 2, 3]), finished(slots, [7, 8, 9])
    assert one is not other
    slot, prefix = slots.acquire([1, 2, 3, 4])
    assert slot is one
    assert (prefix.length, prefix.slot) == (3, one)
    with pytest.raises(RequestError, match="all 2 slots"):
        slots.acquire([7]), slots.acquire([7])


def test_a_shared_beginning_is_copied_and_not_taken_away() -> None:
    """From a slot in use, and from a free one that would lose more than it keeps."""
    slots = Slots(3, 8, 16)
    busy, _ = slots.acquire([1, 2, 3, 4, 5])
    slots.extend(busy, [1, 2, 3, 4, 5])
    slot, prefix = slots.acquire([1, 2, 9])
    assert slot is not busy
    assert (prefix.slot, prefix.length, slot.tokens) == (busy, 2, [1, 2])
    slots.release(busy)
    third, prefix = slots.acquire([1, 2, 8])
    assert third not in (busy, slot)
    assert busy.tokens == [1, 2, 3, 4, 5]


def test_the_snapshot_unused_for_longest_goes_first() -> None:
    slots = Slots(1, 2, 4, budget=20)
    slot = slots.all[0]
    slots.extend(slot, list(range(12)))
    for at in (2, 4):
        slots.keep(slot, at, bytes(10))
    assert slots.find(slot, [0, 1, 99]).window is not None
    slots.keep(slot, 6, bytes(10))
    assert slots.find(slot, [0, 1, 99]).length == 2
    assert slots.find(slot, [0, 1, 2, 3, 99]).length == 2  # that of 4 went
    assert slots.find(slot, list(range(7))).length == 6
