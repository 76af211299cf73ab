"""How well a model predicts a text, and how far its predictions are from another model's.

The text is cut into windows and its tokens counted as llama.cpp's llama-perplexity does, so that
the figures can be held against each other. Not a benchmark of what a model knows or can do.

- Without a stride: windows of ``context`` tokens that do not overlap, each with BOS in place of
  its first token; the second half of each is scored. What is left at the end is not used.
- With a stride: windows of ``context + stride // 2`` tokens, ``stride`` apart, as they are in the
  text (only the first begins with BOS); the last ``stride`` tokens of each are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

import numpy as np

from gemloom.errors import OptionError, RequestError, TensorError
from gemloom.model import Model
from gemloom.text.tokenizer import Tokenizer

CONTEXT = 512  # tokens of a window where nobody says how many, as in llama.cpp
MIN_CONTEXT = 8
NORMAL_95 = 1.96  # standard errors to either side that hold 95 % of a normal distribution
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)  # of the KL divergence of single tokens


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its standard error, tokens taken as independent, as llama.cpp does."""

    value: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """Where the figure lies with a confidence of 95 %."""
        return self.value - NORMAL_95 * self.error, self.value + NORMAL_95 * self.error

    def json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "interval": list(self.interval)}


def mean(values: np.ndarray) -> Estimate:
    """The mean of two values or more."""
    error = values.std() / np.sqrt(len(values) - 1)
    return Estimate(float(values.mean()), float(error))


def exponential(of: Estimate) -> Estimate:
    """e to the power of an estimate; its error to first order."""
    value = float(np.exp(of.value))
    return Estimate(value, value * of.error)


def root(of: Estimate) -> Estimate:
    """The square root of an estimate; its error to first order, 0 at 0."""
    value = float(np.sqrt(of.value))
    return Estimate(value, of.error / (2 * value) if value else 0.0)


# --- windows ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cut:
    """How a text is cut: tokens of a window, of a stride (0: none), and how many windows."""

    context: int = CONTEXT
    stride: int = 0
    windows: int | None = None  # at most; None: all

    def __post_init__(self) -> None:
        if self.context < MIN_CONTEXT:
            raise OptionError(f"context must be at least {MIN_CONTEXT}, is {self.context}")
        if not 0 <= self.stride < self.size:  # a window is half a stride longer
            raise OptionError(f"stride must be from 0 to {2 * self.context - 2}, is {self.stride}")
        if self.windows is not None and self.windows < 1:
            raise OptionError(f"windows must be at least 1, is {self.windows}")

    @property
    def size(self) -> int:
        """Tokens of one window, and so the context the model must have."""
        return self.context + self.stride // 2

    @property
    def scored(self) -> range:
        """The rows of a window whose predictions of the next token count."""
        first = self.size - self.stride - 1 if self.stride else self.size // 2
        return range(first, self.size - 1)


def cut(ids: Sequence[int], how: Cut, bos: int) -> list[list[int]]:
    """The windows of a text whose tokens, BOS first, are ``ids``.

    RequestError if there are too few for one window.
    """
    step, needed = how.stride or how.size, how.size + bool(how.stride)
    if len(ids) < needed:
        raise RequestError(
            f"the text has {len(ids):,} tokens, {needed:,} are needed for one window: "
            "give a longer text, or a smaller context"
        )
    count = -(-(len(ids) - how.size) // step) if how.stride else len(ids) // how.size
    starts = range(0, count * step, step)[: how.windows]
    windows = [list(ids[start : start + how.size]) for start in starts]
    if not how.stride:
        for window in windows:
            window[0] = bos
    return windows


def read_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as tokens, BOS first; a newline at its end does not count, as in llama.cpp."""
    return tokenizer.with_bos(tokenizer.encode(text.removesuffix("\n")))


# --- one distribution ---------------------------------------------------------


class Distribution:
    """What a model expects next, from its logits, float32 [n_vocab]; sums are in f64.

    TensorError where the logits are no numbers.
    """

    def __init__(self, logits: np.ndarray) -> None:
        self.top = int(logits.argmax())
        self._logits = logits - logits[self.top]
        self._weights = np.exp(self._logits)
        self._total = float(self._weights.sum(dtype=np.float64))
        if not np.isfinite(self._total):
            raise TensorError("the model's logits are not finite: its weights are damaged")
        self._log_total = float(np.log(self._total))

    def loss(self, token: int) -> float:
        """Minus the logarithm of a token's probability, in nats."""
        return self._log_total - float(self._logits[token])

    def divergence(self, other: Distribution) -> float:
        """KL(self || other), in nats: what is lost where ``other`` is taken for this one."""
        gap = self._logits - other._logits
        gap *= self._weights
        return float(gap.sum(dtype=np.float64)) / self._total + other._log_total - self._log_total


def _predictions(model: Model | Recorded, window: list[int], how: Cut) -> Iterator[Distribution]:
    """What a model expects after each scored row of a window; 64 MiB of logits at a time."""
    for logits in model.logits_in_parts(window, how.scored):
        yield from map(Distribution, logits)


# --- one model ----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """How well a model predicts a text."""

    model: str
    perplexity: Estimate
    loss: Estimate  # its logarithm: the mean negative log-likelihood of a token, in nats
    tokens: int  # scored
    windows: int
    cut: Cut

    def json(self) -> dict[str, Any]:
        """For ``--json``."""
        return _json(self)


def perplexity(
    model: Model,
    text: str,
    how: Cut = Cut(),
    done: Callable[[int, int, Perplexity], None] = lambda count, of, so_far: None,
) -> Perplexity:
    """The perplexity of a text: e to the mean negative log-likelihood of the scored tokens.

    ``done`` is called after each window: how many there were, of how many, and the result so far.
    Raises RequestError for a text shorter than a window, ContextError for a model that was loaded
    for less than a window.
    """
    windows = cut(read_tokens(model.tokenizer, text), how, model.tokenizer.bos)
    losses: list[float] = []
    for count, window in enumerate(windows, 1):
        targets = (window[row + 1] for row in how.scored)
        for token, prediction in zip(targets, _predictions(model, window, how), strict=True):
            losses.append(prediction.loss(token))
        loss = mean(np.array(losses))
        result = Perplexity(
            model=model.name,
            perplexity=exponential(loss),
            loss=loss,
            tokens=len(losses),
            windows=count,
            cut=how,
        )
        done(count, len(windows), result)
    return result


# --- two models ---------------------------------------------------------------


class Recorded:
    """A model's logits of a text, kept in a file: in its place, ``compare`` takes them as a base.

    So it is computed once for any number of models, and need not be loaded beside them. ``file``
    is written and read, ``nbytes`` at most; ``done`` is called after each window: how many there
    were, and of how many. Raises as ``perplexity``, and OSError where the file cannot grow.
    """

    def __init__(
        self,
        model: Model,
        text: str,
        how: Cut,
        file: IO[bytes],
        done: Callable[[int, int], None] = lambda count, of: None,
    ) -> None:
        self.name, self.tokenizer, self.config = model.name, model.tokenizer, model.config
        self._file, self._row = file, 4 * model.config.n_vocab
        windows = cut(read_tokens(model.tokenizer, text), how, model.tokenizer.bos)
        self._starts: dict[tuple[int, ...], int] = {}  # in the file, by a window's tokens
        for count, window in enumerate(windows, 1):
            self._starts[tuple(window)] = file.tell()
            for logits in model.logits_in_parts(window, how.scored):
                file.write(np.ascontiguousarray(logits, np.float32).data)
            done(count, len(windows))

    @staticmethod
    def nbytes(model: Model, text: str, how: Cut) -> int:
        """How large the file of a text will be."""
        windows = cut(read_tokens(model.tokenizer, text), how, model.tokenizer.bos)
        return 4 * model.config.n_vocab * len(how.scored) * len(windows)

    def logits_in_parts(self, ids: Sequence[int], rows: Sequence[int]) -> Iterator[np.ndarray]:
        """As ``Model.logits_in_parts`` of a window that was recorded, a row at a time."""
        start = self._starts.get(tuple(ids))
        if start is None:
            raise RequestError(f"{self.name} was recorded of another text, or of other windows")
        for i in range(len(rows)):
            self._file.seek(start + i * self._row)
            yield np.frombuffer(self._file.read(self._row), np.float32)[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far a model's predictions of a text are from those of ``base``."""

    base: str
    model: str
    perplexity: Estimate
    base_perplexity: Estimate
    log_ratio: Estimate  # of the two; tokens are paired, so its error is much smaller than theirs
    divergence: Estimate  # KL(base || model) of a token's prediction, in nats
    percentiles: dict[str, float]  # of the same, by percentage of tokens
    same_top: Estimate  # share of tokens where both find the same one likeliest
    delta_p: Estimate  # probability of the right token, less what base gives it
    delta_p_rms: Estimate  # root of the mean square of that
    tokens: int  # scored
    windows: int
    cut: Cut

    def json(self) -> dict[str, Any]:
        """For ``--json``."""
        return _json(self)


@dataclass(slots=True)
class _Pairs:
    """Both models' scores, token by token."""

    base: list[float]  # losses
    other: list[float]
    divergence: list[float]
    same_top: list[bool]

    def add(self, token: int, base: Distribution, other: Distribution) -> None:
        self.base.append(base.loss(token))
        self.other.append(other.loss(token))
        self.divergence.append(base.divergence(other))
        self.same_top.append(base.top == other.top)

    def estimates(self) -> dict[str, Any]:
        """What these come to, by field of Comparison."""
        base, other = np.array(self.base), np.array(self.other)
        divergence, delta = np.array(self.divergence), np.exp(-other) - np.exp(-base)
        at = np.percentile(divergence, PERCENTILES)
        return {
            "perplexity": exponential(mean(other)),
            "base_perplexity": exponential(mean(base)),
            "log_ratio": mean(other - base),
            "divergence": mean(divergence),
            "percentiles": {f"{p:g}": float(x) for p, x in zip(PERCENTILES, at, strict=True)},
            "same_top": mean(np.array(self.same_top, np.float64)),
            "delta_p": mean(delta),
            "delta_p_rms": root(mean(delta**2)),
            "tokens": len(base),
        }


def compare(
    base: Model | Recorded,
    model: Model,
    text: str,
    how: Cut = Cut(),
    done: Callable[[int, int, Comparison], None] = lambda count, of, so_far: None,
) -> Comparison:
    """Hold a model's predictions of a text against those of ``base``.

    ``done`` and what is raised are as in ``perplexity``; RequestError too for models that do not
    have the same tokens.
    """
    if base is model:  # its one slot cannot hold both
        raise RequestError("to hold a model against itself, load it twice")
    ids = read_tokens(base.tokenizer, text)
    if base.config.n_vocab != model.config.n_vocab or ids != read_tokens(model.tokenizer, text):
        raise RequestError(f"{base.name} and {model.name} have different vocabularies")
    windows, pairs = cut(ids, how, base.tokenizer.bos), _Pairs([], [], [], [])
    for count, window in enumerate(windows, 1):
        targets = (window[row + 1] for row in how.scored)
        both = (_predictions(each, window, how) for each in (base, model))
        for token, one, other in zip(targets, *both, strict=True):
            pairs.add(token, one, other)
        found = pairs.estimates()
        result = Comparison(base=base.name, model=model.name, windows=count, cut=how, **found)
        done(count, len(windows), result)
    return result


def _json(result: Perplexity | Comparison) -> dict[str, Any]:
    values = {name: getattr(result, name) for name in result.__slots__ if name != "cut"}
    shown = {name: v.json() if isinstance(v, Estimate) else v for name, v in values.items()}
    return shown | {"context": result.cut.context, "stride": result.cut.stride}
