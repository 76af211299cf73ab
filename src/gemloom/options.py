"""How a model is loaded: the options, their ranges, and what they mean for a given model."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from gemloom.errors import OptionError, suggestion
from gemloom.models.config import Config

KV_TYPES = ("f32", "f16", "q8_0")
KERNELS = ("auto", "ggml", "plain")
PACKED = ("auto", "keep", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a model is loaded. OptionError for a value outside its range.

    device: where to compute: "auto" uses every GPU, "cpu" none; or a name that ``gemloom doctor``
        lists ("cuda0", "rpc:HOST:PORT"), or a list of such names.
    gpu_layers: how many layers to put on devices, counted from the last, from 0. None: as many as
        fit.
    tensor_split: how the devices share those layers, such as [3, 1]. None: by free memory.
    threads: CPU threads, from 1 to 512. None: one for each core that the process may use.
    context: positions a sequence may fill, prompt and answer together, from 1. None: 8,192, or
        less if the model or the memory allows only less.
    slots: sequences computed at once, from 1 to 256, each with its own K/V cells.
    kv_type: type of the K/V cells: "f32", "f16" or "q8_0". None: f16 if that fits in memory.
    mmap: use the file's bytes in place; False copies them into memory.
    queue: requests that may wait for a slot, from 1 to 65,536; more are refused.
    chunk: most prefill rows of one step while no other request decodes, from 1 to 8,192. Larger is
        faster and takes more memory.
    budget: the same while another request decodes, from 1 to 8,192. Larger makes prefill faster
        and lets running streams wait longer for their next token.
    snapshots: MiB for snapshots of sliding windows, from 0, which keeps none. With a snapshot a
        prompt can resume at an earlier point, such as an earlier turn of a chat.
    kernels: "auto" uses our own where they exist, "ggml" ggml's fastest, "plain" ggml's plain
        ones, which need no copy of the weights.
    packed: weights packed for our own kernels. "auto" reads them from a file beside the model if
        it exists, "keep" also writes that file so that later loads are fast, "off" does neither.
    keep: when the context is full, keep this many first tokens, drop the older half of the rest
        and go on. None: end the answer there.
    """

    device: str | Sequence[str] = "auto"
    gpu_layers: int | None = None
    tensor_split: Sequence[float] | None = None
    threads: int | None = None
    context: int | None = None
    slots: int = 1
    kv_type: str | None = None
    mmap: bool = True
    queue: int = 64
    chunk: int = 512
    budget: int = 128
    snapshots: int = 128
    kernels: str = "auto"
    packed: str = "auto"
    keep: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("threads", 1, 512), ("context", 1, 2**24), ("slots", 1, 256),
            ("queue", 1, 2**16), ("chunk", 1, 8192), ("budget", 1, 8192),
            ("snapshots", 0, 2**20), ("keep", 0, 2**24), ("gpu_layers", 0, 2**16),
        ):  # fmt: skip
            value = getattr(self, name)
            optional = name in ("threads", "context", "keep", "gpu_layers")
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise OptionError(f"{name} must be an integer from {low} to {high}, is {value!r}")
        for name in ("mmap",):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, is {getattr(self, name)!r}")
        for name, known in (("kv_type", KV_TYPES), ("kernels", KERNELS), ("packed", PACKED)):
            value = getattr(self, name)
            if value is None and name == "kv_type":
                continue
            if not isinstance(value, str) or value not in known:
                raise OptionError(f"{name} must be one of {', '.join(known)}, is {value!r}")
        if self.packed == "keep" and not (self.mmap and self.kernels == "auto"):
            raise OptionError('packed "keep" needs mmap and kernels "auto", which use what is kept')

        self._check_devices()

    def _check_devices(self) -> None:
        names = self.devices
        if not names or not all(isinstance(name, str) and name for name in names):
            raise OptionError(f"device must be a name or several, is {reprlib.repr(self.device)}")
        if "auto" in names and len(names) > 1:
            raise OptionError("device: auto goes with no other name")
        if len(set(names)) < len(names):
            raise OptionError(f"device names one twice: {', '.join(names)}")
        shares = self.tensor_split
        if shares is not None and not _are_shares(shares):
            raise OptionError(
                "tensor_split must be numbers from 0 on with a sum above 0, is "
                f"{reprlib.repr(shares)}"
            )

    @property
    def devices(self) -> tuple[str, ...]:
        """The names in ``device``, in lower case."""
        names = (self.device,) if isinstance(self.device, str) else tuple(self.device)
        return tuple(name.lower() if isinstance(name, str) else name for name in names)

    def context_for(self, config: Config) -> int:
        """Positions a sequence may fill in this model. OptionError if the model allows fewer."""
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


def _are_shares(values: Any) -> bool:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        return False
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values) or not all(isfinite(v) and v >= 0 for v in numbers):
        return False
    return sum(numbers) > 0


def from_options(options: Mapping[str, Any]) -> Options:
    """Options by name. OptionError for an unknown one."""
    known = [option.name for option in fields(Options)]
    for name in options:
        if name not in known:
            hint = suggestion(name, known, f"; there are {', '.join(known)}")
            raise OptionError(f"unknown option {name!r}{hint}")
    return Options(**options)
