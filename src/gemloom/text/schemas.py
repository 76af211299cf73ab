"""The forms in which a JSON schema may be given. What it means is told by ``constraint.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from gemloom.errors import RequestError

MAX_TEXT = 64 * 1024  # characters


class HasSchema(Protocol):
    """A class of pydantic's, or another that tells its schema."""

    def model_json_schema(self) -> dict[str, Any]:
        """The schema."""


Schema = Mapping[str, Any] | str | HasSchema


def schema_of(given: Schema) -> Mapping[str, Any]:
    """A schema given as an object, as its JSON or as a class that tells it. RequestError."""
    schema: Any = given
    if not isinstance(given, Mapping | str) and hasattr(given, "model_json_schema"):
        schema = given.model_json_schema()
    elif isinstance(given, str):
        schema = _parsed(given)
    if not isinstance(schema, Mapping):
        raise RequestError(f"the schema must be an object, not {type(schema).__name__}")
    return schema


def _parsed(text: str) -> Any:
    if len(text) > MAX_TEXT:
        raise RequestError(f"the schema has {len(text):,} characters: {MAX_TEXT:,} are the most")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the schema is not valid JSON: {error}") from None
