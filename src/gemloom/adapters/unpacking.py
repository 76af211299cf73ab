"""Buffers as files, and what is packed in them: never more memory than one read asks for."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from typing import Protocol

_FEED = 1 << 16  # packed bytes that are looked at at once
_XZ_MEMORY = 80 << 20  # what the strongest setting in use takes


class Bytes(Protocol):
    """What can be read forward."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes; none at the end."""


class View(io.RawIOBase):
    """A buffer as a file, without a copy of it. ``most`` bytes at most can be read at once."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0
        self.most = data.nbytes

    def seekable(self) -> bool:
        """Always."""
        return True

    def readable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """As for every file."""
        self._at = max(0, offset + (0, self._at, self._data.nbytes)[whence])
        return self._at

    def tell(self) -> int:
        """As for every file."""
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """As for every file. ValueError where that is more than ``most``."""
        end = self._data.nbytes
        if size is not None and size >= 0:
            end = min(end, self._at + size)
        if end - self._at > self.most:
            raise ValueError(f"a list of its files of more than {self.most:,} bytes")
        found = bytes(self._data[self._at : end])
        self._at += len(found)
        return found


class _Gzip:
    """One stream, or several one after the other."""

    def __init__(self, data: View) -> None:
        self._data, self._unpack, self._rest = data, zlib.decompressobj(31), b""

    def read(self, size: int, /) -> bytes:
        while True:
            data = self._rest or self._data.read(_FEED)
            if self._unpack.eof:
                if not data:
                    return b""
                self._unpack = zlib.decompressobj(31)
            found = self._unpack.decompress(data, size)
            self._rest = self._unpack.unconsumed_tail or self._unpack.unused_data
            if found or not data:
                return found


class _Xz:
    """In bounded memory, which the library's own file object does not keep to."""

    def __init__(self, data: View) -> None:
        self._data, self._unpack = data, lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def read(self, size: int, /) -> bytes:
        while not self._unpack.eof:
            wanted = self._unpack.needs_input
            data = self._data.read(_FEED) if wanted else b""
            found = self._unpack.decompress(data, size)
            if found or (wanted and not data):
                return found
        return b""


def unpacked(data: memoryview) -> Bytes:
    """What is in a buffer that gzip, bzip2 or xz packed; of any other the bytes as they are."""
    head, file = bytes(data[:3]), View(data)
    if head.startswith(b"\x1f\x8b"):
        return _Gzip(file)
    if head == b"BZh":
        return bz2.BZ2File(file)
    return _Xz(file) if head == b"\xfd7z" else file
