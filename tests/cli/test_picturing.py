"""In a picture no name lies over another or outside, and those on the frontier are there."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemloom.tools.quantization.perplexity import Estimate

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation

from gemloom.cli.picture import Point, picture

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "quality.json"


def names(figure: Any) -> list[set[str]]:
    """The names in each half, once it is known that all can be read."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = []
    for axes in figure.axes:
        texts = [child for child in axes.get_children() if isinstance(child, Annotation)]
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        for box in boxes:
            assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1
            assert axes.bbox.y0 <= box.y0 < box.y1 <= axes.bbox.y1
        found.append({text.get_text() for text in texts})
    return found


@pytest.mark.parametrize("count", [1, 6, 30])
def test_names_can_be_read(count: int) -> None:
    rng = np.random.default_rng(count)
    points = [
        Point(
            f"folder/gemma-{i}-Q{i}_K_M.gguf", int(size), Estimate(kl, kl / 20), Estimate(top, 0.01)
        )
        for i, (size, kl, top) in enumerate(
            rng.uniform((1e8, 0, 0), (3e8, 2, 1), (count, 3)).round(2).tolist()
        )
    ]
    left, right = names(picture(points))
    smallest = min(points, key=lambda point: point.nbytes).name.split("/")[1].removesuffix(".gguf")
    assert smallest in left and smallest in right
    assert count > 6 or len(left) == len(right) == count


def test_points_in_one_place_do_not_share_it() -> None:
    points = [Point(f"{i}.gguf", 10**8, Estimate(0, 0), Estimate(1, 0)) for i in range(12)]
    assert all(1 <= len(found) < 12 for found in names(picture(points)))


def test_the_picture_of_the_docs() -> None:
    cases = [
        case
        for case in json.loads(RESULTS.read_text())["cases"].values()
        if case["group"] == "files" and case["bits_per_weight"] < 16
        if case["divergence"]["value"] < 5
    ]
    left, right = names(picture([_point(case) for case in cases]))
    for each in (left, right):
        assert {"Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS"} <= each
        assert len(each) > len(cases) / 2


def _point(case: dict[str, Any]) -> Point:
    figures = [Estimate(case[f]["value"], case[f]["error"]) for f in ("divergence", "same_top")]
    return Point(case["name"] + " i" * case["importance"], case["bytes"], *figures)
