"""A GGUF file with some of everything, how to write others, and what was read as plain values."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import strategies as st

from gemloom.errors import GemloomError
from gemloom.files import builtin, gguf, source
from gemloom.files.blob import Blob

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_KINDS = (U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64)
_CODES = dict(zip(_KINDS, "BbHhIif?Qqd", strict=True))

Key = tuple[str | bytes, int | tuple[int, int], Any]
Tensor = tuple[str | bytes, tuple[int, ...], int, bytes]


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _scalar(kind: int, value: Any) -> bytes:
    return string(value) if kind == STRING else struct.pack("<" + _CODES[kind], value)


def _value(kind: int | tuple[int, int], value: Any) -> bytes:
    if isinstance(kind, int):
        return struct.pack("<I", kind) + _scalar(kind, value)
    packed = b"".join(_scalar(kind[1], item) for item in value)
    return struct.pack("<IIQ", ARRAY, kind[1], len(value)) + packed


def write(
    keys: Iterable[Key] = (),
    tensors: Iterable[Tensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A GGUF file from (key, type, value) and (name, shape, type, data)."""
    keys, tensors = list(keys), list(tensors)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    head += b"".join(string(key) + _value(kind, value) for key, kind, value in keys)
    data = b""
    for name, shape, kind, raw in tensors:
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += string(name) + sizes + struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % alignment)
    return head + bytes(-len(head) % alignment) + data


def small() -> bytes:
    """Every scalar type, every array type, and three tensors."""
    integers = {U8: 255, I8: -128, U16: 65535, I16: -32768, U32: 2**32 - 1, I32: -(2**31)}
    scalars = integers | {F32: 0.5, BOOL: True, U64: 2**64 - 1, I64: -(2**63), F64: 1e300}
    keys: list[Key] = [(f"scalar.{kind}", kind, value) for kind, value in scalars.items()]
    keys += [(f"array.{kind}", (ARRAY, kind), [value] * 3) for kind, value in scalars.items()]
    keys += [
        ("general.architecture", STRING, "gemma3"),
        ("array.strings", (ARRAY, STRING), ["", "a", "ä▁", "x" * 300]),
        ("array.empty", (ARRAY, STRING), []),
        ("array.no_numbers", (ARRAY, U32), []),
    ]
    tensors: list[Tensor] = [
        ("one", (8,), GGMLQuantizationType.F32, np.arange(8, dtype="<f4").tobytes()),
        ("two", (32, 3), GGMLQuantizationType.Q8_0, bytes(range(102))),
        ("four", (2, 1, 3, 5), GGMLQuantizationType.F16, bytes(range(60))),
    ]
    return write(keys, tensors)


SMALL = small()


def blob(*parts: bytes, name: str = "small.gguf") -> Blob:
    return Blob(name, [memoryview(part) for part in parts])


def plain(file: gguf.GGUF) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything in a file as values that compare."""
    metadata = {
        key: value.raw() if isinstance(value, gguf.StringArray) else np.asarray(value).tolist()
        for key, value in file.metadata.items()
    }
    tensors = {
        name: (info.type, info.shape, bytes(info.data())) for name, info in file.tensors.items()
    }
    return metadata, tensors


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


places = st.lists(st.integers(0, 1 << 20), max_size=12)


def tensor(
    name: str | bytes = "t",
    shape: tuple[int, ...] = (8,),
    kind: int = GGMLQuantizationType.F32,
    raw: bytes = bytes(32),
) -> Tensor:
    return name, shape, kind, raw


def part(number: Any, count: Any, name: str, total: Any = 2, kind: Any = U16) -> Blob:
    keys: list[Key] = [("split.no", kind, number), ("split.count", kind, count)]
    keys += [("split.tensors.count", I32 if isinstance(total, int) else STRING, total)]
    return blob(write(keys, [tensor(name, raw=name.encode() * 32)]), name=f"{name}.gguf")


def content(blobs: list[Blob]) -> bytes:
    """All bytes of one file."""
    (only,) = blobs
    return bytes(only.view(0, only.size))


def refusal(given: object) -> tuple[type[GemloomError], str]:
    with pytest.raises(GemloomError) as caught:
        gguf.read(source.resolve(given))
    message = str(caught.value)
    assert "\n" not in message
    return type(caught.value), message


def lay_parts(folder: Path) -> None:
    """The demo packages as pip would lay them, with a small file for the model."""
    for (module, file), data in zip(builtin._PARTS, cut(SMALL, [99, 500, 1200]), strict=True):
        (folder / module / "data").mkdir(parents=True)
        (folder / module / "__init__.py").touch()
        (folder / module / "data" / file).write_bytes(data)
