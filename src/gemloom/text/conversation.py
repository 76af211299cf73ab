"""Messages and options as OpenAI's API has them, made ready for a chat template.

What is not said here is said by the template. Not here: the template itself and what keeps
special tokens out of messages (``chat.py``); tools (``tools.py``); the way back, from the model's
text (``router.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from gemloom.errors import OptionError, RequestError, quoted
from gemloom.text.chat import Message, check
from gemloom.text.json_size import check_values

_TEXT_TYPES = ("input_text", "output_text")
# Whatever a prompt quotes, one of the closing ones stands between that and its end.
_MARKERS = re.compile(r"<\|channel>|<(?:channel|turn|tool_call|tool_response)\|>")
_THINKING = {  # None: as the template has it where nothing is said
    "none": False, "minimal": False, "low": True, "medium": True, "high": True, "xhigh": True,
    "max": True, "auto": None, "default": None,
}  # fmt: skip
_BUDGETS = {"low": 256, "medium": 1024}


def prepare(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """``messages`` as templates read them; the given ones stay as they are.

    Arguments of tool calls become objects, a tool's result gets the name of what was called, a
    thought is there both as ``reasoning`` and as ``reasoning_content``, missing content of an
    assistant or a tool is empty text, and parts ``input_text`` and ``output_text`` are ``text``.

    Raises RequestError with the index for calls that are malformed, a result that answers no
    call, and all that ``chat.check`` refuses.
    """
    ready: Sequence[Any] = messages
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        ready = [_prepared(index, message) for index, message in enumerate(messages)]
    check(ready)
    return _named(ready)


def variables(
    *,
    reasoning_effort: str | None = None,
    enable_thinking: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The template's variables. Only what was asked for is in it: a template has its own defaults.

    ``enable_thinking`` counts before one in ``chat_template_kwargs``, and that before
    ``reasoning_effort``. Raises OptionError for an unknown effort and for what cannot be set.
    """
    given = {} if chat_template_kwargs is None else chat_template_kwargs
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise OptionError("chat_template_kwargs must be an object")
    if "tools" in given:
        raise OptionError("chat_template_kwargs cannot set tools: give them as tools")
    chosen: dict[str, Any] = {}
    thinking = None if reasoning_effort is None else _THINKING[_effort(reasoning_effort)]
    if thinking is not None:
        chosen["enable_thinking"] = thinking
    chosen |= given
    if enable_thinking is not None:
        chosen["enable_thinking"] = enable_thinking
    if not isinstance(chosen.get("enable_thinking", False), bool):
        raise OptionError(
            f"enable_thinking is {quoted(chosen['enable_thinking'])}: take true or false"
        )
    return chosen


def reasoning_budget(effort: str | None) -> int | None:
    """How many tokens a thought may take; None for no bound, or where thinking is off anyway.

    Raises OptionError for an unknown effort.
    """
    return None if effort is None else _BUDGETS.get(_effort(effort))


@dataclass(frozen=True, slots=True)
class Thought:
    """Whether an answer may begin with a thought, and whether its prompt has begun one."""

    allowed: bool = False
    begun: bool = False


def starts_reasoning(prompt_text: str) -> bool:
    """Whether a rendered prompt, special tokens included, ends inside an open thought."""
    markers = _MARKERS.findall(prompt_text)
    return bool(markers) and markers[-1] == "<|channel>"


def _effort(effort: object) -> str:
    if isinstance(effort, str) and effort in _THINKING:
        return effort
    raise OptionError(f"reasoning_effort is {quoted(effort)}: take one of {', '.join(_THINKING)}")


def _prepared(index: int, message: Any) -> Any:
    """What concerns one message alone; a form that ``check`` refuses is left to it."""
    if not isinstance(message, Mapping):
        return message
    ready = {**message}
    if isinstance(ready.get("content"), list):
        ready["content"] = [_part(part) for part in ready["content"]]
    if not ready.get("content") and ready.get("role") in ("assistant", "tool"):
        ready["content"] = _nothing(ready.get("content"))
    thought = _thought(index, ready)
    calls = _calls(index, ready)
    if ready.get("role") != "assistant":
        if calls:
            _refuse(index, "only an assistant's message can have tool_calls")
        return ready
    if thought:
        ready["reasoning"] = ready["reasoning_content"] = thought
    if calls:
        ready["tool_calls"] = calls
    return ready


def _nothing(content: Any) -> Any:
    """Agents keep answers without text as null or no parts; other things are refused later."""
    return "" if content is None or content == [] else content


def _part(part: Any) -> Any:
    if isinstance(part, Mapping) and part.get("type") in _TEXT_TYPES:
        return {"type": "text", "text": part.get("text")}
    return part


def _thought(index: int, ready: dict[str, Any]) -> str:
    """Takes both spellings of the thought out of ``ready``."""
    thoughts = [ready.pop("reasoning_content", None), ready.pop("reasoning", None)]
    for thought in thoughts:
        if thought is not None and not isinstance(thought, str):
            _refuse(index, "reasoning must be a string")
    return thoughts[0] or thoughts[1] or ""


def _calls(index: int, ready: dict[str, Any]) -> list[dict[str, Any]]:
    """Takes the calls out of ``ready``; their arguments are objects."""
    calls = ready.pop("tool_calls", None) or []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        _refuse(index, "tool_calls must be a list")
    return [_call(index, number, call) for number, call in enumerate(calls)]


def _call(index: int, number: int, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        _refuse(index, f"tool_calls[{number}] has no function with a name")
    arguments = _arguments(function.get("arguments"))
    if arguments is None:
        _refuse(index, f"tool_calls[{number}].function.arguments is not a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


def _arguments(given: Any) -> Mapping[str, Any] | None:
    """The object that ``given`` is or says, None for another thing; nothing is no arguments."""
    if given is None or given == "":
        return {}
    if isinstance(given, str):
        try:
            check_values(given.encode())
            given = json.loads(given, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return None
    return given if isinstance(given, Mapping) else None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _named(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every tool's result with the name of what it answers."""
    ready: list[dict[str, Any]] = []
    calls: dict[tuple[bool, object], str] = {}
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            ready.append({**message, "name": _answered(index, message, calls)})
        else:
            calls = _called(message.get("tool_calls", []))
            ready.append(message)
    return ready


def _called(calls: Sequence[Mapping[str, Any]]) -> dict[tuple[bool, object], str]:
    """The names of calls, by (True, id) and by (False, name); the first of two counts."""
    found: dict[tuple[bool, object], str] = {}
    for call in calls:
        name: str = call["function"]["name"]
        found.setdefault((False, name), name)
        if isinstance(call.get("id"), Hashable):
            found.setdefault((True, call.get("id")), name)
    return found


def _answered(index: int, message: Message, calls: Mapping[tuple[bool, object], str]) -> str:
    """The name of the call before that ``message`` answers, by its id or else by its name."""
    wanted = message.get("tool_call_id")
    key = (True, wanted) if wanted is not None else (False, message.get("name"))
    if isinstance(key[1], Hashable) and key in calls:
        return calls[key]
    raise RequestError(
        f"messages[{index}]: the assistant's message before has no call with the id "
        f"{quoted(wanted)}"
    )


def _refuse(index: int, words: str) -> NoReturn:
    raise RequestError(f"messages[{index}]: {words}")
