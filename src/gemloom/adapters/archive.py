"""The two files of a PEFT adapter in a .zip or .tar, read in memory and never extracted.

Members are found by their name alone, at the top or in folders; where their paths would
lead on a disk does not matter, but one that climbs out of its folder is not looked at.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Mapping
from lzma import LZMAError
from pathlib import PurePosixPath

from gemloom.errors import AdapterError

# Weights hardly compress; a small archive of a very large member is meant to fill the memory.
_LARGE, _RATIO = 64 << 20, 20
_DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, LZMAError, EOFError, OSError, ValueError,
    NotImplementedError, RuntimeError, OverflowError,
)  # fmt: skip


def is_archive(head: bytes) -> bool:
    """Whether a file that begins so, with 512 bytes at least, is an archive known here."""
    return (
        head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
        or head[257:262] == b"ustar"
    )


def members(name: str, data: bytes, wanted: Collection[str]) -> dict[str, bytes]:
    """Those of the ``wanted`` file names that are in an archive, from one folder of it.

    Raises AdapterError for a damaged archive, for two files of one name, and for members that
    would become much larger than the archive.
    """
    try:
        read = _zip_members if data.startswith(b"PK") else _tar_members
        return read(name, data, wanted)
    except _DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AdapterError(f"{name}: a damaged archive: {reason[:200]}") from None


def _zip_members(name: str, data: bytes, wanted: Collection[str]) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
        chosen = _choose(name, sizes, wanted, len(data))
        return {file: archive.read(path) for file, path in chosen.items()}


def _tar_members(name: str, data: bytes, wanted: Collection[str]) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {info.name: info for info in archive.getmembers() if info.isfile()}
        sizes = {path: info.size for path, info in files.items()}
        chosen = _choose(name, sizes, wanted, len(data))
        return {file: _tar_read(archive, files[path]) for file, path in chosen.items()}


def _tar_read(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    member = archive.extractfile(info)
    assert member is not None  # only regular files were chosen
    return member.read()


def _choose(
    name: str, sizes: Mapping[str, int], wanted: Collection[str], packed: int
) -> dict[str, str]:
    """The path of each wanted file that is there. AdapterError for one too large or ambiguous."""
    chosen: dict[str, str] = {}
    for path, size in sizes.items():
        parts = PurePosixPath(path.replace("\\", "/")).parts
        if not parts or parts[-1] not in wanted or ".." in parts or parts[0] == "/":
            continue
        if parts[-1] in chosen:
            raise AdapterError(f"{name}: {parts[-1]} is there twice; one adapter an archive")
        if size < 0 or size > max(_LARGE, _RATIO * packed):
            raise AdapterError(
                f"{name}: {parts[-1]} would take {size:,} bytes of {packed:,} packed"
            )
        chosen[parts[-1]] = path
    return chosen
