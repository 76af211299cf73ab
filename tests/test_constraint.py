"""Grammars by random walks: whatever the masks allow must end in text that a parser takes."""

import json
import random
import re
import threading
from contextlib import suppress
from functools import cache

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemloom.constraint import Grammars, ThinkingBudget, both
from gemloom.errors import GemloomError, OptionError, RequestError
from vocabularies import gemma3, gemma4, small

EXTRA = 13  # ids of the model past the tokenizer's


@cache
def grammars(arch="gemma4"):
    return Grammars(small(arch), small(arch).size + EXTRA)


def one(text, arch="gemma4"):
    """The id of a special token."""
    (token,) = small(arch).encode(text, special=True)
    return token


@cache
def exits(arch):
    """Tokens that bring a walk to its end, the quickest first."""
    tokenizer = small(arch)
    marks = ["<channel|>", '<|"|>', "<tool_call|>"] if arch == "gemma4" else []
    return [*sorted(tokenizer.eog), *map(one, marks), *(tokenizer.encode(c)[0] for c in '"}],:')]


@cache
def specials(arch="gemma4"):
    """Ids that stand for no text."""
    tokenizer = small(arch)
    texts = (tokenizer.token(i).decode(errors="replace") for i in range(tokenizer.size))
    return {
        i
        for i, text in enumerate(texts)
        if tokenizer.encode(text, special=True) == [i] != tokenizer.encode(text)
    }


def walk(constraint, seed, free=40, arch="gemma4"):
    """The ids of a walk, drawn uniformly ``free`` times, then with a pull towards the end."""
    tokenizer, rng, ids = small(arch), random.Random(seed), []
    while not constraint.finished:
        assert len(ids) < 3000, "the walk does not end"
        constraint.prepare()
        mask = constraint.mask()
        if mask is None:
            mask = np.arange(tokenizer.size + EXTRA) < tokenizer.size
        assert mask.dtype == np.bool_ and mask.shape == (tokenizer.size + EXTRA,)
        allowed = np.flatnonzero(mask).tolist()
        assert allowed and allowed[-1] < tokenizer.size
        pull = [token for token in exits(arch) if mask[token]] if len(ids) >= free else []
        token = pull[0] if pull else rng.choice(allowed)
        if token in tokenizer.eog:
            return ids
        constraint.accept(token)
        ids.append(token)
    return ids


def text(ids, arch="gemma4"):
    return small(arch).decode(ids, special=True)


# ---- JSON, regex, Lark


def finite(number):
    """The float a number is written as; 1e999 is valid JSON, but no float."""
    return max(-1e300, min(1e300, float(number)))


NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": 1, "maximum": 30},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    },
    "required": ["value", "next"],
    "additionalProperties": False,
}
SCHEMAS = [
    {"type": "object"},
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
    {"enum": ["red", "green", 3, None, {"a": [1]}]},
    {"type": "string", "pattern": "^[a-c]{2,5}$"},
    {"type": "string", "minLength": 3, "maxLength": 9},
    {"type": "string", "format": "date"},
    {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "ok"],
    },
]


@pytest.mark.parametrize("arch", ["gemma4", "gemma3"])
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_json_is_valid(schema, arch):
    for seed in range(6):
        said = text(walk(grammars(arch).json_schema(schema), seed, arch=arch), arch)
        assert jsonschema_rs.is_valid(schema, json.loads(said, parse_float=finite)), said


def test_json_object_is_an_object():
    for seed in range(6):
        assert isinstance(json.loads(text(walk(grammars().json_object(), seed))), dict)


def test_blanks_in_json_come_to_an_end():
    constraint, space = grammars().json_object(), one(" ")
    constraint.accept(one("{"))
    count = 0
    while constraint.mask()[space]:
        constraint.accept(space)
        count += 1
    assert 16 <= count <= 100


@settings(max_examples=25, deadline=None)
@given(st.from_regex(r"[a-d]{1,3}(\|[a-d]{1,3})?", fullmatch=True), st.integers(0, 99))
def test_a_regex_is_matched_in_full(part, seed):
    pattern = f"({part})+[0-9]{{2,4}}(é|世)*"
    assert re.fullmatch(pattern, text(walk(grammars().regex(pattern), seed)))


def test_lark_is_followed():
    grammar = 'start: pair ("," pair)*\npair: NAME "=" NUMBER\nNAME: /[a-z]+/\nNUMBER: /[0-9]+/'
    for seed in range(6):
        said = text(walk(grammars().lark(grammar), seed))
        assert re.fullmatch(r"[a-z]+=[0-9]+(,[a-z]+=[0-9]+)*", said)


def test_forced_text_is_cut_as_the_tokenizer_cuts_it():
    sentence = "the system is in the hello world"
    assert walk(grammars().regex(sentence), 1) == small("gemma4").encode(sentence)


@pytest.mark.parametrize("arch", ["gemma4", "gemma3"])
def test_text_is_never_a_special_token(arch):
    constraint = grammars(arch).regex("(?s:.*)")
    for _ in range(20):
        allowed = set(np.flatnonzero(constraint.mask()).tolist())
        assert allowed & specials(arch) == small(arch).eog
        constraint.accept(random.Random(4).choice(sorted(allowed - specials(arch))))


def test_a_grammar_ends_where_it_may_and_where_it_must():
    tokenizer = small("gemma4")
    constraint = grammars().regex("a{1,2}")
    a = one("a")
    assert not constraint.mask()[list(tokenizer.eog)].any()
    constraint.accept(a)
    assert constraint.mask()[list(tokenizer.eog)].all() and not constraint.finished
    constraint.accept(a)
    assert constraint.finished
    ended = grammars().regex("a{1,2}")
    ended.accept(a)
    ended.accept(tokenizer.eos)
    assert ended.finished


def test_a_token_that_does_not_fit_is_refused():
    with pytest.raises(GemloomError, match="does not fit the grammar"):
        grammars().regex("a").accept(one("b"))


def test_a_mask_belongs_to_the_state_it_was_prepared_in():
    constraint = grammars().regex("ab")
    constraint.prepare()
    constraint.accept(one("a"))  # without having asked for the mask
    constraint.prepare()
    assert reads(constraint.mask()) == {b"b"}


def reads(mask):
    """What the tokens of a mask read like."""
    return {small("gemma4").token(token) for token in np.flatnonzero(mask).tolist()}


# ---- thoughts


def test_a_thought_may_come_first():
    begin, end = one("<|channel>"), one("<channel|>")
    for seed in range(8):
        constraint = grammars().json_object(thinking=True)
        assert constraint.mask()[begin] and constraint.mask()[one("{")]
        constraint.accept(begin)
        ids = [begin, *walk(constraint, seed)]
        assert ids.count(begin) == ids.count(end) == 1
        thought, answer = ids[1 : ids.index(end)], ids[ids.index(end) + 1 :]
        assert not specials() & set(thought) and thought
        assert isinstance(json.loads(text(answer)), dict)


def test_a_thought_may_be_left_out():
    constraint = grammars().regex("ab", thinking=True)
    for token in small("gemma4").encode("ab"):
        constraint.accept(token)
        assert not constraint.mask()[one("<|channel>")]
    assert constraint.finished


def test_a_thought_that_the_prompt_opened():
    constraint = grammars().regex("a", open=True)
    mask = constraint.mask()
    assert mask[one("b")] and mask[one("<channel|>")]
    assert not mask[list(specials() - {one("<channel|>")})].any()
    constraint.accept(one("<channel|>"))
    assert reads(constraint.mask()) == {b"a"}


def budget(count, started=False):
    size = small("gemma4").size + EXTRA
    return ThinkingBudget(one("<channel|>"), one("<|channel>"), count, started, size)


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("started", [True, False])
def test_a_budget_ends_the_thought_after_its_tokens(count, started):
    constraint, a = budget(count, started), one("a")
    if not started:
        constraint.accept(a)
        assert constraint.mask() is None
        constraint.accept(one("<|channel>"))
    for _ in range(count):
        assert constraint.mask() is None
        constraint.accept(a)
    assert np.flatnonzero(constraint.mask()).tolist() == [one("<channel|>")]
    constraint.accept(one("<channel|>"))
    for _ in range(3):
        assert constraint.mask() is None and not constraint.finished
        constraint.accept(a)
    constraint.accept(one("<|channel>"))  # nothing is left for another one
    assert np.flatnonzero(constraint.mask()).tolist() == [one("<channel|>")]


def test_a_budget_below_0_is_refused():
    with pytest.raises(OptionError, match="thinking budget"):
        budget(-1)


def test_a_grammar_and_a_budget_together():
    for seed in range(4):
        held = both(grammars().json_object(open=True), budget(7, started=True))
        ids = walk(held, seed)
        assert ids.index(one("<channel|>")) <= 7
        assert isinstance(json.loads(text(ids[ids.index(one("<channel|>")) + 1 :])), dict)


def test_both_is_what_either_allows_and_the_first_where_that_is_nothing():
    regex = grammars().regex
    assert reads(both(regex("[ab]"), regex("[bc]")).mask()) == {b"b"}
    assert reads(both(regex("a"), regex("c")).mask()) == {b"a"}
    assert reads(both(budget(9), regex("c")).mask()) == {b"c"}
    assert both(budget(9), budget(9)).mask() is None


# ---- tool calls

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


def tool(name, parameters=None, strict=True):
    function = {"name": name, "description": "says no more", "strict": strict}
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


TOOLS = [tool("get_weather", WEATHER), tool("get", {"type": "object"}), tool("stop")]


class Reader:
    """Reads tool calls strictly; ValueError for what is none."""

    def __init__(self, said):
        self.rest = said

    def take(self, pattern):
        found = re.match(pattern, self.rest, re.DOTALL)
        if not found:
            raise ValueError(f"no {pattern} at {self.rest[:40]!r}")
        self.rest = self.rest[found.end() :]
        return found[found.re.groups]

    def calls(self):
        calls = []
        while self.rest:
            name = self.take(r"<\|tool_call>call:([\w.-]+)")
            calls.append((name, self.value()))
            assert isinstance(calls[-1][1], dict)
            self.take(r"<tool_call\|>")
        return calls

    def value(self):
        if self.rest.startswith('<|"|>'):
            return self.take(r'<\|"\|>(.*?)<\|"\|>')
        if self.rest[0] in "[{":
            return self.many(self.rest[0])
        return json.loads(self.take(r"[^,\]}]+"))

    def many(self, bracket):
        self.take(re.escape(bracket))
        items = []
        while self.rest[0] not in "]}":
            if items:
                self.take(",")
            key = self.take(r"([^:,{}\[\]]+):") if bracket == "{" else None
            items.append((key, self.value()))
        self.take("}" if bracket == "{" else "]")
        return dict(items) if bracket == "{" else [value for _, value in items]


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
        ([*TOOLS, 4], "auto", r"tools\[3\]"),
        ([tool("a{b")], "auto", "the name 'a{b'"),
        ({"a": 1}, "auto", "must be a list"),
        ([tool("f", {"enum": ["\ud800"]})], "f", "surrogate"),
        ([tool("f", {"enum": [float("nan")]})], "f", "no valid JSON"),
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


# ---- what cannot be compiled


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
    ({"enum": [float("nan")]}, "no valid JSON"),
    ({"enum": [object()]}, "no valid JSON"),
    ({"enum": ["\ud800"]}, "surrogate"),
    ({"enum": ["x" * 9000]}, "8,192 is the most"),
    ({"enum": ["x" * 80] * 1000}, "65,536 is the most"),
    (nested(48), "48 levels"),
    (nested(5000), "no valid JSON"),
    (CIRCLE, "no valid JSON"),
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


# ---- many requests at once


def test_requests_of_one_grammar_do_not_disturb_each_other():
    fresh = Grammars(small("gemma4"), small("gemma4").size + EXTRA)
    alone = [walk(fresh.json_schema(SCHEMAS[-1]), seed) for seed in range(8)]
    found = {}

    def run(seed):
        found[seed] = walk(fresh.json_schema(SCHEMAS[-1]), seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(8)] == alone


def test_real_vocabularies_allow_what_the_model_would_write():
    value = {"name": "Zoë Müller", "tags": ["世界", "a\\b"], "n": -1.5e3}
    text = json.dumps(value, indent=2, ensure_ascii=False)
    for tokenizer in (gemma4(), gemma3()):
        ids = tokenizer.encode(text)
        constraint = Grammars(tokenizer, tokenizer.size).json_schema({"type": "object"})
        for token in ids:
            assert constraint.mask()[token]
            constraint.accept(token)
        assert constraint.finished


def test_two_requests_in_turn():
    first, second = grammars().regex("ab"), grammars().regex("ab")
    a, b = small("gemma4").encode("ab")
    first.accept(a)
    first.prepare()
    second.prepare()
    assert first.mask()[b] and not first.mask()[a]
    assert second.mask()[a] and not second.mask()[b]


def test_more_grammars_than_are_kept():
    for number in [*range(50), 0]:
        assert text(walk(grammars().regex(f"x{number}"), 0)) == f"x{number}"


def test_response_format() -> None:
    assert grammars().response_format({"type": "text"}) is None
    schema = {"type": "json_schema", "json_schema": {"schema": {"const": 1}}}
    for form in ({"type": "json_object"}, schema):
        assert grammars().response_format(form) is not None
    for bad in ({}, {"type": "xml"}, {"type": "json_schema"}, "json_object", None):
        with pytest.raises(RequestError, match="response_format"):
            grammars().response_format(bad)  # type: ignore[arg-type]
