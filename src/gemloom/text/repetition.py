"""Whether an answer only repeats itself: the rule that ends it. Nothing here knows of models.

The answer ends when its last tokens are one piece again and again, without a gap, at least
``TIMES`` times and over at least ``limit`` tokens. A piece without a letter (zeros, a ruler, a row
of a table) has to cover ``PATIENCE`` times as many: people do ask for such lists. A piece has at
most ``LONGEST`` tokens. It is looked every ``EVERY`` tokens, so an answer may go on for that long.

No rule can prove that a model would never have gone on: even the likeliest token depends on all
that came before. So the rule waits for more repeats than a text that somebody wants would have.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

TIMES = 32
LONGEST = 256  # tokens
PATIENCE = 4
EVERY = 16  # tokens
_WIDTH = array("i").itemsize
_END = 16  # tokens: where these were before tells which pieces may be repeating


class Repetition:
    """The tokens of one answer so far. ``spell`` gives the text of some; ``limit`` 0: off."""

    def __init__(self, limit: int, spell: Callable[[Sequence[int]], str]) -> None:
        self._limit, self._spell = limit, spell
        self._tokens = array("i")

    def clear(self) -> None:
        """Begin anew: what was said so far does not count."""
        del self._tokens[:]

    def push(self, token: int) -> bool:
        """Take note of a token; True where the answer should end."""
        if not self._limit:
            return False
        self._tokens.append(token)
        count = len(self._tokens)
        return count >= self._limit and count % EVERY == 0 and self._repeats()

    def _repeats(self) -> bool:
        """Whether the rule is met here. Text that does not repeat costs one search of its end."""
        data = self._tokens[-LONGEST - _END :].tobytes()
        end, at = data[-_END * _WIDTH :], len(data) - 1
        while (at := data.rfind(end, 0, at)) >= 0:
            piece, rest = divmod(len(data) - len(end) - at, _WIDTH)
            if self._needed(piece) > len(self._tokens):
                return False  # and so it is for longer pieces
            if not rest and self._covers(piece, self._needed(piece)):
                patience = 1 if self._has_letter(piece) else PATIENCE
                return patience == 1 or self._covers(piece, patience * self._needed(piece))
            at += len(end) - 1
        return False

    def _needed(self, piece: int) -> int:
        return max(TIMES * piece, self._limit)

    def _covers(self, piece: int, count: int) -> bool:
        """Whether each of the last ``count`` tokens is the one ``piece`` before it."""
        last = self._tokens[-count:]
        return len(last) == count and last[piece:] == last[:-piece]

    def _has_letter(self, piece: int) -> bool:
        return any(letter.isalpha() for letter in self._spell(self._tokens[-piece:]))
