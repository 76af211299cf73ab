"""``gemloom adapter``: look into LoRA adapters, convert, merge and extract them."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemloom.cli.load import adapter_file, open_file
from gemloom.cli.output import Force, check_folder, output
from gemloom.cli.terminal import bar, note, one_line, print_json, render, size, table
from gemloom.errors import AdapterError, OptionError

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

    from gemloom.adapters.checking import Report
    from gemloom.adapters.factors import Lora
    from gemloom.tools.adapters.base_shapes import Base
    from gemloom.tools.adapters.extracting import Extracted
    from gemloom.tools.adapters.merging import Merged

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Adapter = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER", help="A GGUF LoRA, a PEFT folder or an archive of one, hf:owner/repo."
    ),
]


def inspect(
    file: _Adapter,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="The base it has to fit.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Show what an adapter changes, and whether it fits a model.

    \b
    Examples:
      gemloom adapter inspect style.gguf
      gemloom adapter inspect checkpoint-500/ --model gemma.gguf
      gemloom adapter inspect hf:owner/repo --model gemma.gguf --json
    """
    from gemloom.adapters.checking import check, measure
    from gemloom.adapters.reading import read

    lora = read(file)
    base = _base(model) if model is not None else None
    report = check(lora, base.config, base.shapes) if base else measure(lora)
    if as_json:
        print_json(_facts(lora, report, model))
    else:
        _show(lora, report, model)


def convert(
    source: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="As for gemloom adapter inspect.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="NAME.gguf for a GGUF LoRA, else a PEFT folder.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="The base it has to fit.")
    ] = None,
    multimodal: Annotated[
        bool | None,
        typer.Option(
            "--multimodal/--text",
            help="PEFT: names of the ...ForConditionalGeneration class, or of ...ForCausalLM. "
            "[default: the first for Gemma 4, the second for Gemma 3]",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Turn a PEFT adapter into a GGUF LoRA, or back.

    \b
    Examples:
      gemloom adapter convert checkpoint-500/ style.gguf --model gemma.gguf
      gemloom adapter convert style.gguf style-peft/
    """
    from gemloom.adapters.gguf_lora import write_gguf

    if out.suffix == ".gguf" or out.is_fifo() or out.is_char_device():
        with output(out, source, model, force=force) as target:
            lora, architecture = _read_for(source, model)
            write_gguf(lora, architecture, target)
    else:
        used = check_folder(out, force=force)
        lora, architecture = _read_for(source, model)
        _write_folder(
            lora, out, architecture == "gemma4" if multimodal is None else multimodal, used
        )
    note(f"{out}: {len(lora.pairs):,} matrices")


def _read_for(source: str, model: str | None) -> tuple["Lora", str]:
    """An adapter, and the architecture that it is for; told what of it is not used."""
    from gemloom.adapters.reading import read

    lora = read(source)
    architecture = _architecture(lora, model)
    _note_ignored(lora.ignored)
    return lora, architecture


def _write_folder(lora: "Lora", out: Path, multimodal: bool, used: bool) -> None:
    """Write a PEFT folder; of one that is in ``use`` only the adapter's own files are replaced."""
    from gemloom.tools.adapters.peft_writing import write_peft

    if not used:
        write_peft(lora, out, multimodal=multimodal)
        return
    with tempfile.TemporaryDirectory(prefix=".gemloom-", dir=out) as folder:
        made = Path(folder, "made")
        write_peft(lora, made, multimodal=multimodal)
        for file in made.iterdir():
            file.replace(out / file.name)


def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The base, which is only read.")],
    files: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[@SCALE]... OUT", help="Adapters; the file to write."),
    ],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type", help="The matrices' type: F16, Q8_0, Q4_K ... [default: as they are]"
        ),
    ] = None,
    force: Force = False,
    as_json: _Json = False,
) -> None:
    """Write a new model: the base with adapters added for good.

    \b
    Examples:
      gemloom adapter merge gemma.gguf style.gguf merged.gguf
      gemloom adapter merge gemma.gguf a.gguf@0.7 b.gguf@0.3 merged.gguf --type Q8_0
    """
    from gemloom.adapters.reading import read
    from gemloom.tools.adapters import merging

    if len(files) < 2:
        raise OptionError("merge takes a model, one adapter or more, and the file to write")
    wanted = _type(kind)
    named, out = [adapter_file(name) for name in files[:-1]], Path(files[-1])
    with output(out, model, *(name for name, _ in named), force=force) as target:
        adapters = [(read(name), scale) for name, scale in named]
        base = _base(model)
        with bar("merging", _bytes(base)) as show:
            merged = merging.merge(base, adapters, target, wanted, _adding(show))
        _report_merged(merged, out, as_json)


def _report_merged(merged: "Merged", out: Path, as_json: bool) -> None:
    if as_json:
        kinds = {name: kind.name for name, kind in merged.kinds.items()}
        print_json(
            {"file": str(out), "bytes": merged.nbytes, "changed": merged.changed, "types": kinds}
        )
    else:
        note(f"{out}: {len(merged.changed):,} tensors changed; {size(merged.nbytes)}")


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model before.")],
    tuned: Annotated[str, typer.Argument(metavar="MODEL", help="The model after.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The GGUF LoRA to write.")],
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of the change of each matrix.")],
    *,
    force: Force = False,
    as_json: _Json = False,
) -> None:
    """Make an adapter of what two models differ in.

    \b
    Examples:
      gemloom adapter extract gemma.gguf tuned.gguf style.gguf --rank 16
    """
    from gemloom.adapters.gguf_lora import write_gguf
    from gemloom.tools.adapters import extracting

    with output(out, base, tuned, force=force) as target:
        before, after = _base(base), _base(tuned)
        with bar("extracting", _bytes(before)) as show:
            found = extracting.extract(before, after, rank, _adding(show))
        write_gguf(found.lora, before.config.architecture, target)
        _report_extracted(found, out, as_json)


def _report_extracted(found: "Extracted", out: Path, as_json: bool) -> None:
    if as_json:
        matrices = [asdict(kept) | {"share": kept.share} for kept in found.matrices]
        print_json(
            {"file": str(out), "share": found.share, "matrices": matrices, "left": found.left}
        )
        return
    rows = table("matrix", ">rank", ">norm", ">kept")
    for kept in found.matrices:
        rows.add_row(kept.tensor, str(kept.rank), f"{kept.norm:.4g}", f"{kept.share:.1%}")
    rows.add_row("all", "", f"{found.norm:.4g}", f"{found.share:.1%}")
    render(rows)
    for name in found.left:
        note(f"{name} differs too, and is not a matrix: it stays as in the base")


COMMANDS = (inspect, convert, merge, extract)


# -- what they have in common ------------------------------------------------------------


def _base(name: str) -> "Base":
    from gemloom.tools.adapters.base_shapes import open_base

    return open_base(open_file(name))


def _bytes(base: "Base") -> int:
    return sum(info.nbytes for info in base.file.tensors.values())


def _type(name: str | None) -> "GGMLQuantizationType | None":
    from gguf.constants import GGMLQuantizationType

    if name is None:
        return None
    if name.upper() not in GGMLQuantizationType.__members__:
        raise OptionError(f"--type {name} is not a type of ggml; Q8_0, Q4_K and F16 are")
    return GGMLQuantizationType[name.upper()]


def _architecture(lora: "Lora", model: str | None) -> str:
    from gemloom.adapters.checking import check

    if model is not None:
        base = _base(model)
        check(lora, base.config, base.shapes)
        return base.config.architecture
    if lora.architecture is None:
        raise AdapterError(f"{lora.name}: does not tell its base; name it with --model")
    return lora.architecture


def _adding(show: Callable[[int], None]) -> Callable[[int], None]:
    """A function that adds up what a bar is to be told."""
    total = 0

    def advance(count: int) -> None:
        nonlocal total
        total += count
        show(total)

    return advance


def _note_ignored(ignored: Any) -> None:
    for name, why in ignored.items():
        note(f"ignored: {name}: {why}")


def _facts(lora: "Lora", report: "Report", model: str | None) -> dict[str, Any]:
    return {
        "adapter": lora.name,
        "architecture": lora.architecture,
        "model": model,
        "invocation_tokens": lora.invocation,
        "parameters": report.parameters,
        "norm": report.norm,
        "matched": [asdict(match) for match in report.matched],
        "ignored": report.ignored,
    }


def _show(lora: "Lora", report: "Report", model: str | None) -> None:
    rows = table("matrix", ">shape", ">rank", ">scale", ">norm")
    for match in report.matched:
        target = "" if match.tensor == match.name else f" (in {match.tensor})"
        shape = " x ".join(map(str, match.shape))
        name = one_line(f"{match.name}{target}")
        rows.add_row(name, shape, str(match.rank), f"{match.scale:.4g}", f"{match.norm:.4g}")
    render(rows)
    _note_ignored(report.ignored)
    if lora.invocation:
        note(f"an aLoRA: acts from the tokens {list(lora.invocation)} on")
    fits = f"fits {model}" if model is not None else "no --model to hold it against"
    note(
        f"{len(report.matched):,} matrices, {report.parameters:,} values, norm {report.norm:.4g}; "
        f"for {lora.architecture or 'an architecture it does not tell'}; {fits}"
    )
