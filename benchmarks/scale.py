"""How Gemloom's time and memory grow: with the prompt, with the depth, with the model.

    python benchmarks/scale.py [--lengths N ...] [--repetitions N] [--models M ...] [--plot PNG]

Prompts and depths are those of the first model; of each model one prompt and decoding from an
empty context. Writes a table, ``results/NAME.json`` and a plot.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import synthetic
import work
from compare import err, prepare, slug, terminal
from machine import describe
from rich.table import Table
from sides import OURS, run

from gemloom.cli.picture import write_names
from gemloom.errors import GemloomError, OptionError, RequestError
from gemloom.system.limits import usable_cores

HERE = Path(__file__).parent
LENGTHS = [128, 512, 2048, 8192, 32768]
MODELS = ["e2b-q4_k_m", "e4b-q4_k_m", "26b-cut"]
PROMPT, DECODED = 512, 32  # tokens, where models are compared and at each depth
MIB = 2**20

Point = dict[str, float]


def by_length(path: Path, options: argparse.Namespace) -> list[Point]:
    """Per length: seconds of such a prompt, milliseconds a token after it, MiB for its context."""
    lengths = sorted(options.lengths)
    job = {"task": "speed", "prompts": lengths, "depths": lengths, "decode": DECODED}
    answers = _repeat(path, job | {"context": _context(lengths[-1])}, options)
    points = []
    for n in lengths:
        start = {"task": "start", "prompt": n, "context": _context(n)}
        with err.status(f"{path.stem}: memory at {n:,}"):
            peak = run(OURS, start | {"model": str(path), "threads": options.threads}).peak
        points.append(
            {
                "tokens": n,
                "prompt_seconds": median(answer["prompt"][str(n)] for answer in answers),
                "decode_ms": _milliseconds(answers, n),
                "memory_mib": peak / MIB,
            }
        )
    return points


def by_model(paths: dict[str, Path], options: argparse.Namespace) -> list[Point]:
    """Per model: what it asks for, and how fast it is."""
    points = []
    for name, path in paths.items():
        job = {"task": "speed", "prompts": [PROMPT], "depths": [0], "decode": DECODED}
        answers = _repeat(path, job | {"context": _context(PROMPT)}, options)
        needs = work.of(path)
        points.append(
            {
                "model": name,
                "read_mib": needs.decoded(0) / MIB,
                "multiply_adds": needs.prompt(PROMPT) / PROMPT,
                "decode_ms": _milliseconds(answers, 0),
                "prompt_ms": 1e3 / PROMPT
                * median(answer["prompt"][str(PROMPT)] for answer in answers),
            }
        )  # fmt: skip
    return points


def _repeat(path: Path, job: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    answers = []
    for i in range(options.repetitions):
        with err.status(f"{path.stem}: {i + 1} of {options.repetitions}"):
            done = run(OURS, job | {"model": str(path), "threads": options.threads})
        answers.append(done.answer)
    return answers


def _milliseconds(answers: list[dict[str, Any]], depth: int) -> float:
    return 1e3 * median(answer["decode"][str(depth)] for answer in answers) / DECODED


def _context(tokens: int) -> int:
    return -(-(tokens + DECODED + 2) // 256) * 256


# --- showing ------------------------------------------------------------------


def tables(lengths: list[Point], models: list[Point]) -> list[Table]:
    """Both series as tables."""
    first = _table(
        "By length", "tokens", "prompt, s", "prompt, tokens/s", "decode after it, ms/token",
        "memory beyond the file, MiB",
    )  # fmt: skip
    for point in lengths:
        n, seconds = point["tokens"], point["prompt_seconds"]
        cells = [seconds, n / seconds, point["decode_ms"], point["memory_mib"]]
        first.add_row(f"{n:,}", *(f"{cell:,.1f}" for cell in cells))
    second = _table(
        "By model", "model", "read, MiB/token", "decode, ms/token", "multiply-adds, M/token",
        "prompt, ms/token",
    )  # fmt: skip
    for point in models:
        cells = [
            point["read_mib"], point["decode_ms"], point["multiply_adds"] / 1e6, point["prompt_ms"],
        ]  # fmt: skip
        second.add_row(str(point["model"]), *(f"{cell:,.1f}" for cell in cells))
    return [first, second]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def plot(path: Path, lengths: list[Point], models: list[Point]) -> None:
    """The same as four small plots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    tokens = [point["tokens"] for point in lengths]
    seconds = [point["prompt_seconds"] for point in lengths]
    _line(axes[0], tokens, seconds, "tokens of prompt", "seconds", "Prompt")
    straight = [seconds[0] * n / tokens[0] for n in tokens]
    axes[0].plot(tokens, straight, "--", color="0.6", label="proportional")
    axes[0].set(xscale="log", yscale="log")
    axes[0].legend()
    decode = [point["decode_ms"] for point in lengths]
    _line(axes[1], tokens, decode, "positions filled", "ms a token", "Decoding")
    memory = [point["memory_mib"] for point in lengths]
    _line(axes[2], tokens, memory, "context", "MiB beyond the file", "Memory")
    at = [(str(point["model"]), point["read_mib"], point["decode_ms"]) for point in models]
    axes[3].plot([x for _, x, _ in at], [y for _, _, y in at], "o", color="C0")
    axes[3].set(xlabel="MiB read a token", ylabel="ms a token", title="Models decoding")
    axes[3].set_xlim(0, 1.3 * max(point["read_mib"] for point in models))
    for axis in axes[1:]:
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    write_names(axes[3], at, size=10)
    figure.savefig(path, dpi="figure")


def _line(
    axis: Any, x: Sequence[float], y: Sequence[float], xlabel: str, ylabel: str, title: str
) -> None:
    axis.plot(x, y, "o-", label="measured")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.grid(alpha=0.3)


def _check(options: argparse.Namespace) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise RequestError("matplotlib is needed for the plot: pip install --group bench")
    if not 1 <= options.repetitions <= 100:
        raise OptionError(f"repetitions must be from 1 to 100, is {options.repetitions}")
    for n in options.lengths:
        if not 1 <= n <= 100_000:
            raise OptionError(f"lengths must be from 1 to 100,000, is {n:,}")
    if not options.plot.parent.is_dir():
        raise RequestError(f"{options.plot.parent}: no such folder")
    if options.name and not re.fullmatch(r"[\w.-]+", options.name):
        raise OptionError(f"name must be letters, digits, dots and dashes, is {options.name!r}")


def measure(options: argparse.Namespace) -> Path:
    """Everything; gives where the figures are."""
    options.cache.mkdir(parents=True, exist_ok=True)
    files = {model: prepare(model, options.cache) for model in options.models}
    paths = {model: path for model, path in files.items() if path}
    if not paths:
        raise RequestError("nothing was measured")
    machine = describe(options.threads)
    lengths = by_length(next(iter(paths.values())), options)
    models = by_model(paths, options)
    out = HERE / "results" / f"{options.name or 'scale-' + slug(machine)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "model": next(iter(paths)), "lengths": lengths, "models": models}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for table in tables(lengths, models):
        terminal().print(table)
    plot(options.plot, lengths, models)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="How Gemloom's time and memory grow.")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=synthetic.MODELS, default=MODELS)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="for the models")
    parser.add_argument("--name", help="of the JSON file; the processor's by default")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "scale.png")
    options = parser.parse_args()
    try:
        _check(options)
        print(measure(options))
    except (GemloomError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
