"""What clients may send, read into typed values, and what all answers share: pure, no HTTP.

``parse`` reads a body into one of the models below. No field is dropped unseen: what is not a
field of the model is in ``IGNORED``, or at a value of ``REFUSED`` that asks for nothing, or an
error that names it. Not here: the bodies of answers (``answers.py``) and /v1/responses
(``responses.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import from_json

from gemloom.adapters.info import AdapterInfo
from gemloom.errors import GemloomError, RequestError, suggestion
from gemloom.generation import Usage
from gemloom.server.errors import FieldError
from gemloom.text.chat import ROLES

MAX_CHOICES = 16  # of one prompt
MAX_RUNS = 128  # of one request: prompts times choices
MAX_INPUTS = 2_048  # texts of one embeddings request
MAX_TOP_LOGPROBS = 20


_NUMBERS = (
    "temperature", "top_p", "top_k", "min_p",
    "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip


class _FirstWrong(FailFast):
    """Of a long list that is wrong throughout, the first wrong item is enough."""

    __hash__ = object.__hash__  # pydantic's own has none, which a union on Python 3.11 needs


Json = dict[str, Any]
Ids = Annotated[list[int], _FirstWrong()]
Texts = Annotated[list[str], _FirstWrong()]
Objects = Annotated[list[Json], _FirstWrong()]
Prompts = str | Texts | Ids | Annotated[list[Ids], _FirstWrong()]

# Said about the request, nothing asked of it: whoever sends these gets the same answer without.
IGNORED = frozenset(
    {
        "cache_prompt",  # prefixes are always reused
        "include",  # what it could add is always there, or is not ours to make
        "max_tool_calls",  # of tools that run on the server, of which there are none
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",  # nothing ever is
        "user",
    }
)

# Fields that mean something that is not done here: the values that ask for nothing, and a hint.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "only text is made"),
    "background": ((False,), "requests are answered at once"),
    "best_of": ((1,), "use n"),
    "conversation": ((), "nothing is stored: send the whole conversation"),
    "context_management": (([],), "send a shorter conversation"),
    "dimensions": ((), "embeddings have the model's own size"),
    "echo": ((False,), "the prompt is not repeated"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "functions": (([],), "use tools"),
    "modalities": ((["text"],), "only text is made"),
    "moderation": ((), "nothing is moderated"),
    "prediction": ((), "leave it out"),
    "previous_response_id": ((), "nothing is stored: send the earlier items as input"),
    "prompt": ((), "there are no stored prompts"),
    "suffix": (("",), "there is no fill-in-the-middle"),
    "truncation": (("disabled",), "send a shorter conversation"),
    "verbosity": (("medium",), "say it in the prompt"),
    "web_search_options": ((), "there is no web search"),
}


class Strict(BaseModel):
    """No field but its own, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Body(Strict):
    """What every request may have."""

    model: str | None = None


class LoraScale(Strict):
    """An adapter and its scale as llama.cpp's clients say it."""

    id: int
    scale: float


class Adapted(Body):
    """What requests may have that adapters act on: their scales, by name or as llama.cpp has it."""

    adapters: dict[str, float | None] | None = None  # null: the adapter's own scale
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
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Adapted):
    """How to pick tokens; what a value may be, ``SamplingParams`` checks."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | Texts | None = None
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


class Sampled(Sampling):
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

    # The OpenAPI page shows their plainest form.
    messages: Annotated[Objects, WithJsonSchema(_MESSAGES_SHOWN)]
    tools: Objects | None = None
    chat_template_kwargs: Json | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None


class ChatRequest(Conversation, Sampled):
    """POST /v1/chat/completions."""

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
            given["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        elif self.top_logprobs:
            raise FieldError("top_logprobs", "top_logprobs needs logprobs to be true")
        return given


class CompletionRequest(Sampled):
    """POST /v1/completions."""

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


class EmbeddingRequest(Adapted):
    """POST /v1/embeddings."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None

    def inputs(self) -> list[str | Ids]:
        """Each text by itself. FieldError where they are too many, or none."""
        found = one_or_many(self.input)
        if not 1 <= len(found) <= MAX_INPUTS:
            raise FieldError("input", f"input: from 1 to {MAX_INPUTS:,} texts, not {len(found):,}")
        return found


class TokenizeRequest(Body):
    """POST /tokenize."""

    content: str
    add_special: bool = False  # with a BOS before it
    parse_special: bool = True  # strings like <bos> are the tokens
    with_pieces: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Ids


class AdapterRequest(Strict):
    """POST /v1/adapters."""

    name: str
    scale: float | None = None  # None: as it was registered


_SCALES = TypeAdapter(list[LoraScale])
_Model = TypeVar("_Model", bound=Strict)


def parse(kind: type[_Model], data: bytes) -> _Model:
    """The request in a JSON body. RequestError or FieldError in one line for anything else."""
    value = _json(data)
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    try:
        return kind.model_validate(_known(kind.model_fields, value))
    except ValidationError as error:
        raise _field_error(error) from None


def parse_scales(data: bytes) -> list[LoraScale]:
    """The list in the body of POST /lora-adapters. RequestError or FieldError."""
    try:
        return _SCALES.validate_python(_json(data))
    except ValidationError:
        raise FieldError("scale", 'the body must be [{"id": 0, "scale": 1.0}, ...]') from None


def _json(data: bytes) -> Any:
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None


def _known(fields: Iterable[str], value: Json) -> Json:
    """The fields that the model has; FieldError for one that asks for what is not done."""
    names = set(fields)
    for name, given in value.items():
        if name in names or name in IGNORED:
            continue
        if name not in REFUSED:
            hint = suggestion(name, names)
            raise FieldError(name, f"{name[:64]!r} is not a field of this request{hint}")
        neutral, hint = REFUSED[name]
        if given is not None and given not in neutral:
            raise FieldError(name, f"{name} is not supported: {hint}")
    return {name: given for name, given in value.items() if name in names}


def _field_error(error: ValidationError) -> FieldError:
    """One line for the first field that is wrong; a union is wrong in several ways."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    name = str(errors[0]["loc"][0])
    place = "".join(f"[{part}]" for part in errors[0]["loc"][1:2] if isinstance(part, int))
    ways = dict.fromkeys(
        _said(item["loc"], item["msg"]) for item in errors if item["loc"][0] == name
    )
    return FieldError(name, f"{name}{place}: {', or '.join(list(ways)[:4])}")


def _said(loc: Sequence[int | str], message: str) -> str:
    """pydantic's words, with the field they are about if that is inside another."""
    inner = loc[-1] if len(loc) > 1 and isinstance(loc[-1], str) and loc[-1].isidentifier() else ""
    words = message[0].lower() + message[1:]
    return f"{inner}: {words}" if inner and inner not in ("str", "bool") else words


def _token_id(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        raise FieldError("logit_bias", f"logit_bias: {text[:40]!r} is no token id")
    return int(text)


def one_or_many(value: Prompts) -> list[str | Ids]:
    """A list of texts or ids, whether one was given or several."""
    if isinstance(value, str):
        return [value]
    if value and isinstance(value[0], int):
        return [[token for token in value if isinstance(token, int)]]
    return [item for item in value if not isinstance(item, int)]


# -- what answers share --------------------------------------------------------------------------

_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout_error",
                429: "rate_limit_error"}  # fmt: skip


def error_body(error: GemloomError) -> Json:
    """An error as OpenAI's API has it; one of ours that nobody foresaw keeps its details."""
    kind = _ERROR_TYPES.get(
        error.status, "invalid_request_error" if error.status < 500 else "server_error"
    )
    param = getattr(error, "param", None)
    return {"error": {"message": str(error), "type": kind, "param": param, "code": error.code}}


def event_text(event: Json) -> bytes:
    """One server-sent event; those with a type are named by it."""
    name = f"event: {event['type']}\n" if "type" in event else ""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"{name}data: {data}\n\n".encode()


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


def model_body(name: str, created: int, context: int, n_vocab: int, n_embd: int) -> Json:
    """One entry of /v1/models; ``meta`` is an extra, as llama.cpp's server has it."""
    meta = {"n_ctx": context, "n_vocab": n_vocab, "n_embd": n_embd}
    return {"id": name, "object": "model", "created": created, "owned_by": "gemloom", "meta": meta}


def adapter_body(info: AdapterInfo) -> Json:
    """One entry of /v1/adapters."""
    return {
        "name": info.name,
        "object": "adapter",
        "version": info.version,
        "scale": info.scale,
        "rank": info.rank,
        "matrices": info.matrices,
        "norm": info.norm,
        "bytes": info.nbytes,
        "ignored": dict(info.ignored),
        "invocation_tokens": list(info.invocation),
        "running": info.users,
        "requests": info.requests,
    }


def embeddings_body(vectors: Sequence[Any], model: str, prompt_tokens: int) -> Json:
    """``vectors`` are lists of floats, or base64 of little-endian float32."""
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def piece_body(token: int, raw: bytes) -> Mapping[str, Any]:
    """A token as /tokenize tells it with pieces: its text, or its bytes where they are none."""
    try:
        return {"id": token, "piece": raw.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(raw)}
