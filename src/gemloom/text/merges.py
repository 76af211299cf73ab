"""Merges of a vocabulary: half a million pairs of texts, held as numbers of tokens.

As tuples of strings they take a hundred MiB while the tokenizer is built.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import overload

from gemloom.errors import TokenizerError


class Merges(Sequence[tuple[str, str]]):
    """Pairs of texts that become one token, those that go first at the front."""

    def __init__(self, texts: Sequence[str], numbers: array[int]) -> None:
        """``numbers`` are places in ``texts``: left, right, left, right ..."""
        self._texts, self._numbers = texts, numbers

    def __len__(self) -> int:
        return len(self._numbers) // 2

    def __iter__(self) -> Iterator[tuple[str, str]]:
        each = map(self._texts.__getitem__, self._numbers)
        return zip(each, each, strict=True)

    @overload
    def __getitem__(self, index: int) -> tuple[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, str]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, str] | list[tuple[str, str]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = 2 * range(len(self))[index]
        return self._texts[self._numbers[first]], self._texts[self._numbers[first + 1]]


def written(name: str, lines: Iterable[bytes], ids: Mapping[str, int]) -> Merges:
    """The merges of a file, "left right" each. TokenizerError where a half is no token."""
    numbers, texts = array("I"), list(ids)
    for line in lines:
        left, _, right = line.decode().partition(" ")
        try:
            numbers.extend((ids[left], ids[right]))
        except KeyError as error:
            raise TokenizerError(
                f"{name}: the merges do not fit the vocabulary: {error.args[0]!r} is not a token"
            ) from None
    return Merges(texts, numbers)


def by_rank(texts: Iterable[str]) -> Merges:
    """The merges that tokens mean where their order, the best first, is all that ranks them."""
    ranked = {text: rank for rank, text in enumerate(dict.fromkeys(texts))}
    numbers, rank_of = array("I"), ranked.get
    for text in ranked:
        for cut in range(len(text) - 1, 0, -1):
            if (left := rank_of(text[:cut])) is None:
                continue
            if (right := rank_of(text[cut:])) is not None:
                numbers.append(left)
                numbers.append(right)
    return Merges(list(ranked), numbers)
