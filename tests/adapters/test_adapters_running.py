"""Adapters come and go while requests run: versions, prefixes, memory, and what is refused."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gemloom
import tiny
from conftest import Load, endless, paced, prompt, until
from engine_checks import assert_same, idle, watch_batches
from gemloom.adapters import registry
from gemloom.adapters.factors import Lora, Pair
from gemloom.adapters.request_adapters import Active, agreed, marks, stretches
from gemloom.errors import (
    AdapterError,
    ClosedError,
    EngineError,
    FormatError,
    OptionError,
    QueueFullError,
    StateError,
    UnknownAdapterError,
)
from gemloom.ggml.device import Tensor
from gemloom.ggml.graph import Graph
from gemloom.testing import engine_of
from random_lora import merged, random_lora

FEW = 6  # tokens


def with_adapters(load: Load, *names: str, **options: Any) -> gemloom.Model:
    """A tiny model with a random adapter of a seed of its own for each name."""
    model = load(threads=1, **options)
    for seed, name in enumerate(names, 1):
        model.adapters.load(name, random_lora(model, seed))
    return model


def greedy(model: gemloom.Model, n: int) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": n, **endless(model)}


def memory(model: gemloom.Model) -> int:
    """Of adapters, when all that was given up is freed."""
    engine_of(model).call(lambda: None)
    return model.memory()["adapters"]


# --- requests together --------------------------------------------------------


def test_each_request_has_its_own(load: Load) -> None:
    model = with_adapters(load, "a", "b", "c", slots=6, chunk=32, budget=8)
    choices: list[dict[str, float]] = [
        {}, {"a": 1}, {"b": 0.5}, {"a": 0.5, "c": 1}, {"c": -1}, {"a": 1}
    ]  # fmt: skip
    asked = [(prompt(10 + 9 * i, seed=i), choice) for i, choice in enumerate(choices)]
    runs = [model.stream(ids, adapters=on, **greedy(model, 20)) for ids, on in asked]
    together = [run.completion().tokens for run in runs]
    alone = with_adapters(load, "a", "b", "c")
    assert together == [
        alone.generate(ids, adapters=on, **greedy(alone, 20)).tokens for ids, on in asked
    ]
    assert all(info.users == 0 for info in model.adapters.list())
    assert [info.requests for info in model.adapters.list()] == [3, 1, 2]


def test_only_wanted_rows_go_on(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters too, a prompt's rows stop where the last K/V are written."""
    model = with_adapters(load, "a", chunk=32)
    ids = prompt(30)
    rows: dict[str, int] = {}
    name = Graph.name

    def noted(graph: Graph, x: Tensor, called: str) -> Tensor:
        rows[called] = x.shape[-1]
        return name(graph, x, called)

    monkeypatch.setattr(Graph, "name", noted)
    model.logits(ids, "last", adapters={"a": 1.0})
    assert {rows[f"blk.{i}.ffn_down"] for i in range(4)} == {30}
    assert {rows[f"blk.{i}.ffn_down"] for i in range(4, 10)} == {1}


def test_more_adapters_than_a_graph_holds(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take turns; nobody waits for another's end."""
    monkeypatch.setattr("gemloom.engine.step.MOST_STRETCHES", 2)
    model = with_adapters(load, "a", "b", "c", slots=4, chunk=16)
    batches = watch_batches(model, monkeypatch)
    asked = [(prompt(20, seed=i), on) for i, on in enumerate([{"a": 1}, {"b": 1}, {"c": 1}, {}])]
    with paced(model):
        runs = [model.stream(ids, adapters=on, **greedy(model, 12)) for ids, on in asked]
    got = [run.completion().tokens for run in runs]
    for batch in batches:
        assert len({a.adapter for chunk in batch for a in chunk.adapters}) <= 2
    slots = [{chunk.slot for chunk in batch} for batch in batches if len(batch) > 1]
    assert all(sum(slot in there for there in slots[4:10]) >= 3 for slot in range(4))
    alone = with_adapters(load, "a", "b", "c")
    assert got == [alone.generate(ids, adapters=on, **greedy(alone, 12)).tokens
                   for ids, on in asked]  # fmt: skip


# --- versions -----------------------------------------------------------------


def test_unloading_waits_for_nobody(load: Load) -> None:
    model = with_adapters(load, "a")
    expected = model.generate(prompt(10), adapters={"a": 1}, **greedy(model, 30)).tokens
    with paced(model, 3) as allowed:
        run = model.stream(prompt(10), adapters={"a": 1}, **greedy(model, 30))
        first = [next(run).token for _ in range(3)]
        model.adapters.unload("a")
        assert model.adapters.list() == []
        with pytest.raises(UnknownAdapterError, match="loaded: none"):
            model.stream(prompt(3), adapters={"a": 1})
        there: list[int] = []  # after what unloading wanted done between two steps
        engine_of(model).post(lambda: there.append(model.memory()["adapters"]))
        allowed.release()
        first.append(next(run).token)
        assert there[0] > 0
    assert first + [piece.token for piece in run] == expected
    assert memory(model) == 0


def test_two_versions_in_flight(load: Load) -> None:
    model = load(threads=1, slots=2)
    versions = [random_lora(model, seed) for seed in (1, 2)]
    runs = []
    with paced(model) as allowed:
        for lora in versions:
            model.adapters.load("a", lora)
            runs.append(model.stream(prompt(10), adapters={"a": 1}, **greedy(model, 40)))
            allowed.release()
            next(runs[-1])
        users = [info.users for info in model.adapters.list()]
    texts = [run.completion().text for run in runs]
    assert users == [1]  # the old version has no name any more
    for text, lora in zip(texts, versions, strict=True):
        with gemloom.load(merged("e2b", {"a": (lora, 1.0)}), kv_type="f32", threads=1) as other:
            whole = other.generate(prompt(10), **greedy(other, 40)).text
        assert whole.endswith(text)
    model.adapters.unload("a")
    assert memory(model) == 0


def test_every_end_lets_its_adapters_go(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished, cancelled before and after it began, refused, failed alone, failed with all."""
    model = with_adapters(load, "a", slots=1, queue=1)
    on: dict[str, Any] = {"adapters": {"a": 1}}
    with paced(model, 1):
        running, waiting = (model.stream(prompt(5), **on, **greedy(model, 200)) for _ in range(2))
        next(running)
        with pytest.raises(QueueFullError):
            model.stream(prompt(5), **on)
        with pytest.raises(OptionError):
            model.generate(prompt(5), **on, temperature=-1)
        assert model.adapters.list()[0].users == 2
        waiting.cancel()
        running.close()
    idle(model)
    assert model.adapters.list()[0].users == 0

    def fail(*_: Any) -> None:
        raise RuntimeError("lost")

    monkeypatch.setattr(Graph, "compute", fail)
    with pytest.raises(EngineError):
        model.generate(prompt(5), **on)
    assert model.adapters.list()[0].users == 0
    with pytest.raises(EngineError):
        model.adapters.load("b", random_lora(model))


def test_loading_does_not_stop_a_stream(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes long in it, reading, checking or copying, tokens come meanwhile."""
    model = load(threads=1)
    lora, seen = random_lora(model), []

    def meanwhile(function: Any) -> Any:
        def slow(*given: Any) -> Any:
            before = model.stats().steps
            allowed.release()
            until(lambda: model.stats().steps > before)
            seen.append(next(run))
            return function(*given)

        return slow

    for name in ("check", "Loaded"):
        monkeypatch.setattr(registry, name, meanwhile(getattr(registry, name)))
    with paced(model) as allowed, model.stream(prompt(5), **greedy(model, 200)) as run:
        model.adapters.load("a", lora)
    assert len(seen) == 2


def test_loaded_and_unloaded_a_thousand_times(load: Load) -> None:
    """200 at once, five times over; and each does what it did the first time."""
    model = load(threads=1)
    few = [random_lora(model, seed, lambda name: "blk.3.ffn" in name) for seed in range(200)]

    def rounds(n: int) -> list[int]:
        said = []
        for _ in range(n):
            for i, lora in enumerate(few):
                model.adapters.load(f"a{i}", lora)
            said.append(model.generate(prompt(5), adapters={"a7": 2}, **greedy(model, 3)).tokens[2])
            for i in range(200):
                model.adapters.unload(f"a{i}")
            assert memory(model) == 0
        return said

    assert len(set(rounds(2))) == 1
    before = resident()
    rounds(5)
    assert resident() - before < 1 << 20  # 1,000 of 13 kB


def resident() -> int:
    """Memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["RssAnon"].split()[0]) * 1024


def test_closing_frees_them(load: Load) -> None:
    model = with_adapters(load, "a", keep=4)  # so the text does not end
    run = model.stream(prompt(5), adapters={"a": 1}, temperature=0, **endless(model))
    next(run)
    model.close()
    with pytest.raises(ClosedError):
        list(run)
    assert model.adapters.nbytes == 0
    with pytest.raises(ClosedError):
        model.adapters.load("b", random_lora(model))


# --- prefixes -----------------------------------------------------------------


def test_a_prefix_belongs_to_its_adapters(load: Load) -> None:
    model = with_adapters(load, "a", "b", slots=4)
    ids = prompt(40)

    def cached(on: dict[str, float]) -> int:
        return model.generate(ids, adapters=on, **greedy(model, 2)).usage.cached_tokens

    for on in ({}, {"a": 1.0}, {"a": 0.5}, {"a": 1.0, "b": 1.0}):
        assert (cached(on), cached(on)) == (0, 39), on
    assert cached({"a": 0}) == 39  # no adapter
    model.adapters.load("a", random_lora(model, 9))  # another version
    assert cached({"a": 1.0}) == 0
    model.adapters.unload("a")
    model.adapters.load("a", random_lora(model, 1))  # the first again, but who is to know
    assert cached({"a": 1.0}) == 0


def test_what_is_looked_at_is_no_prefix_for_others(load: Load) -> None:
    model = with_adapters(load, "a")
    ids = prompt(30)
    expected = model.generate(ids, **greedy(model, FEW)).tokens
    model.logits(ids, adapters={"a": 1})
    again = model.generate(ids, **greedy(model, FEW))
    assert (again.tokens, again.usage.cached_tokens) == (expected, 0)
    model.generate(ids, adapters={"a": 1}, **greedy(model, FEW))
    with pytest.raises(StateError, match=r"had adapters \(a\)"):
        model.save_state()


INVOCATION = (7, 8, 9)


def test_an_invoked_adapter_acts_from_its_tokens_on(load: Load) -> None:
    """The base computes what comes before, and its cells serve; the merged model the rest."""
    model = load(threads=1, chunk=16, slots=2)
    lora = random_lora(model, invocation=INVOCATION)
    model.adapters.load("a", lora)
    head, tail = [*prompt(30), *INVOCATION, *prompt(15, seed=3)], [*INVOCATION, *prompt(9, seed=4)]
    ids = head + tail  # the last of two
    model.generate(head, **greedy(model, 1))
    done = model.generate(ids, adapters={"a": 1}, **greedy(model, FEW))
    assert done.usage.cached_tokens == len(head)
    got = model.logits(ids, adapters={"a": 1})
    with (
        gemloom.load(tiny.gguf_bytes(tiny.VARIANTS["e2b"]), kv_type="f32", threads=1) as base,
        gemloom.load(merged("e2b", {"a": (lora, 1.0)}), kv_type="f32", threads=1) as other,
    ):
        base.generate(head, max_tokens=1)
        other.fingerprint, other.config = base.fingerprint, base.config
        other.load_state(base.save_state())
        assert_same(got[: len(head)], base.logits(head))
        expected = other.generate(ids, **greedy(other, FEW))
    assert expected.usage.cached_tokens == len(head)
    assert done.tokens == expected.tokens
    with pytest.raises(OptionError, match=r"acts from its invocation tokens \[7, 8, 9\] on"):
        model.generate(prompt(10), adapters={"a": 1})


def test_the_next_turn_of_an_invoked_adapter(load: Load) -> None:
    """Its invocation is a later one, so what it said itself is computed anew, by the base."""
    model = load(threads=1)
    model.adapters.load("a", random_lora(model, invocation=INVOCATION))
    first = [*prompt(20), *INVOCATION]
    said = model.generate(first, adapters={"a": 1}, **greedy(model, FEW)).tokens
    again = [*first, *said, *prompt(5, seed=3), *INVOCATION]
    assert model.generate(again, adapters={"a": 1}, max_tokens=1).usage.cached_tokens == 20


def test_a_shift_moves_where_an_adapter_begins(load: Load) -> None:
    """The context of 64 is full several times over; what it says stays what its rows say."""
    model = load(threads=1, context=64, keep=4, chunk=8)
    model.adapters.load("a", random_lora(model, invocation=INVOCATION))
    ids = [*prompt(50), *INVOCATION]
    run = model.stream(ids, adapters={"a": 1}, **greedy(model, 100))
    sinces = set()
    for _ in run:
        sinces |= {active.since for active in run._request.adapters}
    assert {50, 4} <= sinces
    assert all(4 <= since <= 50 for since in sinces)


# --- what is refused ----------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"x": 1}, "no adapter is named 'x'; loaded: a, b"),
        ({"a": float("nan")}, "the scale of a must be a finite number"),
        ({"a": float("inf")}, "finite"),
        ({"a": 10**400}, "finite"),
        ({"a": 1e39}, "finite"),
        ({"a": True}, "finite"),
        ({"a": "1"}, "finite"),
        ({1: 1.0}, "no adapter is named 1"),
        ("a", "adapters must be [name, ...] or {name: scale}, not 'a'"),
        ([1], "adapters must be"),
    ],
)
def test_bad_requests(load: Load, wanted: Any, message: str) -> None:
    model = with_adapters(load, "a", "b")
    for ask in (model.generate, model.logits, model.embed):
        with pytest.raises((OptionError, UnknownAdapterError)) as caught:
            ask(prompt(3), adapters=wanted)
        assert message in str(caught.value)
        assert caught.value.status == (404 if "named" in message else 400)
    with pytest.raises((OptionError, UnknownAdapterError)):
        model.trace(prompt(3), ["embd"], adapters=wanted)
    assert all(info.users == 0 for info in model.adapters.list())


def test_too_many_in_one_request(load: Load) -> None:
    model = load(threads=1)
    lora = random_lora(model, kinds=lambda name: "blk.0.attn_q" in name)
    for i in range(registry.MOST + 1):
        model.adapters.load(f"a{i}", lora)
    wanted = {f"a{i}": 1.0 for i in range(registry.MOST + 1)}
    with pytest.raises(OptionError, match="9 adapters in one request; 8 are the most"):
        model.generate(prompt(3), adapters=wanted)
    wanted["a0"] = 0
    assert model.generate(prompt(3), adapters=wanted, max_tokens=1).tokens


@pytest.mark.parametrize(
    "name", ["", "..", ".", "a/b", "a b", "a" * 65, "ä", "a\n", None, 3, "a:b"]
)
def test_bad_names(load: Load, name: Any) -> None:
    model = load(threads=1)
    with pytest.raises(OptionError, match="1 to 64 letters"):
        model.adapters.load(name, random_lora(model))
    assert model.adapters.list() == []


def test_nothing_is_half_registered(load: Load) -> None:
    model = with_adapters(load, "a")
    before = model.adapters.list(), memory(model)
    shape = {"blk.0.attn_q.weight": Pair(np.zeros((2, 5), "f4"), np.zeros((3, 2), "f4"), 1.0)}
    nan = random_lora(model, kinds=lambda name: "blk.1.attn_q" in name)
    next(iter(nan.pairs.values())).b[0, 0] = np.nan
    for source, error in (
        (b"no adapter", FormatError),
        (tiny.gguf_bytes(tiny.VARIANTS["e2b"]), AdapterError),
        (Lora("wrong", None, shape), AdapterError),
        (Lora("other", "gemma3", shape), AdapterError),
        (Lora("empty", None, {}), AdapterError),
        (nan, AdapterError),
    ):
        for name in ("a", "new"):
            with pytest.raises(error):
                model.adapters.load(name, source)
    for scale in (float("nan"), "1", None):
        with pytest.raises(OptionError, match="scale of a"):
            model.adapters.load("a", random_lora(model), scale)
    with pytest.raises(UnknownAdapterError, match="loaded: a"):
        model.adapters.unload("new")
    assert (model.adapters.list(), memory(model)) == before


# --- bookkeeping --------------------------------------------------------------


class Named:
    def __init__(self, version: int) -> None:
        self.name, self.version = f"a{version}", version


ADAPTERS = [Named(version) for version in range(4)]
on = st.lists(
    st.builds(Active, st.sampled_from(ADAPTERS), st.just(1.0), st.integers(0, 12)),
    max_size=4, unique_by=lambda active: active.adapter.version,
)  # fmt: skip


@given(a=on, b=on, length=st.integers(0, 15))
def test_positions_agree_where_the_same_adapters_are_at_work(
    a: list[Active], b: list[Active], length: int
) -> None:
    def at_work(active: list[Active], position: int) -> set[tuple[int, float]]:
        return {(x.adapter.version, x.scale) for x in active if x.since <= position}

    same = agreed(marks(a), marks(b), length)
    assert all(at_work(a, i) == at_work(b, i) for i in range(same))
    assert same == length or at_work(a, same) != at_work(b, same)


@given(parts=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 6), on), max_size=5))
def test_stretches_cover_each_adapters_rows_once(
    parts: list[tuple[int, int, list[Active]]],
) -> None:
    given = [(np.arange(start, start + n), active) for start, n, active in parts]
    covered = [
        (stretch.adapter.version, row, scale)
        for stretch in stretches(given)
        for row, scale in enumerate(stretch.scales, stretch.first)
    ]
    expected, row = [], 0
    for positions, active in given:
        for position in positions:
            expected += [(a.adapter.version, row, a.scale) for a in active if a.since <= position]
            row += 1
    assert sorted(covered) == sorted(expected)


def test_loads_and_requests_from_many_threads(load: Load) -> None:
    """Versions replaced all the time; every request gets one of the two there are, whole."""
    model = load(threads=1, slots=4)
    loras = [random_lora(model, seed) for seed in (1, 2)]
    model.adapters.load("a", loras[0])
    said = [model.generate(prompt(6), adapters={"a": 1}, **greedy(model, 5)).tokens]
    model.adapters.load("a", loras[1])
    said += [model.generate(prompt(6), adapters={"a": 1}, **greedy(model, 5)).tokens]
    stop, heard = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            heard.append(model.generate(prompt(6), adapters={"a": 1}, **greedy(model, 5)).tokens)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    loaded = 0
    while loaded < 30 or not heard:
        model.adapters.load("a", loras[loaded % 2])
        loaded += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert heard
    assert all(tokens in said for tokens in heard)
    model.adapters.unload("a")
    assert memory(model) == 0
