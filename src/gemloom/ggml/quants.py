"""Quantize rows of float32 into the blocks of a ggml type. The way back is ``gguf.quants``."""

from __future__ import annotations

import ctypes

import ggml
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from gemloom.errors import OptionError
from gemloom.gguf import nbytes

# What ggml quantizes without an importance matrix; for any other type it would abort.
_NAMES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 IQ4_NL IQ4_XS"
QUANTIZABLE = frozenset(GGMLQuantizationType[name] for name in _NAMES.split())


def quantize(values: NDArray[np.float32], kind: GGMLQuantizationType) -> bytearray:
    """Rows of ``values``, float32 [rows, n], one after the other as blocks of ``kind``.

    OptionError for a type that cannot be made so, an n that is no whole number of blocks, or a
    value that is not finite.
    """
    if kind not in QUANTIZABLE:
        raise OptionError(f"cannot quantize to {kind.name}")
    rows, n = values.shape
    block = GGML_QUANT_SIZES[kind][0]
    if not rows or not n or n % block:
        raise OptionError(f"{kind.name}: rows of {n:,} values are no whole blocks of {block}")
    if not np.isfinite(values).all():
        raise OptionError(f"{kind.name}: a value to quantize is not finite")
    source = np.ascontiguousarray(values, np.float32)
    out = bytearray(nbytes(kind, (n, rows)))
    target = np.frombuffer(out, np.uint8).ctypes.data
    pointer = source.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    written = ggml.ggml_quantize_chunk(int(kind), pointer, target, 0, rows, n, None)
    assert written == len(out), (kind, written, len(out))
    return out
