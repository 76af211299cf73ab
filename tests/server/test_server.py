"""The server over HTTP, as clients of OpenAI's API use it, with a tiny model of noise."""

import base64
import concurrent.futures
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import openai
import pydantic
import pytest
from openai import OpenAI

import gemloom
import tiny
from http_serving import NAME, endless, events, http, serving

HI: list[Any] = [{"role": "user", "content": "hello world"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": name, "parameters": SCHEMA, "strict": True},
    }
    for name in ("look", "listen")
]


@pytest.fixture(scope="module")
def model() -> Iterator[gemloom.Model]:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    with gemloom.load(data, kv_type="f32", context=512, slots=4, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def url(model: gemloom.Model) -> Iterator[str]:
    with serving(model, aliases=("nick",), slot_state=True) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(model=NAME, messages=HI, **options)


# -- chat ----------------------------------------------------------------------------------------


def test_chat_says_what_the_model_says(client: OpenAI, model: gemloom.Model) -> None:
    answer = chat(client, **GREEDY)
    call = model.tokenizer.id_of("<|tool_call>")
    assert call is not None
    own = model.chat(HI, **GREEDY, logit_bias={call: -100})
    assert answer.choices[0].message.content == own.message["content"]
    assert answer.choices[0].finish_reason == own.finish_reason
    assert answer.usage.prompt_tokens == own.usage.prompt_tokens
    assert answer.usage.completion_tokens == own.usage.completion_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == NAME
    assert answer.timings["predicted_n"] == answer.usage.completion_tokens


def test_a_stream_adds_up_to_the_answer(client: OpenAI) -> None:
    whole = chat(client, seed=5, max_tokens=30)
    options: dict[str, Any] = {"stream_options": {"include_usage": True}}
    chunks = list(chat(client, seed=5, max_tokens=30, stream=True, **options))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_next_turn_costs_its_new_tokens_only(client: OpenAI) -> None:
    first = chat(client, **GREEDY, extra_body={"regex": "[a-z]{8}"})
    again = [
        *HI,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "and"},
    ]
    answer = client.chat.completions.create(model=NAME, messages=again, **GREEDY)
    assert answer.usage
    assert answer.usage.prompt_tokens_details
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert cached
    assert first.usage.prompt_tokens - 1 <= cached < answer.usage.prompt_tokens


def test_each_of_n_answers_has_the_next_seed(client: OpenAI) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 2}
    several = chat(client, n=3, seed=40, **options)
    alone = [chat(client, seed=40 + number, **options) for number in range(3)]
    said = [choice.message.content for choice in several.choices]
    assert said == [answer.choices[0].message.content for answer in alone]
    assert len(set(said)) == 3
    assert several.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert several.usage.completion_tokens == sum(a.usage.completion_tokens for a in alone)
    chunks = chat(client, n=3, seed=40, stream=True, **options)
    streamed = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == said


def test_stop_ends_before_it(client: OpenAI) -> None:
    form = {"regex": "[a-f]{20}"}
    whole = chat(client, **GREEDY | {"max_tokens": 20}, extra_body=form).choices[0].message.content
    stop = whole[5:7]
    answer = chat(client, **GREEDY | {"max_tokens": 20}, stop=[stop, "zz"], extra_body=form)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_spell_the_answer(client: OpenAI) -> None:
    options: dict[str, Any] = {
        "logprobs": True,
        "top_logprobs": 4,
        "extra_body": {"regex": "[a-zé]{9}"},
    }
    choice = chat(client, **GREEDY, **options).choices[0]
    entries = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 4
        assert [t.logprob for t in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert entry.logprob <= entry.top_logprobs[0].logprob <= 0
    streamed = [
        entry
        for chunk in chat(client, **GREEDY, **options, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_a_bias_forces_a_token(client: OpenAI, model: gemloom.Model) -> None:
    (token,) = model.tokenize("w")
    answer = chat(client, max_tokens=3, logit_bias={str(token): 100}, seed=1)
    assert answer.choices[0].message.content == "www"
    assert answer.choices[0].finish_reason == "length"


def test_json_as_the_schema_asks(client: OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        answer = chat(client, seed=seed, temperature=1.5, max_tokens=200, response_format=form)
        assert answer.choices[0].finish_reason == "stop"
        value = json.loads(answer.choices[0].message.content)
        assert set(value) == {"ok", "n"}
        assert isinstance(value["ok"], bool)
        assert value["n"] in (1, 2, 3)
    extra = {"grammar": 'start: "yes" | "no"'}
    assert chat(client, seed=1, extra_body=extra).choices[0].message.content in ("yes", "no")


class Answer(pydantic.BaseModel):
    ok: bool
    kind: Literal["a", "b"]


def test_typed_answers(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": NAME, "extra_body": {"seed": 1}}
    done = client.chat.completions.parse(messages=HI, response_format=Answer, **options)
    assert isinstance(done.choices[0].message.parsed, Answer)
    response = client.responses.parse(input="hello", text_format=Answer, **options)
    assert isinstance(response.output_parsed, Answer)
    tool = openai.pydantic_function_tool(Answer)
    options |= {"tools": [tool], "tool_choice": "required"}
    with client.chat.completions.stream(messages=HI, **options) as stream:
        calls = stream.get_final_completion().choices[0].message.tool_calls
    assert calls
    assert all(isinstance(call.function.parsed_arguments, Answer) for call in calls)


def test_thoughts_are_beside_the_content(client: OpenAI, model: gemloom.Model) -> None:
    bias = {str(model.tokenizer.id_of("<|channel>")): 100}
    options: dict[str, Any] = {"logit_bias": bias, "seed": 2}
    extra = {"enable_thinking": True, "thinking_budget": 6, "regex": "[a-z]{5}"}
    answer = chat(client, **options, extra_body=extra)
    message = answer.choices[0].message
    assert message.reasoning_content
    assert re.fullmatch("[a-z]{5}", message.content)
    assert 1 <= answer.usage.completion_tokens_details.reasoning_tokens <= 8
    deltas = [
        choice.delta
        for chunk in chat(client, **options, extra_body=extra, stream=True)
        for choice in chunk.choices
    ]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == message.reasoning_content
    assert "".join(delta.content or "" for delta in deltas) == message.content
    silent = chat(client, **options, extra_body=extra | {"thinking_budget": 0})
    assert not hasattr(silent.choices[0].message, "reasoning_content")


def test_tools_are_called_as_they_were_declared(client: OpenAI) -> None:
    for choice, names in (
        ("required", {"look", "listen"}),
        ({"type": "function", "function": {"name": "listen"}}, {"listen"}),
    ):
        options: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 300}
        answer = chat(client, seed=3, **options).choices[0]
        calls = answer.message.tool_calls
        assert calls
        assert answer.finish_reason == "tool_calls"
        assert {call.function.name for call in calls} <= names
        for call in calls:
            assert set(json.loads(call.function.arguments)) == {"ok", "n"}
        deltas = [
            call
            for chunk in chat(client, seed=3, stream=True, **options)
            for choice in chunk.choices
            for call in choice.delta.tool_calls or []
        ]
        assert [d.function.arguments for d in deltas] == [c.function.arguments for c in calls]
        assert [d.index for d in deltas] == list(range(len(calls)))


def test_what_only_looks_like_markup_is_text(client: OpenAI) -> None:
    form = {"regex": r"<\|channel>[a-z]{3}<channel\|>"}
    message = chat(client, seed=1, extra_body=form).choices[0].message
    assert re.fullmatch(form["regex"], message.content)
    assert not hasattr(message, "reasoning_content")


def test_no_tool_is_called_where_none_may_be(client: OpenAI, model: gemloom.Model) -> None:
    bias = {str(model.tokenizer.id_of("<|tool_call>")): 100}
    for tools in ({"tools": TOOLS, "tool_choice": "none"}, {}):
        answer = chat(client, logit_bias=bias, seed=1, max_tokens=20, **tools)
        assert not answer.choices[0].message.tool_calls
        assert "<|tool_call>" not in answer.choices[0].message.content
    forced = chat(client, logit_bias=bias, seed=1, max_tokens=300, tools=TOOLS)
    assert forced.choices[0].message.tool_calls  # auto


def test_results_of_tools_are_taken_back(client: OpenAI) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 300}
    message = chat(client, seed=3, **options).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in message.tool_calls
    ]
    conversation: list[Any] = [*HI, message, *results]
    answer = client.chat.completions.create(
        model=NAME, messages=conversation, tools=TOOLS, tool_choice="none", max_tokens=4
    )
    assert answer.usage
    assert answer.usage.completion_tokens == 4


# -- the other endpoints -------------------------------------------------------------------------


def test_completions_of_several_prompts(client: OpenAI, model: gemloom.Model) -> None:
    prompts = ["hello", "the world and"]
    answer = client.completions.create(model=NAME, prompt=prompts, n=2, seed=8, max_tokens=9)
    own = [model.generate(p, seed=8 + i, max_tokens=9) for p in prompts for i in range(2)]
    assert [choice.text for choice in answer.choices] == [done.text for done in own]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage
    assert answer.usage.prompt_tokens == sum(done.usage.prompt_tokens for done in own[::2])
    ids = [2, *model.tokenize("hello")]
    again = client.completions.create(model=NAME, prompt=ids, seed=8, max_tokens=9)
    assert again.choices[0].text == own[0].text
    chunks = client.completions.create(model=NAME, prompt=ids, seed=8, max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == own[0].text


def test_logprobs_of_completions(client: OpenAI) -> None:
    choice = client.completions.create(
        model=NAME, prompt="hello", **GREEDY, logprobs=2, extra_body={"regex": "[a-z ]{8}"}
    ).choices[0]
    logprobs = choice.logprobs
    assert logprobs
    assert logprobs.tokens
    assert logprobs.text_offset
    assert logprobs.top_logprobs
    assert "".join(logprobs.tokens) == choice.text
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text[offset:].startswith(token)
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs or [], logprobs.top_logprobs, strict=True
    ):  # as in OpenAI's API: the token is among them, if only as one more
        assert top[token] == logprob
        assert len(top) == 2 + (logprob < sorted(top.values())[-2])
    assert {len(top) for top in logprobs.top_logprobs} == {2, 3}


def test_embeddings(client: OpenAI, model: gemloom.Model, url: str) -> None:
    texts = ["hello world", "the other"]
    answer = client.embeddings.create(model=NAME, input=texts)  # in base64, as the client asks
    own = np.stack([model.embed(text) for text in texts])
    np.testing.assert_allclose([item.embedding for item in answer.data], own, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(own, axis=1), 1, atol=1e-5)
    with http(url) as raw:
        body: dict[str, Any] = {"input": texts[0]}
        plain = raw.post("/v1/embeddings", json=body).json()
        packed = raw.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()
    decoded = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(plain["data"][0]["embedding"], decoded, atol=1e-5)
    assert plain["usage"]["prompt_tokens"] == len(model.tokenize(texts[0])) + 1


def test_responses(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": NAME, "input": "hello", "temperature": 0}
    options |= {"max_output_tokens": 40, "extra_body": {"regex": "[a-z]{12}"}}
    whole = client.responses.create(**options)
    assert whole.status == "completed"
    assert len(whole.output_text) == 12
    with client.responses.stream(**options) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text
    assert final.usage
    items: list[Any] = [{"role": "user", "content": "hello"}, *whole.output]
    items.append({"role": "user", "content": "more"})
    short = client.responses.create(model=NAME, input=items, max_output_tokens=2, instructions="be")
    assert short.status == "incomplete"
    assert short.incomplete_details
    assert short.incomplete_details.reason == "max_output_tokens"


def test_tools_of_responses(client: OpenAI) -> None:
    tools: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
    options: dict[str, Any] = {"model": NAME, "tools": tools, "tool_choice": "required"}
    answer = client.responses.create(**options, input="hello", extra_body={"seed": 3})
    calls: list[Any] = [item for item in answer.output if item.type == "function_call"]
    assert calls
    with client.responses.stream(**options, input="hello", extra_body={"seed": 3}) as stream:
        streamed: list[Any] = list(stream.get_final_response().output)
    assert [call.arguments for call in streamed] == [call.arguments for call in calls]
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "fine"}
        for call in calls
    ]
    items: list[Any] = [{"role": "user", "content": "hello"}, *answer.output, *results]
    options["tool_choice"] = "none"
    assert client.responses.create(**options, input=items, max_output_tokens=3).usage


def test_models(client: OpenAI, model: gemloom.Model) -> None:
    assert [entry.id for entry in client.models.list()] == [NAME, "nick"]
    assert client.models.retrieve(NAME).meta["n_ctx"] == model.context  # type: ignore[attr-defined]
    client.chat.completions.create(model="nick", messages=HI, max_tokens=1)
    for call in (
        lambda: client.models.retrieve("gpt-4o"),
        lambda: client.chat.completions.create(model="../etc/passwd", messages=HI),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found"


def test_tokens_there_and_back(url: str, model: gemloom.Model) -> None:
    text = "hello wörld 🦙"
    with http(url) as raw:
        ids = raw.post("/tokenize", json={"content": text, "add_special": True}).json()["tokens"]
        assert ids == [2, *model.tokenize(text)]
        back = raw.post("/detokenize", json={"tokens": ids[1:]}).json()
        assert back == {"content": text}
        asked = {"content": "<bos>🦙", "with_pieces": True}
        first, *rest = raw.post("/tokenize", json=asked).json()["tokens"]
        assert first == {"id": 2, "piece": "<bos>"}
        assert b"".join(bytes(token["piece"]) for token in rest).decode() == "🦙"
        prompt = raw.post("/apply-template", json={"messages": HI}).json()
    assert prompt["tokens"] == model.chat_prompt(HI)
    assert prompt["prompt"] == "<bos><|turn>user\nhello world<turn|>\n<|turn>model\n"


def test_state_is_saved_and_restored(url: str, model: gemloom.Model) -> None:
    with http(url) as raw:
        raw.post("/v1/completions", json={"prompt": "hello world and the", "max_tokens": 3})
        saved = raw.post("/slots?action=save")
        assert saved.headers["content-type"] == "application/octet-stream"
        restored = raw.post("/slots?action=restore", content=saved.content)
        assert restored.json()["restored"] == model.load_state(saved.content)
        damaged = raw.post("/slots?action=restore", content=saved.content[:-1])
        assert damaged.status_code == 400
        assert damaged.json()["error"]["code"] == "invalid_state"
        assert raw.post("/slots?action=erase").json()["error"]["code"] == "invalid_request"
        counts = raw.get("/slots").json()
    assert counts["slots"] == 4
    assert counts["slots_busy"] == 0


def test_events_end_with_usage_and_done(url: str) -> None:
    asked = {"messages": HI, "max_tokens": 2, "stream": True}
    asked["stream_options"] = {"include_usage": True}
    with http(url) as raw, raw.stream("POST", "/v1/chat/completions", json=asked) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = list(events(answer.iter_lines()))
    assert told[-1] == "[DONE]"
    assert told[-2]["usage"]["completion_tokens"] == 2
    assert all(event["usage"] is None for event in told[:-2])


def test_the_seed_gives_the_same_text_whatever_else_runs(url: str, model: gemloom.Model) -> None:
    def text(seed: int) -> str:
        asked = {"prompt": "hello", "seed": seed, "max_tokens": 20, "logit_bias": endless(model)}
        with http(url) as raw:
            said: str = raw.post("/v1/completions", json=asked).json()["choices"][0]["text"]
            return said

    alone = [text(seed) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(text, range(8))) == alone


def test_a_base_model_chats_in_plain_lines() -> None:
    """As ``Model.chat`` and the command line do; it ends where the user would speak."""

    def untaught(keys: dict[str, Any], _: Any) -> None:
        del keys["tokenizer.chat_template"]

    data = tiny.gguf_bytes(tiny.VARIANTS["gemma3"], edit=untaught)
    lines = "User: hello world\nAssistant:"
    with gemloom.load(data, kv_type="f32", context=256, threads=1) as model:
        said = model.generate(lines, **GREEDY, stop="\nUser:").text
        assert model.chat(HI, **GREEDY).message["content"] == said
        with serving(model) as url, http(url) as client:
            body = {"messages": HI, **GREEDY}
            answer = client.post("/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["message"]["content"] == said
            prompt = client.post("/apply-template", json={"messages": HI}).json()["prompt"]
            assert prompt == f"<bos>{lines}"
            asked = client.post("/v1/chat/completions", json={**body, "tools": TOOLS})
            assert asked.status_code == 400
            assert "they need Gemma 4" in asked.json()["error"]["message"]
        user = model.tokenize("\nUser:")
        forced = Forced(user, model.config.n_vocab)
        assert model.chat(HI, constraint=forced).message["content"] == ""


class Forced:
    """A constraint that lets through these tokens, one after another."""

    finished = False

    def __init__(self, tokens: list[int], n_vocab: int) -> None:
        self._masks = []
        for token in tokens:
            self._masks.append(np.zeros(n_vocab, np.bool_))
            self._masks[-1][token] = True

    def prepare(self) -> None:
        pass

    def mask(self) -> np.ndarray | None:
        return self._masks[0] if self._masks else None

    def accept(self, token: int) -> None:
        self._masks = self._masks[1:]
