"""Rows of float32 to the blocks of a ggml type, and back. Whole tensors and files are not here."""

from __future__ import annotations

import ctypes
from typing import Any

import ggml
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from gemloom.errors import OptionError
from gemloom.files.gguf import nbytes

Floats = NDArray[np.float32]

# Everything ggml_quantize_chunk has; for any other type it aborts the process.
_NAMES = """F32 F16 BF16 Q1_0 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 MXFP4 NVFP4 Q2_K Q3_K Q4_K Q5_K Q6_K
            TQ1_0 TQ2_0 IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS"""
WRITABLE = frozenset(GGMLQuantizationType[name] for name in _NAMES.split())
# Of these, what ggml makes only with an importance for every column; without one it aborts.
NEEDS_IMPORTANCE = frozenset(GGMLQuantizationType[name] for name in ("IQ2_XXS", "IQ2_XS", "IQ1_S"))
QUANTIZABLE = WRITABLE - NEEDS_IMPORTANCE
READABLE = WRITABLE | {GGMLQuantizationType.Q8_K}

_WIDE = frozenset({GGMLQuantizationType.F32, GGMLQuantizationType.BF16})  # hold whatever is finite
# Scales of blocks are half floats, and squares of values are summed: past these nothing is sound.
_MOST, _MOST_IMPORTANCE = 65504.0, 1e18
_FloatPointer = ctypes.POINTER(ctypes.c_float)


def quantize(
    values: Floats, kind: GGMLQuantizationType, importance: Floats | None = None
) -> bytearray:
    """Rows of ``values``, float32 [rows, n], one after the other as blocks of ``kind``.

    ``importance``, float32 [n], says how much an error in a column matters; it is never negative.
    Runs without the interpreter's lock, so threads help. OptionError for a type that cannot be
    made so, an n that is no whole number of blocks, or a value that the type cannot hold.
    """
    _check_type(kind, importance)
    rows, n = values.shape
    block = GGML_QUANT_SIZES[kind][0]
    if not rows or not n or n % block:
        raise OptionError(f"{kind.name}: rows of {n:,} values are not whole blocks of {block}")
    _check_values(values, kind)
    source = np.ascontiguousarray(values, np.float32)
    weights = None if importance is None else _checked(importance, n)
    out = bytearray(nbytes(kind, (n, rows)))
    target = _address(np.frombuffer(out, np.uint8))
    written = ggml.ggml_quantize_chunk(
        int(kind),
        _floats(source),
        target,
        0,
        rows,
        n,
        None if weights is None else _floats(weights),
    )
    assert written == len(out), (kind, written, len(out))
    if not ggml.ggml_validate_row_data(int(kind), target, len(out)):
        raise OptionError(f"{kind.name}: values to quantize that its scales are too coarse for")
    return out


def dequantize(data: bytes | bytearray | memoryview, kind: GGMLQuantizationType) -> Floats:
    """The blocks of ``kind`` in ``data`` as float32, flat. Float32 that lies aligned stays there.

    OptionError for a type that is not of this kind, or bytes that are no whole number of blocks.
    """
    block, size = GGML_QUANT_SIZES[kind]
    if kind not in READABLE or len(data) % size:
        raise OptionError(f"{kind.name}: cannot make float32 of {len(data):,} bytes of it")
    source = np.frombuffer(data, np.uint8)
    if kind == GGMLQuantizationType.F32:
        aligned = _address(source) % 4 == 0
        return source.view(np.float32) if aligned else source.copy().view(np.float32)
    out = np.empty(len(data) // size * block, np.float32)
    if out.size:
        to_float = ggml.ggml_get_type_traits(int(kind)).contents.to_float
        to_float(_address(source), _floats(out), out.size)
    return out


def _check_type(kind: GGMLQuantizationType, importance: Floats | None) -> None:
    if kind not in WRITABLE:
        raise OptionError(f"cannot quantize to {kind.name}")
    if kind in NEEDS_IMPORTANCE and importance is None:
        raise OptionError(f"cannot quantize to {kind.name} without an importance matrix")


def _check_values(values: Floats, kind: GGMLQuantizationType) -> None:
    most = float(np.finfo(np.float32).max) if kind in _WIDE else _MOST
    if not (-most <= values.min() and values.max() <= most):  # so that NaN fails too
        beyond = "" if kind in _WIDE else f", or is beyond {_MOST:,.0f}"
        raise OptionError(f"{kind.name}: a value to quantize is not finite{beyond}")


def _checked(importance: Floats, n: int) -> Floats:
    weights = np.ascontiguousarray(importance, np.float32)
    if weights.shape != (n,):
        raise OptionError(f"an importance of shape {weights.shape} for rows of {n:,} values")
    if not (weights.min() >= 0 and weights.max() <= _MOST_IMPORTANCE):
        raise OptionError("an importance is negative, not finite or too large")
    return weights


def _address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


def _floats(array: Floats) -> Any:
    return ctypes.cast(_address(array), _FloatPointer)
