"""Whatever one client sends, the others go on: no body stops a stream or takes much memory."""

import http.client
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import tiny
from conftest import until
from watched_server import Watched, watched

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc"),
]

SIZE = 31 << 20  # bytes: just what the server takes by default
LONGEST = 0.25  # seconds that the others may wait
SLACK = 64 << 20  # bytes that small bodies may take: pools of memory are not given back at once
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HI = b'"messages":[{"role":"user","content":"a"}]'
A = b'"prompt":"a","max_tokens":1'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    path.write_bytes(tiny.gguf_bytes(tiny.VARIANTS["e2b"]))
    with watched(path) as server:
        yield server


def many(unit: bytes, count: int = 0, last: bytes = b"") -> bytes:
    """A list of so many units, or of as many as fit."""
    count = count or SIZE // (len(unit) + 1)
    return b"[" + (unit + b",") * (count - 1) + (last or unit) + b"]"


def keys(count: int, value: bytes = b"1") -> bytes:
    return b"{" + b",".join(b'"%d":%s' % (i, value) for i in range(count)) + b"}"


def text(unit: str) -> bytes:
    one = json.dumps(unit, ensure_ascii=False).encode()[1:-1]
    return b'"' + one * (SIZE // len(one)) + b'"'


def content(field: bytes) -> bytes:
    return b'{"messages":[{"role":"user","content":%s}]}' % field


def schema(field: bytes) -> bytes:
    form = b'{"type":"json_schema","json_schema":{"schema":%s}}' % field
    return b'{%s,"response_format":%s}' % (A, form)


# Names of shapes, with the path they go to, the status they are to have, and the body.
BODIES: dict[str, tuple[str, int, Callable[[], bytes]]] = {
    "words": (COMPLETIONS, 400, lambda: b'{"prompt":%s}' % text("a ")),
    "one word": (COMPLETIONS, 400, lambda: b'{"prompt":%s}' % text("a")),
    "newlines": (COMPLETIONS, 400, lambda: b'{"prompt":%s}' % text("\n")),
    "wide letters": (COMPLETIONS, 400, lambda: b'{"prompt":%s}' % text("界")),
    "one wide letter": (
        COMPLETIONS, 400, lambda: b'{"prompt":"%s"}' % (b"a" * SIZE + "🦙".encode()),
    ),
    "texts": (COMPLETIONS, 413, lambda: b'{"prompt":%s}' % many(b'"a"')),
    "long texts": (COMPLETIONS, 400, lambda: b'{"prompt":%s}' % many(b'"%s"' % (b"a " * 120_000))),
    "ids": (COMPLETIONS, 413, lambda: b'{"prompt":%s}' % many(b"7")),
    "ids within the limit": (COMPLETIONS, 400, lambda: b'{"prompt":%s}' % many(b"7", 290_000)),
    "lists of ids": (COMPLETIONS, 400, lambda: b'{"prompt":%s}' % many(b"[7]", 140_000)),
    "a wrong id at the end": (
        COMPLETIONS, 400, lambda: b'{"prompt":%s}' % many(b"7", 290_000, b'"x"'),
    ),
    "openers in a chat": (CHAT, 400, lambda: content(text("<"))),
    "words in a chat": (CHAT, 400, lambda: content(text("a "))),
    "openers that fit": (CHAT, 400, lambda: content(b'"%s"' % (b"<" * 15_000))),
    "words in /apply-template": ("/apply-template", 400, lambda: content(text("a "))),
    "words in /tokenize": (
        "/tokenize", 200, lambda: b'{"content":"%s"}' % (b"a " * (4 << 20)),
    ),
    "tokens in /tokenize": (
        "/tokenize", 200,
        lambda: b'{"with_pieces":true,"content":"%s"}' % (b"<bos>" * (1 << 18)),
    ),
    "words in /v1/embeddings": ("/v1/embeddings", 400, lambda: b'{"input":%s}' % text("a ")),
    "words in /v1/responses": (RESPONSES, 400, lambda: b'{"input":%s}' % text("a ")),
    "ids to /detokenize": ("/detokenize", 200, lambda: b'{"tokens":%s}' % many(b"7", 290_000)),
    "lists that are ignored": (COMPLETIONS, 413, lambda: b'{%s,"user":%s}' % (A, many(b"[]"))),
    "lists within the limit": (
        COMPLETIONS, 200, lambda: b'{%s,"user":%s}' % (A, many(b"[]", 140_000)),
    ),
    "objects that are ignored": (COMPLETIONS, 413, lambda: b'{%s,"user":%s}' % (A, many(b"{}"))),
    "keys that are ignored": (COMPLETIONS, 200, lambda: b'{%s,"user":%s}' % (A, keys(140_000))),
    "keys nobody knows": (COMPLETIONS, 400, lambda: keys(140_000)),
    "keys nobody knows beside others": (
        COMPLETIONS, 200, lambda: b"{%s,%s" % (A, keys(140_000)[1:]),
    ),
    "keys nobody knows in a message": (
        CHAT, 400,
        lambda: b'{"messages":[{"role":"user","content":"a",%s]}' % keys(100_000)[1:],
    ),
    "a million keys": (COMPLETIONS, 413, lambda: keys(1_000_000)),
    "depth": (COMPLETIONS, 413, lambda: b'{"user":' + b"[" * SIZE),
    "blanks": (COMPLETIONS, 200, lambda: b"{%s%s}" % (A, b" " * SIZE)),
    "escapes": (COMPLETIONS, 400, lambda: b'{"prompt":"%s"}' % (b'\\"' * (SIZE // 2))),
    "digits": (COMPLETIONS, 413, lambda: b'{%s,"seed":%s}' % (A, b"1" * SIZE)),
    "long numbers": (COMPLETIONS, 413, lambda: b'{%s,"user":%s}' % (A, many(b"1" * 4_000))),
    "broken at the end": (COMPLETIONS, 400, lambda: b'{"user":"%s' % (b"a" * SIZE)),
    "biases": (COMPLETIONS, 413, lambda: b'{%s,"logit_bias":%s}' % (A, keys(1_000_000))),
    "biases within the limit": (
        COMPLETIONS, 400, lambda: b'{%s,"logit_bias":%s}' % (A, keys(140_000)),
    ),
    "wrong biases": (
        COMPLETIONS, 400, lambda: b'{%s,"logit_bias":%s}' % (A, keys(140_000, b'"x"')),
    ),
    "wrong fields inside": (
        COMPLETIONS, 200, lambda: b'{%s,"stream_options":%s}' % (A, keys(140_000)),
    ),
    "adapters": (COMPLETIONS, 400, lambda: b'{%s,"adapters":%s}' % (A, keys(140_000))),
    "adapters by number": (
        COMPLETIONS, 400, lambda: b'{%s,"lora":%s}' % (A, many(b'{"id":1,"scale":1.0}', 50_000)),
    ),
    "stops": (COMPLETIONS, 400, lambda: b'{%s,"stop":%s}' % (A, many(b'"a"', 290_000))),
    "a long stop": (COMPLETIONS, 400, lambda: b'{%s,"stop":%s}' % (A, text("a"))),
    "messages": (
        CHAT, 400, lambda: b'{"messages":%s}' % many(b'{"role":"user","content":"a"}', 50_000),
    ),
    "tools": (CHAT, 400, lambda: b'{%s,"tools":%s}' % (HI, many(b'{"type":"function"}', 90_000))),
    "content parts": (CHAT, 400, lambda: content(many(b'{"type":"text","text":"a"}', 50_000))),
    "calls and results": (
        CHAT, 400, lambda: b'{"messages":[{"role":"assistant","tool_calls":%s},%s]}' % (
            many(b'{"type":"function","id":"x","function":{"name":"f","arguments":"{}"}}', 15_000),
            many(b'{"role":"tool","content":"a","tool_call_id":"y"}', 10_000)[1:-1],
        ),
    ),
    "arguments in a text": (
        CHAT, 413, lambda: b'{"messages":[{"role":"assistant","tool_calls":[{"type":"function",'
        b'"function":{"name":"f","arguments":"{\\"a\\":%s}"}}]}]}' % many(b"[]"),
    ),
    "a long role": (CHAT, 400, lambda: b'{"messages":[{"role":%s,"content":"a"}]}' % text("a")),
    "a long model": (COMPLETIONS, 404, lambda: b'{%s,"model":%s}' % (A, text("a"))),
    "template variables": (
        CHAT, 400, lambda: b'{%s,"chat_template_kwargs":{"x":%s}}' % (HI, text("<")),
    ),
    "a regex": (COMPLETIONS, 400, lambda: b'{%s,"regex":%s}' % (A, text("a"))),
    "a regex that explodes": (
        COMPLETIONS, 200, lambda: b'{%s,"regex":"%s"}' % (A, b"(a|aa)*" * 900),
    ),
    "many answers with long stops": (
        COMPLETIONS, 200, lambda: b'{"prompt":"a","max_tokens":1,"n":16,"stop":%s}' % many(
            b'"%s"' % (b"ab" * 499), 64,
        ),
    ),
    "a grammar": (COMPLETIONS, 400, lambda: b'{%s,"grammar":%s}' % (A, text("a"))),
    "an enum": (COMPLETIONS, 400, lambda: schema(b'{"enum":%s}' % many(b'"a"', 100_000))),
    "a long enum": (COMPLETIONS, 400, lambda: schema(b'{"enum":[%s]}' % text("a"))),
    "a schema of many choices": (
        COMPLETIONS, 200, lambda: schema(b'{"anyOf":%s}' % many(b'{"type":"string"}', 2_000)),
    ),
}  # fmt: skip


def post(port: int, path: str, body: bytes) -> tuple[int, int]:
    """The status, and the length of what was answered."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.putrequest("POST", path)
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    connection.send(memoryview(body))
    answer = connection.getresponse()
    length = 0
    while part := answer.read(1 << 16):
        length += len(part)
    connection.close()
    return answer.status, length


class Stream:
    """Another client: it always has a stream open, and counts what comes."""

    def __init__(self, port: int) -> None:
        self.lines, self._port, self._ended = 0, port, False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        body = json.dumps({"prompt": "b", "stream": True, "max_tokens": 900})
        while not self._ended:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
            connection.request("POST", COMPLETIONS, body)
            for _ in connection.getresponse():
                self.lines += 1
                if self._ended:
                    break
            connection.close()

    def close(self) -> None:
        self._ended = True
        self._thread.join()


@pytest.fixture(scope="module")
def stream(server: Watched) -> Iterator[Stream]:
    stream = Stream(server.port)
    yield stream
    stream.close()


@pytest.mark.parametrize("name", BODIES)
def test_no_body_stops_the_others(server: Watched, stream: Stream, name: str) -> None:
    path, status, make = BODIES[name]
    body = make()
    until(lambda: stream.lines)
    server.report()
    before = stream.lines
    answered, length = post(server.port, path, body)
    told = server.report()
    assert answered == status
    assert length < 1_000 or status == 200
    assert told["thread"] < LONGEST
    assert told["loop"] < LONGEST
    # Python makes a text wide at its first wide letter: four bytes each, beside those it had.
    times = 4 if body.isascii() else 8
    assert told["peak"] < times * len(body) + SLACK
    until(lambda: stream.lines > before)


def test_several_at_once_do_not_stop_the_others(server: Watched, stream: Stream) -> None:
    names = ("words", "lists of ids", "escapes", "keys that are ignored", "openers in a chat")
    bodies = [(BODIES[name][0], BODIES[name][2]()) for name in names]
    until(lambda: stream.lines)
    server.report()
    with ThreadPoolExecutor(len(bodies)) as pool:
        statuses = list(pool.map(lambda asked: post(server.port, *asked)[0], bodies))
    told = server.report()
    assert set(statuses) <= {200, 400}
    # Those that tokenize run beside the one that parses, and their time counts too.
    assert told["thread"] < 2 * LONGEST
    assert told["loop"] < 2 * LONGEST


def test_tiny_chunks_do_not_stop_the_others(server: Watched) -> None:
    """A body in chunks of one byte: each is an event of its own."""
    chunks = b"1\r\n \r\n" * 100_000
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
    server.report()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.sendall(head.encode() + b"Connection: close\r\n\r\n" + chunks + b"0\r\n\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 400")
    told = server.report()
    assert told["thread"] < LONGEST
    assert told["loop"] < LONGEST


def test_who_does_not_read_does_not_stop_the_others(server: Watched) -> None:
    body = b'{"prompt":"a","stream":true,"n":16,"logprobs":20,"max_tokens":200}'
    head = b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    server.report()
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", server.port))
        lazy.sendall(head % (COMPLETIONS.encode(), len(body)) + body)
        assert post(server.port, COMPLETIONS, b"{%s}" % A)[0] == 200
    told = server.report()
    assert told["thread"] < LONGEST
    assert told["loop"] < LONGEST
    assert told["peak"] < SLACK
