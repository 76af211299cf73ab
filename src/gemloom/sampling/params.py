"""From one row of logits to one token: a request's options, and pure functions on numpy arrays.

Not the text side (``text/stopping.py`` looks for stop strings) and not the engine: nothing here
knows of a model, a batch or a clock. ``logits`` is one row, float32 [vocab], never modified.

The steps, in this order:

1. ``suppress``: ids that the model must never produce become -inf.
2. Log-probabilities are taken here: the log-softmax of the model's own distribution, before
   any option of the request. vLLM by default and llama.cpp's server report the same.
3. ``logit_bias`` is added.
4. ``repetition_penalty`` over the tokens of prompt and answer: a positive logit is divided by
   it, any other multiplied. Then ``presence_penalty``, and ``frequency_penalty`` times the
   count, are subtracted, over the tokens of the answer alone, as OpenAI defines them.
   Tokens that a grammar does not allow become -inf.
5. ``temperature`` divides; 0 takes the largest logit and skips what follows.
6. ``top_k``, then ``top_p`` of what is left, then ``min_p`` relative to the most likely token.
7. One draw.

Steps 3 to 7 have the order of transformers. llama.cpp's default order puts the temperature
last, so there it does not change what top_p and min_p keep; its presence and frequency penalties
count the prompt too. ``top_k`` keeps exactly k tokens (transformers keeps all that tie with the
k-th). ``top_p`` keeps the fewest tokens that reach it, at least one.

Equal logits rank by id, the lowest first, in every step. So no result depends on the order that
a partition leaves.
"""

import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemloom.errors import GemloomError, OptionError, RequestError, suggestion

MAX_BIASES = 4_096  # of logit_bias; they are added at every token
MAX_STOPS = 64  # strings; each is looked for in every piece of text
MAX_STOP_LENGTH = 1_000  # characters; as many may have to be held back
_LARGEST_INT = 2**31 - 1
_FIRST_PREFIX = 1_024  # tokens ranked first where top_k sets no bound
_LOWEST = float(np.finfo(np.float32).min)

_NUMBERS = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}
_INTEGERS = {
    "top_k": (0, _LARGEST_INT),
    "seed": (0, 2**64 - 1),
    "logprobs": (0, 100),
    "max_tokens": (1, _LARGEST_INT),
    "repetition_limit": (0, _LARGEST_INT),
}
_OPTIONAL = ("seed", "logprobs", "max_tokens")
NEVER = -100  # the bias that bars a token
_BIAS = (NEVER, 100)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.intp]


def _number(name: str, value: object, span: tuple[float, float]) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not _within(value, span):
        raise OptionError(f"{name} must be a number {_spelled(span)}, is {reprlib.repr(value)}")
    return float(value)


def _integer(name: str, value: object, span: tuple[int, int]) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not _within(value, span):
        raise OptionError(f"{name} must be an integer {_spelled(span)}, is {reprlib.repr(value)}")
    return int(value)


def _within(value: Any, span: tuple[float, float]) -> bool:
    return bool(span[0] <= value <= span[1])  # False for NaN


def _spelled(span: tuple[float, float]) -> str:
    return f"from {span[0]} to {span[1]}"


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise OptionError(
            f"logit_bias must map token ids to numbers {_spelled(_BIAS)}, is {reprlib.repr(value)}"
        )
    if len(value) > MAX_BIASES:
        raise OptionError(f"logit_bias may have {MAX_BIASES:,} entries, not {len(value):,}")
    return {
        _integer("logit_bias: token id", token, (0, _LARGEST_INT)): _number(
            f"logit_bias: the bias of token {token}", bias, _BIAS
        )
        for token, bias in value.items()
    }


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple):
        raise OptionError(f"stop must be a string or a list of strings, is {reprlib.repr(value)}")
    if len(stops) > MAX_STOPS:
        raise OptionError(f"stop must be at most {MAX_STOPS} strings, is {len(stops)}")
    return tuple(_stop(stop) for stop in stops)


def _stop(value: object) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_STOP_LENGTH:
        raise OptionError(
            f"stop: each must be a string of 1 to {MAX_STOP_LENGTH} characters, "
            f"is {reprlib.repr(value)}"
        )
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request picks its tokens. The defaults are those Gemma is published with.

    temperature: divides the logits, from 0 to 100; 0 always picks the most likely token.
    top_k: consider only this many most likely tokens, from 0, which considers all.
    top_p: consider only the most likely tokens that together have this probability, from 0 to 1;
        1 considers all.
    min_p: consider only tokens at least this share as likely as the most likely one, from 0 to 1;
        0 considers all.
    repetition_penalty: makes tokens of the prompt and the answer less likely, from 0.01 to 100;
        1 is off, values below 1 make them more likely.
    presence_penalty: subtracted once from the logits of tokens in the answer, from -2 to 2.
    frequency_penalty: subtracted once for each time a token is in the answer, from -2 to 2.
    logit_bias: {token id: number} added to the logits, from -100, which bars a token, to 100; up
        to 4,096 entries.
    seed: from 0 to 2**64 - 1; the same seed gives the same text. None: a random seed.
    logprobs: return the log-probability of each token and of this many most likely ones, from 0
        to 100. None: return none.
    max_tokens: most tokens of the answer, from 1. None: as many as the context holds.
    stop: a string, or up to 64 of up to 1,000 characters; the answer ends before the first that
        occurs.
    repetition_limit: end the answer when its last tokens are one piece, repeated 32 times or more
        and over this many tokens, from 0, which is off. Text that a grammar shaped does not count.
        The rule is off if ``logit_bias`` bars every token that ends an answer.

    Every field is checked: OptionError names the option, its range and the given value.
    """

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    repetition_limit: int = 1_024

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {}
        for name, span in _NUMBERS.items():
            checked[name] = _number(name, getattr(self, name), span)
        for name, span in _INTEGERS.items():
            value = getattr(self, name)
            unset = value is None and name in _OPTIONAL
            checked[name] = None if unset else _integer(name, value, span)
        checked["logit_bias"] = _bias(self.logit_bias)
        checked["stop"] = _stops(self.stop)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


GEMMA_DEFAULTS = SamplingParams()


@dataclass(slots=True)
class History:
    """The tokens of one request so far, counted for the penalties."""

    seen: set[int] = field(default_factory=set)  # in the prompt or the answer
    generated: Counter[int] = field(default_factory=Counter)  # in the answer, with their counts

    def add(self, token: int) -> None:
        """Take note of one generated token."""
        self.seen.add(token)
        self.generated[token] += 1


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token, and its log-probability (natural) where ``logprobs`` asked for it."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # most likely first; impossible tokens left out


def from_options(
    options: Mapping[str, Any], defaults: SamplingParams | None = None
) -> SamplingParams:
    """``defaults`` with some options replaced. OptionError for an unknown name or a bad value."""
    if not isinstance(defaults, SamplingParams | None):
        raise OptionError(f"params must be SamplingParams, not {reprlib.repr(defaults)}")
    names = [item.name for item in fields(SamplingParams)]
    for name in options:
        if name not in names:
            hint = suggestion(name, names, f"; there are {', '.join(names)}")
            raise OptionError(f"{reprlib.repr(name)} is not a sampling option{hint}")
    return replace(defaults or GEMMA_DEFAULTS, **options)


def check_vocabulary(params: SamplingParams, size: int) -> None:
    """OptionError if the params name a token outside a vocabulary of ``size``."""
    for token in params.logit_bias:
        if token >= size:
            raise OptionError(f"logit_bias: token id must be from 0 to {size - 1}, is {token}")


def generator(seed: int | None) -> np.random.Generator:
    """The random generator of one request; nothing else may draw from it."""
    return np.random.Generator(np.random.PCG64(seed))


def sample(
    logits: Floats,
    params: SamplingParams,
    history: History,
    rng: np.random.Generator,
    suppress: Sequence[int] = (),
    allowed: NDArray[np.bool_] | None = None,
) -> Sampled:
    """Pick one token; takes one number from ``rng``, none where ``temperature`` is 0.

    -inf in ``logits`` bars a token, as ``suppress`` does; all ids lie within the vocabulary.
    ``allowed`` is bool [vocab], the tokens that may be picked; None for all.
    Raises GemloomError for NaN or +inf, RequestError where no token is left.
    """
    _best(logits)  # before suppress could hide what is broken
    model = suppressed(logits, suppress)
    token = choose(adjusted(model, params, history, allowed), params, rng)
    if params.logprobs is None:
        return Sampled(token)
    logprob, top = _logprobs(model, token, params.logprobs)
    return Sampled(token, logprob, top)


def choose(values: Floats, params: SamplingParams, rng: np.random.Generator) -> int:
    """Steps 5 to 7, of logits that ``adjusted`` gave; raises as ``sample``."""
    token = _best(values)
    if params.temperature > 0:
        return _draw(values, float(values[token]), params, rng.random())
    return token


def _barred(allowed: NDArray[np.bool_]) -> Floats:
    """0 for what is allowed, else -inf: bits 0, or those of -inf.

    ``np.where`` takes 0.95 ms of a vocabulary of which any token may be allowed, this 0.07.
    """
    bits = np.subtract(allowed, 1, dtype=np.int32)
    bits &= np.float32(-np.inf).view(np.int32)
    return bits.view(np.float32)


def _best(values: Floats) -> int:
    """The most likely id, the lowest of equals; refuses what no draw could be made from."""
    best = int(values.argmax())  # argmax stops at a NaN
    peak = values[best]
    if np.isnan(peak) or peak == np.inf:
        raise GemloomError(
            f"the logit of token {best} is {peak}: the forward pass went wrong; "
            "check the weights and adapters, or try another device"
        )
    if peak == -np.inf:
        raise RequestError("every token is suppressed or has a logit of -inf: nothing to choose")
    return best


def suppressed(logits: Floats, suppress: Sequence[int]) -> Floats:
    """Step 1; the logits themselves where there is nothing to do."""
    if len(suppress) == 0:
        return logits
    model = logits.copy()
    model[np.asarray(suppress, np.intp)] = -np.inf
    return model


def adjusted(
    logits: Floats,
    params: SamplingParams,
    history: History,
    allowed: NDArray[np.bool_] | None = None,
) -> Floats:
    """Steps 3 and 4; the logits themselves where there is nothing to do."""
    values = _penalized(logits, params, history)
    return values if allowed is None else values + _barred(allowed)


def _penalized(logits: Floats, params: SamplingParams, history: History) -> Floats:
    """A copy with bias and penalties; the logits themselves where there are none."""
    repetition = params.repetition_penalty
    presence, frequency = params.presence_penalty, params.frequency_penalty
    if not params.logit_bias and repetition == 1 and presence == frequency == 0:
        return logits
    values = logits.copy()
    if params.logit_bias:
        ids, biases = _arrays(params.logit_bias)
        values[ids] += biases
    if repetition != 1:
        ids = np.fromiter(history.seen, np.intp, len(history.seen))
        seen = values[ids]
        values[ids] = np.where(seen > 0, seen / repetition, seen * repetition)
    if presence or frequency:
        ids, counts = _arrays(history.generated)
        values[ids] -= presence + frequency * counts
    return values


def _arrays(by_id: Mapping[int, float]) -> tuple[Ids, Floats]:
    ids = np.fromiter(by_id.keys(), np.intp, len(by_id))
    return ids, np.fromiter(by_id.values(), np.float32, len(by_id))


def _draw(values: Floats, peak: float, params: SamplingParams, u: float) -> int:
    """The token at ``u`` (0 <= u < 1) of the distribution, ranked by probability, then id.

    Without top_k the tokens are ranked in growing prefixes, until one holds the answer.
    """
    size = params.top_k or _FIRST_PREFIX
    total = None if params.top_k else float(_weights(values, peak, params.temperature).sum())
    while True:
        ids = _largest(values, size)
        weights = _weights(values[ids], peak, params.temperature)
        if params.top_k or ids.size < size:
            total = None
        place = _place(weights, total, params, u)
        if place is not None:
            return int(ids[place])
        size *= 16


def _weights(values: Floats, peak: float, temperature: float) -> Doubles:
    """Probabilities relative to the largest one: exp((value - peak) / temperature), float64."""
    weights = values.astype(np.float64)
    weights -= peak
    with np.errstate(over="ignore"):  # a tiny temperature: exp(-inf) is the 0 it should be
        weights /= temperature
    return np.exp(weights, out=weights)


def _place(weights: Doubles, total: float | None, params: SamplingParams, u: float) -> int | None:
    """Where ``u`` falls among the weights (descending) that top_p and min_p keep.

    ``total`` is the weight of all tokens where there are more than these; None is returned
    where the answer may lie among the others.
    """
    mass = np.cumsum(weights)
    whole = float(mass[-1]) if total is None else total
    keep = mass.size + 1  # past the end: nothing cut off so far
    if params.top_p < 1:
        keep = int(np.searchsorted(mass, params.top_p * whole)) + 1
    if params.min_p > 0:
        keep = min(keep, int(np.count_nonzero(weights >= params.min_p)))
    if params.top_p < 1 or params.min_p > 0:
        if keep >= mass.size and total is not None:
            return None
        keep = min(keep, mass.size)
        whole = float(mass[keep - 1])
    # "right", as u is below 1: each token owns its start and not its end, one of weight 0 nothing
    place = int(np.searchsorted(mass, u * whole, side="right"))
    return place if place < mass.size else None


def _logprobs(
    values: Floats, token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log-softmax of ``values`` at the token, and at the ``count`` most likely ones."""
    peak = values.max()
    norm = float(peak) + float(np.log(np.exp(values - peak).sum(dtype=np.float64)))
    top = _largest(values, count) if count else np.empty(0, np.intp)
    logprobs = values[top].astype(np.float64) - norm
    pairs = zip(top.tolist(), logprobs.tolist(), strict=True)
    return float(values[token]) - norm, tuple(pairs)


def _largest(values: Floats, count: int) -> Ids:
    """Ids of the ``count`` largest values above -inf (fewer where there are fewer), in order.

    No sort and no partition of the whole row: a lower bound leaves few candidates.
    """
    ids = np.flatnonzero(values >= _bound(values, count))
    order = np.argsort(-values[ids], kind="stable")  # ids ascend, so equals rank by id
    return ids[order[:count]]


def _bound(values: Floats, count: int) -> float:
    """A value that at least ``count`` others reach, close to the count-th largest.

    The row is laid out in 4 x count columns; each of the count largest column maxima is
    a value of its own, so the smallest of them is such a bound.
    """
    columns = 4 * count
    rows = values.size // columns
    if rows == 0:
        return _LOWEST if count >= values.size else _nth_largest(values, count)
    maxima = values[: rows * columns].reshape(rows, columns).max(axis=0)
    return _nth_largest(maxima, count)


def _nth_largest(values: Floats, count: int) -> float:
    place = values.size - count
    return max(float(np.partition(values, place)[place]), _LOWEST)  # -inf is no candidate
