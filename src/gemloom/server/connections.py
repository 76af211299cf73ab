"""How long a client may hold a connection without asking or reading, and how many there may be.

uvicorn ends a connection that is silent after an answer. What it leaves open is ended here: one
that never asks, a head or a body that is half sent, and an answer that is not read.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemloom.errors import GemloomError, RequestError
from gemloom.server.bodies import error_body
from gemloom.server.errors import CrowdedError, OverdueError

MAX_CONNECTIONS = 512  # at once; a process may usually have 1,024 files open
HEAD_SECONDS = 20.0  # without a whole request, from the start or from the last answer
UNREAD_SECONDS = 120.0  # in which a client takes nothing of what waits for it
_PART = 16 << 10  # bytes read at once: tiny chunks take 20 ms of them, then others get a turn


class Connection(H11Protocol):
    """One connection of a client."""

    _until_asked: asyncio.TimerHandle | None = None
    _until_read: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse it where there are too many, else wait for a request."""
        super().connection_made(transport)
        if hasattr(transport, "max_size"):
            transport.max_size = _PART
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(CrowdedError(f"there are {MAX_CONNECTIONS} connections: try again later"))
            return
        self._wait_for_request()

    def handle_events(self) -> None:
        """As uvicorn; once a request is under way, its own limits hold."""
        super().handle_events()
        if self.cycle and not self.cycle.response_complete:
            self._cancel()

    def on_response_complete(self) -> None:
        """As uvicorn; what is left of a body counts as time without a request."""
        self._wait_for_request()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn."""
        super().connection_lost(exc)
        self._cancel()
        if self._until_read:
            self._until_read.cancel()

    def pause_writing(self) -> None:
        """As uvicorn; the client must read some of it in time."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """As uvicorn."""
        super().resume_writing()
        if self._until_read:
            self._until_read.cancel()
        if self.transport.is_closing():
            self._watch_reader()  # of the rest

    def send_400_response(self, msg: str) -> None:
        """As uvicorn, in the form of all other errors."""
        self._refuse(RequestError("this is not an HTTP request"))

    def _wait_for_request(self) -> None:
        self._cancel()
        self._until_asked = self.loop.call_later(HEAD_SECONDS, self._no_request)

    def _cancel(self) -> None:
        if self._until_asked:
            self._until_asked.cancel()

    def _no_request(self) -> None:
        half_sent = self.conn.trailing_data[0] and self.conn.our_state is h11.IDLE
        if half_sent and not self.transport.is_closing():
            self._refuse(OverdueError(f"no whole request came within {HEAD_SECONDS:g} seconds"))
            return
        self.transport.close()
        self._watch_reader()

    def _refuse(self, error: GemloomError) -> None:
        """Answer without a request, and close."""
        body = json.dumps(error_body(error)).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
        answer = h11.Response(status_code=error.status, headers=[*headers, ("connection", "close")])
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """Drop the connection once nothing of what waits was taken for ``UNREAD_SECONDS``."""
        if self._until_read:
            self._until_read.cancel()
        waiting = self.transport.get_write_buffer_size()
        if waiting:
            self._until_read = self.loop.call_later(UNREAD_SECONDS, self._unread, waiting)

    def _unread(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._watch_reader()
        else:
            self.transport.abort()


def config(app: ASGIApp, **options: Any) -> uvicorn.Config:
    """How uvicorn runs the app here."""
    return uvicorn.Config(
        app, http=Connection, ws="none", lifespan="off", access_log=False, server_header=False,
        **options,
    )  # fmt: skip
