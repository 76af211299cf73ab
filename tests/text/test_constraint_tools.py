"""Tool calls by random walks: every call that the masks allow has arguments its schema takes."""

import random
import re

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemloom.errors import RequestError
from grammar_walks import exits, grammars, one, text, walk
from tool_calls import Reader, tool
from vocabularies import small

WEATHER = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["celsius", "", None, 1.5, True]},
        "City": {"type": "string", "minLength": 1, "maxLength": 8},
        "days": {"type": ["integer", "null"], "minimum": 1, "maximum": 12},
        "places": {
            "type": "array",
            "items": {"$ref": "#/$defs/place"},
            "minItems": 1,
            "maxItems": 3,
        },
        "rest": {},
    },
    "required": ["City", "places"],
    "$defs": {
        "place": {
            "type": "object",
            "properties": {
                "height": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                "inside": {"type": "array", "items": {"$ref": "#/$defs/place"}},
            },
        }
    },
}


TOOLS = [tool("get_weather", WEATHER), tool("get", {"type": "object"}), tool("stop")]


def check_calls(calls, tools):
    schemas = {entry["function"]["name"]: entry["function"].get("parameters") for entry in tools}
    for name, arguments in calls:
        schema = schemas[name] or {"maxProperties": 0}
        assert jsonschema_rs.is_valid(schema, arguments), (name, arguments)
        assert schema is not WEATHER or set(arguments) <= set(WEATHER["properties"])


@pytest.mark.parametrize("seed", range(12))
def test_required_tools_are_called(seed):
    calls = Reader(text(walk(grammars().tools(TOOLS, "required"), seed))).calls()
    assert calls
    check_calls(calls, TOOLS)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["get_weather", "get", "stop"])
def test_a_named_tool_is_called_once(name, seed):
    calls = Reader(text(walk(grammars().tools(TOOLS, name), seed))).calls()
    assert [called for called, _ in calls] == [name]
    check_calls(calls, TOOLS)


def test_required_tools_may_be_called_twice():
    seen = {
        len(Reader(text(walk(grammars().tools(TOOLS, "required"), s))).calls()) for s in range(20)
    }
    assert seen > {1}


@pytest.mark.parametrize("choice", ["auto", "required", "get"])
def test_without_parallel_calls_the_first_is_the_end(choice):
    for seed in range(8):
        constraint = grammars().tools(TOOLS, choice, parallel=False)
        constraint.accept(one("<|tool_call>"))
        said = "<|tool_call>" + text(walk(constraint, seed))
        assert len(Reader(said).calls()) == 1 and constraint.finished


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_or_a_form(parallel):
    counts = set()
    for seed in range(16):
        constraint = grammars().tools(
            TOOLS, "auto", parallel=parallel, form=grammars().regex("[a-z]{3}")
        )
        mask = constraint.mask()
        assert mask[one("<|tool_call>")] and mask[one("a")] and not mask[one("{")]
        if seed % 2:
            assert re.fullmatch("[a-z]{3}|<.*>", text(walk(constraint, seed)))
        else:
            constraint.accept(one("<|tool_call>"))
            calls = Reader("<|tool_call>" + text(walk(constraint, seed))).calls()
            check_calls(calls, TOOLS)
            counts.add(len(calls))
    assert counts > {1} if parallel else counts == {1}


def test_a_thought_then_calls_or_a_form():
    body = grammars().regex("[a-z]{3}")
    constraint = grammars().tools(TOOLS, "auto", thinking=True, form=body)
    assert constraint.mask()[one("<|channel>")]
    for token in (one("<|channel>"), one("b"), one("<channel|>")):
        constraint.accept(token)
    mask = constraint.mask()
    assert mask[one("<|tool_call>")] and mask[one("a")] and not mask[one("<|channel>")]


def test_arguments_come_in_the_order_of_the_template():
    parameters = {
        "type": "object",
        "properties": {key: {"type": "null"} for key in ("b", "C", "a")},
        "required": ["C", "b", "a"],
    }
    said = text(walk(grammars().tools([tool("f", parameters)], "f"), 1))
    assert said == "<|tool_call>call:f{a:null,b:null,C:null}<tool_call|>"


def test_tool_calls_after_a_thought():
    ids = walk(grammars().tools(TOOLS, "required", open=True), 5)
    answer = ids[ids.index(one("<channel|>")) + 1 :]
    check_calls(Reader(text(answer)).calls(), TOOLS)


def test_auto_leaves_text_alone_and_holds_calls():
    constraint = grammars().tools([tool("f", WEATHER), tool("g", WEATHER, strict=False)], "auto")
    names = set()
    for seed in range(20):
        for token in small("gemma4").encode("hello<>{}"):
            assert constraint.mask() is None
            constraint.accept(token)
        ids, rng = [one("<|tool_call>")], random.Random(seed)
        constraint.accept(ids[0])
        while (mask := constraint.mask()) is not None:
            pull = [token for token in exits("gemma4") if mask[token]] if len(ids) > 40 else []
            ids.append(pull[0] if pull else rng.choice(np.flatnonzero(mask).tolist()))
            constraint.accept(ids[-1])
        ((name, arguments),) = Reader(text(ids)).calls()
        names.add(name)
        assert name == "g" or jsonschema_rs.is_valid(WEATHER, arguments)
        assert not constraint.finished
    assert names == {"f", "g"}


SIMPLE = st.one_of(
    st.sampled_from(
        [{"type": kind} for kind in ("string", "integer", "number", "boolean", "null")]
    ),
    st.lists(
        st.one_of(st.text(max_size=6), st.integers(), st.booleans(), st.none()),
        min_size=1,
        max_size=4,
    ).map(lambda values: {"enum": values}),
    st.integers(-5, 5).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 3}),
    st.integers(0, 3).map(lambda low: {"type": "string", "minLength": low, "maxLength": low + 2}),
)
NAMES = st.from_regex(r"[A-Za-z_]\w{0,5}", fullmatch=True)


def compound(inner):
    objects = st.builds(
        lambda properties, wanted: {
            "type": "object",
            "properties": properties,
            "required": [name for name, want in zip(properties, wanted, strict=False) if want],
            "additionalProperties": False,
        },
        st.dictionaries(NAMES, inner, max_size=4),
        st.lists(st.booleans(), min_size=4, max_size=4),
    )
    arrays = st.builds(
        lambda items, low: {"type": "array", "items": items, "minItems": low, "maxItems": low + 2},
        inner,
        st.integers(0, 2),
    )
    options = st.lists(inner, min_size=1, max_size=3).map(lambda schemas: {"anyOf": schemas})
    return st.one_of(objects, arrays, options)


@settings(max_examples=40, deadline=None)
@given(st.recursive(SIMPLE, compound, max_leaves=8), st.integers(0, 999))
def test_arguments_of_any_schema_are_valid(schema, seed):
    parameters = {"type": "object", "properties": {"it": schema}, "required": ["it"]}
    ids = walk(grammars().tools([tool("f", parameters)], "f"), seed)
    ((_, arguments),) = Reader(text(ids)).calls()
    assert jsonschema_rs.is_valid(parameters, arguments), text(ids)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.com/schema"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"anyOf": [{"$ref": "#/properties/it"}]},
        {"type": "object", "properties": {"a": {"$ref": "#/properties/it"}}, "required": ["a"]},
        {"type": "array", "items": {"$ref": "#/properties/it"}, "minItems": 1},
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"type": "array", "minItems": 4, "maxItems": 2},
        {"type": "string", "pattern": "(", "minLength": -1, "maxLength": "x"},
        {"type": "strin"},
        {"type": [{}, 7], "enum": [], "required": 4},
        {"type": "object", "properties": 4, "required": [{}, "a"]},
        {"type": "object", "required": ["a"], "properties": {}},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"not": {}},
        True,
        "no schema",
    ],
    ids=repr,
)
def test_what_cannot_be_kept_is_left_to_the_model(schema):
    parameters = {"type": "object", "properties": {"it": schema}, "required": ["it"]}
    ids = walk(grammars().tools([tool("f", parameters)], "f"), 3)
    ((_, arguments),) = Reader(text(ids)).calls()
    assert set(arguments) == {"it"}


@pytest.mark.parametrize(
    ("tools", "choice", "words"),
    [
        ([], "required", "no tool to call"),
        (TOOLS, "nothing", "no tool to call .* 'nothing'"),
        ([{"type": "function"}], "auto", r"tools\[0\]"),
        ([tool("n" * 129)], "auto", r"tools\[0\]: the name"),
        ([*TOOLS, 4], "auto", r"tools\[3\]"),
        ([tool("a{b")], "auto", "the name 'a{b'"),
        ({"a": 1}, "auto", "must be a list"),
        ([tool("f", {"enum": ["\ud800"]})], "f", "surrogate"),
        ([tool("f", {"enum": [float("nan")]})], "f", "not valid JSON"),
    ],
)
def test_bad_tools_are_refused(tools, choice, words):
    with pytest.raises(RequestError, match=words):
        grammars().tools(tools, choice)


def test_a_model_without_the_markup_says_so():
    with pytest.raises(RequestError, match="no markup for tool calls"):
        grammars("gemma3").tools(TOOLS, "required")
    with pytest.raises(RequestError, match="no markup for thoughts"):
        grammars("gemma3").json_object(thinking=True)
