"""What a token is follows from its name and use, whatever types and kinds makers of files write."""

import functools
import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemloom
import tiny
import tiny_vocab
from command_line import fine, write
from conftest import Load
from gemloom.files.gguf import Metadata, StringArray
from gemloom.text import vocabulary
from gemloom.text.chat import encode_chat
from gemloom.text.tokenizer import Tokenizer, _derive
from vocabularies import TEXTS, gemma3, gemma4, gemma4_metadata, metadata, small

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
KEY = "tokenizer.ggml."
CHAT = [
    {"role": "user", "content": "hello <turn|> world"},
    {"role": "assistant", "content": "the"},
    {"role": "user", "content": "and?"},
]
arches = pytest.mark.parametrize("arch", ["gemma4", "gemma3"])
markup = {
    "gemma4": (*tiny_vocab.SPECIAL, *tiny_vocab.GEMMA4_CONTROL, *tiny_vocab.GEMMA4_USER),
    "gemma3": (*tiny_vocab.SPECIAL, *tiny_vocab.GEMMA3_CONTROL),
}
pieces = st.sampled_from(
    (*markup["gemma4"], *tiny_vocab.GEMMA3_CONTROL, "<table>", "<0x0A>", "<", "|>", " ", "   ",
     "\n\n", "\t", "hello", " world", "é", "界", "🦙")
)  # fmt: skip
texts = st.one_of(st.text(max_size=40), st.lists(pieces, max_size=12).map("".join))


def retyped(arch: str, types: dict[str, int]) -> dict[str, Any]:
    """The keys of a tiny vocabulary with other types for some tokens."""
    keys = tiny_vocab.metadata(arch)
    tokens = keys[KEY + "tokens"]
    for text, type_ in types.items():
        keys[KEY + "token_type"][tokens.index(text)] = type_
    return keys


def same(one: Tokenizer, other: Tokenizer, text: str) -> None:
    """Two tokenizers read and write a text alike."""
    for special in (False, True):
        ids = one.encode(text, special)
        assert other.encode(text, special) == ids
        assert other.decode(ids, special) == one.decode(ids, special)
        assert other.decode(ids) == one.decode(ids)


# -- types -----------------------------------------------------------------------------------


@arches
@given(data=st.data())
def test_types_of_markup_and_bytes_change_nothing(arch: str, data: st.DataObject) -> None:
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    chosen = [*markup[arch], *(f"<0x{byte:02X}>" for byte in range(256))]
    types = {text: chance.choice((NORMAL, CONTROL, USER)) for text in chosen}
    tokenizer = Tokenizer(metadata(retyped(arch, types)))
    same(small(arch), tokenizer, data.draw(texts))
    assert tokenizer.eog == small(arch).eog
    assert tokenizer.turn == small(arch).turn
    assert encode_chat(tokenizer, CHAT) == encode_chat(small(arch), CHAT)


@arches
def test_no_types_at_all_are_the_names_then(arch: str) -> None:
    """Of Gemma 3 its runs of spaces and HTML tags are lost with them, and nothing else."""
    keys = tiny_vocab.metadata(arch)
    del keys[KEY + "token_type"]
    tokenizer = Tokenizer(metadata(keys))
    assert tokenizer.notes == ("small.gguf: no token types: names say what tokens are",)
    assert tokenizer.eog == small(arch).eog
    for text in ("hello the world", "äh 界 🦙", "".join(markup[arch])):
        same(small(arch), tokenizer, text)


def test_a_contradiction_is_one_line_that_names_the_first() -> None:
    assert not small("gemma4").notes
    types = dict.fromkeys(("<|channel>", "<channel|>", "<|tool_call>", '<|"|>'), CONTROL)
    notes = Tokenizer(metadata(retyped("gemma4", types | {"<turn|>": NORMAL}))).notes
    turn = tiny_vocab.token_id("gemma4", "<turn|>")
    assert len(notes) == 1
    assert notes[0].startswith(f"small.gguf: wrong token types: <turn|> (id {turn}) normal, ")
    assert "and 2 more" in notes[0]
    assert "\n" not in notes[0]


@pytest.mark.parametrize("load", [gemma4, pytest.param(gemma3, marks=pytest.mark.real)])
def test_released_files_contradict_nothing(load: Callable[[], Tokenizer]) -> None:
    assert not load().notes


def edited(**changes: Any) -> Metadata:
    """The real Gemma 4 metadata with other keys of its tokenizer."""
    real = gemma4_metadata()
    return Metadata("edited.gguf", {**real, **{KEY + key: v for key, v in changes.items()}})


@functools.cache
def ollama() -> Tokenizer:
    """As Ollama writes Gemma 4: another kind, markup as control, bytes as normal, ids as scores."""
    types = gemma4_metadata().array(KEY + "token_type").copy()
    types[types == USER] = CONTROL
    types[types == BYTE] = NORMAL
    scores = np.arange(len(types), dtype=np.float32)
    ends = np.array([1, 106, 50], np.int32)
    return Tokenizer(
        edited(model="llama", token_type=types, scores=scores, eos_token_ids=ends)
    )  # fmt: skip


@settings(max_examples=40)
@given(text=texts)
def test_ollamas_gemma4_is_read_as_any_other(text: str) -> None:
    same(gemma4(), ollama(), text)


def test_ollamas_gemma4_in_hard_texts_and_chats() -> None:
    assert ollama().encode("Hello world") == [9259, 1902]
    for text in TEXTS:
        same(gemma4(), ollama(), text)
    assert ollama().eog == gemma4().eog
    assert encode_chat(ollama(), CHAT) == encode_chat(gemma4(), CHAT)
    thought = [100, 45518, 107, 9259, 101, 1902]
    assert ollama().decode(thought) == "<|channel>thought\nHello<channel|> world"


def test_turn_markers_typed_normal_stay_single_tokens() -> None:
    types = gemma4_metadata().array(KEY + "token_type").copy()
    types[[1, 105, 106]] = NORMAL
    tokenizer = Tokenizer(edited(token_type=types))
    assert encode_chat(tokenizer, CHAT) == encode_chat(gemma4(), CHAT)
    assert tokenizer.eog == {1, 50, 106}
    assert tokenizer.decode([105, 2364, 106]) == "user"


def test_what_a_template_writes_is_a_token_where_there_is_one() -> None:
    keys = tiny_vocab.metadata("gemma3")
    keys[KEY + "tokens"] += ["<start_function_call>", "<never_written>"]
    keys[KEY + "token_type"] += [NORMAL, NORMAL]
    keys[KEY + "scores"] += [-1000.0, -1000.0]
    keys["tokenizer.chat_template"] += "<start_function_call>"
    tokenizer = Tokenizer(metadata(keys))
    call = tokenizer.id_of("<start_function_call>")
    assert encode_chat(tokenizer, [{"role": "user", "content": "a"}])[-1] == call
    assert call not in tokenizer.encode("<start_function_call>")
    assert tokenizer.id_of("<never_written>") not in tokenizer.encode("<never_written>", True)
    assert tokenizer.decode([call or 0]) == "<start_function_call>"


# -- kinds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma4", "llama", "gpt2", "gemma", None])
@settings(max_examples=20)
@given(text=texts)
def test_the_name_of_the_kind_decides_nothing(kind: str | None, text: str) -> None:
    for arch in ("gemma4", "gemma3"):
        same(small(arch), _of_kind(arch, kind), text)


@functools.cache
def _of_kind(arch: str, kind: str | None) -> Tokenizer:
    keys = tiny_vocab.metadata(arch)
    keys[KEY + "model"] = kind
    if kind is None:
        del keys[KEY + "model"]
    return Tokenizer(metadata(keys))


@functools.cache
def _with_both() -> Tokenizer:
    keys = tiny_vocab.metadata("gemma3")
    own = metadata(keys)
    found = vocabulary.read(own)
    keys[KEY + "merges"] = [" ".join(pair) for pair in _derive(own, found.texts, found.types)]
    return Tokenizer(metadata(keys))


@given(text=texts)
def test_merges_beside_scores_give_the_same_ids(text: str) -> None:
    """Ollama's Gemma 3 has both."""
    same(small("gemma3"), _with_both(), text)


def test_an_empty_list_of_merges_is_none() -> None:
    none = {KEY + "merges": StringArray(memoryview(b""), 0)}
    keys = metadata(tiny_vocab.metadata("gemma3"))
    tokenizer = Tokenizer(Metadata("small.gguf", {**keys, **none}))
    same(small("gemma3"), tokenizer, "hello the world")


# -- ids -------------------------------------------------------------------------------------

NONE = [-1, 2**32 - 1, 2**64 - 1, [], [-1]]


@pytest.mark.parametrize("value", NONE, ids=map(str, NONE))
def test_an_id_that_means_none_is_left_out(value: Any) -> None:
    keys = tiny_vocab.metadata("gemma4")
    for role in ("bos", "eos", "eot", "eom", "unknown", "padding", "mask"):
        keys[f"{KEY}{role}_token_id"] = value
    keys[KEY + "suppress_tokens"] = value
    tokenizer = Tokenizer(metadata(keys))
    assert (tokenizer.bos, tokenizer.eos) == (2, 1)
    assert tokenizer.eog == small("gemma4").eog
    assert tokenizer.suppress == frozenset()


def test_begin_and_end_are_known_by_their_names() -> None:
    keys = tiny_vocab.metadata("gemma4")
    del keys[KEY + "bos_token_id"], keys[KEY + "eos_token_id"]
    tokenizer = Tokenizer(metadata(keys))
    assert (tokenizer.bos, tokenizer.eos) == (2, 1)


@pytest.mark.parametrize("value", [7, 7.0, np.uint8(7).item(), [7], [7, 9], [9.0, 7.0]])
@pytest.mark.parametrize("key", ["eot_token_id", "eom_token_id", "eos_token_ids", "eos_token_id"])
def test_ends_in_every_form(key: str, value: Any) -> None:
    keys = tiny_vocab.metadata("gemma4")
    keys[KEY + key] = value
    tokenizer = Tokenizer(metadata(keys))
    given_ends = {int(token) for token in (value if isinstance(value, list) else [value])}
    assert tokenizer.eog == small("gemma4").eog | given_ends


def test_a_named_end_that_is_typed_normal_is_no_text() -> None:
    keys = tiny_vocab.metadata("gemma3")
    keys[KEY + "tokens"] += ["[the end]"]
    keys[KEY + "token_type"] += [NORMAL]
    keys[KEY + "scores"] += [-1000.0]
    token = len(keys[KEY + "tokens"]) - 1
    keys[KEY + "eos_token_id"] = token
    tokenizer = Tokenizer(metadata(keys))
    assert tokenizer.encode("[the end]", special=True) == [token]
    assert tokenizer.decode([token]) == ""


# -- rows of the embedding table -------------------------------------------------------------


def without_last(keys: dict[str, Any]) -> None:
    for key in ("tokens", "scores", "token_type"):
        keys[KEY + key] = keys[KEY + key][:-3]  # runs of tabs
    if KEY + "merges" in keys:
        keys[KEY + "merges"] = [merge for merge in keys[KEY + "merges"] if "\t" not in merge]


def with_more(keys: dict[str, Any]) -> None:
    keys[KEY + "tokens"] += ["[one]", "[two]"]
    keys[KEY + "scores"] += [0.0, 1.0]
    keys[KEY + "token_type"] += [USER, NORMAL]


Edit = Callable[[dict[str, Any]], None]


def load_edited(load_with: Any, edit: Edit, variant: str = "e2b") -> gemloom.Model:
    data = tiny.gguf_bytes(tiny.VARIANTS[variant], edit=lambda keys, _: edit(keys))
    model: gemloom.Model = load_with(data, context=128, threads=1)
    return model


@pytest.mark.parametrize("variant", ["e2b", "gemma3"])
def test_rows_without_a_token_are_never_picked(variant: str) -> None:
    rows = tiny.VARIANTS[variant].n_vocab
    with load_edited(gemloom.load, without_last, variant) as model:
        assert model.tokenizer.notes[0].endswith("3 embeddings have no token and are never picked")
        bias = {rows - 1: 100.0, rows - 2: 100.0}
        tokens = model.generate("hello", max_tokens=20, logit_bias=bias, seed=1).tokens
        assert max(tokens) < rows - 3
        assert model.detokenize([rows - 1]) == ""


@pytest.mark.parametrize("variant", ["e2b", "gemma3"])
def test_tokens_without_a_row_are_left_out(variant: str) -> None:
    def edit(keys: dict[str, Any]) -> None:
        with_more(keys)
        if KEY + "merges" in keys:
            keys[KEY + "merges"] = ["[two ]", *keys[KEY + "merges"]]
            keys[KEY + "tokens"][-1] = "[two]"
            keys[KEY + "tokens"] += ["[two"]
            keys[KEY + "scores"] += [0.0]
            keys[KEY + "token_type"] += [NORMAL]

    with load_edited(gemloom.load, edit, variant) as model:
        arch = tiny.VARIANTS[variant].arch
        assert "have no embedding and are left out" in model.tokenizer.notes[0]
        assert model.tokenizer.size == model.config.n_vocab
        same(small(arch), model.tokenizer, "[one][two] hello")
        assert model.generate("[one][two]", max_tokens=3).tokens


# -- tokens that are there twice -------------------------------------------------------------


@pytest.mark.parametrize("text", ["the", "<|turn>", "<turn|>", "<0x0A>", "▁the", "a"])
def test_a_token_that_is_there_twice_changes_no_id(text: str) -> None:
    """Google's own files of Gemma 4 have three such; texts are read as before, ids written."""
    keys = tiny_vocab.metadata("gemma4")
    keys[KEY + "tokens"] += [text, text]
    keys[KEY + "token_type"] += [NORMAL, NORMAL]
    tokenizer = Tokenizer(metadata(keys))
    assert f"the token {text!r} is there twice, and 1 more" in tokenizer.notes[0]
    for sample in TEXTS:
        same(small("gemma4"), tokenizer, sample)
    assert encode_chat(tokenizer, CHAT) == encode_chat(small("gemma4"), CHAT)
    last, first = tokenizer.size - 1, small("gemma4").id_of(text)
    assert first is not None
    assert tokenizer.decode([last], special=True) == small("gemma4").decode([first], True)
    assert (last in tokenizer.eog) == (first in tokenizer.eog)


def test_of_two_the_one_that_is_markup_by_its_type_is_read() -> None:
    keys = tiny_vocab.metadata("gemma3")
    keys[KEY + "tokens"] += ["[tag]", "[tag]"]
    keys[KEY + "token_type"] += [NORMAL, CONTROL]
    keys[KEY + "scores"] += [0.0, 0.0]
    tokenizer = Tokenizer(metadata(keys))
    assert tokenizer.encode("[tag]", special=True) == [tokenizer.size - 1]


# -- telling ---------------------------------------------------------------------------------


def as_control(keys: dict[str, Any]) -> None:
    tokens = keys[KEY + "tokens"]
    for text in tiny_vocab.GEMMA4_USER:
        keys[KEY + "token_type"][tokens.index(text)] = CONTROL


def test_a_contradiction_is_told_once_at_load(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gemloom"):
        with load_edited(gemloom.load, as_control) as model:
            model.chat([{"role": "user", "content": "hello"}], max_tokens=3)
            assert [record.getMessage() for record in caplog.records] == [*model.tokenizer.notes]
        assert len(caplog.records) == 1


def test_nothing_is_told_of_a_file_as_it_should_be(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    load("e2b")
    assert not caplog.records


def test_inspect_tells_too(tmp_path: Any) -> None:
    path = write(tmp_path, edit=lambda keys, _: as_control(keys))
    assert "wrong token types: <|tool_call>" in " ".join(fine("inspect", path).stdout.split())
    assert '"notes": []' not in fine("inspect", path, "--json").stdout
    broken = write(tmp_path, edit=lambda keys, _: keys.pop(KEY + "bos_token_id"))
    assert '"notes": []' in fine("inspect", broken, "--json").stdout


class Forced:
    """A constraint under which an answer is these tokens."""

    def __init__(self, tokens: list[int], n_vocab: int) -> None:
        self.left, self.n_vocab = list(tokens), n_vocab
        self.finished = False

    def prepare(self) -> None: ...

    def mask(self) -> np.ndarray:
        allowed = np.zeros(self.n_vocab, bool)
        allowed[self.left[0]] = True
        return allowed

    def accept(self, token: int) -> None:
        self.finished = self.left.pop(0) == token and not self.left


def test_thoughts_and_calls_are_found_whatever_the_types() -> None:
    answer = '<|channel>thought\nthe<channel|>hello<|tool_call>call:is{a:<|"|>in<|"|>}<tool_call|>'
    ids = small("gemma4").encode(answer, special=True)
    for edit in (as_control, lambda keys: None):
        with load_edited(gemloom.load, edit) as model:
            bound = Forced(ids, model.config.n_vocab)
            message = model.chat(CHAT, constraint=bound).message
        assert message["content"] == "hello"
        assert message["reasoning_content"] == "the"
        function = message["tool_calls"][0]["function"]
        assert function == {"name": "is", "arguments": '{"a":"in"}'}
