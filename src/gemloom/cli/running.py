"""``gemloom run``: complete one prompt, streamed."""

import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemloom.cli.options import LoadOptions, SamplingOptions, with_options
from gemloom.errors import OptionError

if TYPE_CHECKING:
    from gemloom.generation import Completion, Run, Usage
    from gemloom.model import Model


@with_options
def run(
    first: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Path, hf:owner/repo or built-in name.")
    ] = None,
    second: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text; - reads it from stdin.")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    special: Annotated[
        bool, typer.Option("--special", help="Read strings like <start_of_turn> as tokens.")
    ] = False,
    load: LoadOptions,
    sampling: SamplingOptions,
) -> None:
    """Complete a prompt; the text comes as it is made.

    A single argument is the MODEL if it is hf:..., a built-in name, ends in .gguf or exists as a
    file; else it is the PROMPT, for the built-in model. Without a PROMPT it is read from stdin,
    less one newline at its end. The prompt goes to the model as it is, with no chat template;
    gemloom chat is for conversations.

    Examples:

      gemloom run "The capital of France is" -n 20

      gemloom run gemma.gguf "Once upon a time" --temperature 0

      gemloom run hf:owner/repo:Q4_K_M --json < prompt.txt
    """
    from gemloom.sampling import from_options

    model_name, prompt = _model_and_prompt(first, second)
    params = sampling.given()
    from_options(params)  # a wrong option is an error before the model has been loaded
    with open_model(model_name, load) as model:
        request = model.stream(_ids(model, prompt) if special else prompt, **params)
        if as_json:
            _print_json(request.completion())
        else:
            _print_text(request)
