"""Chats over HTTP: tools, forms, stops and begun answers mean what OpenAI's clients expect."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

import gemloom
import tiny
from chat_requests import BEGUN, FORM, HI, LISTEN, SCHEMA, TOOLS
from http_serving import NAME, http, serving


@pytest.fixture(scope="module")
def model() -> Iterator[gemloom.Model]:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    with gemloom.load(data, kv_type="f32", context=512, slots=4, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def url(model: gemloom.Model) -> Iterator[str]:
    with serving(model) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: OpenAI, messages: Any = HI, **options: Any) -> Any:
    return client.chat.completions.create(model=NAME, messages=messages, **options)


def calling(model: gemloom.Model) -> dict[str, Any]:
    """Options under which the model calls at once, and ever again."""
    call = model.tokenizer.id_of("<|tool_call>")
    return {"logit_bias": {str(call): 100}, "max_tokens": 200, "tools": TOOLS}


@pytest.mark.parametrize("form", [{}, {"response_format": FORM}])
@pytest.mark.parametrize("choice", ["auto", "required", LISTEN])
def test_one_call_without_parallel_calls(
    client: OpenAI, model: gemloom.Model, form: Any, choice: Any
) -> None:
    options = {**calling(model), "tool_choice": choice, "seed": 2, **form}
    one = chat(client, parallel_tool_calls=False, **options).choices[0]
    assert len(one.message.tool_calls) == 1
    assert (one.message.content, one.finish_reason) == (None, "tool_calls")
    if choice == "required":
        assert len(chat(client, **options).choices[0].message.tool_calls) > 1


def test_one_call_in_responses(client: OpenAI, model: gemloom.Model) -> None:
    tools: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
    options: dict[str, Any] = {
        "model": NAME, "input": "hello", "tools": tools, "tool_choice": "required",
        "max_output_tokens": 200, "extra_body": {"logit_bias": calling(model)["logit_bias"]},
    }  # fmt: skip
    one = client.responses.create(**options, parallel_tool_calls=False)
    assert [item.type for item in one.output] == ["function_call"]
    assert one.parallel_tool_calls is False
    many = client.responses.create(**options)
    assert len(many.output) > 1
    assert many.parallel_tool_calls is True


def test_calls_or_a_form(client: OpenAI, model: gemloom.Model) -> None:
    call = str(model.tokenizer.id_of("<|tool_call>"))
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA}
    tools: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
    for bias in (-100, 100):
        how = {"logit_bias": {call: bias}, "seed": 1}
        options = {"tools": TOOLS, "response_format": FORM, "parallel_tool_calls": False}
        message = chat(client, max_tokens=200, **options, **how).choices[0].message
        response = client.responses.create(
            model=NAME, input="hello", tools=tools, text={"format": form},  # type: ignore[arg-type]
            parallel_tool_calls=False, extra_body=how,
        )  # fmt: skip
        assert [item.type for item in response.output] == [
            "function_call" if bias > 0 else "message"
        ]
        said = response.output_text if bias < 0 else response.output[0].arguments  # type: ignore[union-attr]
        answered = message.content if bias < 0 else message.tool_calls[0].function.arguments
        for text in (said, answered):
            assert set(json.loads(text)) == {"ok", "n"}


def test_a_stop_string_is_not_for_thoughts(client: OpenAI, model: gemloom.Model) -> None:
    (letter,) = model.tokenize("x")
    begin = model.tokenizer.id_of("<|channel>")
    how: dict[str, Any] = {
        "logit_bias": {str(begin): 100, str(letter): 90}, "stop": ["x"], "seed": 1,
        "extra_body": {"enable_thinking": True, "thinking_budget": 5, "regex": "ab[a-z]{5}"},
    }  # fmt: skip
    choice = chat(client, **how).choices[0]
    assert "x" in choice.message.reasoning_content
    assert choice.message.content.startswith("ab")
    assert "x" not in choice.message.content
    deltas = [c.choices[0].delta for c in chat(client, stream=True, **how)]
    assert "".join(d.content or "" for d in deltas) == choice.message.content


def test_a_call_that_was_cut_is_not_shown(client: OpenAI, model: gemloom.Model) -> None:
    for size in range(2, 12):
        options = {**calling(model), "max_tokens": size, "seed": 1}
        choice = chat(client, **options).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("", "length")
        assert not choice.message.tool_calls
        deltas = [c.choices[0].delta for c in chat(client, stream=True, **options)]
        assert not any(d.content or d.tool_calls for d in deltas)


@pytest.mark.parametrize("content", [None, []])
def test_histories_of_agents_have_messages_without_content(client: OpenAI, content: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    history = [
        *HI,
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": content},
        {"role": "assistant", "content": content},
        *HI,
    ]
    assert chat(client, history, max_tokens=1).usage.completion_tokens == 1
    if content is None:
        with pytest.raises(BadRequestError, match=r"messages\[0\]: content must be"):
            chat(client, [{"role": "user", "content": None}], max_tokens=1)


def test_a_begun_answer_goes_on(client: OpenAI, model: gemloom.Model, url: str) -> None:
    how: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
    own = model.chat(BEGUN, **how)
    assert chat(client, BEGUN, **how).choices[0].message.content == own.message["content"]
    with http(url) as raw:
        prompt = raw.post("/apply-template", json={"messages": BEGUN}).json()
    assert prompt["prompt"].endswith("<|turn>model\nthe world ")
    items: list[Any] = BEGUN
    response = client.responses.create(model=NAME, input=items, temperature=0, max_output_tokens=8)
    assert response.output_text == own.message["content"]
    for wrong in ({"reasoning_effort": "low"}, {"response_format": FORM}):
        with pytest.raises(BadRequestError, match="the last message is the assistant's"):
            chat(client, BEGUN, **wrong)


@pytest.mark.parametrize(
    ("asked", "ends"),
    [
        ({}, "model\nthe world "),
        ({"continue_final_message": True}, "model\nthe world "),
        ({"continue_final_message": True, "add_generation_prompt": False}, "model\nthe world "),
        ({"continue_final_message": False}, "the world<turn|>\n<|turn>model\n"),
        ({"add_generation_prompt": True}, "the world<turn|>\n<|turn>model\n"),
        ({"add_generation_prompt": True, "continue_final_message": None}, "<|turn>model\n"),
    ],
)
def test_whose_turn_it_is_can_be_said(url: str, asked: Any, ends: str) -> None:
    with http(url) as raw:
        prompt = raw.post("/apply-template", json={"messages": BEGUN, **asked}).json()
        assert prompt["prompt"].endswith(ends)
        answer = raw.post(
            "/v1/chat/completions", json={"messages": BEGUN, "max_tokens": 1, **asked}
        ).json()
    assert answer["usage"]["prompt_tokens"] == len(prompt["tokens"])


def test_a_turn_that_cannot_be_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="must be the assistant's"):
        chat(client, HI, extra_body={"continue_final_message": True})
    both = {"continue_final_message": True, "add_generation_prompt": True}
    with pytest.raises(BadRequestError, match="are both true"):
        chat(client, BEGUN, extra_body=both)


def test_many_tools_are_refused_for_the_context_alone(client: OpenAI) -> None:
    tools = [
        {"type": "function", "function": {"name": f"tool.{n}", "description": "x" * 3000}}
        for n in range(200)
    ]
    for choice in ("auto", "required", "none"):
        with pytest.raises(BadRequestError, match="the context has room") as caught:
            chat(client, tools=tools, tool_choice=choice, max_tokens=1)
        assert caught.value.code == "context_length_exceeded"
