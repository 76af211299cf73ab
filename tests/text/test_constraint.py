"""Grammars by random walks: whatever the masks allow must end in text that a parser takes."""

import json
import random
import re
import threading

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemloom.errors import GemloomError, OptionError, RequestError
from gemloom.text.bounds import ThinkingBudget, both
from gemloom.text.constraint import Grammars
from grammar_walks import EXTRA, grammars, one, specials, text, walk
from vocabularies import gemma3, gemma4, small

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
