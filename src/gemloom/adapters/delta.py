"""What an adapter adds to the products of a graph: s B A x, on its own rows only.

The scale of each row is an input, so a graph serves any scales. Nothing here knows a model; the
tensors are those of ``Loaded``.
"""

from __future__ import annotations

import numpy as np

from gemloom.adapters.device_factors import Loaded
from gemloom.ggml.device import Tensor
from gemloom.ggml.graph import F16, F32, Graph
from gemloom.kernels.library import DeltaStretch

_FLOAT = 4  # bytes


class Delta:
    """The rows ``first`` to ``first + count`` of the rows of a graph, and their adapter.

    The methods add to y, which the base product has just made, where the adapter has something
    for the matrix ``name``. ``part`` is the part of the matrix that y is of.
    """

    def __init__(self, adapter: Loaded, first: int, count: int) -> None:
        self.adapter, self.first, self.count = adapter, first, count
        self._scales: dict[tuple[int, int, int], Tensor] = {}  # inputs by shape: rank, rows, pieces
        self._own: dict[float, np.ndarray] = {}  # float32 [count] by a pair's scale

    def add_product(
        self, g: Graph, name: str, x: Tensor, y: Tensor, part: tuple[int, int] | None
    ) -> None:
        """y [m, n] += s B A x, of x [k, n]."""
        if (pair := self.adapter.pair(name, g.place)) is None:
            return
        z = g.mul_mat(pair.a, self._rows(g, x))
        if pair.upright:
            self._add(g, g.slice(pair.b, 0, *part) if part else pair.b, z, y)
        else:
            b = g.slice(pair.b, 1, *part) if part else pair.b
            z = g.mul(z, g.reshape(self._scale(g, (1, self.count, 1)), 1, self.count))
            g.add_into(self._rows(g, y), g.mul_mat(b, z))

    def stretch(self, g: Graph, name: str, part: tuple[int, int] | None) -> DeltaStretch | None:
        """What our own kernels need to add it to a product; None where it has nothing to add."""
        pair = self.adapter.pair(name, g.place)
        if pair is None:
            return None
        rank, size = pair.a.shape[1], pair.b.strides[0]
        start = part[0] if part else 0
        return DeltaStretch(
            pair.a.address, pair.b.address + start * size, self._own_scale(pair.scale),
            self.first, self.count, rank, pair.b.strides[1] // size, pair.a.type == F16,
        )  # fmt: skip

    def add_rows(
        self, g: Graph, name: str, tokens: Tensor, y: Tensor, part: tuple[int, int] | None
    ) -> None:
        """y [k, n] += s A^T b, where b [r, n] are the rows of B that the tokens name."""
        if pair := self.adapter.pair(name, g.place):
            columns = g.slice(pair.a, 0, *part) if part else pair.a
            self._add(g, columns, g.get_rows(pair.b, self._rows(g, tokens)), y)

    def add_expert_product(self, g: Graph, name: str, x: Tensor, ids: Tensor, y: Tensor) -> None:
        """y [m, used, n] += s B A x with the matrices of the chosen experts."""
        if pair := self.adapter.pair(name, g.place):
            ids = self._rows(g, ids)
            z = g.mul_mat_id(pair.a, self._rows(g, x), ids)
            z = g.mul(z, g.reshape(self._scale(g, (1, self.count, 1)), 1, 1, self.count))
            g.add_into(self._rows(g, y), g.mul_mat_id(pair.b, z, ids))

    def _rows(self, g: Graph, x: Tensor) -> Tensor:
        """Its own rows, which are the last dimension."""
        last = len(x.shape) - 1
        if self.count == x.shape[last]:
            return x
        return g.slice(x, last, self.first, self.first + self.count)

    def _add(self, g: Graph, columns: Tensor, z: Tensor, y: Tensor) -> None:
        """y [m, n] += columns [m, r] (s z) on the rows of z [r, count].

        ``out_prod`` gives each thread whole rows, so a row is cut into pieces where they are few.
        """
        (m, r), n = columns.shape, self.count
        pieces = _pieces(m, n, g.threads)
        z = g.mul(self._scale(g, (r, n, pieces)), z)  # the same for each piece
        cut = m // pieces
        columns = g.view(columns, (cut, r, pieces), (_FLOAT, columns.strides[1], cut * _FLOAT), 0)
        strides = (_FLOAT, y.strides[1], cut * _FLOAT)
        g.add_into(
            g.view(y, (cut, n, pieces), strides, self.first * y.strides[1]),
            g.out_prod(columns, z),
        )

    def _own_scale(self, scale: float) -> int:
        """Address of the scales of its rows, with a pair's own scale in them."""
        rows = self._own.setdefault(scale, np.zeros(self.count, np.float32))
        return int(rows.ctypes.data)

    def _scale(self, g: Graph, shape: tuple[int, int, int]) -> Tensor:
        if shape not in self._scales:
            name = f"scale.{self.adapter.version}.{self.first}.{'x'.join(map(str, shape))}"
            self._scales[shape] = g.input(name, F32, *shape)
        return self._scales[shape]

    def write(self, scales: tuple[float, ...]) -> None:
        """Give each row its scale, before the graph is computed."""
        for scale, rows in self._own.items():
            rows[:] = np.multiply(scales, scale)
        values = np.asarray(scales, np.float32)[:, None]
        for shape, tensor in self._scales.items():
            tensor.write(np.ascontiguousarray(np.broadcast_to(values, shape[::-1])))


def _pieces(m: int, n: int, threads: int) -> int:
    """Into how many pieces to cut rows of m, n of them, so that every thread gets some."""
    pieces = 1
    while n * pieces < threads and m % (2 * pieces) == 0:
        pieces *= 2
    return pieces
