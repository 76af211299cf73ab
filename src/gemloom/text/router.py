"""The text of a Gemma 4 turn, as it comes, to thoughts, tool calls and the answer.

    thought    <|channel>thought\\n ... \\n<channel|>
    tool call  <|tool_call>call:NAME{key:<|"|>text<|"|>,n:1,more:{...},list:[...]}<tool_call|>

A key may stand in quotes as strings do. All else is the answer. Everything goes character by
character, so what comes out cannot depend on how the text was cut. Nothing here knows of tokens; a
model without this markup needs no Router. Not here: the way in, from a conversation to a prompt
(``chat.py``, ``conversation.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from gemloom.text.markup import (
    CALL,
    CALL_END,
    QUOTE,
    RESULT,
    RESULT_END,
    THOUGHT,
    THOUGHT_END,
)

# The name of the thought and the newlines at its ends are markup too. The longest one counts.
_STRAY = (CALL_END, RESULT, RESULT_END, QUOTE)  # what means nothing outside a call
_ANSWER_MARKERS = (
    THOUGHT, THOUGHT + "thought", THOUGHT + "thought\n", THOUGHT_END, CALL, *_STRAY,
)  # fmt: skip
_THOUGHT_MARKERS = (*_ANSWER_MARKERS, "\n" + THOUGHT_END)
_LONGEST = max(map(len, _THOUGHT_MARKERS))
_MARKERS = re.compile("|".join(map(re.escape, sorted(_ANSWER_MARKERS, key=len, reverse=True))))
_HEAD = re.compile(r"(?:call)?:\s*([\w.-]*)\s*")
# JSON's, with no more digits than any reader takes.
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,999})(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# Early templates write null as None, and models repeat what they were shown.
_WORDS = {"true": "true", "false": "false", "null": "null", "None": "null"}
_MAX_HEAD = 256  # characters of "call:" and a name, which has 128 at most
_MAX_DEPTH = 100  # brackets inside brackets; readers of JSON give up not far above


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of a thought."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One whole call; ``arguments`` is a JSON object as a string."""

    name: str
    arguments: str


Part = Content | Reasoning | ToolCall


class Splitter(Protocol):
    """What takes an answer apart: a Router, or Plain."""

    def push(self, text: str) -> list[Part]:
        """The parts that are certain now."""

    def flush(self) -> list[Part]:
        """The rest, at the end."""


class Plain:
    """Where there is no markup for thoughts and tools, or none is to be read: all is Content."""

    def push(self, text: str) -> list[Part]:
        """The text as it is."""
        return [Content(text)] if text else []

    def flush(self) -> list[Part]:
        """Nothing: nothing is held back."""
        return []


class Formed:
    """An answer that is held to a form, after a thought or in place of calls, where all is text.

    Once text has begun, what looks like markup in it is text too: it is of the form.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._begun = False

    def push(self, text: str) -> list[Part]:
        """The parts that are certain now."""
        parts: list[Part] = []
        for at, char in enumerate(text):
            if self._begun:
                return list(_joined([*parts, Content(text[at:])]))
            parts += self._begin(self._router.push(char))
        return list(_joined(parts))

    def flush(self) -> list[Part]:
        """The rest, at the end."""
        return self._router.flush()

    def _begin(self, parts: list[Part]) -> list[Part]:
        self._begun = any(isinstance(part, Content) for part in parts)
        return [*parts, *self._router.flush()] if self._begun else parts


class Router:
    """Takes a turn's text in any pieces, gives its parts as soon as they are sure.

    ``reasoning``: the prompt ended inside an open thought already.

    Held back is only what could still become a marker, and a tool call until it is whole. Markers
    are never shown: one that opens or closes nothing is dropped. Of a malformed call the words
    stay, as text; a call that never ends is dropped. A call does not close the thought that it
    stands in. ``<|channel>`` opens a thought whatever follows.
    """

    def __init__(self, reasoning: bool = False) -> None:
        self._thinking = reasoning
        self._held = ""  # what could become a marker
        self._call: _Call | None = None
        self._parts: list[Part] = []

    def push(self, text: str) -> list[Part]:
        """The parts that ``text`` completes, often none; neighbours are of different types,
        but for tool calls."""
        for char in text:
            self._read(char)
        return self._take()

    def flush(self) -> list[Part]:
        """Ends the turn: what was held back, but for a call begun. An open thought ends here."""
        self._call = None
        self._release(final=True)
        return self._take()

    def _read(self, char: str) -> None:
        if self._call is None:
            self._held += char
            self._release()
        elif not self._call.push(char):
            self._give_up("".join(self._call.written))
        elif self._call.whole:
            self._parts.append(ToolCall(self._call.name, self._call.arguments))
            self._call = None

    def _give_up(self, written: str) -> None:
        """The call begun is none: shows its words, but for an end that could become a marker."""
        self._call = None
        end = written[-_LONGEST:]
        starts = (at for at in range(len(end)) if self._may_become_marker(end[at:]))
        self._held = end[next(starts, len(end)) :]
        self._show(_MARKERS.sub("", written.removesuffix(self._held)))

    def _release(self, final: bool = False) -> None:
        """Takes markers off the start of what is held and shows what cannot become one."""
        while self._held:
            if not final and self._may_become_marker(self._held):
                return
            marker = max(filter(self._held.startswith, self._markers), key=len, default="")
            if marker:
                self._enter(marker)
            else:
                self._show(self._held[0])
            self._held = self._held[len(marker) or 1 :]

    @property
    def _markers(self) -> tuple[str, ...]:
        return _THOUGHT_MARKERS if self._thinking else _ANSWER_MARKERS

    def _may_become_marker(self, text: str) -> bool:
        return any(marker.startswith(text) and marker != text for marker in self._markers)

    def _enter(self, marker: str) -> None:
        if marker == CALL:
            self._call = _Call()
        elif marker not in _STRAY:
            self._thinking = marker.startswith(THOUGHT)

    def _show(self, text: str) -> None:
        if not text:
            return
        self._parts.append(Reasoning(text) if self._thinking else Content(text))

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return list(_joined(parts))


def _joined(parts: list[Part]) -> Iterable[Part]:
    for kind, run in groupby(parts, key=type):
        if kind is ToolCall:
            yield from run
        else:
            yield kind("".join(part.text for part in run if not isinstance(part, ToolCall)))


class _Call:
    """What follows ``<|tool_call>``, read character by character into JSON.

    A pushdown automaton: ``_brackets`` are the open ones, ``_expected`` is what may come next:
    an "item" (key of an object, value of a list), "item or close", a "colon", a "value",
    "next" (a comma or close) or the "end".
    """

    def __init__(self) -> None:
        self.written: list[str] = []  # every character, for when it turns out to be no call
        self.name = ""
        self.whole = False
        self._json: list[str] = []
        self._brackets: list[str] = []
        self._expected = "value"
        self._token: list[str] = []  # of the name, word, string or marker begun
        self._escaped = False
        self._state: Callable[[str], None] = self._in_head

    @property
    def arguments(self) -> str:
        """The arguments as JSON; an object once the call is whole."""
        return "".join(self._json)

    def push(self, char: str) -> bool:
        """Whether the text is still the start of a call, or a whole one."""
        self.written.append(char)
        try:
            self._state(char)
        except ValueError:
            return False
        return True

    def _in_head(self, char: str) -> None:
        if not self._token and char.isspace():
            return
        text = "".join(self._token)
        head = _HEAD.fullmatch(text)
        if char == "{" and head and head[1]:
            self.name = head[1]
            self._begin(self._in_word)
            self._punctuate(char)
            return
        self._token.append(char)
        text += char
        if len(text) > _MAX_HEAD or not ("call:".startswith(text) or _HEAD.fullmatch(text)):
            raise ValueError(text)

    def _in_word(self, char: str) -> None:
        """Between tokens, and in what stands without quotes: keys, numbers, true, false, null."""
        if char not in '{}[],:"<':
            self._token.append(char)
            return
        if word := "".join(self._token).strip():
            self._put_word(word)
        self._token.clear()
        if char not in '"<':
            self._punctuate(char)
        elif self._expected in ("value", "item", "item or close"):
            self._begin(self._in_json_string if char == '"' else self._in_quote)
            self._token.append(char)
        else:
            raise ValueError(char)

    def _in_quote(self, char: str) -> None:
        self._token.append(char)
        if not QUOTE.startswith("".join(self._token)):
            raise ValueError(char)
        if len(self._token) == len(QUOTE):
            self._begin(self._in_string)

    def _in_string(self, char: str) -> None:
        self._token.append(char)
        if char == ">" and "".join(self._token[-len(QUOTE) :]) == QUOTE:
            self._put("".join(self._token[: -len(QUOTE)]))

    def _in_json_string(self, char: str) -> None:
        self._token.append(char)
        if self._escaped or char == "\\":
            self._escaped = not self._escaped
        elif char == '"':
            text = json.loads("".join(self._token), strict=False)
            text.encode()  # \ud800 alone is no text: ValueError, as every flaw here
            self._put(text)

    def _in_end(self, char: str) -> None:
        if not self._token and char.isspace():
            return
        self._token.append(char)
        text = "".join(self._token)
        if not CALL_END.startswith(text):
            raise ValueError(text)
        self.whole = text == CALL_END

    def _begin(self, state: Callable[[str], None]) -> None:
        self._token.clear()
        self._state = state

    def _put_word(self, word: str) -> None:
        if self._expected.startswith("item") and self._brackets[-1] == "{":
            self._put(word)
        elif word in _WORDS or _NUMBER.fullmatch(word):
            self._put_json(_WORDS.get(word, word))
        else:
            raise ValueError(word)

    def _put(self, text: str) -> None:
        self._put_json(json.dumps(text, ensure_ascii=False))
        self._begin(self._in_word)

    def _put_json(self, scalar: str) -> None:
        if self._expected == "value":
            self._expected = "next"
        elif self._expected.startswith("item"):
            self._expected = "colon" if self._brackets[-1] == "{" else "next"
        else:
            raise ValueError(scalar)
        self._json.append(scalar)

    def _punctuate(self, char: str) -> None:
        expected = self._expected
        inside = self._brackets[-1] if self._brackets else ""
        if char in "{[" and (
            expected == "value" or (expected.startswith("item") and inside == "[")
        ):
            self._open(char)
        elif (
            char in "}]" and expected in ("next", "item or close") and inside + char in ("{}", "[]")
        ):
            self._close()
        elif char + expected in (",next", ":colon"):
            self._expected = "item" if char == "," else "value"
        else:
            raise ValueError(char)
        self._json.append(char)

    def _open(self, char: str) -> None:
        if len(self._brackets) == _MAX_DEPTH:
            raise ValueError(char)
        self._brackets.append(char)
        self._expected = "item or close"

    def _close(self) -> None:
        self._brackets.pop()
        self._expected = "next"
        if not self._brackets:
            self._expected = "end"
            self._begin(self._in_end)
