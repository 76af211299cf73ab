"""``gemloom convert``: a checkpoint as a GGUF. The work is done by ``gemloom.tools.convert``."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemloom.cli.output import Force, output
from gemloom.cli.terminal import bar, note, print_json, size, waiting
from gemloom.errors import OptionError

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

    from gemloom.tools.convert import Conversion


def convert(
    source: Annotated[
        str, typer.Argument(metavar="DIR", help="The folder of a Hugging Face checkpoint.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The GGUF to make.")],
    *,
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            "-t",
            metavar="NAME",
            help="F32, F16, BF16 or Q8_0. [default: as the checkpoint has it]",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a GGUF of a Gemma 3 or 4 checkpoint, of its text model.

    If it is stopped, the same command goes on where it was. The assistants of
    Gemma 4 are made too, as drafters for programs that decode speculatively;
    Gemloom does not, and has no use for one.

    \b
    Examples:
      gemloom convert gemma-3-270m gemma.gguf
      gemloom convert gemma-4-E2B-it gemma-q8.gguf --type Q8_0
      gemloom convert gemma-4-E2B-it-assistant drafter.gguf
    """
    from gemloom.tools import convert as work

    with output(target, force=force) as out:
        with waiting(f"reading {source}"):
            plan = work.plan(source, _type(kind))
        for text in plan.notes:
            note(text)
        started = time.monotonic()
        with bar(f"writing {target.name}", plan.source_bytes) as progress:
            made = work.write(plan, out, force=force, progress=progress)
        _report(replace(made, path=str(target)), time.monotonic() - started, as_json)


def _report(made: "Conversion", seconds: float, as_json: bool) -> None:
    if as_json:
        print_json({**made.json(), "seconds": round(seconds, 3)})
        return
    if made.resumed:
        note(f"went on with an earlier run: {made.resumed:,} tensors were there")
    types = ", ".join(f"{count:,} {name}" for name, count in sorted(made.types.items()))
    note(f"{made.path}: {made.architecture}, {types}; {size(made.bytes)} in {seconds:.1f} s")


def _type(name: str | None) -> "GGMLQuantizationType | None":
    from gguf.constants import GGMLQuantizationType

    from gemloom.tools.convert.plan import FILE_TYPES

    if name is None:
        return None
    kind = GGMLQuantizationType.__members__.get(name.upper())
    if kind not in FILE_TYPES:
        known = ", ".join(kind.name for kind in FILE_TYPES)
        raise OptionError(f"--type {name!r} is none of {known}; gemloom quantize makes the others")
    return kind
