"""An answer that only repeats itself ends, by a rule on its own tokens; no other text does."""

import json
import time
from collections.abc import Iterable, Sequence
from itertools import chain, repeat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemloom
from conftest import Load
from gemloom.sampling.params import SamplingParams
from gemloom.text.repetition import EVERY, LONGEST, PATIENCE, TIMES, Repetition
from http_serving import http, serving
from vocabularies import small

LIMIT = SamplingParams().repetition_limit
WORD, ZERO = 65, 48  # as ``spell`` has them: "A" and "0"


def spell(tokens: Sequence[int]) -> str:
    return "".join(map(chr, tokens))


def ends_at(tokens: Iterable[int], limit: int = LIMIT) -> int | None:
    """After how many tokens the rule ends them."""
    rule = Repetition(limit, spell)
    return next((count for count, token in enumerate(tokens, 1) if rule.push(token)), None)


def is_met(tokens: list[int], limit: int) -> bool:
    """The rule as it is documented, looked up for every piece."""
    for piece in range(1, LONGEST + 1):
        needed = max(TIMES * piece, limit)
        if not any(map(str.isalpha, spell(tokens[-piece:]))):
            needed *= PATIENCE
        last = tokens[-needed:]
        if len(last) == needed and last[piece:] == last[:-piece]:
            return True
    return False


pieces = st.lists(st.sampled_from([WORD, WORD + 1, ZERO, ZERO + 1]), min_size=1, max_size=9)


@settings(max_examples=25, deadline=None)
@given(parts=st.lists(st.tuples(pieces, st.integers(1, 60)), max_size=2), limit=st.integers(1, 400))
def test_it_is_the_documented_rule(parts: list[tuple[list[int], int]], limit: int) -> None:
    tokens = [token for piece, times in parts for token in piece * times]
    rule = Repetition(limit, spell)
    for count, token in enumerate(tokens, 1):
        ended = rule.push(token)
        if count >= limit and count % EVERY == 0:
            assert ended == is_met(tokens[:count], limit)
        else:
            assert not ended


@settings(max_examples=40, deadline=None)
@given(
    before=st.lists(st.integers(WORD, WORD + 25), max_size=100),
    piece=st.lists(st.integers(WORD, WORD + 25), min_size=1, max_size=LONGEST),
)
def test_every_endless_repetition_ends_soon(before: list[int], piece: list[int]) -> None:
    needed = max(TIMES * len(piece), LIMIT)
    ended = ends_at([*before, *piece * (-(-(needed + 2 * EVERY) // len(piece)) + 1)])
    assert ended is not None and ended <= len(before) + needed + EVERY


def text(words: str) -> list[int]:
    return small("gemma3").encode(words)


LEGITIMATE = {
    "a thousand zeros": "[" + "0, " * 1_000 + "0]",
    "a matrix of zeros": ("[" + "0, " * 31 + "0],\n") * 32,
    "a line sixty times": "I will not talk.\n" * 60,
    "a ruler": "-" * 4_000,
    "a table": "".join(f"| {row} | yes | yes | no |\n" for row in range(900)),
    "code": "".join(f"case {n}:\n    return true;\n" for n in range(900)),
    "json": json.dumps([{"id": n, "ok": True, "name": None} for n in range(900)]),
    "a poem with refrains": "".join(
        f"Verse {n} of the song\n" + "Hallelujah, hallelujah\n" * 8 for n in range(99)
    ),
    "a bitmap": "".join(f"{(n * 2654435761) % 2**32:032b}\n" for n in range(300)),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_legitimate_text_goes_on(name: str) -> None:
    assert ends_at(map(ord, LEGITIMATE[name])) is None  # a token a letter, which is the most
    words = text(LEGITIMATE[name])
    rule = Repetition(LIMIT, small("gemma3").decode)
    assert not any(map(rule.push, words))


@settings(max_examples=30, deadline=None)
@given(line=pieces, every=st.integers(1, 63), rows=st.integers(2, 40))
def test_a_change_now_and_then_is_no_repetition(line: list[int], every: int, rows: int) -> None:
    """Rows with a number, refrains with verses between them."""
    parts = ([*line * every, 200 + row] for row in range(rows))
    assert ends_at(chain.from_iterable(parts)) is None or len(line) * every >= LIMIT


def test_zero_turns_it_off() -> None:
    assert ends_at(repeat(WORD, 20_000), limit=0) is None
    assert ends_at(repeat(WORD, 20_000)) == LIMIT
    assert ends_at(repeat(ZERO, 20_000)) == PATIENCE * LIMIT


@pytest.mark.parametrize("piece", [[WORD], [ZERO], list(range(250)), list(range(100_000))])
def test_it_costs_next_to_nothing(piece: list[int]) -> None:
    """Processor time of a token; one of the smallest model takes a thousand times as long."""
    rule, count = Repetition(10**9 if len(piece) < 9 else LIMIT, spell), 100_000
    tokens = (piece * (count // len(piece) + 1))[:count]
    started = time.process_time()
    for token in tokens:
        rule.push(token)
    assert (time.process_time() - started) / count < 20e-6


# -- in a model ----------------------------------------------------------------------


@pytest.fixture
def model(load: Load) -> gemloom.Model:
    return load("e2b", context=4096)


def stuck(model: gemloom.Model) -> dict[int, float]:
    """A bias under which nothing but one word follows; all ends are as likely as they were."""
    word = next(
        token
        for token in range(model.config.n_vocab)
        if token not in model.tokenizer.suppress
        and token not in model.tokenizer.eog
        and model.tokenizer.decode([token]).isalpha()
    )
    return {word: 100.0}


def test_an_answer_that_repeats_itself_ends(model: gemloom.Model) -> None:
    options = {"logit_bias": stuck(model), "temperature": 0, "repetition_limit": 128}
    done = model.generate("a", **options)
    assert (done.finish_reason, len(done.tokens)) == ("repetition", 128)
    assert done.text == model.detokenize(done.tokens)
    off = model.generate("a", **options | {"repetition_limit": 0, "max_tokens": 300})
    assert (off.finish_reason, len(off.tokens)) == ("length", 300)
    assert off.tokens[:128] == done.tokens
    assert model.generate("a", **options, max_tokens=128).finish_reason == "length"


def test_what_was_asked_for_does_not_end(model: gemloom.Model) -> None:
    """A grammar that allows nothing else, and a request for all the tokens there are."""
    short = {"temperature": 0, "repetition_limit": 64, "max_tokens": 200}
    formed = model.generate("a", constraint=model.grammars.regex("(ab)*"), **short)
    assert formed.finish_reason in ("length", "stop")
    barred = dict.fromkeys(model.tokenizer.eog, -100.0)
    done = model.generate("a", logit_bias=stuck(model) | barred, **short)
    assert (done.finish_reason, len(done.tokens)) == ("length", 200)


@pytest.mark.parametrize("stream", [False, True])
def test_clients_get_a_reason_they_know(model: gemloom.Model, stream: bool) -> None:
    bias = {str(token): value for token, value in stuck(model).items()}
    asked = {"logit_bias": bias, "temperature": 0, "repetition_limit": 64, "stream": stream}
    with serving(model) as url, http(url) as client:
        said = client.post("/v1/completions", json={"prompt": "a", **asked}).text
        chat = {"messages": [{"role": "user", "content": "a"}], **asked}
        talked = client.post("/v1/chat/completions", json=chat).text
        responded = client.post("/v1/responses", json={"input": "a", **asked}).text
    for answer in (said, talked):
        assert '"finish_reason":"length","stop_reason":"repetition"' in answer
    assert '"incomplete_details":{"reason":"max_output_tokens"}' in responded
    assert '"stop_reason":"repetition"' in responded
