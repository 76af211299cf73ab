"""Which adapters act on which rows, and how much: pure bookkeeping, no tensor.

A request names adapters; once they are found and held for it they are ``Active``. For a step
they become ``Stretch``es: neighbouring rows that one adapter acts on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


class Versioned(Protocol):
    """What is asked of an adapter here; ``version`` is one no other adapter ever has."""

    @property
    def name(self) -> str:
        """What requests call it."""

    @property
    def version(self) -> int:
        """Which of the adapters that have had the name."""


Mark = tuple[int, str, int, float]  # since, name, version, scale
Marks = frozenset[Mark]  # all that acts on a sequence: its cells depend on it


@dataclass(frozen=True, slots=True)
class Active:
    """An adapter at work in one sequence, from position ``since`` on."""

    adapter: Versioned
    scale: float
    since: int = 0

    @property
    def mark(self) -> Mark:
        """What tells it from another in a sequence's cells."""
        return (self.since, self.adapter.name, self.adapter.version, self.scale)

    def moved(self, keep: int, drop: int) -> Active:
        """The same once the ``drop`` positions after the first ``keep`` are gone."""
        since = self.since if self.since <= keep else max(keep, self.since - drop)
        return Active(self.adapter, self.scale, since)


def marks(active: Iterable[Active]) -> Marks:
    """The marks of all of them."""
    return frozenset(each.mark for each in active)


def agreed(a: Marks, b: Marks, length: int) -> int:
    """How many of the first ``length`` positions have the same adapters at work in both."""
    return min([length, *(since for since, *_ in a ^ b)])


@dataclass(frozen=True, slots=True)
class Stretch:
    """The rows ``first`` to ``first + count`` of a step, on which one adapter acts."""

    adapter: Versioned
    first: int
    count: int
    scales: tuple[float, ...] = field(compare=False)  # one a row; a graph serves any


def stretches(parts: Iterable[tuple[np.ndarray, Sequence[Active]]]) -> tuple[Stretch, ...]:
    """Of the rows of a step, in order: each part has ascending positions, and what acts there.

    Parts that lie side by side and have the same adapter share one.
    """
    found: dict[int, list[Stretch]] = {}
    first = 0
    for positions, active in parts:
        for each in active:
            skipped = int(np.searchsorted(positions, each.since))
            if count := len(positions) - skipped:
                stretch = Stretch(each.adapter, first + skipped, count, (each.scale,) * count)
                _append(found.setdefault(each.adapter.version, []), stretch)
        first += len(positions)
    return tuple(stretch for of_one in found.values() for stretch in of_one)


def _append(there: list[Stretch], new: Stretch) -> None:
    last = there[-1] if there else None
    if last and last.first + last.count == new.first:
        joined = last.count + new.count
        there[-1] = Stretch(new.adapter, last.first, joined, last.scales + new.scales)
    else:
        there.append(new)
