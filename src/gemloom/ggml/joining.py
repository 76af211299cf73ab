"""Parts of a cut file behind one another in memory, where that takes no copy.

Linux maps the pages of a shared mapping once more at another address. That makes one run of
bytes of parts whose cuts lie between pages.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from gemloom.files.blob import Blob, Mapping
from gemloom.ggml.device import address

_MAY_MOVE, _FIXED = 1, 2
_FAILED = ctypes.c_void_p(-1).value


def can_join(blob: Blob, offset: int, length: int) -> bool:
    """Whether ``join`` gives these bytes; it may still fail where the system refuses."""
    return _linux() and _meet(blob.in_memory(offset, length))


def join(blob: Blob, offset: int, length: int) -> tuple[memoryview, int] | None:
    """Memory with these bytes, and where in it they start; None where there is no such way."""
    if not can_join(blob, offset, length):
        return None
    pieces = blob.in_memory(offset, length)
    page, places = mmap.PAGESIZE, [address(piece) for piece in pieces]
    start = places[0] % page
    whole = mmap.mmap(-1, _pages(start + length), mmap.MAP_PRIVATE, mmap.PROT_READ)
    view = memoryview(whole)
    target = address(view)
    for piece, place in zip(pieces, places, strict=True):
        size, first = place % page + piece.nbytes, place - place % page
        if _remap()(first, 0, _pages(size), _MAY_MOVE | _FIXED, target) != target:
            return None
        target += size
    return view, start


def _meet(pieces: Sequence[memoryview]) -> bool:
    """Whether all are of files that we mapped, and each begins where a page of the last ends."""
    ours = bool(pieces) and all(isinstance(piece.obj, Mapping) for piece in pieces)
    places = [(address(piece), address(piece) + piece.nbytes) for piece in pieces]
    return ours and all(
        end % mmap.PAGESIZE == 0 == start % mmap.PAGESIZE
        for (_, end), (start, _) in pairwise(places)
    )


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _linux() -> bool:
    return sys.platform.startswith("linux")


@cache
def _remap() -> Any:
    """The C library's mremap; a length of 0 means that the old pages stay where they are."""
    function = ctypes.CDLL(None).mremap
    sizes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    function.argtypes = (ctypes.c_void_p, *sizes, ctypes.c_void_p)
    function.restype = ctypes.c_void_p
    return function
