"""Which prefix a slot can keep: pure bookkeeping, checked against a naive model of a ring."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemloom.errors import RequestError
from gemloom.slots import Slots


@given(
    held=st.lists(st.integers(0, 1), max_size=60),
    wanted=st.lists(st.integers(0, 1), max_size=60),
    window=st.integers(1, 8),
    spare=st.integers(1, 20),
)
def test_reuse_never_trusts_a_lost_cell(
    held: list[int], wanted: list[int], window: int, spare: int
) -> None:
    ring = window + spare
    slots = Slots(1, window, ring)
    slots.all[0].tokens = held
    n = slots.reusable(slots.all[0], wanted)
    assert 0 <= n < max(1, len(wanted))
    assert held[:n] == wanted[:n]
    cells = {p % ring: p for p in range(len(held))}  # the last position written to each cell
    seen = range(max(0, n - window + 1), n)  # by the first row to be computed
    assert n == 0 or all(cells[p % ring] == p for p in seen)


def test_the_best_prefix_wins_then_the_oldest() -> None:
    slots = Slots(3, 8, 16)
    for tokens in ([1, 2, 3], [1, 2, 9, 9], [7]):
        slot = slots.acquire([0, *tokens])
        slot.tokens[:] = tokens
    for slot in slots.all:
        slots.release(slot)
    best = slots.acquire([1, 2, 9, 4])
    assert (best.index, best.tokens) == (1, [1, 2, 9])
    assert slots.acquire([5, 5]).index == 0
    assert slots.acquire([5, 5]).index == 2
    with pytest.raises(RequestError, match="all 3 slots"):
        slots.acquire([1])
