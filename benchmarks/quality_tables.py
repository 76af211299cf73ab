"""The tables and the picture of docs/quality.md, from results/quality.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gemloom.cli.picture import Point, draw
from gemloom.tools.quantization.perplexity import Estimate

NOTHING_LEFT = 5.0  # nats of KL divergence; what lost more is not drawn
Found = dict[str, Any]
_FILES = ("| type | MB | bits | perplexity | KL divergence | 99 % | same top, % | matrices are |",
          "|---|---|---|---|---|---|---|---|")  # fmt: skip
_TYPES = ("| type | bits | perplexity | KL divergence | same top, % | KL with importances |",
          "|---|---|---|---|---|---|")  # fmt: skip


def show(results: dict[str, Any], picture: Path) -> None:
    """Print the tables as Markdown and draw the picture."""
    found: list[Found] = list(results["cases"].values())
    package = results["cases"]["package"]
    base, own = package["base_perplexity"], package["perplexity"]
    print(f"Base: perplexity {_plain(base, 3)}, over {package['tokens']:,} tokens.")
    print(f"The package: {_plain(own, 3)}, KL divergence {_plain(package['divergence'], 5)}.\n")
    _print("Files", _FILES, map(_file, _sorted(found, "files")))
    _print("Types", _TYPES, _pairs(found, "types"))
    _print("Embeddings", _TYPES, _pairs(found, "embeddings"))
    files = [case for case in found if case["group"] == "files" and case["bits_per_weight"] < 16]
    draw(picture, [_point(case) for case in files if case["divergence"]["value"] < NOTHING_LEFT])


def _sorted(found: list[Found], group: str) -> list[Found]:
    cases = [case for case in found if case["group"] == group]
    return sorted(cases, key=lambda case: case["divergence"]["value"])


def _print(title: str, head: Iterable[str], rows: Iterable[str]) -> None:
    print("\n".join([f"## {title}\n", *head, *rows, ""]))


def _file(case: Found) -> str:
    name = case["name"] + (" with importances" if case["importance"] else "")
    measured = (
        _perplexity(case),
        _plain(case["divergence"], 4),
        f"{case['percentiles']['99']:.3f}",
        _plain(case["same_top"], 1, 100),
    )
    taken = (f"{case['bytes'] / 1e6:.0f}", f"{case['bits_per_weight']:.2f}")
    return _row(name, *taken, *measured, ", ".join(case["types"]))


def _pairs(found: list[Found], group: str) -> Iterable[str]:
    """A line a type: without importances, and what they make of it."""
    by_name: dict[str, dict[bool, Found]] = {}
    for case in found:
        if case["group"] == group:
            by_name.setdefault(case["name"], {})[case["importance"]] = case
    for name, both in sorted(by_name.items(), key=_bits):
        plain, weighted = both.get(False), both.get(True)
        bits = f"{next(iter(both.values()))['bits_per_weight']:.2f}"
        measures = ["", "", ""]
        if plain:
            top = _plain(plain["same_top"], 1, 100)
            measures = [_perplexity(plain), _plain(plain["divergence"], 5), top]
        yield _row(name, bits, *measures, _plain(weighted["divergence"], 5) if weighted else "")


def _bits(item: tuple[str, dict[bool, Found]]) -> tuple[float, str]:
    return -next(iter(item[1].values()))["bits_per_weight"], item[0]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _perplexity(case: Found) -> str:
    figure = case["perplexity"]
    return _plain(figure, 2) if figure["value"] < 10_000 else f"{figure['value']:.0e}"


def _plain(figure: dict[str, float], digits: int, times: float = 1) -> str:
    return f"{times * figure['value']:.{digits}f} ± {times * figure['error']:.{digits}f}"


def _point(case: Found) -> Point:
    name = case["name"] + (" i" if case["importance"] else "")
    figures = [Estimate(case[f]["value"], case[f]["error"]) for f in ("divergence", "same_top")]
    return Point(name, case["bytes"], *figures)
