"""``gemloom perplexity`` and ``gemloom compare``: how good a file is, and what it lost."""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from gemloom.cli.load import open_file, open_model
from gemloom.cli.options import LoadOptions, with_options
from gemloom.cli.output import output, roomy
from gemloom.cli.terminal import print_json, progress, read_text, render, size, table
from gemloom.errors import OutputError

if TYPE_CHECKING:
    from rich.table import Table

    from gemloom.model import Model
    from gemloom.tools.quantization.perplexity import (
        Comparison,
        Cut,
        Estimate,
        Perplexity,
        Recorded,
    )

_Text = Annotated[str, typer.Argument(metavar="TEXT", help="A file, UTF-8; - reads stdin.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOptions:
    """How a text is cut, and how models are loaded for it."""

    context: Annotated[
        int, typer.Option("--context", "-c", help="Tokens of a window; the second half is scored.")
    ] = 512
    stride: Annotated[
        int,
        typer.Option(help="Begin a window every N tokens and score N; 0: windows do not overlap."),
    ] = 0
    chunks: Annotated[
        int | None, typer.Option(help="Stop after this many windows.", show_default="all")
    ] = None
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", help="Threads.", show_default="one a core")
    ] = None
    kv_type: Annotated[str, typer.Option(help="K/V cells of this type: f32, f16, q8_0.")] = "f16"

    def cut(self) -> "Cut":
        """As ``gemloom.tools.quantization.perplexity`` takes it. OptionError for what cannot be."""
        from gemloom.tools.quantization.perplexity import Cut

        return Cut(self.context, self.stride, self.chunks)

    def open(self, name: str) -> "Model":
        """The model, with room for one window."""
        context = self.cut().size
        load = LoadOptions(context=context, threads=self.threads, kv_type=self.kv_type)
        return open_model(name, load)


@with_options
def perplexity(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A file, hf:owner/repo, a built-in name.")
    ],
    text: _Text,
    *,
    as_json: _Json = False,
    options: CutOptions,
) -> None:
    """Measure how well a model predicts a text.

    Windows, scored tokens and errors are counted as llama.cpp does.

    \b
    Examples:
      gemloom perplexity gemma.gguf book.txt
      gemloom perplexity gemma.gguf book.txt --context 2048 --chunks 20 --json
      gemloom perplexity gemma.gguf book.txt --stride 256
    """
    from gemloom.tools.quantization import perplexity as measure

    words, how = read_text(text), options.cut()
    with options.open(model) as opened, progress(Path(opened.name).name) as show:

        def done(count: int, of: int, so_far: "Perplexity") -> None:
            show(count, of, f"perplexity {_plain(so_far.perplexity)}")

        found = measure.perplexity(opened, words, how, done)
    if as_json:
        print_json(found.json())
        return
    low, high = found.perplexity.interval
    rows = table(">perplexity", "95 %", ">tokens", ">windows")
    counts = (f"{found.tokens:,}", f"{found.windows:,}")
    rows.add_row(_plain(found.perplexity), f"{low:.4f} to {high:.4f}", *counts)
    render(rows)


@with_options
def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model to compare with.")],
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Files made of it.")],
    text: _Text,
    *,
    as_json: _Json = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw quality against size into this PNG.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the picture if it is there.")
    ] = False,
    options: CutOptions,
) -> None:
    """Measure what smaller files of a model lost.

    Of each, over a text: perplexity, KL divergence from the base, how often both find the same
    token likeliest, how far the probability of the right token moves; all with standard errors.

    For several models what the base predicts is kept on the disk meanwhile: 268 MB for each window
    of 512 tokens, in the folder that TMPDIR names, else in /var/tmp.

    \b
    Examples:
      gemloom compare gemma-f16.gguf gemma-q8_0.gguf gemma-q4_k_m.gguf book.txt
      gemloom compare gemma-f16.gguf gemma-q*.gguf book.txt --chunks 20 --json
      gemloom compare gemma-f16.gguf gemma-q*.gguf book.txt --picture quality.png
    """
    from gemloom.cli.picture import Point, check, draw

    words, how = read_text(text), options.cut()
    if picture:
        check(picture)
    aside = output(picture, base, *models, text, force=force) if picture else nullcontext()
    with aside as target:
        files = [_facts(name) for name in (base, *models)]
        found = _compare_all(base, models, words, how, options)
        if target:
            pairs = zip(files[1:], found, strict=True)
            draw(target, [Point(f["file"], f["bytes"], c.divergence, c.same_top) for f, c in pairs])
    if as_json:
        shown = [facts | c.json() for facts, c in zip(files[1:], found, strict=True)]
        print_json({"base": files[0], "models": shown})
    else:
        render(_summary(files, found))


def _facts(name: str) -> dict[str, Any]:
    """What a file takes: bytes of its tensors, and bits of each weight."""
    from math import prod

    file = open_file(name)
    tensors = file.tensors.values()
    taken, weights = sum(t.nbytes for t in tensors), sum(prod(t.shape) for t in tensors)
    return {"file": file.name, "bytes": taken, "bits_per_weight": 8 * taken / weights}


def _compare_all(
    base: str, models: Sequence[str], words: str, how: "Cut", options: CutOptions
) -> list["Comparison"]:
    """Each model against the base, which is computed once; two are loaded at a time at most."""
    if len(models) == 1:
        with options.open(base) as opened:
            return [_compare(opened, models[0], words, how, options)]
    with tempfile.TemporaryFile(dir=roomy()) as file:
        with options.open(base) as opened:
            recorded = _record(opened, words, how, file)
        return [_compare(recorded, name, words, how, options) for name in models]


def _compare(
    base: "Model | Recorded", name: str, words: str, how: "Cut", options: CutOptions
) -> "Comparison":
    from gemloom.tools.quantization import perplexity as measure

    with options.open(name) as model, progress(Path(model.name).name) as show:

        def done(count: int, of: int, so_far: "Comparison") -> None:
            show(count, of, f"KL {so_far.divergence.value:.5f}")

        return measure.compare(base, model, words, how, done)


def _record(base: "Model", words: str, how: "Cut", file: IO[bytes]) -> "Recorded":
    """What the base predicts, in ``file``. OutputError where the disk has no room for it."""
    from gemloom.tools.quantization.perplexity import Recorded

    needed, free = Recorded.nbytes(base, words, how), shutil.disk_usage(roomy()).free
    if needed > free:
        raise OutputError(
            f"what {base.name} predicts takes {size(needed)}, {roomy()} has {size(free)} free: "
            "fewer --chunks, one model at a time, or TMPDIR set to another folder"
        )
    with progress(base.name) as show:
        return Recorded(base, words, how, file, lambda count, of: show(count, of, "the base"))


def _summary(files: Sequence[dict[str, Any]], found: Sequence["Comparison"]) -> "Table":
    """The base and each model on a line."""
    rows = table("model", ">size", ">bits", ">perplexity", ">KL divergence", ">same top, %")
    perplexities = [found[0].base_perplexity, *(c.perplexity for c in found)]
    losses = [[], *([_plain(c.divergence, 5), _plain(c.same_top, 2, 100)] for c in found)]
    for facts, perplexity, lost in zip(files, perplexities, losses, strict=True):
        taken = (size(facts["bytes"]), f"{facts['bits_per_weight']:.2f}")
        rows.add_row(Path(facts["file"]).name, *taken, _plain(perplexity, 3), *lost)
    return rows


def _plain(figure: "Estimate", digits: int = 4, times: float = 1) -> str:
    return f"{times * figure.value:.{digits}f} ± {times * figure.error:.{digits}f}"
