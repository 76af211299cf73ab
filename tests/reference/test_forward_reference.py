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

pytestmark = pytest.mark.reference

SEED = 1  # not the golden files' weights
PROMPT_SEED = 9  # no two experts nearly tie on this prompt, so rounding cannot swap them
TOKENS = 70
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def prompt(variant: Variant) -> list[int]:
    """<bos> and then any tokens, over four windows long."""
    ids = np.random.RandomState(PROMPT_SEED).randint(variant.n_vocab, size=TOKENS)
    return [2, *ids[1:].tolist()]


def assert_same_model(ours: np.ndarray, reference: np.ndarray) -> None:
    """Equal up to the rounding of a GELU table in half precision, ggml's on the CPU.

    Such a table alone gives a mean of up to 0.0009 and a maximum of 0.006 standard
    deviations; the smallest structural mistake tried (RoPE turning all dimensions of a
    full layer instead of a quarter) gives a mean of 0.008.
    """
    assert ours.dtype == np.float32
    assert ours.shape == reference.shape
    error = np.abs(ours - reference) / reference.std()
    assert error.mean() < 0.002
    assert error.max() < 0.02
    best, chosen = reference.max(axis=1), np.take_along_axis(reference, ours.argmax(1)[:, None], 1)
    assert (best - chosen[:, 0] < 0.04 * reference.std()).all()


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
