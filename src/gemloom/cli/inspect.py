"""``gemloom inspect`` and ``gemloom tokenize``: look into a model file.

No weight is read but for a checksum or a comparison.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from gemloom.cli.load import default_model, model_and_text, open_file
from gemloom.cli.options import with_options
from gemloom.cli.terminal import bar, print_json, render, show, table, waiting
from gemloom.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rich.table import Table

    from gemloom.cli.report import Facts
    from gemloom.text.tokenizer import Tokenizer

_A_MODEL = "A file, a URL, hf:owner/repo, a built-in name."
_PIECE = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOptions:
    """What is told of a model file."""

    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False
    context: Annotated[
        int | None, typer.Option("--context", "-c", help="Plan the memory for this many tokens.")
    ] = None
    kv_type: Annotated[str, typer.Option(help="K/V cells of this type: f32, f16, q8_0.")] = "f16"
    checksum: Annotated[bool, typer.Option("--checksum", help="Add the SHA-256 of the file.")] = (
        False
    )
    template: Annotated[
        bool, typer.Option("--template", help="Print the chat template and nothing else.")
    ] = False
    diff: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="Show how another file differs, and nothing else."),
    ] = None


@with_options
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=_A_MODEL,
            default_factory=default_model,
            show_default="the built-in one",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    *,
    what: InspectOptions,
) -> None:
    """Show what is in a model file, and how much memory it needs.

    \b
    Examples:
      gemloom inspect gemma.gguf
      gemloom inspect gemma.gguf --context 32768 --kv-type q8_0
      gemloom inspect hf:owner/repo:Q4_K_M --json --tensors
      gemloom inspect gemma.gguf --checksum
      gemloom inspect gemma-f16.gguf --diff gemma-q4.gguf
    """
    if what.template + (what.diff is not None) + (what.tensors or what.checksum) > 1:
        raise OptionError("--template and --diff go with neither each other nor other listings")
    if what.template:
        _print_template(model, as_json)
    elif what.diff is not None:
        _print_diff(model, what.diff, as_json)
    else:
        _print_facts(model, what, as_json)


def _print_facts(model: str, what: InspectOptions, as_json: bool) -> None:
    from gemloom.cli.report import describe, tables
    from gemloom.options import Options

    options = Options(context=what.context, kv_type=what.kv_type.lower())
    facts = describe(open_file(model), options, list_tensors=what.tensors)
    if what.checksum:
        facts["sha256"] = _checksums(model)
    _print(facts, as_json, tables)
    if what.checksum and not as_json:
        # As sha256sum has them, on lines of their own, which no table may fold.
        show("".join(f"\n{digest}  {name}" for name, digest in facts["sha256"].items()) + "\n")


def _print(facts: "Facts", as_json: bool, tables: "Callable[[Facts], Iterable[Table]]") -> None:
    if as_json:
        print_json(facts)
        return
    for part in tables(facts):
        render(part)


def _print_template(model: str, as_json: bool) -> None:
    from gemloom.text.template import named, usual

    metadata = open_file(model).metadata
    text = usual(named(metadata)) or metadata.string("tokenizer.chat_template")
    if as_json:
        print_json({"chat_template": text})
    else:
        show(text if text.endswith("\n") else f"{text}\n")


def _print_diff(model: str, other: str, as_json: bool) -> None:
    from gemloom.cli.differences import common_bytes, differences, tables

    files = open_file(model), open_file(other)
    with bar("comparing", common_bytes(*files)) as progress:
        facts = differences(*files, progress)
    _print(facts, as_json, tables)


def _checksums(model: str) -> dict[str, str]:
    """The SHA-256 of every file that a model is made of."""
    from gemloom.files import source

    blobs = source.resolve(model)
    sums, done = {}, 0
    with bar("SHA-256", sum(blob.size for blob in blobs)) as progress:
        for blob in blobs:
            digest = hashlib.sha256()
            for start in range(0, blob.size, _PIECE):
                digest.update(blob.view(start, min(_PIECE, blob.size - start)))
                progress(done := done + min(_PIECE, blob.size - start))
            sums[blob.name] = digest.hexdigest()
    return sums


def tokenize(
    first: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=_A_MODEL, show_default=False)
    ] = None,
    second: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help="The text; - reads it from stdin.", show_default=False),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    special: Annotated[
        bool, typer.Option("--special", help="Read <start_of_turn> and such as tokens.")
    ] = False,
    bos: Annotated[bool, typer.Option("--bos", help="Put the BOS token first.")] = False,
) -> None:
    """Show the tokens of a text.

    A single argument is the TEXT, for the built-in model, unless it names a
    model; then the text is read from stdin.

    \b
    Examples:
      gemloom tokenize gemma.gguf "Hello, world"
      gemloom tokenize gemma.gguf --special --bos "<start_of_turn>user"
      gemloom tokenize gemma.gguf - --json < page.txt
    """
    from gemloom.text.tokenizer import Tokenizer

    if first is None:
        raise OptionError('no text; give one, as in: gemloom tokenize "Hello, world"')
    model, text = model_and_text(first, second)
    file = open_file(model)
    with waiting(f"reading the vocabulary of {model}"):
        tokenizer = Tokenizer(file.metadata)
    ids = tokenizer.encode(text, special)
    ids = tokenizer.with_bos(ids) if bos else ids
    pieces = [_piece(tokenizer, token) for token in ids]
    if as_json:
        print_json({"ids": ids, "pieces": pieces})
        return
    rows = table(">id", "piece")
    for token, piece in zip(ids, pieces, strict=True):
        rows.add_row(str(token), repr(piece))
    render(rows)


def _piece(tokenizer: "Tokenizer", token: int) -> str:
    """The text of one token, or <0xE4> for bytes that are no text alone."""
    data = tokenizer.token(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in data)
