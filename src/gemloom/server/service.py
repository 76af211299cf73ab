"""What the routes share: one model, how requests to it are read, run and answered."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gemloom.generation import Run
from gemloom.model import Model
from gemloom.server.answers import Head, new_id
from gemloom.server.errors import ForbiddenError, UnknownModelError
from gemloom.server.guard import Keys, check_origin, is_local, read_body
from gemloom.server.jobs import Job, Preparer, start
from gemloom.server.metrics import Metrics
from gemloom.server.protocol import Body, parse
from gemloom.server.streams import (
    Answer,
    EventStream,
    Limits,
    attended,
    before,
    events,
    reading,
    whole,
)

_T = TypeVar("_T")
_Body = TypeVar("_Body", bound=Body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server behaves."""

    name: str  # of the model, as requests call it
    aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()  # none: whoever reaches it may use it
    cors: tuple[str, ...] = ()  # origins whose pages may use it; "*" for all
    max_body: int = 32 << 20  # bytes
    timeout: float | None = 600.0  # seconds of one request; None: no limit
    beat: float = 10.0  # seconds until a silent stream sends a comment
    slot_state: bool = False  # whether clients may save and restore the model's state


class Service:
    """One model and its settings, as the routes use them."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.keys, self.metrics, self.prepare = (
            Keys(settings.api_keys),
            Metrics(model),
            Preparer(model),
        )
        self.created = int(time.time())
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()

    def admit(self, request: Request) -> None:
        """KeyRefusedError or ForbiddenError for who may not use this server."""
        self.keys.check(request)
        if not self.keys:
            check_origin(request, self.settings.cors)

    def admit_state(self, request: Request) -> None:
        """ForbiddenError for who may not save or restore state."""
        if not self.settings.slot_state:
            raise ForbiddenError("saving and restoring state is off: start with --slot-state")
        if not self.keys and not is_local(request):
            raise ForbiddenError("state needs an API key, or a client on the server's machine")

    def deadline(self) -> float | None:
        """When a request that has come now must have been answered, by the loop's clock."""
        limit = self.settings.timeout
        return None if limit is None else asyncio.get_running_loop().time() + limit

    async def read(self, kind: type[_Body], request: Request, deadline: float | None) -> _Body:
        """The request's body as ``kind``. Raises what is wrong with it."""
        data = await before(deadline, read_body(request, self.settings.max_body))
        asked = await in_thread(partial(parse, kind, data), deadline)
        self.check_name(asked.model)
        return asked

    def check_name(self, name: str | None) -> None:
        """UnknownModelError unless it is this server's model, or left out."""
        if name not in (None, self.settings.name, *self.settings.aliases):
            raise UnknownModelError(
                f"the model {str(name)[:80]!r} is not served here: {self.settings.name!r} is"
            )

    def head(self, prefix: str) -> Head:
        """The beginning of a new answer."""
        return Head(new_id(prefix), int(time.time()), self.settings.name)

    async def answer(
        self, request: Request, answer: Answer, jobs: Sequence[Job], *,
        stream: bool, deadline: float | None,
    ) -> Response:  # fmt: skip
        """Run the jobs, and answer with what they make: as events, or whole."""
        limits = Limits(deadline, self.settings.beat)
        runs = start(self.model, jobs)
        self._runs.update(runs)
        if stream:
            return EventStream(events(answer, runs, limits, self.metrics), runs, deadline)
        with reading(runs):
            body = await attended(request.receive, whole(answer, runs, limits, self.metrics))
        return JSONResponse(body)

    async def long(
        self, request: Request, work: Callable[[threading.Event], _T], deadline: float | None
    ) -> _T:
        """The result of ``work`` in a thread; the event tells it that nobody waits any more."""
        given_up = threading.Event()
        try:
            return await attended(request.receive, in_thread(partial(work, given_up), deadline))
        finally:
            given_up.set()

    def stop(self) -> None:
        """End every request that is under way; each client is told."""
        for run in list(self._runs):
            run.cancel()


async def in_thread(work: Callable[[], _T], deadline: float | None) -> _T:
    """The result of ``work``, done off the event loop. OverdueError at the deadline."""
    return await before(deadline, to_thread.run_sync(work, abandon_on_cancel=True))
