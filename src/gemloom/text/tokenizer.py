"""Text to token ids and back, with the vocabulary a GGUF file carries.

The merging is done by ``tokenizers``; this file only reads the vocabulary into it. Not here:
which text a conversation becomes (``chat.py``).

Two kinds, told apart by ``tokenizer.ggml.model`` alone:

- ``gemma4`` (Gemma 4): vocabulary and merges are in the file.
- ``llama`` (Gemma 3): vocabulary and scores. Merges follow from them: every way to cut a token
  in two tokens is a merge, the best score first and the longest left part first within a token.

Spaces are the character U+2581 in both vocabularies, so U+2581 in a text reads back as a space.
There is no map of bytes to letters: what no token covers becomes byte tokens, ``<0x00>`` to
``<0xFF>``.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Pipeline

from gemloom.errors import ConfigError, OptionError, TokenizerError
from gemloom.files.gguf import Metadata
from gemloom.text import merges
from gemloom.text.merges import Merges
from gemloom.text.windows import in_windows

SPACE = "▁"  # U+2581
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_HIDDEN = (_UNKNOWN, _CONTROL, _UNUSED)
_END_NAMES = ("<eos>", "<end_of_turn>", "<turn|>", "<|tool_response>")
_TURN_NAMES = ("<|turn>", "<start_of_turn>")
_KEY = "tokenizer.ggml."


class Tokenizer:
    """The vocabulary of one model file. Nothing changes after construction: share it by threads.

    ``metadata`` is the file's; raises TokenizerError where it holds no whole Gemma vocabulary.

    Attributes: ``size`` (ids are 0 to size - 1), ``bos`` and ``eos`` (ids), ``eog`` (ids that end
    a generation), ``suppress`` (ids never to be sampled), ``turn`` (the id that begins a turn of a
    chat, or None), ``chat_template`` (Jinja, or None), ``openers`` (the characters that special
    tokens start with), ``longest`` (the most characters that one token has) and
    ``hidden`` (ids that give no text).
    """

    def __init__(self, metadata: Metadata) -> None:
        try:
            self._read(metadata)
        except ConfigError as error:
            raise TokenizerError(str(error)) from None
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"{metadata.name}: a token or merge is not UTF-8: {error.object[:40]!r}"
            ) from None

    def _read(self, metadata: Metadata) -> None:
        kind = _kind(metadata)
        texts, types = _vocabulary(metadata)
        self.size = len(texts)
        ids = dict(zip(texts, range(self.size), strict=True))
        self._special, self._literal = _markup(kind, texts, types)
        self.hidden = frozenset(i for i, type_ in enumerate(types) if type_ in _HIDDEN)
        byte_tokens = _byte_tokens(metadata.name, ids, types)
        self._read_ends(metadata, ids, types)
        self.suppress = self._read_suppress(metadata)
        self.turn = next((ids[name] for name in _TURN_NAMES if name in ids), None)
        self.chat_template = (
            metadata.string("tokenizer.chat_template")
            if "tokenizer.chat_template" in metadata
            else None
        )
        self.openers = frozenset(text[0] for text in self._special)
        self._special_names = {text: ids[text] for text in self._special}
        self._special_lengths = sorted(set(map(len, self._special)), reverse=True)
        made = _written(metadata, ids) if kind == "gemma4" else _derive(metadata, texts, types)
        self._bpe = _bpe(metadata.name, ids, made)
        self._bytes = [text.replace(SPACE, " ").encode() for text in texts]
        for value, token in enumerate(byte_tokens):
            self._bytes[token] = bytes([value])
        # Cutting at newlines bounds what is merged at once; right only if no token crosses one.
        self._cut = not any("\n" in text and text.strip("\n") for text in texts)
        self._plain = self._pipeline(())
        self._parsing = self._pipeline(self._special)
        self.longest = max(map(len, texts))

    def _read_ends(self, metadata: Metadata, ids: dict[str, int], types: list[int]) -> None:
        self.bos = self._id(metadata, "bos_token_id")
        self.eos = self._id(metadata, "eos_token_id")
        ends = {self.eos}
        for key in ("eot_token_id", "eom_token_id"):
            if _KEY + key in metadata:
                ends.add(self._id(metadata, key))
        for name in _END_NAMES:
            token = ids.get(name)
            if token is not None and types[token] in (_CONTROL, _USER_DEFINED):
                ends.add(token)
        self.eog = frozenset(ends)

    def _read_suppress(self, metadata: Metadata) -> frozenset[int]:
        key = _KEY + "suppress_tokens"
        ids = metadata.array(key).tolist() if key in metadata else []
        for token in ids:
            if token not in range(self.size):
                raise TokenizerError(f"{metadata.name}: {key} holds {token}, which is no token")
        return frozenset(ids)

    def _id(self, metadata: Metadata, key: str) -> int:
        token = metadata.integer(_KEY + key)
        if token >= self.size:
            raise TokenizerError(
                f"{metadata.name}: {_KEY}{key} is {token:,}, but there are {self.size:,} tokens"
            )
        return token

    def _pipeline(self, special: Iterable[str]) -> Pipeline:
        """A way through ``tokenizers``: special tokens are cut out before all else."""
        pipeline = Pipeline(self._bpe)
        if self._cut:
            pipeline.pre_tokenizer = pre_tokenizers.Split(Regex("\n+"), "isolated")
        pipeline.add_tokens([AddedToken(text, normalized=True) for text in self._literal])
        pipeline.add_special_tokens([AddedToken(text, normalized=False) for text in special])
        return pipeline

    def encode(self, text: str, special: bool = False, *, guard: str = "") -> list[int]:
        """The ids of ``text``; no BOS is added.

        ``special=False`` reads it all as text: control tokens, and for Gemma 4 its markup too, come
        out as the letters they are written with. Gemma 3's user-defined tokens (runs of spaces,
        tabs and newlines, HTML tags, ``<start_of_image>``) are found either way, as its
        own tokenizer does. ``special=True`` reads the strings of special tokens as these tokens.
        ``guard`` is one character that is taken out of the text after special tokens were looked
        for: where it stands inside such a string, that string stays text.

        Raises OptionError for a lone surrogate, which is no Unicode text.
        """
        return [token for piece in self.pieces(text, special, guard=guard) for token in piece]

    def pieces(self, text: str, special: bool = False, *, guard: str = "") -> Iterator[list[int]]:
        """The ids of ``encode``, in several lists: memory is bounded, however long the text is.

        Other threads run while a piece is made. Raises as ``encode``, at the piece that is wrong.
        """
        if not isinstance(text, str):
            raise OptionError(f"text must be a str, not {type(text).__name__}")
        if not guard:
            return self._windows(self._parsing if special else self._plain, text)
        if not special:
            return self._windows(self._plain, text.replace(guard, ""))
        return self._guarded(text, guard)

    def _windows(self, pipeline: Pipeline, text: str) -> Iterator[list[int]]:
        return in_windows(partial(_ids, pipeline), text, self._bytes)

    def _guarded(self, text: str, guard: str) -> Iterator[list[int]]:
        """Special tokens by themselves, and what is between them without its guards."""
        start = 0
        openers = "".join(map(re.escape, self.openers))
        for found in re.finditer(f"[{openers}](?!{re.escape(guard)})", text) if openers else ():
            at = found.start()
            if at >= start and (name := self._special_at(text, at)):
                yield from self._windows(self._plain, text[start:at].replace(guard, ""))
                yield [self._special_names[name]]
                start = at + len(name)
        yield from self._windows(self._plain, text[start:].replace(guard, ""))

    def _special_at(self, text: str, at: int) -> str:
        """The longest special token that ``text`` has there, or nothing."""
        for length in self._special_lengths:
            name = text[at : at + length].replace(" ", SPACE)
            if name in self._special_names:
                return name
        return ""

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD.

        Control tokens give nothing, or with ``special=True`` their own strings. Raises
        OptionError for an id outside the vocabulary.
        """
        return b"".join([self._visible(token, special) for token in ids]).decode(errors="replace")

    def token(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters. OptionError as decode."""
        if not 0 <= token < self.size:
            raise OptionError(f"{token} is no token id: they go from 0 to {self.size - 1:,}")
        return self._bytes[token]

    def id_of(self, text: str) -> int | None:
        """The id of the token that is written ``text``, or None."""
        token: int | None = self._bpe.token_to_id(text)
        return token

    def with_bos(self, ids: Sequence[int]) -> list[int]:
        """``ids`` with exactly one BOS before them, whether or not there are some already."""
        start = next((i for i, token in enumerate(ids) if token != self.bos), len(ids))
        return [self.bos, *ids[start:]]

    def started(self, pieces: Iterable[list[int]]) -> Iterator[list[int]]:
        """``with_bos`` of ids that come in several lists."""
        yield [self.bos]
        started = False
        for ids in pieces:
            yield ids if started else self.with_bos(ids)[1:]
            started = started or any(token != self.bos for token in ids)

    def _visible(self, token: int, special: bool) -> bytes:
        piece = self.token(token)
        return b"" if token in self.hidden and not special else piece


class StreamDecoder:
    """Decodes ids as they come, whole characters only: all it returns joined is ``decode(ids)``."""

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that ``token`` completes, often empty. OptionError for an id of no token."""
        return self._utf8.decode(self._tokenizer._visible(token, self._special))

    def flush(self) -> str:
        """Ends the text: U+FFFD where a character was left unfinished, else nothing."""
        return self._utf8.decode(b"", final=True)


def _ids(pipeline: Pipeline, text: str) -> list[int]:
    # Of the library's ways in, the batch lets other threads run; this one makes no offsets either.
    batch = [text.replace(" ", SPACE)]
    ids: list[int] = pipeline.encode_batch_fast(batch, add_special_tokens=False)[0].ids
    return ids


def _kind(metadata: Metadata) -> str:
    kind = metadata.string(_KEY + "model")
    if kind not in ("gemma4", "llama"):
        raise TokenizerError(
            f"{metadata.name}: the tokenizer kind {kind!r} is neither 'gemma4' nor 'llama'"
        )
    if metadata.boolean(_KEY + "add_space_prefix", False):
        raise TokenizerError(
            f"{metadata.name}: {_KEY}add_space_prefix is true: no Gemma vocabulary"
        )
    return kind


def _vocabulary(metadata: Metadata) -> tuple[list[str], list[int]]:
    """The token strings, with U+2581 for every space, and their types."""
    texts = [raw.decode().replace(" ", SPACE) for raw in metadata.strings(_KEY + "tokens").raw()]
    types = metadata.array(_KEY + "token_type").tolist()
    if len(texts) != len(types):
        raise TokenizerError(f"{metadata.name}: {len(texts):,} tokens, but {len(types):,} types")
    if unknown := set(types) - set(range(_NORMAL, _BYTE + 1)):
        raise TokenizerError(f"{metadata.name}: the token type {min(unknown)} is unknown")
    if len(set(texts)) != len(texts):
        twice = next(text for text, count in Counter(texts).items() if count > 1)
        raise TokenizerError(f"{metadata.name}: the token {twice!r} is there twice")
    if "" in texts:
        raise TokenizerError(f"{metadata.name}: the token {texts.index('')} is empty")
    return texts, types


def _markup(kind: str, texts: list[str], types: list[int]) -> tuple[list[str], list[str]]:
    """The strings that are tokens only where asked for, and those that always are."""
    control, defined = (
        [text for text, type_ in zip(texts, types, strict=True) if type_ in wanted]
        for wanted in ((_CONTROL, _UNKNOWN), (_USER_DEFINED,))
    )
    return (control + defined, []) if kind == "gemma4" else (control, defined)


def _byte_tokens(name: str, ids: dict[str, int], types: list[int]) -> list[int]:
    tokens = [ids.get(f"<0x{value:02X}>", -1) for value in range(256)]
    for value, token in enumerate(tokens):
        if token < 0 or types[token] != _BYTE:
            raise TokenizerError(f"{name}: the byte token <0x{value:02X}> is missing")
    return tokens


def _written(metadata: Metadata, ids: dict[str, int]) -> Merges:
    return merges.written(metadata.name, metadata.strings(_KEY + "merges").raw(), ids)


def _derive(metadata: Metadata, texts: list[str], types: list[int]) -> Merges:
    scores = metadata.array(_KEY + "scores")
    if len(scores) != len(texts):
        raise TokenizerError(f"{metadata.name}: {len(texts):,} tokens, but {len(scores):,} scores")
    if scores.dtype.kind != "f" or not np.isfinite(scores).all():
        raise TokenizerError(f"{metadata.name}: a score is not a finite number")
    best_first = np.argsort(-scores, kind="stable").tolist()
    return merges.by_rank(texts[i] for i in best_first if types[i] == _NORMAL)


def _bpe(name: str, ids: dict[str, int], made: Merges) -> models.BPE:
    try:
        return models.BPE(ids, made, byte_fallback=True)
    except Exception as error:  # tokenizers raises no narrower type
        line = " ".join(str(error).split())
        raise TokenizerError(f"{name}: the merges do not fit the vocabulary: {line}") from None
