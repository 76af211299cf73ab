"""The host's memory: what is free, taking much of it at once, giving it back.

Not a device's own memory: that is asked of the device (``backends.py``).
"""

from __future__ import annotations

import ctypes
import mmap

from gemloom.errors import OutOfMemoryError
from gemloom.system import limits


def check_free(size: int, what: str, free: int | None = None) -> None:
    """OutOfMemoryError where so many bytes are not free; ``what`` they are for is named in it.

    ``free`` is what a device has free; without it the host's memory is meant. There malloc gives
    more than there is, and the kernel ends the process when it is touched.
    """
    limit = ""
    if free is None and (there := limits.memory()):
        free, limit = there.free, f" of {there.limit / 2**20:,.0f} ({there.limiter})"
    if free is not None and size > free:
        needed = f"{size / 2**20:,.0f} MiB needed"
        raise OutOfMemoryError(f"no memory for {what}: {needed}, {free / 2**20:,.0f} free{limit}")


def pages(size: int, what: str) -> memoryview:
    """Memory of its own for much that is filled at once. OutOfMemoryError as ``check_free``.

    Not in huge pages: making those takes longer than clearing small ones, where memory is full
    of cached files (5 s to 1.5 for 1.4 GiB).
    """
    check_free(size, what)
    try:
        return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError as error:
        raise OutOfMemoryError(f"no memory for {what}: {error.strerror}") from error


def trim_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim:
        trim(0)
