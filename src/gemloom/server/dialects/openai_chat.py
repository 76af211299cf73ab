"""/v1/chat/completions: its requests, what they ask for, its answers and stream events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from gemloom.engine.generation import Usage, call_body
from gemloom.engine.request import Piece
from gemloom.errors import GemloomError, OptionError
from gemloom.sampling.params import from_options
from gemloom.server import other_names
from gemloom.server.backend import Backend
from gemloom.server.bodies import error_body
from gemloom.server.dialects.dialect import Dialect
from gemloom.server.dialects.openai import DONE, Head, costs, ended, form_of, token_logprobs
from gemloom.server.dialects.sse import ServerSent
from gemloom.server.errors import FieldError
from gemloom.server.fields import Json
from gemloom.server.protocol import MAX_TOP_LOGPROBS, Conversation, SampledBody
from gemloom.text import conversation
from gemloom.text.compose import ChatOptions, Composed
from gemloom.text.router import Part, Reasoning, Splitter, ToolCall
from gemloom.text.tokenizer import Tokenizer
from gemloom.text.tools import tool_choice


class ChatRequest(Conversation, SampledBody):
    """POST /v1/chat/completions."""

    OTHER_NAMES: ClassVar[other_names.Names] = other_names.CHAT

    max_completion_tokens: int | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None  # false: at most one call in an answer
    thinking_budget: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def sampling(self) -> Json:
        """As before, with the names a chat has for them."""
        given = super().sampling()
        if self.max_completion_tokens is not None:
            _check_same(self.max_tokens, self.max_completion_tokens)
            given["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        elif self.top_logprobs:
            raise FieldError("top_logprobs", "top_logprobs needs logprobs to be true")
        return given


def _check_same(old: int | None, new: int) -> None:
    if old not in (None, new):
        raise FieldError(
            "max_tokens",
            "max_tokens and max_completion_tokens say different things: send one of them",
        )


def compose(asked: ChatRequest, backend: Backend) -> list[Composed]:
    """The answers to a chat."""
    params = from_options(asked.sampling())
    return backend.composer.compose(asked.messages, _options(asked), params, asked.choices)


def _options(asked: ChatRequest) -> ChatOptions:
    try:
        tool_choice(asked.tool_choice, asked.tools)
    except OptionError as error:
        raise FieldError("tool_choice", str(error)) from None
    budget = asked.thinking_budget
    if budget is None:
        budget = conversation.reasoning_budget(asked.reasoning_effort)
    return ChatOptions(
        tools=asked.tools,
        tool_choice=asked.tool_choice,
        parallel_tool_calls=asked.parallel_tool_calls,
        form=form_of(asked),
        thinking_budget=budget,
        variables=asked.variables(),
    )


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


class ChatAnswer(ServerSent):
    """All choices of one chat request."""

    done = DONE

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


def _answer(
    asked: ChatRequest, runs: Sequence[Composed], model: str, tokenizer: Tokenizer
) -> ChatAnswer:
    choices = [ChatChoice(i, tokenizer, run.splitter) for i, run in enumerate(runs)]
    return ChatAnswer(Head.new("chatcmpl", model), choices, asked.wants_usage)


DIALECT = Dialect(
    name="chat_completions",
    about="Answer a conversation.",
    body=ChatRequest,
    compose=compose,
    answer=_answer,
)
