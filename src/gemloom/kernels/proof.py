"""Our own kernels, compared with ggml's plain ones: all instruction sets that this processor runs.

For the child process of ``ggml/trust.py`` alone: a kernel that is wrong may end it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from gguf.constants import GGMLQuantizationType

from gemloom.ggml.device import Device, Packed, Tensor
from gemloom.ggml.graph import F16, F32, Graph
from gemloom.ggml.proof import (
    COLUMNS,
    Case,
    Input,
    Op,
    Subject,
    agree,
    computed,
    matrix,
    normal,
    plain_device,
)
from gemloom.kernels.library import GROUP, TYPES, DeltaStretch, Library, Weight, supported
from gemloom.kernels.operations import (
    BF16,
    I8,
    add_deltas,
    attention,
    dense_product,
    product,
)

_ROWS = (1, 7, 65)  # of activations: one, a tile and more, and so many that a group is unpacked
_M = GROUP + 8  # rows of weights: a whole group, and one that is not
_HEADS, _SIZE, _CELLS = 4, 64, 64
_RANK = 4
_EPS = 1e-6


def subjects() -> Iterator[Subject]:
    """Everything there is to try of ours here, the fastest first."""
    plain = plain_device()
    for library in supported():
        ours = plain_device(library)
        yield library.name, partial(_cases, library, ours, plain)
        ours.close()
    plain.close()


def _cases(library: Library, ours: Device, plain: Device) -> Iterator[Case]:
    for kind in TYPES:
        yield kind.name, partial(_product, library, ours, plain, kind)
    for name, agrees in _OTHERS.items():
        yield name, partial(agrees, ours, plain)


def _product(library: Library, ours: Device, plain: Device, kind: GGMLQuantizationType) -> bool:
    weight, data = Weight(kind, COLUMNS, _M), matrix(kind, _M)
    packed = np.zeros(library.packed_bytes(weight), np.int8)
    library.pack(weight, data.ctypes.data, packed.ctypes.data, 0, weight.groups)

    def op(g: Graph, t: list[Tensor]) -> Tensor:
        return product(g, Packed(weight, t[0]), t[1])

    for rows in _ROWS:
        x = F32, normal(rows, COLUMNS), (COLUMNS, rows)
        found = computed(ours, op, (I8, packed, packed.shape), x)
        right = computed(plain, lambda g, t: g.mul_mat(*t), (kind, data, (COLUMNS, _M)), x)
        if not agree(found, right):
            return False
    return True


def _dense(ours: Device, plain: Device) -> bool:
    w = BF16, matrix(BF16, _M), (COLUMNS, _M)
    x = F32, normal(7, COLUMNS), (COLUMNS, 7)
    found = computed(ours, lambda g, t: dense_product(g, *t), w, x)
    return agree(found, computed(plain, lambda g, t: g.mul_mat(*t), w, x))


def _attention(ours: Device, plain: Device) -> bool:
    """Few rows and many, which are other kernels."""
    return all(_attends(ours, plain, kind, n) for kind in (F16, F32) for n in (1, 9))


def _attends(ours: Device, plain: Device, kind: GGMLQuantizationType, n: int) -> bool:
    heads, size, cells = _HEADS, _SIZE, _CELLS
    cell = np.float16 if kind == F16 else np.float32
    q = F32, normal(n, heads, size), (size, heads, n)
    k, v = (
        (kind, normal(cells, 2, size + i)[..., :size].astype(cell), (size, 2, cells))
        for i in (0, 1)
    )
    mask = F16, np.zeros((n, cells), np.float16), (cells, n)

    def own(g: Graph, t: list[Tensor]) -> Tensor:
        return attention(g, t[0], g.swap(t[1]), g.swap(t[2]), t[3], size**-0.5)

    def theirs(g: Graph, t: list[Tensor]) -> Tensor:
        return g.attention(g.swap(t[0]), g.swap(t[1]), g.swap(t[2]), t[3], size**-0.5)

    return agree(computed(ours, own, q, k, v, mask), computed(plain, theirs, q, k, v, mask))


def _norm(ours: Device, plain: Device) -> bool:
    x, weight = (F32, normal(7, COLUMNS), (COLUMNS, 7)), (F32, normal(COLUMNS), (COLUMNS,))
    return _same(ours, plain, lambda g, t: g.rms_norm(t[0], _EPS, t[1]), x, weight)


def _gelu(ours: Device, plain: Device) -> bool:
    x, up = ((F32, normal(7 + i, COLUMNS)[:7], (COLUMNS, 7)) for i in (0, 1))
    return _same(ours, plain, lambda g, t: g.gelu_mul(*t), x, up)


def _same(ours: Device, plain: Device, op: Op, *inputs: Input) -> bool:
    return agree(computed(ours, op, *inputs), computed(plain, op, *inputs))


def _delta(ours: Device, plain: Device) -> bool:
    """An adapter's addition; numpy computes the plain one."""
    n, m = 3, _M
    a, b = normal(_RANK, COLUMNS), normal(_RANK, m)
    scale, x, y = normal(n), normal(n, COLUMNS), normal(n, m)
    stretch = DeltaStretch(a.ctypes.data, b.ctypes.data, scale.ctypes.data, 0, n, _RANK, m, 0)

    def op(g: Graph, t: list[Tensor]) -> Tensor:
        add_deltas(g, [stretch], t[0], t[1])
        return g.cont(t[1])

    found = computed(ours, op, (F32, x, (COLUMNS, n)), (F32, y, (m, n)))
    return agree(found, y + scale[:, None] * (x @ a.T @ b))


_OTHERS: dict[str, Callable[[Device, Device], bool]] = {
    "dense": _dense, "attention": _attention, "norm": _norm, "gelu": _gelu, "delta": _delta,
}  # fmt: skip
