"""The models that quality.py measures besides quantized files: their base, and rounded copies.

The base: the weights of the built-in Gemma 3 270M, whose original has no package, with noise.
They lie on the grids of the types they were quantized to, so that quantizing them to those again
would cost nothing; the noise, as large as the rounding they had, takes them off.

A rounded copy: the base with some matrices quantized to a type and back. That needs no rows of
whole blocks, since several rows are taken together as one, so every type can be tried.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from math import lcm, prod
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from gemloom.files.gguf import GGUF, TensorInfo, nbytes
from gemloom.files.writing import GGUFWriter, Planned
from gemloom.ggml import quants
from gemloom.tools.quantization.imatrix_file import ImportanceMatrix

PIECE = 1 << 20  # values at a time, about

Rows = Callable[[np.ndarray, int], np.ndarray]  # rows, the number of the first -> rows


def is_matrix(info: TensorInfo) -> bool:
    return len(info.shape) > 1


def make_base(file: GGUF, path: Path, threads: int) -> None:
    """The base, F32."""
    _copy(file, path, threads, lambda info: partial(_noisy, info) if is_matrix(info) else None)


def _noisy(info: TensorInfo, rows: np.ndarray, first: int) -> np.ndarray:
    """Noise as large as the rounding of the tensor's own type; the same for the same rows."""
    if (error := rounding(info.type)) == 0:
        return rows
    seed = np.random.SeedSequence([first, *info.name.encode()])
    noise = np.random.default_rng(seed).standard_normal(rows.shape, np.float32)
    return rows + error * rows.std(axis=1, keepdims=True) * noise


@cache
def rounding(kind: Type) -> float:
    """Root mean square of what a type changes of standard normal values."""
    if kind == Type.F32:
        return 0.0
    values = np.random.default_rng(0).standard_normal((64, 2048), np.float32)
    again = quants.dequantize(quants.quantize(values, kind), kind).reshape(values.shape)
    return float(np.sqrt(np.mean((again - values) ** 2)))


def round_matrices(
    base: GGUF,
    path: Path,
    kind: Type,
    chosen: Callable[[str], bool],
    importances: ImportanceMatrix | None,
    threads: int,
) -> None:
    """The base with the ``chosen`` matrices as ``kind`` has them; F32."""

    def change(info: TensorInfo) -> Rows | None:
        if not is_matrix(info) or not chosen(info.name):
            return None
        entry = importances.entries[info.name].means[0] if importances else None
        return partial(_rounded, kind, entry)

    _copy(base, path, threads, change)


def _rounded(kind: Type, importance: np.ndarray | None, rows: np.ndarray, first: int) -> np.ndarray:
    together = _together(kind, rows.shape[1])
    values = rows.reshape(len(rows) // together, -1)
    weights = None if importance is None else np.tile(importance, together)
    return quants.dequantize(quants.quantize(values, kind, weights), kind).reshape(rows.shape)


def _together(kind: Type, row: int) -> int:
    """How many rows make whole blocks."""
    return lcm(row, GGML_QUANT_SIZES[kind][0]) // row


def bits(kind: Type) -> float:
    """Of a weight."""
    block, size = GGML_QUANT_SIZES[kind]
    return 8 * size / block


def _copy(
    file: GGUF, path: Path, threads: int, change: Callable[[TensorInfo], Rows | None]
) -> None:
    """A file's tensors as F32, some of them changed, a piece of each at a time."""
    plan = [Planned(info.name, Type.F32, info.shape) for info in file.tensors.values()]
    metadata = {**file.metadata.encoded, "general.file_type": 0}
    with GGUFWriter(path, metadata, plan) as out, ThreadPoolExecutor(threads) as pool:
        for info in file.tensors.values():
            out.write(info.name, pool.map(partial(_piece, info, change(info)), _starts(info)))


def _starts(info: TensorInfo) -> range:
    return range(0, prod(info.shape[1:]), _step(info))


def _step(info: TensorInfo) -> int:
    return max(256, PIECE // info.shape[0] // 256 * 256)  # whole blocks, however many rows


def _piece(info: TensorInfo, change: Rows | None, first: int) -> np.ndarray:
    count = min(_step(info), prod(info.shape[1:]) - first)
    row = nbytes(info.type, info.shape[:1])
    data = info.blob.view(info.offset + first * row, count * row)
    rows = quants.dequantize(data, info.type).reshape(count, -1)
    return change(rows, first) if change else rows
