"""/v1/responses: its requests as chat requests, its answers and stream events.

Nothing is stored, so ``previous_response_id`` is refused: a client sends the earlier items back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, Literal

from pydantic import Field

from gemloom.engine.generation import Usage
from gemloom.engine.request import Piece
from gemloom.errors import GemloomError, quoted
from gemloom.sampling.params import GEMMA_DEFAULTS
from gemloom.server import fields, other_names
from gemloom.server.backend import Backend
from gemloom.server.dialects import openai_chat
from gemloom.server.dialects.dialect import Dialect
from gemloom.server.dialects.openai import Head, new_id, token_logprobs, usage_body
from gemloom.server.dialects.openai_chat import ChatRequest
from gemloom.server.dialects.sse import ServerSent
from gemloom.server.errors import FieldError
from gemloom.server.fields import Json, Shape
from gemloom.server.protocol import (
    MAX_TOP_LOGPROBS,
    Objects,
    ResponseFormat,
    Sampling,
    Strict,
)
from gemloom.text.compose import Composed
from gemloom.text.router import Content, Part, Reasoning, Splitter, ToolCall
from gemloom.text.tokenizer import Tokenizer

_TEXT_PARTS = ("input_text", "output_text", "text")


class TextFormat(Strict):
    """What the text must be; a schema lies beside its name, unlike in a chat."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Json | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    """``text``: the format."""

    format: TextFormat | None = None
    verbosity: str | None = None  # advice to other models


class ReasoningOptions(Strict):
    """``reasoning``: how much; summaries are not made, the thoughts themselves are given."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(Sampling):
    """POST /v1/responses."""

    OTHER_NAMES: ClassVar[other_names.Names] = other_names.RESPONSES
    SHAPES: ClassVar[Mapping[str, Shape]] = {"input": fields.ITEM, "tools": fields.RESPONSE_TOOL}

    input: str | Objects
    instructions: str | None = None
    max_output_tokens: int | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    tools: Objects | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: Json | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = Field(None, ge=0)

    def chat(self) -> ChatRequest:
        """The same request as a chat. FieldError for an item or tool that is not understood."""
        same = {name: getattr(self, name) for name in Sampling.model_fields}
        names = (
            "chat_template_kwargs", "enable_thinking", "thinking_budget", "top_logprobs",
            "parallel_tool_calls",
        )  # fmt: skip
        same |= {name: getattr(self, name) for name in names}
        return ChatRequest(
            **same,
            messages=_messages(self),
            tools=[_tool(tool) for tool in self.tools or []] or None,
            tool_choice=_tool_choice(self.tool_choice),
            response_format=_format(self.text.format if self.text else None),
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            max_completion_tokens=self.max_output_tokens,
            logprobs=True if self.top_logprobs else None,
        )


def _format(given: TextFormat | None) -> ResponseFormat | None:
    if given is None:
        return None
    if given.schema_ is None and given.type == "json_schema":
        raise FieldError("text", "text: the format json_schema needs a schema")
    return ResponseFormat(type=given.type, schema=given.schema_)


def _tool(tool: Json) -> Json:
    if tool.get("type") != "function":
        raise FieldError(
            "tools", f"tools: {quoted(tool.get('type'))} tools are not run here: function only"
        )
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _tool_choice(choice: str | Json | None) -> str | Json | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function":
        raise FieldError(
            "tool_choice", f"tool_choice: {quoted(choice.get('type'))} is not supported"
        )
    return {"type": "function", "function": {"name": choice.get("name")}}


def _messages(request: ResponsesRequest) -> list[Json]:
    """The messages of a chat. The items of one turn of the model become one message."""
    messages: list[Json] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for index, item in enumerate(request.input):
        _add(messages, item, f"input[{index}]")
    return messages


def _add(messages: list[Json], item: Json, place: str) -> None:
    kind = item.get("type", "message")
    if kind == "message" and item.get("role") != "assistant":
        messages.append({"role": item.get("role"), "content": _content(item.get("content"), place)})
    elif kind == "message":
        turn = _turn(messages)
        if turn["content"] is not None:
            turn = _turn(messages, new=True)
        turn["content"] = _content(item.get("content"), place)
    elif kind == "reasoning":
        text = "".join(
            str(part.get("text", "")) for part in _parts(item.get("content") or [], place)
        )
        if text:
            _turn(messages, new=True)["reasoning_content"] = text
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        _turn(messages).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        content = _content(item.get("output"), place)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    else:
        raise FieldError("input", f"{place}: items of type {quoted(kind)} are not supported")


def _turn(messages: list[Json], new: bool = False) -> Json:
    """The model's turn that the messages end with; a new one if they end with none."""
    if new or not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _content(content: Any, place: str) -> Any:
    """Content in a chat's form: a string, or text parts."""
    if not isinstance(content, list):
        return content
    return [{"type": "text", "text": part.get("text")} for part in _parts(content, place)]


def _parts(content: Any, place: str) -> list[Json]:
    known = (*_TEXT_PARTS, "reasoning_text")
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in known:
            raise FieldError(
                "input", f"{place}: a content part of type {quoted(kind)}: only text is read"
            )
    return list(content)


class ResponseAnswer(ServerSent):
    """One response as it grows: an item for each run of reasoning or text, and each tool call."""

    def __init__(
        self, head: Head, request: ResponsesRequest, tokenizer: Tokenizer, splitter: Splitter
    ) -> None:
        self._tokenizer, self._splitter = tokenizer, splitter
        self._response = _response(head, request)
        self._output: list[Json] = self._response["output"]
        self._open: Json | None = None  # the last item, while more may come to it
        self._sent, self._reasoning_tokens = 0, 0
        self._unsent: list[Json] = []  # logprobs of tokens that have given no text yet
        self._reason: str | None = None

    def begin(self) -> list[Json]:
        """The events before anything is known."""
        return [
            self._event(kind, response=deepcopy(self._response))
            for kind in ("response.created", "response.in_progress")
        ]

    def push(self, index: int, piece: Piece) -> list[Json]:
        """The events of one piece."""
        parts = self._splitter.push(piece.text)
        if piece.finish_reason:
            parts += self._splitter.flush()
            self._reason = piece.finish_reason
        self._unsent += token_logprobs(self._tokenizer, piece)
        events = [event for part in parts for event in self._part(part)]
        self._reasoning_tokens += self._open is not None and self._open["type"] == "reasoning"
        return events + (self._close() if piece.finish_reason else [])

    def end(self, usages: Sequence[Usage]) -> list[Json]:
        """The last event, which has the whole response."""
        whole = self.body(usages)
        return [self._event(f"response.{whole['status']}", response=whole)]

    def body(self, usages: Sequence[Usage]) -> Json:
        """The whole response."""
        cut = self._was_cut()
        counts = usage_body(usages, usages, self._reasoning_tokens)
        self._response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            **({"stop_reason": self._reason} if self._reason == "repetition" else {}),
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": counts["prompt_tokens_details"] | {"cache_write_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": counts["completion_tokens_details"],
                "total_tokens": counts["total_tokens"],
            },
        }
        return self._response

    def _was_cut(self) -> bool:
        return self._reason in ("length", "repetition")

    def failed(self, error: GemloomError) -> Json:
        """The event that ends a response which an error cut short."""
        told = {"code": "server_error", "message": str(error)}
        self._response |= {"status": "failed", "error": told}
        return self._event("response.failed", response=self._response)

    def _event(self, kind: str, **more: Any) -> Json:
        self._sent += 1
        return {"type": kind, "sequence_number": self._sent - 1, **more}

    def _part(self, part: Part) -> list[Json]:
        if isinstance(part, ToolCall):
            return [*self._close(), *self._call(part)]
        kind = "reasoning" if isinstance(part, Reasoning) else "message"
        events = []
        if self._open is None or self._open["type"] != kind:
            events = [*self._close(), *self._begin(kind)]
        return [*events, self._delta(part)]

    def _begin(self, kind: str) -> list[Json]:
        item: Json = {"type": kind, "status": "in_progress", "content": []}
        if kind == "message":
            item |= {"id": new_id("msg"), "role": "assistant"}
            part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item |= {"id": new_id("rs"), "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        added = self._event(
            "response.output_item.added", output_index=len(self._output), item=deepcopy(item)
        )
        self._output.append(item)
        item["content"].append(part)
        self._open = item
        return [added, self._inside("response.content_part.added", part=deepcopy(part))]

    def _inside(self, kind: str, **more: Any) -> Json:
        """An event about the content of the open item."""
        assert self._open is not None
        place = {"item_id": self._open["id"], "output_index": len(self._output) - 1}
        return self._event(kind, **place, content_index=0, **more)

    def _delta(self, part: Content | Reasoning) -> Json:
        assert self._open is not None
        content = self._open["content"][0]
        content["text"] += part.text
        if isinstance(part, Reasoning):
            return self._inside("response.reasoning_text.delta", delta=part.text)
        logprobs, self._unsent = self._unsent, []
        content["logprobs"] += logprobs
        return self._inside("response.output_text.delta", delta=part.text, logprobs=logprobs)

    def _close(self) -> list[Json]:
        """The events that complete the open item, if there is one."""
        if self._open is None:
            return []
        item, content = self._open, self._open["content"][0]
        more = {"logprobs": content["logprobs"]} if item["type"] == "message" else {}
        done = f"response.{content['type']}.done"
        events = [
            self._inside(done, text=content["text"], **more),
            self._inside("response.content_part.done", part=deepcopy(content)),
        ]
        item["status"] = "incomplete" if self._was_cut() else "completed"
        self._open = None
        return [*events, self._done(item)]

    def _done(self, item: Json) -> Json:
        place = len(self._output) - 1
        return self._event("response.output_item.done", output_index=place, item=deepcopy(item))

    def _call(self, call: ToolCall) -> list[Json]:
        item = {"type": "function_call", "id": new_id("fc"), "call_id": new_id("call")}
        item |= {"name": call.name, "arguments": "", "status": "in_progress"}
        place = {"output_index": len(self._output)}
        inside = {"item_id": item["id"], **place}
        events = [self._event("response.output_item.added", **place, item=deepcopy(item))]
        self._output.append(item | {"arguments": call.arguments, "status": "completed"})
        kind = "response.function_call_arguments"
        return [
            *events,
            self._event(f"{kind}.delta", **inside, delta=call.arguments),
            self._event(f"{kind}.done", **inside, name=call.name, arguments=call.arguments),
            self._done(self._output[-1]),
        ]


def _response(head: Head, request: ResponsesRequest) -> Json:
    """The response before anything is known, with the request's options as it took them."""
    asked = request.model_dump(by_alias=True, exclude_none=True)
    text = asked.get("text", {})
    return {
        "id": head.id,
        "object": "response",
        "created_at": head.created,
        "model": head.model,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": {},
        "output": [],
        "parallel_tool_calls": asked.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": {"effort": asked.get("reasoning", {}).get("effort"), "summary": None},
        "store": False,
        "temperature": asked.get("temperature", GEMMA_DEFAULTS.temperature),
        "text": {"format": text.get("format", {"type": "text"})},
        "tool_choice": asked.get("tool_choice", "auto"),
        "tools": asked.get("tools", []),
        "top_p": asked.get("top_p", GEMMA_DEFAULTS.top_p),
        "truncation": "disabled",
        "usage": None,
    }


def _compose(asked: ResponsesRequest, backend: Backend) -> list[Composed]:
    return openai_chat.compose(asked.chat(), backend)


def _answer(
    asked: ResponsesRequest, runs: Sequence[Composed], model: str, tokenizer: Tokenizer
) -> ResponseAnswer:
    (run,) = runs
    return ResponseAnswer(Head.new("resp", model), asked, tokenizer, run.splitter)


DIALECT = Dialect(
    name="responses",
    about="Answer a conversation in the form of the responses API; nothing is stored.",
    body=ResponsesRequest,
    compose=_compose,
    answer=_answer,
)
