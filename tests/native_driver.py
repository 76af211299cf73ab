"""Cases for tests/native/driver.cpp, which runs the native operations outside Python.

Compiled with a sanitizer, or for another processor and run by an emulator: what it computes is
held against numpy. Odd sizes throughout; every tensor has memory of just its size.
"""

from __future__ import annotations

import os
import shlex
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemloom.kernels.build import FLAGS, build
from gemloom.kernels.library import TYPES, supported
from kernel_cases import Array, Matrix, activations, bfloats, matrix, pack, rounded

OPERATIONS = (
    "pack", "quantize", "product", "expert_product", "attention", "norm", "gelu_mul", "dense",
    "delta",
)  # fmt: skip
SEGMENT = 512  # cells, as in library.cpp
F32 = np.float32


@dataclass(frozen=True, slots=True)
class Case:
    """One call: what it gets, and what it has to give, up to ``error`` of ``size``."""

    operation: str
    expected: Array
    dtype: Any
    sources: tuple[Array, ...]
    numbers: tuple[int, int, int] = (0, 0, 0)
    threads: int = 1
    error: float = 0.0
    size: Any = 1.0

    def encoded(self, kernels: int) -> bytes:
        """As driver.cpp reads it."""
        number = OPERATIONS.index(self.operation)
        head = (kernels, number, self.threads, *self.numbers, 1 + len(self.sources))
        blank = np.full(self.expected.shape, 0x5A, self.dtype)
        return struct.pack("7q", *head) + b"".join(map(_tensor, (blank, *self.sources)))

    def check(self, result: bytes) -> None:
        """AssertionError where the result is not what it has to be."""
        got = np.frombuffer(result, self.dtype).reshape(self.expected.shape)
        if not self.error:
            assert np.array_equal(got, self.expected), self.operation
            return
        excess = np.abs(got - self.expected) / np.maximum(self.size, 1e-30)
        assert excess.max() <= self.error, (self.operation, self.numbers, excess.max())

    @property
    def nbytes(self) -> int:
        """Of the result."""
        return self.expected.size * np.dtype(self.dtype).itemsize


def _tensor(array: Array) -> bytes:
    array = np.ascontiguousarray(array)
    ne = [*array.shape[::-1], 1, 1, 1][:4]
    nb = [array.itemsize]
    for n in ne[:3]:
        nb.append(nb[-1] * n)
    return struct.pack("9q", *ne, *nb, array.nbytes) + array.tobytes()


def compiled(
    folder: Path, machine: str, compiler: str = "c++", flags: tuple[str, ...] = ()
) -> Path | None:
    """The driver with the kernels, made for ``machine``; None where that cannot be."""
    before = os.environ.get("CXX")
    os.environ["CXX"] = compiler
    try:
        library = build(folder, machine=machine, extra=flags)
    finally:
        os.environ.pop("CXX")
        if before is not None:
            os.environ["CXX"] = before
    if library is None:
        return None
    source, target = Path(__file__).parent / "native" / "driver.cpp", folder / "driver"
    link = [str(library), f"-Wl,-rpath,{folder}", "-pthread", "-o", str(target)]
    command = [*shlex.split(compiler), *FLAGS, "-Wall", *flags, str(source), *link]
    subprocess.run(command, check=True)
    return target


def run(driver: list[str], folder: Path, kernels: int, cases: list[Case]) -> list[bytes] | None:
    """What the cases give, with the i-th best kernels; None where there are not so many."""
    asked, given = folder / "cases", folder / "results"
    asked.write_bytes(b"".join(case.encoded(kernels) for case in cases))
    done = subprocess.run(
        [*driver, str(asked), str(given)], capture_output=True, text=True, check=False
    )
    if done.returncode == 3:
        return None
    assert not done.returncode, done.stderr[-4000:]
    everything = given.read_bytes()
    assert len(everything) == sum(case.nbytes for case in cases)
    results, at = [], 0
    for case in cases:
        results.append(everything[at : at + case.nbytes])
        at += case.nbytes
    return results


def all_cases() -> Iterator[Case]:
    """Every operation, type and way through a template."""
    for kind in TYPES:
        yield from _products(matrix(kind, 67, 3 * TYPES[kind][1]))
    yield from _experts()
    for n, k in ((1, 32), (7, 96), (3, 1024)):
        x = activations("student", n, k)
        yield Case("quantize", quantized(x), np.int8, (x,), threads=4)
    for m, k, n in ((67, 48, 13), (1, 16, 1)):
        w, x = bfloats(m, k), activations("outliers", n, k)
        right, size = x @ w.values.T, np.abs(x) @ np.abs(w.values).T
        bits = np.frombuffer(w.data, np.uint16).reshape(m, k)
        yield Case("dense", right, F32, (bits, x), threads=2, error=5e-7, size=size)
    yield from _attention()
    yield from _elements()
    yield from _deltas()


def quantized(x: Array) -> Array:
    """struct Activations for each 32 of a row: values, scale, sum, minus the halves' sums; int8."""
    n = len(x)
    runs = x.reshape(n, -1, 32)
    scale = np.abs(runs).max(-1) / F32(127)
    whole = np.rint(runs * (F32(1) / scale)[..., None]).astype(np.int8)
    halves = whole.reshape(n, -1, 2, 16).sum(-1, dtype=np.int32)
    sums = scale * halves.sum(-1).astype(F32)
    parts = (
        whole,
        scale[..., None].view(np.int8),
        sums[..., None].view(np.int8),
        (-halves).view(np.int8),
    )
    out = np.concatenate(parts, axis=-1).reshape(n, -1)
    padding = -out.shape[1] % 64
    return np.pad(out, ((0, 0), (0, padding)), constant_values=0x5A)


def _products(w: Matrix) -> Iterator[Case]:
    packed = pack(supported()[0], w)
    weight = (TYPES[w.kind][0], w.k, w.m)
    yield Case("pack", packed, np.int8, (np.frombuffer(w.data, np.uint8),), weight)
    for n in (1, 2, 3, 4, 6, 8, 13, 71):
        x = activations("outliers", n, w.k)
        right, size = rounded(x) @ w.values.T, np.abs(x) @ np.abs(w.values).T
        sources = packed, quantized(x)
        yield Case("product", right, F32, sources, weight, n % 4 + 1, 5e-7, size)


def _experts() -> Iterator[Case]:
    for kind in TYPES:
        experts = [matrix(kind, 70, TYPES[kind][1], seed) for seed in range(4)]
        packed = np.concatenate([pack(supported()[0], w) for w in experts])
        ids = np.array([[0, 3], [3, 0], [3, 3]], np.int32)
        x = activations("gauss", 3, experts[0].k)
        all_values = np.stack([w.values for w in experts])[ids]
        right = np.einsum("nuok,nk->nuo", all_values, rounded(x))
        size = np.einsum("nuok,nk->nuo", np.abs(all_values), np.abs(x))
        weight = (TYPES[kind][0], experts[0].k, 70)
        sources = packed, quantized(x)[:, None], ids
        yield Case("expert_product", right, F32, sources, weight, 3, 5e-7, size)


def _attention() -> Iterator[Case]:
    rng = np.random.default_rng(3)
    for n, heads, n_kv, size, cells in (
        (1, 4, 1, 16, 32),
        (3, 6, 2, 48, 608),
        (40, 4, 2, 80, 1056),
    ):
        q = rng.standard_normal((n, heads, size)).astype(F32)
        k, v = rng.standard_normal((2, n_kv, cells, size)).astype(F32)
        seen = rng.random((n, cells)) < 0.4
        seen[:, 7] = True
        mask = np.where(seen, np.float16(0), np.float16(-np.inf))
        for half in (False, True):
            k, v = (x.astype(np.float16 if half else F32) for x in (k, v))
            right, most = _attended(q, k, v, seen), float(np.abs(v).max())
            for shared in (0, _part_floats(q, k)):
                numbers = (_bits(size**-0.5), int(half), shared)
                sources = q, k, v, mask
                yield Case("attention", right, F32, sources, numbers, 3, 3e-6, most)


def _part_floats(q: Array, k: Array) -> int:
    """Memory that threads share, as operations.py has it."""
    rows = q.shape[1] // len(k) * len(q)
    width = 16 if rows <= 16 else 64
    blocks = len(k) * -(-rows // width)
    return blocks * -(-k.shape[1] // SEGMENT) * width * (q.shape[2] + 2)


def _attended(q: Array, k: Array, v: Array, seen: Array) -> Array:
    group = q.shape[1] // len(k)
    k, v = (np.repeat(x.astype(np.float64), group, axis=0) for x in (k, v))
    scores = np.einsum("nhd,hcd->hnc", q, k) * q.shape[-1] ** -0.5
    weights = np.where(seen, np.exp(scores), 0)
    return np.einsum("hnc,hcd->nhd", weights / weights.sum(-1, keepdims=True), v)


def _elements() -> Iterator[Case]:
    rng = np.random.default_rng(4)
    for n in (1, 16, 37, 640):
        x, add, up = rng.standard_normal((3, 5, n)).astype(F32)
        weight, scale = rng.standard_normal(n).astype(F32), np.array([0.7], F32)
        normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
        eps = (_bits(1e-6), 0, 0)
        size = np.abs(normed * weight) + np.abs(add)
        yield Case("norm", normed, F32, (x,), eps, 2, 6e-7, np.abs(normed))
        scaled = normed * weight
        yield Case("norm", scaled, F32, (x, weight), eps, 2, 6e-7, np.abs(scaled))
        right = (add + normed * weight) * scale
        yield Case("norm", right, F32, (x, weight, add, scale), eps, 3, 6e-7, size)
        argument = np.sqrt(8 / np.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)
        gated = x / (1 + np.exp(-argument)) * up
        yield Case("gelu_mul", gated, F32, (x, up), threads=4, error=4e-6, size=np.abs(gated))


def _deltas() -> Iterator[Case]:
    """One stretch of all rows and two of some; odd ranks, and columns that are part of B's."""
    rng = np.random.default_rng(5)
    for n, k, m, rank, half in (
        (1, 16, 16, 1, False), (3, 37, 150, 5, False), (3, 37, 150, 5, True),
        (9, 128, 67, 4, True), (13, 70, 33, 3, False),
    ):  # fmt: skip
        x, y = rng.standard_normal((n, k)).astype(F32), rng.standard_normal((n, m)).astype(F32)
        right, size = y.astype(np.float64), np.abs(y.astype(np.float64))
        sources: list[Array] = [y, x]
        for first, count in ((0, n),) if n < 9 else ((1, n // 2 - 1), (n // 2 + 1, n // 3)):
            a = rng.standard_normal((rank, k)).astype(np.float16 if half else F32)
            wide = rng.standard_normal((rank, m + 3)).astype(a.dtype)
            b = wide.ravel()[: wide.size - 3]  # nothing behind the last row's columns
            scale = rng.standard_normal(count).astype(F32)
            numbers = np.array([first, count, rank, m + 3, half], np.int64)
            rows, terms = slice(first, first + count), (scale[:, None], x[first : first + count])
            right[rows] += _delta(*terms, a, wide[:, :m])
            size[rows] += _delta(*map(np.abs, (*terms, a, wide[:, :m])))
            sources += [a, b, scale, numbers]
        for threads in (1, 3):
            yield Case("delta", right, F32, tuple(sources), threads=threads, error=6e-7, size=size)


def _delta(scale: Array, x: Array, a: Array, b: Array) -> Array:
    """s B A x, in float64."""
    scale, x, a, b = (array.astype(np.float64) for array in (scale, x, a, b))
    return scale * (x @ a.T @ b)


def _bits(x: float) -> int:
    return int(struct.unpack("I", struct.pack("f", x))[0])
