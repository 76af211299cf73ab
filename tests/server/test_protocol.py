"""Requests and answers as JSON, without a server and without a model."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vocabularies
from gemloom.engine.generation import Usage
from gemloom.engine.request import Piece
from gemloom.errors import GemloomError, RequestError
from gemloom.server import fields, protocol
from gemloom.server.dialects.openai import Head
from gemloom.server.dialects.openai_chat import ChatAnswer, ChatChoice, ChatRequest
from gemloom.server.dialects.openai_completions import (
    CompletionAnswer,
    CompletionChoice,
    CompletionRequest,
)
from gemloom.server.dialects.openai_embeddings import EmbeddingRequest
from gemloom.server.dialects.openai_responses import ResponseAnswer, ResponsesRequest
from gemloom.server.errors import FieldError
from gemloom.server.parsing import parse
from gemloom.text.router import Content, Plain, Reasoning, Router

HEAD = Head("id-1", 1_700_000_000, "tiny")
USAGE = Usage(10, 4, 3, 0.5, 0.25)
HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": HI, **fields}).encode())


def responses(**fields: Any) -> ResponsesRequest:
    return parse(ResponsesRequest, json.dumps({"input": "hi", **fields}).encode())


# -- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not valid JSON"),
        (b'{"messages": ', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"messages": [], "temperature": NaN}', "not valid JSON"),
        (b'{"messages": [{"content": "\\ud800"}]}', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"messages": ' + b'{"a":' * 500 + b"1" + b"}" * 501, "not valid JSON"),
        (b'{"messages": [], "messages": 1}', "messages"),
    ],
)
def test_bodies_that_are_no_request(body: bytes, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        parse(ChatRequest, body)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "a"}}, "logit_bias"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"stream_options": {"usage": True}}, "stream_options"),
        ({"thinking_budget": -2}, "thinking_budget"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(FieldError, match=param) as caught:
        chat(**fields).sampling()
    assert caught.value.param == param
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", fields.REFUSED)
def test_what_is_not_done_is_refused_by_name(name: str) -> None:
    neutral, hint = fields.REFUSED[name]
    with pytest.raises(FieldError, match=name) as caught:
        chat(**{name: {"asks": "for something"}})
    assert hint in str(caught.value)
    for value in (None, *neutral):
        assert chat(**{name: value}) == chat()


@pytest.mark.parametrize("name", sorted(fields.IGNORED))
def test_what_asks_for_nothing_is_ignored(name: str) -> None:
    assert chat(**{name: "anything"}) == chat()


def test_one_name_has_one_meaning() -> None:
    """A field that some request has is not ignored or refused in the same request."""
    assert not fields.IGNORED & set(fields.REFUSED)
    for kind in (ChatRequest, CompletionRequest, ResponsesRequest, EmbeddingRequest):
        assert not fields.IGNORED & set(kind.model_fields)


def test_sampling_is_what_was_given_and_no_more() -> None:
    assert chat().sampling() == {}
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 7, "stop": ["x"]}
    given |= {
        "presence_penalty": 0.5,
        "frequency_penalty": 1,
        "repetition_penalty": 1.1,
        "repetition_limit": 9,
    }
    asked = chat(**given, logit_bias={"5": -100}, max_tokens=9, logprobs=True, top_logprobs=3)
    assert asked.sampling() == given | {"logit_bias": {5: -100}, "max_tokens": 9, "logprobs": 3}
    assert chat(max_completion_tokens=5).sampling() == {"max_tokens": 5}
    assert chat(logprobs=True).sampling() == {"logprobs": 0}


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_come_in_four_forms(prompt: Any, prompts: list[Any]) -> None:
    body = json.dumps({"prompt": prompt}).encode()
    assert parse(CompletionRequest, body).prompts() == prompts
    body = json.dumps({"input": prompt}).encode()
    assert parse(EmbeddingRequest, body).inputs() == prompts


@pytest.mark.parametrize("prompt", [[], ["a"] * 129, [[], "a"], [True], [1, "a"], {}, None])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(FieldError, match="prompt"):
        parse(CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompts()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*ChatRequest.model_fields, *ResponsesRequest.model_fields, "audio", "x"])


@settings(deadline=None)
@given(st.dictionaries(NAMES, JSON, max_size=4), st.sampled_from([ChatRequest, ResponsesRequest]))
def test_any_json_is_a_request_or_a_request_error(value: Any, kind: type[protocol.Body]) -> None:
    said = ""
    try:
        asked = parse(kind, json.dumps(value).encode())
        if isinstance(asked, ResponsesRequest):
            asked = asked.chat()
        assert isinstance(asked, ChatRequest)
        asked.sampling()
    except RequestError as error:
        said = str(error)
    assert "\n" not in said


# -- /v1/responses -------------------------------------------------------------------------------


def test_items_of_one_turn_become_one_message() -> None:
    items = [
        {"role": "user", "content": "a"},
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": "2"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "z", "annotations": []}]},
    ]
    messages = responses(input=items, instructions="s").chat().messages
    roles = [message["role"] for message in messages]
    assert roles == ["system", "user", "developer", "assistant", "tool", "tool", "assistant"]
    turn = messages[3]
    assert turn["reasoning_content"] == "t"
    assert [call["id"] for call in turn["tool_calls"]] == ["c1", "c2"]
    assert messages[4] == {"role": "tool", "tool_call_id": "c1", "content": "1"}
    assert messages[-1]["content"] == [{"type": "text", "text": "z"}]


def test_responses_options_in_the_words_of_a_chat() -> None:
    schema = {"type": "object"}
    asked = responses(
        max_output_tokens=5,
        reasoning={"effort": "low"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        tools=[{"type": "function", "name": "f", "parameters": schema, "strict": True}],
        tool_choice={"type": "function", "name": "f"},
        top_logprobs=2,
        seed=3,
    ).chat()
    assert asked.sampling() == {"max_tokens": 5, "logprobs": 2, "seed": 3}
    assert asked.reasoning_effort == "low"
    assert asked.response_format
    assert asked.response_format.any_schema == schema
    function = {"name": "f", "parameters": schema, "strict": True}
    assert asked.tools == [{"type": "function", "function": function}]
    assert asked.tool_choice == {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "computer_call"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"background": True}, "background"),
    ],
)
def test_responses_refuse_what_is_not_done(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(FieldError) as caught:
        responses(**fields).chat()
    assert caught.value.param == param


# -- answers -------------------------------------------------------------------------------------

TEXT = (
    "<|channel>thought\nhm<channel|>So. "
    '<|tool_call>call:f{a:1}<tool_call|><|tool_call>call:g{b:<|"|>x<|"|>}<tool_call|>'
)


def pieces(text: str, size: int, reason: str = "stop") -> list[Piece]:
    """Text cut into pieces of one size, and how it ends."""
    cut = [text[start : start + size] for start in range(0, len(text), size)]
    tokens = vocabularies.small("gemma4").encode("hello world")
    made = [Piece(part, tokens[0], -0.5, ((tokens[0], -0.5),)) for part in cut]
    return [*made, Piece("", vocabularies.small("gemma4").eos, -0.1, (), reason)]


def events_of(answer: Any, made: list[Piece]) -> list[dict[str, Any]]:
    pushed = [event for piece in made for event in answer.push(0, piece)]
    return [*answer.begin(), *pushed, *answer.end([USAGE])]


def chat_answer(wants_usage: bool = True) -> ChatAnswer:
    choice = ChatChoice(0, vocabularies.small("gemma4"), Router())
    return ChatAnswer(HEAD, [choice], wants_usage)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_chat_stream_adds_up_to_the_whole_answer(size: int) -> None:
    answer = chat_answer()
    events = events_of(answer, pieces(TEXT, size))
    whole = answer.body([USAGE])
    choices = [choice for event in events for choice in event["choices"]]
    deltas = [choice["delta"] for choice in choices]
    message = whole["choices"][0]["message"]
    assert message["content"] == "".join(delta.get("content", "") for delta in deltas) == "So. "
    assert message["reasoning_content"] == "hm"
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call.pop("index") for call in calls] == [0, 1]
    assert calls == message["tool_calls"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"a": 1}, {"b": "x"}]
    logprobs = [
        entry for c in choices for entry in (c.get("logprobs") or {"content": []})["content"]
    ]
    assert logprobs == whole["choices"][0]["logprobs"]["content"]
    assert len(logprobs) == len(pieces(TEXT, size)) - 1  # the end has no text
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons[-1] == whole["choices"][0]["finish_reason"] == "tool_calls"
    assert set(reasons[:-1]) == {None}
    assert events[-1]["usage"] == whole["usage"]


def test_what_was_held_back_comes_at_the_end() -> None:
    answer = chat_answer()
    events = events_of(answer, pieces("a <|tool_ca", 4))
    said = "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
    assert said == "a <|tool_ca"
    assert answer.body([USAGE])["choices"][0]["finish_reason"] == "stop"
    response = ResponseAnswer(HEAD, responses(), vocabularies.small("gemma4"), Router())
    output = events_of(response, pieces("b <|ch", 2))[-1]["response"]["output"]
    assert output[0]["content"][0]["text"] == "b <|ch"


def test_usage_comes_only_where_it_is_asked_for() -> None:
    silent = events_of(chat_answer(wants_usage=False), pieces("ab", 1))
    assert all("usage" not in event for event in silent)
    told = events_of(chat_answer(), pieces("ab", 1))
    assert [event["usage"] for event in told[1:-1]] == [None] * len(told[1:-1])
    assert told[-1]["choices"] == []


def test_costs_of_several_answers_count_a_prompt_once() -> None:
    tokenizer = vocabularies.small("gemma4")
    choices = [CompletionChoice(index, tokenizer) for index in range(4)]
    answer = CompletionAnswer(HEAD, choices, 2, False)
    usage = answer.body([USAGE] * 4)["usage"]
    assert usage["prompt_tokens"] == 20
    assert usage["completion_tokens"] == 16
    assert usage["total_tokens"] == 36
    assert usage["prompt_tokens_details"] == {"cached_tokens": 6}


def test_offsets_of_logprobs_point_into_the_text() -> None:
    tokenizer = vocabularies.small("gemma4")
    text = "hello wörld 世界"
    choice = CompletionChoice(0, tokenizer)
    ids = tokenizer.encode(text)
    decoded = [tokenizer.token(token).decode(errors="ignore") for token in ids]
    for token, part in zip(ids, decoded, strict=True):
        choice.push(Piece(part, token, -1.0, ((token, -1.0),)))
    logprobs = choice.body()["logprobs"]
    assert b"".join(map(bytes, logprobs["bytes"])).decode() == text
    assert len({len(column) for column in logprobs.values()}) == 1
    for offset, part in zip(logprobs["text_offset"], decoded, strict=True):
        assert text[offset:].startswith(part)


def test_the_events_of_a_response_add_up_to_it() -> None:
    for size in (1, 5, 1000):
        answer = ResponseAnswer(HEAD, responses(), vocabularies.small("gemma4"), Router())
        events = events_of(answer, pieces(TEXT + "end", size))
        numbers = [event["sequence_number"] for event in answer.begin()]
        assert numbers == [len(events), len(events) + 1]  # each event has the next number
        kinds = [event["type"] for event in events if event["type"].startswith("response.output_")]
        assert kinds.count("response.output_item.added") == 5
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        last = events[-1]["response"]
        assert events[-1]["type"] == "response.completed"
        assert done == last["output"]
        types = [item["type"] for item in done]
        assert types == ["reasoning", "message", "function_call", "function_call", "message"]
        deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
        assert "".join(deltas) == "So. end"
        assert last["usage"]["total_tokens"] == 14


def test_a_response_that_is_cut_says_so() -> None:
    answer = ResponseAnswer(HEAD, responses(), vocabularies.small("gemma4"), Plain())
    last = events_of(answer, pieces("abc", 1, "length"))[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_a_failed_response_has_what_there_was() -> None:
    answer = ResponseAnswer(HEAD, responses(), vocabularies.small("gemma4"), Plain())
    answer.push(0, Piece("ab", 300))
    event = answer.failed(GemloomError("no luck"))
    assert event["type"] == "response.failed"
    assert event["response"]["error"]["message"] == "no luck"
    assert event["response"]["output"][0]["content"][0]["text"] == "ab"


def test_plain_text_is_content() -> None:
    assert Plain().push("<|channel>x") == [Content("<|channel>x")]
    assert Plain().flush() == Plain().push("") == []
    assert Router(reasoning=True).push("x") == [Reasoning("x")]
