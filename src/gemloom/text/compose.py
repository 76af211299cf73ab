"""From a chat to what the engine is to run: the prompt, its bounds, and how the answer is read.

One path for ``Model.chat``, the command line and the server. Not here: what messages
(``text/conversation.py``) and tools (``text/tools.py``) may be, and the start of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from gemloom.errors import OptionError
from gemloom.sampling.params import NEVER, SamplingParams
from gemloom.text import conversation, markup
from gemloom.text.bounds import Constraint, ThinkingBudget, both
from gemloom.text.chat import PLAIN_STOP, Message, encode_chat, is_continued
from gemloom.text.conversation import Thought
from gemloom.text.router import Formed, Plain, Router, Splitter
from gemloom.text.stopping import Stops
from gemloom.text.tokenizer import Tokenizer
from gemloom.text.tools import check_tools, tool_choice
from gemloom.text.visible import Visible, VisibleStops

if TYPE_CHECKING:
    from gemloom.text.constraint import Grammars

Form = Callable[["Grammars"], Constraint | None]  # a fresh constraint for each answer
_TAIL = 64  # tokens at the end of a prompt, where a thought would have been opened
_SEEDS = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What a chat asks for besides its messages and how tokens are picked.

    tools: functions that may be called, as OpenAI's API has them; they need Gemma 4.
    tool_choice: "auto", "required", "none" or a function, as in OpenAI's API. "auto" if left out.
    parallel_tool_calls: whether an answer may have several calls; else it ends with the first.
    response_format: as in OpenAI's API, json_object or json_schema.
    form: makes another bound of the answer's text: takes ``grammars``, gives a constraint.
    constraint: a bound of all that is said, thoughts and calls too, in place of the others.
    thinking_budget: how many tokens thoughts may take.
    variables: the template's, such as ``{"enable_thinking": True}``.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    response_format: Mapping[str, Any] | None = None
    form: Form | None = None
    constraint: Constraint | None = None
    thinking_budget: int | None = None
    variables: Mapping[str, Any] | None = field(default_factory=dict)


def chat_options(given: Mapping[str, Any]) -> tuple[ChatOptions, dict[str, Any]]:
    """``given`` as ChatOptions, and the rest of it."""
    names = {option.name for option in fields(ChatOptions)}
    own = {name: value for name, value in given.items() if name in names}
    return ChatOptions(**own), {name: given[name] for name in given.keys() - names}


@dataclass(frozen=True, slots=True)
class Composed:
    """One answer to start, and what reads its text."""

    prompt: str | Sequence[int]
    params: SamplingParams
    constraint: Constraint | None = None
    stops: Stops | None = None  # None: all of its text is visible, so those of params do
    splitter: Splitter = field(default_factory=Plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bounds:
    """What a chat's answer may consist of, once everything has been looked at."""

    tools: list[dict[str, Any]]
    choice: str | None  # as text.tools.tool_choice gives it
    parallel: bool
    form: Form | None
    thought: Thought
    budget: int | None


class Composer:
    """Composes chats for one model; any thread may call it.

    ``grammars`` gives the model's Grammars, which are made when they are first needed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        grammars: Callable[[], Grammars],
        n_vocab: int,
        context: int,
    ) -> None:
        self._tokenizer, self._grammars = tokenizer, grammars
        self._n_vocab, self._context = n_vocab, context
        opening, closing = map(tokenizer.id_of, (markup.THOUGHT, markup.THOUGHT_END))
        # The tokens around a thought; None for a model that has no such markup.
        self._markers = None if opening is None or closing is None else (opening, closing)
        self._call = tokenizer.id_of(markup.CALL)

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> list[int]:
        """The prompt of a chat as ids. RequestError for messages or tools that cannot be used."""
        return self._prompt(messages, check_tools(tools or []), variables)

    def _prompt(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]],
        variables: Mapping[str, Any],
    ) -> list[int]:
        given = {**variables, "tools": tools} if tools else {**variables}
        return encode_chat(self._tokenizer, conversation.prepare(messages), self._context, **given)

    def compose(
        self,
        messages: Sequence[Message],
        asked: ChatOptions,
        params: SamplingParams,
        answers: int = 1,
    ) -> list[Composed]:
        """What so many answers to ``messages`` need; each has the next seed, where there is one.

        Raises RequestError, in one line, for what cannot be used or does not go together.
        """
        variables = asked.variables or {}
        choice = tool_choice(asked.tool_choice, asked.tools)
        tools = check_tools(asked.tools or [])
        prompt = self._prompt(messages, tools, variables)
        thought = self._thought(prompt, variables)
        _check(asked)
        if is_continued(messages, variables):
            _check_continued(asked, choice, thought)
        bounds = _Bounds(
            tools=tools,
            choice=choice,
            parallel=asked.parallel_tool_calls is not False,
            form=_form(asked),
            thought=thought,
            budget=asked.thinking_budget,
        )
        free = choice is not None or asked.constraint is not None
        params = self._params(params, calls=free)
        return [
            self._answer(prompt, own, asked.constraint, bounds) for own in seeded(params, answers)
        ]

    def _answer(
        self, prompt: list[int], params: SamplingParams, own: Constraint | None, bounds: _Bounds
    ) -> Composed:
        constraint = self._constraint(bounds, own)
        splitter = self._splitter(bounds)
        if not params.stop or isinstance(splitter, Plain):
            return Composed(prompt, params, constraint, splitter=splitter)
        stops = VisibleStops(Visible(self._splitter(bounds), params.stop))
        return Composed(prompt, params, constraint, stops, Visible(splitter, params.stop))

    def _thought(self, prompt: Sequence[int], variables: Mapping[str, Any]) -> Thought:
        if self._markers is None:
            return Thought()
        tail = self._tokenizer.decode(prompt[-_TAIL:], special=True)
        begun = conversation.starts_reasoning(tail)
        return Thought(begun or bool(variables.get("enable_thinking")), begun)

    def _params(self, params: SamplingParams, calls: bool) -> SamplingParams:
        """``params``, with the stop of a base model; without ``calls`` none can begin."""
        if self._tokenizer.chat_template is None:
            params = replace(params, stop=(*params.stop, PLAIN_STOP))
        if self._call is None or calls:
            return params
        return replace(params, logit_bias={**params.logit_bias, self._call: NEVER})

    def _splitter(self, bounds: _Bounds) -> Splitter:
        """A reader of the answer: where nothing but a form may come, all of it is text."""
        formed = bounds.form is not None and bounds.choice in (None, "auto")
        markup_first = bounds.thought.allowed or bounds.choice is not None
        if self._markers is None or (formed and not markup_first):
            return Plain()
        router = Router(bounds.thought.begun)
        return Formed(router) if formed else router

    def _constraint(self, bounds: _Bounds, own: Constraint | None) -> Constraint | None:
        body = own if own is not None else self._body(bounds)
        limit = self._limit(bounds)
        if body is None or limit is None:
            return limit if body is None else body
        return both(limit, body)

    def _body(self, bounds: _Bounds) -> Constraint | None:
        """The bound of text and calls, with the thought that may come first."""
        form = bounds.form(self._grammars()) if bounds.form else None
        thought = bounds.thought
        if bounds.choice is None:
            if form is None or not thought.allowed:
                return form
            return self._grammars().after_thought(form, thought.begun)
        return self._grammars().tools(
            bounds.tools, bounds.choice,
            thinking=thought.allowed, open=thought.begun, parallel=bounds.parallel, form=form,
        )  # fmt: skip

    def _limit(self, bounds: _Bounds) -> Constraint | None:
        if bounds.budget is None or self._markers is None:
            return None
        opening, closing = self._markers
        return ThinkingBudget(closing, opening, bounds.budget, bounds.thought.begun, self._n_vocab)


def seeded(params: SamplingParams, answers: int) -> list[SamplingParams]:
    """The params of so many answers, each with a seed of its own if one was given."""
    if params.seed is None:
        return [params] * answers
    return [replace(params, seed=(params.seed + number) % _SEEDS) for number in range(answers)]


def _form(asked: ChatOptions) -> Form | None:
    given = asked.response_format
    if given is None or (isinstance(given, Mapping) and given.get("type") == "text"):
        return asked.form
    return lambda grammars: grammars.response_format(given)


def _check(asked: ChatOptions) -> None:
    budget, parallel = asked.thinking_budget, asked.parallel_tool_calls
    if not isinstance(parallel, bool | None):
        raise OptionError(f"parallel_tool_calls must be true or false, is {parallel!r}")
    if isinstance(budget, bool) or not isinstance(budget, int | None):
        raise OptionError(f"thinking_budget must be an integer of 0 or more, is {budget!r}")
    bounds = {
        "response_format and form": asked.response_format is not None and asked.form is not None,
        "constraint and a form": asked.constraint is not None and _form(asked) is not None,
        "constraint and tool_choice": (
            asked.constraint is not None and asked.tool_choice is not None
        ),
    }
    for names, together in bounds.items():
        if together:
            raise OptionError(f"{names}: only one of them can be asked for")


def _check_continued(asked: ChatOptions, choice: str | None, thought: Thought) -> None:
    """OptionError for what an answer that has begun already cannot be."""
    wrong = {
        "a thought": thought.allowed,
        "a form": _form(asked) is not None,
        "tool_choice required or a function": choice not in (None, "auto"),
    }
    for what, is_asked in wrong.items():
        if is_asked:
            raise OptionError(
                f"the last message is the assistant's and is continued, so {what} cannot be asked "
                "for: end with a user's message"
            )
