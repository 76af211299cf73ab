"""A model with an adapter is the model whose matrices were merged in f32, whatever the batch."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemloom
import tiny
from conftest import Load, endless, prompt
from engine_checks import assert_same, run
from gemloom.adapters.factors import Lora, Pair
from gemloom.adapters.request_adapters import Active
from gemloom.compute.batch import Chunk
from random_lora import merged, random_lora
from tiny import VARIANTS

variants = pytest.mark.parametrize("variant", VARIANTS)
OPTIONS: dict[str, Any] = {"kv_type": "f32", "context": 128, "threads": 1}


def reference(variant: str, scales: dict[str, tuple[Lora, float]], **forms: Any) -> gemloom.Model:
    return gemloom.load(merged(variant, scales, **forms), **OPTIONS)


def active(model: gemloom.Model, scales: dict[str, float], since: int = 0) -> tuple[Active, ...]:
    with model.adapters.lease(scales, []) as found:
        return tuple(Active(each.adapter, each.scale, since) for each in found)


def kind(name: str) -> str:
    """What a matrix is in its layer, or in the model: "attn_q.weight"."""
    return name.split(".", 2)[2] if name.startswith("blk.") else name


@variants
def test_every_kind_of_matrix(load: Load, variant: str) -> None:
    """Each alone, over more than two windows in chunks; wanted rows only as well."""
    ids, model = prompt(40), load(variant, threads=1, chunk=16)
    plain, whole = model.logits(ids), random_lora(model)
    for which in {kind(name) for name in whole.pairs}:
        pairs = {name: pair for name, pair in whole.pairs.items() if kind(name) == which}
        lora = Lora(which, None, pairs)
        model.adapters.load("x", lora)
        got, last = (model.logits(ids, rows, adapters={"x": 0.8}) for rows in ("all", "last"))
        with reference(variant, {"x": (lora, 0.8)}) as other:
            expected = other.logits(ids)
        assert np.abs(expected - plain).mean() > 0.01 * plain.std(), which
        assert_same(got, expected)
        assert_same(last, expected[-1:])
    assert np.array_equal(model.logits(ids), plain)


@variants
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_all_at_once_in_any_chunks(load: Load, variant: str, chunk: int) -> None:
    """Two adapters at two scales; prompts, and what is decoded after them."""
    ids, model = prompt(50), load(variant, threads=1, chunk=chunk)
    loras = {name: (random_lora(model, seed), scale) for name, seed, scale in
             (("a", 1, 0.7), ("b", 2, -0.4))}  # fmt: skip
    for name, (lora, _) in loras.items():
        model.adapters.load(name, lora)
    scales = {name: scale for name, (_, scale) in loras.items()}
    with reference(variant, loras) as other:
        assert_same(model.logits(ids, adapters=scales), other.logits(ids))
        assert_same(model.embed(ids, adapters=scales), other.embed(ids))
        greedy = {"temperature": 0, "max_tokens": 12, "logprobs": 0, **endless(model)}
        got, expected = (m.generate(ids, **more, **greedy) for m, more in
                         ((model, {"adapters": scales}), (other, {})))  # fmt: skip
    assert got.tokens == expected.tokens
    assert np.allclose([p.logprob for p in got.pieces], [p.logprob for p in expected.pieces],
                       atol=0.01)  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "form"), [("e2b", "untied"), ("e2b", "fused_qkv"), ("26b", "split_experts")]
)
def test_other_forms_of_the_file(load: Load, variant: str, form: str) -> None:
    ids, model = prompt(40), load(variant, threads=1, chunk=16, forms={form: True})
    lora = random_lora(model)
    model.adapters.load("x", lora)
    with reference(variant, {"x": (lora, 1.0)}, **{form: True}) as other:
        assert_same(model.logits(ids, adapters={"x": 1.0}), other.logits(ids))


def test_an_adapter_made_for_parts_fits_a_fused_matrix(load: Load) -> None:
    ids, fused = prompt(30), load("31b", threads=1, forms={"fused_qkv": True})
    parts = load("31b", threads=1)
    lora = random_lora(parts)
    for model in (fused, parts):
        model.adapters.load("x", lora)
    assert_same(*(model.logits(ids, adapters={"x": 1.0}) for model in (fused, parts)))


def test_intermediates_are_those_of_the_merged_model(load: Load) -> None:
    ids, model = prompt(30), load(threads=1, chunk=8)
    lora = random_lora(model)
    model.adapters.load("x", lora)
    taps = ["embd", "blk.3.attn_q", "blk.9.attn_output", "blk.2.ffn_down", "blk.4.inp_gate"]
    got = model.trace(ids, taps, adapters={"x": 0.5})
    with reference("e2b", {"x": (lora, 0.5)}) as other:
        expected = other.trace(ids, taps)
    for tap in taps:
        assert_same(got[tap], expected[tap])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_rows(load: Load, threads: int) -> None:
    """One row is cut into pieces, several are shared out; both give what one thread gives."""
    ids = prompt(20)
    alone, several = load(threads=1), load(threads=threads, slots=2)
    lora = random_lora(alone)
    for model in (alone, several):
        model.adapters.load("x", lora)
    expected = alone.logits(ids, adapters={"x": 1.0})
    on = active(several, {"x": 1.0})
    parts = [run(several, Chunk(slot=0, start=a, tokens=ids[a:b], wanted=range(b - a), adapters=on))
             for a, b in pairwise([0, 1, 2, 4, 7, 12, 20])]  # fmt: skip
    assert_same(np.concatenate(parts), expected)


def test_a_then_b_then_a(load: Load) -> None:
    ids, model = prompt(40), load("e4b", threads=1)
    for name, seed in (("a", 1), ("b", 2)):
        model.adapters.load(name, random_lora(model, seed))
    plain = model.logits(ids)
    a, b, again = (model.logits(ids, adapters={name: 1.0}) for name in "aba")
    assert np.array_equal(a, again)
    assert np.abs(a - b).mean() > 0.1 * plain.std()
    assert np.array_equal(model.logits(ids), plain)
    for nothing in ({}, {"a": 0}, {"a": 0.0, "b": -0.0}):
        assert np.array_equal(model.logits(ids, adapters=nothing), plain)


def test_f16_factors_give_what_they_say(load: Load) -> None:
    """They are widened, never the activations narrowed."""
    ids, model = prompt(30), load(threads=1)
    exact = random_lora(model)
    half = {n: Pair(p.a.astype(np.float16), p.b.astype(np.float16), p.scale)
            for n, p in exact.pairs.items()}  # fmt: skip
    wide = {n: Pair(p.a.astype(np.float32), p.b.astype(np.float32), p.scale)
            for n, p in half.items()}  # fmt: skip
    for name, pairs in (("half", half), ("wide", wide)):
        model.adapters.load(name, Lora(name, None, pairs))
    a, b = (model.logits(ids, adapters={name: 1.0}) for name in ("half", "wide"))
    assert np.array_equal(a, b)


# --- mixed batches ------------------------------------------------------------

CHOICES: list[dict[str, float]] = [
    {}, {"a": 1.0}, {"a": 0.3}, {"b": 1.0}, {"a": -0.5, "b": 0.5}, {"c": 1.0}, {"c": 2.0, "a": 1.0},
]  # fmt: skip


@pytest.fixture(scope="module")
def mixed() -> Any:
    """Of two structures, a model of four slots with three adapters, one on few matrices."""
    models = {}
    for variant in ("e2b", "26b"):
        model = gemloom.load(tiny.gguf_bytes(VARIANTS[variant]), **OPTIONS, slots=4, chunk=64)
        for name, seed, rank in (("a", 1, 4), ("b", 2, 7), ("c", 3, 1)):
            some = (lambda n: "attn_q" in n or "ffn_down" in n) if name == "c" else (lambda n: True)
            model.adapters.load(name, random_lora(model, seed, some, rank))
        models[variant] = model
    yield models
    for model in models.values():
        model.close()


sequences = st.lists(
    st.tuples(
        st.sampled_from(CHOICES),
        st.integers(0, 25),  # where its adapters begin
        st.lists(st.integers(1, 20), min_size=1, max_size=3),  # its chunks
        st.integers(0, 5),  # of the prompt
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(variant=st.sampled_from(["e2b", "26b"]), batch=sequences, data=st.data())
def test_a_random_batch_is_each_alone(
    mixed: dict[str, gemloom.Model], variant: str, batch: Any, data: st.DataObject
) -> None:
    """Whoever shares its steps, a sequence gets its own adapters on its own rows, wanted or not."""
    model = mixed[variant]
    plans = []
    for slot, (choice, since, sizes, seed) in enumerate(batch):
        ids, on = prompt(sum(sizes), seed=seed), active(model, choice, since)
        chunks = []
        for start, size in zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True):
            wanted = sorted(data.draw(st.sets(st.integers(0, size - 1))))
            chunks.append(
                Chunk(
                    slot=slot,
                    start=start,
                    tokens=ids[start : start + size],
                    wanted=wanted,
                    adapters=on,
                )
            )
        plans.append(chunks)
    together: dict[int, list[np.ndarray]] = {slot: [] for slot in range(len(plans))}
    for step in range(max(map(len, plans))):
        chunks = [plan[step] for plan in plans if step < len(plan)]
        rows = iter(run(model, *chunks))
        for chunk in chunks:
            together[chunk.slot] += [next(rows) for _ in chunk.wanted]
    for slot, plan in enumerate(plans):
        alone = [row for chunk in plan for row in run(model, chunk)]
        if alone:
            assert_same(np.stack(together[slot]), np.stack(alone))
