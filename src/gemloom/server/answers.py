"""The bodies and stream events of /v1/chat/completions and /v1/completions: pure, no HTTP.

An answer is fed the pieces of its runs, in whatever order they come. ``begin``, ``push`` and
``end`` give the events of a stream; ``body`` gives the whole answer, once all pieces are in.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from gemloom.engine.generation import Usage, call_body
from gemloom.engine.request import Piece
from gemloom.errors import GemloomError
from gemloom.server.bodies import error_body, timings_body, usage_body
from gemloom.server.fields import Json
from gemloom.text.router import Part, Reasoning, Splitter, ToolCall
from gemloom.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer repeats: its id, when it was made, the model's name."""

    id: str
    created: int  # Unix time, seconds
    model: str

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


class ChatChoice:
    """One answer to a chat as it grows: its message, and what each piece adds to it."""

    def __init__(self, index: int, tokenizer: Tokenizer, splitter: Splitter) -> None:
        self.index, self.reasoning_tokens = index, 0
        self.reason: str | None = None
        self._content, self._reasoning, self._calls = "", "", list[Json]()
        self._logprobs, self._unsent = list[Json](), list[Json]()
        self._tokenizer, self._splitter, self._thinking = tokenizer, splitter, False
        self._has_logprobs = False

    def push(self, piece: Piece) -> list[Json]:
        """What a piece adds, as the choices of stream events; the last sets ``reason``."""
        parts = self._splitter.push(piece.text)
        if piece.finish_reason:
            parts += self._splitter.flush()
        self._note(piece)
        choices = [self._choice(self._delta(part)) for part in parts]
        self.reasoning_tokens += self._thinking
        if piece.finish_reason:
            called = self._calls and piece.finish_reason == "stop"
            self.reason = "tool_calls" if called else piece.finish_reason
            choices.append(self._choice({}))
        return choices

    def _note(self, piece: Piece) -> None:
        entries = token_logprobs(self._tokenizer, piece)
        self._has_logprobs |= piece.logprob is not None
        self._logprobs += entries
        self._unsent += entries

    def _delta(self, part: Part) -> Json:
        self._thinking = isinstance(part, Reasoning)
        if isinstance(part, ToolCall):
            call = call_body(part)
            self._calls.append(call)
            return {"tool_calls": [{"index": len(self._calls) - 1, **call}]}
        if isinstance(part, Reasoning):
            self._reasoning += part.text
            return {"reasoning_content": part.text}
        self._content += part.text
        return {"content": part.text}

    def _choice(self, delta: Json) -> Json:
        """One choice of a stream event; logprobs of tokens that gave no text wait for the next."""
        logprobs, self._unsent = self._unsent, []
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": {"content": logprobs} if logprobs else None,
            **ended(None if delta else self.reason),
        }

    def body(self) -> Json:
        """The whole choice."""
        message: Json = {"role": "assistant", "content": self._content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if self._calls:
            message |= {"content": self._content or None, "tool_calls": self._calls}
        logprobs = {"content": self._logprobs, "refusal": None} if self._has_logprobs else None
        return {
            "index": self.index,
            "message": message,
            "logprobs": logprobs,
            **ended(self.reason),
        }


class ChatAnswer:
    """All choices of one chat request."""

    done = True

    def __init__(self, head: Head, choices: Sequence[ChatChoice], wants_usage: bool) -> None:
        self._head, self._choices, self._wants_usage = head, choices, wants_usage

    def begin(self) -> list[Json]:
        """The events before anything is known."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._event({"index": choice.index, "delta": delta, "finish_reason": None})
            for choice in self._choices
        ]

    def push(self, index: int, piece: Piece) -> list[Json]:
        """The events of one piece of the choice ``index``."""
        return [self._event(choice) for choice in self._choices[index].push(piece)]

    def _event(self, choice: Json) -> Json:
        event = self._head.body("chat.completion.chunk") | {"choices": [choice]}
        return event | {"usage": None} if self._wants_usage else event

    def end(self, usages: Sequence[Usage]) -> list[Json]:
        """The events after the last piece, with one usage a choice."""
        if not self._wants_usage:
            return []
        return [self._head.body("chat.completion.chunk") | {"choices": []} | self._costs(usages)]

    def body(self, usages: Sequence[Usage]) -> Json:
        """The whole answer."""
        choices = [choice.body() for choice in self._choices]
        return self._head.body("chat.completion") | {"choices": choices} | self._costs(usages)

    def failed(self, error: GemloomError) -> Json:
        """The event that ends a stream which an error cut short."""
        return error_body(error)

    def _costs(self, usages: Sequence[Usage]) -> Json:
        reasoning = sum(choice.reasoning_tokens for choice in self._choices)
        return costs(usages, len(usages), reasoning)


def costs(usages: Sequence[Usage], choices: int, reasoning: int = 0) -> Json:
    """Usage of a request with so many choices to each prompt, and the timings of a lone answer."""
    usage = {"usage": usage_body(usages[::choices], usages, reasoning)}
    return usage | ({"timings": timings_body(usages[0])} if len(usages) == 1 else {})


class CompletionChoice:
    """One continuation of a prompt as it grows."""

    def __init__(self, index: int, tokenizer: Tokenizer) -> None:
        self.index, self._tokenizer = index, tokenizer
        self._text = ""
        self._reason: str | None = None
        self._logprobs: Json | None = None
        self._decoder, self._offset = StreamDecoder(tokenizer), 0

    def push(self, piece: Piece) -> Json:
        """What a piece adds, as the choice of a stream event."""
        self._text += piece.text
        self._reason = piece.finish_reason
        added = self._note(piece)
        if added is not None:
            whole = self._logprobs = self._logprobs or {key: [] for key in added}
            for key, values in added.items():
                whole[key] += values
        return self._choice(piece.text, added)

    def _note(self, piece: Piece) -> Json | None:
        """Logprobs of one piece: columns, which are empty for the token that ends it."""
        if piece.logprob is None:
            return None
        entries = token_logprobs(self._tokenizer, piece)
        offset, self._offset = self._offset, self._offset + len(self._decoder.push(piece.token))
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {e["token"]: e["logprob"] for e in (entry, *entry["top_logprobs"])}
                for entry in entries
            ],  # the token itself is among them, as in OpenAI's API
            "text_offset": [offset for _ in entries],
            "bytes": [entry["bytes"] for entry in entries],
        }

    def _choice(self, text: str, logprobs: Json | None) -> Json:
        return {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            **ended(self._reason),
        }

    def body(self) -> Json:
        """The whole choice."""
        return self._choice(self._text, self._logprobs)


class CompletionAnswer:
    """All choices of one request for completions, ``per_prompt`` of them to each prompt."""

    done = True

    def __init__(
        self,
        head: Head,
        choices: Sequence[CompletionChoice],
        per_prompt: int,
        wants_usage: bool,
    ) -> None:
        self._head, self._choices = head, choices
        self._per_prompt, self._wants_usage = per_prompt, wants_usage

    def begin(self) -> list[Json]:
        """The events before anything is known: none."""
        return []

    def push(self, index: int, piece: Piece) -> list[Json]:
        """The events of one piece of the choice ``index``."""
        choice = self._choices[index].push(piece)
        if not (choice["text"] or choice["logprobs"] or choice["finish_reason"]):
            return []  # text that is still held back
        event = self._head.body("text_completion") | {"choices": [choice]}
        return [event | {"usage": None} if self._wants_usage else event]

    def end(self, usages: Sequence[Usage]) -> list[Json]:
        """The events after the last piece, with one usage a choice."""
        if not self._wants_usage:
            return []
        empty = self._head.body("text_completion") | {"choices": []}
        return [empty | costs(usages, self._per_prompt)]

    def body(self, usages: Sequence[Usage]) -> Json:
        """The whole answer."""
        choices = [choice.body() for choice in self._choices]
        whole = self._head.body("text_completion") | {"choices": choices}
        return whole | costs(usages, self._per_prompt)

    def failed(self, error: GemloomError) -> Json:
        """The event that ends a stream which an error cut short."""
        return error_body(error)
