"""Gemloom and llama.cpp side by side: same files, same threads, in turn.

    python benchmarks/compare.py [--quick] [--pairs N] [--models M ...] [--prompts N ...]
                                 [--depths N ...] [--name NAME] [--cache DIR] [--peer PYTHON]

Each measurement runs in a fresh process. A pair is one of Gemloom's and one of llama.cpp's, the
one right after the other and each first in turn, so that what else the machine does meets both;
a ratio is taken within a pair, and the median of the pairs' ratios is what counts. Ratios above
1 are in Gemloom's favour. What each side's process does is in ours.py and peer.py.

Writes a table, and ``results/NAME.json`` with every single figure.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import ceilings
import synthetic
import work
from machine import describe, meminfo, warm
from rich.console import Console
from rich.table import Table
from sides import OURS, Done, Side, peer_side, run

from gemloom.errors import GemloomError, OptionError, RequestError
from gemloom.system.limits import usable_cores

HERE = Path(__file__).parent
DECODED = 32  # tokens decoded at each depth
MEMORY_CONTEXT, MEMORY_PROMPT = 4096, 512
Plan = tuple[list[int], list[int]]  # prompt lengths and depths
PLANS: dict[str, Plan] = {
    "e2b-q4_k_m": ([128, 512, 2048, 8192], [0, 2048, 8192]),
    "e4b-q4_k_m": ([128, 512, 2048], [0, 2048]),
    "e2b-qat": ([512], [0]),
    "e4b-qat": ([512], [0]),
    "26b-cut": ([512], [0]),
}
QUICK_MODELS, QUICK_PLAN, QUICK_PAIRS = ["e2b-q4_k_m"], ([128, 512], [0]), 3
PAIRS = 5
WORKING = 2 << 30  # bytes a side may need beside the model's file, repacked weights among them
err = Console(stderr=True)


@dataclass(slots=True)
class Figure:
    """One thing measured on both sides, pair by pair."""

    unit: str
    higher_is_better: bool
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)  # of the ceilings, from 0 to 1

    @property
    def ratios(self) -> list[float]:
        """One a pair; above 1 in Gemloom's favour."""
        pairs = zip(self.ours, self.peer, strict=bool(self.peer))
        return [a / b if self.higher_is_better else b / a for a, b in pairs]

    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"unit": self.unit, "gemloom": self.ours}
        if self.peer:
            found |= {"llama.cpp": self.peer, "ratio": spread(self.ratios)}
        return found | ({"share_of_ceiling": self.shares} if self.shares else {})


Figures = dict[str, Figure]
KEPT = " (packed file)"  # Gemloom with its packed weights mapped from a file it had kept


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


# --- one model ----------------------------------------------------------------


def measure(path: Path, sides: list[Side], options: argparse.Namespace, plan: Plan) -> Figures:
    """All pairs of one model."""
    figures: Figures = {}
    prompts, depths = plan
    context = -(-(max([1, *prompts, *depths]) + DECODED + 2) // 256) * 256
    speed = {
        "task": "speed", "prompts": prompts, "depths": depths, "decode": DECODED,
        "context": context,
    }  # fmt: skip
    start = {"task": "start", "prompt": MEMORY_PROMPT, "context": MEMORY_CONTEXT}
    mapped = start | {"packed": "auto"}  # the file that "keep" makes here
    run(OURS, {"model": str(path), "threads": options.threads, **start, "packed": "keep"})
    for pair in range(options.pairs):
        for side in sides if pair % 2 == 0 else sides[::-1]:
            for job in (speed, start, mapped) if side is OURS else (speed, start):
                what = f"{path.stem}, pair {pair + 1} of {options.pairs}: {side.name} {job['task']}"
                with err.status(what):
                    done = run(side, {"model": str(path), "threads": options.threads, **job})
                if job is speed:
                    _take_speed(figures, side, done)
                else:
                    _take_start(figures, side, done, KEPT if job is mapped else "")
                if job is start and side is not OURS:
                    _take_start(figures, side, done, KEPT)
    return figures


def _add(
    figures: Figures, name: str, side: Side, value: float, unit: str, *, higher: bool = False
) -> None:
    figure = figures.setdefault(name, Figure(unit, higher))
    (figure.ours if side is OURS else figure.peer).append(value)


def _take_speed(figures: Figures, side: Side, done: Done) -> None:
    for n, seconds in done.answer["prompt"].items():
        _add(figures, f"prompt {n}", side, int(n) / seconds, "tokens/s", higher=True)
    for n, seconds in done.answer["decode"].items():
        _add(figures, f"decode at {n}", side, DECODED / seconds, "tokens/s", higher=True)


def _take_start(figures: Figures, side: Side, done: Done, how: str) -> None:
    load, first = done.answer["load"], done.answer["first"]
    _add(figures, f"load{how}", side, load, "s")
    _add(figures, f"first token{how}", side, first, "s")
    _add(figures, f"load to first token{how}", side, load + first, "s")
    _add(figures, f"peak memory{how}", side, done.peak / 2**20, "MiB")


def add_shares(figures: Figures, model: work.Work, limits: ceilings.Ceilings) -> None:
    """Hold Gemloom's medians against the machine's best rates."""
    for name, figure in figures.items():
        n = int(name.split()[-1]) if name[-1].isdigit() else 0
        kinds, amount = ["f32", "int8"], 0.0
        if name.startswith("prompt"):
            amount = model.prompt(n) / n
        elif name.startswith("decode"):
            kinds, amount = ["read"], model.decoded(n)
        rate = amount * median(figure.ours) / 1e9
        figure.shares = {
            kind: rate / float(limits[kind]["best"]) for kind in kinds if amount and kind in limits
        }


# --- showing ------------------------------------------------------------------


def table(models: dict[str, Figures], pairs: int, limits: ceilings.Ceilings) -> Table:
    """Medians of all models; below it the ceilings."""
    best = (f"{kind} {rate['best']:,.0f} {rate['unit']}" for kind, rate in limits.items())
    grid = Table(
        title=f"Medians of {pairs} pairs; ratios above 1 are in Gemloom's favour",
        caption=f"Ceilings: {', '.join(best)}",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("model", "figure", "Gemloom", "llama.cpp", "ratio", "min to max", "of ceiling"):
        text = column in ("model", "figure", "of ceiling")
        grid.add_column(column, justify="left" if text else "right", no_wrap=True)
    for model, figures in models.items():
        for name, figure in figures.items():
            grid.add_row(model, f"{name}, {figure.unit}", *_cells(figure))
        grid.add_section()
    return grid


def _cells(figure: Figure) -> list[str]:
    cells = [f"{median(figure.ours):,.2f}"]
    if figure.peer:
        ratio = spread(figure.ratios)
        cells += [f"{median(figure.peer):,.2f}", f"{ratio['median']:.2f}"]
        cells += [f"{ratio['min']:.2f} to {ratio['max']:.2f}"]
    else:
        cells += ["", "", ""]
    return [*cells, ", ".join(f"{share:.0%} {kind}" for kind, share in figure.shares.items())]


def terminal() -> Console:
    """Standard output, wide enough for the tables even where it is a file."""
    out = Console()
    out.width = max(out.width, 120)
    return out


def save(path: Path, result: dict[str, Any], models: dict[str, Figures]) -> None:
    """Write the JSON whole or not at all; called after each model, so that a stop loses one."""
    found = {
        model: {name: figure.json() for name, figure in figures.items()}
        for model, figures in models.items()
    }
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(result | {"models": found}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


# --- the whole ----------------------------------------------------------------


def compare(options: argparse.Namespace) -> Path:
    """Measure everything that ``options`` name; gives where the figures are."""
    peer = peer_side(options.peer, err)
    options.cache.mkdir(parents=True, exist_ok=True)
    sides = [OURS, peer] if peer else [OURS]
    result = _head(sides, options)
    path = HERE / "results" / f"{options.name or slug(result['machine'])}.json"
    models: dict[str, Figures] = {}
    for model, plan in plans(options).items():
        file = prepare(model, options.cache)
        if file is None:
            continue
        models[model] = measure(file, sides, options, plan)
        add_shares(models[model], work.of(file), result["ceilings"])
        save(path, result, models)
    if not models:
        raise RequestError("nothing was measured")
    terminal().print(table(models, options.pairs, result["ceilings"]))
    return path


def plans(options: argparse.Namespace) -> dict[str, Plan]:
    """What to measure of which model."""
    chosen = options.models or (QUICK_MODELS if options.quick else list(PLANS))
    found = {}
    for model in chosen:
        prompts, depths = QUICK_PLAN if options.quick else PLANS[model]
        found[model] = (
            prompts if options.prompts is None else options.prompts,
            depths if options.depths is None else options.depths,
        )
    return found


def prepare(model: str, cache: Path) -> Path | None:
    """The model's file, written if need be and in the page cache; None if memory is too small."""
    path = cache / f"{model}-{synthetic.VERSION}.gguf"
    if not path.is_file():
        err.print(f"writing {path}")
        synthetic.make(model, path)
    free, needed = meminfo("MemAvailable"), path.stat().st_size + WORKING
    if free is not None and free < needed:
        err.print(f"{model} is left out: it needs {needed:,} bytes of memory, {free:,} are free")
        return None
    warm(path)
    return path


def _head(sides: list[Side], options: argparse.Namespace) -> dict[str, Any]:
    """All of the result but the models."""
    machine = describe(options.threads)
    if machine["load"] > 0.5:
        err.print(f"this machine is not idle: its load is {machine['load']:.1f}")
    with err.status("measuring what the machine can do at most"):
        limits = ceilings.measure(options.threads)
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "ceilings": limits,
        "versions": {side.name: run(side, {"task": "version"}).answer for side in sides},
        "pairs": options.pairs,
        "decoded": DECODED,
    }


def slug(machine: dict[str, Any]) -> str:
    """A name for results from such a machine."""
    words = re.findall(r"[a-z0-9]+", str(machine["processor"]).lower())
    return "-".join([*words, str(machine["threads"]), "threads"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Gemloom and llama.cpp side by side.")
    parser.add_argument("--quick", action="store_true", help="one model, short prompts, 3 pairs")
    parser.add_argument("--pairs", type=int)
    parser.add_argument(
        "--models", nargs="+", choices=PLANS, metavar="MODEL", help=", ".join(PLANS)
    )
    parser.add_argument("--prompts", nargs="*", type=int, metavar="TOKENS")
    parser.add_argument("--depths", nargs="*", type=int, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="for the models")
    parser.add_argument("--name", help="of the JSON file; the processor's by default")
    parser.add_argument("--peer", metavar="PYTHON", help="of an environment with llama-cpp-python")
    options = parser.parse_args()
    if options.pairs is None:
        options.pairs = QUICK_PAIRS if options.quick else PAIRS
    try:
        check(options)
        print(compare(options))
    except (GemloomError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def check(options: argparse.Namespace) -> None:
    """OptionError for a number outside its range."""
    for name, values, low, high in (
        ("pairs", [options.pairs], 1, 1_000),
        ("threads", [options.threads], 1, 512),
        ("prompts", options.prompts or [], 1, 100_000),
        ("depths", options.depths or [], 0, 100_000),
    ):
        for value in values:
            if not low <= value <= high:
                raise OptionError(f"{name} must be from {low} to {high:,}, is {value:,}")
    if options.name and not re.fullmatch(r"[\w.-]+", options.name):
        raise OptionError(f"name must be letters, digits, dots and dashes, is {options.name!r}")


if __name__ == "__main__":
    main()
