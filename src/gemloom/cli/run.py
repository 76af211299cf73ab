"""``gemloom run``: complete one prompt, streamed."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gemloom.cli.load import load_adapters, model_and_text, open_model
from gemloom.cli.options import AdapterOptions, LoadOptions, SamplingOptions, with_options
from gemloom.cli.terminal import end_line, note, print_json, show, speed
from gemloom.errors import GemloomError

if TYPE_CHECKING:
    from gemloom.engine.generation import Completion, Run
    from gemloom.model import Model


@with_options
def run(
    first: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A file, a URL, hf:owner/repo, a built-in name."),
    ] = None,
    second: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text; - reads it from stdin.")
    ] = None,
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end.")
    ] = False,
    special: Annotated[
        bool, typer.Option("--special", help="Read <start_of_turn> and such as tokens.")
    ] = False,
    sampling: SamplingOptions,
    adapters: AdapterOptions,
    load: LoadOptions,
) -> None:
    """Complete a prompt; the text is shown as it is made.

    A single argument is the MODEL if it is a URL, begins with hf:, ends in .gguf,
    is the name of a built-in model or of a file that exists; else it is the
    PROMPT, for the built-in model. Without a PROMPT it is read from stdin, less one newline
    at its end. The model gets it as it is, without chat template; for
    questions and conversations there is gemloom chat.

    \b
    Examples:
      gemloom run "The eight planets of the Solar System are Mercury," -n 14
      gemloom run gemma.gguf "Once upon a time" --temperature 0
      gemloom run hf:owner/repo:Q4_K_M --json < prompt.txt
      gemloom run gemma.gguf "Once upon a time" --adapter style.gguf@0.5
    """
    from gemloom.sampling.params import from_options

    name, text = model_and_text(first, second)
    params = sampling.given()
    from_options(params)  # wrong ones are told before the model has been loaded
    with open_model(name, load) as model:
        params["adapters"] = load_adapters(model, adapters.adapter or [])
        request = model.stream(_special_ids(model, text) if special else text, **params)
        if as_json:
            _print_completion(request.completion())
        else:
            _print_stream(request)


def _special_ids(model: "Model", text: str) -> list[int]:
    return model.tokenizer.with_bos(model.tokenize(text, special=True)) if text else []


def _print_completion(done: "Completion") -> None:
    rates = {
        "prompt_tokens_per_second": done.usage.prompt_tokens_per_second,
        "tokens_per_second": done.usage.tokens_per_second,
    }
    print_json(
        {
            "text": done.text,
            "tokens": done.tokens,
            "finish_reason": done.finish_reason,
            "usage": asdict(done.usage) | rates,
        }
    )


def _print_stream(request: "Run") -> None:
    reason, text = None, ""
    try:
        for piece in request:
            show(piece.text)
            reason, text = piece.finish_reason, piece.text or text
    except GemloomError:
        end_line(text or "\n")  # its line is not to be glued to the text
        raise
    end_line(text)
    note(speed(request.usage, reason or "stop"))
