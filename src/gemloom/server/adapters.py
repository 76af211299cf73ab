"""The adapters of a server: which names the operator gave it, and which a request means.

No request ever names a file: what can be loaded is what the operator registered, or bytes that
come with the request where that is switched on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from gemloom.adapters.info import AdapterInfo, Scales
from gemloom.adapters.names import check_name
from gemloom.errors import AdapterError, OptionError, UnknownAdapterError, WeightsError
from gemloom.server.backend import Backend
from gemloom.server.errors import FieldError
from gemloom.server.fields import Json
from gemloom.server.protocol import Adapted, LoraScale

_log = logging.getLogger("gemloom.server")


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """Where an adapter comes from, and the scale it has where a request gives none."""

    source: Any
    scale: float = 1.0


class ServedAdapters:
    """Loads all registered adapters; then what requests may do with them. Any thread may call.

    ``backend`` is the model that has them, the only place where the server keeps it.
    ``_defaults`` act on requests that say nothing of adapters; at first there are none.
    """

    def __init__(self, backend: Backend, registered: Mapping[str, AdapterFile]) -> None:
        self.backend, self._registered = backend, dict(registered)
        self._ids: dict[str, int] = {}  # as llama.cpp's clients know them; none is ever reused
        self._defaults: dict[str, float] = {}
        self._from: dict[str, AdapterFile | None] = {}  # each that is there; None: a client
        self._lock = Lock()  # of what changes while others may read it
        for name in registered:
            self.load(name, None)

    def move(self, backend: Backend) -> None:
        """Go on with the model loaded again: with all that were there, but those clients sent.

        Raises what ``load`` raises, and changes nothing then.
        """
        with self._lock:
            there = dict(self._from)
        for name, file in there.items():
            if file:
                backend.adapters.load(name, file.source, file.scale)
        for name in [name for name, file in there.items() if not file]:
            _log.warning("the adapter %s was sent by a client, and must be sent again", name)
            self._forget(name)
        with self._lock:
            for name in [name for name, file in there.items() if file and name not in self._from]:
                backend.adapters.unload(name)  # as somebody has done meanwhile
            self.backend = backend

    # -- what there is -------------------------------------------------------------------------

    def there(self) -> list[AdapterInfo]:
        """All that requests can name."""
        return self.backend.adapters.list()

    def check(self, name: str) -> None:
        """UnknownAdapterError unless requests can name it."""
        self.backend.adapters.check(name)

    def load(self, name: str, scale: float | None) -> AdapterInfo:
        """Load, or load again, the file that was registered under a name. UnknownAdapterError."""
        file = self._registered.get(name)
        if file is None:
            there = ", ".join(self._registered) or "none"
            raise UnknownAdapterError(
                f"no file was registered under {name[:80]!r} when the server started; there are: "
                f"{there}"
            )
        file = file if scale is None else AdapterFile(file.source, scale)
        info = self._load(name, file)
        with self._lock:
            self._from[name] = file
        return info

    def upload(self, name: str, data: bytes | bytearray, scale: float | None) -> AdapterInfo:
        """Load the bytes of an adapter. AdapterError for what is wrong with them: a client's."""
        check_name(name)
        try:
            info = self._load(name, AdapterFile(data, 1.0 if scale is None else scale))
        except WeightsError as error:
            raise AdapterError(f"what was sent cannot be used: {error}") from error
        with self._lock:
            self._from[name] = None
        return info

    def _load(self, name: str, file: AdapterFile) -> AdapterInfo:
        info = self.backend.adapters.load(name, file.source, file.scale)
        self._ids.setdefault(name, len(self._ids))
        return info

    def unload(self, name: str) -> None:
        """Take a name away. UnknownAdapterError."""
        self.backend.adapters.unload(name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._from.pop(name, None)
            self._defaults.pop(name, None)

    # -- what a request means ------------------------------------------------------------------

    def of(self, asked: Adapted, named: str | None) -> Scales:
        """The adapters of a request; ``named`` is the one that its model's name has.

        FieldError where it says it in two ways, or gives an id that is none.
        """
        if asked.adapters is not None and asked.lora is not None:
            raise FieldError("lora", "lora: adapters and lora are the same; send one of them")
        if asked.adapters is None and asked.lora is None and named is None:
            return dict(self._defaults)
        own: dict[str, float | None] = {} if named is None else {named: None}
        return own | (asked.adapters or self._by_id(asked.lora or []))

    def _by_id(self, given: Sequence[LoraScale]) -> dict[str, float | None]:
        names = {self._ids[info.name]: info.name for info in self.there()}
        for each in given:
            if each.id not in names:
                there = ", ".join(map(str, sorted(names))) or "none"
                raise FieldError(
                    "lora", f"lora: no adapter has the id {each.id}; there are: {there}"
                )
        return {names[each.id]: each.scale for each in given}

    # -- as llama.cpp's server has it ----------------------------------------------------------

    def by_id(self) -> list[Json]:
        """Each adapter's id and the scale it has where a request says nothing."""
        found = sorted((self._ids[info.name], info.name) for info in self.there())
        return [
            {"id": number, "name": name, "scale": self._defaults.get(name, 0.0)}
            for number, name in found
        ]

    def set_defaults(self, given: Sequence[LoraScale]) -> None:
        """What requests get that say nothing; those left out go. FieldError, OptionError."""
        scales = self._by_id(given)
        for info in self.there():
            if scales.get(info.name) and info.invocation:
                raise OptionError(f"{info.name} acts only where it is invoked: name it in requests")
        self._defaults = {name: scale for name, scale in scales.items() if scale}
