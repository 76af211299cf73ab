"""Stop strings in text that arrives in pieces. Nothing here knows of tokens or models.

The stop string that is complete first wins; of several that end at the same character, the
longest. So a result depends on the text alone and not on how it was cut into pieces, and no
stop waits for text that might never come.
"""

from collections.abc import Sequence


class StopMatcher:
    """Hands text on until a stop string is complete; holds back what could be part of one.

    ``matched`` is the stop string that was found, None before.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched: str | None = None
        self._stops = tuple(sorted(stops, key=len, reverse=True))
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string has been found.

        Everything from a stop string on is dropped, and so is all that is pushed later.
        """
        if self.matched is not None:
            return "", True
        text = self._held + text
        start = self._find(text)
        self._held = "" if self.matched is not None else text[start:]
        return text[:start], self.matched is not None

    def flush(self) -> str:
        """What is still held back, for when generation ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int:
        """Where a stop string starts, or else where one could: the end of what may be shown."""
        found = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, self.matched = min(found, key=lambda match: match[0])  # longest first among equals
            return end - len(self.matched)
        return min((_begins(stop, text) for stop in self._stops), default=len(text))


def _begins(stop: str, text: str) -> int:
    """Start of the longest end of ``text`` that ``stop`` begins with."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return start
        start = text.find(stop[0], start + 1)
    return len(text)
