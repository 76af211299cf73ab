"""``gemloom imatrix``: what each column of a model's matrices is met with, for its quantizer."""

from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemloom.cli.load import open_model
from gemloom.cli.options import LoadOptions, with_options
from gemloom.cli.output import Force, output
from gemloom.cli.terminal import note, print_json, progress, read_text
from gemloom.errors import OptionError

if TYPE_CHECKING:
    from gemloom.model import Model
    from gemloom.tools.quantization.imatrix_file import ImportanceMatrix
    from gemloom.tools.quantization.perplexity import Cut

SAVE_EVERY = 60.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ImatrixOptions:
    """How an importance matrix is made."""

    resume: Annotated[bool, typer.Option("--resume", help="Continue from OUT, if it exists.")] = (
        False
    )
    context: Annotated[int, typer.Option("--context", "-c", help="Tokens of a window.")] = 512
    chunks: Annotated[
        int | None, typer.Option(help="Stop after this many windows.", show_default="all")
    ] = None
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", help="Threads.", show_default="one a core")
    ] = None


@with_options
def imatrix(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A file, hf:owner/repo, a built-in name.")
    ],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A file, UTF-8; - reads stdin.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file to write: .gguf, or .dat for old tools.")
    ],
    force: Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    *,
    how: ImatrixOptions,
) -> None:
    """Make an importance matrix for a quantizer.

    The text should be like those that the model is for. What was computed is written every
    minute and on Ctrl-C; --resume goes on from there.

    \b
    Examples:
      gemloom imatrix gemma-f16.gguf book.txt gemma.imatrix.gguf
      gemloom imatrix gemma-f16.gguf book.txt gemma.imatrix.gguf --resume
      gemloom imatrix gemma-f16.gguf book.txt imatrix.dat --chunks 100 --json
    """
    from gemloom.tools.quantization.perplexity import Cut

    if out.suffix not in (".gguf", ".dat") and not out.is_char_device() and not out.is_fifo():
        raise OptionError(f"{out}: an importance matrix is a .gguf, or a .dat for old tools")
    cut, words = Cut(how.context, 0, how.chunks), read_text(text)
    instead = "--resume goes on with it, --force replaces it"
    with output(out, model, text, force=force or how.resume, instead=instead) as target:
        earlier = _earlier(out) if how.resume else None
        with open_model(model, LoadOptions(context=how.context, threads=how.threads)) as opened:
            matrix, of = _collect(opened, words, cut, target, earlier, Path(text).name)
        _report(matrix, of, out, earlier, as_json)


def _report(
    matrix: "ImportanceMatrix",
    of: int,
    out: Path,
    earlier: "ImportanceMatrix | None",
    as_json: bool,
) -> None:
    if as_json:
        print_json(_facts(matrix, of, out))
    elif matrix is earlier:
        note(f"{out}: all windows are there already")
    else:
        _tell(matrix, of, out)


def _earlier(out: Path) -> "ImportanceMatrix | None":
    """What an earlier run left. OptionError for a format that cannot be gone on with."""
    from gemloom.tools.quantization.imatrix_file import read

    if out.suffix == ".dat":
        raise OptionError("--resume: a .dat file holds too little to go on with; write a .gguf")
    return read(out) if out.exists() else None


def _collect(
    model: "Model", words: str, how: "Cut", out: Path, earlier: "ImportanceMatrix | None", name: str
) -> tuple["ImportanceMatrix", int]:
    """Compute and write; gives what is written, and how many windows the text has.

    Whatever ends it early, what was computed is written first, and told.
    """
    from gemloom.tools.quantization.imatrix import collect
    from gemloom.tools.quantization.imatrix_file import write

    of, latest, written, saved, whole = 0, earlier, earlier, monotonic(), False
    try:
        with progress(Path(model.name).name) as show:
            for of, latest in collect(model, words, how, name, earlier):
                show(latest.chunks, of, f"{latest.chunks:,} windows")
                if monotonic() - saved > SAVE_EVERY:
                    write(out, latest)
                    written, saved = latest, monotonic()
        whole = True
    finally:
        if latest is not None and latest is not written:
            write(out, latest)
        if latest is not None and latest is not earlier and not whole:
            _tell(latest, of, out)
    assert latest
    return latest, of or latest.chunks


def _facts(matrix: "ImportanceMatrix", of: int, out: Path) -> dict[str, Any]:
    """What was written; JSON can hold it."""
    return {
        "file": str(out), "windows": matrix.chunks, "of": of, "context": matrix.chunk_size,
        "datasets": list(matrix.datasets), "matrices": len(matrix.entries),
        "experts_unmet": sum(int((entry.counts == 0).sum()) for entry in matrix.entries.values()),
    }  # fmt: skip


def _tell(matrix: "ImportanceMatrix", of: int, out: Path) -> None:
    """How many importances there are, and which tensors have none."""
    unmet = _facts(matrix, of, out)["experts_unmet"]
    seen = f"{out}: {matrix.chunks:,} of {of:,} windows, {len(matrix.entries):,} matrices"
    note(f"{seen}; {unmet:,} experts met nothing: give a longer text" if unmet else seen)
