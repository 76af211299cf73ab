"""Perplexity and comparisons: the counting, the arithmetic, and what the errors promise."""

from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import gemloom
import oracle
import tiny
from conftest import Load
from gemloom.engine import inspector
from gemloom.errors import ContextError, OptionError, RequestError, TensorError
from gemloom.tools.quantization.perplexity import (
    Comparison,
    Cut,
    Distribution,
    Perplexity,
    Recorded,
    compare,
    cut,
    exponential,
    mean,
    perplexity,
    read_tokens,
    root,
)

BOS = 2
TEXT = "The quick brown fox jumps over the lazy dog, and nobody asks why; it does so again. " * 3
CUT = Cut(context=32)


def losses_of(logits: np.ndarray, targets: list[int]) -> np.ndarray:
    """Minus log-probabilities in f64, the plain way."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    probabilities = np.exp(wide) / np.exp(wide).sum(axis=1, keepdims=True)
    return -np.log(probabilities[np.arange(len(targets)), targets])


def scored_by_hand(ids: list[int], context: int) -> list[tuple[list[int], int]]:
    """(tokens before, token) of all that counts without a stride, from the description alone."""
    found = []
    for start in range(0, len(ids) - context + 1, context):
        window = [BOS, *ids[start + 1 : start + context]]
        found += [(window[:at], window[at]) for at in range(context // 2 + 1, context)]
    return found


# -- the counting ----------------------------------------------------------------------------


@given(n=st.integers(0, 400), context=st.integers(8, 80), windows=st.none() | st.integers(1, 9))
def test_windows_side_by_side(n: int, context: int, windows: int | None) -> None:
    """Each begins with BOS, and they are the text in order; the second halves are scored."""
    ids, how = [BOS, *range(1000, 1000 + n)], Cut(context, windows=windows)
    if len(ids) < context:
        with pytest.raises(RequestError, match=rf"{len(ids)} tokens, {context} are needed"):
            cut(ids, how, BOS)
        return
    found = cut(ids, how, BOS)
    assert len(found) == min(len(ids) // context, windows or n)
    for i, window in enumerate(found):
        assert window == [BOS, *ids[i * context + 1 : (i + 1) * context]]
    expected = [token for _, token in scored_by_hand(ids[: len(found) * context], context)]
    assert [window[row + 1] for window in found for row in how.scored] == expected


@given(n=st.integers(0, 400), context=st.integers(8, 60), stride=st.integers(1, 100))
def test_windows_with_a_stride(n: int, context: int, stride: int) -> None:
    """No token is scored twice, none between the first and the last is left out, and each sees
    at least as many before it as a window has beyond its stride."""
    if stride > 2 * context - 2:
        with pytest.raises(OptionError, match=f"from 0 to {2 * context - 2}"):
            Cut(context, stride)
        return
    ids, how = [BOS, *range(1000, 1000 + n)], Cut(context, stride)
    if len(ids) <= how.size:
        with pytest.raises(RequestError, match="are needed for one window"):
            cut(ids, how, BOS)
        return
    windows = cut(ids, how, BOS)
    scored = [window[row + 1] for window in windows for row in how.scored]
    first = ids.index(scored[0])
    assert first == context + stride // 2 - stride
    assert scored == ids[first : first + len(scored)]
    assert len(ids) - stride <= first + len(scored) <= len(ids)
    assert all(len(window) == how.size == context + stride // 2 for window in windows)


@pytest.mark.parametrize("options", [{"context": 7}, {"stride": -1}, {"windows": 0}])
def test_cuts_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Cut(**options)


def test_one_newline_at_the_end_does_not_count(load: Load) -> None:
    tokenizer = load(threads=1).tokenizer
    for text in ("a b", "a b\n", ""):
        assert read_tokens(tokenizer, text + "\n") == [BOS, *tokenizer.encode(text)]


# -- one model -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["e2b", "26b", "gemma3"])
def test_perplexity_is_that_of_the_oracle(load: Load, variant: str) -> None:
    """Each scored token on its own, from a forward pass in f64 of all that is before it."""
    model = load(variant, threads=1)
    found = perplexity(model, TEXT, Cut(context=24, windows=3))
    ids = read_tokens(model.tokenizer, TEXT)[: 3 * 24]
    described, tensors = tiny.metadata(tiny.VARIANTS[variant]), tiny.tensors(tiny.VARIANTS[variant])
    before, tokens = zip(*scored_by_hand(ids, 24), strict=True)
    rows = np.array([oracle.logits(described, tensors, some)[-1] for some in before])
    losses = losses_of(rows, list(tokens))
    assert found.tokens == len(losses) == 3 * 11
    assert found.loss.value == pytest.approx(losses.mean(), abs=1e-3)
    spread = np.sqrt(((losses**2).mean() - losses.mean() ** 2) / (len(losses) - 1))
    assert found.loss.error == pytest.approx(spread, rel=1e-2)
    assert found.perplexity.value == pytest.approx(np.exp(found.loss.value))
    assert found.perplexity.error == pytest.approx(found.perplexity.value * found.loss.error)


def test_stride(load: Load) -> None:
    model = load(threads=1)
    found = perplexity(model, TEXT, Cut(context=20, stride=8))
    ids, losses = read_tokens(model.tokenizer, TEXT), []
    for start in range(0, len(ids) - 24, 8):
        window = ids[start : start + 24]
        losses += [*losses_of(model.logits(window)[15:23], window[16:])]
    assert (found.tokens, found.windows) == (len(losses), len(losses) // 8)
    assert found.loss.value == pytest.approx(np.mean(losses), rel=1e-5)


def test_told_after_each_window(load: Load) -> None:
    model, seen = load(threads=1), []
    found = perplexity(model, TEXT, CUT, lambda *told: seen.append(told))
    assert [count for count, _, _ in seen] == list(range(1, found.windows + 1))
    assert {of for _, of, _ in seen} == {found.windows}
    assert seen[-1][2] == found
    assert [so_far.tokens for _, _, so_far in seen] == [15 * i for i in range(1, len(seen) + 1)]
    assert seen[1][2].loss == perplexity(model, TEXT, Cut(32, windows=2)).loss


def test_few_logits_at_a_time(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few fit into memory, the figures are the same; no part has more rows than fit."""
    model = load(threads=1)
    whole = perplexity(model, TEXT, CUT)
    monkeypatch.setattr(inspector, "LOGITS_BYTES", 3 * 4 * model.config.n_vocab)
    ids = read_tokens(model.tokenizer, TEXT)[:50]
    parts = list(model.logits_in_parts(ids, [0, 1, 2, 3, 30, 48, 49]))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert np.allclose(np.concatenate(parts), model.logits(ids, [0, 1, 2, 3, 30, 48, 49]))
    assert perplexity(model, TEXT, CUT).loss.value == pytest.approx(whole.loss.value, rel=1e-4)


def test_text_and_model_that_do_not_fit(load: Load) -> None:
    model = load(threads=1, context=31)
    with pytest.raises(RequestError, match="4 tokens, 32 are needed for one window"):
        perplexity(model, "a b", CUT)
    with pytest.raises(RequestError, match="1 tokens"):
        perplexity(model, "", CUT)
    with pytest.raises(ContextError, match="32 tokens, the context 31"):
        perplexity(model, TEXT, CUT)


def test_logits_that_are_no_numbers(load: Load) -> None:
    broken = np.full(96, np.nan, np.float32)
    model = load("e2b", forms={"extra": {"output_norm.weight": broken}}, threads=1)
    with pytest.raises(TensorError, match="not finite"):
        perplexity(model, TEXT, CUT)


# -- two models ------------------------------------------------------------------------------


def other(load: Load, variant: str = "e2b") -> gemloom.Model:
    """A model near the one without edits, as a quantized one is."""

    def shake(keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        rng = np.random.RandomState(1)
        for name, value in tensors.items():
            if value.ndim > 1:
                tensors[name] = value * (1 + 0.05 * rng.standard_normal(value.shape)).astype("f")

    return load(variant, forms={"edit": shake}, threads=1)


def test_a_model_and_itself(load: Load) -> None:
    found = compare(load(threads=1), load(threads=1), TEXT, CUT)
    with pytest.raises(RequestError, match="load it twice"):
        compare(model := load(threads=1), model, TEXT, CUT)
    for figure in (found.divergence, found.log_ratio, found.delta_p, found.delta_p_rms):
        assert (figure.value, figure.error) == (0, 0)
    assert (found.same_top.value, found.same_top.error) == (1, 0)
    assert set(found.percentiles.values()) == {0}
    assert found.perplexity == found.base_perplexity


def test_comparison_is_that_of_plain_numpy(load: Load) -> None:
    one, two = load(threads=1), other(load)
    found = compare(one, two, TEXT, CUT)
    windows = cut(read_tokens(one.tokenizer, TEXT), CUT, BOS)
    p, q = (np.concatenate([m.logits(w)[16:31] for w in windows]) for m in (one, two))
    p, q = (
        np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1)[:, None] for x in (p, q)
    )
    tokens = np.concatenate([w[17:32] for w in windows])
    kl = (p * np.log(p / q)).sum(axis=1)
    right_p, right_q = p[np.arange(len(p)), tokens], q[np.arange(len(q)), tokens]
    assert found.tokens == len(tokens)
    assert found.divergence.value == pytest.approx(kl.mean(), rel=1e-4)
    assert kl.mean() > 0.001
    assert found.divergence.error == pytest.approx(kl.std(ddof=1) / np.sqrt(len(kl)), rel=1e-3)
    assert found.percentiles["100"] == pytest.approx(kl.max(), rel=1e-4)
    assert found.percentiles["50"] == pytest.approx(np.median(kl), rel=1e-4)
    assert found.same_top.value == (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    assert 0 < found.same_top.value < 1
    assert found.delta_p.value == pytest.approx((right_q - right_p).mean(), rel=1e-3)
    rms = np.sqrt(((right_q - right_p) ** 2).mean())
    assert found.delta_p_rms.value == pytest.approx(rms, rel=1e-3)
    assert found.log_ratio.value == pytest.approx(np.log(right_p / right_q).mean(), rel=1e-3)
    for figure, model in ((found.base_perplexity, one), (found.perplexity, two)):
        assert figure == perplexity(model, TEXT, CUT).perplexity


@pytest.mark.parametrize("how", [CUT, Cut(context=32, stride=8), Cut(context=32, windows=2)])
def test_a_recorded_base_is_the_model(load: Load, how: Cut) -> None:
    """To the bit, for any number of models, when it is closed; and only for what was recorded."""
    with load() as base, TemporaryFile() as file:
        right = [compare(base, model, TEXT, how) for model in (other(load), load())]
        told: list[tuple[int, int]] = []
        recorded = Recorded(base, TEXT, how, file, lambda *counts: told.append(counts))
        size = Recorded.nbytes(base, TEXT, how)
        base.close()
        assert [compare(recorded, model, TEXT, how) for model in (other(load), load())] == right
        assert size == file.seek(0, 2)
        with pytest.raises(RequestError, match="recorded of another text"):
            compare(recorded, load(), TEXT, Cut(context=16))
    assert told == [(n, right[0].windows) for n in range(1, right[0].windows + 1)]


def test_other_words(load: Load) -> None:
    with pytest.raises(RequestError, match="different vocabularies"):
        compare(load("e2b", threads=1), load("gemma3", threads=1), TEXT, CUT)


LOGITS = arrays.arrays(np.float32, 50, elements=st.floats(-40, 40, width=32))


@given(one=LOGITS, two=LOGITS, shift=st.floats(-20, 20, width=32))
def test_divergence(one: np.ndarray, two: np.ndarray, shift: float) -> None:
    """Against the formula in f64; never negative but for rounding, and blind to a constant."""
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (one, two))
    found = Distribution(one).divergence(Distribution(two))
    assert found == pytest.approx((p * (np.log(p) - np.log(q))).sum(), rel=1e-4, abs=1e-5)
    assert found > -1e-6
    moved = Distribution(one + np.float32(shift)).divergence(Distribution(two))
    assert moved == pytest.approx(found, rel=1e-4, abs=1e-4)
    assert Distribution(one).loss(7) == pytest.approx(-np.log(p[7]), rel=1e-5, abs=1e-6)


# -- errors ----------------------------------------------------------------------------------


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_errors_are_those_of_a_bootstrap(seed: int) -> None:
    """Of skewed values, as losses are: the spread of a figure over resampled texts."""
    rng = np.random.RandomState(seed)
    values = rng.exponential(1.0, 1_000)
    again = values[rng.randint(len(values), size=(400, len(values)))]
    for figure, resampled in (
        (mean(values), again.mean(axis=1)),
        (exponential(mean(values)), np.exp(again.mean(axis=1))),
        (root(mean(values**2)), np.sqrt((again**2).mean(axis=1))),
        (mean(1.0 * (values > 1)), (again > 1).mean(axis=1)),
    ):
        assert figure.error == pytest.approx(resampled.std(), rel=0.2)


def test_intervals_hold_what_they_promise() -> None:
    """Of 2,000 texts, 95 % of the intervals hold the true mean; 94 to 96 by chance."""
    values = np.random.RandomState(0).exponential(1.0, (2_000, 1_000))
    intervals = [mean(row).interval for row in values]
    assert 0.935 < np.mean([low <= 1 <= high for low, high in intervals]) < 0.965


@pytest.mark.parametrize("kind", [Perplexity, Comparison])
def test_json_has_every_figure(load: Load, kind: type) -> None:
    model = load(threads=1)
    one = kind is Perplexity
    found = perplexity(model, TEXT, CUT) if one else compare(model, other(load), TEXT, CUT)
    shown = found.json()
    assert set(shown) == {*kind.__slots__} - {"cut"} | {"context", "stride"}
    assert shown["perplexity"]["interval"] == list(found.perplexity.interval)
