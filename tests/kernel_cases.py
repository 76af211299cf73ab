"""Cases of our own kernels for their tests: weights, activations, and what exact arithmetic gives.

    python tests/kernel_cases.py

prints the table of docs/kernels.md: errors beside those of ggml's products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize

from gemloom.ggml.device import Device, Packed, Tensor
from gemloom.ggml.graph import F16, F32, I32, Graph
from gemloom.ggml.quants import quantize
from gemloom.kernels.library import TYPES, Library, Weight, supported
from gemloom.kernels.operations import I8, expert_product, product

Array = np.ndarray[Any, Any]
Op = Callable[[Graph, list[Tensor]], Tensor]

ACTIVATIONS = ("gauss", "student", "outliers")
_KINDS = {np.dtype(np.float32): F32, np.dtype(np.float16): F16, np.dtype(np.int32): I32}
_KINDS |= {np.dtype(np.int8): I8}


@dataclass(frozen=True, slots=True)
class Matrix:
    """m rows of k columns as GGUF's bytes, and the values they stand for: float64 [m, k]."""

    kind: Type
    k: int
    data: bytes

    @property
    def m(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return len(self.data) * block // size // self.k

    @property
    def weight(self) -> Weight:
        return Weight(self.kind, self.k, self.m)

    @property
    def values(self) -> Array:
        flat = dequantize(np.frombuffer(self.data, np.uint8), self.kind)
        return flat.reshape(-1, self.k).astype(np.float64)


def activations(kind: str, n: int, k: int, seed: int = 0) -> Array:
    """float32 [n, k]: normal; Student's t of 3 degrees; normal, 3 channels 40 times as large."""
    rng = np.random.default_rng([seed, n, k])
    if kind == "student":
        return rng.standard_t(3, (n, k)).astype(np.float32)
    x = rng.standard_normal((n, k)).astype(np.float32)
    if kind == "outliers":
        x[:, rng.choice(k, 3, replace=False)] *= 40
    return x


def matrix(kind: Type, m: int, k: int, seed: int = 0) -> Matrix:
    """Normal values, quantized."""
    rng = np.random.default_rng([seed, m, k, int(kind)])
    normal = rng.standard_normal((m, k)).astype(np.float32) * np.float32(k**-0.5)
    return Matrix(kind, k, bytes(quantize(normal, kind)))


def bfloats(m: int, k: int) -> Matrix:
    """Normal values, cut to bfloat16."""
    normal = np.random.default_rng([m, k]).standard_normal((m, k)).astype(np.float32)
    return Matrix(Type.BF16, k, (normal.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def rounded(x: Array) -> Array:
    """Activations as they are after their way through 8 bits, float64: a scale for each 32."""
    runs = x.reshape(*x.shape[:-1], -1, 32)
    largest = np.abs(runs).max(-1, keepdims=True)
    scale = np.where(largest < 1e-35, np.float32(0), largest / np.float32(127))
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    return (np.rint(runs * inverse).astype(np.float64) * scale).reshape(x.shape)


def pack(library: Library, w: Matrix, cuts: Sequence[int] = (), fill: int = 0x55) -> Array:
    """The matrix as our kernels want it: int8. It is packed in parts, cut at groups ``cuts``."""
    packed = np.full(library.packed_bytes(w.weight), fill, np.int8)
    source = np.frombuffer(w.data, np.uint8)
    for first, last in pairwise(sorted({0, w.weight.groups, *cuts})):
        library.pack(w.weight, source.ctypes.data, packed.ctypes.data, first, last)
    return packed


def compute(library: Library | None, op: Op, *arrays: Array | Matrix, threads: int = 1) -> Array:
    """The op on arrays given in numpy's order, slowest first; the graph is computed twice."""
    device = Device(threads=threads, max_nodes=64, kernels=library)
    graph = Graph(device, 64)
    inputs = [_input(graph, f"in{i}", array) for i, array in enumerate(arrays)]
    out = graph.output(op(graph, inputs))
    results = []
    for _ in range(2):
        graph.allocate()
        for tensor, array in zip(inputs, arrays, strict=True):
            tensor.write(array.data if isinstance(array, Matrix) else array)
        graph.compute()
        results.append(out.numpy())
    graph.close()
    device.close()
    assert np.array_equal(*results, equal_nan=True)
    return results[0]


def _input(g: Graph, name: str, array: Array | Matrix) -> Tensor:
    if isinstance(array, Matrix):
        return g.input(name, array.kind, array.k, array.m)
    return g.input(name, _KINDS[array.dtype], *array.shape[::-1])


def multiply(library: Library | None, w: Matrix, x: Array, threads: int = 1) -> Array:
    """x [n, k] times the matrix, by ggml's kernel where no library is given: float32 [n, m]."""
    if library is None:
        return compute(None, lambda g, t: g.mul_mat(*t), w, x, threads=threads)
    packed = pack(library, w)

    def op(g: Graph, t: list[Tensor]) -> Tensor:
        return product(g, Packed(w.weight, t[0]), t[1])

    return compute(library, op, packed, x, threads=threads)


def multiply_experts(
    library: Library, experts: Sequence[Matrix], x: Array, ids: Array, threads: int = 1
) -> Array:
    """x [n, 1 or used, k] times the experts that ids [n, used] name: float32 [n, used, m]."""
    packed = np.concatenate([pack(library, w) for w in experts])

    def op(g: Graph, t: list[Tensor]) -> Tensor:
        return expert_product(g, Packed(experts[0].weight, t[0]), t[1], t[2])

    return compute(library, op, packed, x, ids, threads=threads)


def error(got: Array, exact: Array) -> float:
    """Mean error, in standard deviations of what is right."""
    return float(np.abs(got - exact).mean() / exact.std())


def deviation(got: Array, w: Array, x: Array) -> float:
    """Largest error of products with float64 ``w`` and ``x``, of the sum of their terms' sizes."""
    size = np.abs(x) @ np.abs(w).T
    return float((np.abs(got - x @ w.T) / np.maximum(size, 1e-300)).max())


@cache
def measured(kind: Type, shape: str) -> tuple[float, ...]:
    """Mean errors of ggml and of each library of ours against float64, in this order."""
    w, x = matrix(kind, 256, 1024), activations(shape, 96, 1024)
    exact = x.astype(np.float64) @ w.values.T
    return tuple(error(multiply(library, w, x), exact) for library in (None, *supported()))


def main() -> None:
    """Print the errors of all types."""
    print("| weights | activations | ggml | " + " | ".join(x.name for x in supported()) + " |")
    print("|---|---|" + "---|" * (1 + len(supported())))
    for kind in TYPES:
        for shape in ACTIVATIONS:
            figures = " | ".join(f"{figure:.5f}" for figure in measured(kind, shape))
            print(f"| {kind.name} | {shape} | {figures} |")


if __name__ == "__main__":
    main()
