"""What ``gemloom inspect --diff`` tells: how two files differ, as plain values and as tables."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gemloom.cli.terminal import one_line, table
from gemloom.files.gguf import GGUF, Metadata, StringArray, TensorInfo

if TYPE_CHECKING:
    from rich.table import Table

Facts = dict[str, Any]

_PIECE = 8 << 20
_SHOWN = 60  # characters of a value


def common_bytes(one: GGUF, other: GGUF) -> int:
    """Bytes of the tensors that have to be compared: those of the same type and shape."""
    return sum(one.tensors[name].nbytes for name in _alike(one, other))


def differences(one: GGUF, other: GGUF, progress: Callable[[int], None]) -> Facts:
    """Keys and tensors that only one file has, and those that are not the same in both.

    ``progress`` is told the bytes compared so far, of ``common_bytes``.
    """
    metadata = {
        "removed": sorted(one.metadata.keys() - other.metadata.keys()),
        "added": sorted(other.metadata.keys() - one.metadata.keys()),
        "changed": list(_changed_keys(one.metadata, other.metadata)),
    }
    tensors = {
        "removed": sorted(one.tensors.keys() - other.tensors.keys()),
        "added": sorted(other.tensors.keys() - one.tensors.keys()),
        "changed": list(_changed_tensors(one, other)),
        "bytes": list(_other_bytes(one, other, progress)),
    }
    same = not any([*metadata.values(), *tensors.values()])
    names = {"file": one.name, "other": other.name}
    return {**names, "same": same, "metadata": metadata, "tensors": tensors}


def _changed_keys(one: Metadata, other: Metadata) -> Iterator[Facts]:
    for key in sorted(one.keys() & other.keys()):
        if one.encoded[key] != other.encoded[key]:
            yield {"key": key, "from": _shown(one, key), "to": _shown(other, key)}


def _shown(metadata: Metadata, key: str) -> str:
    value = metadata[key]
    if isinstance(value, np.ndarray | StringArray):
        return f"{len(value):,} values"
    text = one_line(str(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def _changed_tensors(one: GGUF, other: GGUF) -> Iterator[Facts]:
    for name in sorted(one.tensors.keys() & other.tensors.keys()):
        a, b = one.tensors[name], other.tensors[name]
        if not _same_kind(a, b):
            yield {"name": name, "from": _kind(a), "to": _kind(b)}


def _kind(info: TensorInfo) -> str:
    return f"{info.type.name} {' x '.join(map(str, info.shape))}"


def _same_kind(a: TensorInfo, b: TensorInfo) -> bool:
    return (a.type, a.shape) == (b.type, b.shape)


def _alike(one: GGUF, other: GGUF) -> list[str]:
    names = sorted(one.tensors.keys() & other.tensors.keys())
    return [name for name in names if _same_kind(one.tensors[name], other.tensors[name])]


def _other_bytes(one: GGUF, other: GGUF, progress: Callable[[int], None]) -> Iterator[str]:
    done = 0
    for name in _alike(one, other):
        if not _same_bytes(one.tensors[name], other.tensors[name]):
            yield name
        done += one.tensors[name].nbytes
        progress(done)


def _same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    for start in range(0, a.nbytes, _PIECE):
        length = min(_PIECE, a.nbytes - start)
        left, right = (t.blob.view(t.offset + start, length) for t in (a, b))
        if not np.array_equal(np.frombuffer(left, np.uint8), np.frombuffer(right, np.uint8)):
            return False
    return True


# -- for people ------------------------------------------------------------------------------


def tables(facts: Facts) -> Iterator["Table"]:
    """The differences as rich tables; one line where there are none."""
    made = table("", "", "")
    made.show_header = False
    if facts["same"]:
        made.add_row("the same keys and the same tensors, byte for byte")
    for what, noun in (("metadata", "key"), ("tensors", "tensor")):
        for kind in ("removed", "added"):
            for name in facts[what][kind]:
                made.add_row(f"{noun} {kind}", one_line(name))
    for change in facts["metadata"]["changed"]:
        made.add_row("key changed", one_line(change["key"]), _arrow(change))
    for change in facts["tensors"]["changed"]:
        made.add_row("tensor changed", one_line(change["name"]), _arrow(change))
    for name in facts["tensors"]["bytes"]:
        made.add_row("other bytes", one_line(name))
    yield made


def _arrow(change: Facts) -> str:
    return f"{change['from']} -> {change['to']}"
