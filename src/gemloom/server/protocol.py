"""What requests of several dialects have in common, as typed values. Pure, no HTTP.

Not here: the request of each dialect (``dialects/``), how a body becomes one (``parsing.py``), and
names that are no field of it (``fields.py``, ``other_names.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from gemloom.sampling.params import MAX_BIASES
from gemloom.server import fields, other_names
from gemloom.server.errors import FieldError
from gemloom.server.fields import Json, Shape
from gemloom.text import conversation
from gemloom.text.chat import ROLES

MAX_CHOICES = 16  # of one prompt
MAX_TOP_LOGPROBS = 20
MAX_ADAPTERS = 256  # named in one request


_NUMBERS = (
    "temperature", "top_p", "top_k", "min_p",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "repetition_limit",
)  # fmt: skip


class _FirstWrong(FailFast):
    """Of a long list that is wrong throughout, the first wrong item is enough."""

    __hash__ = object.__hash__  # pydantic's own has none, which a union on Python 3.11 needs


Ids = Annotated[list[int], _FirstWrong()]
Texts = Annotated[list[str], _FirstWrong()]
Objects = Annotated[list[Json], _FirstWrong()]
Prompts = str | Texts | Ids | Annotated[list[Ids], _FirstWrong()]


class Strict(BaseModel):
    """No field but its own, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)
    OTHER_NAMES: ClassVar[other_names.Names] = {}  # of its fields, at other servers
    SHAPES: ClassVar[Mapping[str, Shape]] = {}  # of fields that are not read here


def _at_most(most: int, value: Any) -> Any:
    """An object with so many entries at most: each wrong one would be an error of its own."""
    if isinstance(value, dict) and len(value) > most:
        counts = {"given": f"{len(value):,}", "most": f"{most:,}"}
        raise PydanticCustomError("too_many", "it has {given} entries; {most} are the most", counts)
    return value


Biases = Annotated[dict[str, float], BeforeValidator(partial(_at_most, MAX_BIASES))]
Scales = Annotated[dict[str, float | None], BeforeValidator(partial(_at_most, MAX_ADAPTERS))]


class Body(Strict):
    """What every request may have."""

    model: str | None = None


class LoraScale(Strict):
    """An adapter and its scale as llama.cpp's clients say it."""

    id: int
    scale: float


class Adapted(Body):
    """What requests may have that adapters act on: their scales, by name or as llama.cpp has it."""

    adapters: Scales | None = None  # null: the adapter's own scale
    lora: Annotated[list[LoraScale], _FirstWrong()] | None = None


class StreamOptions(Strict):
    """``include_usage`` adds a last event with the usage."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers: never added


class JsonSchema(Strict):
    """A schema as ``response_format`` has it; its ``name`` and ``description`` say nothing here."""

    name: str | None = None
    description: str | None = None
    schema_: Json = Field(alias="schema")
    strict: bool | None = None  # it is always held to


class ResponseFormat(Strict):
    """What the answer must be; a ``schema`` beside any type of JSON is held to, as in llama.cpp."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Json | None = Field(None, alias="schema")

    @property
    def form(self) -> str:
        """The type; FieldError where the fields do not fit it."""
        given = self.json_schema and self.json_schema.schema_
        if given is not None and self.schema_ not in (None, given):
            raise FieldError("response_format", "response_format: schema and json_schema differ")
        if self.type == "text" and self.any_schema is not None:
            raise FieldError("response_format", "response_format: text has no schema")
        if self.type == "json_schema" and self.any_schema is None:
            raise FieldError("response_format", "response_format: json_schema needs a json_schema")
        return self.type if self.any_schema is None else "json_schema"

    @property
    def any_schema(self) -> Json | None:
        """The schema, wherever it is."""
        return self.schema_ if self.json_schema is None else self.json_schema.schema_


def _without_empty(given: Any) -> Any:
    """An empty string stops nothing, alone or in a list."""
    return [text for text in given if text != ""] or None if isinstance(given, list) else given


def _all_tokens(given: Any) -> Any:
    """-1 is 0, all tokens, as vLLM has it."""
    return 0 if given == -1 else given


class Sampling(Adapted):
    """How to pick tokens; what a value may be, ``SamplingParams`` checks."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int | None, BeforeValidator(_all_tokens)] = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    repetition_limit: int | None = None
    logit_bias: Biases | None = None
    seed: int | None = None
    stop: Annotated[str | Texts | None, BeforeValidator(_without_empty)] = None
    regex: str | None = None
    grammar: str | None = None  # Lark, as llguidance reads it
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self) -> Json:
        """The options of ``SamplingParams`` that were given. FieldError for a bad token id."""
        names = [*_NUMBERS, "seed", "stop"]
        given = {name: getattr(self, name) for name in names}
        if self.logit_bias:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        return {name: value for name, value in given.items() if value is not None}


class SampledBody(Sampling):
    """What requests for chats and completions have in common."""

    max_tokens: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    response_format: ResponseFormat | None = None

    @property
    def choices(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> Json:
        """As ``Sampling.sampling``, with the limit."""
        given = super().sampling()
        return given if self.max_tokens is None else given | {"max_tokens": self.max_tokens}


_MESSAGES_SHOWN = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"role": {"enum": list(ROLES)}, "content": {"type": "string"}},
        "required": ["role", "content"],
    },
    "minItems": 1,
}


class Conversation(Body):
    """What makes the prompt of a chat; the messages are read by ``gemloom.text.conversation``."""

    OTHER_NAMES: ClassVar[other_names.Names] = other_names.CONVERSATION
    SHAPES: ClassVar[Mapping[str, Shape]] = {"messages": fields.MESSAGE, "tools": fields.TOOL}

    # The OpenAPI page shows their plainest form.
    messages: Annotated[Objects, WithJsonSchema(_MESSAGES_SHOWN)]
    tools: Objects | None = None
    chat_template_kwargs: Json | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    add_generation_prompt: bool | None = None  # true: a new turn, whoever spoke last
    continue_final_message: bool | None = None

    def turn(self) -> Json:
        """What the template is told of the turn to write; {} where that is left to the messages.

        FieldError where the last message cannot be continued, and for two answers to one question.
        """
        new, goes_on = self.add_generation_prompt, self.continue_final_message
        role = self.messages[-1].get("role") if self.messages else None
        if goes_on and role != "assistant":
            raise FieldError(
                "continue_final_message",
                "continue_final_message: the last message must be the assistant's",
            )
        if goes_on is None:
            return {} if new is None else {"add_generation_prompt": new}
        if new is goes_on:
            raise FieldError(
                "add_generation_prompt",
                f"add_generation_prompt and continue_final_message are both {str(new).lower()}: "
                "send one of them",
            )
        return {"add_generation_prompt": not goes_on}

    def variables(self) -> Json:
        """What the chat template is given besides messages and tools. OptionError."""
        return self.turn() | conversation.variables(
            reasoning_effort=self.reasoning_effort,
            enable_thinking=self.enable_thinking,
            chat_template_kwargs=self.chat_template_kwargs,
        )


class Raw(Strict):
    """What requests have whose text is no chat."""

    parse_special: bool = True  # strings like <bos> are the tokens


class AdapterRequest(Strict):
    """POST /v1/adapters."""

    name: str
    scale: float | None = None  # None: as it was registered


def _token_id(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        raise FieldError("logit_bias", f"logit_bias: {text[:40]!r} is not a token id")
    return int(text)


def one_or_many(value: Prompts) -> list[str | Ids]:
    """A list of texts or ids, whether one was given or several."""
    if isinstance(value, str):
        return [value]
    if value and isinstance(value[0], int):
        return [[token for token in value if isinstance(token, int)]]
    return [item for item in value if not isinstance(item, int)]
