"""The bytes of one file, wherever they lie: one buffer or several in a row.

Not a loader: nothing here opens, maps or fetches anything (``source.py`` does).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from gemloom.errors import FormatError


@dataclass(frozen=True, slots=True)
class Origin:
    """A file on this machine, as it was when it was opened."""

    path: str
    size: int  # bytes
    mtime_ns: int


class Blob:
    """A read-only run of bytes made of one or more buffers, cut anywhere.

    ``name`` says where the bytes come from and opens every error message about them; ``origin`` is
    the one file that they are all of, if they are.
    """

    def __init__(
        self, name: str, parts: Sequence[memoryview], origin: Origin | None = None
    ) -> None:
        self.name, self.origin = name, origin
        self.parts = [part.cast("B").toreadonly() for part in parts]
        self._ends = list(accumulate(part.nbytes for part in self.parts))

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._ends[-1] if self._ends else 0

    def view(self, offset: int, length: int) -> memoryview:
        """``length`` bytes from ``offset``: in place where one part holds them all, else a copy.

        Raises FormatError where the file ends before.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                f"{self.name}: truncated: {offset + length:,} bytes needed, {self.size:,} there"
            )
        index = bisect_right(self._ends, offset)
        if length == 0:
            return memoryview(b"")
        if offset + length <= self._ends[index]:
            start = offset - (self._ends[index] - self.parts[index].nbytes)
            return self.parts[index][start : start + length]
        return memoryview(self._join(index, offset, length))

    def locate(self, offset: int, length: int) -> tuple[memoryview, int] | None:
        """The part that holds all these bytes, and where in it they start; None if cut."""
        index = bisect_right(self._ends, offset)
        if length == 0 or offset + length > self.size or offset + length > self._ends[index]:
            return None
        return self.parts[index], offset - (self._ends[index] - self.parts[index].nbytes)

    def _join(self, index: int, offset: int, length: int) -> bytearray:
        joined = bytearray()
        while len(joined) < length:
            part = self.parts[index]
            start = max(0, offset - (self._ends[index] - part.nbytes))
            joined += part[start : start + length - len(joined)]
            index += 1
        return joined
