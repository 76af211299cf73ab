"""Each model computes with the kernels it was loaded with, whatever others run in the process."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

import gemloom
from conftest import Load, prompt
from gemloom.ggml.device import Device, Tensor
from gemloom.ggml.graph import F32, Graph
from gemloom.kernels.library import TYPES, Library, supported

pytestmark = pytest.mark.skipif(not supported(), reason="no kernels of our own were built")

FLOATS = ctypes.POINTER(ctypes.c_float)
GELU_MUL = ctypes.CFUNCTYPE(None, FLOATS, FLOATS, ctypes.c_int64, FLOATS)


class Table(ctypes.Structure):
    """struct Kernels of native/types.h."""

    _fields_ = [
        ("name", ctypes.c_char_p), ("product", ctypes.c_void_p * len(TYPES)),
        ("quantize", ctypes.c_void_p), ("attention", ctypes.c_void_p * 8),
        ("norm", ctypes.c_void_p), ("gelu_mul", GELU_MUL), ("delta", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
    ]  # fmt: skip


@GELU_MUL
def _no_gelu(_gate: object, up: object, n: int, y: object) -> None:
    """What is easily told from the real one: ``up`` as it is."""
    ctypes.memmove(y, up, 4 * n)  # type: ignore[arg-type]


def _without_gelu() -> Library:
    """The fastest kernels but for one."""
    other = copy.copy(supported()[0])
    table = Table.from_buffer_copy((ctypes.c_char * ctypes.sizeof(Table)).from_address(other.table))
    table.gelu_mul = _no_gelu
    other.name, other.table, other.kept = "other", ctypes.addressof(table), table  # type: ignore[attr-defined]
    return other


def others() -> Iterator[Library]:
    """Kernels that give other bits than the fastest: one everywhere, and what the CPU has."""
    if supported():
        yield _without_gelu()
        yield from supported()[1:]


different = pytest.mark.parametrize("other", others(), ids=lambda library: library.name)


@different
def test_models_with_other_kernels_alternate(
    load: Load, monkeypatch: pytest.MonkeyPatch, other: Library
) -> None:
    """Each gives the bits that it gives alone."""

    def make(library: Library) -> gemloom.Model:
        monkeypatch.setattr("gemloom.kernels.library.supported", lambda: (library,))
        return load("e2b_wide", forms={"types": "q4_k"}, threads=2)

    ids = prompt(8)
    first = make(supported()[0])
    alone = first.logits(ids)
    second = make(other)
    theirs = second.logits(ids)
    assert not np.array_equal(alone, theirs)
    for _ in range(2):
        assert np.array_equal(first.logits(ids), alone)
        assert np.array_equal(second.logits(ids), theirs)


def test_graphs_of_two_devices_alternate() -> None:
    """Graphs that are there at once, made in one order and computed in both."""
    gate, up = np.random.default_rng(5).standard_normal((2, 3, 64), np.float32)
    made = [_graph(library) for library in (supported()[0], _without_gelu())]
    for index in (0, 1, 0):
        device, graph, inputs, out = made[index]
        graph.allocate()
        for tensor, data in zip(inputs, (gate, up), strict=True):
            tensor.write(data)
        graph.compute()
        assert np.array_equal(out.numpy(), up) == (index == 1)
    for device, graph, *_ in made:
        graph.close()
        device.close()


def _graph(library: Library) -> tuple[Device, Graph, list[Tensor], Tensor]:
    device = Device("cpu", threads=1, max_nodes=64, kernels=library)
    graph = Graph(device, 64)
    inputs = [graph.input(name, F32, 64, 3) for name in ("gate", "up")]
    return device, graph, inputs, graph.output(graph.gelu_mul(*inputs))
