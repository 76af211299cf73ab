"""What a request may say next: the interface, and the bounds that are made of other bounds.

Nothing here knows a grammar or a tokenizer. Not here: grammars (``constraint.py``), and how a
token is drawn from what is allowed (``sampling.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemloom.errors import OptionError

Mask = NDArray[np.bool_]


class Constraint(Protocol):
    """What a request allows next, such as the tokens that keep its text valid JSON.

    Used by one thread at a time, in the order below.
    """

    @property
    def finished(self) -> bool:
        """True when nothing more may follow: the request ends with "stop"."""

    def prepare(self) -> None:
        """Begin to compute the next mask elsewhere; returns within a millisecond."""

    def mask(self) -> Mask | None:
        """Bool [n_vocab] of the tokens allowed next, not to be written to; None for all."""

    def accept(self, token: int) -> None:
        """Go on by the token that was picked; GemloomError for one that the mask had barred."""


class ThinkingBudget:
    """Ends thoughts after ``budget`` tokens; lets all else pass. A Constraint.

    ``open`` (None where there is none) and ``close`` are the tokens around a thought; ``started``
    says that the prompt ends inside one. All tokens of thoughts count but these two; when they
    are spent, only ``close`` may follow, at once where another thought begins.
    ``n_vocab`` is the length of the masks. Raises OptionError for a budget below 0.
    """

    finished = False

    def __init__(
        self, close: int, open: int | None, budget: int, started: bool, n_vocab: int
    ) -> None:
        if budget < 0:
            raise OptionError(f"the thinking budget must be 0 or more, is {budget}")
        self._close, self._open, self._left, self._thinking = close, open, budget, started
        self._closing = np.zeros(n_vocab, np.bool_)
        self._closing[close] = True

    def prepare(self) -> None:
        """Nothing: the mask is always at hand."""

    def mask(self) -> Mask | None:
        """Only ``close`` where the budget is spent inside a thought, else all."""
        return self._closing if self._thinking and self._left <= 0 else None

    def accept(self, token: int) -> None:
        """Count the token, if it is of a thought."""
        if not self._thinking:
            self._thinking = token == self._open
        elif token == self._close:
            self._thinking = False
        else:
            self._left -= 1


def both(first: Constraint, second: Constraint) -> Constraint:
    """What ``first`` and ``second`` allow; where that is nothing, what ``first`` allows."""
    return _Both(first, second)


class _Both:
    def __init__(self, first: Constraint, second: Constraint) -> None:
        self._first, self._second = first, second

    @property
    def finished(self) -> bool:
        return self._first.finished or self._second.finished

    def prepare(self) -> None:
        self._first.prepare()
        self._second.prepare()

    def mask(self) -> Mask | None:
        first, second = self._first.mask(), self._second.mask()
        if first is None or second is None:
            return second if first is None else first
        shared = first & second
        return shared if shared.any() else first

    def accept(self, token: int) -> None:
        self._first.accept(token)
        self._second.accept(token)


class AfterThought:
    """``body``, but one thought (``begin``, any tokens of ``inside``, ``end``) may come first."""

    def __init__(self, body: Constraint, begin: int, end: int, inside: Mask, started: bool) -> None:
        self._body, self._begin, self._end, self._inside = body, begin, end, inside
        self._thinking, self._may_begin = started, not started

    @property
    def finished(self) -> bool:
        """Whether the body is at its end."""
        return not self._thinking and self._body.finished

    def prepare(self) -> None:
        """Begin the body's next mask; inside a thought it is at hand."""
        if not self._thinking:
            self._body.prepare()

    def mask(self) -> Mask | None:
        """What the thought or the body allows."""
        if self._thinking:
            return self._inside
        allowed = self._body.mask()
        if self._may_begin and allowed is not None:
            allowed = allowed.copy()
            allowed[self._begin] = True
        return allowed

    def accept(self, token: int) -> None:
        """Begin, go on in or end the thought, else go on in the body."""
        if self._thinking:
            self._thinking = token != self._end
            return
        self._thinking = self._may_begin and token == self._begin
        self._may_begin = False
        if not self._thinking:
            self._body.accept(token)


class CallsInText:
    """Everything, but after ``trigger`` what ``start()`` allows, from that token to its end.

    With ``once`` the answer ends with the first such stretch.
    """

    def __init__(self, start: Callable[[], Constraint], trigger: int, once: bool) -> None:
        self._start, self._trigger, self._once = start, trigger, once
        self._call: Constraint | None = None
        self.finished = False

    def prepare(self) -> None:
        """Begin the next mask, if inside a call."""
        if self._call is not None:
            self._call.prepare()

    def mask(self) -> Mask | None:
        """All tokens outside calls."""
        return None if self._call is None else self._call.mask()

    def accept(self, token: int) -> None:
        """Begin a call, go on in one, or pass over text."""
        if self._call is None and token == self._trigger:
            self._call = self._start()
        if self._call is not None:
            self._call.accept(token)
            if self._call.finished:
                self._call, self.finished = None, self._once


class CallsOrForm:
    """Calls where the first token is ``trigger``, else ``form``."""

    def __init__(self, start: Callable[[], Constraint], trigger: int, form: Constraint) -> None:
        self._start, self._trigger = start, trigger
        self._chosen, self._begun = form, False

    @property
    def finished(self) -> bool:
        """Whether what was chosen is at its end."""
        return self._chosen.finished

    def prepare(self) -> None:
        """Begin the next mask."""
        self._chosen.prepare()

    def mask(self) -> Mask | None:
        """At the start the first tokens of both."""
        allowed = self._chosen.mask()
        if self._begun or allowed is None:
            return allowed
        allowed = allowed.copy()
        allowed[self._trigger] = True
        return allowed

    def accept(self, token: int) -> None:
        """The first token chooses."""
        if not self._begun and token == self._trigger:
            self._chosen = self._start()
        self._begun = True
        self._chosen.accept(token)
