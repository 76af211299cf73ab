"""``gemloom bench``: how fast a model is here. What is measured is in ``gemloom.bench``."""

from typing import Annotated

import typer

from gemloom.cli.opening import default_model, open_model
from gemloom.cli.options import LoadOptions, with_options
from gemloom.cli.terminal import note, print_json, render

_Counts = list[int]


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

    from gemloom import bench as measure

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
        render(measure.render(report))
