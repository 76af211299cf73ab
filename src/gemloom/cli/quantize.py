"""``gemloom quantize``: a model file in smaller types. The work: ``quantization/quantize.py``."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemloom.cli.load import open_file
from gemloom.cli.options import with_options
from gemloom.cli.output import Force, output
from gemloom.cli.terminal import bar, note, print_json, render, size, table
from gemloom.errors import OptionError

if TYPE_CHECKING:
    from rich.table import Table

    from gemloom.tools.quantization.quantize import Choice, QuantizationPlan, Wanted

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How a model file is made smaller."""

    kind: Annotated[
        str,
        typer.Option(
            "--type", "-t", metavar="NAME", help="Q4_K_M, Q8_0, ...; a wrong one shows all."
        ),
    ]
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="REGEX=TYPE",
            help="Matrices whose name matches the expression get this type, whatever the mix "
            "says; repeatable, the first that fits counts.",
        ),
    ] = None
    imatrix: Annotated[
        Path | None,
        typer.Option("--imatrix", help="An importance matrix, .gguf or .dat.", show_default=False),
    ] = None
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Accept a source that is already quantized.")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, and write nothing.")
    ] = False
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, max=512, help="Threads. [default: one a core]"),
    ] = None

    def wanted(self) -> "Wanted":
        """As ``quantization/quantize.py`` takes it. OptionError, what reading a matrix raises."""
        from gemloom.tools.quantization import imatrix_file
        from gemloom.tools.quantization.quantize import TensorRule, Wanted
        from gemloom.tools.quantization.recipes import recipe

        return Wanted(
            recipe(self.kind),
            [TensorRule.parse(rule) for rule in self.tensor_type or []],
            imatrix_file.read(self.imatrix) if self.imatrix else None,
            str(self.imatrix or ""),
            self.requantize,
        )


@with_options
def quantize(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A GGUF in F32, F16 or BF16: a file, hf:owner/repo.")
    ],
    target: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The file to make.", show_default=False)
    ] = None,
    force: Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    *,
    how: QuantizeOptions,
) -> None:
    """Make a model file smaller.

    \b
    Examples:
      gemloom quantize gemma-f16.gguf gemma-q4.gguf --type Q4_K_M
      gemloom quantize gemma-f16.gguf --type Q4_K_M --dry-run
      gemloom quantize gemma-f16.gguf small.gguf -t IQ3_M --imatrix imatrix.gguf
      gemloom quantize gemma-f16.gguf a.gguf -t Q4_0 --tensor-type attn_v=Q8_0
    """
    from gemloom.tools.quantization import quantize as work

    wanted = how.wanted()
    if how.dry_run:
        _report(_plan(source, wanted, how)[1], as_json)
    elif target is None:
        raise OptionError("OUT is missing: the file to make; or --dry-run")
    else:
        with output(target, source, how.imatrix, force=force) as out:
            plan, facts = _plan(source, wanted, how)
            started = time.monotonic()
            with bar(f"writing {target.name}", plan.source_bytes) as progress:
                work.write(plan, out, how.threads, progress)
            facts |= {"file": str(target), "seconds": round(time.monotonic() - started, 3)}
            _report(facts, as_json)


def _plan(source: str, wanted: "Wanted", how: QuantizeOptions) -> tuple["QuantizationPlan", Facts]:
    """What is to be made, its warnings told."""
    from gemloom.tools.quantization import quantize as work

    plan = work.plan(open_file(source), wanted)
    lacking = [plan.lacking] if how.dry_run and plan.lacking else []
    for warning in (*plan.warnings, *lacking):
        note(warning)
    return plan, _facts(plan, how.kind)


def _report(facts: Facts, as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    render(_parts_table(facts))
    if "file" in facts:
        note(f"{facts['file']}: {size(facts['bytes'])} in {facts['seconds']:.1f} s")


def _facts(plan: "QuantizationPlan", kind: str) -> Facts:
    from gemloom.tools.quantization.parts import PARTS, part

    groups = ((name, [c for c in plan.choices if part(c.info.name) == name]) for name in PARTS)
    tensors = [
        {"name": c.info.name, "shape": c.info.shape, "from": c.info.type.name, "to": c.type.name}
        for c in plan.choices
    ]
    return {
        "type": kind,
        **_sums(plan.choices),
        "parts": [{"part": name, **_sums(choices)} for name, choices in groups if choices],
        "warnings": plan.warnings,
        "lacking": plan.lacking,
        "tensors": tensors,
    }


def _sums(choices: "Sequence[Choice]") -> Facts:
    return {
        "count": len(choices),
        "weights": sum(prod(choice.info.shape) for choice in choices),
        "from": Counter(choice.info.type.name for choice in choices),
        "to": Counter(choice.type.name for choice in choices),
        "source_bytes": sum(choice.info.nbytes for choice in choices),
        "bytes": sum(choice.nbytes for choice in choices),
    }


def _parts_table(facts: Facts) -> "Table":
    made = table("part", ">tensors", "from", "to", ">before", ">after", ">bits")
    for part in [*facts["parts"], {**facts, "part": "all"}]:
        made.add_row(
            part["part"],
            f"{part['count']:,}",
            _types(part["from"]),
            _types(part["to"]),
            size(part["source_bytes"]),
            size(part["bytes"]),
            f"{8 * part['bytes'] / part['weights']:.2f}",
        )
    return made


def _types(counts: Facts) -> str:
    """Types, the commonest first."""
    return ", ".join(sorted(counts, key=lambda name: -counts[name]))
