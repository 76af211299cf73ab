"""Long text to token ids, one window of it at a time, with the ids that all of it at once gives.

BPE is local: a sequence of tokens is the encoding of its text exactly if each pair of neighbours
is the encoding of theirs. (The first merge across a border would be the first one in the pair,
too.) So two windows may be joined at a border between tokens, if the token after the border is
the same in both: then every pair of neighbours stands in one of them. Special tokens are looked
for from left to right, so a window that begins after a token finds the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gemloom.errors import OptionError

WINDOW = 1 << 15  # characters: a few MB while they are tokenized, some milliseconds of work


def in_windows(
    encode: Callable[[str], list[int]], text: str, raw: Sequence[bytes]
) -> Iterator[list[int]]:
    """The ids of ``text`` in several lists; ``raw`` are the bytes of every token.

    OptionError for a lone surrogate.
    """
    start, size = 0, WINDOW
    ids = encode(_cut(text, start, size))
    while start + size < len(text):
        kept, length = _border(ids, size, raw)
        following = encode(_cut(text, start + length, WINDOW)) if kept else []
        if following and following[0] == ids[kept]:
            yield ids[:kept]
            start, size, ids = start + length, WINDOW, following
        else:  # no border that can be relied on: look further
            size *= 2
            ids = encode(_cut(text, start, size))
    yield ids


def _cut(text: str, start: int, size: int) -> str:
    part = text[start : start + size]
    try:
        part.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"the text has a lone surrogate at character {start + error.start:,}: "
            "decode its bytes with errors='replace'"
        ) from None
    return part


def _border(ids: Sequence[int], size: int, raw: Sequence[bytes]) -> tuple[int, int]:
    """A border between tokens well before the end: tokens and characters before it."""
    kept, tail = len(ids), 0
    while kept and (tail < size // 8 or _inside_character(raw[ids[kept]])):
        kept -= 1
        tail += len(raw[ids[kept]])
    return kept, len(b"".join([raw[token] for token in ids[:kept]]).decode())


def _inside_character(token: bytes) -> bool:
    return 0x80 <= token[0] < 0xC0
