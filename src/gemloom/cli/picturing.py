"""A picture of what files of different sizes lost; needs matplotlib, the extra ``pictures``."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gemloom.errors import OptionError

if TYPE_CHECKING:
    from gemloom.quantization.perplexity import Estimate


class Point(NamedTuple):
    """A file and what it lost."""

    name: str
    nbytes: int
    divergence: "Estimate"
    same_top: "Estimate"


_LOSSLESS = 1e-7  # nats; what is below has no place on a logarithmic axis


def check(path: Path) -> None:
    """Whether a picture can be drawn there, before anything is computed for it. OptionError."""
    if find_spec("matplotlib") is None:
        raise OptionError("--picture needs matplotlib: pip install 'gemloom[pictures]'")
    if path.suffix.lower() != ".png":
        raise OptionError(f"--picture {path}: only .png files are drawn")


def draw(path: Path, points: Sequence[Point]) -> None:
    """KL divergence, and how often the likeliest token is another one, against size."""
    from io import BytesIO

    from matplotlib.figure import Figure

    from gemloom.files.writing import replace_file

    figure = Figure(figsize=(11, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    ordered = sorted(points, key=lambda point: (point.divergence.value, point.nbytes))
    for i, (name, nbytes, kl, top) in enumerate(ordered):
        _mark(left, i, name, (nbytes / 1e6, max(kl.value, _LOSSLESS), kl.error))
        _mark(right, i, name, (nbytes / 1e6, 100 * (1 - top.value), 100 * top.error))
    left.set(yscale="log", ylabel="KL divergence from the base, nats a token")
    right.set(ylabel="tokens where another one is likeliest, %", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel="size, MB")
        axes.grid(alpha=0.3)
        axes.margins(x=0.12)  # room for the labels
    image = BytesIO()
    figure.savefig(image, dpi=120, format="png")
    replace_file(path, image.getvalue())


def _mark(axes: Any, index: int, name: str, at: tuple[float, float, float]) -> None:
    """A point with its error; labels in turn to the right and to the left, so that more fit."""
    (x, y, error), side = at, -1 if index % 2 else 1
    label, align = Path(name).name.removesuffix(".gguf"), "right" if side < 0 else "left"
    axes.errorbar([x], [y], yerr=[1.96 * error], fmt="o", markersize=4, capsize=2)
    axes.annotate(
        label, (x, y), xytext=(6 * side, 0), textcoords="offset points", fontsize=7,
        ha=align, va="center",
    )  # fmt: skip
