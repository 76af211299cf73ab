"""The two files of a PEFT adapter in a .zip or .tar, read in memory and never extracted.

Members are found by their name alone, at the top or in folders; where their paths would
lead on a disk does not matter, but one that climbs out of its folder is not looked at.
Clients send archives, so lists, names and members are bounded before they are read.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from lzma import LZMAError
from pathlib import PurePosixPath

import numpy as np

from gemloom.adapters.limits import CHUNK, MAX_LISTING, room
from gemloom.adapters.tar import Tar
from gemloom.adapters.unpacking import Bytes, View
from gemloom.errors import AdapterError

_DAMAGED = (
    zipfile.BadZipFile, zlib.error, LZMAError, EOFError, OSError, ValueError,
    NotImplementedError, RuntimeError, OverflowError,
)  # fmt: skip
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the library unpacks others without bounds

Members = Iterator[tuple[str, int, Callable[[], Bytes]]]  # path, size, and how to open it


def is_archive(head: bytes) -> bool:
    """Whether a file that begins so, with 512 bytes at least, is an archive known here."""
    return (
        head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
        or head[257:262] == b"ustar"
    )


def members(name: str, data: memoryview, wanted: Collection[str]) -> dict[str, memoryview]:
    """Those of the ``wanted`` file names that are in an archive, from one folder of it.

    Raises AdapterError for a damaged archive, for two files of one name, and for members that
    would become much larger than the archive.
    """
    try:
        listed = _zip_members(data) if bytes(data[:2]) == b"PK" else _tar_members(data)
        return _chosen(name, listed, wanted, data.nbytes)
    except _DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AdapterError(f"{name}: a damaged archive: {reason[:200]}") from None


def _zip_members(data: memoryview) -> Members:
    file = View(data)
    file.most = MAX_LISTING
    with zipfile.ZipFile(file) as archive:
        file.most = data.nbytes
        for info in archive.infolist():
            if not info.is_dir():
                yield info.filename, info.file_size, partial(_zip_member, archive, info)


def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Bytes:
    if info.compress_type not in _METHODS:
        raise ValueError(f"{info.filename[:80]} is packed by another method than deflate")
    return archive.open(info)


def _tar_members(data: memoryview) -> Members:
    tar = Tar(data, room(data.nbytes))
    for member in tar.members():
        yield member.path, member.size, lambda: tar


def _chosen(
    name: str, listed: Members, wanted: Collection[str], packed: int
) -> dict[str, memoryview]:
    """Each wanted file that is there. AdapterError for those too large or ambiguous."""
    chosen: dict[str, memoryview] = {}
    left = room(packed)
    for path, size, opened in listed:
        parts = PurePosixPath(path.replace("\\", "/")).parts
        if not parts or parts[-1] not in wanted or ".." in parts or parts[0] == "/":
            continue
        if parts[-1] in chosen:
            raise AdapterError(f"{name}: {parts[-1]} is there twice; one adapter an archive")
        left -= size
        if size < 0 or left < 0:
            raise AdapterError(
                f"{name}: {parts[-1]} would take {size:,} bytes of {packed:,} packed; "
                "send it in a .tar that is not compressed"
            )
        chosen[parts[-1]] = _contents(size, opened())
    return chosen


def _contents(size: int, stream: Bytes) -> memoryview:
    """The bytes of a member, piece by piece. EOFError where there are fewer."""
    contents = np.empty(size, np.uint8).data
    done = 0
    while done < size:
        piece = stream.read(min(CHUNK, size - done))
        if not piece:
            raise EOFError("it ends in the middle")
        contents[done : done + len(piece)] = piece
        done += len(piece)
    return contents
