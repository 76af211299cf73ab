"""Importance matrices in files: llama.cpp's .gguf and older .dat format, read and written.

What is in one: for every matrix of a model, per column, the sum of squares of the activations that
met it. How they are collected is not here, nor what a quantizer does with them.

.dat, little endian, int32 unless said: entries; of each its name (length, bytes), calls, values,
their float32, each the mean square times calls; then chunks and the text's name, in later files.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from gemloom.errors import FormatError
from gemloom.files import gguf, source
from gemloom.files.blob import Blob
from gemloom.files.gguf import GGUF, MAGIC, MAX_ENTRIES, StringArray
from gemloom.files.replacing import replace_file
from gemloom.files.writing import GGUFWriter, Planned

_SUMS, _COUNTS = ".in_sum2", ".counts"
_TYPE, _DATASETS = "general.type", "imatrix.datasets"
_CHUNKS, _CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"
_DIGEST = "gemloom.imatrix.digest"
_F32 = GGMLQuantizationType.F32


@dataclass(frozen=True, slots=True)
class Importance:
    """What is known of one matrix [k, m], or of the n matrices of experts [k, m, n]."""

    sums: NDArray[np.float32]  # [n, k]: squares of the activations of each column, summed
    counts: NDArray[np.int64]  # [n]: rows that were summed

    @property
    def means(self) -> NDArray[np.float32]:
        """Mean squares, float32 [n, k]; 1 throughout for an expert that nothing came to."""
        counts = self.counts[:, None].astype(np.float32)
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), np.float32(1))


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """All of a file. ``entries`` are by tensor: "blk.0.attn_q.weight"."""

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...] = ()  # names of the texts
    chunks: int = 0  # pieces of text that were computed
    chunk_size: int = 0  # tokens of each; 0: not known
    digest: str = ""  # of the tokens computed, as ``imatrix.collect`` makes it; "": not known


def read(path: str | os.PathLike[str]) -> ImportanceMatrix:
    """Read a file of either format. FormatError for anything that is neither, or is damaged."""
    (blob,) = source.resolve(Path(path))
    matrix = _from_gguf(gguf.parse(blob)) if bytes(blob.view(0, 4)) == MAGIC else _from_dat(blob)
    for name, entry in matrix.entries.items():
        if not np.isfinite(entry.sums).all() or entry.sums.min() < 0 or entry.counts.min() < 0:
            raise FormatError(f"{path}: {name}: holds a value that is negative or not finite")
    return matrix


def write(path: str | os.PathLike[str], matrix: ImportanceMatrix) -> None:
    """Write a file whole or not at all: .dat where its name ends so, else .gguf.

    .dat holds means and no counts, so what is read from it cannot be summed on exactly.
    """
    if Path(path).suffix == ".dat":
        replace_file(path, _dat(matrix))
    else:
        _write_gguf(path, matrix)


# -- .gguf -----------------------------------------------------------------------------------


def _from_gguf(file: GGUF) -> ImportanceMatrix:
    if file.metadata.get(_TYPE) != "imatrix":
        raise FormatError(f"{file.name}: no importance matrix: its {_TYPE} is not imatrix")
    datasets = file.metadata.get(_DATASETS)
    return ImportanceMatrix(
        {
            name.removesuffix(_SUMS): _entry(file, name.removesuffix(_SUMS))
            for name in file.tensors
            if name.endswith(_SUMS)
        },
        tuple(datasets) if isinstance(datasets, StringArray) else (),
        file.metadata.integer(_CHUNKS, 0),
        file.metadata.integer(_CHUNK_SIZE, 0),
        file.metadata.string(_DIGEST, ""),
    )


def _entry(file: GGUF, name: str) -> Importance:
    sums, counts = file.tensors[name + _SUMS], file.tensors.get(name + _COUNTS)
    if counts is None or {sums.type, counts.type} != {_F32}:
        raise FormatError(f"{file.name}: {name}: its sums or its counts are not there as F32")
    count = np.frombuffer(counts.data(), np.float32)
    total = np.frombuffer(sums.data(), np.float32)
    if len(total) % len(count) or not (np.abs(count) < 2**62).all():
        raise FormatError(f"{file.name}: {name}: {len(total):,} sums of {len(count):,} counts")
    return Importance(total.reshape(len(count), -1), np.rint(count).astype(np.int64))


def _write_gguf(path: str | os.PathLike[str], matrix: ImportanceMatrix) -> None:
    metadata: dict[str, str | int | list[str]] = {_TYPE: "imatrix"}
    if matrix.datasets:
        metadata[_DATASETS] = list(matrix.datasets)
    metadata |= {_CHUNKS: matrix.chunks, _CHUNK_SIZE: matrix.chunk_size}
    if matrix.digest:
        metadata[_DIGEST] = matrix.digest
    arrays = {}
    for name, entry in sorted(matrix.entries.items()):
        arrays[name + _SUMS] = entry.sums.astype(np.float32)
        arrays[name + _COUNTS] = entry.counts.astype(np.float32)[:, None]
    plan = [Planned(name, _F32, array.shape[::-1]) for name, array in arrays.items()]
    with GGUFWriter(path, metadata, plan) as out:
        for name, array in arrays.items():
            out.write(name, array)


# -- .dat ------------------------------------------------------------------------------------


def _from_dat(blob: Blob) -> ImportanceMatrix:
    reader = _Reader(blob)
    count = reader.integer()
    if not 0 < count <= MAX_ENTRIES:
        raise FormatError(f"{blob.name}: neither a GGUF nor an importance matrix of the .dat form")
    entries = {}
    for _ in range(count):
        name = reader.text()
        calls, values = reader.integer(), reader.integer()
        if calls < 0 or values < 1:
            raise FormatError(
                f"{blob.name}: {name[:80]!r} has {values:,} values of {calls:,} calls"
            )
        data = np.frombuffer(reader.bytes(4 * values), np.float32)
        entries[name] = Importance(data[None], np.array([max(calls, 1)]))
    if reader.left == 0:  # so the first files ended
        return ImportanceMatrix(entries)
    chunks, dataset = reader.integer(), reader.text()
    return ImportanceMatrix(entries, (dataset,) if dataset else (), max(chunks, 0))


class _Reader:
    """A cursor over a .dat file; FormatError where it ends too early."""

    def __init__(self, blob: Blob) -> None:
        self.blob, self.position = blob, 0

    @property
    def left(self) -> int:
        return self.blob.size - self.position

    def bytes(self, length: int) -> memoryview:
        if length < 0 or length > self.left:
            raise FormatError(f"{self.blob.name}: truncated: not a whole importance matrix")
        self.position += length
        return self.blob.view(self.position - length, length)

    def integer(self) -> int:
        return int(struct.unpack("<i", self.bytes(4))[0])

    def text(self) -> str:
        return str(self.bytes(self.integer()), "utf-8", "replace")


def _dat(matrix: ImportanceMatrix) -> bytes:
    parts = [struct.pack("<i", len(matrix.entries))]
    for name, entry in sorted(matrix.entries.items()):
        calls = _calls(entry, matrix.chunk_size)
        values = (entry.means * np.float32(calls)).astype("<f4")
        parts += [_text(name), struct.pack("<ii", calls, values.size), values.tobytes()]
    last = matrix.datasets[-1] if matrix.datasets else ""
    return b"".join([*parts, struct.pack("<i", matrix.chunks), _text(last)])


def _calls(entry: Importance, chunk_size: int) -> int:
    """Chunks that the busiest expert saw, at least 1, as llama.cpp counts them."""
    most = int(entry.counts.max())
    return max(1, -(-most // chunk_size) if chunk_size else most)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<i", len(encoded)) + encoded
