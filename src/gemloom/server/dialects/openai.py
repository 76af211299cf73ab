"""What OpenAI's dialects share: heads, logprobs, usage, and the bounds that a request asks for."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from gemloom.engine.generation import Usage
from gemloom.engine.request import Piece
from gemloom.errors import RequestError
from gemloom.server.backend import Backend
from gemloom.server.fields import Json
from gemloom.server.protocol import Ids, SampledBody
from gemloom.text.compose import Form
from gemloom.text.prompts import text_ids
from gemloom.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"  # after the last event, where clients expect it


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer repeats: its id, when it was made, the model's name."""

    id: str
    created: int  # Unix time, seconds
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> Self:
        """That of an answer which begins now, with an id of this prefix."""
        return cls(new_id(prefix), int(time.time()), model)

    def body(self, kind: str) -> Json:
        """The beginning of an object of this ``kind``."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def new_id(prefix: str) -> str:
    """``prefix`` and 24 random letters and digits."""
    return f"{prefix}_{secrets.token_hex(12)}"


def spelled(raw: bytes) -> str:
    """The text of one token; bytes that are no characters are written \\xe2."""
    return raw.decode(errors="backslashreplace")


def token_logprobs(tokenizer: Tokenizer, piece: Piece) -> list[Json]:
    """The entry of one piece in a list of logprobs; none for one without, or for the end."""
    if piece.logprob is None or piece.token in tokenizer.eog:
        return []
    top = [_entry(tokenizer, token, logprob) for token, logprob in piece.top_logprobs]
    return [_entry(tokenizer, piece.token, piece.logprob) | {"top_logprobs": top}]


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> Json:
    raw = tokenizer.token(token)
    return {"token": spelled(raw), "logprob": logprob, "bytes": list(raw)}


def ended(reason: str | None) -> Json:
    """How a choice ended. Clients know OpenAI's reasons alone; ``stop_reason`` has ours."""
    if reason == "repetition":
        return {"finish_reason": "length", "stop_reason": reason}
    return {"finish_reason": reason}


def usage_body(prompts: Iterable[Usage], runs: Iterable[Usage], reasoning: int) -> Json:
    """Token counts: ``prompts`` has one usage a prompt, ``runs`` one an answer."""
    asked, made = list(prompts), sum(usage.completion_tokens for usage in runs)
    prompt = sum(usage.prompt_tokens for usage in asked)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in asked)},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def timings_body(usage: Usage) -> Json:
    """How fast one answer was, as llama.cpp's server tells it."""
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": usage.prompt_tokens - usage.cached_tokens,
        "prompt_ms": 1000 * usage.prompt_seconds,
        "prompt_per_second": usage.prompt_tokens_per_second,
        "predicted_n": usage.completion_tokens,
        "predicted_ms": 1000 * usage.decode_seconds,
        "predicted_per_second": usage.tokens_per_second,
    }


def costs(usages: Sequence[Usage], choices: int, reasoning: int = 0) -> Json:
    """Usage of a request with so many choices to each prompt, and the timings of a lone answer."""
    usage = {"usage": usage_body(usages[::choices], usages, reasoning)}
    return usage | ({"timings": timings_body(usages[0])} if len(usages) == 1 else {})


def raw_ids(prompt: str | Ids, special: bool, backend: Backend) -> Ids:
    """Text as ids with one BOS, ``special`` as the tokenizer has it; ids as they are."""
    if not isinstance(prompt, str):
        return prompt
    return text_ids(prompt, backend.tokenizer, backend.context, special)


def form_of(asked: SampledBody) -> Form | None:
    """The bound of the text that the format, the regex or the grammar asks for."""
    kind = _kind(asked)
    if kind == "regex":
        return lambda grammars: grammars.regex(asked.regex or "")
    if kind == "grammar":
        return lambda grammars: grammars.lark(asked.grammar or "")
    if kind == "json_object":
        return lambda grammars: grammars.json_object()
    if asked.response_format and kind == "json_schema":
        schema = asked.response_format.any_schema or {}
        return lambda grammars: grammars.json_schema(schema)
    return None


def _kind(asked: SampledBody) -> str:
    """What the answer must be: "text" for anything. RequestError where several are asked for."""
    given = [name for name in ("regex", "grammar") if getattr(asked, name) is not None]
    if asked.response_format and asked.response_format.form != "text":
        given.append(asked.response_format.form)
    if len(given) > 1:
        raise RequestError("only one of response_format, regex and grammar can be asked for")
    return given[0] if given else "text"
