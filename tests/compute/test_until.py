"""Rows that see further than themselves (an image's see one another), against the numpy oracle."""

from itertools import pairwise

import numpy as np
import pytest

import oracle
import tiny
from conftest import Load, prompt
from gemloom import testing
from gemloom.compute.batch import Chunk
from gemloom.models.config import Kind
from golden import assert_close
from tiny import VARIANTS

IDS = prompt(50)
FIRST, STOP = 21, 33  # the block whose rows see one another; windows are of 16


def until(kinds: set[Kind], start: int, stop: int) -> dict[Kind, list[int]]:
    """The last position that each row from ``start`` sees, on layers of these kinds."""
    last = [STOP - 1 if FIRST <= i < STOP else i for i in range(start, stop)]
    return dict.fromkeys(kinds, last)


def wanted(variant: str, kinds: set[Kind], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Logits of the oracle when its attention has the same block."""

    def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, layer: oracle.Layer) -> np.ndarray:
        group, at = q.shape[1] // k.shape[1], np.arange(len(q))
        k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
        last = at
        if (Kind.SLIDING if layer.window else Kind.FULL) in kinds:
            last = np.where((at >= FIRST) & (at < STOP), STOP - 1, at)
        seen = at[None, :] <= last[:, None]
        if layer.window:
            seen &= at[:, None] - at[None, :] < layer.window
        scores = np.where(seen, np.einsum("qhd,khd->hqk", q, k) * layer.scale, -np.inf)
        return np.einsum("hqk,khd->qhd", oracle.softmax(scores), v).reshape(len(q), -1)

    monkeypatch.setattr(oracle, "attend", attend)
    made = VARIANTS[variant]
    return oracle.logits(tiny.metadata(made), tiny.tensors(made), IDS).astype(np.float32)


@pytest.mark.parametrize("kinds", [{Kind.SLIDING}, set(Kind)], ids=["sliding", "both"])
@pytest.mark.parametrize("variant", ["e2b", "31b", "gemma3"])
@pytest.mark.parametrize("cuts", [(0, 50), (0, 21, 33, 50), (0, 5, 40, 50)], ids=str)
def test_rows_of_a_block_see_one_another(
    load: Load, variant: str, kinds: set[Kind], cuts: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    reference, model = wanted(variant, kinds, monkeypatch), load(variant)
    parts = [
        Chunk(slot=0, start=a, tokens=IDS[a:b], wanted=range(b - a), until=until(kinds, a, b))
        for a, b in pairwise(cuts)
    ]
    ours = np.concatenate([testing.run(model, [part]).logits for part in parts])
    assert_close(ours, reference)
    causal = model.logits(IDS)
    assert np.abs(ours - causal).mean() / causal.std() > 0.01  # the block does something


def test_own_positions_are_causal_attention(load: Load) -> None:
    """To the bit, and for a wanted row alone as well."""
    model, n = load("e2b"), len(IDS)
    own = dict.fromkeys(Kind, range(n))
    plain = testing.run(model, [Chunk(slot=0, start=0, tokens=IDS, wanted=[3, n - 1])]).logits
    assert np.array_equal(
        testing.run(
            model, [Chunk(slot=0, start=0, tokens=IDS, wanted=[3, n - 1], until=own)]
        ).logits,
        plain,
    )
