"""What a request left in the cells does not reach the next one, even where it is no number.

Cells that a row does not see have a weight of 0, and 0 times NaN is NaN: so they are cleared.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

import gemloom
from conftest import Load, endless, prompt
from gemloom.errors import GemloomError
from random_lora import random_lora

OVERFLOW = 1e30  # scale of an adapter


def greedy(model: gemloom.Model, ids: list[int], **options: Any) -> list[int]:
    made = model.generate(ids, temperature=0, max_tokens=3, **endless(model), **options)
    return list(made.tokens)


def overflow(model: gemloom.Model, ids: list[int]) -> None:
    """A request that leaves cells which are no numbers."""
    with pytest.raises(GemloomError, match="is nan"):
        greedy(model, ids, adapters={"a": OVERFLOW})


def poisoned(load: Load, variant: str = "e2b", **options: Any) -> gemloom.Model:
    """Gemma 3's V have no norm: in an f16 cell they are infinite from 65520 on."""
    model = load(variant, threads=1, **options)
    values = random_lora(model, 1, lambda name: variant == "e2b" or "attn_v." in name)
    model.adapters.load("a", values)
    return model


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize(
    ("variant", "kv_type"), [("e2b", "f32"), ("e2b", "f16"), ("e2b", "q8_0"), ("gemma3", "f16")]
)
def test_after_an_overflow(load: Load, variant: str, kernels: str, kv_type: str) -> None:
    """Few rows and many: ggml has other code for 64 and more."""
    options = {"kernels": kernels, "kv_type": kv_type}
    model, fresh = poisoned(load, variant, **options), load(variant, threads=1, **options)
    for n in (3, 40, 70):
        overflow(model, prompt(130, seed=n))
        ids = prompt(n)
        assert (model.logits(ids) == fresh.logits(ids)).all()
        overflow(model, prompt(130, seed=n + 1))
        assert greedy(model, ids) == greedy(fresh, ids)


@pytest.mark.parametrize("slots", [1, 3])
def test_any_history(load: Load, slots: int) -> None:
    """Prefixes kept, copied and put back from snapshots, rings that have wrapped or not."""
    model, rng = poisoned(load, slots=slots, context=160, chunk=16), Random(slots)
    alone = load(threads=1, context=160, chunk=16, snapshots=0)
    shared = prompt(150)
    right: dict[int, list[int]] = {}
    for _ in range(60):
        n = rng.choice([1, 5, 17, 33, 64, 100, 150])
        if rng.random() < 0.4:
            overflow(model, shared[:n])
            continue
        right[n] = right.get(n) or greedy(alone, shared[:n])
        assert greedy(model, shared[:n]) == right[n]
    assert model.stats().cached_tokens
