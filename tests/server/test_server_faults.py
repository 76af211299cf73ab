"""What the server does when it is misused, hung up on, overfull, late, broken or going down."""

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from prometheus_client.parser import text_string_to_metric_families
from schemathesis.checks import not_a_server_error

import gemloom
import tiny
from conftest import Load, paced, until
from gemloom.server import streams
from gemloom.server.app import create_app
from gemloom.server.service import Settings
from gemloom.testing import parts_of
from http_serving import cancelled, endless, events, serving
from http_serving import http as connect

HI = [{"role": "user", "content": "hello"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REQUESTS = "gemloom_http_requests_total"


@pytest.fixture(scope="module")
def model() -> Iterator[gemloom.Model]:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    with gemloom.load(data, kv_type="f32", context=128, slots=2, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def url(model: gemloom.Model) -> Iterator[str]:
    with serving(model, max_body=1 << 20) as url:
        yield url


# -- requests that are wrong ---------------------------------------------------------------------

DEEP = {"type": "object", "properties": {"a": {"type": "array", "items": {}}}}
for _ in range(60):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (CHAT, b'{"messages": [', 400, "invalid_request"),
        (CHAT, b"\x00\xff", 400, "invalid_request"),
        (CHAT, b"", 400, "invalid_request"),
        (CHAT, {}, 400, "invalid_field"),
        (CHAT, {"messages": []}, 400, "invalid_request"),
        (CHAT, {"messages": [{"role": "boss", "content": "a"}]}, 400, "invalid_request"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "invalid_request"),
        (CHAT, {"messages": HI, "audio": {}}, 400, "invalid_field"),
        (CHAT, {"messages": HI, "temperature": 1e9}, 400, "invalid_option"),
        (CHAT, {"messages": HI, "stop": "a" * 1_001}, 400, "invalid_option"),
        (CHAT, {"messages": HI, "logit_bias": {"999999": 1}}, 400, "invalid_option"),
        (CHAT, {"messages": HI, "reasoning_effort": "huge"}, 400, "invalid_option"),
        (CHAT, {"messages": HI, "tool_choice": "required"}, 400, "invalid_field"),
        (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, 400, "invalid_request"),
        (CHAT, {"messages": HI, "regex": "("}, 400, "invalid_request"),
        (CHAT, {"messages": HI, "regex": "a", "grammar": "b"}, 400, "invalid_request"),
        (CHAT, {"messages": HI, "chat_template_kwargs": {"messages": 1}}, 400, "invalid_option"),
        (
            CHAT,
            {
                "messages": HI,
                "response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}},
            },
            400,
            "invalid_request",
        ),
        (CHAT, {"messages": HI, "model": "gpt-4o"}, 404, "model_not_found"),
        (COMPLETIONS, {"prompt": "a" * 500}, 400, "context_length_exceeded"),
        (COMPLETIONS, {"prompt": ""}, 400, "invalid_request"),
        (COMPLETIONS, {"prompt": [10**30]}, 400, "invalid_option"),
        (COMPLETIONS, {"prompt": "a", "echo": True}, 400, "invalid_field"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "invalid_field"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, 400, "invalid_field"),
        ("/v1/embeddings", {"input": "a", "dimensions": 8}, 400, "invalid_field"),
        ("/v1/embeddings", {"input": []}, 400, "invalid_field"),
        ("/v1/responses", {"input": "a", "previous_response_id": "x"}, 400, "invalid_field"),
        ("/detokenize", {"tokens": [-1]}, 400, "invalid_option"),
        ("/tokenize", {"content": 1}, 400, "invalid_field"),
        ("/slots?action=save", b"", 403, "forbidden"),
        ("/v1/nothing", {}, 404, "not_found"),
        ("/health", {}, 405, "invalid_request"),
    ],
)
def test_errors_have_one_shape(
    url: str, path: str, body: dict[str, Any] | bytes, status: int, code: str
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with connect(url) as client:
        answer = client.post(path, content=data)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, code), error
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert "\n" not in error["message"]
        assert error["type"] == ("permission_error" if status == 403 else "invalid_request_error")
        assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("path", ["/health", "/", "/v1/models", "/metrics", "/openapi.json"])
def test_head_is_get_without_a_body(url: str, path: str) -> None:
    with connect(url) as client:
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
        assert client.head("/v1/completions").status_code == 405


def test_a_slash_too_many_still_lists_the_models(url: str) -> None:
    with connect(url) as client:
        assert client.get("/v1/models/").json() == client.get("/v1/models").json()


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_leaves_the_connection_usable(url: str, declared: bool) -> None:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    body = json.dumps({"prompt": "a" * (10 << 20)}).encode()
    parts = [body[start : start + 65536] for start in range(0, len(body), 65536)]
    connection.request("POST", COMPLETIONS, body if declared else iter(parts))
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["error"]["code"] == "body_too_large"
    before = connection.sock
    connection.request("POST", COMPLETIONS, json.dumps({"prompt": "a", "max_tokens": 1}))
    assert connection.getresponse().status == 200
    assert connection.sock is before
    connection.close()


def test_keys(model: gemloom.Model) -> None:
    with serving(model, api_keys=("one", "twö")) as url, connect(url) as client:
        for headers in (
            {},
            {"Authorization": "Bearer on"},
            {"Authorization": "one"},
            {"Authorization": "Basic one"},
            {"X-Api-Key": "three"},
        ):
            for path in (CHAT, "/v1/embeddings", "/tokenize"):
                answer = client.post(path, json={"messages": HI}, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/metrics", headers=headers).status_code == 401
        for key in ("Bearer one", "bearer one", "Bearer twö"):
            headers = {"Authorization": key.encode()}
            assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/v1/models", headers={"X-Api-Key": "one"}).status_code == 200
        assert client.get("/health").status_code == client.get("/").status_code == 200


def test_pages_of_other_sites_are_kept_out_unless_asked_for(model: gemloom.Model) -> None:
    other = {"Origin": "https://other.example"}
    body = {"prompt": "a", "max_tokens": 1}
    with serving(model) as url, connect(url) as client:
        assert client.post(COMPLETIONS, json=body, headers=other).status_code == 403
        assert client.post(COMPLETIONS, json=body, headers={"Origin": "null"}).status_code == 403
        own = client.post(COMPLETIONS, json=body, headers={"Origin": url})
        assert own.status_code == 200
        assert "access-control-allow-origin" not in own.headers
    with serving(model, cors=("https://other.example",)) as url, connect(url) as client:
        answer = client.post(COMPLETIONS, json=body, headers=other)
        assert answer.headers["access-control-allow-origin"] == "https://other.example"
        asked = {**other, "Access-Control-Request-Method": "POST"}
        assert client.options(COMPLETIONS, headers=asked).status_code == 200
        third = {"Origin": "https://third.example"}
        assert client.post(COMPLETIONS, json=body, headers=third).status_code == 403


def test_a_site_whose_name_means_this_machine_is_kept_out(model: gemloom.Model) -> None:
    """DNS rebinding: Origin and Host agree, and are the site's."""
    body = {"prompt": "a", "max_tokens": 1}
    rebound = {"Host": "evil.example:80", "Origin": "http://evil.example:80"}
    own = ("localhost", "127.0.0.1", "::1")
    with serving(model, hosts=own) as url, connect(url) as client:
        for host in ("evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example",
                     "evil.example:80@localhost", "", "[::1", "[::1].evil"):  # fmt: skip
            answer = client.post(COMPLETIONS, json=body, headers={"Host": host})
            assert (answer.status_code, host) == (403, host)
            assert answer.json()["error"]["code"] == "forbidden"
            assert client.get("/metrics", headers={"Host": host}).status_code == 403
        assert client.post(COMPLETIONS, json=body, headers=rebound).status_code == 403
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080"):
            assert client.post(COMPLETIONS, json=body, headers={"Host": host}).status_code == 200
    with serving(model, hosts=own, api_keys=("k",)) as url, connect(url) as client:
        named = {"Host": "behind.a.proxy", "Authorization": "Bearer k"}
        assert client.get("/v1/models", headers=named).status_code == 200


def test_the_page_runs_no_scripts_but_its_own(url: str) -> None:
    with connect(url) as client:
        page = client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        for path in ("/../app.py", "/%2e%2e/app.py", "/page/index.html", "/docs"):
            assert client.get(path).status_code == 404


# -- requests that end early ---------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_hang_up_cancels(url: str, model: gemloom.Model, stream: bool) -> None:
    body = {"prompt": "a", "logit_bias": endless(model), "stream": stream}
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    before = model.stats().steps
    with paced(model, 5):
        connection.request("POST", COMPLETIONS, json.dumps(body))
        if stream:
            connection.getresponse().read(10)
        until(lambda: model.stats().steps == before + 5)
        assert not cancelled(model)
        assert connection.sock
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        until(lambda: cancelled(model))
    until(lambda: not model.stats().running)
    assert model.stats().steps == before + 5


def test_a_request_that_takes_too_long(model: gemloom.Model) -> None:
    body = {"prompt": "a", "logit_bias": endless(model)}
    with serving(model, timeout=0.2) as url, connect(url) as client:
        with paced(model, 3):
            answer = client.post(COMPLETIONS, json=body)
            assert answer.status_code == 408
            assert answer.json()["error"]["code"] == "request_timeout"
        with paced(model, 3):
            text = client.post(COMPLETIONS, json=body | {"stream": True}).text
        *told, last = events(iter(text.splitlines()))
        assert len(told) <= 3 and all(event["choices"] for event in told)
        assert last["error"]["code"] == "request_timeout"
        until(lambda: not model.stats().running)


@contextmanager
def unread(url: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A client that has asked and reads nothing."""
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        lazy.sendall(head.encode() + data)
        yield lazy


def answered(client: httpx.Client) -> float:
    """Requests that have ended, however they did."""
    counts = samples(client.get("/metrics").text)
    return sum(n for key, n in counts.items() if key[:2] == (REQUESTS, COMPLETIONS))


def test_a_client_that_does_not_read_stalls_nobody(model: gemloom.Model) -> None:
    asked = {"prompt": "a", "stream": True, "n": 4, "logprobs": 20, "logit_bias": endless(model)}
    with serving(model, 4096) as url, connect(url) as client, unread(url, asked):
        until(lambda: model.stats().running)
        answer = client.post(COMPLETIONS, json={"prompt": "b", "max_tokens": 2})
        assert answer.json()["usage"]["completion_tokens"] <= 2
        until(lambda: not model.stats().running)  # it is computed, read or not
        assert answered(client) == 1


def test_a_client_that_does_not_read_is_given_up(
    model: gemloom.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A little after the limit."""
    monkeypatch.setattr(streams, "_HANG_GRACE", 0.1)
    asked = {"prompt": "a", "stream": True, "n": 4, "logprobs": 20, "logit_bias": endless(model)}
    with (
        serving(model, 4096, timeout=1) as url,
        connect(url) as client,
        unread(url, asked) as lazy,
    ):
        until(lambda: answered(client) == 1)
        lazy.settimeout(60)
        assert not b"".join(iter(lambda: lazy.recv(1 << 20), b"")).endswith(b"[DONE]\n\n")


def test_a_body_that_does_not_come(model: gemloom.Model) -> None:
    with serving(model, timeout=0.2) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        connection.putrequest("POST", COMPLETIONS)
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")
        assert connection.getresponse().status == 408
        connection.close()


def test_a_queue_that_is_full(load: Load) -> None:
    model = load("e2b", slots=1, queue=1, context=256)
    body = {"prompt": "a", "logit_bias": endless(model), "stream": True}
    with serving(model) as url, connect(url) as client:
        with paced(model, 1), client.stream("POST", COMPLETIONS, json=body):
            until(lambda: model.stats().running)
            with client.stream("POST", COMPLETIONS, json=body):
                until(lambda: model.stats().waiting)
                answer = client.post(COMPLETIONS, json=body)
                assert answer.status_code == 429
                assert answer.headers["retry-after"] == "1"
                assert answer.json()["error"]["code"] == "queue_full"
        until(lambda: not model.stats().running and not model.stats().waiting)


def test_a_fault_reaches_everyone(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("e2b", slots=2)
    body = {"prompt": "a", "logit_bias": endless(model), "stream": True}
    failing, real = False, parts_of(model).program.run

    def run(*args: Any, **options: Any) -> Any:
        if failing:
            raise MemoryError("no memory left")
        return real(*args, **options)

    monkeypatch.setattr(parts_of(model).program, "run", run)
    with serving(model) as url, connect(url) as client:
        with (
            paced(model) as allowed,
            client.stream("POST", COMPLETIONS, json=body) as first,
            client.stream("POST", CHAT, json={**body, "messages": HI, "prompt": None}) as second,
        ):
            until(lambda: model.stats().waiting == 2)
            allowed.release()
            until(lambda: model.stats().steps == 1)
            failing = True
            allowed.release()
            for stream in (first, second):
                last = list(events(stream.iter_lines()))[-1]
                assert last["error"]["code"] == "engine_failed"
                assert "no memory left" in last["error"]["message"]
        health = client.get("/health")
        assert health.status_code == 503
        assert "no memory left" in health.json()["error"]["message"]
        answer = client.post(COMPLETIONS, json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert "gemloom_engine_failed 1.0" in client.get("/metrics").text


# -- what is measured, and what is drawn ---------------------------------------------------------


def samples(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count(model: gemloom.Model) -> None:
    with serving(model) as url, connect(url) as client:
        before = samples(client.get("/metrics").text)
        client.post(COMPLETIONS, json={"prompt": "hello", "max_tokens": 5, "temperature": 0})
        client.get("/v1/models/some-name")
        client.get("/no/such/path")
        after = samples(client.get("/metrics").text)
    generated = ("gemloom_tokens_total", "generated")
    assert 1 <= after[generated] - before[generated] <= 5
    assert after[("gemloom_http_requests_total", COMPLETIONS, "200")] == 1
    assert after[("gemloom_http_requests_total", "/v1/models/{name:path}", "404")] == 1
    assert after[("gemloom_http_requests_total", "other", "404")] == 1
    assert after[("gemloom_time_to_first_token_seconds_count",)] == 1
    assert after[("gemloom_http_request_duration_seconds_count", COMPLETIONS)] == 1
    for kind, size in model.memory().items():
        assert after[("gemloom_memory_bytes", kind)] == size
    assert after[("gemloom_slots",)] == 2
    assert after[("gemloom_engine_failed",)] == 0


@pytest.mark.slow
def test_nothing_drawn_from_the_openapi_page_is_a_server_error(model: gemloom.Model) -> None:
    few = settings(
        max_examples=20, derandomize=True, deadline=None, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def never_fails(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=[not_a_server_error])

    with serving(model, timeout=2, slot_state=True) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) >= 13
        for operation in operations:
            few(given(case=operation.as_strategy())(never_fails))()


def test_grammars_are_ready_before_anything_is_asked(load: Load) -> None:
    """Making them ready holds the interpreter: streams would stand still."""
    model = load("e2b")
    app = create_app(model, Settings(name="tiny"))
    assert model.grammars._engine is not None
    again = load("e2b")
    app.state.service._take(again)
    assert again.grammars._engine is not None
