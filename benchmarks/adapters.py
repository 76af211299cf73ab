"""What a LoRA of rank 16 on every matrix of every layer costs, here and in llama.cpp.

    python benchmarks/adapters.py [--model e2b-q4_k_m] [--pairs N] [--rounds N] [--threads N]
                                  [--name NAME] [--cache DIR] [--peer PYTHON]

Each side measures with and without the adapter by turns in one process, so that what else the
machine does meets both; a cost is taken between neighbours, and the median counts. The sides
follow each other in pairs, each first in turn. What is measured is in README.md.

Writes a table, and ``results/adapters-NAME.json`` with every single figure.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from compare import HERE, PLANS, err, prepare, slug, spread, terminal
from machine import describe
from rich.table import Table
from sides import OURS, Side, peer_side, run

from gemloom.adapters.factors import Lora, Pair
from gemloom.adapters.gguf_lora import write_gguf
from gemloom.errors import GemloomError, OptionError
from gemloom.files import gguf, source
from gemloom.system.limits import usable_cores
from gemloom.tools.adapters.base_shapes import open_base

RANK = 16
POOL = 1 << 20  # random values that all factors are drawn from
SIZE = 0.01  # of a value: the text changes, and no activation runs away
REQUESTS = 8  # at once
PROMPT, DECODED = 512, 32
# What an adapter may cost: percent of the time without, or seconds.
LIMITS = {"prompt": 15.0, "decode": 12.0, "eight adapters": 25.0, "switch": 0.005, "load": 0.3}
Answers = dict[str, list[dict[str, Any]]]  # of each process, by side


def prepare_adapter(model: Path, folder: Path) -> Path:
    """An adapter for the model, of f16 as converters write it; made if it is not there yet."""
    path = folder / f"{model.stem}-rank{RANK}.lora.gguf"
    if path.is_file():
        return path
    base = open_base(gguf.read(source.resolve(model)))
    pool = (SIZE * np.random.RandomState(0).standard_normal(POOL)).astype(np.float16)
    pairs = {}
    for name in base.matrices:
        if name.startswith("blk."):
            k, m, *experts = base.shapes[name]
            a, b = (*experts, RANK, k), (*experts, m, RANK)
            pairs[name] = Pair(np.resize(pool, a), np.resize(pool[::-1], b), 1.0)
    write_gguf(Lora(path.stem, None, pairs), base.config.architecture, path)
    return path


def measure(options: argparse.Namespace, sides: list[Side]) -> Answers:
    """All that every process answered."""
    model = prepare(options.model, options.cache)
    if model is None:
        raise GemloomError(f"there is not enough memory for {options.model}")
    job = {
        "task": "adapters", "model": str(model), "threads": options.threads,
        "adapter": str(prepare_adapter(model, options.cache)), "requests": REQUESTS,
        "prompt": PROMPT, "decode": DECODED, "rounds": options.rounds, "context": 1024,
    }  # fmt: skip
    answers: Answers = {side.name: [] for side in sides}
    for pair in range(options.pairs):
        for side in sides if pair % 2 == 0 else sides[::-1]:
            with err.status(f"pair {pair + 1} of {options.pairs}: {side.name}"):
                answers[side.name].append(run(side, job).answer)
    return answers


# --- what follows from the figures --------------------------------------------


def costs(answers: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each figure the spread: percents more than without, or seconds."""
    found = {
        "prompt": _percent(answers, "prompt", "adapter"),
        "decode": _percent(answers, "decode", "adapter"),
        "eight adapters": _percent(answers, "together", "eight"),
        "one adapter for all": _percent(answers, "together", "one"),
        "switch": _of(answers, "switch", lambda s: _less(s["other"], s["same"])),
        "load": _of(answers, "load", lambda seconds: seconds),
    }
    return {name: spread(values) for name, values in found.items() if values}


def _of(
    answers: list[dict[str, Any]], key: str, values: Callable[[Any], list[float]]
) -> list[float]:
    return [value for answer in answers if key in answer for value in values(answer[key])]


def _percent(answers: list[dict[str, Any]], key: str, which: str) -> list[float]:
    def more(seconds: dict[str, list[float]]) -> list[float]:
        return [100 * (a / b - 1) for a, b in zip(seconds[which], seconds["base"], strict=True)]

    return _of(answers, key, more)


def _less(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def rates(answers: list[dict[str, Any]], which: str) -> dict[str, float]:
    """Tokens per second, medians."""
    found = {}
    for key, count in (("prompt", PROMPT), ("decode", DECODED)):
        seconds = _of(answers, key, lambda values: values[which])
        found[key] = count / median(seconds)
    return found


# --- showing ------------------------------------------------------------------


def table(answers: Answers) -> Table:
    """Costs of both sides beside the limits, then the speeds."""
    grid = Table(*["", "limit", *answers], title="What an adapter costs: median (min to max)")
    found = {side: costs(of_side) for side, of_side in answers.items()}
    for name in next(iter(found.values())):
        limit = LIMITS.get(name)
        cells = [_shown(name, of_side.get(name)) for of_side in found.values()]
        grid.add_row(name, _value(name, limit) if limit else "", *cells)
    grid.add_section()
    for which in ("base", "adapter"):
        of_sides = [rates(of_side, which) for of_side in answers.values()]
        for key in ("prompt", "decode"):
            grid.add_row(f"{key}, {which}, tokens/s", "", *(f"{r[key]:,.2f}" for r in of_sides))
    return grid


def _shown(name: str, values: dict[str, float] | None) -> str:
    if values is None:
        return ""
    low, high = _value(name, values["min"]), _value(name, values["max"])
    return f"{_value(name, values['median'])} ({low} to {high})"


def _value(name: str, value: float) -> str:
    return f"{1e3 * value:,.1f} ms" if name in ("switch", "load") else f"{value:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="e2b-q4_k_m", choices=PLANS)
    parser.add_argument("--pairs", type=int, default=3, help="processes of each side")
    parser.add_argument("--rounds", type=int, default=5, help="measurements in each process")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="for the models")
    parser.add_argument("--name", help="of the JSON file; the processor's by default")
    parser.add_argument("--peer", metavar="PYTHON", help="of an environment with llama-cpp-python")
    options = parser.parse_args()
    try:
        print(compare(options))
    except (GemloomError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def compare(options: argparse.Namespace) -> Path:
    """Measure, show, and write; gives where the figures are."""
    for name, high in (("pairs", 100), ("rounds", 100), ("threads", 512)):
        if not 1 <= getattr(options, name) <= high:
            raise OptionError(f"{name} must be from 1 to {high}, is {getattr(options, name)}")
    if options.name and not re.fullmatch(r"[\w.-]+", options.name):
        raise OptionError(f"name must be letters, digits, dots and dashes, is {options.name!r}")
    peer = peer_side(options.peer, err)
    options.cache.mkdir(parents=True, exist_ok=True)
    machine = describe(options.threads)
    answers = measure(options, [OURS, peer] if peer else [OURS])
    terminal().print(table(answers))
    path = HERE / "results" / f"adapters-{options.name or slug(machine)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {side: {"costs": costs(each), "runs": each} for side, each in answers.items()}
    result = {"machine": machine, "model": options.model, "rank": RANK, "sides": found}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
