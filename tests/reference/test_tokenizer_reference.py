"""Ids against the tokenizers of others on the real vocabularies; needs transformers, sentencepiece.

Gemma 4: ``tokenizers`` put together as transformers' Gemma class does (spaces replaced, one merge
problem for a whole text), which has none of our cutting at newlines. Gemma 3: sentencepiece on a
model file made of the same vocabulary, and transformers' conversion of that file.
"""

import copy
import random
from pathlib import Path

import pytest
import sentencepiece
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as sp
from tokenizers import AddedToken
from transformers import GemmaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from vocabularies import TEXTS, gemma3, gemma3_metadata, gemma4, gemma4_metadata

pytestmark = pytest.mark.reference

WORDS = (
    *"aeinrst .,'-=_/<>\n\t",
    "the",
    " the",
    "ing",
    "  ",
    "é",
    "界",
    "🦙",
    "ß",
    "▁",
    "12",
    "\r",
    "</s>",
    "<b>",
)
texts = st.one_of(
    st.text(),
    st.lists(st.sampled_from(WORDS)).map("".join),
    st.text(st.characters(codec="utf-8", categories=("L", "M", "N", "Z", "P", "S"))),
)


def pseudo_words(seed: int, count: int) -> list[str]:
    """Random texts of one alphabet each: letters, marks and repetitions of every script."""
    rng = random.Random(seed)
    blocks = (range(0x20, 0x7F), range(0x61, 0x7B), range(0xA0, 0x250), range(0x370, 0x600),
              range(0x600, 0x700), range(0x900, 0xE80),
              range(0x3040, 0x3100), range(0x4E00, 0x9FA0),
              range(0xAC00, 0xD7A4), range(0x1F300, 0x1F700), range(0x2D, 0x40))  # fmt: skip
    made = []
    for _ in range(count):
        block = rng.choice(blocks)
        few = rng.choices(block, k=rng.randint(1, 12))
        made.append("".join(chr(rng.choice(few)) for _ in range(rng.randint(1, 60))))
    return made


@pytest.fixture(scope="module")
def hf4() -> GemmaTokenizer:
    ids = {text: i for i, text in enumerate(gemma4_metadata().strings("tokenizer.ggml.tokens"))}
    merges = [tuple(m.split(" ")) for m in gemma4_metadata().strings("tokenizer.ggml.merges")]
    return GemmaTokenizer(vocab=ids, merges=merges)


@pytest.fixture(scope="module")
def sp_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = gemma3_metadata()
    model = sp.ModelProto()
    model.trainer_spec.model_type = sp.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.pad_id, model.trainer_spec.eos_id = 0, 1
    model.trainer_spec.bos_id, model.trainer_spec.unk_id = 2, 3
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    scores, kinds = (data.array(f"tokenizer.ggml.{key}") for key in ("scores", "token_type"))
    for text, score, kind in zip(data.strings("tokenizer.ggml.tokens"), scores, kinds, strict=True):
        type_ = TokenType.UNKNOWN if text == "<unk>" else int(kind)
        score = (
            0.0 if kind == TokenType.USER_DEFINED else float(score)
        )  # as sentencepiece writes it
        model.pieces.add(piece=text.replace(" ", "▁"), score=score, type=int(type_))
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def sp3(sp_file: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(sp_file))


@pytest.fixture(scope="module")
def hf3(sp_file: Path) -> GemmaTokenizer:
    pieces = sp.ModelProto.FromString(sp_file.read_bytes()).pieces
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    scores = {piece.piece: piece.score for piece in pieces}
    defined = [piece.piece for piece in pieces if piece.type == TokenType.USER_DEFINED]
    hf = GemmaTokenizer(vocab=ids, merges=generate_merges(ids, scores))
    hf.add_tokens([AddedToken(text, normalized=False) for text in defined])
    return hf


def hard_texts() -> list[str]:
    rng = random.Random(3)
    mixed = ["".join(rng.choices(WORDS, k=rng.randint(1, 50))) for _ in range(4000)]
    return [*TEXTS, *pseudo_words(1, 4000), *mixed]


def hf_ids(hf: GemmaTokenizer, text: str) -> list[int]:
    return hf(text, add_special_tokens=False)["input_ids"]


def no_special(text: str) -> bool:
    """Transformers reads its special tokens in any text; plain text of ours never does."""
    return not any(name in text for name in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))


def test_gemma4_equals_transformers(hf4: GemmaTokenizer) -> None:
    for text in filter(no_special, hard_texts()):
        assert gemma4().encode(text) == hf_ids(hf4, text), text


def test_gemma4_special_tokens_equal_transformers(hf4: GemmaTokenizer) -> None:
    types = gemma4_metadata().array("tokenizer.ggml.token_type")
    names = [gemma4().token(i).decode() for i, kind in enumerate(types) if kind in (3, 4)]
    hf4 = copy.deepcopy(hf4)  # the other tests' must not read these in their texts
    hf4.add_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    rng = random.Random(5)
    for _ in range(2000):
        text = "".join(rng.choices((*names, *WORDS), k=20))
        assert gemma4().encode(text, special=True) == hf_ids(hf4, text), text


def test_gemma4_a_long_text_equals_transformers(hf4: GemmaTokenizer) -> None:
    text = "\n\n".join(hard_texts()[:3000]).replace("<", "")
    assert gemma4().encode(text) == hf_ids(hf4, text)


@settings(max_examples=1000, deadline=None)
@given(text=texts.filter(no_special))
def test_gemma4_equals_transformers_on_any_text(hf4: GemmaTokenizer, text: str) -> None:
    assert gemma4().encode(text) == hf_ids(hf4, text)


def test_gemma3_equals_sentencepiece(sp3: sentencepiece.SentencePieceProcessor) -> None:
    for text in hard_texts():
        assert gemma3().encode(text) == sp3.encode(text), text


@settings(max_examples=1000, deadline=None)
@given(text=texts)
def test_gemma3_equals_sentencepiece_on_any_text(
    sp3: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    assert gemma3().encode(text) == sp3.encode(text)


def test_gemma3_equals_transformers(hf3: GemmaTokenizer) -> None:
    """But for U+2581 in a text: its runs are looked for before spaces become U+2581."""
    for text in filter(no_special, hard_texts()):
        if "▁" not in text:
            assert gemma3().encode(text) == hf_ids(hf3, text), text


def test_decode_equals_sentencepiece(sp3: sentencepiece.SentencePieceProcessor) -> None:
    for text in hard_texts():
        ids = gemma3().encode(text)
        assert gemma3().decode(ids) == sp3.decode(ids), text
