"""What must not change a result: how a prompt is cut, batched, reused, saved or shifted."""

import gc
import weakref
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import gemloom
import tiny
from conftest import Load, endless, prompt
from engine_checks import assert_same, run
from gemloom.compute.batch import Chunk
from gemloom.errors import (
    ClosedError,
    ContextError,
    DeviceError,
    OptionError,
    RequestError,
    StateError,
)
from gemloom.ggml.graph import Graph
from gemloom.models.config import LayerSpec
from gemloom.testing import engine_of, parts_of
from tiny import VARIANTS

variants = pytest.mark.parametrize("variant", VARIANTS)
WINDOW = 16  # of the tiny models


def greedy(model: gemloom.Model) -> dict[str, Any]:
    """The most likely token each time, and no end but the context's or ``max_tokens``."""
    return {"temperature": 0, **endless(model)}


def reference(variant: str, ids: list[int]) -> np.ndarray:
    return _in_one_piece(variant, tuple(ids))


@cache
def _in_one_piece(variant: str, ids: tuple[int, ...]) -> np.ndarray:
    data = tiny.gguf_bytes(VARIANTS[variant])
    with gemloom.load(data, kv_type="f32", context=256, chunk=128, slots=1, threads=1) as model:
        return model.logits(list(ids))


@variants
@pytest.mark.parametrize("size", [1, 2, 7, WINDOW - 1, WINDOW, WINDOW + 1, 50])
def test_any_chunks_are_one_shot(load: Load, variant: str, size: int) -> None:
    """Over six windows, so that the ring of a small chunk wraps several times."""
    ids = prompt(100)
    assert_same(load(variant, chunk=size).logits(ids), reference(variant, ids))


@variants
@pytest.mark.parametrize("threads", [2, 5])
def test_any_threads_are_one(load: Load, variant: str, threads: int) -> None:
    ids = prompt(60)
    assert_same(load(variant, threads=threads, chunk=50).logits(ids), reference(variant, ids))


@variants
def test_ragged_chunks(load: Load, variant: str) -> None:
    ids, model = prompt(100), load(variant, chunk=32)
    cuts = [0, 1, 4, 20, 21, 53, 54, 86, 100]
    parts = [
        run(model, Chunk(slot=0, start=a, tokens=ids[a:b], wanted=range(b - a)))
        for a, b in pairwise(cuts)
    ]
    assert_same(np.concatenate(parts), reference(variant, ids))


@variants
def test_wanted_rows_are_those_of_all(load: Load, variant: str) -> None:
    ids, model = prompt(60), load(variant, chunk=64)
    rows = [3, 17, 18, 40, 59]
    wanted = run(model, Chunk(slot=0, start=0, tokens=ids, wanted=rows))
    assert_same(wanted, reference(variant, ids)[rows])


@variants
def test_rows_nobody_wants_still_fill_the_cells(load: Load, variant: str) -> None:
    ids, model = prompt(60), load(variant, chunk=64)
    assert run(model, Chunk(slot=0, start=0, tokens=ids[:50])).shape == (0, model.config.n_vocab)
    last = run(model, Chunk(slot=0, start=50, tokens=ids[50:], wanted=[9]))
    assert_same(last, reference(variant, ids)[-1:])


@variants
def test_a_ragged_batch_is_each_alone(load: Load, variant: str) -> None:
    """Prefill and decode rows of three sequences in one step, some rows wanted, in any order."""
    a, b, c = prompt(40, seed=1), prompt(90, seed=2), prompt(25, seed=3)
    model = load(variant, slots=3, chunk=64)
    run(
        model,
        Chunk(slot=0, start=0, tokens=a[:39]),
        Chunk(slot=2, start=0, tokens=c[:10], wanted=[9]),
    )
    run(
        model,
        Chunk(slot=1, start=0, tokens=b[:60], wanted=[5]),
        Chunk(slot=2, start=10, tokens=c[10:24]),
    )
    got = run(
        model,
        Chunk(slot=2, start=24, tokens=c[24:], wanted=[0]),
        Chunk(slot=0, start=39, tokens=a[39:], wanted=[0]),
        Chunk(slot=1, start=60, tokens=b[60:], wanted=[3, 29]),
    )
    alone = [reference(variant, x) for x in (c, a, b)]
    expected = np.stack([alone[0][24], alone[1][39], alone[2][63], alone[2][89]])
    assert_same(got, expected)


@variants
def test_a_kept_graph_is_a_new_one(load: Load, variant: str) -> None:
    """Decode steps of two sequences by turns and of one at a time use and drop kept graphs."""
    a, b = prompt(40, seed=1), prompt(40, seed=2)
    model = load(variant, slots=2, chunk=64)
    run(model, Chunk(slot=0, start=0, tokens=a[:30]), Chunk(slot=1, start=0, tokens=b[:30]))
    rows_a, rows_b = [], []
    for i in range(30, 40):
        rows_a.append(run(model, Chunk(slot=0, start=i, tokens=a[i : i + 1], wanted=[0])))
        if i % 3:
            rows_b.append(run(model, Chunk(slot=1, start=i, tokens=b[i : i + 1], wanted=[0])))
        else:
            both = run(
                model,
                Chunk(slot=1, start=i, tokens=b[i : i + 1], wanted=[0]),
                Chunk(slot=0, start=i, tokens=a[i : i + 1], wanted=[0]),
            )
            rows_b.append(both[:1])
            assert_same(both[1:], rows_a[-1])
    assert_same(np.concatenate(rows_a), reference(variant, a)[30:])
    assert_same(np.concatenate(rows_b), reference(variant, b)[30:])


@variants
@pytest.mark.parametrize(
    ("first", "common", "cached"),
    [(30, 30, 30), (30, 12, 12), (90, 90, 90), (90, 85, 85), (90, 40, 0)],
)
def test_prefix_reuse_is_a_cold_run(
    load: Load, variant: str, first: int, common: int, cached: int
) -> None:
    """Before and after the ring has wrapped, with the prefix kept or lost."""
    ids = prompt(first)
    model = load(variant, chunk=16)
    model.generate(ids, temperature=0, max_tokens=3)
    second = ids[:common] + prompt(20, seed=5)[1:]
    warm = model.generate(second, temperature=0, max_tokens=8, logprobs=3)
    cold = load(variant, chunk=16).generate(second, temperature=0, max_tokens=8, logprobs=3)
    assert warm.tokens == cold.tokens
    assert np.allclose(
        [p.logprob for p in warm.pieces], [p.logprob for p in cold.pieces], atol=1e-3
    )
    assert warm.usage.cached_tokens == cached


@variants
def test_conversations_in_turn_do_not_mix(load: Load, variant: str) -> None:
    a, b = prompt(40, seed=1), prompt(50, seed=2)
    model = load(variant, slots=2)
    alone = [load(variant).generate(x, temperature=0, max_tokens=12).tokens for x in (a, b)]
    one = model.stream(a, temperature=0, max_tokens=12)
    two = model.stream(b, temperature=0, max_tokens=12)
    mixed = [(next(one).token, next(two).token) for _ in range(12)]
    assert [list(x) for x in zip(*mixed, strict=True)] == alone


def test_same_seed_same_text_whatever_else_runs(load: Load) -> None:
    model = load(slots=2)
    options = {"seed": 7, "max_tokens": 20, "temperature": 2.0}
    first = model.generate(prompt(20), **options)
    with model.stream(prompt(33, seed=4), max_tokens=50) as other:
        next(other)
        again = model.generate(prompt(20), **options)
    assert first.tokens == again.tokens
    assert first.tokens != model.generate(prompt(20), **(options | {"seed": 8})).tokens


@variants
@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_saved_state(load: Load, variant: str, kv_type: str) -> None:
    """After the ring has wrapped; into another instance of the model, and not into another one."""
    ids = prompt(80)
    model = load(variant, chunk=16, kv_type=kv_type)
    run_on = model.generate(ids, temperature=0, max_tokens=5).tokens
    state = model.save_state()
    follow = ids + run_on[:4] + prompt(6, seed=3)[1:]
    expected = model.generate(follow, temperature=0, max_tokens=6)
    other = load(variant, chunk=16, kv_type=kv_type)
    assert other.load_state(state) == len(ids) + 4
    restored = other.generate(follow, temperature=0, max_tokens=6)
    assert restored.tokens == expected.tokens
    assert restored.usage.cached_tokens == expected.usage.cached_tokens == len(ids) + 4
    stranger = load("31b" if variant != "31b" else "e2b", chunk=16, kv_type=kv_type)
    with pytest.raises(StateError, match="other model"):
        stranger.load_state(state)


def test_damaged_state_is_refused_and_changes_nothing(load: Load) -> None:
    model = load()
    tokens = model.generate(prompt(20), temperature=0, max_tokens=5).tokens
    state = model.save_state()
    for bad in (
        b"",
        b"nonsense",
        state[:40],
        state[:-1],
        state + b"x",
        state.replace(b"f32", b"f99"),
    ):
        with pytest.raises(StateError):
            model.load_state(bad)
    assert model.generate(prompt(20), temperature=0, max_tokens=5).tokens == tokens


@variants
def test_context_shift_turns_every_key_back(load: Load, variant: str) -> None:
    """Cell by cell against a rotation in numpy, with each layer's dimensions, base and factors."""
    keep, drop, n = 4, 20, 60
    model = load(variant, chunk=64)
    run(model, Chunk(slot=0, start=0, tokens=prompt(n)))
    before = [np.frombuffer(part, np.float32).copy() for part in parts_of(model).store.export(0, n)]
    parts_of(model).program.shift(0, keep, drop, n)
    after = [np.frombuffer(part, np.float32) for part in parts_of(model).store.export(0, n)]
    specs = [spec for spec in model.config.layers if spec.owns_kv]
    for spec, k, v, new_k, new_v in zip(
        specs, before[::2], before[1::2], after[::2], after[1::2], strict=True
    ):
        shape = (n, spec.n_kv, spec.head_dim)
        moved = turned(model, spec, k.reshape(shape)[keep + drop :], -drop)
        assert np.allclose(new_k.reshape(shape)[keep : n - drop], moved, atol=1e-5)
        assert np.array_equal(new_k.reshape(shape)[:keep], k.reshape(shape)[:keep])
        assert np.array_equal(
            new_v.reshape(shape)[keep : n - drop], v.reshape(shape)[keep + drop :]
        )


def turned(model: gemloom.Model, spec: LayerSpec, k: np.ndarray, by: int) -> np.ndarray:
    """k [n, n_kv, head_dim], each pair (i, i + n_dims/2) turned by ``by`` positions."""
    rope, half = spec.rope, spec.rope.n_dims // 2
    angle = by * rope.scale * rope.base ** (-2 * np.arange(half) / rope.n_dims)
    if rope.factors:
        angle = angle / parts_of(model).weights["rope_freqs.weight"].numpy()
    a, b = k[..., :half], k[..., half : 2 * half]
    turned_a = a * np.cos(angle) - b * np.sin(angle)
    return np.concatenate([turned_a, a * np.sin(angle) + b * np.cos(angle), k[..., 2 * half :]], -1)


@variants
def test_context_shift_goes_on_past_the_context(load: Load, variant: str) -> None:
    model = load(variant, context=64, keep=4, chunk=8)
    done = model.generate(prompt(40), max_tokens=150, **greedy(model))
    assert done.usage.completion_tokens == 150
    again = model.generate(prompt(40), max_tokens=5, **greedy(model))
    assert again.usage.cached_tokens == 0  # what was moved is not taken for a prefix
    assert again.tokens == done.tokens[:5]


def test_without_shift_the_context_ends_the_text(load: Load) -> None:
    model = load(context=48)
    done = model.generate(prompt(40), **greedy(model))
    assert (done.finish_reason, len(done.tokens)) == ("length", 9)


def test_trace_gives_what_the_layers_pass_on(load: Load) -> None:
    ids, model = prompt(40), load(chunk=16)
    taps = ["embd", "blk.3.attn_q", "blk.3.attn_out", "blk.3.out", "logits"]
    values = model.trace(ids, taps)
    assert np.array_equal(values["logits"], model.logits(ids))
    assert values["blk.3.out"].shape == (40, model.config.n_embd)
    assert_same(load(chunk=64).trace(ids, taps)["blk.3.out"], values["blk.3.out"])
    with pytest.raises(OptionError, match=r"blk\.3\.attn_q"):
        model.trace(ids, ["blk.3.attnq"])


def test_every_name_can_be_tapped(load: Load) -> None:
    for variant in VARIANTS:
        model = load(variant)
        names = model.tap_names()
        assert len(names) == len(set(names)) > 10 * model.config.n_layer
        values = model.trace(prompt(5), names)
        assert all(np.isfinite(value).all() and len(value) == 5 for value in values.values())


@pytest.mark.parametrize("rows", ["last", [0], [5, 2, 2]])
def test_rows_of_logits(load: Load, rows: str | list[int]) -> None:
    ids, model = prompt(9), load()
    index = [8] if rows == "last" else rows
    assert_same(model.logits(ids, rows), model.logits(ids)[index])


@variants
def test_looking_inside_leaves_no_trace(load: Load, variant: str) -> None:
    """logits() and trace() borrow the slot; what it held before is not taken to be there still."""
    a, b = prompt(30, seed=1), prompt(20, seed=2)
    model = load(variant)
    expected = model.generate(a, temperature=0, max_tokens=6).tokens
    for look in (lambda: model.logits(b), lambda: model.trace(b, ["embd"])):
        look()
        again = model.generate(a, temperature=0, max_tokens=6)
        assert (again.tokens, again.usage.cached_tokens) == (expected, 1)  # the <bos> of both


def test_a_look_that_failed_leaves_no_trace(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring may be half written, so nothing of it is reused; others are not concerned."""
    model = load(chunk=16)
    ids = prompt(80)
    model.generate(ids, max_tokens=2, temperature=0)
    whole = Graph.compute

    def interrupted(graph: Graph, meanwhile: Any) -> None:
        whole(graph, meanwhile)
        raise KeyboardInterrupt

    monkeypatch.setattr(Graph, "compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.logits(ids + prompt(30, seed=3))
    monkeypatch.undo()
    follow = model.generate(ids[:78], temperature=0, max_tokens=4)
    cold = load(chunk=16).generate(ids[:78], temperature=0, max_tokens=4)
    assert (follow.tokens, follow.usage.cached_tokens) == (cold.tokens, 0)


def test_closing_in_the_middle_of_a_step(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal handler may: the step ends on memory that is still there."""
    model = load()
    whole = Graph.compute

    def closing(graph: Graph, meanwhile: Any) -> None:
        model.close()
        whole(graph, meanwhile)

    monkeypatch.setattr(Graph, "compute", closing)
    with pytest.raises(ClosedError):
        model.generate(prompt(20), max_tokens=5)


def test_models_nobody_holds_are_freed() -> None:
    data = tiny.gguf_bytes(VARIANTS["e2b"])
    model = gemloom.load(data, context=64, threads=1)
    engine = weakref.ref(engine_of(model))
    model.generate([2], max_tokens=1)
    del model
    gc.collect()
    assert engine() is None


def test_dropped_streams_give_their_slot_back(load: Load) -> None:
    model = load(slots=1)
    for _ in range(3):
        next(model.stream(prompt(5), max_tokens=50))  # dropped at once


def test_no_state_of_a_shifted_or_running_request(load: Load) -> None:
    model = load(context=64, keep=4, chunk=8)
    with pytest.raises(RequestError, match="no finished request"):
        model.save_state()
    with model.stream(prompt(40), max_tokens=60, **greedy(model)) as stream:
        for _ in range(50):
            next(stream)
        with pytest.raises(RequestError, match="no finished request"):
            model.save_state()
    with pytest.raises(RequestError, match="no finished request"):
        model.save_state()


def test_bad_requests(load: Load) -> None:
    model = load(context=32)
    with pytest.raises(RequestError, match="empty"):
        model.generate("")
    with pytest.raises(RequestError, match="empty"):
        model.generate([])
    with pytest.raises(ContextError, match="33 tokens, the context 32"):
        model.generate(prompt(33))
    with pytest.raises(OptionError, match="999999"):
        model.generate([2, 999_999])
    with pytest.raises(OptionError, match="rows"):
        model.logits([2, 3], rows=[2])
    with pytest.raises(OptionError, match="temperature"):
        model.generate([2], temperature=-1)
    with pytest.raises(OptionError, match="max_tokens"):
        model.generate([2], max_token=1)
    for bad in (None, 5, b"The cap", [2, 5.7], ["a"], [None]):
        with pytest.raises(OptionError, match="must be integers"):
            model.generate(bad)
    for rows in ("first", [9], [], [0.5], "", None):
        with pytest.raises(OptionError, match="rows"):
            model.logits([2, 3], rows=rows)
    assert model.logits([2, 3], rows=np.array([1, 0])).shape == (2, model.config.n_vocab)
    with pytest.raises(OptionError, match="text must be a str"):
        model.tokenize(None)
    with pytest.raises(OptionError, match="ids must be integers"):
        model.detokenize([1.5])
    with pytest.raises(OptionError, match="no intermediate is named None"):
        model.trace([2], [None])
    for bad in ("x", None, b"GEMLOOM-STATE-1\n" + b"\xff\x7f\0\0" + b"[" * 40_000):
        with pytest.raises(StateError):
            model.load_state(bad)


def test_busy_slots_and_early_ends(load: Load) -> None:
    model = load(slots=1)
    stream = model.stream(prompt(5), max_tokens=200, **greedy(model))
    next(stream)
    assert_same(model.logits(prompt(5)), load().logits(prompt(5)))  # once the slot is free
    assert len(list(stream)) == 199
    stream = model.stream(prompt(5), max_tokens=200, **greedy(model))
    next(stream)
    stream.close()
    assert list(stream) == []
    with model.stream(prompt(5), max_tokens=3) as run_out:
        assert [piece.finish_reason for piece in run_out][-1] is not None
    assert model.generate(prompt(5), max_tokens=2).usage.prompt_tokens == 5


def test_closed(load: Load) -> None:
    model = load(keep=4)  # so the text does not end
    stream = model.stream(prompt(5), **greedy(model))
    next(stream)
    model.close()
    model.close()
    with pytest.raises(ClosedError):
        list(stream)
    for call in (lambda: model.generate([2]), model.save_state, lambda: model.logits([2])):
        with pytest.raises(ClosedError):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context"),
        ({"context": 10**9}, "context"),
        ({"kv_type": ["f16"]}, "kv_type"),
        ({"mmap": "no"}, "mmap must be True or False"),
        ({"kv_type": "q4"}, "kv_type must be one of f32, f16, q8_0"),
        ({"threads": True}, "threads"),
        ({"slots": "2"}, "slots"),
        ({"chunk": -1}, "chunk"),
        ({"keep": 250}, "window"),
        ({"contxt": 5}, "did you mean context"),
    ],
)
def test_bad_load_options(load: Load, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load(**options)


def test_other_devices_are_named(load: Load) -> None:
    with pytest.raises(DeviceError, match="cuda0"):
        load(device="cuda0")
