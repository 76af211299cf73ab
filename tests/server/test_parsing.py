"""A body may say what other servers' clients say: no name is dropped unseen, no meaning is lost."""

import json
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemloom.errors import RequestError
from gemloom.server import fields
from gemloom.server.dialects.llamacpp import TokenizeRequest
from gemloom.server.dialects.openai_chat import ChatRequest
from gemloom.server.dialects.openai_completions import CompletionRequest
from gemloom.server.dialects.openai_embeddings import EmbeddingRequest
from gemloom.server.dialects.openai_responses import ResponsesRequest
from gemloom.server.errors import FieldError
from gemloom.server.ignored import MAX_LENGTH, MAX_NAMES, MORE, Ignored
from gemloom.server.parsing import parse, parse_scales
from gemloom.server.protocol import Body, Conversation

BARE: dict[type[Body], dict[str, Any]] = {
    ChatRequest: {"messages": [{"role": "user", "content": "hi"}]},
    CompletionRequest: {"prompt": "hi"},
    ResponsesRequest: {"input": "hi"},
    EmbeddingRequest: {"input": "hi"},
    TokenizeRequest: {"content": "hi"},
    Conversation: {"messages": [{"role": "user", "content": "hi"}]},
}
SAMPLED = [ChatRequest, CompletionRequest, ResponsesRequest]
LIMITS = {
    ChatRequest: ("max_tokens", "max_completion_tokens", "n_predict"),
    CompletionRequest: ("max_tokens", "max_completion_tokens", "n_predict"),
    ResponsesRequest: ("max_output_tokens", "max_tokens", "n_predict"),
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def read(kind: type[Body], ignored: Ignored | None = None, /, **more: Any) -> Any:
    return parse(kind, json.dumps(BARE[kind] | more).encode(), ignored)


def options(asked: Any) -> dict[str, Any]:
    """What a request asks for, in the words of a chat where it is one."""
    chat = asked.chat() if isinstance(asked, ResponsesRequest) else asked
    said: dict[str, Any] = chat.model_dump(exclude_none=True)
    return said | {"sampling": chat.sampling()}


def ignored_in(kind: type[Body], **more: Any) -> str:
    ignored = Ignored()
    read(kind, ignored, **more)
    return str(ignored)


# -- no value ------------------------------------------------------------------------------------

EMPTY: dict[str, list[Any]] = {
    "seed": [-1],
    "stop": ["", [], [""], ["", ""]],
    "model": [""],
    "logit_bias": [{}, [], False],
    "regex": [""],
    "grammar": [""],
    "tools": [[]],
    "thinking_budget": [-1],
    "top_logprobs": [],
    "stream": [],
    "stream_options": [],
    "temperature": [],
    "parallel_tool_calls": [],
    "user": ["someone"],
    "verbosity": ["low"],
    "truncation": ["auto", "disabled"],
    "mirostat": [0],
    "typical_p": [1, 1.0],
    "repeat_last_n": [-1],
    "timings_per_token": [False],
    "guided_json": [""],
    "structured_outputs": [{}, {"choice": []}, {"json": "", "regex": "", "grammar": ""}],
    "n_predict": [-1, -2, 0],
    "nobody_knows_this": [],
}


def nothing(kind: type[Body]) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies that ask for nothing, though they have many fields."""
    known = {name: forms for name, forms in EMPTY.items() if name not in LIMITS[kind]}
    known |= {name: [-1, 0] for name in LIMITS[kind]}
    if kind is CompletionRequest:
        del known["tools"], known["thinking_budget"]
        known["logprobs"] = [False]
    return st.fixed_dictionaries(
        {}, optional={name: st.sampled_from([None, *forms]) for name, forms in known.items()}
    )


@pytest.mark.parametrize("kind", SAMPLED)
@settings(deadline=None)
@given(data=st.data())
def test_what_means_no_value_elsewhere_asks_for_nothing(kind: type[Body], data: Any) -> None:
    ignored = Ignored()
    asked = read(kind, ignored, **data.draw(nothing(kind)))
    assert options(asked) == options(read(kind))
    assert not str(ignored)


@pytest.mark.parametrize("kind", BARE)
def test_every_optional_field_may_be_null(kind: type[Body]) -> None:
    optional = [name for name, field in kind.model_fields.items() if not field.is_required()]
    assert optional
    assert read(kind, **dict.fromkeys(optional)) == read(kind)
    for name in set(kind.model_fields) - set(optional):
        with pytest.raises(FieldError, match=name):
            read(kind, **{name: None})


def test_empty_strings_among_others_stop_nothing() -> None:
    assert read(ChatRequest, stop=["", "x", ""]).sampling() == {"stop": ["x"]}


@pytest.mark.parametrize("kind", SAMPLED)
def test_no_top_k_is_all_tokens(kind: type[Body]) -> None:
    assert options(read(kind, top_k=-1)) == options(read(kind, top_k=0))
    assert options(read(kind, top_k=0))["sampling"] == {"top_k": 0}


@pytest.mark.parametrize(
    ("name", "value"), [("max_tokens", False), ("seed", False), ("best_of", True), ("seed", "-1")]
)
def test_true_and_false_are_no_numbers(name: str, value: Any) -> None:
    with pytest.raises(FieldError, match=name):
        read(ChatRequest, **{name: value})


def test_a_schema_beside_json_object_is_held_to() -> None:
    form: dict[str, Any]
    for form in (
        {"type": "json_object", "schema": SCHEMA},
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_object", "json_schema": {"schema": SCHEMA}},
        {"type": "json_schema", "json_schema": {"schema": SCHEMA}, "schema": SCHEMA},
    ):
        found = read(ChatRequest, response_format=form).response_format
        assert found.form == "json_schema"
        assert found.any_schema == SCHEMA
    assert read(ChatRequest, response_format={"type": "json_object"}).response_format.form == (
        "json_object"
    )
    for form in (
        {"type": "json_schema", "json_schema": {"schema": SCHEMA}, "schema": {}},
        {"type": "text", "schema": SCHEMA},
        {"type": "json_schema"},
    ):
        with pytest.raises(FieldError, match="response_format"):
            _ = read(ChatRequest, response_format=form).response_format.form


# -- other names ---------------------------------------------------------------------------------

CHOICE = {"grammar": 'start: "yes" | "\\"no\\""'}
JSON_SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"n_predict": 7}, {"max_tokens": 7}),
    ({"max_new_tokens": 7}, {"max_tokens": 7}),
    ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"json_schema": SCHEMA}, JSON_SCHEMA),
    ({"guided_json": SCHEMA}, JSON_SCHEMA),
    ({"guided_json": json.dumps(SCHEMA)}, JSON_SCHEMA),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_grammar": "start: /a/"}, {"grammar": "start: /a/"}),
    ({"guided_choice": ["yes", '"no"']}, CHOICE),
    ({"structured_outputs": {"choice": ["yes", '"no"'], "regex": None}}, CHOICE),
    ({"structured_outputs": {"json": SCHEMA}}, JSON_SCHEMA),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, JSON_SCHEMA),
    ({"structured_outputs": {"json_object": True}}, {"response_format": {"type": "json_object"}}),
    ({"structured_outputs": {"json_object": False}}, {}),
    ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
    ({"structured_outputs": {"grammar": "start: /a/"}}, {"grammar": "start: /a/"}),
    ({"n_probs": 0}, {}),
]
OF_CHATS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_completion_tokens": 7, "max_tokens": 7}, {"max_completion_tokens": 7, "n_predict": 7}),
    ({"n_probs": 3}, {"logprobs": True, "top_logprobs": 3}),
    ({"think": True}, {"enable_thinking": True}),
    ({"think": "low"}, {"reasoning_effort": "low"}),
    ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
    (
        {"thinking": {"type": "enabled", "budget_tokens": 9}},
        {"enable_thinking": True, "thinking_budget": 9},
    ),
    ({"thinking": {"type": "adaptive"}}, {}),
    ({"reasoning": {"effort": "high", "max_tokens": 5}},
     {"reasoning_effort": "high", "thinking_budget": 5}),
]  # fmt: skip
OF_RESPONSES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": 7}, {"max_output_tokens": 7}),
    ({"n_probs": 3}, {"top_logprobs": 3}),
    ({"reasoning_effort": "low"}, {"reasoning": {"effort": "low"}}),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
     {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}}),
    ({"response_format": {"type": "json_object"}}, {"text": {"format": {"type": "json_object"}}}),
    ({"thinking": {"type": "enabled", "budget_tokens": 9}},
     {"enable_thinking": True, "thinking_budget": 9}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "given", "ours"),
    [(kind, given, ours) for kind in SAMPLED for given, ours in SAME]
    + [(ChatRequest, given, ours) for given, ours in OF_CHATS]
    + [(ResponsesRequest, given, ours) for given, ours in OF_RESPONSES]
    + [(CompletionRequest, {"n_probs": 3}, {"logprobs": 3})],
)
def test_other_names_say_the_same(
    kind: type[Body], given: dict[str, Any], ours: dict[str, Any]
) -> None:
    assert options(read(kind, **given)) == options(read(kind, **ours))


@pytest.mark.parametrize("kind", BARE)
def test_other_names_are_of_fields_that_there_are(kind: type[Body]) -> None:
    samples = (True, 3, "auto", {"type": "object"}, ["a"])
    for name, meaning in kind.OTHER_NAMES.items():
        assert name not in kind.model_fields
        assert name not in fields.IGNORED
        assert name not in fields.REFUSED
        said = []
        for value in samples:
            try:
                said.append(meaning(value))
            except ValueError:
                continue
        assert said
        assert set().union(*said) <= set(kind.model_fields), name


@pytest.mark.parametrize("kind", SAMPLED)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"n_predict": 3}, {"max_tokens": 4}),
        ({"max_completion_tokens": 3}, {"max_tokens": 4}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.2}),
        ({"guided_regex": "a"}, {"regex": "b"}),
        ({"guided_regex": "a"}, {"structured_outputs.regex": "b"}),
        ({"guided_choice": ["a"]}, {"grammar": "start: /b/"}),
        ({"guided_json": {}}, {"json_schema": SCHEMA}),
        ({"response_format": {"type": "json_object"}}, {"guided_json": SCHEMA}),
    ],
)
def test_two_names_with_two_values_are_an_error(
    kind: type[Body], one: dict[str, Any], other: dict[str, Any]
) -> None:
    for both in (one | other, other | one):
        nested = dict(both)
        if "structured_outputs.regex" in nested:
            nested["structured_outputs"] = {"regex": nested.pop("structured_outputs.regex")}
        with pytest.raises(FieldError) as caught:
            options(read(kind, **nested))
        for name in both:
            assert name in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n_predict": "x"}, "n_predict: "),
        ({"guided_choice": "yes"}, "guided_choice: must be a list of strings"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice: must be"),
        ({"guided_json": "{"}, "guided_json: "),
        ({"thinking": {"type": "much"}}, "thinking.type: take one of enabled"),
        ({"structured_outputs": {"structural_tag": {}}}, "structural_tag is not supported"),
    ],
)
def test_an_error_has_the_name_that_was_sent(given: dict[str, Any], said: str) -> None:
    with pytest.raises(FieldError, match=said):
        read(ChatRequest, **given)


# -- unknown names -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BARE)
def test_a_field_that_nobody_knows_is_named(kind: type[Body]) -> None:
    ignored = Ignored()
    asked = read(kind, ignored, keep_alive="5m", modle="x", nothing=None)
    assert asked == read(kind)
    names = str(ignored).split(", ")
    assert [name.partition(";")[0] for name in names] == ["keep_alive", "modle"]
    assert names[1] == "modle;near=model"
    with pytest.raises(FieldError, match="'modle' is not a field of this request; did you mean"):
        read(kind, modle="x")


@pytest.mark.parametrize(
    ("kind", "given", "named"),
    [
        (ChatRequest, {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
         "stream_options.continuous_usage_stats"),
        (ChatRequest, {"response_format": {"type": "text", "tpye": 1}},
         "response_format.tpye;near=type"),
        (ChatRequest, {"response_format": {"type": "json_schema", "json_schema": {
            "schema": {}, "x": 1}}}, "response_format.json_schema.x"),
        (ChatRequest, {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            "copilot_cache_control": {}, "cot_id": 1}] * 2},
         "messages.content.cache_control, messages.cot_id"),
        (ChatRequest, {"messages": [{"role": "assistant", "content": "a", "annotations": [],
            "refusal": None, "tool_calls": [{"id": "1", "index": 0, "type": "function",
            "function": {"name": "f", "arguments": "{}", "extra": 1}}]}]},
         "messages.tool_calls.function.extra"),
        (ChatRequest, {"tools": [{"type": "function", "cache_control": {"type": "ephemeral"},
            "function": {"name": "f", "defer": True}}]},
         "tools.cache_control, tools.function.defer"),
        (ChatRequest, {"structured_outputs": {"regex": "a", "disable_fallback": True}},
         "structured_outputs.disable_fallback"),
        (ChatRequest, {"lora": [{"id": 0, "scale": 1.0, "task": "x"}]}, "lora.task"),
        (ResponsesRequest, {"text": {"format": {"type": "text", "x": 1}, "y": 1}},
         "text.format.x, text.y"),
        (ResponsesRequest, {"reasoning": {"effort": "low", "depth": 3}}, "reasoning.depth"),
        (ResponsesRequest, {"input": [{"role": "user", "content": [
            {"type": "input_text", "text": "a", "cot": 1}], "x": 1}]},
         "input.content.cot, input.x"),
        (ResponsesRequest, {"tools": [{"type": "function", "name": "f", "x": 1}]}, "tools.x"),
        (ChatRequest, {"repeat_last_n": 64, "samplers": ["top_k"]}, "repeat_last_n, samplers"),
    ],
)  # fmt: skip
def test_unknown_fields_of_objects_are_named(
    kind: type[Body], given: dict[str, Any], named: str
) -> None:
    shown = re.sub(r";near=\w+", "", ignored_in(kind, **given))
    assert shown == re.sub(r";near=\w+", "", named)
    with pytest.raises(FieldError, match="is not a field of this request") as caught:
        read(kind, **given)
    assert caught.value.param == named.partition(",")[0].partition(".")[0]


def test_what_a_template_reads_is_not_ignored() -> None:
    part = {"type": "text", "text": "a", "source_lang_code": "de", "other": 1}
    ignored = Ignored(template="{{ part.source_lang_code }}")
    asked = read(ChatRequest, ignored, messages=[{"role": "user", "content": [part]}])
    assert str(ignored) == "messages.content.other"
    assert asked.messages[0]["content"] == [part]  # it goes to the template as it is


@settings(deadline=None)
@given(st.lists(st.text(max_size=200), max_size=30), st.sampled_from(list(BARE)))
@example(["a\r\nset-cookie: x", "", "é" * 90, ", ", ";near=seed"], ChatRequest)
def test_any_name_is_told_in_one_line(names: list[str], kind: type[Body]) -> None:
    ignored = Ignored()
    read(kind, ignored, **{"x-" + name: 1 for name in names})
    told = str(ignored)
    assert re.fullmatch(r"[A-Za-z0-9_.:;=, +-]*", told)
    entries = told.split(", ") if told else []
    assert len(entries) <= MAX_NAMES + 1
    assert all(len(entry.partition(";")[0]) <= MAX_LENGTH for entry in entries)
    assert bool(entries) == bool(names)


def test_many_names_are_cut_short() -> None:
    told = ignored_in(ChatRequest, **{f"q{n}": 1 for n in range(5_000)}).split(", ")
    assert len(told) == MAX_NAMES + 1
    assert told[-1] == MORE


def test_scales_may_have_more_fields() -> None:
    ignored = Ignored()
    data = json.dumps([{"id": 0, "scale": 1.0, "path": "a.gguf"}]).encode()
    assert parse_scales(data, ignored)[0].scale == 1
    assert str(ignored) == "scales.path"
    with pytest.raises(FieldError):
        parse_scales(data)


@pytest.mark.parametrize("name", fields.NEUTRAL)
def test_a_neutral_value_is_no_news(name: str) -> None:
    for value in fields.NEUTRAL[name]:
        assert ignored_in(CompletionRequest, **{name: value}) == ""
    assert ignored_in(CompletionRequest, **{name: 77}).partition(";")[0] == name


# -- tools of other kinds ------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"type": "web_search", "external_web_access": False},
    {"type": "namespace", "name": "mcp", "tools": [{"type": "function", "name": "g"}]},
    {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
    {"type": "local_shell"},
]


def test_tools_that_cannot_be_called_are_left_out() -> None:
    flat = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": False}
    for kind, tool in ((ResponsesRequest, flat), (ChatRequest, {"type": "function", "function": {
        "name": "f"}})):  # fmt: skip
        ignored = Ignored()
        asked = read(kind, ignored, tools=[*KINDS, tool])
        assert asked.tools == [tool]
        named = str(ignored).split(", ")
        assert {f"tools:{other['type']}" for other in KINDS} <= set(named)
        with pytest.raises(FieldError, match="'web_search' tools are not run here"):
            read(kind, tools=[tool, KINDS[0]])


@pytest.mark.parametrize(
    "choice", [{"type": "web_search"}, {"type": "custom", "name": "apply_patch"}]
)
def test_a_tool_that_was_left_out_cannot_be_chosen(choice: dict[str, Any]) -> None:
    asked = read(ResponsesRequest, Ignored(), tools=KINDS, tool_choice=choice)
    with pytest.raises(FieldError, match="tool_choice"):
        asked.chat()


# -- anything -----------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ANY_NAME = sorted(
    {
        *(name for kind in BARE for name in (*kind.model_fields, *kind.OTHER_NAMES)),
        *("structured_outputs", "thinking", "reasoning", "text", "x"),
        *fields.REFUSED, *fields.NEUTRAL,
    }
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(st.sampled_from(ANY_NAME), JSON, max_size=4),
    st.sampled_from(list(BARE)),
    st.booleans(),
)
def test_any_value_of_any_name_is_read_or_refused(
    value: dict[str, Any], kind: type[Body], strict: bool
) -> None:
    said = ""
    try:
        asked = read(kind, Ignored(strict=strict), **value)
        if kind in SAMPLED:
            options(asked)
    except RequestError as error:  # and no other
        said = str(error)
    assert "\n" not in said
