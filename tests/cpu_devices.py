"""The CPU once or twice more, as devices "cpu0" and "cpu1": several backends without a GPU.

Their memory is the host's, so nothing is copied between them; all else is as with real devices:
arenas, splits of the graph, K/V cells by layer, and what each is said to lack.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from dataclasses import replace

import ggml
import numpy as np
import pytest

from gemloom.ggml import backends
from gemloom.ggml.backends import Found
from gemloom.ggml.device import Device

_ALLOC_BUFFER = 1  # which of a buffer type's functions (ggml-backend-impl.h)
_GRAPH_COMPUTE = 13 * ctypes.sizeof(ctypes.c_void_p)  # where that function is in a backend
_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_COMPUTE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_BYTES = np.zeros(4096, np.uint8)


def add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "cpu0" and "cpu1" be found."""
    cpu = ggml.ggml_backend_dev_by_type(ggml.GGML_BACKEND_DEVICE_TYPE_CPU)
    address = -(-_BYTES.ctypes.data // 64) * 64
    mapped = ggml.ggml_backend_dev_buffer_from_host_ptr(cpu, address, 1024, 1024)
    # ggml's scheduler moves nodes between backends whose memory is of one type: so two types.
    types = (ggml.ggml_backend_buffer_get_type(mapped), ggml.ggml_backend_dev_buffer_type(cpu))
    ggml.ggml_backend_buffer_free(mapped)
    found = {f"cpu{i}": Found(f"cpu{i}", cpu, kind) for i, kind in enumerate(types)}
    monkeypatch.setattr(backends, "listed", lambda: found)


class Faults:
    """What a test lets go wrong on the device "cpu0"."""

    def __init__(self) -> None:
        self.most = 1 << 60  # bytes it gives a buffer
        self.buffers = 1 << 60  # how many it gives before it gives none
        self.computes = 1 << 60  # how many graphs it computes before it fails at each
        self.kept: list[object] = []


def scarce(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Let "cpu0", besides what ``add`` adds, have a kind of memory that ``Faults`` bounds."""
    faults, found = Faults(), backends.listed()
    real = (ctypes.c_void_p * 8).from_address(found["cpu1"].buffer_type)  # ggml's: 6 functions, ...
    mine, give = type(real)(*real), _ALLOCATE(real[_ALLOC_BUFFER])

    @_ALLOCATE
    def allocate(kind: int, size: int) -> int | None:
        faults.buffers -= 1
        if size > faults.most or faults.buffers < 0:
            return None
        return give(kind, size)  # type: ignore[no-any-return]

    mine[_ALLOC_BUFFER] = ctypes.cast(allocate, ctypes.c_void_p).value
    faults.kept += mine, allocate
    cpu0 = replace(found["cpu0"], buffer_type=ctypes.addressof(mine))
    monkeypatch.setattr(backends, "listed", lambda: found | {"cpu0": cpu0})
    return faults


def failing(
    monkeypatch: pytest.MonkeyPatch, name: str = "cpu0", status: int = ggml.GGML_STATUS_FAILED
) -> Faults:
    """Let a backend that is started fail after ``Faults.computes``."""
    faults, start = Faults(), backends.start

    def started(device: int, starting: str) -> int:
        backend = start(device, starting)
        if starting == name:
            slot = ctypes.c_void_p.from_address(backend + _GRAPH_COMPUTE)
            compute = _COMPUTE(slot.value)

            @_COMPUTE
            def maybe(backend: int, graph: int) -> int:
                faults.computes -= 1
                return status if faults.computes < 0 else compute(backend, graph)

            slot.value = ctypes.cast(maybe, ctypes.c_void_p).value
            faults.kept.append(maybe)
        return int(backend)

    monkeypatch.setattr(backends, "start", started)
    return faults


def lack(monkeypatch: pytest.MonkeyPatch, lacking: Collection[int]) -> None:
    """Let the devices lack these operations."""
    real = Device.supports

    def supports(device: Device, index: int, node: object) -> bool:
        there = index == device.host or node.contents.op not in lacking  # type: ignore[attr-defined]
        return there and real(device, index, node)

    monkeypatch.setattr(Device, "supports", supports)
