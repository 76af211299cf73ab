"""How fast a loaded model is here, where the time goes, and what memory it takes.

Everything is done as a caller would, through ``Model.stream``: sampling and text are part of
what is measured. Not a comparison with anything else; that is ``benchmarks/compare.py``.

A prompt is measured cold: its tokens are new each time, so nothing of it is found in the cells.
Decoding is measured after as many positions as its depth says are filled, one step a token,
with the sampling that requests get if they ask for nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from gemloom.engine.generation import Run
from gemloom.errors import OptionError
from gemloom.ggml.backends import cpu_features, devices, ggml_version
from gemloom.model import Model

MAX_REPETITIONS = 1_000
PHASES = (
    "build", "input", "launch", "ahead", "compute", "read", "sample", "text", "other",
)  # fmt: skip
COMPUTING = ("launch", "compute")  # in ggml; what else there is, is Python's
_NEVER = -100.0  # logit bias of the tokens that would end a generation early


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What it ran on."""

    processor: str
    backends: list[str]  # ggml's, preferred first
    threads: int
    kernels: list[str]  # what multiplies the weights
    features: list[str]  # instruction sets this build of ggml uses
    ggml: str  # version
    fallbacks: dict[str, int]  # operations of a step that devices lack, so the CPU's


@dataclass(frozen=True, slots=True)
class Timing:
    """One measurement, repeated: a prompt of ``tokens``, or as many decoded after ``depth``."""

    kind: str  # "prompt" or "decode"
    tokens: int
    depth: int
    seconds: list[float]  # one a repetition
    phases: dict[str, float]  # median milliseconds by phase: of a prompt, or of one decoded token

    @property
    def speeds(self) -> list[float]:
        """Tokens per second, one a repetition."""
        return [self.tokens / seconds for seconds in self.seconds]

    @property
    def speed(self) -> float:
        """Tokens per second, the median."""
        return median(self.speeds)

    @property
    def python_share(self) -> float:
        """How much of the time was spent outside ggml, from 0 to 1; what is done ahead counts."""
        inside = sum(self.phases[name] for name in COMPUTING)
        return 1 - inside / sum(self.phases.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """All that was measured of one model."""

    model: str
    architecture: str
    context: int
    kv_type: str
    chunk: int
    machine: Machine
    memory: dict[str, int]  # bytes, as ``Model.memory``
    timings: list[Timing]

    def json(self) -> dict[str, Any]:
        """Everything as values that JSON has, with medians and ranges."""
        timings = [
            asdict(timing)
            | {"tokens_per_second": _spread(timing.speeds), "python_share": timing.python_share}
            for timing in self.timings
        ]
        return asdict(self) | {"timings": timings}


def context_for(prompts: Sequence[int], generate: Sequence[int], depths: Sequence[int]) -> int:
    """The smallest context in which ``bench`` can measure these."""
    return max([*prompts, max(generate, default=0) + max(depths, default=0) + 1])


def bench(
    model: Model,
    prompts: Sequence[int] = (512,),
    generate: Sequence[int] = (64,),
    depths: Sequence[int] = (0,),
    repetitions: int = 5,
    done: Callable[[Timing], None] = lambda timing: None,
) -> BenchReport:
    """Measure prompts of each length, and decoding of each length at each depth.

    ``done`` is called with each as it ends. OptionError for a count outside its range or
    more than the model's context holds.
    """
    _check(model, prompts, generate, depths, repetitions)
    _prompt(model, 2, 0)  # wakes the threads and brings the weights into memory
    timings = []
    for n in prompts:
        timings.append(_repeat("prompt", n, 0, repetitions, partial(_prompt, model, n)))
        done(timings[-1])
    for depth in depths:
        for n in generate:
            once = partial(_decode, model, n, depth)
            timings.append(_repeat("decode", n, depth, repetitions, once))
            done(timings[-1])
    return BenchReport(
        model=model.name,
        architecture=model.config.architecture,
        context=model.context,
        kv_type=model.kv_type,
        chunk=model.options.chunk,
        machine=_machine(model),
        memory=model.memory(),
        timings=timings,
    )


def _check(
    model: Model,
    prompts: Sequence[int],
    generate: Sequence[int],
    depths: Sequence[int],
    repetitions: int,
) -> None:
    if not 1 <= repetitions <= MAX_REPETITIONS:
        raise OptionError(f"repetitions must be from 1 to {MAX_REPETITIONS:,}, is {repetitions}")
    for name, values, low in (
        ("prompt", prompts, 1),
        ("generate", generate, 1),
        ("depth", depths, 0),
    ):
        for value in values:
            if value < low:
                raise OptionError(f"{name} must be at least {low}, is {value}")
    if not prompts and not (generate and depths):
        raise OptionError("nothing to measure: name a prompt length, or how many tokens to decode")
    needed = context_for(prompts, generate, depths)
    if needed > model.context:
        raise OptionError(
            f"this needs a context of {needed:,} positions, the model was loaded with "
            f"{model.context:,}"
        )


# --- measuring ----------------------------------------------------------------


def _tokens(model: Model, n: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.RandomState(seed).randint(model.config.n_vocab, size=n)]


def _stream(model: Model, ids: list[int], n: int, seed: int) -> Run:
    """Generate exactly ``n`` tokens."""
    bias = dict.fromkeys(model.tokenizer.eog, _NEVER)
    return model.stream(ids, max_tokens=n, seed=seed, logit_bias=bias)


def _prompt(model: Model, n: int, repetition: int) -> tuple[float, dict[str, float]]:
    """Seconds until the first token after a prompt never seen before is there, and by phase."""
    for seed in count(repetition, MAX_REPETITIONS):
        ids = _tokens(model, n, seed)
        before, start = model.times, perf_counter()
        with _stream(model, ids, 1, seed) as run:
            next(run)
        seconds = perf_counter() - start
        if not run.usage.cached_tokens:  # by chance, what an earlier one left in the cells
            break
    return seconds, _phases(seconds, before, model.times, run.times)


def _decode(model: Model, n: int, depth: int, repetition: int) -> tuple[float, dict[str, float]]:
    """Seconds for ``n`` tokens after the first that follows ``depth`` positions; of one, by phase.

    By the engine's own clock, since it does not wait for a reader. The phases are those of
    ``n + 1`` tokens less those of one.
    """
    ids = _tokens(model, max(depth, 1), depth)  # the same each time: found in the cells
    _stream(model, ids, 1, repetition).completion()
    _, first = _timed(model, ids, 1, repetition)
    seconds, all_of_them = _timed(model, ids, n + 1, repetition)
    phases = {name: max(0.0, all_of_them[name] - first[name]) / n for name in first}
    return seconds, phases | {"other": max(0.0, seconds / n - sum(phases.values()))}


def _timed(model: Model, ids: list[int], n: int, seed: int) -> tuple[float, dict[str, float]]:
    """Seconds from the first of ``n`` tokens to the last, and by phase of all of them."""
    before = model.times
    run = _stream(model, ids, n, seed)
    seconds = run.completion().usage.decode_seconds
    return seconds, {name: spent - before[name] for name, spent in model.times.items()} | run.times


def _phases(
    seconds: float, before: dict[str, float], after: dict[str, float], outside: dict[str, float]
) -> dict[str, float]:
    """Seconds by phase; ``other`` is what no phase accounts for."""
    phases = {name: after[name] - before[name] for name in after} | outside
    return phases | {"other": max(0.0, seconds - sum(phases.values()))}


def _repeat(
    kind: str,
    tokens: int,
    depth: int,
    repetitions: int,
    once: Callable[[int], tuple[float, dict[str, float]]],
) -> Timing:
    results = [once(repetition) for repetition in range(repetitions)]
    phases = {name: 1e3 * median(phases[name] for _, phases in results) for name in PHASES}
    return Timing(kind, tokens, depth, [seconds for seconds, _ in results], phases)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _machine(model: Model) -> Machine:
    descriptions = [info.description for info in devices() if info.kind == "cpu"]
    return Machine(
        processor=descriptions[0] if descriptions else platform.processor(),
        backends=model.backends,
        threads=model.threads,
        kernels=_kernels(model),
        features=[name for name, there in cpu_features().items() if there],
        ggml=ggml_version(),
        fallbacks=model.fallbacks,
    )


def _kernels(model: Model) -> list[str]:
    memory = model.memory()
    there = {
        "own": bool(memory["packed"]),
        "blas": "BLAS" in model.backends,
        "repack": bool(memory["repacked"]),
        "plain": memory["repacked"] + memory["packed"] < memory["weights"],
    }
    return [name for name, used in there.items() if used]


def label(timing: Timing) -> str:
    """What was measured, in a few words."""
    if timing.kind == "prompt":
        return f"prompt {timing.tokens:,}"
    return f"decode {timing.tokens:,} at {timing.depth:,}"
