"""From a request to what the engine is to run: prompt ids, sampling options, a constraint.

All of it is slow enough (templates, tokenizing, grammars) to be done in a thread of its own, and
all that can be wrong with a request is found here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from gemloom.adapters.info import Scales
from gemloom.errors import QueueFullError, RequestError
from gemloom.generation import Run
from gemloom.model import Model
from gemloom.sampling import from_options
from gemloom.sequence import Constraint
from gemloom.server.errors import FieldError
from gemloom.server.fields import Json
from gemloom.server.protocol import ChatRequest, CompletionRequest, Conversation, Ids, Sampled
from gemloom.text import conversation
from gemloom.text.chat import with_stop
from gemloom.text.constraint import ThinkingBudget, both
from gemloom.text.conversation import Thought
from gemloom.text.prompts import text_ids
from gemloom.text.router import Plain, Router, Splitter

_SEEDS = 2**64

MakeConstraint = Callable[[], Constraint | None]


@dataclass(frozen=True, slots=True)
class Job:
    """One run to start."""

    prompt: Ids
    sampling: Json
    constraint: Constraint | None
    adapters: Scales

    def start(self, model: Model, after: Run | None) -> Run:
        """Start it; never blocks. Raises QueueFullError, EngineError and what is wrong with it."""
        return model.stream(
            self.prompt, constraint=self.constraint, adapters=self.adapters, after=after,
            **self.sampling,
        )  # fmt: skip


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
        self._model, self._tokenizer, self._grammars = model, model.tokenizer, model.grammars
        opening, closing = (model.tokenizer.id_of(text) for text in ("<|channel>", "<channel|>"))
        # The tokens around a thought; None for a model that has no such markup.
        self._markers = None if opening is None or closing is None else (opening, closing)
        self._call = model.tokenizer.id_of("<|tool_call>")

    def prompt(self, asked: Conversation) -> Ids:
        """The prompt of a chat, as ``Model.chat`` makes it. RequestError for a bad one."""
        return self._prompt(asked, _variables(asked))

    def _prompt(self, asked: Conversation, variables: Json) -> Ids:
        return self._model.chat_prompt(asked.messages, tools=asked.tools, variables=variables)

    def chat(self, asked: ChatRequest, adapters: Scales) -> tuple[list[Job], list[Splitter]]:
        """The runs of a chat, and what splits the text of each."""
        sampling = _checked(self._chat_sampling(asked))
        variables = _variables(asked)
        prompt = self._prompt(asked, variables)
        thought = self._model.thought(prompt, variables) if self._markers else Thought()
        make = self._chat_constraint(asked, thought)
        jobs = [Job(prompt, own, make(), adapters) for own in _seeded(sampling, asked.choices)]
        return jobs, [self._splitter(asked, thought) for _ in jobs]

    def completion(self, asked: CompletionRequest, adapters: Scales) -> list[Job]:
        """The runs of a request for completions, those of the first prompt first."""
        sampling = _checked(asked.sampling())
        prompts = [self.ids(prompt, asked.parse_special) for prompt in asked.prompts()]
        make = self._format(asked, Thought())
        return [
            Job(prompt, own, make(), adapters)
            for prompt in prompts
            for own in _seeded(sampling, asked.choices)
        ]

    def ids(self, prompt: str | Ids, special: bool) -> Ids:
        """Text as ids with one BOS, ``special`` as the tokenizer has it; ids as they are."""
        if not isinstance(prompt, str):
            return prompt
        return text_ids(prompt, self._tokenizer, self._model.context, special)

    def _chat_sampling(self, asked: ChatRequest) -> Json:
        """The options; where no tool may be called, the token that begins a call is barred."""
        sampling = with_stop(self._tokenizer, asked.sampling())
        if self._call is None or _tool_choice(asked) is not None:
            return sampling
        return sampling | {"logit_bias": sampling.get("logit_bias", {}) | {self._call: -100.0}}

    def _splitter(self, asked: ChatRequest, thought: Thought) -> Splitter:
        """A Router, but where a form leaves room for no markup: there, what looks so is text."""
        formed = _form(asked) != "text" and not thought.allowed and not thought.begun
        return Router(thought.begun) if self._markers and not formed else Plain()

    def _chat_constraint(self, asked: ChatRequest, thought: Thought) -> MakeConstraint:
        choice = _tool_choice(asked)
        form = self._format(asked, thought)
        if choice is not None:
            if _form(asked) != "text":
                raise FieldError("tools", "tools: with them, a form needs tool_choice to be none")
            tools = conversation.check_tools(asked.tools or [])
            form = partial(self._grammars.tools, tools, choice, **thought.options())
        return self._within_budget(asked, form, thought)

    def _format(self, asked: Sampled, thought: Thought) -> MakeConstraint:
        """Makes each run the constraint that the format, the regex or the grammar asks for."""
        grammars, options = self._grammars, thought.options()
        form = _form(asked)
        if form == "regex":
            return partial(grammars.regex, asked.regex or "", **options)
        if form == "grammar":
            return partial(grammars.lark, asked.grammar or "", **options)
        if form == "json_object":
            return partial(grammars.json_object, **options)
        if asked.response_format and form == "json_schema":
            return partial(grammars.json_schema, asked.response_format.any_schema or {}, **options)
        return lambda: None

    def _within_budget(
        self, asked: ChatRequest, form: MakeConstraint, thought: Thought
    ) -> MakeConstraint:
        """``form``, and the tokens that thoughts may take."""
        budget = asked.thinking_budget
        if budget is None:
            budget = conversation.reasoning_budget(asked.reasoning_effort)
        if budget is None or self._markers is None:
            return form
        opening, closing = self._markers
        n_vocab = self._model.config.n_vocab

        def make() -> Constraint:
            limit = ThinkingBudget(closing, opening, budget, thought.begun, n_vocab)
            inner = form()
            return limit if inner is None else both(limit, inner)

        return make


def _seeded(sampling: Json, choices: int) -> list[Json]:
    """The options of so many runs, each with a seed of its own if one was given."""
    if "seed" not in sampling:
        return [sampling] * choices
    return [sampling | {"seed": (sampling["seed"] + n) % _SEEDS} for n in range(choices)]


def _checked(sampling: Json) -> Json:
    """The options, once ``SamplingParams`` takes them. OptionError."""
    from_options(sampling)
    return sampling


def _form(asked: Sampled) -> str:
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


def _tool_choice(asked: ChatRequest) -> str | None:
    """ "auto", "required" or a function's name; None where no tool may be called."""
    choice = asked.tool_choice
    named = isinstance(choice, dict)
    if isinstance(choice, dict):
        choice = _named_choice(choice)
    elif choice not in (None, "none", "auto", "required"):
        raise FieldError("tool_choice", "tool_choice must be none, auto, required or a function")
    if (named or choice == "required") and not asked.tools:
        raise FieldError("tool_choice", "tool_choice: there are no tools to choose from")
    if choice == "none" and not named:
        return None
    return (choice or "auto") if asked.tools else None


def _named_choice(choice: Json) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        shape = '{"type": "function", "function": {"name": "..."}}'
        raise FieldError("tool_choice", f"tool_choice: an object must be {shape}")
    return name
