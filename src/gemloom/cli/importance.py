"""``gemloom imatrix``: what each column of a model's matrices is met with, for its quantizer."""

from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import typer

from gemloom.cli.opening import open_model
from gemloom.cli.options import LoadOptions
from gemloom.cli.terminal import note, progress, read_text
from gemloom.errors import OptionError

if TYPE_CHECKING:
    from gemloom.imatrix_file import ImportanceMatrix
    from gemloom.model import Model
    from gemloom.perplexity import Cut

SAVE_EVERY = 60.0  # seconds


def imatrix(
    model: Annotated[str, typer.Argument(help="A file, hf:owner/repo, a built-in name.")],
    text: Annotated[str, typer.Argument(metavar="FILE", help="A text, UTF-8; - reads stdin.")],
    out: Annotated[Path, typer.Argument(help="The file to write: .gguf, or .dat for old tools.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what is in OUT, if there is any.")
    ] = False,
    context: Annotated[int, typer.Option("--context", "-c", help="Tokens of a window.")] = 512,
    chunks: Annotated[
        int | None, typer.Option(help="Stop after so many windows.", show_default="all")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", help="Threads.", show_default="one a core")
    ] = None,
) -> None:
    """Make an importance matrix for a quantizer.

    The text should be like those that the model is for. What was computed is written every
    minute and on Ctrl-C; --resume goes on from there.

    \b
    Examples:
      gemloom imatrix gemma-f16.gguf book.txt gemma.imatrix.gguf
      gemloom imatrix gemma-f16.gguf book.txt gemma.imatrix.gguf --resume
      gemloom imatrix gemma-f16.gguf book.txt gemma.imatrix.dat --chunks 100
    """
    from gemloom.perplexity import Cut

    how, words = Cut(context, 0, chunks), read_text(text)
    earlier = _earlier(out) if resume else None
    if not out.parent.is_dir():
        raise OptionError(f"{out}: there is no folder {out.parent}")
    with open_model(model, LoadOptions(context=context, threads=threads)) as opened:
        _collect(opened, words, how, out, earlier, Path(text).name)


def _earlier(out: Path) -> "ImportanceMatrix | None":
    """What an earlier run left. OptionError for a format that cannot be gone on with."""
    from gemloom.imatrix_file import read

    if out.suffix == ".dat":
        raise OptionError("--resume: a .dat file holds too little to go on with; write a .gguf")
    return read(out) if out.exists() else None


def _collect(
    model: "Model", words: str, how: "Cut", out: Path, earlier: "ImportanceMatrix | None", name: str
) -> None:
    """Compute and write; whatever ends it early, what was computed is written first."""
    from gemloom.imatrix import collect
    from gemloom.imatrix_file import write

    of, latest, written, saved = 0, earlier, earlier, monotonic()
    try:
        with progress(Path(model.name).name) as show:
            for of, latest in collect(model, words, how, name, earlier):
                show(latest.chunks, of, f"{latest.chunks:,} windows")
                if monotonic() - saved > SAVE_EVERY:
                    write(out, latest)
                    written, saved = latest, monotonic()
        if latest is earlier:
            note(f"{out}: all windows are there already")
    finally:
        if latest is not None and latest is not written:
            write(out, latest)
        if latest is not None and latest is not earlier:
            _tell(latest, of, out)


def _tell(matrix: "ImportanceMatrix", of: int, out: Path) -> None:
    """How much there is, and of whom nothing is known."""
    unmet = sum(int((entry.counts == 0).sum()) for entry in matrix.entries.values())
    seen = f"{out}: {matrix.chunks:,} of {of:,} windows, {len(matrix.entries):,} matrices"
    note(f"{seen}; {unmet:,} experts met nothing: give a longer text" if unmet else seen)
