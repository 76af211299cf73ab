"""The host's memory: what is free, taking much of it at once, giving it back.

Not a device's own memory: that is asked of the device (``backends.py``).
"""

from __future__ import annotations

import ctypes
import mmap

from gemloom.errors import OutOfMemoryError


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell.

    malloc gives more than there is, and the kernel ends the process when it is touched.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def check_free(size: int, what: str, free: int | None = None) -> None:
    """OutOfMemoryError where so many bytes are not free; ``what`` they are for is named in it.

    ``free`` is what is, if not the host's memory is meant.
    """
    free = free_memory() if free is None else free
    if free is not None and size > free:
        raise OutOfMemoryError(
            f"no memory for {what}: {size / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} free"
        )


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
