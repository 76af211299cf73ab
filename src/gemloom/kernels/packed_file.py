"""Packed weights in a file beside the model, which the next start maps instead of packing again.

    MODEL.gguf.packed    header | packed matrices | trailer

The header is made of the model alone: of what has to be the same for the packed bytes to be right.
Whoever reads it makes it again and compares, so nothing in the file is ever interpreted. The
trailer has checksums. Reading all bytes at each start would cost what is to be saved, so a start
compares the header and samples of every matrix. All bytes are compared where the file's own time is
not the model's, which it gets when it is complete: then somebody has changed or copied it.

The file is written under another name, under a lock, and renamed when it is whole and on the disk.
Nothing is written through a mapping: on a full disk that would kill the process.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import mmap
import os
import shutil
import stat
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np

from gemloom.files.blob import Origin
from gemloom.ggml.device import address
from gemloom.kernels.packing import PackingPlan, Progress, RowBlock

SUFFIX = ".packed"
_MAGIC = b"GemloomPacked\x00\x00\x01"  # the last byte is the version of this file's own form
_START = struct.Struct("<16sQ")  # magic, length of the header
_DIGEST = 32
_PAGE = 4096
_SAMPLE = 512  # bytes, three times for each tensor
_WHY = (  # a line of the header is not as expected
    "was packed by another version",
    "belongs to another state of the model file",
    "holds other tensors than are needed",
    "belongs to a model with other weights",
)

_log = logging.getLogger("gemloom.kernels")


class _Unusable(Exception):
    """Why a file is not used: what comes after its name in a sentence."""


def find(plan: PackingPlan, threads: int) -> memoryview | None:
    """The packed bytes from the file beside the model, mapped; None where that cannot be used.

    Why not is logged in a line, unless there simply is no such file.
    """
    origins = _origins(plan)
    if not origins:
        return None
    path = origins[0].path + SUFFIX
    try:
        with open(path, "rb", buffering=0) as file:
            return _map(file.fileno(), plan, origins, threads)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = f"cannot be used ({getattr(error, 'strerror', None) or error})"
    except _Unusable as error:
        reason = str(error)
    _log.warning("%s %s; packing the weights again", path, reason)
    return None


def is_there(plan: PackingPlan) -> bool:
    """Whether there is such a file, usable or not."""
    origins = _origins(plan)
    return bool(origins) and os.path.exists(origins[0].path + SUFFIX)


def can_keep(plan: PackingPlan) -> bool:
    """Whether there is a file beside which one can be made."""
    return bool(_origins(plan))


def keep(plan: PackingPlan, threads: int, progress: Progress | None) -> memoryview | None:
    """Pack into the file beside the model, and map it; None where it cannot be written.

    Why not is logged in a line; nothing is left behind then.
    """
    origins = _origins(plan)
    if not origins:
        _log.warning("the model is not from a plain file here, so its packed weights are not kept")
        return None
    path = origins[0].path + SUFFIX
    try:
        with _own_part(path, origins[0].path) as (part, fd):
            _write(fd, plan, origins, threads, progress)
            os.replace(part, path)
            return _map(fd, plan, origins, threads)
    except (OSError, ValueError, _Unusable) as error:
        reason = getattr(error, "strerror", None) or str(error)
    _log.warning("%s cannot be written (%s); the weights are packed in memory", path, reason)
    return None


def _origins(plan: PackingPlan) -> list[Origin]:
    """The files that the matrices are in; none if any of them is in no file."""
    blobs = {matrix.info.blob for matrix in plan.matrices}
    found = [blob.origin for blob in blobs if blob.origin]
    return sorted(found, key=lambda origin: origin.path) if len(found) == len(blobs) else []


# -- form ----------------------------------------------------------------------------


def _header(plan: PackingPlan, origins: list[Origin]) -> bytes:
    """What the file begins with: whole pages, the last bytes of which are their checksum."""
    lines = [
        plan.layout(),
        [(origin.size, origin.mtime_ns) for origin in origins],
        [
            (m.info.name, m.info.type.name, m.info.shape, m.info.offset, m.start, m.nbytes)
            for m in plan.matrices
        ],
        _model_sample(plan),
    ]
    text = b"\n".join(json.dumps(line).encode() for line in lines)
    size = _pages(_START.size + len(text) + 1 + _DIGEST)
    body = (_START.pack(_MAGIC, size) + text + b"\n").ljust(size - _DIGEST)
    return body + _digest(body)


def _model_sample(plan: PackingPlan) -> str:
    """Of the model's weights: another model may be as large, and as old if it was unpacked."""
    digest = hashlib.blake2b(digest_size=16)
    for matrix in plan.matrices:
        for at in _sampled(matrix.info.nbytes):
            size = min(_SAMPLE, matrix.info.nbytes)
            digest.update(matrix.info.blob.view(matrix.info.offset + at, size))
    return digest.hexdigest()


def _trailer(plan: PackingPlan, payload: memoryview, sums: list[int]) -> bytes:
    """What the file ends with: a checksum of each piece, one of samples, and one of these."""
    body = np.array(sums, "<u4").tobytes() + _payload_sample(plan, payload)
    return body + _digest(body)


def _payload_sample(plan: PackingPlan, payload: memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for matrix in plan.matrices:
        for at in _sampled(matrix.nbytes):
            digest.update(payload[matrix.start + at :][:_SAMPLE])
    return digest.digest()


def _sampled(size: int) -> tuple[int, int, int]:
    """Where samples of so many bytes begin."""
    last = max(0, size - _SAMPLE)
    return 0, last // 2, last


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


# -- reading -------------------------------------------------------------------------


def _map(fd: int, plan: PackingPlan, origins: list[Origin], threads: int) -> memoryview:
    """The packed bytes of an open file. Raises _Unusable, OSError."""
    status, header = os.fstat(fd), _header(plan, origins)
    _check_header(os.pread(fd, len(header), 0), header)
    end = len(header) + plan.nbytes
    trailer = 4 * len(plan.pieces) + 2 * _DIGEST
    if status.st_size != end + trailer:
        raise _Unusable(f"is {status.st_size:,} bytes long and not {end + trailer:,}")
    whole = memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
    payload, found = whole[len(header) : end], bytes(whole[end:])
    sums, sample = found[: -2 * _DIGEST], found[-2 * _DIGEST : -_DIGEST]
    damaged = _digest(found[:-_DIGEST]) != found[-_DIGEST:]
    if damaged or _payload_sample(plan, payload) != sample:
        raise _Unusable("is damaged")
    if status.st_mtime_ns != origins[0].mtime_ns:
        _check_all(plan, payload, np.frombuffer(sums, "<u4").tolist(), threads)
        with suppress(OSError):  # somebody else's file: then every start checks all of it
            _stamp(fd, origins)
    return payload


def _check_header(found: bytes, expected: bytes) -> None:
    if found == expected:
        return
    if not found.startswith(_MAGIC):
        raise _Unusable("is not a file of packed weights, or of another version")
    size = _START.unpack(found[: _START.size].ljust(_START.size))[1]
    if size == len(found) and _digest(found[:-_DIGEST]) != found[-_DIGEST:]:
        raise _Unusable("is damaged")
    pairs = zip(_lines(found), _lines(expected), _WHY, strict=False)
    raise _Unusable(next((why for its, ours, why in pairs if its != ours), "is damaged"))


def _lines(header: bytes) -> list[bytes]:
    return header[_START.size :].split(b"\n")


def _check_all(plan: PackingPlan, payload: memoryview, sums: list[int], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda p: zlib.crc32(payload[p.start : p.start + p.nbytes]), plan.pieces)
        if list(found) != sums:
            raise _Unusable("is damaged")


# -- writing -------------------------------------------------------------------------


@contextmanager
def _own_part(path: str, model: str) -> Iterator[tuple[str, int]]:
    """An empty file to write, which no other process writes: its name, its descriptor.

    What a process that was killed left under that name is taken over. Where the block does not
    rename the file, it is deleted.
    """
    part = path + ".part"
    allowed = stat.S_IMODE(os.stat(model).st_mode) & 0o666  # nobody may read more than the model
    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, allowed | stat.S_IWUSR)
    try:
        _lock(part, fd)
        os.ftruncate(fd, 0)
        try:
            yield part, fd
        finally:
            if _is_named(part, fd):
                os.unlink(part)
    finally:
        os.close(fd)


def _lock(part: str, fd: int) -> None:
    """OSError where another process is writing the file, or has just renamed it."""
    import fcntl  # not on Windows, where there are no kernels of our own either

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = _is_named(part, fd)
    except BlockingIOError:
        ours = False
    if not ours:
        raise OSError(errno.EBUSY, "another process is writing it")


def _is_named(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _write(
    fd: int, plan: PackingPlan, origins: list[Origin], threads: int, progress: Progress | None
) -> None:
    """Fill the file by all threads, and see it to the disk. OSError where that fails."""
    header = _header(plan, origins)
    if _free(fd) < len(header) + plan.nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    sums: dict[int, int] = {}
    plan.pack_apart(partial(_write_piece, fd, plan, len(header), sums), threads, progress)
    _put(fd, header, 0)
    end = len(header) + plan.nbytes
    os.ftruncate(fd, end)  # zeros after the last matrix
    payload = memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))[len(header) :]
    _put(fd, _trailer(plan, payload, [sums[piece.start] for piece in plan.pieces]), end)
    os.fsync(fd)
    _stamp(fd, origins)


def _free(fd: int) -> int:
    """Bytes that are free on the file's disk."""
    return shutil.disk_usage(fd).free


def _write_piece(
    fd: int, plan: PackingPlan, base: int, sums: dict[int, int], piece: RowBlock
) -> None:
    packed = np.empty(piece.nbytes, np.uint8).data
    rows = piece.rows()
    plan.pack_piece(piece, address(rows), address(packed))
    sums[piece.start] = zlib.crc32(packed)
    _put(fd, packed, base + piece.start)


def _put(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _stamp(fd: int, origins: list[Origin]) -> None:
    """Give the file the model's time: it is complete, and as it was written."""
    os.utime(fd, ns=(origins[0].mtime_ns,) * 2)
