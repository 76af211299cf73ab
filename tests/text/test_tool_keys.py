"""Arguments of any name: a grammar allows the call that a template writes; the router reads it."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny_vocab
from gemloom.errors import RequestError
from gemloom.text.chat import encode_chat
from gemloom.text.conversation import prepare
from gemloom.text.markup import QUOTE, is_bare, written_key
from gemloom.text.router import Router, ToolCall
from gemloom.text.tokenizer import Tokenizer
from gemloom.text.tools import check_tools
from grammar_walks import grammars, one
from vocabularies import gemma4_metadata, metadata

KEYS = [
    "file-path", "a.b", "$filter", "@type", "x y", "größe", "1st", "n" * 300, "Content-Type",
    "xlink:href", "filter[name]", "a,b", "{id}", "<b>", 'say "hi"', "", " lead", "trail ", "a\nb",
    "true", "None", "世界", "_", "call:", "\u2028", "a\u00a0", "\x1f",
]  # fmt: skip
names = st.one_of(
    st.sampled_from(KEYS),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text(st.sampled_from(' ab:{}[],"<|>\n'), max_size=8),
).filter(lambda name: QUOTE not in name)


@cache
def taught() -> Tokenizer:
    """A small vocabulary with Gemma 4's own template."""
    template = gemma4_metadata().string("tokenizer.chat_template")
    keys = {**tiny_vocab.metadata("gemma4"), "tokenizer.chat_template": template}
    return Tokenizer(metadata(keys))


def tool(parameters: dict[str, Any], strict: bool) -> dict[str, Any]:
    function = {"name": "f", "parameters": parameters, "strict": strict}
    return {"type": "function", "function": function}


def written(arguments: dict[str, Any]) -> list[int]:
    """The ids of a call as the template writes it into a prompt."""
    call = {"id": "c", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    ids = encode_chat(taught(), prepare(messages))
    return ids[ids.index(one("<|tool_call>")) : ids.index(one("<tool_call|>")) + 1]


def check(arguments: dict[str, Any], parameters: dict[str, Any]) -> None:
    ids = written(arguments)
    for choice, strict in (("auto", False), ("auto", True), ("f", False)):
        constraint = grammars().tools([tool(parameters, strict)], choice)
        for token in ids:
            mask = constraint.mask()
            assert mask is None or mask[token], (choice, strict, taught().decode(ids, True))
            constraint.accept(token)
    router = Router()
    [call] = [*router.push(taught().decode(ids, special=True)), *router.flush()]
    assert isinstance(call, ToolCall)
    assert json.loads(call.arguments) == arguments


@settings(max_examples=40)
@given(names, names)
@example("file-path", "a.b")
def test_a_call_with_keys_of_any_name(name: str, inner: str) -> None:
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    nested = {"type": "object", "properties": {inner: {"type": "string"}}, "required": [inner]}
    properties = {name: nested, "map": texts, "free": {"type": "object"}}
    parameters = {"type": "object", "properties": {**properties, "list": {"items": nested}}}
    arguments: dict[str, Any] = {name: {inner: "v"}, "list": [{inner: "v"}]}
    if name not in properties.keys() - {name}:
        arguments |= {"map": {inner: "v"}, "free": {inner: {"deep": [{inner: 1}]}}}
    check(arguments, parameters)


@pytest.mark.parametrize("name", KEYS)
def test_each_of_these(name: str) -> None:
    check({name: "v"}, {"type": "object", "properties": {name: {"type": "string"}}})


def test_a_declaration_shows_the_key_as_a_call_writes_it() -> None:
    properties = {name: {"type": "string"} for name in ("file-path", "xlink:href")}
    tools = check_tools([tool({"type": "object", "properties": properties}, False)])
    text = taught().decode(
        encode_chat(taught(), [{"role": "user", "content": "a"}], tools=tools), special=True
    )
    assert 'properties:{<|"|>xlink:href<|"|>:{' in text
    assert ",file-path:{" in text


def test_what_is_bare() -> None:
    for name in ("file-path", "a.b", "$filter", "x y", "größe", "1st", "n" * 300):
        assert is_bare(name)
        assert written_key(name) == name
    for name in ("a:b", "a[b]", "", " a", "a ", '"', "<", "a\nb"):
        assert not is_bare(name)
        assert written_key(name) == f"{QUOTE}{name}{QUOTE}"


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {f"a{QUOTE}b": {}}},
        {"properties": {"o": {"items": {"properties": {f"a{QUOTE}b": {}}}}}},
        {"properties": {"o": {"enum": ["x", f"a{QUOTE}b"]}}},
        {"properties": {"o": {"const": [f"a{QUOTE}b"]}}},
    ],
)
def test_what_cannot_be_written_is_refused_by_name(parameters: dict[str, Any]) -> None:
    declared = [tool({"type": "object", **parameters}, False)]
    for use in (check_tools, lambda tools: grammars().tools(tools, "auto")):
        with pytest.raises(RequestError, match=r"^tools\[0\] \(f\): 'a<\|\"\|>b' cannot stand"):
            use(declared)  # type: ignore[operator]


def test_a_schema_that_is_in_itself_is_refused() -> None:
    circle: dict[str, Any] = {"type": "object"}
    circle["properties"] = {"a": circle}
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(RequestError, match="nested too deep"):
        encode_chat(taught(), messages, tools=check_tools([tool(circle, False)]))
    with pytest.raises(RequestError, match="not valid JSON"):
        grammars().tools([tool(circle, False)], "auto")


def test_a_description_may_hold_anything() -> None:
    properties = {"a": {"type": "string", "description": QUOTE}}
    assert check_tools([tool({"type": "object", "properties": properties}, False)])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {}, "additionalProperties": {"type": "string"}},
        {"type": "object", "patternProperties": {"^x-": {}}, "additionalProperties": False},
    ],
)
def test_a_map_is_one_however_it_is_declared(schema: dict[str, Any]) -> None:
    parameters = {"type": "object", "properties": {"headers": schema}, "required": ["headers"]}
    check({"headers": {"x-Content-Type": "v"}}, parameters)
