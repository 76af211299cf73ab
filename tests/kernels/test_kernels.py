"""Our own matrix products: against float64, against ggml's, and the same bits however they are cut.

Each runs with every instruction set that this processor has; ``make test-neon`` has the others.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from gemloom.ggml.device import Tensor
from gemloom.ggml.graph import Graph
from gemloom.kernels.library import GROUP, TYPES, Library, supported
from gemloom.kernels.operations import dense_product
from kernel_cases import (
    ACTIVATIONS,
    Matrix,
    activations,
    bfloats,
    compute,
    deviation,
    error,
    matrix,
    measured,
    multiply,
    multiply_experts,
    pack,
    rounded,
)

pytestmark = pytest.mark.skipif(not supported(), reason="no kernels of our own were built")
libraries = pytest.mark.parametrize("library", supported(), ids=lambda library: library.name)
kinds = pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)

BOUNDS = {"gauss": 0.0045, "student": 0.007, "outliers": 0.0096}  # standard deviations, mean
# Of ggml's error: a scale for each 32 activations instead of each 256 is finer, and equal where
# ggml has one for each 32 too (but for its scales' rounding to half floats).
OF_GGML = {256: {"gauss": 0.8, "student": 0.52, "outliers": 0.37}, 32: dict.fromkeys(BOUNDS, 1.0)}
ARITHMETIC = 5e-7  # of the terms' sizes: float32 sums of exact integer products


@kinds
@pytest.mark.parametrize("shape", ACTIVATIONS)
def test_error_is_not_above_ggmls(kind: Type, shape: str) -> None:
    ggml, *ours = measured(kind, shape)
    for found in ours:
        assert found < BOUNDS[shape]
        assert found < OF_GGML[TYPES[kind][1]][shape] * ggml


@libraries
@kinds
@pytest.mark.parametrize("m", [1, 16, 63, 65, 130])
def test_rows_of_weights_and_blocks(library: Library, kind: Type, m: int) -> None:
    """Against float64 on the activations as rounded: what is left is float32's own error."""
    for blocks in (1, 5):
        w = matrix(kind, m, blocks * TYPES[kind][1])
        x = activations("student", 13, w.k)
        assert deviation(multiply(library, w, x), w.values, rounded(x)) < ARITHMETIC


@settings(max_examples=150, deadline=None)
@given(
    library=st.sampled_from(supported() or [None]),
    kind=st.sampled_from(list(TYPES)),
    size=st.tuples(st.integers(1, 200), st.integers(1, 4)),
    n=st.integers(1, 300),
    threads=st.integers(1, 8),
    shape=st.sampled_from(ACTIVATIONS),
)
def test_rows_and_threads(
    library: Library, kind: Type, size: tuple[int, int], n: int, threads: int, shape: str
) -> None:
    """Any shape, any number of threads; and a row by itself gives the same bits."""
    w = matrix(kind, size[0], size[1] * TYPES[kind][1])
    x = activations(shape, n, w.k)
    y = multiply(library, w, x, threads)
    assert deviation(y, w.values, rounded(x)) < ARITHMETIC
    for row in {0, n // 2, n - 1}:
        assert np.array_equal(multiply(library, w, x[row : row + 1])[0], y[row])


@libraries
@kinds
def test_same_bits_whatever_rows_come_along(library: Library, kind: Type) -> None:
    w, x = matrix(kind, 130, 512), activations("gauss", 23, 512)
    alone = np.concatenate([multiply(library, w, x[i : i + 1]) for i in range(23)])
    for n in (2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 23):
        assert np.array_equal(multiply(library, w, x[:n]), alone[:n])
    for threads in range(2, 9):
        assert np.array_equal(multiply(library, w, x, threads), alone)


@libraries
@kinds
def test_many_rows_with_many_columns(library: Library, kind: Type) -> None:
    """A group is unpacked in parts for them."""
    w, x = matrix(kind, 65, 2304), activations("student", 75, 2304)
    y = multiply(library, w, x, threads=2)
    assert deviation(y, w.values, rounded(x)) < ARITHMETIC
    assert np.array_equal(multiply(library, w, x[70:]), y[70:])


@libraries
@pytest.mark.parametrize(("m", "k", "n"), [(1, 16, 1), (67, 48, 7), (200, 1536, 13)])
def test_bfloat16(library: Library, m: int, k: int, n: int) -> None:
    """In float32, where ggml rounds activations; a row, a slice and a thread change no bit."""
    w, x = bfloats(m, k), activations("student", n, k)

    def multiply(first: int, x: np.ndarray, threads: int = 1) -> np.ndarray:
        def op(g: Graph, t: list[Tensor]) -> Tensor:
            return dense_product(g, g.slice(t[0], 1, first, m), t[1])

        return compute(library, op, w, x, threads=threads)

    y = multiply(0, x)
    assert deviation(y, w.values, x.astype(np.float64)) < ARITHMETIC
    assert np.array_equal(multiply(0, x[n - 1 :], 3)[0], y[n - 1])
    assert np.array_equal(multiply(m // 2, x, 2), y[:, m // 2 :])


@kinds
def test_instruction_sets_agree(kind: Type) -> None:
    w, x = matrix(kind, 65, 768), activations("outliers", 9, 768)
    size = np.abs(x) @ np.abs(w.values).T
    first, *others = (multiply(library, w, x) for library in supported())
    for other in others:
        assert (np.abs(other - first) / size).max() < ARITHMETIC


def scaled(w: Matrix, scale: np.ndarray) -> Matrix:
    """The matrix with other half floats as the scales (and minima) of its blocks."""
    size = {Type.Q4_0: 18, Type.Q8_0: 34, Type.TQ2_0: 66, Type.Q4_K: 144, Type.Q5_K: 176}
    places = {Type.TQ2_0: (64,), Type.Q6_K: (208,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2)}
    blocks = np.frombuffer(w.data, np.uint8).reshape(-1, size.get(w.kind, 210)).copy()
    for place in places.get(w.kind, (0,)):
        blocks[:, place : place + 2] = np.resize(scale, len(blocks)).view(np.uint8).reshape(-1, 2)
    return Matrix(w.kind, w.k, blocks.tobytes())


@libraries
@kinds
@pytest.mark.parametrize("scale", [[0.0, -0.0], [65504, -65504], [6e-8, -6e-8], [0, 65504, 6e-8]])
def test_extreme_scales(library: Library, kind: Type, scale: list[float]) -> None:
    """Zero, the largest half float and the smallest denormal one; each block with its own."""
    w = scaled(matrix(kind, 67, 4 * TYPES[kind][1]), np.array(scale, np.float16))
    x = activations("gauss", 7, w.k)
    x[1], x[2], x[3] = 0, x[3] * 1e25, x[3] * 1e-25
    y = multiply(library, w, x)
    assert deviation(y, w.values, rounded(x)) < ARITHMETIC
    assert not y[1].any()


@libraries
@kinds
def test_every_bit_of_a_block(library: Library, kind: Type) -> None:
    """Blocks of random bytes: all values, scales and minima that a file may have."""
    size = 4 * len(matrix(kind, 70, TYPES[kind][1]).data)
    noise = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8).tobytes()
    w = scaled(Matrix(kind, 4 * TYPES[kind][1], noise), np.array([0.5, -2, 0.03], np.float16))
    x = activations("gauss", 5, w.k)
    assert deviation(multiply(library, w, x), w.values, rounded(x)) < ARITHMETIC


@libraries
def test_activations_too_small_or_not_finite(library: Library) -> None:
    """What is below 1e-35 counts as nothing; what is no number stays none."""
    w, x = matrix(Type.Q4_K, 64, 256), activations("gauss", 4, 256)
    x[0] *= 1e-37
    x[1] = np.nan
    x[2, 5] = np.inf
    y = multiply(library, w, x)
    assert not y[0].any()
    assert np.isnan(y[1]).all()
    assert not np.isfinite(y[2]).any()
    assert np.array_equal(y[3], multiply(library, w, x[3:])[0])


@libraries
@kinds
def test_packing_in_parts_is_packing_whole(library: Library, kind: Type) -> None:
    w = matrix(kind, 5 * GROUP + 3, 2 * TYPES[kind][1])
    whole = pack(library, w)
    assert np.array_equal(whole, pack(library, w, cuts=(1, 2, 5), fill=-1))
    longer = Matrix(kind, w.k, w.data[: len(w.data) // w.m * 2 * GROUP])
    share = len(whole) // 6 * 2
    assert np.array_equal(whole[:share], pack(library, longer))


@libraries
@kinds
@pytest.mark.parametrize("each", [False, True])
def test_experts_are_products_one_by_one(library: Library, kind: Type, each: bool) -> None:
    """x for all experts of a row, or one for each of them; some experts are named by no row."""
    k, n, used = TYPES[kind][1], 37, 3
    experts = [matrix(kind, 70, k, seed) for seed in range(6)]
    ids = np.random.default_rng(1).integers(5, size=(n, used)).astype(np.int32)
    ids[4] = 2  # more than once for one row
    x = activations("gauss", n * used, k).reshape(n, used, k)[:, : used if each else 1]
    x = np.ascontiguousarray(x)
    alone = [multiply(library, w, x.reshape(-1, k)).reshape(n, -1, 70) for w in experts]
    rows, columns = np.indices(ids.shape)
    expected = np.stack(alone)[ids, rows, columns if each else 0]
    for threads in (1, 2, 5, 8):
        assert np.array_equal(multiply_experts(library, experts, x, ids, threads), expected)


@pytest.mark.parametrize("bad", [-1, 4])
def test_an_expert_that_is_not_there_stops_the_process(bad: int) -> None:
    """As in ggml, before memory is overwritten."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r});"
        "import numpy as np; from kernel_cases import *;"
        "x = activations('gauss', 1, 256)[None]; w = [matrix(Type.Q4_K, 64, 256)] * 4;"
        f"multiply_experts(supported()[0], w, x, np.array([[{bad}]], np.int32))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGABRT, done.stderr.decode()


@libraries
def test_what_it_serves(library: Library) -> None:
    assert library.serves(Type.Q4_K, 512)
    assert not library.serves(Type.Q4_K, 512 + 32)
    assert not library.serves(Type.Q4_0, 48)
    assert not library.serves(Type.Q5_0, 512)
    assert not library.serves(Type.F16, 512)


@libraries
@pytest.mark.parametrize("n", [1, 7])
def test_rows_that_lie_apart(library: Library, n: int) -> None:
    """Activations as a slice of wider rows."""
    from gemloom.ggml.device import Packed
    from gemloom.kernels.operations import product

    w, wide = matrix(Type.Q6_K, 65, 256), activations("gauss", n, 700)

    def op(g, t):  # type: ignore[no-untyped-def]
        return product(g, Packed(w.weight, t[0]), g.slice(t[1], 0, 64, 320))

    y = compute(library, op, pack(library, w), wide)
    assert np.array_equal(y, multiply(library, w, np.ascontiguousarray(wide[:, 64:320])))
    assert error(y, wide[:, 64:320] @ w.values.T) < BOUNDS["gauss"]
