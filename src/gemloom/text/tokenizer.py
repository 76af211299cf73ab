"""Text to token ids and back, with the vocabulary a GGUF file carries.

The merging is done by ``tokenizers``; this file only reads the vocabulary into it. Not here:
what each token is (``vocabulary.py``), and which text a conversation becomes (``chat.py``).

Two kinds, told apart by what is in a file, since makers disagree on the name of the kind:

- with merges (Gemma 4): these and the vocabulary are all there is.
- with scores alone (Gemma 3): merges follow from them. Every way to cut a token in two tokens
  is a merge, the best score first and the longest left part first within a token.

Spaces are the character U+2581 in both vocabularies, so U+2581 in a text reads back as a space.
There is no map of bytes to letters: what no token covers becomes byte tokens, ``<0x00>`` to
``<0xFF>``.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Pipeline

from gemloom.errors import ConfigError, OptionError, TokenizerError
from gemloom.files.gguf import Metadata
from gemloom.text import merges, template, vocabulary
from gemloom.text.merges import Merges
from gemloom.text.vocabulary import BYTE, HIDDEN, KEY, NORMAL, SPACE, Vocabulary
from gemloom.text.windows import in_windows

_END_NAMES = ("<eos>", "<end_of_turn>", "<turn|>", "<|tool_response>", "<|im_end|>")
_TURN_NAMES = ("<|turn>", "<start_of_turn>", "<|im_start|>")


class Tokenizer:
    """The vocabulary of one model file. Nothing changes after construction: share it by threads.

    ``metadata`` is the file's; ``rows`` how many embeddings it has, if that is known. Raises
    TokenizerError where there is no whole Gemma vocabulary, or a template that cannot work.

    Attributes: ``size`` (ids are 0 to size - 1), ``bos`` and ``eos`` (ids), ``eog`` (ids that end
    a generation), ``suppress`` (ids never to be sampled), ``turn`` (the id that begins a turn of a
    chat, or None), ``chat_template`` (Jinja, or None), ``tool_template`` (the one for chats with
    tools), ``openers`` (the characters that special tokens start with), ``longest`` (the most
    characters that one token has), ``hidden`` (ids that give no text) and ``notes`` (where the file
    contradicts itself, a line each).
    """

    chat_template: str | None
    tool_template: str | None

    def __init__(self, metadata: Metadata, rows: int | None = None) -> None:
        try:
            self._read(metadata, rows)
        except ConfigError as error:
            raise TokenizerError(str(error)) from None
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"{metadata.name}: a merge is not UTF-8: {error.object[:40]!r}"
            ) from None

    def _read(self, metadata: Metadata, rows: int | None) -> None:
        self._read_templates(metadata)
        found = vocabulary.read(metadata, f"{self.chat_template} {self.tool_template}")
        _check_bytes(metadata.name, found.ids(), found.types)
        given = len(found.texts)
        made: Sequence[tuple[str, str]] = _merges(metadata, found)
        if rows is not None:
            found = found.fitted(metadata.name, rows)
            made = _possible(made, found) if rows < given else made
        texts, types, self.notes = found.texts, found.types, found.notes
        self.size = len(texts)
        ids = found.ids()
        self._special, self._literal = found.special(), found.literal()
        self.hidden = frozenset(i for i, type_ in enumerate(types) if type_ in HIDDEN)
        self._read_ends(metadata, texts, ids)
        suppressed = vocabulary.ids(metadata, "suppress_tokens", self.size)
        self.suppress = frozenset([*suppressed, *range(given, self.size)])
        self.turn = next((ids[name] for name in _TURN_NAMES if name in ids), None)
        self.openers = frozenset(text[0] for text in self._special)
        self._special_names = {text: ids[text] for text in self._special}
        self._special_lengths = sorted(set(map(len, self._special)), reverse=True)
        self._bpe = _bpe(metadata.name, ids, made)
        self._bytes = [text.replace(SPACE, " ").encode() for text in texts]
        for token in (i for i, type_ in enumerate(types) if type_ == BYTE):
            self._bytes[token] = bytes.fromhex(texts[token][3:5])
        # Cutting at newlines bounds what is merged at once; right only if no token crosses one.
        self._cut = not any("\n" in text and text.strip("\n") for text in texts)
        self._plain = self._pipeline(())
        self._parsing = self._pipeline(self._special)
        self.longest = max(map(len, texts))

    def _read_templates(self, metadata: Metadata) -> None:
        """The file's templates: the default, and one for tools if there is one."""
        named = template.named(metadata)
        for source in named.values():
            template.check(source, metadata.name)
        self.chat_template = template.usual(named)
        self.tool_template = named.get("tool_use", self.chat_template)

    def _read_ends(self, metadata: Metadata, texts: list[str], ids: dict[str, int]) -> None:
        self.bos = self._named(metadata, "bos", ids)
        self.eos = self._named(metadata, "eos", ids)
        ends = {self.eos, *vocabulary.end_ids(metadata, self.size)}
        self.eog = frozenset(ends | {i for i, text in enumerate(texts) if text in _END_NAMES})

    def _named(self, metadata: Metadata, role: str, ids: dict[str, int]) -> int:
        """The token of a role: the one under its key, or else the one of that name."""
        key = f"{role}_token_id"
        found = vocabulary.ids(metadata, key, self.size) or [ids.get(f"<{role}>", -1)]
        if found[0] < 0:
            raise TokenizerError(f"{metadata.name}: the key {KEY}{key} is missing")
        return found[0]

    def _pipeline(self, special: Iterable[str]) -> Pipeline:
        """A way through ``tokenizers``: special tokens are cut out before all else."""
        pipeline = Pipeline(self._bpe)
        if self._cut:
            pipeline.pre_tokenizer = pre_tokenizers.Split(Regex("\n+"), "isolated")
        pipeline.add_tokens([AddedToken(text, normalized=True) for text in self._literal])
        pipeline.add_special_tokens([AddedToken(text, normalized=False) for text in special])
        return pipeline

    def needs_text(self, what: str) -> None:
        """RequestError where a file has no vocabulary for ``what``; this one has."""

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
            raise OptionError(f"{token} is not a token id: they go from 0 to {self.size - 1:,}")
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


def _check_bytes(name: str, ids: dict[str, int], types: list[int]) -> None:
    for value in range(256):
        token = ids.get(f"<0x{value:02X}>")
        if token is None or types[token] != BYTE:
            raise TokenizerError(f"{name}: the byte token <0x{value:02X}> is missing")


def _merges(metadata: Metadata, found: Vocabulary) -> Merges:
    """The file's merges, or those that its scores mean."""
    key = KEY + "merges"
    if not (key in metadata and len(metadata.strings(key))):
        return _derive(metadata, found.texts, found.types)
    places = found.ids()
    if len(places) != len(found.texts):  # then ids leave gaps
        places = {text: place for place, text in enumerate(places)}
    return merges.written(metadata.name, metadata.strings(key).raw(), places)


def _possible(made: Sequence[tuple[str, str]], found: Vocabulary) -> list[tuple[str, str]]:
    """Those of tokens that are there."""
    there = set(found.texts)
    return [(a, b) for a, b in made if there.issuperset((a, b, a + b))]


def _derive(metadata: Metadata, texts: list[str], types: list[int]) -> Merges:
    if KEY + "scores" not in metadata:
        raise TokenizerError(
            f"{metadata.name}: {KEY}scores is missing, and so is {KEY}merges: one is needed"
        )
    scores = metadata.array(KEY + "scores")
    if len(scores) != len(texts):
        raise TokenizerError(f"{metadata.name}: {len(texts):,} tokens, but {len(scores):,} scores")
    if scores.dtype.kind not in "fiu" or not np.isfinite(scores).all():
        raise TokenizerError(f"{metadata.name}: a score is not a finite number")
    normal = scores[np.asarray(types) == NORMAL]
    if len(normal) > 1 and (normal == normal[0]).all():
        raise TokenizerError(
            f"{metadata.name}: {KEY}merges is missing, and {KEY}scores are all the same"
        )
    best_first = np.argsort(-scores.astype(np.float64), kind="stable").tolist()
    return merges.by_rank(texts[i] for i in best_first if types[i] == NORMAL)


def _bpe(name: str, ids: dict[str, int], made: Sequence[tuple[str, str]]) -> models.BPE:
    try:
        return models.BPE(ids, made, byte_fallback=True)
    except Exception as error:  # tokenizers raises no narrower type
        line = " ".join(str(error).split())
        raise TokenizerError(f"{name}: the merges do not fit the vocabulary: {line}") from None
