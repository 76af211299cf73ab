"""From runs to what a client gets: their pieces as they come, and the events of an answer.

A run that nobody waits for any more is cancelled: whoever leaves ``reading`` for whatever reason
(the answer is whole, the client hung up, time is up, an error) leaves no run behind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemloom.engine.generation import Run, Usage
from gemloom.engine.request import Piece
from gemloom.errors import GemloomError
from gemloom.server.dialects.dialect import Answer
from gemloom.server.errors import HungUpError, OverdueError, StoppedError
from gemloom.server.fields import Json

_HANG_GRACE = 5.0  # seconds over the limit until a client that does not read is dropped

_T = TypeVar("_T")
_log = logging.getLogger("gemloom.server")


class Observer(Protocol):
    """Who wants to know how fast it goes (``metrics.py``)."""

    def first_token(self, seconds: float) -> None:
        """A run has given its first piece, so long after it was started."""

    def finished(self, usage: Usage) -> None:
        """A run has given its last."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one request: ``deadline`` by the event loop's clock; ``beat`` in seconds."""

    deadline: float | None
    beat: float  # how long a stream may be silent before it shows that it lives


@contextmanager
def reading(runs: Sequence[Run]) -> Iterator[None]:
    """Whatever happens inside, no run goes on after it."""
    try:
        yield
    finally:
        for run in runs:
            run.cancel()


async def pieces(
    runs: Sequence[Run], limits: Limits, observer: Observer
) -> AsyncGenerator[tuple[int, Piece] | None, None]:
    """(index of the run, piece) as they come, None where nothing came for ``beat`` seconds.

    Raises what a run raises, OverdueError at the deadline, StoppedError where a run was cancelled
    from elsewhere.
    """
    waiting = {asyncio.ensure_future(_next(run)): index for index, run in enumerate(runs)}
    started, begun = perf_counter(), set[int]()
    try:
        while waiting:
            done, _ = await asyncio.wait(
                waiting, timeout=_patience(limits), return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                yield None
            for task in done:
                index = waiting.pop(task)
                piece = task.result()
                if piece is None:
                    raise StoppedError("the request was ended: the server is stopping")
                if index not in begun:
                    begun.add(index)
                    observer.first_token(perf_counter() - started)
                if piece.finish_reason:
                    observer.finished(runs[index].usage)
                else:
                    waiting[asyncio.ensure_future(_next(runs[index]))] = index
                yield index, piece
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _next(run: Run) -> Piece | None:
    return await anext(run, None)


def _patience(limits: Limits) -> float:
    """Seconds to wait for a piece. OverdueError at the deadline."""
    if limits.deadline is None:
        return limits.beat
    left = limits.deadline - asyncio.get_running_loop().time()
    if left <= 0:
        raise OverdueError("the request took longer than this server allows")
    return min(left, limits.beat)


async def whole(answer: Answer, runs: Sequence[Run], limits: Limits, observer: Observer) -> Json:
    """The answer in one piece. Raises as ``pieces``."""
    async with aclosing(pieces(runs, limits, observer)) as coming:
        async for item in coming:
            if item is not None:
                answer.push(*item)
    return answer.body([run.usage for run in runs])


async def events(
    answer: Answer, runs: Sequence[Run], limits: Limits, observer: Observer
) -> AsyncGenerator[bytes, None]:
    """The answer as events, as its dialect writes them; an error is one, and the last."""
    try:
        yield _written(answer, answer.begin())
        async with aclosing(pieces(runs, limits, observer)) as coming:
            async for item in coming:
                yield answer.beat if item is None else _written(answer, answer.push(*item))
        yield _written(answer, answer.end([run.usage for run in runs]))
        yield answer.done
    except GemloomError as error:
        yield answer.encode(answer.failed(error))
    except Exception:
        _log.exception("a stream failed")
        told = answer.failed(GemloomError("internal error; the server's log has more"))
        yield answer.encode(told)


def _written(answer: Answer, some: list[Json]) -> bytes:
    return b"".join(map(answer.encode, some))


class EventStream(Response):
    """Sends an answer's events; ends the runs behind it when they end or the client hangs up."""

    def __init__(
        self, answer: Answer, runs: Sequence[Run], limits: Limits, observer: Observer
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers, media_type=answer.media_type)
        del self.headers["content-length"]
        self._source = events(answer, runs, limits, observer)
        self._runs, self._deadline = runs, limits.deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        end = None if self._deadline is None else self._deadline + _HANG_GRACE
        with reading(self._runs):
            try:
                async with asyncio.timeout_at(end):
                    await attended(receive, self._send(send))
            except (HungUpError, TimeoutError):
                return  # nobody reads it

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        async with aclosing(self._source) as source:
            async for data in source:
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def attended(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of ``work``, which is cancelled if the client hangs up: then HungUpError.

    To be called when the request's body has been read.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HungUpError
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def before(deadline: float | None, work: Awaitable[_T]) -> _T:
    """The result of ``work``. OverdueError if it is not there by the deadline."""
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError:
        raise OverdueError("the request took longer than this server allows") from None
