"""The parts of an asynchronous iterator, for a thread that loads: awaited in their own loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from concurrent.futures import Future
from threading import Lock
from typing import Any

from gemloom.errors import SourceError


class AwaitedParts(Iterator[Any]):
    """An iterator whose ``next`` waits, in another thread, until the loop has awaited a part.

    ``stop()`` ends that wait, and every later one, with SourceError.
    """

    def __init__(self, parts: AsyncIterable[Any], loop: asyncio.AbstractEventLoop) -> None:
        self._parts, self._loop = aiter(parts), loop
        self._waiting: Future[tuple[Any, bool]] | None = None
        self._stopped = False
        self._lock = Lock()

    def __next__(self) -> Any:
        with self._lock:
            if self._stopped:
                raise SourceError("loading was cancelled")
            self._waiting = asyncio.run_coroutine_threadsafe(_next(self._parts), self._loop)
        try:
            part, more = self._waiting.result()
        finally:
            self._waiting = None  # it would hold the part
        if not more:
            raise StopIteration
        return part

    def stop(self) -> None:
        """Make whoever waits give up."""
        with self._lock:
            self._stopped = True
            if self._waiting is not None:
                self._waiting.cancel()


async def _next(parts: AsyncIterator[Any]) -> tuple[Any, bool]:
    """The next part and True; at the end, False. A coroutine's end cannot go through a future."""
    try:
        return await anext(parts), True
    except StopAsyncIteration:
        return None, False
