"""The tools of a chat as OpenAI's API has them: what may be declared, and which may be called.

Not here: the grammar of their calls (``tool_grammar.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemloom.errors import OptionError, RequestError, quoted
from gemloom.text.markup import QUOTE

MAX_TOOLS = 1024
MAX_NAME = 128  # MCP's limit; OpenAI's is 64
_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_NAME}}}")
_CHOICES = ("none", "auto", "required")
_NAMED = '{"type": "function", "function": {"name": "..."}}'


def check_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's function tools, as templates read them.

    Raises RequestError, with the index, for one that is no function, has no good name or one
    that is taken, whose parameters are no schema of an object, or whose calls cannot be written;
    and for more than MAX_TOOLS.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise RequestError(f"tools must be a list, not {type(tools).__name__}")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"there are {len(tools):,} tools: at most {MAX_TOOLS:,} are taken")
    ready = [_tool(index, tool) for index, tool in enumerate(tools)]
    names: set[str] = set()
    for index, tool in enumerate(ready):
        name = tool["function"]["name"]
        if name in names:
            raise RequestError(f"tools[{index}]: the name {quoted(name)} is taken by another tool")
        names.add(name)
    return ready


def tool_choice(choice: Any, tools: Sequence[Mapping[str, Any]] | None) -> str | None:
    """OpenAI's ``tool_choice`` as "auto", "required" or a function's name.

    None where no tool may be called. OptionError for another value, and where there are no tools
    to choose from.
    """
    named = _chosen_name(choice) if isinstance(choice, Mapping) else None
    if named is None and choice is not None and choice not in _CHOICES:
        raise OptionError("tool_choice must be none, auto, required or a function")
    if (named is not None or choice == "required") and not tools:
        raise OptionError("tool_choice: there are no tools to choose from")
    if choice == "none" or not tools:
        return None
    return named or choice or "auto"


def _chosen_name(choice: Mapping[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str) or not name:
        raise OptionError(f"tool_choice: an object must be {_NAMED}")
    return name


def _tool(index: int, tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        raise RequestError(f"tools[{index}] is not a tool of type 'function' with a function")
    ready = {key: value for key, value in function.items() if value is not None}
    name = ready.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"tools[{index}]: the name {quoted(name)} is not 1 to {MAX_NAME} of the letters "
            "A-Z a-z 0-9 _ . -"
        )
    ready.setdefault("description", "")
    if not isinstance(ready["description"], str):
        raise RequestError(f"tools[{index}]: the description must be a string")
    if ready.get("parameters") != {}:
        _check_parameters(f"tools[{index}]", ready.get("parameters", {"type": "object"}))
    _check_written(f"tools[{index}] ({name})", ready.get("parameters"))
    return {"type": "function", "function": ready}


def _check_parameters(place: str, parameters: Any) -> None:
    if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
        raise RequestError(f"{place}: the parameters must be a schema of type 'object'")
    if not isinstance(parameters.get("properties", {}), Mapping):
        raise RequestError(f"{place}: the properties of the parameters must be an object")


def _check_written(place: str, parameters: Any) -> None:
    """RequestError for what no call can say: its quotes are a token and cannot be escaped."""
    for text in said(parameters):
        if QUOTE in text:
            raise RequestError(
                f"{place}: {text[:80]!r} cannot stand in a call, as it holds {QUOTE}: rename it"
            )


def said(parameters: Any) -> Iterator[str]:
    """What stands in calls word by word: keys of ``parameters`` at any depth, and constants."""
    waiting = [(parameters, False)]  # a list: a schema can be nested deeper than Python recurses
    seen = set()  # or be in itself
    while waiting:
        value, is_argument = waiting.pop()
        if (id(value), is_argument) in seen:
            continue
        seen.add((id(value), is_argument))
        if isinstance(value, Mapping):
            yield from (key for key in value if isinstance(key, str))
            waiting += [(item, is_argument or key in ("enum", "const"))
                        for key, item in value.items()]  # fmt: skip
        elif isinstance(value, list | tuple):
            waiting += [(item, is_argument) for item in value]
        elif is_argument and isinstance(value, str):
            yield value
