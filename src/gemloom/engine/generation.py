"""What a caller gets from a request: a Run to iterate over, or a finished Completion."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from secrets import token_hex
from typing import Any, Self

from gemloom.engine.request import Piece, Request
from gemloom.errors import GemloomError
from gemloom.text.router import Content, Part, Reasoning, Splitter, ToolCall

Event = Piece | GemloomError | None  # a token, why it failed, or that it was cancelled


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and seconds of a request so far."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the K/V cells
    prompt_seconds: float  # until the first token was picked
    decode_seconds: float  # for the tokens after it

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of prefill, over the tokens that had to be computed."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding, the first token not counted."""
        if not self.decode_seconds:
            return 0.0
        return (self.completion_tokens - 1) / self.decode_seconds


@dataclass(frozen=True, slots=True)
class Completion:
    """Generated text. ``finish_reason`` is "stop", "length" or "repetition", None if cancelled."""

    text: str
    tokens: list[int]
    finish_reason: str | None
    usage: Usage
    pieces: list[Piece] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """An assistant's answer; ``message`` can be appended to the conversation unchanged.

    It has ``content``, and ``reasoning_content`` and ``tool_calls`` if there are any, in the form
    of OpenAI's API. ``finish_reason`` is "stop", "length", "repetition" or "tool_calls", None if
    it was cancelled.
    """

    message: dict[str, Any]
    finish_reason: str | None
    usage: Usage

    @property
    def text(self) -> str:
        """The message's content."""
        return str(self.message["content"])


class Inbox:
    """The events of one request, from the engine's thread to its reader.

    One reader at a time: a thread in ``get``, or a coroutine in ``wait``.
    """

    def __init__(self) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self._lock = threading.Lock()

    def put(self, event: Event) -> None:
        """Hand an event over. Never blocks, and may be called from any thread."""
        self._events.put(event)
        with self._lock:
            reader, self._reader = self._reader, None
        if reader:
            loop, future = reader
            with suppress(RuntimeError):  # the loop is closed, so nobody reads any more
                loop.call_soon_threadsafe(_wake, future)

    def get(self) -> Event:
        """The next event; blocks until there is one."""
        return self._events.get()

    async def wait(self) -> Event:
        """The next event."""
        while True:
            future = asyncio.get_running_loop().create_future()
            with self._lock:  # before the look, so that no event can slip between the two
                self._reader = (future.get_loop(), future)
            try:
                return self._events.get_nowait()
            except Empty:
                await future


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Run(Iterator[Piece]):
    """A request under way: iterate over its pieces, with ``for`` or ``async for``.

    ``completion()`` or ``await`` gives the whole. ``close()``, leaving ``with`` or dropping the
    object stops it early. It is computed even if nobody reads. One reader at a time.
    """

    def __init__(
        self, request: Request, inbox: Inbox, cancel: Callable[[Request], None], owner: object
    ) -> None:
        self._request, self._inbox, self._cancel = request, inbox, cancel
        self._owner = owner  # a model lives as long as its requests
        self._open = True
        self._pieces: list[Piece] = []  # all that were read
        self._error: GemloomError | None = None

    def __next__(self) -> Piece:
        if not self._open:
            raise self._error or StopIteration
        try:
            event = self._inbox.get()
        except BaseException:  # Ctrl-C among them: the slot must be free again
            self.close()
            raise
        if piece := self._take(event):
            return piece
        raise StopIteration

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        if not self._open:
            raise self._error or StopAsyncIteration
        if piece := self._take(await self._inbox.wait()):
            return piece
        raise StopAsyncIteration

    def _take(self, event: Event) -> Piece | None:
        """The piece, or None if the request was cancelled; raises the error that ended it."""
        if isinstance(event, Piece):
            self._open = self._open and not event.finish_reason
            self._pieces.append(event)
            return event
        self._open, self._error = False, event
        if event is None:
            return None
        raise event

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._gather().__await__()

    async def _gather(self) -> Completion:
        with self:  # a task that is cancelled while it waits ends the request
            async for _ in self:
                pass
        return self._completion()

    def completion(self) -> Completion:
        """Wait for the end and join all pieces, including those that were read before.

        Raises the error that ended the run, on every call.
        """
        for _ in self:
            pass
        return self._completion()

    def _completion(self) -> Completion:
        pieces = list(self._pieces)
        return Completion(
            "".join(piece.text for piece in pieces),
            [piece.token for piece in pieces],
            pieces[-1].finish_reason if pieces else None,
            self.usage,
            pieces,
        )

    @property
    def usage(self) -> Usage:
        """Counts and times so far."""
        s = self._request
        return Usage(
            s.n_prompt, s.n_generated, s.n_cached, max(0.0, s.first - s.started), s.last - s.first
        )

    @property
    def times(self) -> dict[str, float]:
        """Seconds so far outside the model's steps, by kind of work: sample, text."""
        return dict(self._request.times)

    @property
    def request(self) -> Request:
        """Its state in the engine."""
        return self._request

    def cancel(self) -> None:
        """End it before the next step; a signal handler or another thread may call it.

        Pieces that were computed can still be read, and their K/V stay in the cells.
        """
        self._cancel(self._request)

    def close(self) -> None:
        """Stop, and free the slot. Does not wait. A second call does nothing."""
        if self._open:
            self._open = False
            self._cancel(self._request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class ChatRun(Iterator[Part]):
    """An answer under way: iterate over its Content, Reasoning and ToolCall parts.

    Use ``for`` or ``async for``; ``completion()`` or ``await`` gives the whole answer.
    """

    def __init__(self, run: Run, splitter: Splitter) -> None:
        self.run, self._splitter = run, splitter
        self._parts: deque[Part] = deque()  # to be read next
        self._found: list[Part] = []  # all there were
        self._open, self._called = True, False
        self.finish_reason: str | None = None

    def __next__(self) -> Part:
        while not self._parts:
            if not self._open:
                raise StopIteration
            self._read(next(self.run, None))
        return self._parts.popleft()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Part:
        while not self._parts:
            if not self._open:
                raise StopAsyncIteration
            self._read(await anext(self.run, None))
        return self._parts.popleft()

    def _read(self, piece: Piece | None) -> None:
        self._open = piece is not None and not piece.finish_reason
        found = self._splitter.push(piece.text) if piece else []
        if not self._open:
            found += self._splitter.flush()
        self._parts += found
        self._found += found
        self._called = self._called or any(isinstance(part, ToolCall) for part in found)
        if piece and piece.finish_reason:
            tools = self._called and piece.finish_reason == "stop"
            self.finish_reason = "tool_calls" if tools else piece.finish_reason

    def __await__(self) -> Generator[Any, None, ChatCompletion]:
        return self._gather().__await__()

    async def _gather(self) -> ChatCompletion:
        with self:
            async for _ in self:
                pass
        return self._completion()

    def completion(self) -> ChatCompletion:
        """As ``Run.completion``."""
        for _ in self:
            pass
        return self._completion()

    def _completion(self) -> ChatCompletion:
        return ChatCompletion(message(self._found), self.finish_reason, self.run.usage)

    @property
    def usage(self) -> Usage:
        """Counts and times so far."""
        return self.run.usage

    def cancel(self) -> None:
        """As ``Run.cancel``."""
        self.run.cancel()

    def close(self) -> None:
        """As ``Run.close``."""
        self._open = False
        self.run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def message(parts: Iterable[Part]) -> dict[str, Any]:
    """The parts of an answer as an assistant's message."""
    parts = list(parts)
    content = "".join(part.text for part in parts if isinstance(part, Content))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls = [part for part in parts if isinstance(part, ToolCall)]
    found: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        found["reasoning_content"] = reasoning
    if calls:
        found["tool_calls"] = [call_body(call) for call in calls]
    return found


def call_body(call: ToolCall) -> dict[str, Any]:
    """A tool call in the form of OpenAI's API, with a new id."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{token_hex(12)}", "type": "function", "function": function}
