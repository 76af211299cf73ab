"""Our own kernels as operations of a ggml graph. Who uses them asks ``serves...`` first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gguf.constants import GGMLQuantizationType

from gemloom.ggml.device import Packed, Tensor
from gemloom.ggml.graph import F16, F32, Graph
from gemloom.kernels.library import Attention, DeltaStretch, Stretches

I8, BF16 = GGMLQuantizationType.I8, GGMLQuantizationType.BF16
_CELLS, _LANES = 32, 16  # of which attention takes whole multiples
_SEGMENT, _NARROW, _WIDE = 512, 16, 64  # cells and rows of its blocks, as in library.cpp


def product(g: Graph, w: Packed, x: Tensor) -> Tensor:
    """w [k, m], x [k, ...] -> [m, ...] = W x."""
    assert g.kernels and w.weight.k == x.shape[0], (w, x)
    shape = (int(w.weight.m), *x.shape[1:])
    return g.custom("product", F32, shape, (w.tensor, quantized(g, x)), w.weight)


def serves_dense(g: Graph, w: Tensor) -> bool:
    """Whether ``dense_product`` takes a matrix [k, m] or a slice of its rows."""
    return bool(g.kernels and w.type == BF16 and w.shape[0] % _LANES == 0)


def dense_product(g: Graph, w: Tensor, x: Tensor) -> Tensor:
    """w bf16 [k, m], x [k, n] -> [m, n] = W x in f32; ggml would round x to bf16."""
    assert g.kernels and w.shape[0] == x.shape[0], (w, x)
    return g.custom("dense", F32, (w.shape[1], *x.shape[1:]), (w, x))


def expert_product(g: Graph, w: Packed, x: Tensor, ids: Tensor) -> Tensor:
    """w [k, m, n_expert], x [k, 1 or used, n], ids [used, n] -> [m, used, n], as named by ids."""
    assert g.kernels and w.weight.k == x.shape[0] and x.shape[2] == ids.shape[1], (w, x, ids)
    shape = (int(w.weight.m), *ids.shape)
    return g.custom("expert_product", F32, shape, (w.tensor, quantized(g, x), ids), w.weight)


def quantized(g: Graph, x: Tensor) -> Tensor:
    """x [k, ...] in 8 bits; the same node for every product that has the same x."""

    def make() -> Tensor:
        assert g.kernels
        shape = (g.kernels.activation_bytes(x.shape[0]), *x.shape[1:])
        return g.custom("quantize", I8, shape, (x,))

    return g.once("quantized", x, make)


def add_deltas(g: Graph, stretches: Sequence[DeltaStretch], x: Tensor, y: Tensor) -> None:
    """y [m, n] += scale B (A x) on the rows of each stretch, of x [k, n]; in place."""
    assert g.kernels and x.shape[1] == y.shape[1], (x, y)
    g.custom_into("delta", y, (x,), Stretches(stretches))


def serves_attention(g: Graph, k: Tensor) -> bool:
    """Whether our attention takes such cells [head_dim, cells, n_kv]."""
    whole = k.shape[1] % _CELLS == 0 and k.shape[0] % _LANES == 0
    return bool(g.kernels and whole and k.type in (F16, F32))


def attention(g: Graph, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax(scale * q k + mask) v in f32, where a row sees the cells whose mask is 0.

    q [head_dim, n_head, n], k and v [head_dim, cells, n_kv], mask f16 [cells, n]
    -> [head_dim * n_head, n].
    """
    assert g.kernels and mask.shape == (k.shape[1], q.shape[2]) and k.shape == v.shape, (q, k, mask)
    options = Attention(scale, k.type == F16, _parts(g, q, k))
    args = (q, k, v, mask)
    y = g.custom("attention", F32, q.shape, args, options)
    return g.reshape(y, q.shape[0] * q.shape[1], q.shape[2])


def _parts(g: Graph, q: Tensor, k: Tensor) -> int | None:
    """Memory for threads to leave segments in; None where each has a block of rows for itself."""
    rows, size = q.shape[1] // k.shape[2] * q.shape[2], q.shape[0]
    width = _NARROW if rows <= _NARROW else _WIDE
    blocks = k.shape[2] * -(-rows // width)
    if blocks >= 2 * g.threads or k.shape[1] <= _SEGMENT or g.threads == 1:
        return None
    count = blocks * -(-k.shape[1] // _SEGMENT) * width * (size + 2)
    return int(g.keep(np.empty(count, np.float32)).ctypes.data)
