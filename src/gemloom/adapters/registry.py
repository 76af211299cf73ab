"""Adapters by name, each in versions: loaded, replaced and unloaded while requests run.

A request takes a lease on the versions that its names mean when it comes, and they stay until it
ends, whatever the names mean by then. A version goes when it has neither name nor lease.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from threading import Lock
from typing import Any, Protocol, TypeVar

from gemloom.adapters.checking import check
from gemloom.adapters.device_factors import Loaded
from gemloom.adapters.factors import Lora
from gemloom.adapters.info import AdapterInfo, Named
from gemloom.adapters.names import check_name, check_scale
from gemloom.adapters.reading import read
from gemloom.adapters.request_adapters import Active
from gemloom.compute.placement import Placement
from gemloom.errors import ClosedError, OptionError, UnknownAdapterError
from gemloom.ggml.device import Device
from gemloom.models.config import Config

T = TypeVar("T")
MOST = 8  # adapters of one request


class Owner(Protocol):
    """The thread that computes (``engine.py``)."""

    def check(self) -> None:
        """Raise why nothing is computed any more."""

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` between two steps, and give what it gives."""

    def post(self, function: Callable[[], object]) -> None:
        """Have ``function`` run between two steps, and wait for nothing."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Version:
    loaded: Loaded
    scale: float
    norm: float
    ignored: Mapping[str, str]
    users: int = 0
    named: bool = True  # False once it was replaced or unloaded


@dataclass(slots=True, eq=False)
class Lease:
    """The adapters of one request, kept until ``release``; a second call does nothing."""

    active: tuple[Active, ...] = ()
    _release: Callable[[], None] | None = field(default=None, repr=False)

    def release(self) -> None:
        """Let go of them. Never waits."""
        release, self._release = self._release, None
        if release:
            release()

    def __enter__(self) -> tuple[Active, ...]:
        return self.active

    def __exit__(self, *_: object) -> None:
        self.release()


class Adapters:
    """The adapters of one model; any thread may call. ``forget`` drops what holds one's tensors."""

    def __init__(
        self,
        device: Device,
        placement: Placement,
        config: Config,
        shapes: Mapping[str, tuple[int, ...]],
        owner: Owner,
        forget: Callable[[Loaded], None],
    ) -> None:
        self._device, self._placement = device, placement
        self._config, self._shapes = config, shapes
        self._owner, self._forget = owner, forget
        self._lock = Lock()
        self._named: dict[str, _Version] = {}
        self._there: set[Loaded] = set()  # all that have memory
        self._requests: dict[str, int] = {}
        self._versions = count(1)
        self._closed = False

    # -- loading -------------------------------------------------------------------------------

    def load(self, name: str, source: Any, scale: float = 1.0) -> AdapterInfo:
        """Load an adapter under a name, in the caller's thread; requests go on meanwhile.

        Under a name that is there already it becomes what new requests get; those under way keep
        theirs. ``source`` is what ``read`` takes, or a Lora. ``scale`` is what a request gets that
        gives none. Raises OptionError, what ``read`` raises, AdapterError where it does not fit
        this model, DeviceError.
        """
        check_name(name)
        own = check_scale(name, scale)
        self._owner.check()
        lora = source if isinstance(source, Lora) else read(source)
        report = check(lora, self._config, self._shapes)
        number = next(self._versions)
        make = partial(self._make, name, number, report.lora)
        # A device's driver is not to be given work by two threads.
        loaded = make() if self._device.on_host else self._owner.call(make)
        version = _Version(loaded=loaded, scale=own, norm=report.norm, ignored=report.ignored)
        with self._lock:
            if self._closed:
                raise ClosedError("the model is closed")
            previous = self._named.get(name)
            self._named[name] = version
            self._requests.setdefault(name, 0)
            info = self._info(version)
        if previous:
            self._drop(previous)
        return info

    def _make(self, name: str, number: int, lora: Lora) -> Loaded:
        """An adapter in memory, which ``close`` frees from now on, whatever becomes of the call."""
        loaded = Loaded(self._device, self._placement, name, number, lora)
        with self._lock:
            if not self._closed:
                self._there.add(loaded)
                return loaded
        loaded.close()
        raise ClosedError("the model is closed")

    def unload(self, name: str) -> None:
        """Take a name away. Waits for nobody: requests under way keep what they have.

        UnknownAdapterError.
        """
        with self._lock:
            version = self._named.pop(name, None)
            if version is None:
                raise self._unknown(name)
        self._drop(version)

    def list(self) -> list[AdapterInfo]:
        """All that requests can name, in the order of their names."""
        with self._lock:
            return [self._info(version) for _, version in sorted(self._named.items())]

    def check(self, name: str) -> None:
        """UnknownAdapterError unless requests can name it."""
        with self._lock:
            if name not in self._named:
                raise self._unknown(name)

    @property
    def nbytes(self) -> int:
        """Memory of all versions that are there."""
        with self._lock:
            return sum(loaded.nbytes for loaded in self._there)

    def close(self) -> None:
        """Free all, where nothing is computed any more."""
        with self._lock:
            self._closed = True
            there = list(self._there)
            self._there.clear()
            self._named.clear()
        for loaded in there:
            loaded.close()

    # -- requests ------------------------------------------------------------------------------

    def lease(self, wanted: Named | None, prompt: Sequence[int]) -> Lease:
        """The adapters that a request names, as they are now, held until it is released.

        A scale of 0 is no adapter. Raises UnknownAdapterError, which lists the names there are,
        and OptionError: for a scale that is not finite, for too many, and for an adapter that acts
        from certain tokens on where the prompt has none of them.
        """
        if not wanted:
            return Lease()
        if isinstance(wanted, list | tuple) and all(isinstance(name, str) for name in wanted):
            wanted = dict.fromkeys(wanted)
        if not isinstance(wanted, Mapping):
            raise OptionError(
                f"adapters must be [name, ...] or {{name: scale}}, not {reprlib.repr(wanted)}"
            )
        with self._lock:
            found = [self._active(name, scale, prompt) for name, scale in wanted.items()]
            held = [(version, active) for version, active in found if active.scale]
            if len(held) > MOST:
                raise OptionError(f"{len(held)} adapters in one request; {MOST} are the most")
            for version, active in held:
                version.users += 1
                self._requests[active.adapter.name] += 1
        versions = [version for version, _ in held]
        return Lease(tuple(active for _, active in held), partial(self._return, versions))

    def _active(
        self, name: str, scale: float | None, prompt: Sequence[int]
    ) -> tuple[_Version, Active]:
        version = self._named.get(name)
        if version is None:
            raise self._unknown(name)
        own = version.scale if scale is None else check_scale(name, scale)
        since = 0
        if own and (sought := version.loaded.invocation):
            since = _last(sought, prompt)
            if since < 0:
                raise OptionError(
                    f"the adapter {name} acts from its invocation tokens {list(sought)} on, "
                    "which the prompt does not have"
                )
        return version, Active(version.loaded, own, since)

    def _return(self, versions: Sequence[_Version]) -> None:
        with self._lock:
            for version in versions:
                version.users -= 1
            unused = [v for v in versions if not v.users and not v.named]
        for version in unused:
            self._free(version.loaded)

    def _drop(self, version: _Version) -> None:
        """Take note that nobody can name this version any more."""
        with self._lock:
            version.named = False
            used = version.users
        if not used:
            self._free(version.loaded)

    def _free(self, loaded: Loaded) -> None:
        """Free it between two steps: a graph that is kept may hold its tensors."""

        def free() -> None:
            self._forget(loaded)
            with self._lock:
                self._there.discard(loaded)
            loaded.close()

        self._owner.post(free)

    def _info(self, version: _Version) -> AdapterInfo:
        loaded = version.loaded
        return AdapterInfo(
            name=loaded.name,
            version=loaded.version,
            scale=version.scale,
            rank=loaded.rank,
            matrices=len(loaded.pairs),
            nbytes=loaded.nbytes,
            norm=version.norm,
            ignored=version.ignored,
            invocation=loaded.invocation,
            users=version.users,
            requests=self._requests[loaded.name],
        )

    def _unknown(self, name: object) -> UnknownAdapterError:
        there = ", ".join(sorted(self._named)) or "none"
        return UnknownAdapterError(f"no adapter is named {reprlib.repr(name)}; loaded: {there}")


def _last(sought: Sequence[int], tokens: Sequence[int]) -> int:
    """Where ``sought`` begins for the last time, -1 where it is nowhere."""
    wanted, n = list(sought), len(sought)
    starts = range(len(tokens) - n, -1, -1)
    return next((i for i in starts if list(tokens[i : i + n]) == wanted), -1)
