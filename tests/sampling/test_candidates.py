"""Tokens picked from the largest logits alone are those picked from whole rows, to the id."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import gemloom
from conftest import Load, endless, prompt
from gemloom.errors import GemloomError
from gemloom.ggml.backends import devices
from gemloom.models.layers import Decoder
from gemloom.sampling import candidates
from gemloom.sampling import params as sampling
from gemloom.sampling.candidates import Candidates
from gemloom.sampling.params import History, SamplingParams
from gemloom.testing import parts_of

VOCAB = 96
FEW = 12  # candidates in these tests
rows = arrays.arrays(  # with many equals, also where the candidates end
    np.float32,
    VOCAB,
    elements=st.integers(-40, 40).map(lambda n: n / 8) | st.floats(-30, 30, width=32),
)
lowering = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0.3, 1, 5]),
    top_k=st.integers(1, FEW),
    top_p=st.sampled_from([0.5, 0.95, 1]),
    min_p=st.sampled_from([0, 0.2]),
    repetition_penalty=st.sampled_from([1, 1.5]),
    presence_penalty=st.sampled_from([0, 0.5]),
    frequency_penalty=st.sampled_from([0, 0.25]),
    logit_bias=st.dictionaries(
        st.integers(0, VOCAB - 1), st.sampled_from([-100, -0.5, 0]), max_size=9
    ),
)
ids = st.lists(st.integers(0, VOCAB - 1), max_size=12)


def largest(row: np.ndarray, count: int, seed: int) -> Candidates:
    """As a device gives them: any order, and any of those that tie for the last place."""
    mixed = np.random.RandomState(seed).permutation(row.size)
    chosen = mixed[np.argsort(-row[mixed], kind="stable")[:count]]
    chosen = np.random.RandomState(seed).permutation(chosen)
    return candidates.candidates(chosen, row[chosen], row.size, lambda: row)


def unread() -> Any:
    raise AssertionError("the whole row was read")


@settings(max_examples=150, deadline=None)
@given(
    row=rows,
    params=lowering,
    seen=ids,
    said=ids,
    suppress=ids,
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_token_is_that_of_the_whole_row(
    row: np.ndarray, params: SamplingParams, seen: list[int], said: list[int],
    suppress: list[int], seed: int, data: st.DataObject,
) -> None:  # fmt: skip
    """And the generator has given as many numbers, whichever way was taken."""
    history = History({*seen, *said}, Counter(said))
    allowed = data.draw(st.none() | arrays.arrays(np.bool_, VOCAB, fill=st.just(True)))
    few = largest(row, data.draw(st.sampled_from([FEW, 40, VOCAB])), seed)
    results = []
    for given_row in (row, few):
        rng = sampling.generator(seed)
        try:
            picked = candidates.sample(given_row, params, history, rng, suppress, allowed).token
        except GemloomError as error:
            picked = str(error)
        results.append((picked, rng.random()))
    assert results[0] == results[1]


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"logit_bias": {3: -100}}])
def test_the_row_is_left_where_it_is(options: dict[str, Any]) -> None:
    row = np.random.RandomState(0).standard_normal(4096).astype(np.float32)
    few = replace(largest(row, candidates.COUNT, 0), read=unread)
    params = SamplingParams(seed=1, **options)
    assert candidates.suffice(params)
    got = candidates.sample(few, params, History(), sampling.generator(1), suppress=(7, 8))
    want = sampling.sample(row, params, History(), sampling.generator(1), suppress=(7, 8))
    assert got == want


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 0},
        {"top_k": 0},
        {"top_k": candidates.COUNT},
        {"logit_bias": {3: 0.5}},
        {"presence_penalty": -0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 0.9},
    ],
)
def test_what_needs_all_logits_gets_them(options: dict[str, Any]) -> None:
    row = np.random.RandomState(0).standard_normal(4096).astype(np.float32)
    params = SamplingParams(**options)
    assert not candidates.suffice(params)
    got = candidates.sample(largest(row, 128, 0), params, History(), sampling.generator(1))
    assert got == sampling.sample(row, params, History(), sampling.generator(1))


def test_equal_logits_at_the_end_of_the_candidates_are_decided_by_the_row() -> None:
    """Ids 5 and 90 tie for the second place; the device gave 90 alone."""
    row = np.zeros(VOCAB, np.float32)
    row[[40, 5, 90]] = 3, 2, 2
    few = candidates.candidates(np.array([90, 40]), row[[90, 40]], VOCAB, lambda: row)
    params = SamplingParams(top_k=2, top_p=1)
    tokens = {
        candidates.sample(few, params, History(), sampling.generator(seed)).token
        for seed in range(40)
    }
    assert tokens == {40, 5}
    one = candidates.sample(
        replace(few, read=unread), replace(params, temperature=0), History(), sampling.generator(0)
    )
    assert one.token == 40


def test_a_soft_cap_that_does_not_ascend_changes_nothing() -> None:
    """The last bits of tanh: a token below the last candidate may come out above it."""
    low = np.float32(20)
    row = np.full(VOCAB, -1, np.float32)
    row[[10, 20, 30]] = 25, low, np.nextafter(low, np.float32(21))  # 30 was below before the cap
    few = candidates.candidates(np.array([10, 20]), row[[10, 20]], VOCAB, lambda: row)
    params = SamplingParams(top_k=2, top_p=1, temperature=100)
    for seed in range(20):
        got = candidates.sample(few, params, History(), sampling.generator(seed))
        assert got == sampling.sample(row, params, History(), sampling.generator(seed))


@settings(deadline=None)
@given(
    start=st.floats(-200, 200, width=32),
    steps=arrays.arrays(np.int64, 300, elements=st.integers(0, 3)),
    cap=st.sampled_from([20.0, 30.0]),
)
def test_the_soft_cap_keeps_to_the_margin(start: float, steps: np.ndarray, cap: float) -> None:
    """Ascending logits a few floats apart; and candidates get what they have in the row."""
    near = np.float32(start) + np.spacing(np.float32(abs(start))) * np.cumsum(steps).astype(
        np.float32
    )
    model = SimpleNamespace(config=SimpleNamespace(softcap=cap))
    capped = Decoder.finish(model, near.copy())  # type: ignore[arg-type]
    before = np.maximum.accumulate(capped)
    assert (before - capped <= abs(capped) * 2**-20).all()
    for size in (1, 7, 128):
        few = Decoder.finish(model, near[3 : 3 + size].copy())  # type: ignore[arg-type]
        np.testing.assert_array_equal(few, capped[3 : 3 + size])


# --- whole requests -----------------------------------------------------------


@pytest.fixture
def ranking(load: Load, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a model whose backend ranks logits, as a device does; ``read`` are the rows read."""
    monkeypatch.setattr("gemloom.compute.program.COUNT", 80)  # fewer than the vocabulary

    def of(variant: str, **options: Any) -> tuple[gemloom.Model, list[int]]:
        model, read = load(variant, threads=1, **options), []
        runner = parts_of(model).program
        whole = runner._read
        monkeypatch.setattr(
            runner, "_read", lambda logits, row=None: read.append(row) or whole(logits, row)
        )
        runner.ranks = True
        return model, read

    return of


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 5, "min_p": 0.1},
    {"logprobs": 2},
    {"top_k": 0},
    {"repetition_penalty": 1.3},
]


@pytest.mark.parametrize("variant", ["e2b", "26b", "gemma3"])
def test_requests_get_the_same_tokens(load: Load, ranking: Any, variant: str) -> None:
    """Of every kind side by side, those that need all logits among them."""
    options = {"slots": len(KINDS), "chunk": 32, "budget": 8}
    plain = load(variant, threads=1, **options)
    ranked, read = ranking(variant, **options)
    done = []
    for model in (plain, ranked):
        runs = [
            model.stream(prompt(9 + 5 * i, seed=i), seed=i, max_tokens=20, **kind)
            for i, kind in enumerate(KINDS)
        ]
        done.append([run.completion() for run in runs])
    assert [c.tokens for c in done[0]] == [c.tokens for c in done[1]]
    whole = sum(len(done[0][i].tokens) for i in (3, 4))  # all that these two said
    assert whole <= len(read) < whole + 12


def test_only_candidates_are_read(ranking: Any) -> None:
    model, read = ranking("12b")  # which suppresses two tokens
    kinds = ({}, {"temperature": 0}, endless(model))
    for kind in kinds:
        model.generate(prompt(20), max_tokens=30, seed=4, **kind)
    assert len(read) <= 3


def test_a_logit_that_is_not_a_number_ends_the_request(ranking: Any) -> None:
    """Wherever it lies: a device that ranks may well leave it out."""

    def broken(_: Any, tensors: dict[str, np.ndarray]) -> None:
        tensors["token_embd.weight"] = tensors["token_embd.weight"].copy()
        tensors["token_embd.weight"][7] = np.nan

    model, read = ranking("e2b", forms={"edit": broken})
    with pytest.raises(GemloomError, match="logit of token 7 is nan"):
        model.generate(prompt(4, n_vocab=7), max_tokens=2)
    assert read == [0]


GPUS = [info.name.lower() for info in devices() if info.kind == "gpu"]


@pytest.mark.skipif(not GPUS, reason="ggml has no device here but the CPU")
def test_a_device_ranks_as_the_host_does(load: Load) -> None:
    """The same logits, from the same device, read whole or as candidates."""
    model = load("gemma3", threads=1, device=GPUS[0], slots=len(KINDS))
    done = []
    for ranks in (True, False):
        if ranks:
            assert parts_of(model).program.ranks
        parts_of(model).program.ranks = ranks
        runs = [
            model.stream(prompt(9 + 5 * i, seed=i), seed=i, max_tokens=12, **kind)
            for i, kind in enumerate(KINDS)
        ]
        done.append([run.completion().tokens for run in runs])
    assert done[0] == done[1]
