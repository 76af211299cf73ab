"""Chat templates of model files: which there are, the sandbox they run in, and whether they can.

The sandbox offers what transformers' does: the tags ``generation``, ``break`` and ``continue``,
the functions ``raise_exception`` and ``strftime_now``, and a ``tojson`` that keeps letters. Not
here: the conversation that a template is given (``chat.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemloom.errors import TokenizerError
from gemloom.files.gguf import Metadata

_KEY = "tokenizer.chat_template"
GIVEN = ("messages", "bos_token", "eos_token", "raise_exception", "strftime_now")


class Refusal(TemplateError):
    """A template's own words about a conversation that it does not take."""


class _Generation(Extension):
    """``{% generation %}`` marks what a model says, for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012  (the base class has it as an instance's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def named(metadata: Metadata) -> dict[str, str]:
    """The templates of a file by name: "default", and others such as "tool_use"."""
    found: dict[str, str] = {}
    for key in sorted(key for key in metadata if key == _KEY or key.startswith(f"{_KEY}.")):
        if source := metadata.string(key):
            found.setdefault(key.removeprefix(_KEY).lstrip(".") or "default", source)
    return found


def usual(templates: Mapping[str, str]) -> str | None:
    """Of a file's templates the one for chats without tools; None where there are none."""
    return templates.get("default") or next(iter(templates.values()), None)


def check(source: str, owner: str) -> None:
    """TokenizerError, with the file's name, for a template with which every chat would fail.

    It is given the shortest conversations there are. One that it takes, or refuses in words of
    its own, is enough.
    """
    try:
        compiled = compiled_template(source)
    except TokenizerError as error:
        raise TokenizerError(f"{owner}: {error}") from error
    failures = []
    for messages, variables in _samples():
        try:
            compiled.render(inputs(messages, "<bos>", "<eos>", variables))
        except Refusal:
            return
        except Exception as error:  # an expression can fail in any way
            failures.append(one_line(error))
        else:
            return
    raise TokenizerError(f"{owner}: no chat can be made by its chat template: {failures[0]}")


def _samples() -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Conversations, and the variables that go with them."""
    function = {"name": "f", "description": "a", "parameters": {"type": "object"}}
    for tools in (None, [{"type": "function", "function": function}]):
        for text in ("a", [{"type": "text", "text": "a"}]):
            for turns in (("user",), ("system", "user"), ("user", "assistant", "user")):
                messages = [{"role": role, "content": text} for role in turns]
                yield messages, {"add_generation_prompt": True, "tools": tools}


def inputs(messages: Any, bos: str, eos: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    """All that a template is given."""
    given = {"messages": messages, "bos_token": bos, "eos_token": eos}
    return {"tools": None, "documents": None, **variables, **given}


def one_line(error: Exception) -> str:
    """An error's message without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@lru_cache(maxsize=8)
def compiled_template(source: str) -> Template:
    """A template ready to run. TokenizerError where it is no Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise TokenizerError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
        ) from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON with letters as they are; Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise Refusal(message)
