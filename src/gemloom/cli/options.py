"""The options that several commands share, each group in one dataclass.

A command takes a group as one parameter and is decorated with ``with_options``; the command line
then has an option for every field. What a value may be is checked where it is used
(``options.Options``, ``sampling.SamplingParams``), not here.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gemloom.cli.terminal import utf8
from gemloom.errors import OptionError

# Headings of --help, below the options that are used most.
_SAMPLING, _DEVICES, _MEMORY, _SPEED = "Sampling", "Devices", "Memory", "Speed"


def _option(
    *names: str, help: str, default: str = "", panel: str | None = None, **more: Any
) -> Any:
    """``default`` is that of the library, told in the help: here None leaves it as it is."""
    text = f"{help} [default: {default}]" if default else help
    return typer.Option(*names, help=text, show_default=False, rich_help_panel=panel, **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The fields of ``options.Options`` that a command line sets; None leaves one as it is."""

    context: Annotated[
        int | None,
        _option(
            "--context",
            "-c",
            help="Most tokens of prompt and answer together.",
            default="8192, or what the model was made for",
        ),
    ] = None
    key_file: Annotated[
        Path | None,
        _option(metavar="FILE", help="The key of a sealed model.", default="GEMLOOM_KEY holds it"),
    ] = None

    device: Annotated[
        str | None,
        _option(
            metavar="NAME[,NAME]",
            panel=_DEVICES,
            help="Where to compute: auto (every GPU), cpu, or devices as gemloom doctor lists "
            "them, preferred first.",
            default="auto",
        ),
    ] = None
    gpu_layers: Annotated[
        int | None,
        _option(
            panel=_DEVICES,
            help="How many layers go to devices, counted from the last.",
            default="all that fit",
        ),
    ] = None
    tensor_split: Annotated[
        str | None,
        _option(
            metavar="N,N",
            panel=_DEVICES,
            help="How devices share the layers, as 3,1.",
            default="by their free memory",
        ),
    ] = None
    threads: Annotated[
        int | None,
        _option("--threads", "-t", panel=_DEVICES, help="CPU threads.", default="one a core"),
    ] = None

    kv_type: Annotated[
        str | None,
        _option(
            panel=_MEMORY,
            help="Type of the K/V cells: f32, f16, or q8_0, which takes about half of f16.",
            default="f16",
        ),
    ] = None
    keep: Annotated[
        int | None,
        _option(
            panel=_MEMORY,
            help="When the context is full, keep this many first tokens, drop the older half of "
            "the rest and go on.",
            default="end the answer there",
        ),
    ] = None
    mmap: Annotated[
        bool | None,
        _option(
            "--mmap/--no-mmap",
            panel=_MEMORY,
            help="Use the file's bytes in place, or copy them.",
            default="in place",
        ),
    ] = None

    chunk: Annotated[
        int | None,
        _option(panel=_SPEED, help="Prompt tokens computed in one step.", default="512"),
    ] = None
    kernels: Annotated[
        str | None,
        _option(
            panel=_SPEED,
            help="Code for matrix products: auto (ours where there is any), ggml (its fastest), "
            "plain (its simplest).",
            default="auto",
        ),
    ] = None
    packed: Annotated[
        str | None,
        _option(
            panel=_SPEED,
            help="Weights packed for our kernels: auto reads them from MODEL.packed if it exists, "
            "keep also writes that file to start faster next time, off does neither.",
            default="auto",
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that were set, as ``options.Options`` takes them. OptionError for shares."""
        given = _given(self)
        if device := given.get("device"):
            given["device"] = [name.strip() for name in device.split(",")]
        if kv_type := given.get("kv_type"):
            given["kv_type"] = kv_type.lower()
        if shares := given.get("tensor_split"):
            given["tensor_split"] = _shares(shares)
        return given


def _shares(text: str) -> list[float]:
    try:
        return [float(share) for share in text.split(",")]
    except ValueError:
        raise OptionError(f"--tensor-split {text!r} is not N,N, as in 3,1") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ManyOptions(LoadOptions):
    """As LoadOptions, for a model that many use at once; ``slots`` is 4 where it is not set."""

    slots: Annotated[
        int | None,
        _option(help="Requests answered at the same time, each with its context.", default="4"),
    ] = None
    queue: Annotated[
        int | None,
        _option(panel=_SPEED, help="Requests that may wait; more are refused.", default="64"),
    ] = None
    budget: Annotated[
        int | None,
        _option(
            panel=_SPEED,
            help="As --chunk, while other requests are being answered.",
            default="128",
        ),
    ] = None
    snapshots: Annotated[
        int | None,
        _option(
            metavar="MIB",
            panel=_MEMORY,
            help="Memory for resuming at earlier turns of a chat without computing them again.",
            default="128",
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that were set, and slots, as ``options.Options`` takes them."""
        return {"slots": 4, **LoadOptions.given(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOptions:
    """The adapters of every request of one command."""

    adapter: Annotated[
        list[str] | None,
        _option(metavar="PATH[@SCALE]", help="A LoRA adapter to use; repeatable."),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """The fields of ``SamplingParams`` that a command line sets; None leaves one as it is."""

    max_tokens: Annotated[
        int | None,
        _option(
            "--max-tokens", "-n", help="Most tokens to generate.", default="what the context holds"
        ),
    ] = None
    temperature: Annotated[
        float | None, _option(help="0 takes the likeliest token every time.", default="1.0")
    ] = None
    seed: Annotated[
        int | None, _option(help="The same seed gives the same text.", default="random")
    ] = None
    stop: Annotated[
        list[str] | None, _option(metavar="TEXT", help="End before this text; repeatable.")
    ] = None

    top_k: Annotated[
        int | None,
        _option(panel=_SAMPLING, help="Pick among the k likeliest; 0: all.", default="64"),
    ] = None
    top_p: Annotated[
        float | None,
        _option(panel=_SAMPLING, help="Pick among the likeliest that sum to p.", default="0.95"),
    ] = None
    min_p: Annotated[
        float | None,
        _option(
            panel=_SAMPLING,
            help="Pick among those at least p times as likely as the likeliest.",
            default="0.0",
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        _option(
            panel=_SAMPLING,
            help="Makes tokens of prompt and answer less likely; 1: off.",
            default="1.0",
        ),
    ] = None
    presence_penalty: Annotated[
        float | None,
        _option(
            panel=_SAMPLING,
            help="Subtracted from the logits of tokens in the answer.",
            default="0.0",
        ),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        _option(panel=_SAMPLING, help="The same, once for each time they occur.", default="0.0"),
    ] = None
    repetition_limit: Annotated[
        int | None,
        _option(
            panel=_SAMPLING,
            help="End an answer that repeats one piece for this many tokens; 0: never.",
            default="1024",
        ),
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        _option(
            metavar="ID=BIAS", panel=_SAMPLING, help="Added to the logit of a token; repeatable."
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that were set, as ``SamplingParams`` takes them. OptionError for a bias."""
        given = _given(self)
        if biases := given.pop("logit_bias", None):
            given["logit_bias"] = dict(map(_bias, biases))
        for text in self.stop or ():
            utf8("--stop", text)
        return given


def _given(group: LoadOptions | SamplingOptions) -> dict[str, Any]:
    values = {option.name: getattr(group, option.name) for option in fields(group)}
    values.pop("key_file", None)  # opens the source, and is no option of the model
    return {name: value for name, value in values.items() if value is not None}


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise OptionError(f"--logit-bias {text!r} is not ID=BIAS, as in 107=-5") from None


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with each parameter that is a group of options spread into its options."""
    own = list(inspect.signature(command).parameters.values())
    groups: dict[str, Any] = {p.name: p.annotation for p in own if is_dataclass(p.annotation)}
    shared = [_parameter(option) for group in groups.values() for option in fields(group)]
    alone = [p for p in own if p.name not in groups]
    given = [p for p in alone if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    parameters = given + shared + [p for p in alone if p not in given]

    def spread(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{item.name: values.pop(item.name) for item in fields(group)})
        command(**values)

    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {p.name: p.annotation for p in parameters}
    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    return spread


def _parameter(option: "Field[Any]") -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    default = inspect.Parameter.empty if option.default is MISSING else option.default
    return inspect.Parameter(option.name, kind, default=default, annotation=option.type)
