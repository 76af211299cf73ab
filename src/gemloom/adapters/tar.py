"""The files of a tar, read forward once. Not the standard library's reader.

That one keeps an object for each member and reads names and maps of any length into memory. Here a
member is a header of 512 bytes, of which name, size and kind matter, and perhaps a longer name
before it (GNU's "L", POSIX's "x"). Links, devices and sparse files are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gemloom.adapters.limits import CHUNK, MAX_LISTING
from gemloom.adapters.unpacking import unpacked

_BLOCK = 512


class TarError(ValueError):
    """What is wrong with a tar."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file; its bytes are to be read before the next member is asked for."""

    path: str
    size: int


class Tar:
    """A tar, packed or not. Raises TarError, or what a damaged stream raises in its library."""

    def __init__(self, data: memoryview, most: int) -> None:
        """``most`` bytes are unpacked at most."""
        self._stream, self._left = unpacked(data), most
        self._listing = MAX_LISTING
        self._data = 0  # bytes of the current member, padding included, not read yet

    def members(self) -> Iterator[Member]:
        """The regular files in their order."""
        path, size = "", -1  # from a header before the member's own
        while header := self._header():
            kind, length = header[156:157], _number(header[124:136])
            if kind in (b"L", b"x"):
                data = self._extra(length)
                found = (data.split(b"\0")[0], -1) if kind == b"L" else _pax(data)
                path, size = found[0].decode("utf-8", "replace") or path, max(size, found[1])
                continue
            length = size if size >= 0 else length
            self._data = _padded(length)
            if kind in (b"0", b"\0", b"7"):
                yield Member(path or _path(header), length)
            if kind not in (b"g", b"K"):  # which are followed by the member too
                path, size = "", -1
            self._skip()

    def read(self, size: int) -> bytes:
        """The next bytes of the current member."""
        self._data -= size
        return self._take(size)

    def _header(self) -> bytes | None:
        """The next one, None at the end."""
        self._list(_BLOCK)
        header = self._take(_BLOCK)
        if not header.strip(b"\0"):
            return None
        blank = header[:148] + b" " * 8 + header[156:]
        if _number(header[148:156]) != sum(blank):
            raise TarError("a header whose checksum is wrong")
        return header

    def _extra(self, length: int) -> bytes:
        self._list(length)
        self._data = _padded(length)
        data = self.read(length)
        self._skip()
        return data

    def _list(self, size: int) -> None:
        self._listing -= size
        if self._listing < 0:
            raise TarError(f"names and headers of more than {MAX_LISTING:,} bytes")

    def _skip(self) -> None:
        while self._data:
            self.read(min(self._data, CHUNK))

    def _take(self, size: int) -> bytes:
        """So many bytes, at most a chunk or what lists members."""
        self._left -= size
        if self._left < 0:
            raise TarError("it would become much larger than it is; pack just the adapter's files")
        found = bytearray()
        while len(found) < size:
            piece = self._stream.read(size - len(found))
            if not piece:
                raise EOFError("it ends in the middle")
            found += piece
        return bytes(found)


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def _number(field: bytes) -> int:
    """Octal digits, or from 0x80 on a number in base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise TarError("a header with a number that is none")
    return int(digits or b"0", 8)


def _path(header: bytes) -> str:
    name, prefix = (part.split(b"\0")[0] for part in (header[:100], header[345:500]))
    posix = header[257:263] == b"ustar\0" and prefix
    return (prefix + b"/" + name if posix else name).decode("utf-8", "replace")


def _pax(data: bytes) -> tuple[bytes, int]:
    """Path and size of records "LENGTH KEY=VALUE\\n"; empty and -1 where they are not there."""
    path, size, at = b"", -1, 0
    while at < len(data):
        space = data.find(b" ", at, at + 8)
        digits = data[at:space] if space > at else b""
        if not digits.isdigit() or not space - at < int(digits) <= len(data) - at:
            raise TarError("a header with a record that is none")
        key, _, value = data[space + 1 : at + int(digits) - 1].partition(b"=")
        at += int(digits)
        if key == b"path":
            path = value
        elif key == b"size" and value.isdigit() and len(value) < 20:
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise TarError("a sparse file")
    return path, size
