"""``gemloom bench``: how fast a model is here. What is measured is in ``gemloom.tools.bench``."""

from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from gemloom.cli.load import default_model, open_model
from gemloom.cli.options import LoadOptions, with_options
from gemloom.cli.terminal import note, one_line, print_json, render, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from gemloom.tools.bench import BenchReport, Timing

_Counts = list[int]
_BESIDE = 3  # tests that fit beside each other in a narrow terminal


@with_options
def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A file, a URL, hf:owner/repo, a built-in name.",
            default_factory=default_model,
            show_default="the built-in one",
        ),
    ],
    *,
    prompt: Annotated[
        _Counts, typer.Option("--prompt", "-p", help="Tokens of a prompt; repeatable.")
    ] = [512],  # noqa: B006  (typer copies it)
    generate: Annotated[
        _Counts, typer.Option("--generate", "-n", help="Tokens to decode; repeatable; 0: none.")
    ] = [64],  # noqa: B006
    depth: Annotated[
        _Counts, typer.Option("--depth", "-d", help="Positions before them; repeatable.")
    ] = [0],  # noqa: B006
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", help="How often each is measured.")
    ] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    load: LoadOptions,
) -> None:
    """Measure how fast a model is here, and where the time goes.

    \b
    Examples:
      gemloom bench gemma.gguf
      gemloom bench gemma.gguf -p 128 -p 2048 -d 0 -d 4096 -r 7
      gemloom bench gemma.gguf --threads 1 --kernels ggml --json
    """
    from dataclasses import replace

    from gemloom.tools import bench as measure

    generate = [count for count in generate if count]

    if load.context is None:
        load = replace(load, context=measure.context_for(prompt, generate, depth))
    with open_model(model, load) as opened:
        report = measure.bench(
            opened,
            prompt,
            generate,
            depth,
            repetitions,
            lambda timing: note(f"{measure.label(timing)}: {timing.speed:.2f} tokens/s"),
        )
    if as_json:
        print_json(report.json())
    else:
        for part in tables(report):
            render(part)


def tables(report: "BenchReport") -> "Iterator[Table]":
    """The report as rich tables."""
    about = table("", "")
    about.show_header = False
    for label, value in _lines(report):
        about.add_row(label, one_line(value))
    yield about
    yield _speed_table(report.timings)
    for start in range(0, len(report.timings), _BESIDE):
        yield _phase_table(report.timings[start : start + _BESIDE])
    memory = table("\nmemory", ">\nMiB")
    for name, size in report.memory.items():
        memory.add_row(name, f"{size / 2**20:,.1f}")
    yield memory


def _lines(report: "BenchReport") -> "Iterator[tuple[str, str]]":
    machine = report.machine
    yield "model", report.model
    yield "architecture", report.architecture
    yield "context", f"{report.context:,}, chunks of {report.chunk}, {report.kv_type} K/V"
    yield "processor", f"{machine.processor}, {machine.threads} threads"
    yield "ggml", f"{machine.ggml}, {' + '.join(machine.backends)}"
    yield "kernels", ", ".join(machine.kernels)
    if machine.fallbacks:
        lacking = ", ".join(f"{op} ({n})" for op, n in machine.fallbacks.items())
        yield "not on the device, so on the CPU", lacking


def _speed_table(timings: "Sequence[Timing]") -> "Table":
    from gemloom.tools.bench import label

    made = table("\ntest", ">\ntokens/s", ">\nmin", ">\nmax", ">outside\nggml")
    for timing in timings:
        speeds = median(timing.speeds), min(timing.speeds), max(timing.speeds)
        made.add_row(
            label(timing), *(f"{speed:,.2f}" for speed in speeds), f"{timing.python_share:.1%}"
        )
    return made


def _phase_table(timings: "Sequence[Timing]") -> "Table":
    """Where the time of a few tests goes, a phase on a line."""
    from gemloom.tools.bench import PHASES, label

    made = table("\nmilliseconds", *(f">\n{label(timing)}" for timing in timings))
    made.caption = "of a whole prompt, or of one decoded token"
    made.caption_justify = "left"
    for name in PHASES:
        made.add_row(name, *(f"{timing.phases[name]:,.2f}" for timing in timings))
    return made
