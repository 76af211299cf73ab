"""A client that does not ask, does not finish or does not read is let go of; others are not."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

import gemloom
import tiny
from conftest import paced, until
from gemloom.server import connections, guard
from http_serving import http, serving

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def model() -> Iterator[gemloom.Model]:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    with gemloom.load(data, kv_type="f32", context=1024, slots=2, threads=1) as model:
        yield model


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """All limits so short that a test can wait for them."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.3)
    monkeypatch.setattr(guard, "BODY_SILENCE", 0.3)
    return monkeypatch


def connected(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60)


def told(client: socket.socket) -> bytes:
    """All that comes until the server closes, or breaks off."""
    parts = []
    with suppress(ConnectionResetError):
        parts.extend(iter(lambda: client.recv(1 << 16), b""))
    return b"".join(parts)


def request(path: str, body: bytes, length: int | None = None) -> bytes:
    count = len(body) if length is None else length
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {count}\r\n\r\n".encode() + body


def error_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_a_connection_that_never_asks_is_closed(
    model: gemloom.Model, limits: pytest.MonkeyPatch
) -> None:
    with serving(model) as url, connected(url) as client:
        assert told(client) == b""


@pytest.mark.parametrize("sent", [b"G", b"GET /health HTTP/1.1\r\nHost: a\r\n"])
def test_half_a_head_is_a_408(
    model: gemloom.Model, limits: pytest.MonkeyPatch, sent: bytes
) -> None:
    with serving(model) as url, connected(url) as client:
        client.sendall(sent)
        assert error_of(told(client)) == (408, "request_timeout")


@pytest.mark.parametrize(
    "sent", [b"\r\n", b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\n: a\r\n\r\n"]
)
def test_what_is_no_http_is_a_400(model: gemloom.Model, sent: bytes) -> None:
    with serving(model) as url, connected(url) as client:
        client.sendall(sent)
        assert error_of(told(client)) == (400, "invalid_request")


def test_a_head_that_comes_slowly_is_not_waited_for(
    model: gemloom.Model, limits: pytest.MonkeyPatch
) -> None:
    """Some bytes now and then make no difference."""
    with serving(model) as url, connected(url) as client:
        client.settimeout(0.01)
        answer = b""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                client.sendall(b"GET /health HTTP/1.1\r\nX: a" if not answer else b"a")
                part = client.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError:
                break
            if not part:
                break
            answer += part
        assert time.monotonic() < end
        assert not answer or error_of(answer) == (408, "request_timeout")


def test_half_a_body_is_a_408(model: gemloom.Model, limits: pytest.MonkeyPatch) -> None:
    with serving(model) as url, connected(url) as client:
        client.sendall(request(COMPLETIONS, b"{", 100))
        assert error_of(told(client)) == (408, "request_timeout")


def test_the_rest_of_a_body_that_was_refused_is_not_waited_for(
    model: gemloom.Model, limits: pytest.MonkeyPatch
) -> None:
    with serving(model, max_body=1000) as url, connected(url) as client:
        client.sendall(request(COMPLETIONS, b"{", 1 << 30))
        assert error_of(told(client)) == (413, "body_too_large")


def test_requests_on_one_connection_go_on(model: gemloom.Model, limits: pytest.MonkeyPatch) -> None:
    """The time counts between requests, and not over all of them."""
    with serving(model) as url, http(url) as client:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            assert client.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_who_waits_for_an_answer_is_not_cut_off(
    model: gemloom.Model, limits: pytest.MonkeyPatch, stream: bool
) -> None:
    body = {"prompt": "a", "max_tokens": 2, "stream": stream}
    with serving(model) as url, http(url) as client, paced(model) as allowed:
        later = threading.Timer(1, allowed.release, [2])
        later.start()
        answer = client.post(COMPLETIONS, json=body)
        later.join()
    assert answer.status_code == 200
    assert "finish_reason" in answer.text


def test_an_answer_that_nobody_reads_is_dropped(
    model: gemloom.Model, limits: pytest.MonkeyPatch
) -> None:
    body = json.dumps({"content": "a " * 500_000}).encode()
    with serving(model, 4096) as url, socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        lazy.sendall(request("/tokenize", body))
        with http(url) as client:
            key = 'gemloom_http_requests_total{path="/tokenize",status="200"}'
            until(lambda: key in client.get("/metrics").text)  # it has ended
        lazy.settimeout(60)
        assert not told(lazy).endswith(b"0\r\n\r\n")


def test_a_connection_too_many_is_told(
    model: gemloom.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    with serving(model) as url, ExitStack() as stack:
        kept = [stack.enter_context(connected(url)) for _ in range(3)]
        with connected(url) as client:
            assert error_of(told(client)) == (503, "too_many_connections")
        kept[0].sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b'{"status":"ok"}' in told(kept[0])
        until(lambda: free(url))


def free(url: str) -> bool:
    """Whether a place is there again."""
    with connected(url) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        try:
            return b'{"status":"ok"}' in told(client)
        except ConnectionResetError:  # it was refused before it had asked
            return False


def test_tiny_chunks_leave_others_their_turn(model: gemloom.Model) -> None:
    """A body of chunks of one byte each is read like any other."""
    body = b'{"prompt":"a","max_tokens":1}' + b" " * 100_000
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
    with serving(model) as url, connected(url) as client:
        client.sendall(head.encode() + b"Connection: close\r\n\r\n" + chunks)
        assert told(client).startswith(b"HTTP/1.1 200")
