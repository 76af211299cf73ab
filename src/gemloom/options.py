"""How a model is loaded: the options, their ranges, and what they mean for a given model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from gemloom.config import Config
from gemloom.errors import OptionError

KV_TYPES = ("f32", "f16", "q8_0")
KERNELS = ("auto", "ggml", "plain")
PACKED = ("auto", "keep", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a model is loaded. OptionError for a value outside its range."""

    device: str = "auto"  # "auto" or "cpu"
    threads: int | None = None  # None: one a usable core
    context: int | None = None  # positions a sequence may fill; None: 8,192 or what the model can
    slots: int = 1  # sequences that may be under way at once, each with K/V cells of its own
    kv_type: str = "f16"  # of the K/V cells: "f32", "f16" or "q8_0"
    mmap: bool = True  # use the file's bytes in place; False copies them into memory
    queue: int = 64  # requests that may wait for a slot
    chunk: int = 512  # most rows of one prefill step
    budget: int = (
        128  # most rows of a step in which a request decodes: how long its stream may wait
    )
    snapshots: int = 128  # MiB for windows of K/V cells that chats may come back to; 0: none
    kernels: str = (
        "auto"  # our own where there are any; "ggml": its fastest; "plain": its plain ones
    )
    packed: str = (
        "auto"  # weights for our kernels: a file beside the model if there; "keep": make it
    )
    keep: int | None = None  # shift the context when it is full, keeping so many first tokens

    def __post_init__(self) -> None:
        for name, low, high in (
            ("threads", 1, 512), ("context", 1, 2**24), ("slots", 1, 256),
            ("queue", 1, 2**16), ("chunk", 1, 8192), ("budget", 1, 8192),
            ("snapshots", 0, 2**20), ("keep", 0, 2**24),
        ):  # fmt: skip
            value = getattr(self, name)
            optional = name in ("threads", "context", "keep")
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise OptionError(f"{name} must be an integer from {low} to {high}, is {value!r}")
        for name in ("mmap",):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, is {getattr(self, name)!r}")
        for name, known in (("kv_type", KV_TYPES), ("kernels", KERNELS), ("packed", PACKED)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise OptionError(f"{name} must be one of {', '.join(known)}, is {value!r}")
        if self.packed == "keep" and not (self.mmap and self.kernels == "auto"):
            raise OptionError('packed "keep" needs mmap and kernels "auto", which use what is kept')

    def context_for(self, config: Config) -> int:
        """Positions a sequence may fill in this model. OptionError where it cannot have so many."""
        trained = config.n_context
        context = self.context or min(8192, trained)
        if context > trained:
            raise OptionError(f"context {context:,} is more than the model's {trained:,}")
        if self.keep is not None and context - self.keep <= config.window:
            raise OptionError(
                f"keep {self.keep:,} leaves less than a window of {config.window:,} "
                f"in a context of {context:,} to shift"
            )
        return context


def from_options(options: Mapping[str, Any]) -> Options:
    """Options by name. OptionError for an unknown one."""
    known = [option.name for option in fields(Options)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise OptionError(f"unknown option {name!r}{hint}")
    return Options(**options)
