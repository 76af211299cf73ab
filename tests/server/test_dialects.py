"""Each dialect frames its own streams, errors and silence; the server needs a Backend, no model."""

import inspect
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

import gemloom
from conftest import until
from fake_backend import FakeBackend
from gemloom.engine.generation import Usage
from gemloom.engine.request import Piece
from gemloom.errors import EngineError, GemloomError, QueueFullError, WeightsError
from gemloom.server.adapters import AdapterFile
from gemloom.server.app import create_app
from gemloom.server.backend import Backend
from gemloom.server.dialect_routes import DIALECTS
from gemloom.server.service import Settings
from http_serving import events, http, serving

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
}
ENDS_WITH_DONE = {"/v1/chat/completions": True, "/v1/completions": True, "/v1/responses": False}
each = pytest.mark.parametrize("path", BODIES)


def public(kind: type) -> Iterator[str]:
    return (name for name in vars(kind) if not name.startswith("_"))


@pytest.mark.parametrize("kind", [gemloom.Model, FakeBackend])
def test_a_backend_has_all_that_the_server_uses(kind: type) -> None:
    for name in public(Backend):
        wanted = getattr(Backend, name)
        if inspect.isfunction(wanted):
            own = inspect.signature(getattr(kind, name))
            assert list(own.parameters) == list(inspect.signature(wanted).parameters), name
        elif kind is FakeBackend:
            assert hasattr(FakeBackend(), name)


# -- streams -------------------------------------------------------------------------------------


def text_of(event: Any) -> str:
    """The text that an event of any dialect adds."""
    if event == "[DONE]":
        return ""
    if "type" in event:
        return event["delta"] if event["type"] == "response.output_text.delta" else ""
    choices = event["choices"]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def whole_text(body: Any) -> str:
    if "output" in body:
        return "".join(item["content"][0]["text"] for item in body["output"])
    choice = body["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@each
def test_a_stream_says_what_the_whole_answer_says(path: str) -> None:
    with serving(FakeBackend("hel", "lo ", "", "wörld")) as url, http(url) as client:
        whole = client.post(path, json=BODIES[path])
        assert whole_text(whole.json()) == "hello wörld"
        stream = client.post(path, json=BODIES[path] | {"stream": True})
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    told = list(events(iter(stream.text.splitlines())))
    assert "".join(map(text_of, told)) == "hello wörld"
    assert (told[-1] == "[DONE]") == ENDS_WITH_DONE[path]


@each
def test_pieces_come_as_they_are_said(path: str) -> None:
    backend = FakeBackend()
    with (
        serving(backend) as url,
        http(url) as client,
        client.stream("POST", path, json=BODIES[path] | {"stream": True}) as stream,
    ):
        until(lambda: backend.answers)
        (answer,) = backend.answers
        coming = events(stream.iter_lines())
        for text in ("one", "two", "three"):
            answer.say(text)
            while (got := text_of(next(coming))) == "":
                pass
            assert got == text
        answer.say("", "stop")
        assert "".join(map(text_of, coming)) == ""


@each
def test_a_silent_stream_shows_that_it_lives(path: str) -> None:
    backend = FakeBackend()
    with (
        serving(backend, beat=0.02) as url,
        http(url) as client,
        client.stream("POST", path, json=BODIES[path] | {"stream": True}) as stream,
    ):
        lines = stream.iter_lines()
        for _ in range(3):
            while next(lines) != ": keep-alive":
                pass
            assert next(lines) == ""
        backend.answers[0].say("here", "stop")
        assert "here" in "".join(map(text_of, events(lines)))


# -- errors --------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize(
    ("error", "said"),
    [(EngineError("the card is gone"), "the card is gone"), (RuntimeError("secret"), "internal")],
)
def test_an_error_is_the_last_event_of_a_stream(path: str, error: Any, said: str) -> None:
    backend = FakeBackend()
    with (
        serving(backend) as url,
        http(url) as client,
        client.stream("POST", path, json=BODIES[path] | {"stream": True}) as stream,
    ):
        until(lambda: backend.answers)
        backend.answers[0].say("begun")
        backend.answers[0].fail(error)
        assert stream.status_code == 200
        *told, last = events(stream.iter_lines())
    assert "".join(map(text_of, told)) == "begun"
    if path == "/v1/responses":
        assert last["type"] == "response.failed"
        last = last["response"]
    assert said in last["error"]["message"]
    assert "secret" not in json.dumps(last)


@each
def test_an_error_before_the_end_is_the_whole_answer(path: str) -> None:
    backend = FakeBackend()
    answers: list[httpx.Response] = []
    with serving(backend) as url, http(url) as client:
        asking = threading.Thread(
            target=lambda: answers.append(client.post(path, json=BODIES[path]))
        )
        asking.start()
        until(lambda: backend.answers)
        backend.answers[0].say("begun")
        backend.answers[0].fail(EngineError("the card is gone"))
        asking.join()
        backend.refusal = QueueFullError("no room")
        answers.append(client.post(path, json=BODIES[path] | {"stream": True}))
    assert [answer.status_code for answer in answers] == [EngineError.status, 429]
    assert [answer.json()["error"]["message"] for answer in answers] == [
        "the card is gone",
        "no room",
    ]


@each
@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_ends_the_run(path: str, stream: bool) -> None:
    backend = FakeBackend()
    data = json.dumps(BODIES[path] | {"stream": stream}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n"
    with serving(backend) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(head.encode() + data)
            until(lambda: backend.answers)
            backend.answers[0].say("nobody hears this")
            assert not backend.answers[0].cancelled
        until(lambda: backend.answers[0].cancelled)


# -- a dialect of another kind -------------------------------------------------------------------


class Lines:
    """Answers in lines of JSON, in which nothing may stand for silence."""

    media_type = "application/x-ndjson"
    done = b'{"over":true}\n'

    def __init__(self) -> None:
        self.beats = 0
        self.text = ""

    @property
    def beat(self) -> bytes:
        self.beats += 1
        return b""

    def encode(self, event: dict[str, Any]) -> bytes:
        return json.dumps(event).encode() + b"\n"

    def begin(self) -> list[dict[str, Any]]:
        return []

    def push(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        self.text += piece.text
        return [{"said": piece.text}]

    def end(self, usages: Any) -> list[dict[str, Any]]:
        return []

    def body(self, usages: list[Usage]) -> dict[str, Any]:
        return {"all": self.text, "tokens": usages[0].completion_tokens}

    def failed(self, error: GemloomError) -> dict[str, Any]:
        return {"wrong": str(error)}


LINES = "/v1/lines"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    """The answer of a dialect of its own; it reads what /v1/completions reads."""
    answer = Lines()
    dialect = replace(
        DIALECTS["/completions"],
        name="lines",
        answer=lambda *_: answer,
        error=lambda error: {"wrong": str(error)},
    )
    monkeypatch.setitem(DIALECTS, "/lines", dialect)
    return answer


def test_a_dialect_frames_its_own_stream(lines: Lines) -> None:
    backend = FakeBackend()
    with (
        serving(backend, beat=0.02) as url,
        http(url) as client,
        client.stream("POST", LINES, json={"prompt": "a", "stream": True}) as stream,
    ):
        assert stream.headers["content-type"] == "application/x-ndjson"
        until(lambda: lines.beats > 2)  # silence, of which it tells nothing
        backend.answers[0].say("one")
        backend.answers[0].say("two", "stop")
        told = [json.loads(line) for line in stream.iter_lines()]
    assert told == [{"said": "one"}, {"said": "two"}, {"over": True}]


def test_a_dialect_says_its_own_errors(lines: Lines) -> None:
    backend = FakeBackend()
    with serving(backend, api_keys=("k",)) as url, http(url) as client:
        assert list(client.post(LINES, json={"prompt": "a"}).json()) == ["wrong"]  # no key
        key = {"Authorization": "Bearer k"}
        assert list(client.post(LINES, content=b"{", headers=key).json()) == ["wrong"]
        assert list(client.get(LINES, headers=key).json()) == ["wrong"]  # not with this method
        assert list(client.get("/v1/other", headers=key).json()) == ["error"]
        body = {"prompt": "a", "stream": True}
        with client.stream("POST", LINES, json=body, headers=key) as stream:
            until(lambda: backend.answers)
            backend.answers[0].fail(EngineError("the card is gone"))
            assert json.loads(stream.read()) == {"wrong": "the card is gone"}


def test_a_dialect_answers_in_one_piece(lines: Lines) -> None:
    with serving(FakeBackend("one", "two")) as url, http(url) as client:
        for path in (LINES, LINES.removeprefix("/v1")):
            lines.text = ""
            assert client.post(path, json={"prompt": "a"}).json() == {"all": "onetwo", "tokens": 3}


# -- the backend that is served --------------------------------------------------------------------


def test_a_backend_and_its_adapters_are_replaced_together() -> None:
    first, second, broken = FakeBackend(), FakeBackend(), FakeBackend()
    app = create_app(first, Settings(name="tiny", adapters={"law": AdapterFile("law.gguf")}))
    service = app.state.service
    service._take(second)
    assert service.backend is second
    assert [info.name for info in second.adapters.list()] == ["law"]
    service.adapters.unload("law")
    assert [info.name for info in first.adapters.list()] == ["law"]
    service.adapters.load("law", None)

    def fails(*_: Any) -> Any:
        raise WeightsError("the file is gone")

    broken.adapters.load = fails  # type: ignore[method-assign]
    with pytest.raises(WeightsError, match="is gone"):
        service._take(broken)
    assert service.backend is second
    assert [info.name for info in service.adapters.there()] == ["law"]
    service.close()
    assert second.closed
    assert not first.closed
