"""Behind a proxy pages work as the docs say, and who comes through one is not taken for local."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest

from fake_backend import FakeBackend
from gemloom.server.guard import LOOPBACK_NAMES
from http_serving import http, serving

SITE = "https://chat.example"
PAGE = {"Origin": SITE, "Host": "chat.example"}  # what a browser sends to the proxy
ASKED = {"prompt": "a", "max_tokens": 2}
OWN = {"hosts": LOOPBACK_NAMES, "slot_state": True}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend("hello")


@contextmanager
def proxy(url: str, host: str | None = "localhost", more: str = "") -> Iterator[str]:
    """The URL of a proxy before a server: one connection a request, another Host, a header more.

    nginx sends ``Host: ADDRESS:PORT`` of the server by itself, and what it was given where
    ``proxy_set_header Host $host`` says so (``host`` None).
    """
    target = httpx.URL(url)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    threading.Thread(target=_pass, args=(client,), daemon=True).start()

        def _pass(client: socket.socket) -> None:
            with client, socket.create_connection((target.host, target.port or 80)) as server:
                head, body = _request(client)
                if host:
                    head = re.sub(r"(?i)\r\nhost: [^\r]*", f"\r\nHost: {host}", head)
                head = re.sub(r"(?i)\r\nconnection: [^\r]*", "", head)
                server.sendall(f"{head}\r\nConnection: close\r\n{more}\r\n".encode() + body)
                while data := server.recv(65536):
                    client.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _request(client: socket.socket) -> tuple[str, bytes]:
    """The head of a request without the empty line, and its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += client.recv(65536)
    return head.decode("latin-1"), body


def status(url: str, path: str = "/v1/completions", **headers: str) -> int:
    with http(url) as client:
        return client.post(path, json=ASKED, headers=PAGE | headers).status_code


def test_the_page_works_where_its_site_is_named(backend: FakeBackend) -> None:
    """Whichever Host the proxy passes on."""
    for host in ("localhost", "127.0.0.1:8080", None):
        with serving(backend, **OWN) as url, proxy(url, host) as public:
            assert (status(public), host) == (403, host)
        with serving(backend, cors=(SITE,), **OWN) as url, proxy(url, host) as public:
            assert (status(public), host) == (200, host)
            assert status(public, Origin="https://other.example") == 403
        with serving(backend, api_keys=("k",), **OWN) as url, proxy(url, host) as public:
            assert (status(public, Authorization="Bearer k"), host) == (200, host)
            assert status(public) == 401


def test_a_stream_goes_through(backend: FakeBackend) -> None:
    with serving(backend, cors=(SITE,), **OWN) as url, proxy(url) as public, http(public) as client:
        answer = client.post("/v1/completions", json=ASKED | {"stream": True}, headers=PAGE)
        assert answer.text.endswith("data: [DONE]\n\n")
        assert answer.headers["x-accel-buffering"] == "no"  # nginx would keep it to the end


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-Real-IP", "Forwarded", "Via"])
def test_who_comes_through_a_proxy_is_not_local(backend: FakeBackend, header: str) -> None:
    save = "/slots?action=save"
    with serving(backend, cors=(SITE,), **OWN) as url:
        assert status(url, "/v1/completions", Host="localhost") == 200
        assert status(url, save, Host="localhost") == 200
        with proxy(url, more=f"{header}: 127.0.0.1\r\n") as public:
            assert status(public) == 200
            assert status(public, save) == 403
    with serving(backend, api_keys=("k",), **OWN) as url, proxy(url) as public:
        assert status(public, save, Authorization="Bearer k") != 401
        assert status(public, save) == 401


CHANGES = [
    ("POST", "/slots?action=save"), ("POST", "/slots?action=restore"),
    ("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/x"), ("PUT", "/v1/adapters/x"),
    ("POST", "/lora-adapters"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), CHANGES)
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example", "Origin": "http://evil.example"},  # DNS rebinding
        {"Host": "evil.example"},
        {"Host": "localhost", "Origin": "https://evil.example"},
    ],
)
def test_changes_are_for_this_machine_whatever_the_address(
    backend: FakeBackend, method: str, path: str, headers: dict[str, str]
) -> None:
    """A server that all machines reach, without a key, that lets all pages in."""
    with serving(backend, cors=("*",), slot_state=True) as url, http(url) as client:
        refused = client.request(method, path, json={}, headers=headers)
        assert refused.status_code == 403, refused.text
        assert client.post("/v1/completions", json=ASKED, headers=headers).status_code == 200
