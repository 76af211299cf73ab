"""The tokens of a model file: their texts, and what each of them is.

What a token is follows from its name and its use first, and from its type after that: makers of
files disagree on the types of markup, and a wrong one breaks every chat without an error. Not
here: how a text becomes tokens (``tokenizer.py``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gemloom.errors import TokenizerError
from gemloom.files.gguf import Metadata

SPACE = "▁"  # U+2581
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
HIDDEN = (UNKNOWN, CONTROL, UNUSED)
KEY = "tokenizer.ggml."
_NAMES = ("undefined", "normal", "unknown", "control", "user-defined", "unused", "byte")

# Markup that clients see, since thoughts and calls are taken from the text.
VISIBLE = frozenset(
    ("<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
     "<|channel>", "<channel|>")
)  # fmt: skip
_INVISIBLE = frozenset(
    ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|tool>", "<tool|>", "<|think|>",
     "<|turn>", "<turn|>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>",
     "<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>", "<|audio|>", "<|video|>")
)  # fmt: skip
_PIPED = re.compile(r"<\|[^<>\s]+>|<[^<>\s]+\|>")  # in Gemma's vocabularies all such are markup
_WORDED = re.compile(r"<[a-z]+(?:_[a-z]+)+>")  # <start_function_call>, but not an HTML tag
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_OTHER_KINDS = ("bert", "t5", "rwkv", "plamo2")  # which have scores or tokens, but no such merges
_NO_TOKEN = (-1, 2**32 - 1, 2**64 - 1)  # how integers of each type say that there is none
_END_KEYS = ("eos_token_id", "eos_token_ids", "eot_token_id", "eom_token_id")
_MOST_TWICE = 16  # tokens with the text of another, in a file that can be used
_SHOWN = 3  # tokens that a note names


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens in the order of their ids, with U+2581 for every space."""

    texts: list[str]
    types: list[int]  # by what they are, which need not be what the file says
    markup: frozenset[str]  # tokens only where asked for, of whatever type
    notes: tuple[str, ...]  # where the file contradicts itself: a line each

    def fitted(self, name: str, rows: int) -> Vocabulary:
        """The same for an embedding table of ``rows``.

        Tokens without a row are left out; rows without a token get one that is never shown.
        """
        extra = len(self.texts) - rows
        if not extra:
            return self
        if extra > 0:
            note = f"{name}: {extra:,} tokens have no embedding and are left out"
        else:
            note = f"{name}: {-extra:,} embeddings have no token and are never picked"
        texts = [*self.texts[:rows], *(f"[row {row}]" for row in range(len(self.texts), rows))]
        types = [*self.types[:rows], *[UNUSED] * -extra]
        return Vocabulary(texts, types, self.markup, (*self.notes, note))

    def ids(self) -> dict[str, int]:
        """The id of each text. Of several with one text it is the first that is not normal."""
        found = dict(zip(self.texts, range(len(self.texts)), strict=True))
        if len(found) == len(self.texts):
            return found
        found.clear()
        for token, (text, type_) in enumerate(zip(self.texts, self.types, strict=True)):
            if text not in found or type_ != NORMAL == self.types[found[text]]:
                found[text] = token
        return found

    def special(self) -> list[str]:
        """The strings that are tokens only where asked for."""
        return [
            t for t, type_ in self._typed().items() if type_ != USER_DEFINED or t in self.markup
        ]

    def literal(self) -> list[str]:
        """The strings that are tokens wherever they stand: runs of spaces, HTML tags."""
        return [
            t
            for t, type_ in self._typed().items()
            if type_ == USER_DEFINED and t not in self.markup
        ]

    def _typed(self) -> dict[str, int]:
        """The texts that are looked for before anything is merged, each once."""
        pairs = zip(self.texts, self.types, strict=True)
        return {t: type_ for t, type_ in pairs if type_ in (CONTROL, UNKNOWN, USER_DEFINED)}


def is_absent(metadata: Metadata) -> bool:
    """Whether a file has no vocabulary, and says so or has no word of one."""
    kind = metadata.get(KEY + "model")
    return kind == "no_vocab" or (kind is None and KEY + "tokens" not in metadata)


def read(metadata: Metadata, template: str = "") -> Vocabulary:
    """The vocabulary of a file. TokenizerError where it has none, or one that cannot be Gemma's.

    ``template`` are the file's chat templates: what they write is markup.
    """
    _check_kind(metadata)
    texts = [text.replace(" ", SPACE) for text in decoded(metadata, "tokens")]
    given = _types(metadata, len(texts))
    notes = _check(metadata.name, texts)
    notes += [] if given else [f"{metadata.name}: no token types: names say what tokens are"]
    types = given or [NORMAL] * len(texts)
    markup = _markup(texts, types, template)
    meant = [_meant(t, type_, t in markup) for t, type_ in zip(texts, types, strict=True)]
    for token in [*ids(metadata, "bos_token_id", len(texts)), *end_ids(metadata, len(texts))]:
        meant[token] = CONTROL if meant[token] == NORMAL else meant[token]
    if given and (wrong := [i for i, type_ in enumerate(types) if type_ != meant[i]]):
        notes.append(_contradiction(metadata.name, texts, types, wrong))
    return Vocabulary(texts, meant, markup, tuple(notes))


def _check_kind(metadata: Metadata) -> None:
    """TokenizerError for a vocabulary that cannot be Gemma's.

    The name of the kind decides nothing else: for Gemma 4 makers write gemma4, llama and gpt2.
    """
    if is_absent(metadata):
        raise TokenizerError(f"{metadata.name} has no vocabulary")
    kind = metadata.string(KEY + "model", "")
    if kind in _OTHER_KINDS:
        raise TokenizerError(f"{metadata.name}: a tokenizer of the kind {kind!r} is not supported")
    if metadata.boolean(KEY + "add_space_prefix", False):
        raise TokenizerError(f"{metadata.name}: {KEY}add_space_prefix is true: no Gemma vocabulary")


def decoded(metadata: Metadata, key: str) -> list[str]:
    """The strings under a key of ``tokenizer.ggml``. TokenizerError for one that is not UTF-8."""
    try:
        return [raw.decode() for raw in metadata.strings(KEY + key).raw()]
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{metadata.name}: {KEY}{key} is not UTF-8: {error.object[:40]!r}"
        ) from None


def ids(metadata: Metadata, key: str, size: int) -> list[int]:
    """The token ids under a key of ``tokenizer.ggml``, one or several; none where it is absent.

    TokenizerError for one that is none of ``size`` tokens.
    """
    if KEY + key not in metadata:
        return []
    found = [token for token in metadata.integers(KEY + key) if token not in _NO_TOKEN]
    for token in found:
        if not 0 <= token < size:
            raise TokenizerError(
                f"{metadata.name}: {KEY}{key} is {token:,}, but there are {size:,} tokens"
            )
    return found


def end_ids(metadata: Metadata, size: int) -> list[int]:
    """The tokens that a file names as ends of a text or a turn; the end of text first."""
    return [token for key in _END_KEYS for token in ids(metadata, key, size)]


def _types(metadata: Metadata, count: int) -> list[int]:
    """The types in the file; empty where there are none."""
    if KEY + "token_type" not in metadata:
        return []
    types = metadata.integers(KEY + "token_type")
    if len(types) != count:
        raise TokenizerError(f"{metadata.name}: {count:,} tokens, but {len(types):,} types")
    if unknown := set(types) - set(range(NORMAL, BYTE + 1)):
        raise TokenizerError(f"{metadata.name}: the token type {min(unknown)} is unknown")
    return types


def _check(name: str, texts: Sequence[str]) -> list[str]:
    """What to tell of tokens that are there twice: in Google's own files a few are."""
    if not texts:
        raise TokenizerError(f"{name}: {KEY}tokens is empty")
    if "" in texts:
        raise TokenizerError(f"{name}: the token {texts.index('')} is empty")
    if not (extra := len(texts) - len(set(texts))):
        return []
    twice = next(text for text, count in Counter(texts).items() if count > 1)
    if extra > _MOST_TWICE:
        raise TokenizerError(f"{name}: the token {twice!r} is there twice, and {extra - 1:,} more")
    more = f", and {extra - 1} more" if extra > 1 else ""
    return [
        f"{name}: the token {twice!r} is there twice{more}: texts are read as the first of them"
    ]


def _markup(texts: Sequence[str], types: Sequence[int], template: str) -> frozenset[str]:
    """The tokens that are markup by their form, or by their form and by what templates write."""
    candidates = [i for i, text in enumerate(texts) if text[0] == "<" and text[-1] == ">"]
    piped = (texts[i] for i in candidates if _PIPED.fullmatch(texts[i]))
    worded = (texts[i] for i in candidates if types[i] == NORMAL and _WORDED.fullmatch(texts[i]))
    return frozenset([*piped, *(text for text in worded if text in template)])


def _meant(text: str, type_: int, markup: bool) -> int:
    """The type that a token should have, of one of this text and type."""
    if text[0] == "<" and _BYTE.fullmatch(text):
        return BYTE
    type_ = NORMAL if type_ == BYTE else type_
    if text[0] != "<":
        return type_
    if text in VISIBLE:
        return USER_DEFINED
    if text in _INVISIBLE:
        return type_ if type_ in HIDDEN else CONTROL
    return USER_DEFINED if markup and type_ == NORMAL else type_


def _contradiction(
    name: str, texts: Sequence[str], types: Sequence[int], wrong: Sequence[int]
) -> str:
    first = ", ".join(f"{texts[i]} (id {i:,}) {_NAMES[types[i]]}" for i in wrong[:_SHOWN])
    more = f" and {len(wrong) - _SHOWN:,} more" if len(wrong) > _SHOWN else ""
    return f"{name}: wrong token types: {first}{more}; they are read by their names instead"
