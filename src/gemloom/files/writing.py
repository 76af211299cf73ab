"""Write a GGUF tensor by tensor in bounded memory, so that it is there whole or not at all.

The bytes go to NAME.partial in the same folder, which is synced, read back as a GGUF and renamed
when all are there. Not a converter: what the tensors hold is other files' business.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from gemloom.errors import ConfigError, FormatError, OutputError, TensorError
from gemloom.files import gguf, source
from gemloom.files.gguf import MAGIC, MAX_DIMS, MAX_KEY, MAX_NAME, StringArray, nbytes

Data = bytes | bytearray | memoryview | np.ndarray
# A memoryview is a value as another file has it: ``Metadata.encoded``.
Value = (
    bool | int | float | str | np.generic | np.ndarray | StringArray | Sequence[Any]
    | memoryview
)  # fmt: skip

_VERSION = 3
_ALIGNMENT = "general.alignment"
_SYNC = 64 << 20  # bytes of a file that may be resumed that are written before they are synced
_NUMBERS = {
    "u1": GGUFValueType.UINT8, "i1": GGUFValueType.INT8, "u2": GGUFValueType.UINT16,
    "i2": GGUFValueType.INT16, "u4": GGUFValueType.UINT32, "i4": GGUFValueType.INT32,
    "f4": GGUFValueType.FLOAT32, "b1": GGUFValueType.BOOL, "u8": GGUFValueType.UINT64,
    "i8": GGUFValueType.INT64, "f8": GGUFValueType.FLOAT64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that is to be written."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]  # ggml order, fastest first

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return nbytes(self.type, self.shape)


class GGUFWriter:
    """A GGUF in the making: ``with GGUFWriter(path, metadata, plan) as out: out.write(...)``.

    Every planned tensor is written once, in the order of the plan. The end of the block makes the
    file: synced, checked, renamed. An exception in it leaves what was at ``path`` as it was.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Value],
        plan: Sequence[Planned],
        *,
        resume: bool = False,
    ) -> None:
        """Nothing is opened before the block is entered.

        With ``resume`` an exception, or a kill, leaves the .partial file; another run with the
        same metadata and plan goes on from it, and ``done`` then names what it need not write.
        Raises ConfigError for metadata and TensorError for a plan that GGUF cannot hold.
        """
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.done: frozenset[str] = frozenset()
        self._plan, self._resume = list(plan), resume
        self._alignment = _alignment(metadata)
        _check_plan(self._plan)
        self._head = _head(metadata, self._plan, self._alignment)
        self._next = 0  # index into the plan
        self._unsynced = 0

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self._place(len(self._plan))

    def __enter__(self) -> Self:
        try:
            self._file = self._open()
        except OSError as error:
            raise self._failed(error) from error
        try:
            self._begin()
        except BaseException:
            self._give_up()
            raise
        return self

    def discard(self) -> None:
        """Take away what an earlier run left. OutputError where another process is at it."""
        if self.partial.exists():
            with self._open():
                self.partial.unlink()

    def write(self, name: str, data: Data | Iterable[Data]) -> None:
        """The bytes of the next planned tensor: at once, or in pieces that follow one another."""
        planned = self._plan[self._next]
        assert name == planned.name, f"{name}: the plan says {planned.name}"
        pieces = [data] if isinstance(data, Data) else data
        written = sum(self._put(piece) for piece in pieces)
        assert written == planned.nbytes, f"{name}: {written:,} bytes, not {planned.nbytes:,}"
        self._put(bytes(-written % self._alignment))
        self._next += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as broken:
            raise self._failed(broken) from broken
        finally:
            self._give_up()

    # -- the file ------------------------------------------------------------------------

    def _open(self) -> IO[bytes]:
        """The .partial file, locked: of two processes that write the same file one is refused."""
        file = os.fdopen(os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(file.fileno()), os.stat(self.partial))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:  # else it was renamed or removed between being opened and being locked
            file.close()
            raise OutputError(f"{self.path}: another process is writing it")
        return file

    def _begin(self) -> None:
        if self.path.is_dir():
            raise OutputError(f"{self.path}: is a folder")
        start = self._resumable() if self._resume else 0
        try:
            self._file.truncate(start)
            self._file.seek(start)
            self._check_room(start)
        except OSError as error:
            raise self._failed(error) from error
        if not start:
            self._put(self._head)

    def _resumable(self) -> int:
        """Bytes of an earlier run that can be kept: whole tensors that surely reached the disk."""
        if self._file.read(len(self._head)) != self._head:
            return 0
        size = os.fstat(self._file.fileno()).st_size - _SYNC
        while self._next < len(self._plan) and self._place(self._next + 1) <= size:
            self._next += 1
        self.done = frozenset(planned.name for planned in self._plan[: self._next])
        return self._place(self._next)

    def _check_room(self, there: int) -> None:
        needed, free = self.nbytes - there, shutil.disk_usage(self.partial.parent).free
        if needed > free:
            raise OutputError(f"{self.path}: needs {needed:,} bytes, the disk has {free:,} free")

    def _place(self, index: int) -> int:
        """Where in the file a tensor of the plan begins; for one past the last, the file's size."""
        return len(self._head) + sum(_padded(t.nbytes, self._alignment) for t in self._plan[:index])

    def _put(self, data: Data) -> int:
        view = np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else memoryview(data)
        try:
            if self._resume and self._unsynced + view.nbytes > _SYNC:
                self._sync()
            self._file.write(view)
            self._unsynced += view.nbytes
        except OSError as error:
            raise self._failed(error) from error
        return view.nbytes

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def _finish(self) -> None:
        missing = [planned.name for planned in self._plan[self._next :]]
        assert not missing, f"{self.path}: not written: {missing}"
        self._sync()
        self._resume = False  # what fails from here on is not worth going on with
        self._check()
        os.replace(self.partial, self.path)
        self._file.close()
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)  # so that the new name outlives a loss of power
        os.close(folder)

    def _check(self) -> None:
        """Whether what lies on the disk is a GGUF of just these tensors."""
        file = gguf.parse(source.resolve(self.partial)[0])
        found = [Planned(t.name, t.type, t.shape) for t in file.tensors.values()]
        size = self.partial.stat().st_size
        if found != self._plan or size != self.nbytes:
            raise FormatError(f"{self.partial}: {size:,} bytes that are not those written")

    def _give_up(self) -> None:
        """Close; take away what is unfinished, if there is any and nobody will go on with it."""
        if self._file.closed:
            return
        if not self._resume:
            self.partial.unlink(missing_ok=True)
        with suppress(OSError):  # the last buffer of a file that is gone, on a full disk
            self._file.close()

    def _failed(self, error: OSError) -> OutputError:
        left = f"{self.partial} is kept to go on from" if self._resume else "nothing is left there"
        return OutputError(f"{self.path}: {error.strerror or error}; {left}")


# -- the header ------------------------------------------------------------------------------


def _alignment(metadata: Mapping[str, Value]) -> int:
    value = metadata.get(_ALIGNMENT, 32)
    if isinstance(value, memoryview):
        value = int.from_bytes(value[4:], "little")
    if not isinstance(value, int) or value < 8 or value & (value - 1):
        raise ConfigError(f"{_ALIGNMENT} must be a power of two from 8 on, is {value!r}")
    return value


def _check_plan(plan: Sequence[Planned]) -> None:
    if len({planned.name for planned in plan}) != len(plan):
        raise TensorError("two tensors of the same name")
    for planned in plan:
        shape, block = planned.shape, GGML_QUANT_SIZES[planned.type][0]
        if not 0 < len(planned.name.encode()) <= MAX_NAME or not planned.name.isprintable():
            raise TensorError(f"{planned.name!r} is not a tensor name that GGUF can hold")
        if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1 or shape[0] % block:
            raise TensorError(
                f"the tensor {planned.name} of shape {list(shape)} cannot be {planned.type.name}"
            )


def _head(metadata: Mapping[str, Value], plan: Sequence[Planned], alignment: int) -> bytes:
    """All that comes before the first tensor's bytes."""
    head = bytearray(struct.pack("<4sIQQ", MAGIC, _VERSION, len(plan), len(metadata)))
    for key, value in metadata.items():
        if not 0 < len(key.encode()) <= MAX_KEY or not key.isprintable():
            raise ConfigError(f"{key[:80]!r} is not a key that GGUF can hold")
        head += _string(key) + encode(key, value)
    offset = 0
    for planned in plan:
        n = len(planned.shape)
        head += _string(planned.name)
        head += struct.pack(f"<I{n}QIQ", n, *planned.shape, planned.type, offset)
        offset += _padded(planned.nbytes, alignment)
    return bytes(head) + bytes(-len(head) % alignment)


def encode(key: str, value: Value) -> bytes:
    """A value as GGUF has it: its type and its bytes.

    A plain int is u32, or the smallest of i32, u64 and i64 that holds it, a float f32; in a list
    ints are i32 or i64. What must be of another type is a numpy scalar or array, or a memoryview
    from ``Metadata.encoded``. ConfigError for anything else, an empty list among it.
    """
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + _string(value)
    if isinstance(value, StringArray):
        return _strings(value.raw())
    if isinstance(value, list | tuple) and value and all(isinstance(x, str) for x in value):
        return _strings(text.encode() for text in value)
    array = _numbers(key, value)
    kind = _NUMBERS.get(array.dtype.str[1:])
    if kind is None or array.ndim > 1:
        raise ConfigError(f"{key}: {type(value).__name__} of this kind cannot be in a GGUF")
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    if not array.ndim:
        return struct.pack("<I", kind) + data
    return struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(array)) + data


def _numbers(key: str, value: Any) -> np.ndarray:
    """The value as an array of the type it gets in the file; of no dimensions for a scalar."""
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" or not array.size:
        raise ConfigError(f"{key}: {type(value).__name__} of this kind cannot be in a GGUF")
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind == "f":
        return _single(key, array)
    if not array.ndim and 0 <= value < 2**32:
        return array.astype(np.uint32)
    small = np.iinfo(np.int32)
    fits = small.min <= array.min() and array.max() <= small.max
    return array.astype(np.int32) if fits else array


def _single(key: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    if np.any(np.isinf(single) & ~np.isinf(array)):
        raise ConfigError(f"{key}: beyond what a GGUF's 32-bit floats can hold")
    return single


def _strings(texts: Iterable[bytes]) -> bytes:
    encoded = list(texts)
    head = struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(encoded))
    return head + b"".join(_lengths_and(encoded))


def _lengths_and(texts: Iterable[bytes]) -> Iterator[bytes]:
    for text in texts:
        yield len(text).to_bytes(8, "little")
        yield text


def _string(text: str) -> bytes:
    encoded = text.encode()
    return len(encoded).to_bytes(8, "little") + encoded


def _padded(size: int, alignment: int) -> int:
    return size + -size % alignment
