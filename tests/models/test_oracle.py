"""The tiny models and the numpy oracle, against logits that transformers computed for them."""

import numpy as np
import pytest

import oracle
import tiny
from golden import golden
from tiny import VARIANTS, Variant

variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@variants
def test_oracle_computes_what_transformers_does(variant: Variant) -> None:
    ids, expected = golden(variant.name)
    ours = oracle.logits(tiny.metadata(variant), tiny.tensors(variant), ids)
    error = np.abs(ours - expected) / expected.std()
    assert error.max() < 5e-5  # the reference adds in float32


@variants
def test_every_tensor_matters(variant: Variant) -> None:
    """A tensor that could be ignored would let a runtime ignore it: one of each name is changed."""
    keys = tiny.metadata(variant)
    weights = {name: value.astype(np.float64) for name, value in tiny.tensors(variant).items()}
    ids = range(2, 2 + variant.window)
    base = oracle.logits(keys, weights, ids)
    by_short_name = {name.split(".", 2)[-1]: name for name in reversed(weights)}
    for name in by_short_name.values():
        noise = np.random.RandomState(1).uniform(0.5, 1.5, weights[name].shape)
        changed = oracle.logits(keys, weights | {name: weights[name] * noise}, ids)
        assert np.abs(changed - base).mean() > 0.01 * base.std(), name


@variants
def test_only_its_window_reaches_a_sliding_layer(variant: Variant) -> None:
    keys, weights = tiny.metadata(variant), tiny.tensors(variant)
    ids = list(range(2, 2 + 2 * variant.window))
    base = oracle.logits(keys, weights, ids)
    for window in (variant.window - 1, variant.window + 1):
        keys[f"{variant.arch}.attention.sliding_window"] = window
        moved = np.abs(oracle.logits(keys, weights, ids) - base).max(axis=1) > 1e-9
        assert moved.argmax() == min(window, variant.window)  # the first row that sees the change
