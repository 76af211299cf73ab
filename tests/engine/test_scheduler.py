"""Which rows a step computes: pure policy, over any mixture of requests."""

from hypothesis import given
from hypothesis import strategies as st

from gemloom.compute.slots import Slot
from gemloom.engine.request import Request
from gemloom.engine.scheduler import plan
from gemloom.sampling.params import SamplingParams
from vocabularies import small

TOKENIZER = small("gemma3")


def running(pending: list[int]) -> list[Request]:
    found = []
    for index, n in enumerate(pending):
        sequence = Request([2] * n, SamplingParams(), TOKENIZER, lambda event: None)
        sequence.begin(Slot(index=index), 0)
        found.append(sequence)
    return found


pendings = st.lists(st.one_of(st.just(1), st.integers(1, 300)), min_size=1, max_size=20)


@given(pending=pendings, chunk=st.integers(1, 128), budget=st.integers(1, 128))
def test_every_request_moves_within_the_budget(pending: list[int], chunk: int, budget: int) -> None:
    chunks = plan(running(pending), chunk, budget)
    assert [chunk.slot for chunk in chunks] == list(range(len(pending)))  # none waits, in order
    rows = [len(chunk.tokens) for chunk in chunks]
    assert all(1 <= n <= p for n, p in zip(rows, pending, strict=True))
    decoding = pending.count(1)
    bound = min(chunk, budget) if decoding else chunk
    assert sum(rows) <= max(bound, len(pending))
    wasted = sum(rows) < bound - decoding and rows != pending
    assert not wasted


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    rows = [len(chunk.tokens) for chunk in plan(running([3000, 20, 1]), 512, 128)]
    assert rows == [107, 20, 1]


def test_only_the_last_row_of_a_prompt_is_wanted() -> None:
    assert [chunk.wanted for chunk in plan(running([10, 4, 1]), 8, 8)] == [(), (), (0,)]
