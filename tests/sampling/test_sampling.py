"""Sampling and stop strings against naive oracles: full sorts in float64, ``str.find``."""

import math
import reprlib
import time
from collections import Counter
from itertools import pairwise, product
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gemloom.errors import GemloomError, OptionError, RequestError
from gemloom.sampling import params as sampling
from gemloom.sampling.params import (
    GEMMA_DEFAULTS,
    MAX_BIASES,
    MAX_STOPS,
    History,
    SamplingParams,
    check_vocabulary,
    from_options,
    generator,
    sample,
)
from gemloom.text.stopping import StopMatcher

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
VOCAB = 262_144


def row(*values):
    return np.array(values, np.float32)


def at(u):
    """A random number generator that always gives ``u``."""
    return SimpleNamespace(random=lambda: u)


def pick(logits, u=0.5, history=None, suppress=(), **options):
    return sample(logits, SamplingParams(**options), history or History(), at(u), suppress)


def support(logits, **options):
    """Every token that a fine comb of draws gives."""
    return {pick(logits, u, **options).token for u in np.linspace(0, 1, 400, endpoint=False)}


# ---- the oracle: plain Python, sorts everything


def oracle_adjusted(logits, params, history, suppress):
    """One token at a time, in float32 as the engine does it: ties that it makes are ties."""
    values = [-np.float32(np.inf) if i in suppress else v for i, v in enumerate(logits)]
    for token in range(len(values)):
        values[token] += np.float32(params.logit_bias.get(token, 0))
        if token in history.seen:
            factor = np.float32(params.repetition_penalty)
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        count = np.float32(history.generated[token])
        values[token] -= params.presence_penalty * (count > 0) + params.frequency_penalty * count
    return [float(value) for value in values]


def apart(a, b):
    """False where rounding alone could decide between two orders of the same two numbers."""
    return abs(a - b) > 1e-9 * max(abs(a), abs(b))


def oracle_kept(values, params):
    """(token, weight) of what may be drawn, most likely first; gives up on close calls."""
    peak = max(values)
    ranked = sorted((-value, token) for token, value in enumerate(values) if value > -math.inf)
    ranked = ranked[: params.top_k or None]
    kept = [(token, math.exp((-minus - peak) / params.temperature)) for minus, token in ranked]
    whole, mass = math.fsum(weight for _, weight in kept), 0.0
    for place, (_, weight) in enumerate(kept):
        mass += weight
        assume(params.top_p == 1 or apart(mass, params.top_p * whole))
        if params.top_p < 1 and mass >= params.top_p * whole:
            kept = kept[: place + 1]
            break
    assume(all(weight == 1 or apart(weight, params.min_p) for _, weight in kept))
    return [(token, weight) for token, weight in kept if weight >= params.min_p]


def oracle_draw(kept, u):
    whole, mass = math.fsum(weight for _, weight in kept), 0.0
    for token, weight in kept:
        mass += weight
        assume(weight == 0 or apart(mass, u * whole))
        if mass > u * whole:
            return token
    raise AssertionError("u is below 1")


# ---- strategies

ORDINARY = st.floats(-30, 30, width=32)
TIED = st.sampled_from([-1.0, 0.0, -0.0, 0.5, 2.0])
EXTREME = st.sampled_from([1e4, -1e4, 9999.0, 0.0, -math.inf])
LOGITS = st.one_of(
    st.lists(ORDINARY, min_size=1, max_size=40),
    st.lists(TIED, min_size=1, max_size=80),
    st.lists(EXTREME | ORDINARY, min_size=1, max_size=40),
).map(lambda values: np.array(values, np.float32))
PENALTY = st.sampled_from([0.0, 0.0, 0.5, -1.0, 2.0])


@st.composite
def cases(draw):
    logits = draw(LOGITS)
    ids = st.integers(0, logits.size - 1)
    params = SamplingParams(
        temperature=draw(st.sampled_from([1.0, 0.3, 2.0, 50.0, 1e-4])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 5, 64, 10**9])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5, 0.0]) | st.floats(0, 1)),
        min_p=draw(st.sampled_from([0.0, 0.0, 1.0, 0.05]) | st.floats(0, 1)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.25, 0.5])),
        presence_penalty=draw(PENALTY),
        frequency_penalty=draw(PENALTY),
        logit_bias=draw(st.dictionaries(ids, st.sampled_from([-100.0, 1.5, 100.0]), max_size=4)),
        logprobs=draw(st.none() | st.integers(0, 20)),
    )
    history = History(set(draw(st.lists(ids, max_size=5))))
    for token in draw(st.lists(ids, max_size=8)):
        history.add(token)
    return logits, params, history, tuple(draw(st.lists(ids, max_size=3)))


# ---- the whole of it


@settings(max_examples=500)
@given(cases(), st.floats(0, 1, exclude_max=True), st.sampled_from([1, 2, 1024]))
def test_sample_equals_the_oracle(case, u, first_prefix):
    logits, params, history, suppress = case
    before = logits.copy()
    values = oracle_adjusted(logits, params, history, suppress)
    assume(max(values) > -math.inf)
    wanted = oracle_draw(oracle_kept(values, params), u)
    with patch.object(sampling, "_FIRST_PREFIX", first_prefix):
        got = sample(logits, params, history, at(u), suppress)
    assert got.token == wanted
    assert got.token not in suppress
    np.testing.assert_array_equal(logits, before)
    assert (got.logprob is None) == (params.logprobs is None)


@given(LOGITS, st.integers(0, 100), st.lists(st.integers(0, 79), max_size=3))
def test_logprobs_are_the_log_softmax_of_the_models_logits(logits, count, suppress):
    suppress = [token for token in suppress if token < logits.size]
    values = [-math.inf if i in suppress else float(v) for i, v in enumerate(logits)]
    assume(max(values) > -math.inf)
    norm = max(values) + math.log(math.fsum(math.exp(v - max(values)) for v in values))
    got = pick(
        logits, suppress=suppress, logprobs=count, temperature=0.7, logit_bias={0: 5.0},
        presence_penalty=1.0, history=History({0}, Counter({0: 1})),
    )  # fmt: skip
    ranked = sorted((-v, i) for i, v in enumerate(values) if v > -math.inf)
    assert [token for token, _ in got.top] == [token for _, token in ranked[:count]]
    for token, logprob in [*got.top, (got.token, got.logprob)]:
        assert logprob == pytest.approx(values[token] - norm, abs=1e-5)
    assert math.fsum(math.exp(logprob) for _, logprob in got.top) <= 1 + 1e-6


@pytest.mark.parametrize("spread", [0.3, 3.0, 12.0])
def test_a_whole_vocabulary_equals_a_full_sort(spread):
    rng = np.random.default_rng(int(spread * 10))
    logits = (rng.standard_normal(VOCAB) * spread).round(2).astype(np.float32)  # many ties
    order = np.lexsort((np.arange(VOCAB), -logits))
    for count in (1, 64, 1000, 20_000, VOCAB - 1, VOCAB):
        np.testing.assert_array_equal(sampling._largest(logits, count), order[:count])
    weights = np.exp(logits[order].astype(np.float64) - float(logits.max()))
    mass = np.cumsum(weights)
    for top_p, min_p in ((1.0, 0.0), (0.9, 0.0), (0.5, 0.0), (1.0, 0.3), (0.9, 0.01)):
        keep = VOCAB if top_p == 1 else int(np.searchsorted(mass, top_p * mass[-1])) + 1
        keep = min(keep, int((weights >= min_p).sum()))
        for u in (0.0, 0.123, 0.777, 0.9999):
            wanted = order[np.searchsorted(mass[:keep], u * mass[keep - 1], side="right")]
            options = {"top_k": 0, "top_p": top_p, "min_p": min_p}
            assert pick(logits, u, **options).token == wanted, options


# ---- the draw


def test_draws_follow_the_distribution():
    """Pearson's chi-square; a right sampler fails for one seed in a million."""
    logits = row(2.0, 1.0, 1.0, 0.0, -0.5, 3.0, -np.inf, 0.3)
    params = SamplingParams(**PLAIN)
    rng, draws = generator(7), 20_000
    counts = Counter(sample(logits, params, History(), rng).token for _ in range(draws))
    assert counts[6] == 0

    def distance(temperature):
        weights = np.exp(np.delete(logits, 6).astype(np.float64) / temperature)
        expected = draws * weights / weights.sum()
        seen = np.delete([counts[token] for token in range(8)], 6)
        return float(((seen - expected) ** 2 / expected).sum())

    limit = 38.26  # the 1 - 1e-6 quantile for 6 degrees of freedom
    assert distance(1.0) < limit
    assert distance(1.1) > limit  # so the test can tell a distribution this near


def test_equal_tokens_share_the_unit_interval_by_id():
    even = row(1, 1, -np.inf, 1, 1)
    for place, token in enumerate((0, 1, 3, 4)):
        start, end = place / 4, np.nextafter((place + 1) / 4, 0)
        for top_k in (0, 64):
            options = {"top_k": top_k, "top_p": 1.0}
            assert [pick(even, u, **options).token for u in (start, end)] == [token, token]


def test_the_same_seed_gives_the_same_tokens_whatever_else_is_drawn():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 300)).astype(np.float32)
    params = SamplingParams(seed=11)

    def tokens(other=None):
        own = generator(params.seed)
        for logits in rows:
            if other:
                sample(logits, params, History(), other)
            yield sample(logits, params, History(), own).token

    alone = list(tokens())
    assert list(tokens(generator(5))) == alone
    assert len(set(alone)) > 10
    fresh = [[sample(r, params, History(), g).token for r in rows] for g in map(generator, [1, 2])]
    assert fresh[0] != fresh[1]
    assert generator(None).random() != generator(None).random()


@pytest.mark.parametrize("options", [{}, {"top_k": 0}, {"top_k": 1}, PLAIN, {"min_p": 0.5}])
def test_one_number_is_drawn_a_token_and_none_when_greedy(options):
    own, plain = generator(3), generator(3)
    for _ in range(5):
        sample(row(1, 2, 3), SamplingParams(**options), History(), own)
        sample(row(1, 2, 3), SamplingParams(temperature=0), History(), own)
        plain.random()
    assert own.random() == plain.random()


# ---- what must be greedy


@pytest.mark.parametrize("options", [
    {"temperature": 0}, {"temperature": 0, "top_k": 0, "min_p": 0.3}, {"top_k": 1},
    {"top_p": 0.0, "top_k": 0}, {"top_p": 1e-9}, {"top_p": 1e-9, "top_k": 0, "temperature": 100},
])  # fmt: skip
@given(logits=LOGITS, u=st.floats(0, 1, exclude_max=True))
def test_greedy_is_argmax_and_ties_go_to_the_lowest_id(options, logits, u):
    assume(logits.max() > -np.inf)
    assert pick(logits, u, **options).token == int(np.argmax(logits))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
@given(logits=LOGITS, u=st.floats(0, 1, exclude_max=True))
def test_greedy_is_the_limit_of_a_small_temperature(temperature, logits, u):
    top = np.sort(logits)[-2:]
    assume(top[-1] > -np.inf and (top.size == 1 or top[1] - top[0] > 0.05))
    for top_k in (0, 64):
        options = {"temperature": temperature, "top_k": top_k, "top_p": 1.0}
        assert pick(logits, u, **options).token == int(np.argmax(logits))


@pytest.mark.parametrize("top_k", [0, 3, 64])
def test_min_p_of_1_leaves_the_ties_of_the_maximum(top_k):
    logits = row(0, 5, 1, 5, 4.999, 5, -np.inf)
    assert support(logits, top_k=top_k, top_p=1.0, min_p=1.0) == {1, 3, 5}


def test_what_each_cut_keeps():
    even = row(1, 1, 1, 1)
    assert support(even, **PLAIN) == {0, 1, 2, 3}
    assert support(even, top_p=0.5) == {0, 1}  # the fewest that reach it
    assert support(even, top_p=0.51) == {0, 1, 2}
    assert support(even, top_k=3, top_p=1.0) == {0, 1, 2}  # exactly k of those that tie
    logits = np.log(row(0.5, 0.3, 0.15, 0.05))
    assert support(logits, top_k=2, top_p=0.6) == {0}  # top_p of what top_k left: 0.625
    assert support(logits, top_k=0, top_p=0.6) == {0, 1}
    assert support(logits, top_k=0, top_p=1.0, min_p=0.29) == {0, 1, 2}
    assert support(logits, top_k=0, top_p=1.0, min_p=0.31) == {0, 1}
    # the temperature comes first: at 2 the probabilities are 0.38, 0.29, 0.21, 0.12
    assert support(logits, top_k=0, top_p=0.6, temperature=2) == {0, 1}
    assert support(logits, top_k=0, top_p=0.7, temperature=2) == {0, 1, 2}


# ---- bias and penalties


def test_penalties_by_hand():
    logits = row(4, -4, 2, 0, 1)
    history = History({0, 1, 3})  # the prompt
    for token in (0, 2, 2):
        history.add(token)
    params = SamplingParams(
        repetition_penalty=2, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={2: 1, 4: -3}
    )
    got = sampling.adjusted(logits, params, history)
    #                 4/2 - .5 - .25; -4*2; (2+1)/2 - .5 - 2*.25; 0*2; 1-3
    np.testing.assert_array_equal(got, row(1.25, -8, 0.5, 0, -2))
    np.testing.assert_array_equal(logits, row(4, -4, 2, 0, 1))


def test_presence_and_frequency_leave_the_prompt_alone():
    params = SamplingParams(presence_penalty=2, frequency_penalty=2)
    np.testing.assert_array_equal(sampling.adjusted(row(1, 2), params, History({0, 1})), row(1, 2))


def test_a_bias_of_100_forces_a_token_and_no_bias_frees_a_suppressed_one():
    logits = row(30, 0, -30)
    assert support(logits, logit_bias={2: 100}) == {2}
    assert support(logits, logit_bias={0: -100}, top_p=1.0) == {1}
    assert support(logits, logit_bias={2: 100}, suppress=[2], top_p=0.9) == {0}


# ---- what cannot be sampled


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{"temperature": 0}, {}, PLAIN])
def test_a_broken_forward_pass_is_named(bad, options):
    for suppress in ((), (1,)):
        with pytest.raises(GemloomError, match=f"token 1 is {bad}.*forward pass") as caught:
            pick(row(0, bad, 5), suppress=suppress, **options)
        assert not isinstance(caught.value, RequestError)  # nothing the caller did


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, PLAIN, {"logit_bias": {0: 100}}])
def test_nothing_left_to_choose(options):
    with pytest.raises(RequestError, match="every token is suppressed"):
        pick(row(-np.inf, -np.inf), **options)
    with pytest.raises(RequestError, match="every token is suppressed"):
        pick(row(1, -np.inf, 2), suppress=(0, 2), **options)


# ---- options


def test_the_defaults_are_gemmas():
    assert from_options({}) == GEMMA_DEFAULTS
    assert (GEMMA_DEFAULTS.temperature, GEMMA_DEFAULTS.top_k, GEMMA_DEFAULTS.top_p) == (1, 64, 0.95)
    logits = row(1, 2)
    history = History({0, 1}, Counter({0: 3}))
    assert sampling.adjusted(logits, GEMMA_DEFAULTS, history) is logits  # penalties are neutral


KINDS = {
    "temperature": "a number from 0 to 100",
    "top_p": "a number from 0 to 1",
    "min_p": "a number from 0 to 1",
    "repetition_penalty": "a number from 0.01 to 100",
    "presence_penalty": "a number from -2 to 2",
    "frequency_penalty": "a number from -2 to 2",
    "top_k": "an integer from 0 to 2147483647",
    "seed": "an integer from 0 to 18446744073709551615",
    "logprobs": "an integer from 0 to 100",
    "max_tokens": "an integer from 1 to 2147483647",
    "repetition_limit": "an integer from 0 to 2147483647",
}
WRONG = [math.nan, math.inf, -math.inf, -2.1, 10**400, -(10**400), True, "1", [1], 1j]
BOUNDED = [*WRONG, -1, 1.0, 2**64]  # for integers
CHECKS = [(n, v) for n, kind in KINDS.items() for v in (BOUNDED if "int" in kind else WRONG)]


def refused(message, **options):
    with pytest.raises(OptionError) as caught:
        from_options(options)
    assert str(caught.value) == message


@pytest.mark.parametrize(("name", "value"), [*CHECKS, ("temperature", None), ("top_k", None)])
def test_a_number_is_checked(name, value):
    refused(f"{name} must be {KINDS[name]}, is {reprlib.repr(value)}", **{name: value})


@pytest.mark.parametrize(("name", "low", "high"), [
    *[(name, *span) for name, span in sampling._NUMBERS.items()],
    *[(name, *span) for name, span in sampling._INTEGERS.items()],
])  # fmt: skip
def test_both_ends_of_a_range_belong_to_it(name, low, high):
    for value in (low, high):
        assert getattr(from_options({name: value}), name) == value
    for value in (low - 1, high + 1):
        with pytest.raises(OptionError, match=name):
            from_options({name: value})


def test_stop_is_checked():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    each = "stop: each must be a string of 1 to 1000 characters, is "
    refused(each + "''", stop="")
    refused(each + "''", stop=["a", ""])
    refused(each + "3", stop=["a", 3])
    refused(each + "'xxxxxxxxxxxx...xxxxxxxxxxxxx'", stop="x" * 1001)
    refused("stop must be a string or a list of strings, is 3", stop=3)
    refused("stop must be a string or a list of strings, is None", stop=None)
    refused("stop must be at most 64 strings, is 65", stop=["a"] * 65)


def test_logit_bias_is_checked():
    bias = {3: 1}
    params = SamplingParams(logit_bias=bias)
    bias[4] = 2.0
    assert params.logit_bias == {3: 1.0}  # its own copy
    refused("logit_bias must map token ids to numbers from -100 to 100, is [3]", logit_bias=[3])
    token = "logit_bias: token id must be an integer from 0 to 2147483647, is "
    refused(token + "-1", logit_bias={-1: 1})
    refused(token + "'5'", logit_bias={"5": 1})
    refused(token + "True", logit_bias={True: 1})
    value = "logit_bias: the bias of token 7 must be a number from -100 to 100, is "
    refused(value + "101", logit_bias={7: 101})
    refused(value + "nan", logit_bias={7: math.nan})
    refused(value + "None", logit_bias={7: None})


def test_logit_bias_stays_within_the_vocabulary():
    params = SamplingParams(logit_bias={9: 1, 10: 1})
    check_vocabulary(params, 11)
    with pytest.raises(OptionError, match=r"^logit_bias: token id must be from 0 to 9, is 10$"):
        check_vocabulary(params, 10)


def test_an_unknown_option_is_named_with_the_nearest():
    refused("'top_kk' is not a sampling option; did you mean top_k?", top_kk=3)
    refused("'max_token' is not a sampling option; did you mean max_tokens?", max_token=3)
    refused("'temprature' is not a sampling option; did you mean temperature?", temprature=1)


def test_options_replace_given_defaults():
    params = from_options({"top_k": np.int64(5)}, SamplingParams(temperature=0.5))
    assert (params.temperature, params.top_k, type(params.top_k)) == (0.5, 5, int)


# ---- stop strings


def first_stop(text, stops):
    """(end, start) of the stop string that is complete first, the longest at that end."""
    found = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    return min(found, default=None)


def could_begin(text, stops):
    """Length of the longest end of the text that a stop string properly begins with."""
    ends = [n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])]
    return max(ends, default=0)


def check_pieces(pieces, stops):
    text, match = "".join(pieces), first_stop("".join(pieces), stops)
    matcher, pushed, shown = StopMatcher(stops), "", ""
    for piece in pieces:
        pushed += piece
        emit, stopped = matcher.push(piece)
        shown += emit
        assert stopped == (match is not None and len(pushed) >= match[0])
        if stopped:
            assert shown == text[: match[1]]
            assert matcher.matched == text[match[1] : match[0]]
        else:  # nothing too early, and nothing longer than needed
            assert shown == pushed[: len(pushed) - could_begin(pushed, stops)]
            assert matcher.matched is None
    rest = matcher.flush()
    assert shown + rest == (text if match is None else text[: match[1]])
    assert matcher.flush() == ""


@pytest.mark.parametrize("stops", [
    ["ab"], ["aab"], ["aa"], ["abab", "ba"], ["abcb", "bc"], ["a", "ab"], ["bab", "ab"],
    ["abc", "b"], [],
], ids=str)  # fmt: skip
def test_every_cut_of_every_short_text(stops):
    for text in map("".join, product("abc", repeat=5)):
        for cuts in product((False, True), repeat=4):
            places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 5]
            check_pieces([text[a:b] for a, b in pairwise(places)], stops)


@given(
    st.lists(st.text("ab\n☃", max_size=6), max_size=12),
    st.lists(st.text("ab\n☃", min_size=1, max_size=5), max_size=4),
)
def test_any_pieces_and_stops(pieces, stops):
    check_pieces(pieces, stops)


def test_a_stop_string_never_leaks_and_a_false_start_is_given_back():
    matcher = StopMatcher(["</end>", "STOP"])
    assert matcher.push("one </e") == ("one ", False)
    assert matcher.push("n") == ("", False)
    assert matcher.push("ds> S") == ("</ends> ", False)
    assert matcher.push("TOP and more") == ("", True)
    assert matcher.push("later") == ("", True)
    assert matcher.flush() == ""


def test_stops_cost_the_same_whatever_came_before():
    """A quadratic way would take a minute."""
    stops = ["a" * 500 + f"{n:03}" + "b" * 400 for n in range(MAX_STOPS)]
    start, matcher = time.process_time(), StopMatcher(stops)
    shown = "".join(matcher.push("aaaa")[0] for _ in range(2_000))
    assert time.process_time() - start < 10
    assert shown + matcher.flush() == "a" * 8_000


def test_biases_have_a_bound():
    SamplingParams(logit_bias=dict.fromkeys(range(MAX_BIASES), 1))
    with pytest.raises(OptionError, match="4,096 entries, not 4,097"):
        SamplingParams(logit_bias=dict.fromkeys(range(MAX_BIASES + 1), 1))
