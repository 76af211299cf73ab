"""An HTTP server on this machine that holds a few files, and misbehaves as it is told to."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Shelf(ThreadingHTTPServer):
    """Files by name; what came is in ``log`` as (method, name, first byte asked for or None)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.ranges = True  # False: the header Range is ignored
        self.told_size = True  # False: the length of a whole file is not told
        self.status: dict[str, int] = {}  # by method, instead of an answer
        self.delay = 0.0  # seconds before each answer
        self.spoil: Callable[[int], bytes | None] = lambda start: None  # see _Handler.do_GET
        self.log: list[tuple[str, str, int | None]] = []
        self.headers: list[dict[str, str]] = []
        self.sent = self.busy = self.most_busy = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self) -> list[int | None]:
        return [start for method, _, start in self.log if method == "GET"]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Shelf
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        try:
            self._answer(body=True)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def _answer(self, *, body: bool) -> None:
        shelf, name = self.server, self.path.partition("?")[0]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), int(asked[2]) + 1) if asked else (None, None)
        shelf.log.append((self.command, name, start))
        shelf.headers.append(dict(self.headers))
        time.sleep(shelf.delay)
        status = shelf.status.get(self.command) or (200 if name in shelf.files else 404)
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        whole = shelf.files[name]
        partial = asked is not None and shelf.ranges
        data = whole[start:end] if partial else whole
        self._send(206 if partial else 200, data, start or 0, len(whole), body=body)

    def _send(self, status: int, data: bytes, start: int, size: int, *, body: bool) -> None:
        shelf = self.server
        spoiled = shelf.spoil(start) if body else None  # what is sent instead, and no more
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{size}")
        if shelf.told_size or status == 206:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        if body:
            sent = data if spoiled is None else spoiled
            with shelf.lock:
                shelf.sent += len(sent)
            self.wfile.write(sent)
            if spoiled is not None:
                self.close_connection = True
