"""A picture of what files of different sizes lost; needs matplotlib, the extra ``pictures``."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gemloom.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    from gemloom.tools.quantization.perplexity import Estimate


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
    """A PNG of ``picture``."""
    from io import BytesIO

    from gemloom.files.replacing import replace_file

    image = BytesIO()
    picture(points).savefig(image, dpi="figure", format="png")
    replace_file(path, image.getvalue())


def picture(points: Sequence[Point]) -> "Figure":
    """KL divergence, and how often the likeliest token is another one, against size.

    A line joins the files that no other beats in both; they are named first, others where there
    is room.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(yscale="log", ylabel="KL divergence from the base, nats a token")
    right.set(ylabel="tokens where another one is likeliest, %")
    names = [Path(point.name).name.removesuffix(".gguf") for point in points]
    sizes = [point.nbytes / 1e6 for point in points]
    kl = [(max(p.divergence.value, _LOSSLESS), p.divergence.error) for p in points]
    other = [(100 * (1 - p.same_top.value), 100 * p.same_top.error) for p in points]
    left.set_ylim(min(y for y, _ in kl) / 2, 2 * max(y + 1.96 * error for y, error in kl))
    highest = max((loss + 1.96 * error for loss, error in other), default=0)
    right.set_ylim(0, max(1.08 * highest, 1))
    for axes, losses in ((left, kl), (right, other)):
        axes.set(xlabel="size, MB")
        axes.grid(alpha=0.3)
        axes.margins(x=0.12)  # room for the labels
        marks = [(x, y, 1.96 * error) for x, (y, error) in zip(sizes, losses, strict=True)]
        _plot(axes, marks)
    for axes, losses in ((left, kl), (right, other)):
        at = [(x, y) for x, (y, _) in zip(sizes, losses, strict=True)]
        first = set(_frontier(at))
        order = sorted(range(len(at)), key=lambda i: (i not in first, at[i]))
        write_names(axes, [(names[i], *at[i]) for i in order])
    return figure


def _frontier(at: Sequence[tuple[float, float]]) -> list[int]:
    """Which lose less than all that are as small or smaller, by size."""
    found: list[int] = []
    for i in sorted(range(len(at)), key=lambda i: at[i]):
        if not found or at[i][1] < at[found[-1]][1]:
            found.append(i)
    return found


def _plot(axes: "Axes", marks: Sequence[tuple[float, float, float]]) -> None:
    """Points with their errors, and a line through the frontier."""
    best = _frontier([(x, y) for x, y, _ in marks])
    axes.plot([marks[i][0] for i in best], [marks[i][1] for i in best], color="C0", alpha=0.4)
    for i, (x, y, error) in enumerate(marks):
        colour = "C0" if i in best else "0.6"
        axes.errorbar([x], [y], yerr=[error], fmt="o", color=colour, markersize=4, capsize=2)


def write_names(axes: "Axes", points: Sequence[tuple[str, float, float]], size: int = 7) -> None:
    """Write a name beside each point (name, x, y), so that none lies over another or over a point.

    The first ones get the nearest places; a name for which no place is left is not written. To be
    called when the axes have their limits.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    canvas: Any = FigureCanvasAgg(axes.get_figure(root=True))
    canvas.draw()  # from now on it is known where everything is
    taken = []
    for _, x, y in points:
        column, row = axes.transData.transform((x, y))
        taken.append(Bbox.from_extents(column - 5, row - 5, column + 5, row + 5))
    halo = [withStroke(linewidth=2, foreground="white")]  # where error bars are behind it
    for name, x, y in points:
        label = axes.annotate(
            name, (x, y), xytext=(0, 0), textcoords="offset pixels", fontsize=size,
            ha="center", va="center", path_effects=halo,
        )  # fmt: skip
        label.set_in_layout(False)  # else the axes would move
        box = label.get_window_extent(canvas.get_renderer())
        free = next((at for at in _places(box) if _fits(box, at, axes.bbox, taken)), None)
        if free is None:
            label.remove()
            continue
        label.set_position(free)
        taken.append(box.translated(*free))


def _places(box: "Bbox") -> Iterator[tuple[float, float]]:
    """Middles of a label about its point, in pixels, the nearest first."""
    for far in (0, 8):
        x, y = box.width / 2 + 8 + far, box.height / 2 + 6 + far
        yield from ((x, 0), (-x, 0), (x, y), (-x, y), (x, -y), (-x, -y), (0, y), (0, -y))


def _fits(box: "Bbox", at: tuple[float, float], frame: "Bbox", taken: "Sequence[Bbox]") -> bool:
    moved = box.translated(*at)
    within = (
        frame.x0 < moved.x0 and moved.x1 < frame.x1 and frame.y0 < moved.y0 < moved.y1 < frame.y1
    )
    return within and not any(moved.overlaps(other) for other in taken)
