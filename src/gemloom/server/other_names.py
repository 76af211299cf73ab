"""Fields that other servers have under another name, and what they are called here.

Each name is given with what its value says in our own fields; ValueError where it says nothing
that can be read. A dotted name is a field inside an object (``OBJECTS``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic_core import from_json

from gemloom.server.fields import Json

Meaning = Callable[[Any], Json]
Names = Mapping[str, Meaning]

OBJECTS = ("structured_outputs", "reasoning", "thinking")  # opened where they are no field


def _is(name: str) -> Meaning:
    """The field of this name, with the same value."""
    return lambda value: {name: value}


def _choice(value: Any) -> Json:
    """A grammar that says one of several texts."""
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("must be a list of strings")
    texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
    return {"grammar": f"start: {texts}"}


def _schema(value: Any) -> Any:
    """A schema as an object, which may have been sent as text."""
    return from_json(value, allow_inf_nan=False) if isinstance(value, str) else value


def _schema_format(value: Any) -> Json:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"schema": _schema(value)}},
    }


def _object_format(value: Any) -> Json:
    return {"response_format": {"type": "json_object"}} if value else {}


def _text_format(value: Any) -> Json:
    """A chat's ``response_format`` as /v1/responses has it: the schema lies beside the type."""
    if isinstance(value, dict) and isinstance(value.get("json_schema"), dict):
        inner = value["json_schema"]
        value = {key: given for key, given in value.items() if key != "json_schema"} | inner
    return {"text": {"format": value}}


def _as_text(meaning: Meaning) -> Meaning:
    """A form of the answer, in the words of /v1/responses."""

    def meant(value: Any) -> Json:
        said = meaning(value)
        return _text_format(said["response_format"]) if said else {}

    return meant


def _think(value: Any) -> Json:
    """Whether to think, or how much."""
    return {"reasoning_effort" if isinstance(value, str) else "enable_thinking": value}


def _thinking_type(value: Any) -> Json:
    known = {"enabled": True, "disabled": False, "adaptive": None, "auto": None}
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"take one of {', '.join(known)}")
    return {"enable_thinking": known[value]}


_SAMPLING: Names = {
    "repeat_penalty": _is("repetition_penalty"),
    "guided_regex": _is("regex"),
    "guided_grammar": _is("grammar"),
    "guided_choice": _choice,
    "structured_outputs.regex": _is("regex"),
    "structured_outputs.grammar": _is("grammar"),
    "structured_outputs.choice": _choice,
}
_FORMS: Names = {
    "json_schema": _schema_format,
    "guided_json": _schema_format,
    "structured_outputs.json": _schema_format,
    "structured_outputs.json_object": _object_format,
}
_LIMIT = ("n_predict", "max_new_tokens")
_SAMPLED: Names = {**_SAMPLING, **_FORMS, **dict.fromkeys(_LIMIT, _is("max_tokens"))}

COMPLETION: Names = {
    **_SAMPLED,
    "max_completion_tokens": _is("max_tokens"),
    "n_probs": lambda value: {"logprobs": value or None},
}
CONVERSATION: Names = {
    "think": _think,
    "thinking": _think,
    "thinking.type": _thinking_type,
    "reasoning.effort": _is("reasoning_effort"),
    "reasoning.enabled": _is("enable_thinking"),
}
CHAT: Names = {
    **_SAMPLED,
    **CONVERSATION,
    "n_probs": lambda value: {"logprobs": True, "top_logprobs": value} if value else {},
    "thinking.budget_tokens": _is("thinking_budget"),
    "reasoning.max_tokens": _is("thinking_budget"),
}
RESPONSES: Names = {
    **_SAMPLING,
    **{name: _as_text(meaning) for name, meaning in _FORMS.items()},
    **dict.fromkeys((*_LIMIT, "max_tokens", "max_completion_tokens"), _is("max_output_tokens")),
    "response_format": _text_format,
    "reasoning_effort": lambda value: {"reasoning": {"effort": value}},
    "n_probs": lambda value: {"top_logprobs": value or None},
    "think": _is("enable_thinking"),
    "thinking.type": _thinking_type,
    "thinking.budget_tokens": _is("thinking_budget"),
}
