"""What llama.cpp's clients ask beside OpenAI's dialects: tokens, templates, slots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gemloom.server.backend import Backend
from gemloom.server.fields import Json
from gemloom.server.protocol import Body, Conversation, Ids, Raw
from gemloom.text.tokenizer import Tokenizer


class TokenizeRequest(Raw, Body):
    """POST /tokenize."""

    content: str
    add_special: bool = False  # with a BOS before it
    with_pieces: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Ids


def tokenized(asked: TokenizeRequest, tokenizer: Tokenizer) -> Iterator[list[Any]]:
    """What /tokenize tells of each token, in several lists: a long text has millions."""
    pieces = tokenizer.pieces(asked.content, asked.parse_special)
    for ids in tokenizer.started(pieces) if asked.add_special else pieces:
        if asked.with_pieces:
            yield [piece_body(token, tokenizer.token(token)) for token in ids]
        else:
            yield ids


def piece_body(token: int, raw: bytes) -> Mapping[str, Any]:
    """A token as /tokenize tells it with pieces: its text, or its bytes where they are none."""
    try:
        return {"id": token, "piece": raw.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(raw)}


def tokens_body(lists: Iterable[list[Any]]) -> Iterator[bytes]:
    """The answer of /tokenize, in parts."""
    comma = ""
    yield b'{"tokens":['
    for some in lists:
        if some:
            yield (comma + json.dumps(some, separators=(",", ":"))[1:-1]).encode()
            comma = ","
    yield b"]}"


def text_body(asked: DetokenizeRequest, tokenizer: Tokenizer) -> Json:
    """The answer of /detokenize: special tokens are shown."""
    return {"content": tokenizer.decode(asked.tokens, special=True)}


def template_body(asked: Conversation, backend: Backend) -> Json:
    """The prompt of a chat: to look at, and as ids. RequestError for a bad one."""
    ids = backend.composer.prompt(asked.messages, asked.tools, asked.variables())
    return {"prompt": backend.tokenizer.decode(ids, special=True), "tokens": ids}


def slots_body(backend: Backend) -> Json:
    """How many requests fit, and how many there are."""
    stats = backend.stats()
    names = ("slots", "slots_busy", "running", "waiting")
    counts = {name: getattr(stats, name) for name in names}
    return counts | {"context": backend.context}
