"""Text of a model's turn to its parts: the same however it is cut, and nothing lost."""

import json
import re
import time
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemloom.text.router import Content, Part, Reasoning, Router, ToolCall
from gemloom.text.tokenizer import StreamDecoder
from turns import CALL, LOOK_UP, MARKERS, PIECES, QUOTE, STRAY, merged, routed
from vocabularies import small


def call(arguments: str, name: str = "f") -> str:
    return f"<|tool_call>call:{name}{arguments}<tool_call|>"


def short(text: str) -> str:
    return text[:60]


def arguments_of(text: str) -> Any:
    [part] = routed(text)
    assert isinstance(part, ToolCall), part
    return json.loads(part.arguments)


TURNS: list[tuple[str, list[Part]]] = [
    ("", []),
    ("Hi\n", [Content("Hi\n")]),
    ("<|channel>thought\nHm.\n<channel|>Hi", [Reasoning("Hm."), Content("Hi")]),
    ("<|channel>thought\na\n\n<channel|>\nHi", [Reasoning("a\n"), Content("\nHi")]),
    ("<|channel>thought\n<channel|>Hi", [Content("Hi")]),
    ("<|channel>thought\n\n<channel|>Hi", [Content("Hi")]),
    ("<|channel>thought<channel|>Hi", [Content("Hi")]),
    ("<|channel><|channel>thought\na<channel|>Hi", [Reasoning("a"), Content("Hi")]),
    (
        "<|channel>thought\na<channel|>b<|channel>thought\nc\n<channel|>d",
        [Reasoning("a"), Content("b"), Reasoning("c"), Content("d")],
    ),
    ("Hi<channel|> there\n<channel|>", [Content("Hi there\n")]),
    ("Hi<|channel>thought\n<channel|>", [Content("Hi")]),
    ("<|channel>thought\nno end\n", [Reasoning("no end\n")]),
    ("a <|chan", [Content("a <|chan")]),
    ("thought\nof it", [Content("thought\nof it")]),
    (f"a{CALL}", [Content("a"), LOOK_UP]),
    (f"{CALL}{CALL}b", [LOOK_UP, LOOK_UP, Content("b")]),
    (f"<|channel>thought\na\n<channel|>{CALL}", [Reasoning("a"), LOOK_UP]),
    (f"<|channel>thought\na{CALL}b", [Reasoning("a"), LOOK_UP, Reasoning("b")]),
    (call("{}", "my-server.tool_2"), [ToolCall("my-server.tool_2", "{}")]),
    ("<|tool_call>:f{}<tool_call|>", [ToolCall("f", "{}")]),
    (f"{CALL}<tool_call|>b", [LOOK_UP, Content("b")]),
    ('a<|tool_response>b<tool_response|><|"|>c', [Content("abc")]),
    ('<|channel>thought\na<tool_call|>b<|"|>\n<channel|>c', [Reasoning("ab"), Content("c")]),
    ("Hi<|tool_call>call:f{a:1}", [Content("Hi")]),
]


@pytest.mark.parametrize(("text", "parts"), TURNS)
def test_parts(text: str, parts: list[Part]) -> None:
    assert routed(text) == parts
    assert routed(list(text)) == parts


def test_a_prompt_that_ends_in_a_thought() -> None:
    assert routed("a\n<channel|>b", reasoning=True) == [Reasoning("a"), Content("b")]
    assert routed("<|channel>thought\na<channel|>b", reasoning=True) == routed(
        "a<channel|>b", reasoning=True
    )


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("{ }", {}),
        ("{a:-1.5e3,b:0,c:1e-05}", {"a": -1500.0, "b": 0, "c": 1e-05}),
        ("{a:true,b:false,c:null,d:None}", {"a": True, "b": False, "c": None, "d": None}),
        ('{o:{p:{q:[{},[],[[2]]]}},r:<|"|><|"|>}', {"o": {"p": {"q": [{}, [], [[2]]]}}, "r": ""}),
        ('{<|"|>a b<|"|>:1,"c":2,a word:3,$x-y.z:4}', {"a b": 1, "c": 2, "a word": 3, "$x-y.z": 4}),
        ('\n { "a" : [ 1 , 2 ] ,\n b : <|"|>x<|"|> } \n', {"a": [1, 2], "b": "x"}),
        (r'{"a": "\"\\\n\u00e9\ud83d\ude00"}', {"a": '"\\\né😀'}),
        ('{"a": "two\nlines"}', {"a": "two\nlines"}),
        ('{a:<|"|>"}],:{ \\n <|" |>é\n<|"|>}', {"a": '"}],:{ \\n <|" |>é\n'}),
        ('{a:<|"|><tool_call|><|tool_call>x<|"|>}', {"a": "<tool_call|><|tool_call>x"}),
        ('{"a":"<tool_call|><|channel>thought"}', {"a": "<tool_call|><|channel>thought"}),
    ],
)  # fmt: skip
def test_arguments(written: str, value: Any) -> None:
    assert arguments_of(call(written)) == value


UNFINISHED = [
    "<|tool_call>",
    "<|tool_call>call",
    "<|tool_call>call:f",
    "<|tool_call>call:f{",
    '<|tool_call>call:f{a:<|"|>it ends <channel|> here',
    "<|tool_call>call:f{a:1}",
    "<|tool_call>call:f{a:1} <tool_call",
]
MALFORMED = [
    "<|tool_call> is the marker of a call",
    *map(
        call,
        [
            "", "()", "[]", "{a}", "{a:}", "{:1}", "{,}", "{a:1,}", "{a:1 b:2}", "{a:1]",
            "{a:[1}", "{a:[1 2]}", "{a:[,]}", "{a:London}", "{a:01}", "{a:1.}", "{a:NaN}",
            "{a:--1}", "{a:1:2}", "{a:{}:1}", "{{}:1}", "{a:1}}", "{a:1} x", "{a:'b'}",
            r'{"a":"\q"}', r'{"a":"\ud800"}', '{"a" "b"}', "{a:1<b}", "{a:" + "9" * 1001 + "}",
            f"{{a:{QUOTE}b{QUOTE}{QUOTE}c{QUOTE}}}",
        ],
    ),
    call("{}", ""),
    call("{}", "two words"),
    call("{}", "f<channel"),
]  # fmt: skip


MARKUP = re.compile(
    r"<\|channel>(thought\n?)?|\n?<channel\|>|<\|tool_call>|<tool_call\|>|<\|tool_response>"
    r'|<tool_response\|>|<\|"\|>'
)


def words(text: str) -> str:
    """What stays of a malformed call."""
    return MARKUP.sub("", text)


@pytest.mark.parametrize("text", MALFORMED, ids=short)
def test_of_a_malformed_call_the_words_stay(text: str) -> None:
    shown = [Content(words(text))] if words(text) else []
    assert routed(text) == shown
    assert routed(list(f"a {text}")) == [Content(f"a {words(text)}")]
    assert routed(f"<|channel>thought\n{text}") == ([Reasoning(words(text))] if shown else [])


@pytest.mark.parametrize("text", UNFINISHED, ids=short)
def test_a_call_that_never_ends_is_dropped(text: str) -> None:
    assert routed(text) == []
    assert routed(list(f"a {text}")) == [Content("a ")]
    assert routed(f"<|channel>thought\na{text}") == [Reasoning("a")]


@pytest.mark.parametrize(
    "text", [text for text in MALFORMED if text.endswith("<tool_call|>")], ids=short
)
def test_what_follows_a_malformed_call_is_read(text: str) -> None:
    shown = [Content(words(text))] if words(text) else []
    assert routed(text + CALL) == [*shown, LOOK_UP]
    assert routed(f"{text}<|channel>thought\na<channel|>") == [*shown, Reasoning("a")]


def test_a_call_begun_in_another_is_the_one_that_counts() -> None:
    for begun in ("<|tool_call>", "<|tool_call>call:f{a:", "<|tool_call>call:f{}", "<|tool_call>c"):
        shown = [Content(words(begun))] if words(begun) else []
        assert routed(begun + CALL) == [*shown, LOOK_UP]


@pytest.mark.parametrize(
    ("pieces", "parts"),
    [
        (["Hello", " wor"], [[Content("Hello")], [Content(" wor")]]),
        (["a <", "b"], [[Content("a ")], [Content("<b")]]),
        (["a<|channel>", "thought\nb"], [[Content("a")], [Reasoning("b")]]),
        (["<|channel>thought\na\n", "b"], [[Reasoning("a")], [Reasoning("\nb")]]),
        (["<|channel>thought\na\n\n", "<channel|>b"], [[Reasoning("a\n")], [Content("b")]]),
        (["a\n", "<chan", "t"], [[Content("a\n")], [], [Content("<chant")]]),
        ([CALL[:-1], ">b"], [[], [LOOK_UP, Content("b")]]),
        (['<|tool_call>call:f{a:1"'], [[Content('call:f{a:1"')]]),
        (["<|tool_call> o"], [[Content(" o")]]),
        (["<|tool_call>call:f{a b,"], [[Content("call:f{a b,")]]),
        (['<|tool_call>call:f{<|"|>b<|"|>,'], [[Content("call:f{b,")]]),
    ],
)  # fmt: skip
def test_what_comes_out_when(pieces: list[str], parts: list[list[Part]]) -> None:
    router = Router()
    assert [router.push(piece) for piece in pieces] == parts


def test_nesting_has_a_bound_and_stays_readable_below_it() -> None:
    for opening, closing in ("[]", ("{a:", "}")):
        inner = opening * 99 + ("1" if opening == "{a:" else "") + closing * 99
        value = arguments_of(call(f"{{a:{inner}}}"))
        for _ in range(99):
            value = value["a"] if isinstance(value, dict) else value[0]
        for deep in (call(f"{{a:{opening}{inner}{closing}}}"), call("{a:" + opening * 5_000)):
            assert routed(deep) == [Content(words(deep))]


def test_a_turn_of_tokens() -> None:
    tokenizer = small("gemma4")
    text = f"<|channel>thought\nthe thing\n<channel|>hello 世界{CALL}"
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text, special=True)]
    assert routed([*pieces, decoder.flush()]) == [
        Reasoning("the thing"), Content("hello 世界"), LOOK_UP,
    ]  # fmt: skip


texts = st.lists(
    st.sampled_from(["<", "|>", "<|", "channel", "tool_call", "thought", "\n", " ", "x", "{", "é"])
).map("".join)
plain = texts.filter(lambda text: not MARKUP.search(text))

keys = st.from_regex(r"[a-z$_][a-zA-Z0-9_. é-]{0,5}[a-z]", fullmatch=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | texts | st.sampled_from(['"', "}", "<tool_call|>", CALL[:30], "\\", "a,b:c"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
calls = st.tuples(
    st.from_regex(r"[A-Za-z0-9_.-]{1,9}", fullmatch=True), st.dictionaries(keys, values, max_size=3)
)


def written(value: Any) -> str:
    """A value as Gemma 4 writes it."""
    if isinstance(value, str):
        return QUOTE + value + QUOTE
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def turn(parts: list[tuple[str, Any]]) -> str:
    forms = {
        "content": str,
        "thought": lambda text: f"<|channel>thought\n{text}\n<channel|>",
        "call": lambda made: call(written(made[1]), made[0]),
    }
    return "".join(forms[kind](value) for kind, value in parts)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.just("content"), plain)
        | st.tuples(st.just("thought"), plain)
        | st.tuples(st.just("call"), calls),
        max_size=6,
    ).filter(lambda parts: ("content", "content") not in pairwise(kind for kind, _ in parts))
)
def test_what_was_written_is_what_is_read(parts: list[tuple[str, Any]]) -> None:
    expected: list[Part] = []
    for kind, value in parts:
        if kind == "call":
            expected.append(ToolCall(value[0], json.dumps(value[1])))
        elif value:
            expected.append(Content(value) if kind == "content" else Reasoning(value))
    read = [
        ToolCall(part.name, json.dumps(json.loads(part.arguments)))
        if isinstance(part, ToolCall)
        else part
        for part in routed(list(turn(parts)))
    ]
    assert read == merged(expected)


soups = st.lists(st.sampled_from(PIECES), max_size=20)


@pytest.mark.parametrize("text", [*(text for text, _ in TURNS), *UNFINISHED, *MALFORMED], ids=short)
def test_every_cut_in_two_gives_the_same(text: str) -> None:
    text = text[:200]
    whole = routed(text + CALL)
    for at in range(len(text) + 1):
        assert routed([text[:at], text[at:] + CALL]) == whole


@settings(deadline=None, max_examples=300)
@given(soups, st.booleans(), st.data())
def test_parts_do_not_depend_on_how_the_text_is_cut(
    soup: list[str], reasoning: bool, data: st.DataObject
) -> None:
    text = "".join(soup)
    whole = routed(text, reasoning)
    assert routed(list(text), reasoning) == whole
    assert routed(soup, reasoning) == whole
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    assert routed(pieces, reasoning) == whole


def shown(parts: Iterable[Part]) -> str:
    return "".join(
        part.name + part.arguments if isinstance(part, ToolCall) else part.text for part in parts
    )


@settings(deadline=None, max_examples=300)
@given(soups)
def test_nothing_is_lost_but_markup_and_a_call_without_end(soup: list[str]) -> None:
    numbered = [f"{piece}w{index}w" for index, piece in enumerate(soup)]
    parts = routed("".join(numbered))
    found = re.findall(r"w\d+w", shown(parts))
    assert found == [f"w{index}w" for index in range(len(found))]
    assert len(found) == len(soup) or "<|tool_call>" in "".join(soup[: len(found) + 1])
    assert not any(MARKUP.search(part.text) for part in parts if not isinstance(part, ToolCall))
    for part in parts:
        if isinstance(part, ToolCall):
            assert isinstance(json.loads(part.arguments), dict)


@settings(deadline=None, max_examples=300)
@given(soups, st.booleans())
def test_only_what_could_become_a_marker_is_held_back(soup: list[str], reasoning: bool) -> None:
    router = Router(reasoning)
    for piece in soup:
        router.push(piece)
    held = shown(router.flush())
    beginnings = {marker[:end] for marker in (*MARKERS, "thought\n") for end in range(len(marker))}
    beginnings |= {marker[:end] for marker in STRAY for end in range(len(marker))}
    assert held in beginnings | {"<|tool_call"[:end] for end in range(12)}


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from([p for p in PIECES if "tool_call" not in p and p != QUOTE]), max_size=20
    )
)
def test_thoughts_are_what_stands_between_their_markers(soup: list[str]) -> None:
    text, thinking = "".join(soup), False
    expected: list[Part] = []
    for piece in re.split(r"(<\|channel>(?:thought\n?)?|<channel\|>)", text):
        if piece == "<channel|>":
            if thinking and expected and isinstance(expected[-1], Reasoning):
                expected[-1] = Reasoning(expected[-1].text.removesuffix("\n"))
            thinking = False
        elif piece.startswith("<|channel>"):
            thinking = True
        else:
            expected.append(Reasoning(piece) if thinking else Content(piece))
    assert routed(text) == merged(part for part in expected if shown([part]))


@pytest.mark.parametrize(
    "text",
    [
        "<|tool_call>" + " " * 200_000,
        "<|tool_call>call:" + "a" * 200_000,
        "<|tool_call>call:f{}" + "\n" * 200_000,
        "<|tool_call>call:f{a:" + "1" * 200_000,
        '<|tool_call>call:f{a:<|"|>' + "<" * 200_000,
        "<|tool_call>call:" * 10_000,
    ],
    ids=short,
)
def test_a_call_that_never_ends_takes_linear_time(text: str) -> None:
    """A quadratic way would take minutes."""
    start = time.process_time()
    router = Router()
    parts = [*router.push(text), *router.flush()]
    assert time.process_time() - start < 10
    assert words(text).startswith("".join(p.text for p in parts if isinstance(p, Content)))


def test_a_name_is_read_up_to_its_bound() -> None:
    name = "n" * 128
    assert Router().push(f"<|tool_call>  call: {name} {{}} \n<tool_call|>") == [
        ToolCall(name, "{}")
    ]
