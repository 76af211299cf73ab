"""The tensors in the bytes of a safetensors file, in place.

Not the format's own library: it copies all bytes while nobody else runs, and a client may send a
gibibyte. Layout (little endian): u64 length of the header; the header, a JSON object of name to
dtype, shape and data_offsets; the tensors' bytes, without gaps. Nothing is known of adapters here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import Any

from gemloom.adapters.limits import MAX_NAME, header_room

_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


class DamagedError(ValueError):
    """What is wrong with a file."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor."""

    dtype: str  # as the format calls it
    shape: tuple[int, ...]  # slowest first
    data: memoryview


def tensors(data: memoryview) -> dict[str, StoredTensor]:
    """All tensors by name, in the names' order. DamagedError unless header and bytes agree."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= data.nbytes - 8:
        raise DamagedError("it ends inside its header")
    if length > header_room(data.nbytes):
        raise DamagedError(f"its header of {length:,} bytes is too large")
    body = data[8 + length :]
    found = {
        name: _stored(name, entry, body)
        for name, entry in sorted(_header(bytes(data[8 : 8 + length])).items())
        if name != "__metadata__"
    }
    if sum(tensor.data.nbytes for tensor in found.values()) != body.nbytes:
        raise DamagedError("its tensors are not all of its bytes")
    return found


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_object)
    except DamagedError:
        raise
    except (ValueError, RecursionError):
        raise DamagedError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise DamagedError("its header is not an object")
    return header


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise DamagedError("a name is there twice in its header")
    return made


def _stored(name: str, entry: Any, body: memoryview) -> StoredTensor:
    if len(name) > MAX_NAME or not name.isprintable():
        raise DamagedError(f"the tensor name {name[:80]!r} is too long or unprintable")
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise DamagedError(f"{name[:80]} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise DamagedError(f"{name[:80]} is of the type {str(dtype)[:40]!r}, unknown")
    if not _counts(shape, 8) or not _counts(offsets, 2) or len(offsets) != 2:
        raise DamagedError(f"{name[:80]} has a shape or offsets that are none")
    start, end = offsets
    if not start <= end <= body.nbytes or end - start != prod(shape) * _SIZES[dtype]:
        raise DamagedError(f"{name[:80]} has bytes that do not fit its shape")
    return StoredTensor(dtype, tuple(shape), body[start:end])


def _counts(values: Any, most: int) -> bool:
    """Whether it is a list of at most so many sizes."""
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and 0 <= value < 2**62 for value in values)
    )
