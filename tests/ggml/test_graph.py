"""Each graph op against numpy in float64, through one graph computed twice."""

from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import pytest

import cpu_devices
from gemloom.compute.inputs import f16_mask
from gemloom.ggml.arena import Arena
from gemloom.ggml.device import Device, Tensor
from gemloom.ggml.graph import F16, F32, I32, I64, Graph

RNG = np.random.RandomState(0)
Op = Callable[[Graph, list[Tensor]], Tensor]


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    device = Device(threads=2)
    yield device
    device.close()


def test_a_place_for_a_while_ends_with_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_devices.add(monkeypatch)
    with closing(Device(["cpu0", "cpu1"], threads=1)) as device, closing(Graph(device, 8)) as g:
        with pytest.raises(ZeroDivisionError), g.on(1):
            assert 1 // (g.place - 1)
        assert g.place == 0


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def compute(device: Device, op: Op, *arrays: np.ndarray) -> np.ndarray:
    """The op on arrays given in numpy's order, slowest first; the graph is used twice."""
    kinds = {np.dtype(np.float32): F32, np.dtype(np.float16): F16}
    kinds |= {np.dtype(np.int32): I32, np.dtype(np.int64): I64}
    graph = Graph(device, 64)
    inputs = [graph.input(f"in{i}", kinds[a.dtype], *a.shape[::-1]) for i, a in enumerate(arrays)]
    out = graph.output(graph.cont(op(graph, inputs)))
    results = []
    for _ in range(2):
        graph.allocate()
        for tensor, array in zip(inputs, arrays, strict=True):
            tensor.write(array)
        graph.compute()
        results.append(out.numpy())
    graph.close()
    assert np.array_equal(*results)
    return results[0]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


A, B, W = normal(5, 64), normal(5, 64), normal(7, 64)
EXPERTS, IDS = normal(4, 7, 64), np.array([[0, 3], [2, 1], [3, 0], [1, 1], [2, 0]], np.int32)
CASES: dict[str, tuple[Op, list[np.ndarray], np.ndarray]] = {
    "mul_mat": (lambda g, t: g.mul_mat(t[0], t[1]), [W, A], A @ W.T),
    "mul_mat_id": (
        lambda g, t: g.mul_mat_id(t[0], t[1], t[2]),
        [EXPERTS, A[:, None], IDS],
        np.einsum("nuok,nk->nuo", EXPERTS[IDS], A),
    ),
    "get_rows": (lambda g, t: g.get_rows(*t), [W, np.array([6, 0, 6], np.int32)], W[[6, 0, 6]]),
    "add": (lambda g, t: g.add(*t), [A, B[0]], A + B[0]),
    "mul": (lambda g, t: g.mul(*t), [A, B], A * B),
    "div": (lambda g, t: g.div(*t), [A, B], A / B),
    "scale": (lambda g, t: g.scale(t[0], -2.5), [A], A * -2.5),
    "soft_max": (lambda g, t: g.soft_max(t[0]), [A], softmax(A)),
    "sum_rows": (lambda g, t: g.sum_rows(t[0]), [A], A.sum(-1, keepdims=True)),
    "rms_norm": (
        lambda g, t: g.rms_norm(t[0], 1e-6, t[1]),
        [A, B[0]],
        A / np.sqrt((A.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * B[0],
    ),
    "swap": (lambda g, t: g.swap(t[0]), [EXPERTS], EXPERTS.swapaxes(0, 1)),
    "slice 0": (lambda g, t: g.slice(t[0], 0, 5, 9), [A], A[:, 5:9]),
    "slice 1": (lambda g, t: g.slice(t[0], 1, 2, 4), [A], A[2:4]),
    "slice 2": (lambda g, t: g.slice(t[0], 2, 1, 3), [EXPERTS], EXPERTS[1:3]),
    "concat": (lambda g, t: g.concat(*t), [A, W], np.concatenate([A, W])),
    "reshape": (lambda g, t: g.reshape(t[0], 32, 2, 5), [A], A.reshape(5, 2, 32)),
}


@pytest.mark.parametrize("name", CASES)
def test_op(device: Device, name: str) -> None:
    op, arrays, expected = CASES[name]
    result = compute(device, op, *arrays)
    assert result.shape == expected.shape
    assert np.allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_gelu_mul_is_as_good_as_half_floats(device: Device) -> None:
    result = compute(device, lambda g, t: g.gelu_mul(*t), A, B)
    assert np.allclose(result, gelu(A.astype(np.float64)) * B, rtol=2e-3, atol=1e-3)


def test_top_k_is_ordered(device: Device) -> None:
    result = compute(device, lambda g, t: g.top_k(t[0], 5), A)
    assert np.array_equal(result, np.argsort(-A, axis=-1)[:, :5])


def test_experts_of_a_table(device: Device) -> None:
    table = normal(5, 4, 1)
    result = compute(device, lambda g, t: g.get_experts(*t), table, IDS)
    assert np.array_equal(result[..., 0], np.take_along_axis(table[..., 0], IDS, 1))


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("n_dims", [64, 32])
def test_rope(device: Device, n_dims: int, factors: bool) -> None:
    """Pairs (i, i + n_dims/2); dimensions past n_dims stay as they are."""
    x, half = normal(5, 3, 64), n_dims // 2
    positions = np.array([0, 1, 7, 100, -20], np.int32)
    by = np.where(np.arange(half) < 4, 1.0, 1e30).astype(np.float32)
    arrays = [x, positions, by] if factors else [x, positions]
    op = lambda g, t: g.rope(t[0], t[1], n_dims, 1e4, 0.5, t[2] if factors else None)  # noqa: E731
    angle = positions[:, None, None] * 0.5 * 1e4 ** (-2 * np.arange(half) / n_dims)
    angle = angle / by if factors else angle
    a, b = x[..., :half].astype(np.float64), x[..., half:n_dims].astype(np.float64)
    turned = [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
    expected = np.concatenate([*turned, x[..., n_dims:]], -1)
    assert np.allclose(compute(device, op, *arrays), expected, atol=2e-4)


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize(("dtype", "atol"), [(np.float32, 2e-5), (np.float16, 4e-3)])
@pytest.mark.parametrize("head_dim", [32, 256, 512])
def test_attention(
    device: Device, rows: int, dtype: type[np.floating], atol: float, head_dim: int
) -> None:
    """Grouped heads, masked cells, any number of rows: ggml takes other code for 1 and for 64."""
    heads, kv_heads, cells = 4, 2, 700
    q = normal(heads, rows, head_dim)
    k, v = (normal(kv_heads, cells, head_dim).astype(dtype) for _ in range(2))
    visible = RNG.random_sample((rows, cells)) < 0.3
    visible[:, 0] = True
    op = lambda g, t: g.attention(*t, head_dim**-0.5)  # noqa: E731
    result = compute(device, op, q, k, v, f16_mask(visible))
    wide_k, wide_v = (np.repeat(x.astype(np.float64), heads // kv_heads, 0) for x in (k, v))
    scores = np.einsum("hnd,hcd->hnc", q, wide_k) * head_dim**-0.5
    shares = softmax(np.where(visible, scores, -np.inf))
    expected = np.einsum("hnc,hcd->nhd", shares, wide_v).reshape(rows, -1)
    assert np.allclose(result, expected, atol=atol)


def test_set_rows_comes_before_later_reads(device: Device) -> None:
    arena = Arena(device, 1)
    table = arena.tensor("table", F32, (64, 6))
    arena.allocate("the test")
    ids = np.array([4, 0, 5, 2, 1], np.int64)

    def op(g: Graph, t: list[Tensor]) -> Tensor:
        g.set_rows(table, t[0], t[1])
        return g.get_rows(table, t[2])

    result = compute(device, op, A, ids, np.array([5, 3, 4], np.int32))
    assert np.array_equal(result, np.stack([A[2], np.zeros(64), A[0]]))
    arena.close()


def test_only_one_graph_has_memory_and_the_other_gets_it_back(device: Device) -> None:
    graphs = [Graph(device, 8) for _ in range(2)]
    pairs = []
    for factor, graph in enumerate(graphs, 2):
        x = graph.input("x", F32, 64)
        pairs.append((x, graph.output(graph.scale(x, factor))))
    for turn in (0, 1, 0):
        graphs[turn].allocate()
        pairs[turn][0].write(A[0])
        graphs[turn].compute()
        assert np.array_equal(pairs[turn][1].numpy(), A[0] * np.float32(turn + 2))
    for graph in graphs:
        graph.close()


def test_shapes_that_do_not_fit_never_reach_c(device: Device) -> None:
    g = Graph(device, 8)
    a, b = g.input("a", F32, 64, 5), g.input("b", F32, 48, 5)
    for call in (
        lambda: g.mul_mat(a, b),
        lambda: g.add(a, b),
        lambda: g.reshape(a, 7),
        lambda: g.slice(a, 1, 3, 9),
        lambda: g.concat(a, b),
        lambda: g.top_k(a, 65),
    ):
        with pytest.raises(AssertionError):
            call()
    g.close()
