"""``gemloom inspect`` and ``gemloom tokenize``: look into a model file; no weight is read."""

from typing import TYPE_CHECKING, Annotated

import typer

from gemloom.cli.opening import open_file
from gemloom.cli.terminal import print_json, read_stdin, render, table, waiting

if TYPE_CHECKING:
    from gemloom.tokenizer import Tokenizer

_Model = Annotated[str, typer.Argument(help="A file, hf:owner/repo, a built-in name.")]


def inspect(
    model: _Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    context: Annotated[
        int | None, typer.Option("--context", "-c", help="Plan the memory for so many tokens.")
    ] = None,
    kv_type: Annotated[str, typer.Option(help="K/V cells of this type: f32, f16, q8_0.")] = "f16",
) -> None:
    """Tell what is in a model file, and what memory it will take.

    \b
    Examples:
      gemloom inspect gemma.gguf
      gemloom inspect gemma.gguf --context 32768 --kv-type q8_0
      gemloom inspect hf:owner/repo:Q4_K_M --json --tensors
    """
    from gemloom.cli.report import describe, tables
    from gemloom.options import Options

    options = Options(context=context, kv_type=kv_type)
    facts = describe(open_file(model), options, list_tensors=tensors)
    if as_json:
        print_json(facts)
        return
    for part in tables(facts):
        render(part)


def tokenize(
    model: _Model,
    text: Annotated[str, typer.Argument(help="The text; - reads it from stdin.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    special: Annotated[
        bool, typer.Option("--special", help="Read <start_of_turn> and such as tokens.")
    ] = False,
    bos: Annotated[bool, typer.Option("--bos", help="Put the BOS token first.")] = False,
) -> None:
    """Show the tokens of a text.

    \b
    Examples:
      gemloom tokenize gemma.gguf "Hello, world"
      gemloom tokenize gemma.gguf --special --bos "<start_of_turn>user"
      gemloom tokenize gemma.gguf - --json < page.txt
    """
    from gemloom.tokenizer import Tokenizer

    text = read_stdin() if text == "-" else text
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
