"""Stop strings in text that arrives in pieces. Nothing here knows of tokens or models.

The stop string that is complete first wins; of several that end at the same character, the
longest. So a result depends on the text alone and not on how it was cut into pieces, and no
stop waits for text that might never come.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol


class Stops(Protocol):
    """What finds the stop strings of a request in its text: a StopMatcher, or VisibleStops."""

    @property
    def matched(self) -> str | None:
        """The stop string that was found, None before."""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string has been found."""

    def flush(self) -> str:
        """What is held back, at the end."""


class StopMatcher:
    """Hands text on until a stop string is complete; holds back what could be part of one.

    ``matched`` is the stop string that was found, None before.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched: str | None = None
        self._stops = [_Stop(stop) for stop in sorted(stops, key=len, reverse=True)]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string has been found.

        Everything from a stop string on is dropped, and so is all that is pushed later.
        """
        if self.matched is not None:
            return "", True
        end = self._find(text)
        text = self._held + text
        if self.matched is not None:
            start = len(text) - end - len(self.matched)
            self._held = ""
            return text[:start], True
        start = len(text) - max((stop.length for stop in self._stops), default=0)
        self._held = text[start:]
        return text[:start], False

    def flush(self) -> str:
        """What is still held back, for when a text ends without a stop string.

        What is pushed after it is another text.
        """
        held, self._held = self._held, ""
        for stop in self._stops:
            stop.length = 0
        return held

    def _find(self, text: str) -> int:
        """Sets ``matched`` to the stop string that ends first; how much of ``text`` follows it."""
        for place, char in enumerate(text):
            found = [stop for stop in self._stops if stop.push(char)]
            if found:
                self.matched = found[0].text  # the longest is the first
                return len(text) - place - 1
        return 0


class _Stop:
    """How much of one stop string the text ends with (Knuth, Morris and Pratt's way).

    A character costs the same whatever came before it, on average.
    """

    def __init__(self, text: str) -> None:
        self.text, self.length = text, 0
        self._shorter = _borders(text)

    def push(self, char: str) -> bool:
        """Whether the stop string is complete with this character."""
        length = self.length
        while length and self.text[length] != char:
            length = self._shorter[length - 1]
        self.length = length + (self.text[length] == char)
        return self.length == len(self.text)


@lru_cache(maxsize=256)  # the answers to one request have the same stops
def _borders(text: str) -> tuple[int, ...]:
    """For each start of ``text``: the length of its longest end that ``text`` begins with."""
    borders, length = [0], 0
    for char in text[1:]:
        while length and text[length] != char:
            length = borders[length - 1]
        length += text[length] == char
        borders.append(length)
    return tuple(borders)
