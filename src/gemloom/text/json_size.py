"""How many values a JSON text has, told without parsing it: parsing holds the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gemloom.errors import TooManyValuesError

MAX_VALUES = 300_000  # more than the ids of the longest prompt; a tenth of a second to parse
MAX_DIGITS = 32 * MAX_VALUES  # of all numbers together: one of 4,000 digits takes long
_SLICE = 1 << 18  # bytes; a millisecond of work, then other threads may run
_DIGITS = b"0123456789"


def check_values(data: bytes | bytearray) -> None:
    """TooManyValuesError for JSON with more values or digits than a request can need.

    Keys count as values. Text that is not valid JSON passes, or not: the parser refuses it.
    """
    values = digits = 0
    for outside in _outside_strings(data):
        values += sum(map(outside.count, (b",", b":", b"[", b"{")))
        digits += len(outside) - len(outside.translate(None, _DIGITS))
        if values > MAX_VALUES:
            raise TooManyValuesError(f"the JSON has over {MAX_VALUES:,} values: send less at once")
        if digits > MAX_DIGITS:
            raise TooManyValuesError(f"the numbers of the JSON have over {MAX_DIGITS:,} digits")


def _outside_strings(data: bytes | bytearray) -> Iterator[bytes]:
    """What stands outside of strings, slice by slice."""
    inside, carried = 0, b""
    for start in range(0, len(data), _SLICE):
        part = (carried + data[start : start + _SLICE]).replace(b"\\\\", b"")
        carried = b"\\" if part.endswith(b"\\") else b""  # what it escapes is in the next slice
        part = part.removesuffix(b"\\").replace(b'\\"', b"")
        codes = np.frombuffer(part, np.uint8)
        quotes = codes == ord('"')
        parity = np.cumsum(quotes, dtype=np.uint8) + np.uint8(inside)
        yield codes[(parity & 1) == 0].tobytes()
        inside = int(parity[-1]) & 1 if parity.size else inside
