"""A server on the loopback for tests: a real one, in a thread of this process."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

import gemloom
from conftest import until
from gemloom.server.app import create_app
from gemloom.server.backend import Backend
from gemloom.server.connections import config
from gemloom.server.service import Settings
from gemloom.testing import engine_of

NAME = "tiny"


@contextmanager
def serving(
    model: Backend,
    buffer: int = 0,
    load: Callable[[], Backend] | None = None,
    **settings: Any,
) -> Iterator[str]:
    """The URL of a server of ``model`` for as long as the block runs.

    ``buffer``: bytes that the system takes for a client that does not read; 0: its own idea.
    ``load`` as ``create_app`` takes it; then the model is closed at the end.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    if buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    app = create_app(model, Settings(**{"name": NAME, **settings}), load)
    server = uvicorn.Server(config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        if load:
            app.state.service.close()


def http(url: str, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=url, trust_env=False, timeout=60, **options)


def events(lines: Iterator[str]) -> Iterator[Any]:
    """What the data lines of server-sent events say; the last may be "[DONE]"."""
    for line in lines:
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def endless(model: gemloom.Model) -> dict[str, float]:
    """A bias under which no answer ends by itself."""
    return {str(token): -100 for token in model.tokenizer.eog}


def cancelled(model: gemloom.Model) -> bool:
    """Whether all that runs ends before the next step."""
    return all(sequence.cancelled for sequence in engine_of(model)._steps.running.values())
