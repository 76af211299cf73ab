"""A conversation to the prompt that the model's own chat template makes of it.

The template is Jinja, comes with the model file, and is run in Jinja's sandbox: no attribute
that leads out of it, no change to what it is given, no range over 100,000. Loops inside loops
and long strings are not bounded, so a hostile *model file* can still take time and memory;
a hostile *message* cannot make special tokens (``encode_chat``).

Not here: messages as OpenAI's API has them (``conversation.py``), and the way back, from the
model's text to answers (``router.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from gemloom.errors import ContextError, OptionError, RequestError, quoted
from gemloom.text.markup import QUOTE, THOUGHT, THOUGHT_END, written_key
from gemloom.text.prompts import within
from gemloom.text.template import GIVEN, compiled_template, inputs, one_line
from gemloom.text.tokenizer import Tokenizer

# For a model without a template, a base model: lines that it goes on with.
PLAIN_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == "tool" or message.tool_calls %}
{{- raise_exception("tool calls need a model that has markup for them, as Gemma 4 has") }}
{%- endif %}
{{- {"user": "User", "assistant": "Assistant"}.get(message.role, "System") }}: {{ message.content }}
{% endfor %}Assistant:"""
PLAIN_STOP = "\nUser:"  # where it would go on with what the user says
ROLES = ("system", "developer", "user", "assistant", "tool")
_ENDLESS = 1 << 62  # tokens
_GUARDS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters: no text needs them
# Templates cut earlier thoughts out of an answer by these two, so they must find them whole.
_THOUGHT = (THOUGHT, THOUGHT_END)

Message = Mapping[str, Any]


class _Parts(list[Any]):
    """Content parts that read as their text where a template takes content for a string."""

    def __str__(self) -> str:
        return "".join(part["text"] for part in self)


def render(
    template: str,
    messages: Sequence[Message],
    bos: str,
    eos: str,
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text ``template`` makes of ``messages``; ``bos`` and ``eos`` are tokens as strings.

    A message has a role of ROLES and as content a string or a list of
    ``{"type": "text", "text": ...}``; an assistant message with tool calls may have none.
    ``variables`` go to the template as they are (``tools``, ``enable_thinking``).

    Raises RequestError for a message of another form, and with the template's own words where it
    refuses the conversation; OptionError for a variable that is not the caller's to set;
    TokenizerError for a template that is no valid Jinja.
    """
    check(messages)
    variables["add_generation_prompt"] = add_generation_prompt
    return _run(template, messages, bos, eos, variables)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    context: int = _ENDLESS,
    /,
    **variables: Any,
) -> list[int]:
    """The prompt's ids, with exactly one BOS. As ``render``, by the tokenizer's own template.

    A base model has none and gets PLAIN_TEMPLATE; its answers need PLAIN_STOP. Messages that end
    with an assistant's text (``is_continued``) make a prompt that ends with it, for the model to
    go on.

    Only the template writes special tokens: the string of one in a message or a variable stays
    text. (An answer's thought markers are left for the template to cut the thought out.) Keys in
    tools and calls stand in quotes where the markup needs them.
    Raises RequestError for tools that the template does not tell of, for a last message that the
    template does not show, what ``render`` raises, and ContextError for a conversation that
    ``context`` tokens cannot hold: one with more characters than so many tokens have is not
    rendered.
    """
    tokenizer.needs_text("a chat")
    own = tokenizer.tool_template if variables.get("tools") else tokenizer.chat_template
    template = own or PLAIN_TEMPLATE
    if variables.get("tools") and not _takes_tools(tokenizer):
        raise RequestError("this model knows no tools: they need Gemma 4")
    check(messages)
    continued = is_continued(messages, variables)
    try:
        _check_length(messages, variables, context * tokenizer.longest)
        guard, mark = _noncharacters((messages, variables))
        if continued:
            messages = [*messages[:-1], _marked(messages[-1], mark)]
        messages = [_guard_message(message, tokenizer.openers, guard) for message in messages]
        variables = _guard(variables, tokenizer.openers, guard)
        if QUOTE in template:
            messages, variables = [*map(_quoted_call, messages)], _quoted_tools(variables)
    except RecursionError:
        raise RequestError("the messages are nested too deep to be read") from None
    variables = {"add_generation_prompt": True, **variables}
    if continued:
        variables["add_generation_prompt"] = False
    bos, eos = (tokenizer.token(token).decode() for token in (tokenizer.bos, tokenizer.eos))
    text = _run(template, messages, bos, eos, variables)
    text = _up_to(mark, text) if continued else text
    return tokenizer.with_bos(within(tokenizer.pieces(text, special=True, guard=guard), context))


def _check_length(messages: Sequence[Message], variables: Mapping[str, Any], most: int) -> None:
    length = sum(map(len, _texts((messages, variables))))
    if length > most:
        raise ContextError(
            f"the conversation has {length:,} characters: the context has room for {most:,} at most"
        )


def _texts(value: Any) -> list[str]:
    """Every text in a value, keys among them. RecursionError for one that is nested too deep."""
    found: list[str] = []
    _gather(value, found)
    return found


def _gather(value: Any, found: list[str]) -> None:
    if isinstance(value, str):
        found.append(value)
    elif isinstance(value, Mapping):
        for item in (*value, *value.values()):
            _gather(item, found)
    elif isinstance(value, list | tuple):
        for item in value:
            _gather(item, found)


def is_continued(messages: Sequence[Message], variables: Mapping[str, Any]) -> bool:
    """Whether an answer goes on with the last message: it is an assistant's, without calls.

    A variable ``add_generation_prompt`` that is true asks for a new turn instead.
    """
    last = messages[-1]
    asked = variables.get("add_generation_prompt") is True
    return last.get("role") == "assistant" and not last.get("tool_calls") and not asked


def _marked(message: Message, mark: str) -> Message:
    """``message`` with ``mark`` at the end of its text, which no template trims then."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + mark}
    *before, last = content or [{"type": "text", "text": ""}]
    return {**message, "content": [*before, {**last, "text": last["text"] + mark}]}


def _up_to(mark: str, text: str) -> str:
    at = text.rfind(mark)
    if at < 0:
        raise RequestError(
            "the chat template does not show the assistant's last message, so it cannot be "
            "continued: end with a user's message"
        )
    return text[:at]


def _takes_tools(tokenizer: Tokenizer) -> bool:
    """Whether tools mean something to a model: else a template drops them without a word."""
    template = tokenizer.tool_template
    return template is not None and (
        "tools" in template or tokenizer.id_of("<|tool_call>") is not None
    )


def check(messages: Sequence[Message]) -> None:
    """Raises RequestError, with the index, for a message that ``render`` would not take."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(
            'messages must be a list of one message or more: [{"role": "user", "content": "..."}]'
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{index}] must be an object with a role and content")
        if message.get("role") not in ROLES:
            raise RequestError(
                f"messages[{index}]: the role {quoted(message.get('role'))} is none of "
                f"{', '.join(ROLES)}"
            )
        _check_content(index, message)


def _check_content(index: int, message: Message) -> None:
    content = message.get("content")
    if isinstance(content, str):
        return
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return
    if not isinstance(content, list):
        raise RequestError(f"messages[{index}]: content must be a string or a list of text parts")
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise RequestError(
                f"messages[{index}]: content part {number} is of type {quoted(kind)}: "
                "only 'text' is read"
            )
        if not isinstance(part.get("text"), str):
            raise RequestError(f"messages[{index}]: content part {number} has no text")


def _noncharacters(value: Any) -> tuple[str, str]:
    """Two noncharacters that are nowhere in ``value``."""
    texts = _texts(value)
    free = (char for char in _GUARDS if not any(char in text for text in texts))
    with suppress(StopIteration):
        return next(free), next(free)
    raise RequestError("the messages hold nearly all of U+FDD0 to U+FDEF: take two of them out")


def _guard_message(message: Message, openers: frozenset[str], guard: str) -> Message:
    guarded: dict[str, Any] = {
        key: value if key == "role" else _guard(value, openers, guard)
        for key, value in message.items()
    }
    if message["role"] == "assistant":
        guarded["content"] = _unguard_thought(guarded.get("content"), guard)
    return guarded


def _guard(value: Any, openers: frozenset[str], guard: str) -> Any:
    """``value`` with ``guard`` after every character that could open a special token."""
    if isinstance(value, str):
        for opener in openers:
            value = value.replace(opener, opener + guard)
        return value
    if isinstance(value, Mapping):
        return {
            _guard(key, openers, guard): _guard(item, openers, guard) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_guard(item, openers, guard) for item in value]
    return value


def _quoted_call(message: Message) -> Message:
    """``message`` with the keys of its calls' arguments as a call writes them."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with(call, _quoted_keys) for call in message["tool_calls"]]}


def _quoted_tools(variables: dict[str, Any]) -> dict[str, Any]:
    """``variables`` with the names of tools' properties as a call writes them."""
    if not variables.get("tools"):
        return variables
    return {**variables, "tools": [_with(tool, _quoted_properties) for tool in variables["tools"]]}


def _with(called: Any, change: Callable[[Any], Any]) -> Any:
    """A tool or a call whose schema or arguments are changed."""
    function = called.get("function") if isinstance(called, Mapping) else None
    if not isinstance(function, Mapping):
        return called
    changed = {key: change(function[key]) for key in ("parameters", "arguments") if key in function}
    return {**called, "function": {**function, **changed}}


def _quoted_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {written_key(str(key)): _quoted_keys(item) for key, item in value.items()}
    return [*map(_quoted_keys, value)] if isinstance(value, list) else value


def _quoted_properties(schema: Any) -> Any:
    if isinstance(schema, list):
        return [*map(_quoted_properties, schema)]
    if not isinstance(schema, Mapping):
        return schema
    changed = {key: _quoted_properties(value) for key, value in schema.items()}
    if isinstance(changed.get("properties"), Mapping):
        changed["properties"] = {
            written_key(str(name)): value for name, value in changed["properties"].items()
        }
    return changed


def _unguard_thought(content: Any, guard: str) -> Any:
    if isinstance(content, str):
        for marker in _THOUGHT:
            content = content.replace(marker[0] + guard + marker[1:], marker)
        return content
    if isinstance(content, list):
        return [{**part, "text": _unguard_thought(part["text"], guard)} for part in content]
    return content


def _run(
    template: str, messages: Sequence[Message], bos: str, eos: str, variables: dict[str, Any]
) -> str:
    if taken := sorted(variables.keys() & set(GIVEN)):
        raise OptionError(f"the template variable {taken[0]} cannot be set")
    compiled = compiled_template(template)
    knows_no_tool_role = "tool_responses" in template and "tool_call_id" not in template
    if "developer" not in template:
        messages = [_renamed(m) if m["role"] == "developer" else m for m in messages]
    try:
        if knows_no_tool_role:
            messages = _fold_results(messages)
        readable = [_readable(message) for message in messages]
        return compiled.render(inputs(readable, bos, eos, variables))
    except Exception as error:  # a template can fail in any way that an expression can
        raise RequestError(f"chat template: {one_line(error)}") from error


def _renamed(message: Message) -> Message:
    """OpenAI's newer name for the system's message, for a template that has the older only."""
    return {**message, "role": "system"}


def _fold_results(messages: Sequence[Message]) -> list[Message]:
    """Tool results, and an answer after them, put in the message with the calls.

    Gemma 4's first template knows no role ``tool``: one model turn is one message there.
    """
    folded: list[Message] = []
    for message in messages:
        last = folded[-1] if folded else {}
        if message["role"] == "tool" and last.get("tool_calls"):
            result = {"name": message.get("name") or "unknown", "response": _text(message)}
            responses = [*(last.get("tool_responses") or ()), result]
            folded[-1] = {**last, "tool_responses": responses}
        elif _continues(last, message):
            folded[-1] = {**last, "content": message["content"]}
        else:
            folded.append(message)
    return folded


def _continues(last: Message, message: Message) -> bool:
    answers = message["role"] == "assistant" and not message.get("tool_calls")
    return answers and bool(last.get("tool_responses")) and not last.get("content")


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else str(_Parts(content))


def _readable(message: Message) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": _Parts(content)} if isinstance(content, list) else {**message}
