"""What an adapter may ask of whoever reads it: clients upload them, so none of it is trusted."""

from __future__ import annotations

MAX_NAME = 512  # bytes of a name; the longest in use have about 150
MAX_CONFIG = 1 << 20  # bytes of adapter_config.json; those in use have a few thousand
MAX_LISTING = 256 << 10  # bytes that tell what is in an archive
CHUNK = 1 << 20  # bytes that are unpacked at once
_LEAST, _TIMES = 16 << 20, 4
_LEAST_HEADER, _MOST_HEADER = 1 << 20, 8 << 20


def room(size: int) -> int:
    """Bytes that the values of a file of ``size`` bytes may take in memory beside it."""
    return max(_LEAST, _TIMES * size)


def header_room(size: int) -> int:
    """Bytes of a header in a file of ``size`` bytes: it becomes objects twelve times as large."""
    return min(_MOST_HEADER, max(_LEAST_HEADER, size // 4))
