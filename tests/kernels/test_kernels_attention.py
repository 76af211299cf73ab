"""Our own attention, norms and GELU: against float64, and the same bits however they are cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemloom.compute.inputs import f16_mask
from gemloom.ggml.device import Tensor
from gemloom.ggml.graph import Graph
from gemloom.kernels.library import Library, supported
from gemloom.kernels.operations import attention, serves_attention
from kernel_cases import Array, compute

pytestmark = pytest.mark.skipif(not supported(), reason="no kernels of our own were built")
libraries = pytest.mark.parametrize("library", supported(), ids=lambda library: library.name)
cell_types = pytest.mark.parametrize("cells", [np.float16, np.float32])

ATTENTION = 3e-6  # largest error, of the values' largest: scores of 10 to 20 have 1e-6 in float32
ELEMENT = 6e-7  # of the result: float32, and e^x by 7 terms


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def visible(kind: str, n: int, cells: int) -> Array:
    """Which cells each of the last n positions sees: bool [n, cells]."""
    at = np.arange(cells - n, cells)[:, None] if n <= cells else np.arange(n)[:, None] % cells
    cell = np.arange(cells)
    if kind == "causal":
        return cell <= at
    if kind == "window":
        return (cell <= at) & (cell > at - 40)
    if kind == "one":
        return cell == at * 7 % cells
    seen = np.random.default_rng([n, cells]).random((n, cells)) < 0.3
    seen[:, -1] = True  # a row always sees itself
    return seen


def attend(
    library: Library | None, q: Array, k: Array, v: Array, seen: Array, threads: int = 1
) -> Array:
    """q [n, heads, size], k and v [cells, n_kv, size] -> [n, heads * size]; ggml's without library.

    K and V lie as in the cache: the heads of a cell beside one another.
    """
    scale = q.shape[-1] ** -0.5

    def op(g: Graph, t: list[Tensor]) -> Tensor:
        k, v = g.swap(t[1]), g.swap(t[2])
        if library is None:
            return g.attention(g.swap(t[0]), k, v, t[3], scale)
        assert serves_attention(g, k)
        return attention(g, t[0], k, v, t[3], scale)

    return compute(library, op, q, k, v, f16_mask(seen), threads=threads)


def exact(q: Array, k: Array, v: Array, seen: Array) -> Array:
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.einsum("nhd,chd->hnc", q, k) * q.shape[-1] ** -0.5
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hnc,chd->nhd", weights, v).reshape(len(q), -1)


def case(
    n: int, heads: int, n_kv: int, size: int, cells: int, kind: type = np.float32
) -> tuple[Array, Array, Array]:
    """Queries 3 times as large as normal: a few cells have most of the weight."""
    k, v = normal(1, cells, n_kv, size).astype(kind), normal(2, cells, n_kv, size).astype(kind)
    return 3 * normal(0, n, heads, size), k, v


@libraries
@cell_types
@pytest.mark.parametrize("mask", ["causal", "window", "one", "ragged"])
@pytest.mark.parametrize("n", [1, 5, 33])
def test_attention(library: Library, cells: type, mask: str, n: int) -> None:
    q, k, v = case(n, 4, 2, 48, 608, cells)
    seen = visible(mask, n, 608)
    right = exact(q, k, v, seen)
    found = attend(library, q, k, v, seen)
    assert np.abs(found - right).max() < ATTENTION * np.abs(v).max()
    if cells is np.float16:  # ggml rounds queries to half floats then
        theirs = attend(None, q, k, v, seen)
        assert np.abs(found - right).mean() <= 0.1 * np.abs(theirs - right).mean()


@settings(max_examples=60, deadline=None)
@given(
    library=st.sampled_from(supported() or [None]),
    cells=st.sampled_from([np.float16, np.float32]),
    blocks=st.integers(1, 40),
    size=st.integers(1, 8),
    heads=st.sampled_from([(1, 1), (4, 1), (8, 1), (6, 2), (4, 4), (20, 1), (3, 3)]),
    n=st.integers(1, 40),
    threads=st.integers(1, 8),
    mask=st.sampled_from(["causal", "window", "one", "ragged"]),
)
def test_ragged_sizes(
    library: Library, cells: type, blocks: int, size: int, heads: tuple[int, int],
    n: int, threads: int, mask: str,
) -> None:  # fmt: skip
    """Any size that it serves: float64's result, and the bits of each row by itself."""
    q, k, v = case(n, *heads, 16 * size, 32 * blocks, cells)
    seen = visible(mask, n, 32 * blocks)
    found = attend(library, q, k, v, seen, threads)
    assert np.abs(found - exact(q, k, v, seen)).max() < ATTENTION * np.abs(v).max()
    row = n // 2
    one = slice(row, row + 1)
    assert np.array_equal(attend(library, q[one], k, v, seen[one]), found[one])


@libraries
@cell_types
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_same_bits_whatever_rows_come_along(library: Library, cells: type, mask: str) -> None:
    """Up to 16 rows and up to 64 at a time, segments shared by threads or not."""
    q, k, v = case(50, 4, 1, 64, 2112, cells)
    seen = visible(mask, 50, 2112)
    alone = attend(library, q[30:31], k, v, seen[30:31])
    for rows in (slice(30, 32), slice(27, 31), slice(17, 33), slice(0, 50)):
        for threads in (1, 2, 3, 4, 8):
            found = attend(library, q[rows], k, v, seen[rows], threads)
            assert np.array_equal(found[30 - rows.start], alone[0])


@libraries
def test_scores_far_apart(library: Library) -> None:
    """Scores of several thousands, which e^x has no number for."""
    q, k, v = case(9, 2, 1, 32, 544)
    seen = visible("causal", 9, 544)
    for factor in (1e3, 1e6):
        found = attend(library, factor * q, k, v, seen)
        right = exact(np.float32(factor) * q, k, v, seen)
        assert np.abs(found - right).max() < 1e-3  # the scores themselves are rounded


@libraries
def test_what_no_row_sees_does_not_matter(library: Library) -> None:
    """Stale cells, however large; the cells of a block that no row sees are not even read."""
    q, k, v = case(3, 2, 1, 32, 96)
    seen = visible("causal", 3, 96)
    seen[:, :32], seen[:, 40] = False, False
    right = attend(library, q, k, v, seen)
    k[40], v[40] = 1e30, -3e38  # of which any weight but 0 would be seen
    k[:32], v[:32] = np.nan, np.nan
    assert np.array_equal(attend(library, q, k, v, seen), right)


@libraries
@cell_types
@pytest.mark.parametrize("what", ["k", "v"])
def test_what_is_no_number_is_handed_on(library: Library, cells: type, what: str) -> None:
    """A cell that holds no number makes none of every row that sees it, rather than an answer."""
    q, k, v = case(40, 2, 1, 64, 96, cells)
    seen = visible("causal", 40, 96)
    (k if what == "k" else v)[90] = np.nan
    assert np.isnan(attend(library, q, k, v, seen)[seen[:, 90]]).all()


@libraries
@pytest.mark.parametrize("n", [1, 7, 16, 17, 31, 32, 100, 257, 640])
@pytest.mark.parametrize("threads", [1, 3])
def test_norm(library: Library, n: int, threads: int) -> None:
    x, add, weight = normal(3, 5, n), normal(4, 5, n), normal(5, n)
    x *= np.array([1, 1e-3, 1e3, 1e-8, 1e8], np.float32)[:, None]
    size = np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    scale = np.array([0.7], np.float32)
    expected = [x / size, x / size * weight, add + x / size * weight]
    expected.append(expected[-1] * np.float64(scale[0]))
    ops = [
        lambda g, t: g.rms_norm(t[0], 1e-6),
        lambda g, t: g.rms_norm(t[0], 1e-6, t[1]),
        lambda g, t: g.add_norm(t[2], t[0], 1e-6, t[1]),
        lambda g, t: g.add_norm(t[2], t[0], 1e-6, t[1], t[3]),
    ]
    most = np.abs(x / size * weight) + np.abs(add)  # the terms' sizes
    for op, right in zip(ops, expected, strict=True):
        inputs = [x, weight, add, scale]
        found = compute(library, _with_all(op), *inputs, threads=threads)
        bound = ELEMENT * np.maximum(np.abs(right), most)
        assert (np.abs(found - right) <= bound).all()


def _with_all(op):  # type: ignore[no-untyped-def]
    """The op, in a graph that uses every input, since others get no memory."""

    def make(g: Graph, t: list[Tensor]) -> Tensor:
        for tensor in t:
            g.output(g.cont(tensor))
        return op(g, t)

    return make


@libraries
def test_norm_of_one_head_after_another(library: Library) -> None:
    """Rows of a view, as the heads of fused Q, K and V are."""
    x, weight = normal(6, 3, 10, 64), normal(7, 64)
    part = x[:, 4:8].astype(np.float64)
    right = part / np.sqrt((part**2).mean(-1, keepdims=True) + 1e-6) * weight
    found = compute(
        library, lambda g, t: g.rms_norm(g.slice(t[0], 1, 4, 8), 1e-6, t[1]), x, weight, threads=2
    )
    assert np.abs(found - right).max() < ELEMENT * np.abs(right).max()


def gelu(x: Array) -> Array:
    x = x.astype(np.float64)
    return x / (1 + np.exp(np.minimum(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3), 700)))


@libraries
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_gelu_mul(library: Library, n: int, threads: int) -> None:
    gate, up = 4 * normal(8, 3, n), normal(9, 3, n)
    found = compute(library, lambda g, t: g.gelu_mul(*t), gate, up, threads=threads)
    right = gelu(gate) * up
    # To the left GELU is the difference of what nearly cancels in e^2u's argument.
    assert (np.abs(found - right) <= ELEMENT * (1 + gate**2) * np.abs(right) + 1e-30).all()


@libraries
def test_gelu_everywhere(library: Library) -> None:
    """From the smallest numbers to the largest, of both signs; where it is 0, hardly more."""
    size = np.geomspace(1e-38, 1e30, 4001, dtype=np.float32)
    gate = np.concatenate([-size[::-1], [0], size]).astype(np.float32)
    found = compute(library, lambda g, t: g.gelu_mul(*t), gate, np.ones_like(gate))
    right = gelu(np.clip(gate, -1e4, 1e30))
    small = np.abs(gate) < 4
    assert (np.abs(found - right)[small] <= 2e-6 * np.abs(right)[small]).all()
    assert np.array_equal(found[gate > 10], gate[gate > 10])
    tail = (gate < -10) & (gate > -1e4)
    assert np.abs(found[tail]).max() < 1e-30
    assert np.abs(found / np.maximum(np.abs(gate), 1e-30)).max() < 1.001
