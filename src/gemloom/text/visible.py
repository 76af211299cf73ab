"""Stop strings that act on the visible text of an answer: never on thoughts, calls and markup.

Visible text is what a splitter gives as Content. A thought or a call between two stretches of it
parts them, so no stop string is found across one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gemloom.text.router import Content, Part, Splitter
from gemloom.text.stopping import StopMatcher


class Visible:
    """A splitter whose parts end before the first stop string in their Content.

    ``matched`` is the stop string that was found, None before.
    """

    def __init__(self, splitter: Splitter, stops: Sequence[str]) -> None:
        self._splitter, self._stops = splitter, StopMatcher(stops)

    @property
    def matched(self) -> str | None:
        """The stop string that was found."""
        return self._stops.matched

    def push(self, text: str) -> list[Part]:
        """The parts that are certain now; Content waits while a stop string could begin in it."""
        return list(self._before_stop(self._splitter.push(text)))

    def flush(self) -> list[Part]:
        """The rest, at the end."""
        parts = list(self._before_stop(self._splitter.flush()))
        return [*parts, *self._held()]

    def _before_stop(self, parts: Iterable[Part]) -> Iterable[Part]:
        for part in parts:
            if self.matched is not None:
                return
            if not isinstance(part, Content):
                yield from self._held()
                yield part
            elif shown := self._stops.push(part.text)[0]:
                yield Content(shown)

    def _held(self) -> list[Part]:
        held = self._stops.flush()
        return [Content(held)] if held else []


class VisibleStops:
    """Tells when an answer has reached a stop string; its text passes as it is, markup included.

    Whoever reads that text takes it apart with a Visible of the same stops.
    """

    def __init__(self, visible: Visible) -> None:
        self._visible = visible

    @property
    def matched(self) -> str | None:
        """The stop string that was found."""
        return self._visible.matched

    def push(self, text: str) -> tuple[str, bool]:
        """The text, and whether a stop string has been found."""
        self._visible.push(text)
        return text, self.matched is not None

    def flush(self) -> str:
        """Nothing is held back, but a stop string can be complete at the end only."""
        self._visible.flush()
        return ""
