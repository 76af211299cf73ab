"""/v1/completions: its requests, what they ask for, its answers and stream events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from gemloom.engine.generation import Usage
from gemloom.engine.request import Piece
from gemloom.errors import GemloomError
from gemloom.sampling.params import from_options
from gemloom.server import other_names
from gemloom.server.backend import Backend
from gemloom.server.bodies import error_body
from gemloom.server.dialects.dialect import Dialect
from gemloom.server.dialects.openai import (
    DONE,
    Head,
    costs,
    ended,
    form_of,
    raw_ids,
    token_logprobs,
)
from gemloom.server.dialects.sse import ServerSent
from gemloom.server.errors import FieldError
from gemloom.server.fields import Json
from gemloom.server.protocol import (
    MAX_TOP_LOGPROBS,
    Ids,
    Prompts,
    Raw,
    SampledBody,
    one_or_many,
)
from gemloom.text.compose import Composed, seeded
from gemloom.text.tokenizer import StreamDecoder, Tokenizer

MAX_RUNS = 128  # of one request: prompts times choices


class CompletionRequest(Raw, SampledBody):
    """POST /v1/completions."""

    OTHER_NAMES: ClassVar[other_names.Names] = other_names.COMPLETION

    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def sampling(self) -> Json:
        """As before, with logprobs."""
        given = super().sampling()
        return given if self.logprobs is None else given | {"logprobs": self.logprobs}

    def prompts(self) -> list[str | Ids]:
        """Each prompt by itself. FieldError where they are too many, or none."""
        found = one_or_many(self.prompt)
        if not found or len(found) * self.choices > MAX_RUNS:
            raise FieldError(
                "prompt", f"prompt: from 1 to {MAX_RUNS} answers can be asked for in one request"
            )
        return found


def compose(asked: CompletionRequest, backend: Backend) -> list[Composed]:
    """The continuations that are asked for, those of the first prompt first."""
    params = from_options(asked.sampling())
    prompts = [raw_ids(prompt, asked.parse_special, backend) for prompt in asked.prompts()]
    form = form_of(asked)
    return [
        Composed(ids, own, form(backend.grammars) if form else None)
        for ids in prompts
        for own in seeded(params, asked.choices)
    ]


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


class CompletionAnswer(ServerSent):
    """All choices of one request for completions, ``per_prompt`` of them to each prompt."""

    done = DONE

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


def _answer(
    asked: CompletionRequest, runs: Sequence[Composed], model: str, tokenizer: Tokenizer
) -> CompletionAnswer:
    choices = [CompletionChoice(index, tokenizer) for index in range(len(runs))]
    return CompletionAnswer(Head.new("cmpl", model), choices, asked.choices, asked.wants_usage)


DIALECT = Dialect(
    name="completions",
    about="Continue one or several prompts.",
    body=CompletionRequest,
    compose=compose,
    answer=_answer,
)
