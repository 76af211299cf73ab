"""Grammars that cannot be, or cost too much: refused with one line, or followed in bounded time."""

import itertools
import json
from contextlib import suppress

import jsonschema_rs
import numpy as np
import pytest

from gemloom.errors import RequestError
from gemloom.text import constraint
from gemloom.text.constraint import Grammars
from grammar_walks import EXTRA, grammars, one, text, walk
from tool_calls import Reader, tool
from vocabularies import small


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


CIRCLE = {}
CIRCLE["items"] = CIRCLE
BAD_SCHEMAS = [
    (["no object"], "must be an object"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum .* greater"),
    ({"type": "strin"}, "strin"),
    ({"type": "string", "pattern": "("}, "unclosed group"),
    ({"$ref": "#"}, "no text at all"),
    ({"allOf": [{"$ref": "#"}]}, "no text at all"),
    ({"$ref": "https://example.com/schema"}, "example.com"),
    ({"$ref": "file:///etc/hostname"}, "etc/hostname"),
    ({"not": {"type": "string"}}, "not"),
    ({"enum": []}, "empty"),
    ({"enum": [float("nan")]}, "not valid JSON"),
    ({"enum": [object()]}, "not valid JSON"),
    ({"enum": ["\ud800"]}, "surrogate"),
    ({"enum": ["x" * 9000]}, "8,192 is the most"),
    ({"enum": ["x" * 80] * 1000}, "65,536 is the most"),
    (nested(48), "48 levels"),
    (nested(5000), "not valid JSON"),
    (CIRCLE, "not valid JSON"),
]


@pytest.mark.parametrize(("schema", "words"), BAD_SCHEMAS, ids=range(len(BAD_SCHEMAS)))
def test_bad_schemas_are_refused(schema, words):
    with pytest.raises(RequestError, match=words) as caught:
        grammars().json_schema(schema)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "unclosed group"),
        ("(?=a)b", "look-around"),
        ("(" * 4000 + "a" + ")*" * 2000, "unclosed group"),
        (r"[^\s\S]", "no text at all"),
        ("a" * 9000, "8,192 is the most"),
        ("\ud800", "surrogate"),
        (4, "must be a string"),
    ],
)
def test_bad_regexes_are_refused(pattern, words):
    with pytest.raises(RequestError, match=words) as caught:
        grammars().regex(pattern)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("", "[Ee]mpty"),
        ("start: foo", "foo"),
        ('start: "', "lexer error"),
        ("start: a\na: b\nb: a", "no text at all"),
        ("start: <|nothing|>", "unknown special token"),
        ("start: <[99999999]>", "range"),
        ("start: " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
        (
            "start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(60)) + 'T60: "a"',
            "big",
        ),
        ('start: "a"\n' * 2000, "16,384 is the most"),
        (b"start", "must be a string"),
    ],
    ids=itertools.count(),
)
def test_bad_grammars_are_refused(grammar, words):
    with pytest.raises(RequestError, match=words) as caught:
        grammars().lark(grammar)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "make",
    [
        lambda: grammars().regex("(a{1,1000}){1,1000}"),
        lambda: grammars().regex("((a{0,100}){0,100}){0,100}b"),
        lambda: grammars().regex("a?" * 2000 + "a" * 2000),
        lambda: grammars().regex("(.*a.{300}){10}"),
        lambda: grammars().json_schema({"type": "string", "pattern": "(a{1,1000}){1,1000}"}),
        lambda: grammars().json_schema({"type": "array", "items": {}, "minItems": 1_000_000}),
        lambda: grammars().lark('start: start start | "a"'),
        lambda: grammars().lark('start: a{1000}\na: b{1000}\nb: "x" ","'),
        lambda: grammars().lark(
            "start: t0\n" + "".join(f"t{i}: t{i + 1} t{i + 1}\n" for i in range(60)) + 't60: "a"'
        ),
        lambda: grammars().json_schema(
            {"properties": {f"p{i}": {"type": "string"} for i in range(1500)}, "type": "object"}
        ),
    ],
)
def test_hostile_grammars_take_a_bounded_time(make):
    """Followed or refused, at the start or on the way; the test's own limit is for hangs."""
    with suppress(RequestError):
        constraint = make()
        for _ in range(40):
            ids = np.flatnonzero(constraint.mask()).tolist()
            constraint.accept(next((i for i in ids if i not in small("gemma4").eog), ids[0]))
            if constraint.finished:
                break


def test_long_chains_of_references_do_not_exhaust_the_stack():
    chain = {f"{i:x}": {"items": {"$ref": f"#/$defs/{i + 1:x}"}} for i in range(1500)}
    schema = {"$defs": chain | {f"{1500:x}": {}}, "$ref": "#/$defs/0"}
    assert json.loads(text(walk(grammars().json_schema(schema), 1))) is not None
    rules = "".join(f"t{i:x}:t{i + 1:x}\n" for i in range(1500)) + f't{1500:x}:"a"'
    assert text(walk(grammars().lark("start:t0\n" + rules), 1)) == "a"
    parameters = {"type": "object", "properties": {"it": schema["$defs"]["0"]}, "$defs": chain}
    walk(grammars().tools([tool("f", parameters)], "f"), 1)


def many_tools(strict, count=200):
    """More than 280 kB of tools, as an agent with several servers declares them."""
    kinds = [{"type": "string"}, {"type": "integer"}, {"type": "array", "items": {"type": "null"}}]
    return [
        tool(
            f"server{number % 7}.tool_{number}",
            {
                "type": "object",
                "properties": {
                    f"{word}-{number}": {**kinds[at % 3], "description": "x" * 150}
                    for at, word in enumerate(["path", "user", "query", "page", "sort", "body"])
                },
                "required": [f"path-{number}"],
            },
            strict,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("choice", ["auto", "required", "server3.tool_3"])
def test_many_tools_are_called_by_their_names_and_schemas(strict, choice):
    tools = many_tools(strict)
    assert len(json.dumps(tools)) > 280_000
    constraint = grammars().tools(tools, choice, parallel=False)
    constraint.accept(one("<|tool_call>"))
    ((name, arguments),) = Reader("<|tool_call>" + text(walk(constraint, 1))).calls()
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    assert name in schemas
    if strict or choice != "auto":
        assert jsonschema_rs.is_valid(schemas[name], arguments)


def test_where_a_grammar_of_all_schemas_is_too_long_names_are_still_held(monkeypatch):
    monkeypatch.setattr(constraint, "MAX_TOOLS_GRAMMAR", 4_000)
    tools = [tool("f", {"type": "object", "properties": {"a": {}}, "required": ["a"]})]
    tools += many_tools(strict=False, count=30)
    for _ in range(2):
        own = Grammars(small("gemma4"), small("gemma4").size + EXTRA)
        called = {}
        for seed in range(40):
            ((name, arguments),) = Reader(
                text(walk(own.tools(tools, "required", parallel=False), seed))
            ).calls()
            called[name] = arguments
        assert called.keys() <= {tool["function"]["name"] for tool in tools} and len(called) > 5
        monkeypatch.setattr(constraint, "MAX_TOOLS_GRAMMAR", 200)  # not even the strict ones


def test_a_description_may_be_long_but_not_a_constant():
    long = tool("f", {"type": "object", "properties": {"a": {"description": "x" * 9000}}})
    long["function"]["description"] = "y" * 20_000
    assert grammars().tools([long], "f").mask() is not None
    with pytest.raises(RequestError, match=r"a string in the list of tools .* 8,192 is the most"):
        grammars().tools(
            [tool("f", {"type": "object", "properties": {"a": {"const": "x" * 9000}}})], "f"
        )


def test_more_than_a_megabyte_of_tools_is_refused():
    with pytest.raises(RequestError, match=r"the list of tools has .* 1,048,576 is the most"):
        grammars().tools(many_tools(strict=False, count=800), "auto")


@pytest.mark.parametrize("grammar", ['root ::= "a"', '# all\nroot  ::= "a" b\nb ::= [0-9]'])
def test_gbnf_is_told_from_lark(grammar: str) -> None:
    with pytest.raises(RequestError, match=r"looks like GBNF, but Lark as .*gbnf_to_lark"):
        grammars().lark(grammar)
