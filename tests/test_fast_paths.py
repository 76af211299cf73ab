"""Every faster way to compute against the plain one: repacked weights, small K/V, any cut."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

import gemloom
import tiny
from conftest import Load, prompt
from gemloom.sequence import Chunk
from tiny import VARIANTS

variants = pytest.mark.parametrize("variant", VARIANTS)
QUANTIZED = {"types": "q4_0"}  # ggml repacks it at the tiny models' sizes, on x86 and ARM
IDS = prompt(100)  # six windows: rings wrap
CUTS = [0, 1, 4, 20, 21, 53, 54, 86, 100]


def _rounded(keys: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """The values that the quantized matrices stand for."""
    kind = GGMLQuantizationType.Q4_0
    for name, weight in weights.items():
        if tiny._is_matrix(name, weight):
            weights[name] = dequantize(quantize(weight, kind), kind)


def ragged(model: gemloom.Model) -> np.ndarray:
    parts = [model._runner.run([Chunk(0, a, IDS[a:b], range(b - a))]) for a, b in pairwise(CUTS)]
    return np.concatenate(parts)


@variants
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_repacked_weights_are_as_right_as_plain_ones(
    load: Load, variant: str, kv_type: str
) -> None:
    """Both are held against the same weights in f32, since both round activations to 8 bits.

    Between the two, an activation that falls to the other side of a rounding grows into 0.005 to
    0.02 of the logits' deviation; from f32, either is 0.02 to 0.05 away on average, 0.7 at most.
    """
    exact = load(variant, forms={"edit": _rounded}).logits(IDS)
    options = {"forms": QUANTIZED, "kv_type": kv_type, "chunk": 32}
    plain = load(variant, kernels="plain", **options)
    fast = load(variant, kernels="ggml", **options)
    if not fast.memory()["repacked"]:
        pytest.skip("this CPU has no kernels for repacked weights")
    assert not plain.memory()["repacked"]
    errors = [np.abs(m.logits(IDS) - exact) / exact.std() for m in (plain, fast)]
    assert errors[1].mean() < 1.1 * errors[0].mean()
    assert errors[1].mean() < 0.06
    assert errors[1].max() < 1


@variants
@pytest.mark.parametrize("kernels", ["auto", "ggml", "plain"])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_no_cut_changes_a_quantized_model(
    load: Load, variant: str, kv_type: str, kernels: str
) -> None:
    """A row's activations are rounded by themselves, whatever rows come along.

    Not one bit differed on AVX-512; kernels that add in another order for several rows may tip a
    rounding, but stay below what repacking does.
    """
    model = load(variant, forms=QUANTIZED, kv_type=kv_type, chunk=40, kernels=kernels)
    whole = model.logits(IDS)
    error = np.abs(ragged(model) - whole) / whole.std()
    assert error.mean() < 0.025
