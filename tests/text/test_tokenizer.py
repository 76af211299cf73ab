"""Encode and decode: real vocabularies against known ids, small ones against a slow oracle.

Live comparisons with sentencepiece and transformers are in ``reference/``.
"""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_vocab
from gemloom.errors import OptionError, TokenizerError
from gemloom.text.tokenizer import SPACE, StreamDecoder, Tokenizer, _derive
from vocabularies import TEXTS, gemma3, gemma4, gemma4_metadata, metadata, small

GEMMA3_IDS = json.loads((Path(__file__).parents[1] / "data" / "gemma3-ids.json").read_text())
MARKUP = (*tiny_vocab.SPECIAL, *tiny_vocab.GEMMA4_CONTROL, *tiny_vocab.GEMMA4_USER)
GEMMA4_SPECIAL = {
    "<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<|tool>": 46, "<tool|>": 47,
    "<|tool_call>": 48, "<tool_call|>": 49, "<|tool_response>": 50, "<tool_response|>": 51,
    '<|"|>': 52, "<|think|>": 98, "<|channel>": 100, "<channel|>": 101, "<|turn>": 105,
    "<turn|>": 106, "<|image>": 255999, "<|audio>": 256000, "<|image|>": 258880,
    "<|audio|>": 258881, "<image|>": 258882, "<audio|>": 258883, "<|video|>": 258884,
}  # fmt: skip

real = pytest.mark.real
EVERY = [
    pytest.param(lambda: small("gemma4"), id="small-gemma4"),
    pytest.param(lambda: small("gemma3"), id="small-gemma3"),
    pytest.param(gemma4, id="gemma4"),
    pytest.param(gemma3, id="gemma3", marks=real),
]
every = pytest.mark.parametrize("load", EVERY)
Load = Callable[[], Tokenizer]

pieces = st.sampled_from(
    (*MARKUP, "<table>", "</s>", "<start_of_turn>", "<unused7>", "<0x0A>", "<", "|>", "<|", "turn",
     " ", "  ", "\n", "\n\n\n", "\t", "\r\n", "the", "hello", " world", "é", "e\u0301", "界", "🦙")
)  # fmt: skip
texts = st.one_of(st.text(max_size=60), st.lists(pieces, max_size=20).map("".join))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [9259, 1902]),
        (" Hello World!", [26352, 4109, 236888]),
        ("\t\n", [255968, 107]),
        ("Äpfel", [239122, 22744, 535]),
        (" this is 🦙.cpp", [672, 563, 236743, 478, 397, 404, 391, 236761, 12362]),
        ("ied 4 ½ months", [1178, 236743, 236812, 47041, 3794]),
        ("3333", [236800] * 4),
        ("\r", [251]),
        ("\x00", [238]),
        ("\n" * 32, [137, 107]),
        ("\n" * 33, [137, 108]),
        ("\n" * 70, [137, 137, 114]),
        ("user", [2364]),
        ("model", [4368]),
        ("system", [9731]),
        ("thought", [45518]),
        ("", []),
    ],
)
def test_gemma4_known_ids(text: str, ids: list[int]) -> None:
    assert gemma4().encode(text) == ids


@pytest.mark.parametrize("load", [gemma4, pytest.param(gemma3, marks=real)])
def test_runs_of_white_space_are_one_token(load: Load) -> None:
    for length in range(1, 32):
        assert load().encode("\n" * length) == [106 + length]
        assert load().encode("\t" * length) == [255967 + length]
        assert load().encode(" " * length) == [136 + length if length > 1 else 236743]


@real
@pytest.mark.parametrize(("text", "ids"), GEMMA3_IDS.items(), ids=range(len(GEMMA3_IDS)))
def test_gemma3_ids_are_those_of_sentencepiece(text: str, ids: list[int]) -> None:
    assert gemma3().encode(text) == ids


def slow_sentencepiece(arch: str, text: str) -> list[int]:
    """User-defined tokens first, then the best-scored pair of neighbours, leftmost on a tie."""
    entries = tiny_vocab.entries(arch)
    ids = {entry[0].replace(" ", SPACE): i for i, entry in enumerate(entries)}
    normal = {t: s for t, s, kind in entries if kind == tiny_vocab.NORMAL}
    defined = {t.replace(" ", SPACE) for t, _, kind in entries if kind == tiny_vocab.USER}
    text, parts = text.replace(" ", SPACE), []
    while text:
        found = max((d for d in defined if text.startswith(d)), key=len, default=text[0])
        parts.append(found)
        text = text[len(found) :]
    while True:
        pairs = [
            (-normal[a + b], i)
            for i, (a, b) in enumerate(pairwise(parts))
            if a + b in normal and not {a, b} & defined
        ]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        i
        for part in parts
        for i in ([ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()])
    ]


letters = st.text("helowrdthinga <>\n\t界é", max_size=40)


@given(st.one_of(texts, letters, letters.map("▁".join)))
def test_small_gemma3_equals_the_slow_oracle(text: str) -> None:
    plain = slow_sentencepiece("gemma3", text)
    assert small("gemma3").encode(text) == plain


def test_merges_derived_from_ranks_are_those_in_gemma4s_file() -> None:
    """Gemma 4 ranks its tokens by id, but for white space and the HTML tags, 168 to 237."""
    data = gemma4_metadata()
    texts = list(data.strings("tokenizer.ggml.tokens"))
    types = data.array("tokenizer.ggml.token_type").tolist()
    types[168:238] = [tiny_vocab.USER] * 70
    ranks = metadata({"tokenizer.ggml.scores": [-float(i) for i in range(len(texts))]})
    derived = _derive(ranks, texts, types)
    own = [tuple(merge.split(" ")) for merge in data.strings("tokenizer.ggml.merges")]
    assert len(own) == 514_906
    assert [m for m in derived if "".join(m).strip("▁\n\t")] == [
        m for m in own if "".join(m).strip("▁\n\t")
    ]


@every
@settings(deadline=None)
@given(text=texts)
def test_decode_gives_the_text_back(load: Load, text: str) -> None:
    expected = text.replace(SPACE, " ")
    assert load().decode(load().encode(text)) == expected
    assert load().decode(load().encode(text, special=True), special=True) == expected


@every
def test_decode_gives_hard_texts_back(load: Load) -> None:
    for text in TEXTS:
        assert load().decode(load().encode(text)) == text.replace(SPACE, " ")


@settings(deadline=None)
@given(texts)
def test_gemma4_markup_in_plain_text_stays_text(text: str) -> None:
    assert not set(gemma4().encode(text)) & set(GEMMA4_SPECIAL.values())


@real
@settings(deadline=None)
@given(texts)
def test_gemma3_control_tokens_in_plain_text_stay_text(text: str) -> None:
    control = {*range(5), *range(6, 107)}
    assert not set(gemma3().encode(text)) & control


def test_special_reads_every_gemma4_special_token() -> None:
    names = list(GEMMA4_SPECIAL)
    assert gemma4().encode("".join(names), special=True) == list(GEMMA4_SPECIAL.values())
    for name, token in GEMMA4_SPECIAL.items():
        around = gemma4().encode(f"Hello{name} world", special=True)
        assert around == [*gemma4().encode("Hello"), token, *gemma4().encode(" world")]


@real
def test_gemma3_html_is_a_token_and_turns_only_where_special() -> None:
    text = "<start_of_turn>user\n<b>hi<end_of_turn>"
    assert gemma3().encode(text, special=True) == [105, 2364, 107, 200, 2202, 106]
    assert not {105, 106} & set(gemma3().encode(text))
    assert 200 in gemma3().encode(text)


@settings(deadline=None)
@given(st.lists(pieces, max_size=12))
def test_guard_makes_text_of_special_strings_and_is_gone(parts: list[str]) -> None:
    text, guard = "".join(parts), "\ufdd0"
    guarded = text.replace("<", "<" + guard)
    assert gemma4().encode(guarded, special=True, guard=guard) == gemma4().encode(text)
    assert gemma4().encode(guarded, guard=guard) == gemma4().encode(text)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(OptionError, match="lone surrogate at character 2"):
        small("gemma4").encode("ab\ud800")


@every
@settings(deadline=None)
@given(data=st.data())
def test_stream_gives_what_decode_gives_in_whole_characters(load: Load, data: Any) -> None:
    tokenizer = load()
    byte = st.sampled_from(
        [tokenizer.encode("\x00")[0] + n for n in (0, 10, 0xF0, 0x9F, 0xA6, 0x99, 0xC3, 0xED, 0xFF)]
    )
    token = st.one_of(byte, st.integers(0, tokenizer.size - 1))
    ids = data.draw(st.one_of(st.lists(token, max_size=30), texts.map(tokenizer.encode)))
    special = data.draw(st.booleans())
    stream = StreamDecoder(tokenizer, special)
    pushed = [stream.push(token) for token in ids]
    assert "".join(pushed) + stream.flush() == tokenizer.decode(ids, special)


def test_stream_holds_back_half_a_character() -> None:
    stream = StreamDecoder(gemma4())
    assert [stream.push(token) for token in gemma4().encode("🦙!")] == ["", "", "", "🦙", "!"]
    assert stream.push(238 + 0xF0) == ""
    assert stream.flush() == "\ufffd"


def test_bytes_that_are_no_utf8_become_replacement_characters() -> None:
    byte = 238
    assert gemma4().decode([byte + 0xFF, 9259, byte + 0xC3]) == "\ufffdHello\ufffd"


def test_control_tokens_are_hidden_and_markup_is_not() -> None:
    ids = [2, 105, 9259, 48, 106]
    assert gemma4().decode(ids) == "Hello<|tool_call>"
    assert gemma4().decode(ids, special=True) == "<bos><|turn>Hello<|tool_call><turn|>"


@pytest.mark.parametrize("token", [-1, 262144])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    calls = (lambda t: gemma4().decode([t]), gemma4().token, StreamDecoder(gemma4()).push)
    for call in calls:
        with pytest.raises(OptionError, match=f"{token} is not a token id"):
            call(token)


def test_token_gives_raw_bytes() -> None:
    assert gemma4().token(238 + 0xF0) == b"\xf0"
    assert gemma4().token(1902) == b" world"
    assert gemma4().token(2) == b"<bos>"


@given(st.lists(st.integers(0, 5)))
def test_with_bos_gives_exactly_one(ids: list[int]) -> None:
    started = small("gemma4").with_bos(ids)
    assert started[0] == 2
    assert started[1:2] != [2]
    assert started == small("gemma4").with_bos(started)
    assert started[1:] == ids[len(ids) - len(started) + 1 :]


def test_ends_and_suppressed_tokens_come_from_the_file() -> None:
    assert (gemma4().bos, gemma4().eos, gemma4().size) == (2, 1, 262144)
    assert gemma4().eog == {1, 50, 106}
    assert gemma4().suppress == frozenset()
    keys = tiny_vocab.metadata("gemma4", suppress=("<image|>", "<audio|>"))
    keys["tokenizer.ggml.eot_token_id"] = 7
    tokenizer = Tokenizer(metadata(keys))
    names = {tokenizer.token(token) for token in tokenizer.suppress}
    assert names == {b"<image|>", b"<audio|>"}
    assert 7 in tokenizer.eog


@real
def test_gemma3_ends() -> None:
    assert gemma3().eog == {1, 106}
    assert gemma3().chat_template is None


def test_a_token_across_a_newline_is_found() -> None:
    keys = tiny_vocab.metadata("gemma4")
    keys["tokenizer.ggml.tokens"] += ["a\n"]
    keys["tokenizer.ggml.token_type"] += [1]
    keys["tokenizer.ggml.merges"] = ["a \n", *keys["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(metadata(keys))
    assert tokenizer.encode("a\n") == [tokenizer.size - 1]


@pytest.mark.parametrize("unit", ["a", "the ", "\n", "word\n", "<|tur"])
def test_long_texts_take_linear_time(unit: str) -> None:
    """A quadratic way would take minutes."""
    text = (unit * 500_000)[:500_000]
    start = time.process_time()
    ids = gemma4().encode(text, special=True)
    assert time.process_time() - start < 15
    assert gemma4().decode(ids, special=True) == text


def test_threads_share_a_tokenizer() -> None:
    jobs = [(text, chr(0xFDD0 + i % 8)) for i, text in enumerate(TEXTS)] * 4
    expected = [gemma4().encode(text, special=True) for text, _ in jobs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda job: gemma4().encode(job[0], special=True, guard=job[1]), jobs))
    assert got == expected


def _double(keys: dict[str, Any]) -> None:
    keys["tokenizer.ggml.tokens"][-17:] = ["<bos>"] * 17


def _drop_byte(keys: dict[str, Any]) -> None:
    tokens = keys["tokenizer.ggml.tokens"]
    tokens[tokens.index("<0x7F>")] = "something else"


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda keys: keys.__setitem__("tokenizer." + key, value)


def _drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda keys: keys.pop("tokenizer." + key)


def _nameless(role: str) -> Callable[[dict[str, Any]], None]:
    """Neither a key nor a token's name tells the role."""

    def damage(keys: dict[str, Any]) -> None:
        tokens = keys["tokenizer.ggml.tokens"]
        tokens[tokens.index(f"<{role}>")] = f"<another {role}>"
        del keys[f"tokenizer.ggml.{role}_token_id"]

    return damage


def _shorten(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda keys: keys["tokenizer." + key].pop()


@pytest.mark.parametrize(
    ("arch", "damage", "message"),
    [
        ("gemma3", _set("ggml.model", "t5"), "kind 't5' is not supported"),
        ("gemma4", _set("ggml.model", 3), "model must be a string"),
        ("gemma4", _drop("ggml.tokens"), "tokenizer.ggml.tokens is missing"),
        ("gemma4", _drop("ggml.merges"), "tokenizer.ggml.merges is missing"),
        ("gemma4", _set("ggml.merges", ["he llo", "nothere x"]), "merges do not fit"),
        ("gemma4", _set("ggml.merges", ["hello"]), "merges do not fit"),
        ("gemma4", _shorten("ggml.token_type"), r"\d+ tokens, but \d+ types"),
        ("gemma3", _shorten("ggml.scores"), r"\d+ tokens, but \d+ scores"),
        ("gemma3", _drop("ggml.scores"), "scores is missing"),
        ("gemma4", _nameless("bos"), "bos_token_id is missing"),
        ("gemma4", _nameless("eos"), "eos_token_id is missing"),
        ("gemma4", _set("ggml.eos_token_id", -2), "eos_token_id is -2, but there are"),
        ("gemma4", _set("ggml.eos_token_id", 1.5), "eos_token_id must be integers"),
        ("gemma4", _set("ggml.eos_token_id", "one"), "eos_token_id must be integers"),
        ("gemma4", _set("ggml.bos_token_id", 10**6), "bos_token_id is 1,000,000, but there are"),
        ("gemma4", _set("ggml.suppress_tokens", [5, 10**6]), "suppress_tokens is 1,000,000, but"),
        ("gemma4", _double, "the token '<bos>' is there twice, and 16 more"),
        ("gemma4", _drop_byte, "byte token <0x7F> is missing"),
        ("gemma3", _drop_byte, "byte token <0x7F> is missing"),
        ("gemma3", _set("ggml.add_space_prefix", True), "add_space_prefix is true"),
        ("gemma4", _set("chat_template", 3), "chat_template must be a string"),
        ("gemma4", lambda keys: keys["tokenizer.ggml.tokens"].__setitem__(9, ""), "9 is empty"),
        ("gemma4", lambda keys: keys["tokenizer.ggml.token_type"].__setitem__(9, 0), "type 0"),
        ("gemma4", _set("ggml.tokens", [b"\xff\xfe"]), "not UTF-8"),
        ("gemma3", lambda keys: keys["tokenizer.ggml.scores"].__setitem__(9, math.nan), "score"),
    ],
)  # fmt: skip
def test_a_bad_vocabulary_is_named(arch: str, damage: Any, message: str) -> None:
    keys = tiny_vocab.metadata(arch)
    damage(keys)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer(metadata(keys))
    assert str(caught.value).startswith("small.gguf: ")
    assert "\n" not in str(caught.value)
