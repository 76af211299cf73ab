"""The patterns of rank_pattern and alpha_pattern, matched in time linear in a name's length.

PEFT takes ``re.match(r"(.*\\.)?(PATTERN)$", name)`` and the first pattern that matches. A client
may send patterns that keep Python's ``re`` busy for ever, with the interpreter held. So plain names
are looked up, and of regular expressions those are taken that an automaton without backtracking can
follow: characters, classes, groups, ``|``, ``*``, ``+``, ``?`` and ``{m,n}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_PATTERN = 200  # characters
MAX_REGEXES = 64  # of one field; plain names are not counted
_MAX_STATES = 500
_MAX_WORK = 2_000_000  # states visited for all names of an adapter: a second
_PLAIN = re.compile(r"[\w.-]+")
_TOKEN = re.compile(
    r"\\[dwDW]|\\[^\w\s]|\[\^?(?:\\[dw.-]|\w-\w|[\w.])+\]|\{\d{1,2}(?:,\d{0,2})?\}|\(\?:|.",
    re.DOTALL,
)
_SPECIAL = frozenset("[]{}\\^$")

Test = str | re.Pattern[str] | None  # one character, a class of them, or any


class PatternError(Exception):
    """A pattern that is not supported, or all of them together cost too much."""


@dataclass(frozen=True, slots=True)
class _Times:
    """``part`` from ``low`` to ``high`` times, None for any number."""

    part: _Node
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class _Either:
    parts: list[_Node]


_Node = Test | list["_Node"] | _Either | _Times  # a list: one after the other


class Patterns:
    """Values by pattern. ``of`` gives that of the first which matches a name."""

    def __init__(self, values: Mapping[str, float]) -> None:
        """PatternError, with the pattern as its text, for one that is not supported."""
        self._plain: dict[str, tuple[int, float]] = {}
        self._regexes: list[tuple[int, _Automaton, float]] = []
        self._work = 0
        for place, (text, value) in enumerate(values.items()):
            if _PLAIN.fullmatch(text):
                self._plain[text] = place, value
            elif len(text) > MAX_PATTERN or len(self._regexes) == MAX_REGEXES:
                raise PatternError(text)
            else:
                self._regexes.append((place, _Automaton(text), value))

    def of(self, name: str, default: float) -> float:
        """The value for a module. PatternError where all names so far have cost too much."""
        parts = name.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        first, value = min(
            (self._plain[end] for end in ends if end in self._plain),
            default=(len(self._plain) + len(self._regexes), default),
        )
        for place, automaton, its_value in self._regexes:
            if place > first:
                break
            matches, work = automaton.follow(name)
            self._work += work
            if self._work > _MAX_WORK:
                raise PatternError
            if matches:
                return its_value
        return value


class _Automaton:
    """States with moves: a name is followed through all of them at once."""

    def __init__(self, text: str) -> None:
        self._moves: list[list[tuple[Test, int]]] = [[]]
        self._free: list[list[int]] = [[]]  # moves that need no character
        self._known: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        tokens = _tokens(text)
        anchored = tokens[:1] == ["^"]
        node = _Parser(text, tokens[1:] if anchored else tokens).whole()
        before: _Node = [] if anchored else _Times([_Times(None, 0, None), "."], 0, 1)
        self._text = text
        self._end = self._add([before, node], 0)
        self._start = self._closed({0})

    def follow(self, name: str) -> tuple[bool, int]:
        """Whether it matches the name, or what is behind some dot of it; how many states it took.

        What was found out for one name is not found out again for the next.
        """
        states, work = self._start, len(name)
        for character in name:
            following = self._known.get((states, character))
            if following is None:
                following = self._step(states, character)
                work += len(states) + len(following)
            states = following
        return self._end in states, work

    def _step(self, states: frozenset[int], character: str) -> frozenset[int]:
        to = {
            target
            for state in states
            for test, target in self._moves[state]
            if test is None
            or (test == character if isinstance(test, str) else test.fullmatch(character))
        }
        if len(self._known) > 10_000:
            self._known.clear()
        found = self._known[states, character] = self._closed(to)
        return found

    def _closed(self, states: set[int]) -> frozenset[int]:
        """With all states that are reached without a character."""
        waiting = list(states)
        while waiting:
            for target in self._free[waiting.pop()]:
                if target not in states:
                    states.add(target)
                    waiting.append(target)
        return frozenset(states)

    def _state(self) -> int:
        if len(self._moves) == _MAX_STATES:
            raise PatternError(self._text)
        self._moves.append([])
        self._free.append([])
        return len(self._moves) - 1

    def _add(self, node: _Node, at: int) -> int:
        """Build what leads from ``at`` through ``node``; gives the state behind it."""
        if isinstance(node, list):
            for part in node:
                at = self._add(part, at)
            return at
        if isinstance(node, _Either):
            end = self._state()
            for part in node.parts:
                self._free[self._add(part, at)].append(end)
            return end
        if isinstance(node, _Times):
            return self._add_times(node, at)
        end = self._state()
        self._moves[at].append((node, end))
        return end

    def _add_times(self, node: _Times, at: int) -> int:
        for _ in range(node.low):
            at = self._add(node.part, at)
        if node.high is None:
            loop = self._state()
            self._free[at].append(loop)
            self._free[self._add(node.part, loop)].append(loop)
            return loop
        end = self._state()
        self._free[at].append(end)
        for _ in range(node.high - node.low):
            at = self._add(node.part, at)
            self._free[at].append(end)
        return end


def _tokens(text: str) -> list[str]:
    tokens = _TOKEN.findall(text)
    if tokens[-1:] == ["$"] and "|" not in tokens:  # every pattern ends there
        tokens.pop()
    if tokens[:1] == ["^"] and "|" in tokens:
        raise PatternError(text)
    return tokens


class _Parser:
    """Tokens to nodes."""

    def __init__(self, text: str, tokens: list[str]) -> None:
        self._text, self._left = text, tokens[::-1]

    def whole(self) -> _Node:
        node = self._either()
        if self._left:
            raise PatternError(self._text)
        return node

    def _either(self) -> _Node:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else _Either(parts)

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._left and self._left[-1] not in "|)":
            parts.append(self._repeated(self._single()))
        return parts

    def _take(self, symbol: str) -> bool:
        if self._left[-1:] != [symbol]:
            return False
        self._left.pop()
        return True

    def _single(self) -> _Node:
        symbol = self._left.pop()
        if symbol in ("(", "(?:"):
            node = self._either()
            if not self._take(")"):
                raise PatternError(self._text)
            return node
        if symbol == ".":
            return None
        if len(symbol) > 1 and symbol[-1] in "dwDW]":
            return self._class(symbol)
        if symbol in _SPECIAL or symbol in "*+?" or symbol[0] == "{":
            raise PatternError(self._text)
        return symbol[-1]

    def _class(self, symbol: str) -> Test:
        try:
            return re.compile(symbol)
        except re.error:  # a range from the end to the beginning
            raise PatternError(self._text) from None

    def _repeated(self, node: _Node) -> _Node:
        symbol = self._left[-1] if self._left else ""
        bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(symbol)
        if symbol[:1] == "{" and len(symbol) > 1:
            low, comma, high = symbol[1:-1].partition(",")
            bounds = int(low), (int(high) if high else None) if comma else int(low)
        if bounds is None:
            return node
        self._left.pop()
        if bounds[1] is not None and bounds[1] < bounds[0]:
            raise PatternError(self._text)
        self._take("?")  # as few as possible is the same to whoever asks for a match alone
        return _Times(node, *bounds)
