"""The tokenizer of a checkpoint as the tokenizer.* keys of a GGUF. No text is tokenized here.

Gemma 4's (``gemma4``) is kept as it is: vocabulary and merges. Gemma 3's (``llama``) is kept as
vocabulary and scores, which is all that readers of such files look at: a later token has a lower
score. That these scores give the checkpoint's very merges is checked.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from gguf import TokenType

from gemloom.errors import TokenizerError
from gemloom.files.gguf import StringArray, Value
from gemloom.text import merges as ranks
from gemloom.text.vocabulary import SPACE, VISIBLE
from gemloom.tools.convert.checkpoint import Checkpoint, Json

_KEY = "tokenizer.ggml."
Merges = list[tuple[str, str]]
_UNRANKED = -1000.0  # the score of a token that no merge makes
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}
_USUAL = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}


@dataclass(slots=True)
class _Vocabulary:
    """Every token by its id; what has no text is a row of the embedding table that nobody uses."""

    name: str  # of the file, for messages
    size: int  # rows of the embedding table
    texts: dict[int, str] = field(default_factory=dict)
    types: dict[int, TokenType] = field(default_factory=dict)
    beyond: int = 0  # added tokens that the embedding table has no row for

    def put(self, token: Any, text: Any, kind: TokenType) -> None:
        """Set what is known of one token; later calls overrule earlier ones."""
        if type(token) is not int or token < 0 or not isinstance(text, str) or not text:
            raise TokenizerError(f"{self.name}: {str(text)[:80]!r} with the id {token!r}: no token")
        if token < self.size:
            self.texts[token], self.types[token] = text, kind

    def columns(self) -> tuple[list[str], list[int]]:
        """Texts and types of all tokens in the order of their ids."""
        ids = range(self.size)
        texts = [self.texts.get(i, f"[PAD{i}]") for i in ids]
        return texts, [int(self.types.get(i, TokenType.UNUSED)) for i in ids]


def read(
    checkpoint: Checkpoint, kind: str, size: int
) -> tuple[dict[str, Value], list[int], list[str]]:
    """The tokenizer's keys, for a table of ``size`` rows, and what the user should know.

    Between the two: what ends an answer beside the eos token, for ``end_keys``. ``kind`` is
    "gemma4" or "llama". Raises TokenizerError for a vocabulary that is not of this kind,
    SourceError for files that are missing.
    """
    config = checkpoint.optional_json("tokenizer_config.json") or {}
    found = checkpoint.optional_json("tokenizer.json")
    if found is not None:
        vocabulary, merges = _from_json(checkpoint, found, config, kind, size)
    elif kind == "llama" and (checkpoint.folder / "tokenizer.model").is_file():
        vocabulary, merges = _from_model(checkpoint, config, size), None
    else:
        raise TokenizerError(
            f"{checkpoint.folder}: tokenizer.json is missing; copy the files of the tokenizer from "
            "the model that this one was made from"
        )
    texts, types = vocabulary.columns()
    templates, notes = _template(checkpoint, config), []
    try:
        keys = _common_keys(texts, types) | _kind_keys(vocabulary.name, kind, texts, types, merges)
        "".join(templates.values()).encode()
    except UnicodeEncodeError as error:  # half of a pair of \u escapes
        text = error.object[max(0, error.start - 9) : error.start + 9]
        raise TokenizerError(f"{checkpoint.folder}: {text!r} is not Unicode text") from None
    keys |= _special_ids(vocabulary.name, config, texts)
    generation = checkpoint.optional_json("generation_config.json")
    keys |= _suppressed(checkpoint, generation or {}, size)
    ends = [
        token
        for token in _ends(checkpoint, generation, size)
        if token != keys[_KEY + "eos_token_id"]
    ]
    if vocabulary.beyond:
        notes.append(f"added tokens without an embedding left out: {vocabulary.beyond}")
    return keys | templates, ends, notes


# -- the vocabulary --------------------------------------------------------------------------


def _from_json(
    checkpoint: Checkpoint, found: Json, config: Json, kind: str, size: int
) -> tuple[_Vocabulary, Merges]:
    """From tokenizer.json: its model's vocabulary, then the tokens that were added to it."""
    name = f"{checkpoint.folder / 'tokenizer.json'}"
    model = found.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise TokenizerError(f"{name}: its model is not BPE with byte tokens: no Gemma vocabulary")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError(f"{name}: its model has no vocabulary")
    vocabulary = _Vocabulary(name, size)
    for text, token in vocab.items():
        byte = _BYTE.fullmatch(text)
        vocabulary.put(token, text, TokenType.BYTE if byte else TokenType.NORMAL)
    added = found.get("added_tokens") or []
    _put_added(vocabulary, added, config, kind)
    extra = {entry["content"] for entry in added}
    lost = [text for text, token in vocab.items() if token >= size and text not in extra]
    if lost:
        raise TokenizerError(f"{name}: {len(vocab):,} tokens, but {size:,} embeddings")
    vocabulary.beyond = sum(1 for entry in added if entry["id"] >= size)
    return vocabulary, _merges(name, model.get("merges"))


def _put_added(vocabulary: _Vocabulary, added: Any, config: Json, kind: str) -> None:
    named = set(_special_texts(config).values())
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        raise TokenizerError(f"{vocabulary.name}: added_tokens is not a list of tokens")
    for entry in added:
        text = entry.get("content")
        if not isinstance(text, str):
            raise TokenizerError(f"{vocabulary.name}: an added token has no text")
        if kind == "gemma4":
            control = (entry.get("special") or text in named) and text not in VISIBLE
        else:
            control = entry.get("special") or text in named or text.startswith("<unused")
            # Runs of spaces are looked for before the spaces of a text become U+2581.
            text = text if control else text.replace(SPACE, " ")
        type_ = TokenType.CONTROL if control else TokenType.USER_DEFINED
        vocabulary.put(entry.get("id"), text, type_)


def _from_model(checkpoint: Checkpoint, config: Json, size: int) -> _Vocabulary:
    """From tokenizer.model, a SentencePiece vocabulary; tokenizer_config says what was added."""
    path = checkpoint.folder / "tokenizer.model"
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise TokenizerError(
            f"{path}: tokenizer.json is missing, and this is read only where sentencepiece is "
            "installed: pip install sentencepiece"
        ) from None
    pieces = SentencePieceProcessor()
    try:
        pieces.load(str(path))
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"{path}: no SentencePiece vocabulary: {error}") from None
    vocabulary = _Vocabulary(str(path), size)
    for token in range(pieces.get_piece_size()):
        special = pieces.is_control(token) or pieces.is_unknown(token)
        byte = TokenType.BYTE if pieces.is_byte(token) else TokenType.NORMAL
        vocabulary.put(token, pieces.id_to_piece(token), TokenType.CONTROL if special else byte)
    added = config.get("added_tokens_decoder")
    entries = [
        {"id": int(token)} | entry
        for token, entry in (added.items() if isinstance(added, dict) else ())
        if token.isdecimal() and isinstance(entry, dict)
    ]
    _put_added(vocabulary, entries, config, "llama")
    vocabulary.beyond = sum(1 for entry in entries if entry["id"] >= size)
    return vocabulary


def _merges(name: str, found: Any) -> Merges:
    """Pairs, or as older files have them "left right"."""
    merges = []
    for entry in found if isinstance(found, list) else [None]:
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(pair, list) or len(pair) != 2 or not all(_part(part) for part in pair):
            raise TokenizerError(f"{name}: {str(entry)[:80]!r} is not a merge")
        merges.append((pair[0], pair[1]))
    return merges


def _part(part: Any) -> bool:
    """Whether a GGUF, where a space parts the halves of a merge, can hold this half."""
    return isinstance(part, str) and part != "" and " " not in part


# -- keys ------------------------------------------------------------------------------------


def strings(texts: Iterable[str]) -> StringArray:
    """An array of strings as a GGUF holds it."""
    encoded = [text.encode() for text in texts]
    packed = b"".join(chain.from_iterable((struct.pack("<Q", len(x)), x) for x in encoded))
    return StringArray(memoryview(packed), len(encoded))


def _common_keys(texts: list[str], types: list[int]) -> dict[str, Value]:
    return {
        _KEY + "tokens": strings(texts),
        _KEY + "token_type": np.array(types, np.int32),
        _KEY + "add_bos_token": True,
        _KEY + "add_space_prefix": False,
    }


def _kind_keys(
    name: str, kind: str, texts: list[str], types: list[int], merges: Merges | None
) -> dict[str, Value]:
    keys: dict[str, Value] = {_KEY + "model": kind}
    if kind == "gemma4":
        assert merges is not None
        keys[_KEY + "scores"] = np.full(len(texts), _UNRANKED, np.float32)
        keys[_KEY + "merges"] = strings(f"{left} {right}" for left, right in merges)
        return keys
    normal = [text for text, type_ in zip(texts, types, strict=True) if type_ == TokenType.NORMAL]
    if merges is not None:
        _check_ranks(name, normal, merges)
    ranks = {text: -float(rank) for rank, text in enumerate(normal)}
    others = {TokenType.BYTE: 0.0}
    scores = [
        ranks.get(t, others.get(TokenType(k), _UNRANKED)) for t, k in zip(texts, types, strict=True)
    ]
    keys[_KEY + "scores"] = np.array(scores, np.float32)
    return keys | {_KEY + "pre": "default", _KEY + "add_eos_token": False}


def _check_ranks(name: str, ranked: list[str], merges: Merges) -> None:
    """Whether a vocabulary in this order means just these merges, but for those of added tokens."""
    normal = set(ranked)
    wanted = [m for m in merges if normal.issuperset((*m, m[0] + m[1]))]
    if wanted != list(ranks.by_rank(ranked)):
        raise TokenizerError(
            f"{name}: its merges do not follow from the order of its tokens, as those of Gemma 3's "
            "do; a GGUF of this kind cannot hold them"
        )


def _special_texts(config: Json) -> dict[str, str]:
    """Which strings tokenizer_config.json gives the special roles, by role."""
    found = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key.removesuffix("_token")] = text
    return found


def _special_ids(name: str, config: Json, texts: list[str]) -> dict[str, Value]:
    ids = {text: i for i, text in enumerate(texts)}
    keys: dict[str, Value] = {}
    for role, text in (_USUAL | _special_texts(config)).items():
        if role in _ROLES and text in ids:
            keys[f"{_KEY}{_ROLES[role]}_token_id"] = ids[text]
        elif role in ("bos", "eos"):
            raise TokenizerError(f"{name}: the {role} token {text!r} is missing")
    return keys


def _suppressed(checkpoint: Checkpoint, generation: Json, size: int) -> dict[str, Value]:
    """What may never be in an answer."""
    name = f"{checkpoint.folder / 'generation_config.json'}"
    found = _ids(name, generation, "suppress_tokens", size)
    return {_KEY + "suppress_tokens": np.array(found, np.int32)} if found else {}


def _ends(checkpoint: Checkpoint, generation: Json | None, size: int) -> list[int]:
    """What ends an answer: generation_config.json says it, or where it does not config.json."""
    name, config = "generation_config.json", generation or {}
    if config.get("eos_token_id") is None:
        name, config = "config.json", checkpoint.config
        if config.get("eos_token_id") is None and isinstance(config.get("text_config"), dict):
            config = config["text_config"]
    return list(dict.fromkeys(_ids(f"{checkpoint.folder / name}", config, "eos_token_id", size)))


def end_keys(ends: list[int], known: Collection[int]) -> tuple[dict[str, Value], list[str]]:
    """Keys of what ends an answer beside eos, and what the user should know.

    A GGUF has two. Where there are more ends, those go first that readers do not know by their
    text (``known``, they do); what is left over is told.
    """
    roles = (f"{_KEY}eot_token_id", f"{_KEY}eom_token_id")
    if len(ends) > len(roles):
        ends = sorted(ends, key=lambda token: token in known)
    lost = [token for token in ends[len(roles) :] if token not in known]
    shown = ", ".join(map(str, lost[:5]))
    notes = [f"eos_token_id a GGUF has no place for, which will not end an answer: {shown}"]
    return dict(zip(roles, ends, strict=False)), notes if lost else []


def _ids(name: str, config: Json, key: str, size: int) -> list[int]:
    value = config.get(key)
    found = value if isinstance(value, list) else [] if value is None else [value]
    for token in found:
        if type(token) is not int or not 0 <= token < size:
            raise TokenizerError(f"{name}: {key} holds {token!r}, which is not a token")
    return found


# -- the chat template -----------------------------------------------------------------------


def _template(checkpoint: Checkpoint, config: Json) -> dict[str, str]:
    """The keys of the templates from the first place that has some; a base model has none."""
    for found in _templates(checkpoint, config):
        named = found
        if isinstance(found, list):  # of {"name": ..., "template": ...}
            named = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
        elif not isinstance(found, dict):
            named = {"default": found}
        keys = {_template_key(checkpoint, name): text for name, text in named.items() if text}
        if not all(isinstance(text, str) for text in keys.values()):
            raise TokenizerError(f"{checkpoint.folder}: the chat template is not text")
        if keys:
            return keys
    return {}


def _template_key(checkpoint: Checkpoint, name: Any) -> str:
    if not isinstance(name, str) or not _TEMPLATE_NAME.fullmatch(name):
        raise TokenizerError(f"{checkpoint.folder}: {name!r} is not a name of a chat template")
    return "tokenizer.chat_template" + ("" if name == "default" else f".{name}")


def _templates(checkpoint: Checkpoint, config: Json) -> Iterator[Any]:
    yield checkpoint.text("chat_template.jinja")
    yield config.get("chat_template")
    yield (checkpoint.optional_json("chat_template.json") or {}).get("chat_template")
