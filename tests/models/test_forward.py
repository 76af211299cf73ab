"""Logits against golden ones of transformers, for every structure and every form of file."""

import numpy as np
import pytest

import oracle
import tiny
from conftest import Load
from gemloom.errors import TensorError
from golden import assert_close, golden
from tiny import VARIANTS

variants = pytest.mark.parametrize("variant", VARIANTS)
with_shared_kv = pytest.mark.parametrize("variant", ["e2b", "e4b"])


@variants
@pytest.mark.parametrize("chunk", [3, 16, 64])
def test_golden(load: Load, variant: str, chunk: int) -> None:
    ids, reference = golden(variant)
    assert_close(load(variant, chunk=chunk).logits(ids), reference)


@variants
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_cells_of_other_types(load: Load, variant: str, kv_type: str) -> None:
    """Eight bits a cell move logits by a few percent of their deviation, half floats hardly."""
    ids, reference = golden(variant)
    error = np.abs(load(variant, kv_type=kv_type).logits(ids) - reference) / reference.std()
    assert error.mean() < {"f16": 0.005, "q8_0": 0.05}[kv_type]


@pytest.mark.parametrize("form", ["fused_qkv", "arrays"])
@variants
def test_forms_of_a_file(load: Load, variant: str, form: str) -> None:
    """Fused or separate, scalar or array: the same logits to the bit."""
    ids, _ = golden(variant)
    assert np.array_equal(load(variant, forms={form: True}).logits(ids), load(variant).logits(ids))


@variants
def test_a_head_of_its_own(load: Load, variant: str) -> None:
    ids, _ = golden(variant)
    keys, weights = tiny.metadata(VARIANTS[variant]), dict(tiny.tensors(VARIANTS[variant]))
    tiny.untied(VARIANTS[variant], keys, weights)
    ours = load(variant, forms={"untied": True}).logits(ids)
    assert_close(ours, oracle.logits(keys, weights, ids).astype(np.float32))


def test_split_experts(load: Load) -> None:
    ids, _ = golden("26b")
    split = load("26b", forms={"split_experts": True}).logits(ids)
    assert np.array_equal(split, load("26b").logits(ids))


@with_shared_kv
def test_redundant_kv_changes_nothing(load: Load, variant: str) -> None:
    ids, _ = golden(variant)
    redundant = load(variant, forms={"redundant_kv": True}).logits(ids)
    assert np.array_equal(redundant, load(variant).logits(ids))


@variants
@pytest.mark.parametrize("types", ["q8_0", "q4_0"])
def test_quantized_weights(load: Load, variant: str, types: str) -> None:
    ids, reference = golden(variant)
    error = np.abs(load(variant, forms={"types": types}).logits(ids) - reference) / reference.std()
    assert error.mean() < {"q8_0": 0.15, "q4_0": 0.9}[types]


@variants
def test_a_missing_tensor_is_named(load: Load, variant: str) -> None:
    for name in ("blk.1.attn_q.weight", "blk.0.attn_k_norm.weight", "output_norm.weight"):
        with pytest.raises(TensorError, match=name):
            load(variant, forms={"drop": (name,)})
