"""Models spread over workers: the same logits as in one process, and what happens when one dies."""

from collections.abc import Iterator

import numpy as np
import pytest

import tiny
from conftest import Load, prompt
from workers import Worker, needs_rpc, worker

pytestmark = needs_rpc


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Worker, Worker]]:
    with worker() as first, worker() as second:
        yield first, second


@pytest.mark.parametrize("variant", sorted(tiny.VARIANTS))
def test_two_workers_compute_what_one_process_does(
    load: Load, pair: tuple[Worker, Worker], variant: str
) -> None:
    ids = prompt(40)
    options = {"threads": 1, "chunk": 16}
    alone = load(variant, device="cpu", kernels="plain", **options)
    spread = load(variant, device=[w.device for w in pair], **options)
    assert set(spread.placement.layers) == {0, 1}
    want, got = alone.logits(ids), spread.logits(ids)
    print(variant, np.abs(want - got).max(), want.std())
    np.testing.assert_array_equal(want, got)
