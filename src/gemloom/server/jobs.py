"""From a request to what the engine is to run: prompt ids, sampling options, a constraint.

All of it is slow enough (templates, tokenizing, grammars) to be done in a thread of its own, and
all that can be wrong with a request is found here, before anything runs. What a chat means is
said in ``gemloom/text/compose.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemloom.adapters.info import Scales
from gemloom.engine.generation import Run
from gemloom.errors import OptionError, QueueFullError, RequestError
from gemloom.model import Model
from gemloom.sampling.params import from_options
from gemloom.server.errors import FieldError
from gemloom.server.fields import Json
from gemloom.server.protocol import ChatRequest, CompletionRequest, Conversation, Ids, SampledBody
from gemloom.text import conversation
from gemloom.text.compose import ChatOptions, Composed, Form, seeded
from gemloom.text.prompts import text_ids
from gemloom.text.router import Splitter
from gemloom.text.tools import tool_choice


@dataclass(frozen=True, slots=True)
class Job:
    """One run to start."""

    composed: Composed
    adapters: Scales

    def start(self, model: Model, after: Run | None) -> Run:
        """Start it; never blocks. Raises QueueFullError, EngineError and what is wrong with it."""
        return model.answer(self.composed, self.adapters, after)


def start(model: Model, jobs: Sequence[Job]) -> list[Run]:
    """Start all, or none: those started before one that fails are cancelled.

    As many as there are slots are in the queue at once, fewer where it is full; the others take
    the places of these. So a request with many prompts is one in the queue, not one a prompt, and
    other requests get their turn between its runs. QueueFullError where there is no room for one.
    """
    runs: list[Run] = []
    most = model.options.slots
    try:
        for job in jobs:
            try:
                run = job.start(model, runs[-most] if len(runs) >= most else None)
            except QueueFullError:
                if not runs:
                    raise
                most = len(runs)
                run = job.start(model, runs[0])
            runs.append(run)
    except BaseException:
        for run in runs:
            run.cancel()
        raise
    return runs


class Preparer:
    """Makes jobs of requests to one model; any thread may call it."""

    def __init__(self, model: Model) -> None:
        self._model, self._tokenizer = model, model.tokenizer

    def prompt(self, asked: Conversation) -> Ids:
        """The prompt of a chat, as ``Model.chat`` makes it. RequestError for a bad one."""
        return self._model.composer.prompt(asked.messages, asked.tools, _variables(asked))

    def chat(self, asked: ChatRequest, adapters: Scales) -> tuple[list[Job], list[Splitter]]:
        """The runs of a chat, and what splits the text of each."""
        params = from_options(asked.sampling())
        options = _chat_options(asked)
        composed = self._model.composer.compose(asked.messages, options, params, asked.choices)
        return [Job(one, adapters) for one in composed], [one.splitter for one in composed]

    def completion(self, asked: CompletionRequest, adapters: Scales) -> list[Job]:
        """The runs of a request for completions, those of the first prompt first."""
        params = from_options(asked.sampling())
        prompts = [self.ids(prompt, asked.parse_special) for prompt in asked.prompts()]
        form = _form(asked)
        return [
            Job(Composed(ids, own, form(self._model.grammars) if form else None), adapters)
            for ids in prompts
            for own in seeded(params, asked.choices)
        ]

    def ids(self, prompt: str | Ids, special: bool) -> Ids:
        """Text as ids with one BOS, ``special`` as the tokenizer has it; ids as they are."""
        if not isinstance(prompt, str):
            return prompt
        return text_ids(prompt, self._tokenizer, self._model.context, special)


def _chat_options(asked: ChatRequest) -> ChatOptions:
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
        form=_form(asked),
        thinking_budget=budget,
        variables=_variables(asked),
    )


def _form(asked: SampledBody) -> Form | None:
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


def _variables(asked: Conversation) -> Json:
    return conversation.variables(
        reasoning_effort=asked.reasoning_effort,
        enable_thinking=asked.enable_thinking,
        chat_template_kwargs=asked.chat_template_kwargs,
    )
