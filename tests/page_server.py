"""A server for the chat page alone: its files under the real policy, and answers from a script.

No model and nothing of Gemloom's own server: what the page does must not depend on either.
"""

import json
import mimetypes
import socket
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "src" / "gemloom" / "server" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:"
)
DONE = b"data: [DONE]\n\n"
DROP = None  # hang up in the middle

Step = bytes | threading.Event | None  # an event is waited for, with comments meanwhile
Script = Callable[[dict[str, Any]], Iterable[Step]]


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def delta(**fields: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": None}], "usage": None})


def text(content: str) -> bytes:
    return delta(content=content)


def thought(content: str) -> bytes:
    return delta(reasoning_content=content)


def end(
    prompt: int = 1200, completion: int = 40, cached: int = 1100, reason: str = "stop"
) -> list[Step]:
    """The last events of an answer: why it ended, the usage, and the mark."""
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}], "usage": None}
    return [event(last), event({"choices": [], "usage": usage}), DONE]


def answer(content: str, **costs: Any) -> list[Step]:
    """A whole answer in two parts."""
    half = len(content) // 2
    return [text(content[:half]), text(content[half:]), *end(**costs)]


class PageServer(ThreadingHTTPServer):
    """``with PageServer() as server``: runs in a thread until the end of the block.

    ``script`` gives the steps of each answer; ``requests`` holds the bodies that came, ``keys``
    what they were authorized by. ``refusal`` is a status and a message given in place of answers.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: Script = lambda body: answer("Yes.")
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.key: str | None = None
        self.refusal: tuple[int, str] | None = None
        self.model = "gemma-4-e2b"
        self.hung_up = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def __enter__(self) -> "PageServer":
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = 20  # seconds; an idle connection's thread ends

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.split("?")[0].removeprefix("/") or "index.html"
        if name == "v1/models":
            if self._authorized():
                self._json(200, {"object": "list", "data": [{"id": self.server.model}]})
        elif name in {file.name for file in PAGE.iterdir()}:
            kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
            self._send(200, kind, (PAGE / name).read_bytes())
        else:
            self._json(404, {"error": {"message": f"no such page: {name}"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._authorized():
            return
        self.server.requests.append(body)
        if self.server.refusal:
            status, message = self.server.refusal
            self._json(status, {"error": {"message": message}})
            return
        try:
            self._stream(self.server.script(body))
        except OSError:
            self.close_connection = True
            self.server.hung_up.set()

    def _authorized(self) -> bool:
        given = self.headers["Authorization"]
        self.server.keys.append(given)
        if self.server.key is None or given == f"Bearer {self.server.key}":
            return True
        self._json(401, {"error": {"message": "no valid API key was given"}})
        return False

    def _json(self, status: int, value: object) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, steps: Iterable[Step]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for step in steps:
            if step is DROP:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if isinstance(step, bytes):
                self._chunk(step)
                continue
            while not step.wait(0.02):
                self._chunk(b": still here\n\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
