"""What the tests ask of a chat: the same from Python and over HTTP."""

from typing import Any

HI: list[Any] = [{"role": "user", "content": "hello world"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA, "strict": True}}
    for name in ("look", "listen")
]
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
LISTEN = {"type": "function", "function": {"name": "listen"}}
BEGUN: list[Any] = [*HI, {"role": "assistant", "content": "the world "}]
