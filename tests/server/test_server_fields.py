"""Over HTTP: what was ignored is told in a header and a log line, and paths do without /v1."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

import gemloom
import tiny
from gemloom.server.ignored import HEADER
from http_serving import NAME, http, serving

MESSAGES = [{"role": "user", "content": "hello world"}]
BODIES: dict[str, dict[str, Any]] = {
    "/chat/completions": {"messages": MESSAGES, "max_tokens": 3},
    "/completions": {"prompt": "hello", "max_tokens": 3},
    "/responses": {"input": "hello", "max_output_tokens": 3},
    "/embeddings": {"input": "hello"},
}
MARKUP = "<|turn>user\nhello<turn|>\n<bos>"


@pytest.fixture(scope="module")
def model() -> Iterator[gemloom.Model]:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    with gemloom.load(data, kv_type="f32", context=512, slots=4, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def url(model: gemloom.Model) -> Iterator[str]:
    with serving(model, cors=("https://site.example",)) as url:
        yield url


# -- what was ignored ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_names_what_was_ignored(
    url: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with http(url) as client, caplog.at_level(logging.WARNING, "gemloom.server"):
        plain = client.post(path, json=BODIES[path])
        assert plain.status_code == 200
        assert HEADER not in plain.headers
        assert not caplog.records
        odd = {"temprature": 0.5, "keep_alive": "5m\r\nx: y", "a\nb": 1}
        answer = client.post(path, json=BODIES[path] | odd)
        assert answer.status_code == 200
        near = "" if path == "/embeddings" else ";near=temperature"
        assert answer.headers[HEADER] == f"temprature{near}, keep_alive, a_b"
    (record,) = caplog.records
    assert answer.headers[HEADER] in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/embeddings"])
def test_a_stream_names_it_too(url: str, path: str) -> None:
    body = BODIES[path] | {"stream": True, "foo": 1}
    with http(url) as client, client.stream("POST", path, json=body) as answer:
        assert answer.headers[HEADER] == "foo"
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.read()


def test_a_client_can_read_it(url: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.with_raw_response.create(
            model=NAME,
            messages=[{"role": "user", "content": "hello"}],
            max_completion_tokens=2,
            extra_body={"top_k": -1, "repeat_penalty": 1.1, "keep_alive": -1},
        )
    assert answer.headers[HEADER] == "keep_alive"
    assert answer.parse().choices[0].message.content is not None


def test_an_error_names_it_too(url: str) -> None:
    with http(url) as client:
        answer = client.post("/v1/completions", json={"prompt": "a", "top_p": 7, "foo": 1})
        assert answer.status_code == 400
        assert answer.headers[HEADER] == "foo"


def test_a_page_of_an_allowed_site_may_read_it(url: str) -> None:
    with http(url, headers={"origin": "https://site.example"}) as client:
        answer = client.post("/v1/completions", json=BODIES["/completions"] | {"foo": 1})
        assert HEADER in answer.headers["access-control-expose-headers"]


def test_other_routes_name_it_too(url: str) -> None:
    with http(url) as client:
        for path, body in (
            ("/tokenize", {"content": "a"}),
            ("/detokenize", {"tokens": [5]}),
            ("/apply-template", {"messages": MESSAGES}),
            ("/lora-adapters", []),
        ):
            more = [] if body == [] else {**body, "foo": 1}
            answer = client.post(path, json=more)
            assert answer.status_code == 200, answer.text
            assert answer.headers.get(HEADER) == (None if body == [] else "foo")
        answer = client.post("/v1/adapters", json={"name": "none", "path": "a.gguf"})
        assert answer.status_code == 400  # who loads something means what is said


def test_a_strict_server_refuses_it(model: gemloom.Model) -> None:
    with serving(model, strict=True) as url, http(url) as client:
        for path, body in BODIES.items():
            assert client.post(path, json=body).status_code == 200
            answer = client.post(path, json=body | {"modle": "x"})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "modle"
            assert "did you mean model" in answer.json()["error"]["message"]
            assert HEADER not in answer.headers


def test_what_the_models_template_reads_is_not_named(url: str, model: gemloom.Model) -> None:
    assert "trim" in (model.tokenizer.chat_template or "")
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "trim": "b"}
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    with http(url) as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.headers[HEADER] == "messages.content.cache_control"


def test_tools_of_other_kinds_are_left_out(url: str) -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
    others = [{"type": "web_search"}, {"type": "custom", "name": "patch"}]
    body = {"input": "hello", "max_output_tokens": 2, "tools": [*others, tool]}
    with http(url) as client:
        answer = client.post("/v1/responses", json=body)
        assert answer.status_code == 200
        assert answer.headers[HEADER] == "tools:web_search, tools:custom"
        assert answer.json()["tools"] == [tool]
        for choice in ("patch", "web_search"):
            named = {"type": "function", "name": choice}
            refused = client.post("/v1/responses", json=body | {"tool_choice": named})
            assert refused.status_code == 400
            assert choice in refused.json()["error"]["message"]
        alone = body | {"tools": others, "tool_choice": "required"}
        assert client.post("/v1/responses", json=alone).status_code == 400


# -- other names that make a form ----------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        {"guided_choice": ["yes", 'n"o']},
        {"structured_outputs": {"choice": ["yes", 'n"o']}},
        {"guided_regex": 'yes|n"o'},
        {"guided_grammar": 'start: "yes" | "n\\"o"'},
    ],
)
def test_a_choice_is_one_of_the_texts(url: str, form: dict[str, Any]) -> None:
    with http(url) as client:
        for path in ("/v1/chat/completions", "/v1/completions"):
            body = {**BODIES[path.removeprefix("/v1")], **form, "max_tokens": 20}
            answer = client.post(path, json=body).json()
            choice = answer["choices"][0]
            assert (choice["message"]["content"] if "message" in choice else choice["text"]) in (
                "yes", 'n"o',
            )  # fmt: skip


def test_a_schema_beside_json_object_bounds_the_answer(url: str) -> None:
    schema = {"enum": [1, 2]}
    with http(url) as client:
        for form in (
            {"response_format": {"type": "json_object", "schema": schema}},
            {"guided_json": schema},
            {"json_schema": schema},
        ):
            body = {"prompt": "a", "max_tokens": 20, **form}
            answer = client.post("/v1/completions", json=body).json()
            assert json.loads(answer["choices"][0]["text"]) in (1, 2)


# -- raw prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [None, True, False])
def test_markup_means_the_same_wherever_raw_text_is_read(url: str, special: bool | None) -> None:
    """``parse_special`` has one default, and what /tokenize counts is what the others read."""
    more = {} if special is None else {"parse_special": special}
    with http(url) as client:
        body = {"content": MARKUP, "add_special": True, **more}
        ids = client.post("/tokenize", json=body).json()["tokens"]
        answer = client.post("/completions", json={"prompt": MARKUP, "max_tokens": 1, **more})
        assert answer.json()["usage"]["prompt_tokens"] == len(ids)
        answer = client.post("/embeddings", json={"input": [MARKUP], **more})
        assert answer.json()["usage"]["prompt_tokens"] == len(ids)
        same = client.post("/embeddings", json={"input": ids})
        assert answer.json()["data"] == same.json()["data"]
        as_text = client.post("/tokenize", json={"content": MARKUP, "parse_special": False})
        assert (len(ids) < len(as_text.json()["tokens"])) == (special is not False)


def test_markup_in_a_message_stays_text(url: str, model: gemloom.Model) -> None:
    turn = model.tokenizer.id_of("<|turn>")
    with http(url) as client:
        plain, marked = (
            client.post("/apply-template", json={"messages": [{"role": "user", "content": text}]})
            for text in ("hello", MARKUP)
        )
    assert turn in plain.json()["tokens"]
    assert marked.json()["tokens"].count(turn) == plain.json()["tokens"].count(turn)


def test_embeddings_have_the_models_own_size(url: str, model: gemloom.Model) -> None:
    own = model.config.n_embd
    with http(url) as client:
        answer = client.post("/v1/embeddings", json={"input": "a", "dimensions": own})
        assert len(answer.json()["data"][0]["embedding"]) == own
        answer = client.post("/v1/embeddings", json={"input": "a", "dimensions": own - 1})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "dimensions"
        assert str(own) in answer.json()["error"]["message"]


# -- paths ---------------------------------------------------------------------------------------


def test_paths_do_without_v1(url: str) -> None:
    with http(url) as client:
        for path in ("/models", "/models/", f"/models/{NAME}"):
            assert client.get(path).json() == client.get(f"/v1{path}").json()
        assert client.get("/models/other").status_code == 404
        for path, body in BODIES.items():
            greedy = body if path == "/embeddings" else body | {"temperature": 0}
            both = [client.post(prefix + path, json=greedy) for prefix in ("", "/v1")]
            assert [answer.status_code for answer in both] == [200, 200]
            assert both[0].json().keys() == both[1].json().keys()
        shown = client.get("/openapi.json").json()["paths"]
        assert "/v1/chat/completions" in shown
        assert not set(shown) & {*BODIES, "/models", "/models/{name}"}


def test_paths_without_v1_need_a_key_too(model: gemloom.Model) -> None:
    with serving(model, api_keys=("k",)) as url, http(url) as client:
        for path, body in BODIES.items():
            assert client.post(path, json=body).status_code == 401
        assert client.get("/models").status_code == 401
