"""The options that several commands share, each group in one dataclass.

A command takes a group as one parameter and is decorated with ``with_options``; the command line
then has an option for every field. What a value may be is checked where it is used
(``model.Options``, ``sampling.SamplingParams``), not here.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any

import typer

from gemloom.errors import OptionError


def _load(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Loading", **more)


def _sampling(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Sampling", **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The fields of ``model.Options`` that a command line sets; None leaves one as it is."""

    context: Annotated[
        int | None,
        _load("--context", "-c", help="Positions.", show_default="8192, or what the model can"),
    ] = None
    kv_type: Annotated[
        str | None, _load(help="Type of the K/V cells: f32, f16, q8_0.", show_default="f16")
    ] = None
    chunk: Annotated[
        int | None, _load(help="Most prompt tokens in one step.", show_default="512")
    ] = None
    keep: Annotated[
        int | None,
        _load(help="When the context is full, go on, with so many first tokens kept."),
    ] = None
    threads: Annotated[
        int | None, _load("--threads", "-t", help="Threads.", show_default="one a usable core")
    ] = None
    device: Annotated[str | None, _load(help="auto or cpu.", show_default="auto")] = None
    mmap: Annotated[
        bool, _load(" /--no-mmap", help="Copy the weights and do not map the file.")
    ] = True

    def given(self) -> dict[str, Any]:
        """The options that were set, as ``model.Options`` takes them."""
        return _given(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """The fields of ``SamplingParams`` that a command line sets; None leaves one as it is."""

    max_tokens: Annotated[
        int | None,
        _sampling("--max-tokens", "-n", help="Stop after so many.", show_default="context full"),
    ] = None
    temperature: Annotated[
        float | None, _sampling(help="0: always the likeliest token.", show_default="1.0")
    ] = None
    top_k: Annotated[
        int | None, _sampling(help="Only the k likeliest; 0: all.", show_default="64")
    ] = None
    top_p: Annotated[
        float | None,
        _sampling(help="Only the likeliest that make up p together.", show_default="0.95"),
    ] = None
    min_p: Annotated[
        float | None,
        _sampling(help="Only those p times as likely as the first.", show_default="0.0"),
    ] = None
    repetition_penalty: Annotated[
        float | None, _sampling(help="Over prompt and answer; 1: off.", show_default="1.0")
    ] = None
    presence_penalty: Annotated[
        float | None, _sampling(help="For tokens in the answer.", show_default="0.0")
    ] = None
    frequency_penalty: Annotated[
        float | None, _sampling(help="The same, times their count.", show_default="0.0")
    ] = None
    seed: Annotated[
        int | None, _sampling(help="Same seed, same text.", show_default="random")
    ] = None
    stop: Annotated[
        list[str] | None, _sampling(help="Stop before this text; may be repeated.")
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        _sampling(metavar="ID=BIAS", help="Added to a token's logit; may be repeated."),
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that were set, as ``SamplingParams`` takes them. OptionError for a bias."""
        given = _given(self)
        if biases := given.pop("logit_bias", None):
            given["logit_bias"] = dict(map(_bias, biases))
        return given


def _given(group: LoadOptions | SamplingOptions) -> dict[str, Any]:
    values = {option.name: getattr(group, option.name) for option in fields(group)}
    return {name: value for name, value in values.items() if value is not None}


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise OptionError(f"--logit-bias {text!r} is not ID=BIAS, as in 236789=-5") from None


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every parameter whose type is a group of options spread into its options."""
    groups = {
        name: parameter.annotation
        for name, parameter in inspect.signature(command).parameters.items()
        if parameter.annotation in (LoadOptions, SamplingOptions)
    }

    def spread(**values: Any) -> None:
        for name, group in groups.items():
            own = {option.name: values.pop(option.name) for option in fields(group)}
            values[name] = group(**own)
        command(**values)

    own = [p for n, p in inspect.signature(command).parameters.items() if n not in groups]
    shared = [_parameter(option) for group in groups.values() for option in fields(group)]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own + shared]
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {p.name: p.annotation for p in parameters}
    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    return spread


def _parameter(option: "Field[Any]") -> inspect.Parameter:
    assert option.default is not MISSING
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.type
    )
