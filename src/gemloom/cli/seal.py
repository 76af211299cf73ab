"""``gemloom seal`` and ``gemloom unseal``: model files encrypted, and plain again."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemloom.cli.output import Force, check_output, output
from gemloom.cli.progress import bar
from gemloom.cli.terminal import note, print_json, size
from gemloom.errors import OptionError

if TYPE_CHECKING:
    from gemloom.files.blob import Blob
    from gemloom.files.sealed import Key

_KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        metavar="FILE",
        show_default=False,
        help="A file that holds the key. [default: the key is in GEMLOOM_KEY]",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def seal(
    source: Annotated[
        str | None,
        typer.Argument(metavar="IN", help="A file, a URL, hf:owner/repo.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The sealed file.", show_default=False)
    ] = None,
    *,
    key_file: _KeyFile = None,
    new_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Make a key, and write it to a new file.", show_default=False
        ),
    ] = None,
    force: Force = False,
    as_json: _Json = False,
) -> None:
    """Encrypt a model file.

    Without the key nobody can use it, or alter it unnoticed. It is loaded as it
    is, by every command: with --key-file, or the key in GEMLOOM_KEY. Its plain
    bytes are in memory then, and never on the disk. A lost key cannot be
    replaced. docs/sealed.md has the format, and what it protects.

    \b
    Examples:
      gemloom seal --new-key gemma.key
      gemloom seal gemma.gguf gemma.gguf.sealed --key-file gemma.key
      gemloom seal gemma.gguf gemma.gguf.sealed --new-key gemma.key
      gemloom run gemma.gguf.sealed "Once upon a time" --key-file gemma.key
    """
    from gemloom.files import sealed

    if (source is None) != (out is None) or (source is None and new_key is None):
        raise OptionError("name IN and OUT, or --new-key FILE alone to make a key")
    if new_key is not None and key_file is not None:
        raise OptionError("--new-key makes the key; --key-file cannot name another")
    if out is not None:
        check_output(out, source, key_file, force=force)  # before a key is made for it
    plain = None if source is None else _plain(source)
    if new_key is None:
        key = _key(key_file)
    else:
        key = sealed.write_new_key(new_key)
        note(f"{new_key}: a new key; keep it apart from the model, it cannot be made again")
    if plain is not None and out is not None:
        with output(out, source, key_file, new_key, force=force) as target:
            _write(sealed.seal, plain, target, key)
            _report(target, out, as_json)


def unseal(
    source: Annotated[str, typer.Argument(metavar="IN", help="A sealed file, or its URL.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The plain file.")],
    *,
    key_file: _KeyFile = None,
    force: Force = False,
    as_json: _Json = False,
) -> None:
    """Decrypt a sealed file. Nothing is left under OUT unless all of it is as it was sealed.

    \b
    Examples:
      gemloom unseal gemma.gguf.sealed gemma.gguf --key-file gemma.key
      GEMLOOM_KEY=... gemloom unseal gemma.gguf.sealed gemma.gguf
    """
    from gemloom.files import sealed

    key = _key(key_file)
    with output(out, source, key_file, force=force) as target:
        _write(sealed.unseal, _plain(source), target, key)
        _report(target, out, as_json)


def _key(file: Path | None) -> "Key":
    from gemloom.files import sealed

    key = sealed.read_key(file)
    if key is None:
        raise OptionError(f"no key; give --key-file, or set {sealed.VARIABLE} to it")
    return key


def _plain(source: str) -> "Blob":
    """The one file that is named, as it lies there."""
    from gemloom.files.source import locate

    blobs = locate(source)
    if len(blobs) > 1:
        raise OptionError(f"{blobs[0].name}: {len(blobs)} files of a split model; merge them first")
    return blobs[0]


def _write(
    how: "Callable[[Blob, Path, Key, Callable[[int], None]], None]",
    blob: "Blob",
    out: Path,
    key: "Key",
) -> None:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count

    with bar(f"writing {out.name}", blob.size, lambda: done):
        how(blob, out, key, advance)


def _report(written: Path, out: Path, as_json: bool) -> None:
    nbytes = written.stat().st_size
    if as_json:
        print_json({"file": str(out), "bytes": nbytes})
    else:
        note(f"{out}: {size(nbytes)}")
