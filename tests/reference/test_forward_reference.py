"""Our logits against transformers on the same tiny weights, live. Needs the reference group."""

from contextlib import closing

import numpy as np
import pytest

import gemloom
import oracle
import tiny
from tiny import VARIANTS, Variant

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf
from same_model import SEED, assert_same_model, prompt

pytestmark = pytest.mark.reference

variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@variants
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_oracle(variant: Variant, wide: bool) -> None:
    variant = variant.wide() if wide else variant
    ids = prompt(variant)
    reference = hf.logits(variant, SEED, ids)
    ours = oracle.logits(tiny.metadata(variant), tiny.tensors(variant, SEED), ids)
    assert np.abs(ours - reference).max() < 5e-5 * reference.std()


@variants
@pytest.mark.parametrize("chunk", [1, 7, 16, 128])
def test_runtime(variant: Variant, chunk: int) -> None:
    ids = prompt(variant)
    data = tiny.gguf_bytes(variant, SEED)
    with closing(gemloom.load(data, kv_type="f32", chunk=chunk, context=128)) as model:
        ours = model.logits(ids, rows="all")
    assert_same_model(ours, hf.logits(variant, SEED, ids))


@variants
def test_runtime_beyond_the_window_at_the_last_row_only(variant: Variant) -> None:
    """Where only one row is wanted, layers without K/V of their own may skip the others."""
    ids = prompt(variant)
    data = tiny.gguf_bytes(variant, SEED)
    with closing(gemloom.load(data, kv_type="f32", chunk=16, context=128)) as model:
        ours = model.logits(ids, rows="last")
    assert_same_model(ours, hf.logits(variant, SEED, ids)[-1:])
