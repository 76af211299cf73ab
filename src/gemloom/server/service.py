"""What the routes share: one model, how requests to it are read, run and answered."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import Response

from gemloom.adapters.info import Scales
from gemloom.engine.generation import Run
from gemloom.errors import EngineError, GemloomError
from gemloom.server.adapters import AdapterFile, ServedAdapters
from gemloom.server.backend import Backend
from gemloom.server.dialects.dialect import Answer
from gemloom.server.errors import ForbiddenError, StoppedError, UnknownModelError
from gemloom.server.guard import (
    LOOPBACK_NAMES,
    Keys,
    check_host,
    check_origin,
    is_local,
    read_body,
    site_name,
)
from gemloom.server.ignored import Ignored
from gemloom.server.metrics import Metrics
from gemloom.server.parsing import parse
from gemloom.server.protocol import Adapted, Body
from gemloom.server.recovery import Recovery
from gemloom.server.runs import start
from gemloom.server.streams import (
    EventStream,
    Limits,
    attended,
    before,
    reading,
    whole,
)
from gemloom.text.compose import Composed

_log = logging.getLogger("gemloom.server")
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_LARGE = 1 << 17  # bytes of a body that is parsed by itself, as it holds the interpreter
_LOOK = 0.05  # seconds between two looks at what is under way
_T = TypeVar("_T")
_Body = TypeVar("_Body", bound=Body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server behaves."""

    name: str  # of the model, as requests call it
    aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()  # none: whoever reaches it may use it
    hosts: tuple[str, ...] = ()  # names it may be asked by without a key; none: any
    cors: tuple[str, ...] = ()  # origins whose pages may use it, by their names too; "*" for all
    max_body: int = 32 << 20  # bytes
    timeout: float | None = 600.0  # seconds of one request; None: no limit
    beat: float = 10.0  # seconds until a silent stream sends a comment
    strict: bool = False  # whether a field that nobody knows is an error
    slot_state: bool = False  # whether clients may save and restore the model's state
    adapters: Mapping[str, AdapterFile] = field(default_factory=dict)  # by the name requests use
    adapter_upload: bool = False  # whether clients with a key may send adapters
    max_adapter: int = 1 << 30  # bytes of one that is sent


class Service:
    """One model and its settings, as the routes use them.

    With ``load``, which gives the model anew, it is loaded again when a device of it was lost and
    is back. ``close()`` closes the model that is there then. RequestError for a model without a
    vocabulary.
    """

    def __init__(
        self, backend: Backend, settings: Settings, load: Callable[[], Backend] | None = None
    ) -> None:
        backend.tokenizer.needs_text("a server")
        backend.grammars.warm()  # before there are streams that would stand still meanwhile
        self.settings, self.keys = settings, Keys(settings.api_keys)
        self.adapters = ServedAdapters(backend, settings.adapters)
        self.metrics = Metrics(lambda: self.backend)
        let_in = [name for origin in settings.cors if (name := site_name(origin))]
        self._hosts = (*settings.hosts, *let_in) if settings.hosts else ()
        self.created = int(time.time())
        self.under_way = 0  # HTTP requests but those for /health
        self._large = CapacityLimiter(1)
        self.stopping = False  # whether new ones are refused
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()
        self._recovery = load and Recovery(lambda: self.backend, load, self._take)

    @property
    def backend(self) -> Backend:
        """The model that is served now."""
        return self.adapters.backend

    def _take(self, backend: Backend) -> None:
        """Go on with a model that was loaded again, and the adapters there were.

        Both are taken in one assignment: no request sees one of them without the other.
        """
        backend.grammars.warm()
        self.adapters.move(backend)

    def close(self) -> None:
        """End what runs in the background, and close the model."""
        if self._recovery:
            self._recovery.close()
        self.backend.close()

    def failure(self) -> GemloomError | None:
        """Why no requests are answered; None where they are."""
        if self.stopping:
            return StoppedError("the server is stopping")
        stats = self.backend.stats()
        if stats.error is None:
            return None
        again = self._recovery and stats.lost
        hope = (
            "is loaded again as soon as it can be"
            if again
            else "must be loaded again: restart the server"
        )
        return EngineError(f"{stats.error}; the model {hope}")

    def admit(self, request: Request) -> None:
        """KeyRefusedError or ForbiddenError for who may not use this server."""
        self.keys.check(request)
        if not self.keys:
            check_host(request, self._hosts)
            check_origin(request, self.settings.cors)

    def admit_state(self, request: Request) -> None:
        """ForbiddenError for who may not save or restore state."""
        if not self.settings.slot_state:
            raise ForbiddenError("saving and restoring state is off: start with --slot-state")
        self._admit_trusted("state", request)

    def admit_change(self, request: Request) -> None:
        """ForbiddenError for who may not load or unload adapters."""
        self._admit_trusted("a change of adapters", request)

    def admit_upload(self, request: Request) -> None:
        """ForbiddenError for who may not send adapters."""
        if not (self.settings.adapter_upload and self.keys):
            raise ForbiddenError(
                "sending adapters is off: start with --adapter-upload and an --api-key"
            )

    def _admit_trusted(self, what: str, request: Request) -> None:
        """ForbiddenError for what changes the server, but from this machine or with a key.

        A page that reaches this machine by its own name (DNS rebinding), or that ``--cors *`` lets
        in, comes from this machine's browser and is still not to be trusted.
        """
        if self.keys:
            return
        if not is_local(request):
            raise ForbiddenError(f"{what} needs an API key, or a client on the server's machine")
        check_host(request, self.settings.hosts or LOOPBACK_NAMES)
        check_origin(request, [origin for origin in self.settings.cors if origin != "*"])

    def deadline(self) -> float | None:
        """When a request that has come now must have been answered, by the loop's clock."""
        limit = self.settings.timeout
        return None if limit is None else asyncio.get_running_loop().time() + limit

    async def read(self, kind: type[_Body], request: Request, deadline: float | None) -> _Body:
        """The request's body as ``kind``. Raises what is wrong with it, or with the engine."""
        if failure := self.failure():
            raise failure
        data = await before(deadline, read_body(request, self.settings.max_body))
        asked = await self.parsed(partial(parse, kind), data, request, deadline)
        self.check_name(asked.model)
        return asked

    async def parsed(
        self,
        read: Callable[[bytes, Ignored], _T],
        data: bytes,
        request: Request,
        deadline: float | None,
    ) -> _T:
        """What ``read`` makes of a body. The answer and the log name the fields nobody knows."""
        template = self.backend.tokenizer.chat_template or ""
        ignored = Ignored(strict=self.settings.strict, template=template)
        limiter = self._large if len(data) > _LARGE else None
        result = await in_thread(partial(read, data, ignored), deadline, limiter)
        if named := str(ignored):
            request.state.ignored = named
            _log.warning("%s: fields that are not known were ignored: %s", request.url.path, named)
        return result

    def check_name(self, name: str | None) -> str | None:
        """The adapter that a model's name has, as in "model:adapter"; None where it has none.

        UnknownModelError unless the model is this server's, or left out; UnknownAdapterError.
        """
        names = (self.settings.name, *self.settings.aliases)
        if name is None or name in names:
            return None
        model, _, adapter = name.rpartition(":")
        if model not in names:
            raise UnknownModelError(
                f"the model {name[:80]!r} is not served here: {self.settings.name!r} is"
            )
        self.adapters.check(adapter)
        return adapter

    def adapters_of(self, asked: Adapted) -> Scales:
        """The adapters that a request means."""
        return self.adapters.of(asked, self.check_name(asked.model))

    def answering(self, asked: Body) -> str:
        """The name that an answer says the model has: the server's, with the adapter asked for."""
        adapter = self.check_name(asked.model)
        return self.settings.name if adapter is None else f"{self.settings.name}:{adapter}"

    async def start(
        self, answers: Sequence[Composed], adapters: Scales, deadline: float | None
    ) -> list[Run]:
        """Start all runs of a request, or none; ``stop`` ends those that are left."""
        runs = await in_thread(partial(start, self.backend, answers, adapters), deadline)
        self._runs.update(runs)
        return runs

    async def answer(
        self, request: Request, answer: Answer, runs: Sequence[Run], *,
        stream: bool, deadline: float | None,
    ) -> Response:  # fmt: skip
        """Answer with what the runs make: as events, or whole."""
        limits = Limits(deadline, self.settings.beat)
        if stream:
            return EventStream(answer, runs, limits, self.metrics)
        with reading(runs):
            body = await attended(request.receive, whole(answer, runs, limits, self.metrics))
            return await json_answer(body)

    async def long(
        self, request: Request, work: Callable[[threading.Event], _T], deadline: float | None
    ) -> _T:
        """The result of ``work`` in a thread; the event tells it that nobody waits any more."""
        given_up = threading.Event()
        try:
            return await attended(request.receive, in_thread(partial(work, given_up), deadline))
        finally:
            given_up.set()

    async def idle(self, seconds: float) -> None:
        """Return when no request is under way, or after so many seconds."""
        end = time.monotonic() + seconds
        while self.under_way and time.monotonic() < end:
            await asyncio.sleep(_LOOK)

    def stop(self) -> None:
        """End every request that is under way; each client is told."""
        for run in list(self._runs):
            run.cancel()


async def json_answer(body: Any) -> Response:
    """A JSON answer of any size: written piece by piece, so that others have their turn."""
    data = await in_thread(partial(_written, body), None)
    return Response(data, media_type="application/json")


def _written(body: Any) -> bytes:
    data = bytearray()
    for part in _ENCODER.iterencode(body):
        data += part.encode()
    return bytes(data)


async def in_thread(
    work: Callable[[], _T], deadline: float | None, limiter: CapacityLimiter | None = None
) -> _T:
    """The result of ``work``, done off the event loop. OverdueError at the deadline.

    ``limiter`` is how many of a kind may run at once.
    """
    done = to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
    return await before(deadline, done)
