"""The CPU once or twice more, as devices "cpu0" and "cpu1": several backends without a GPU.

Their memory is the host's, so nothing is copied between them; all else is as with real devices:
arenas, splits of the graph, K/V cells by layer, and what each is said to lack. "own0" has memory
that no other can read, and fails when a test wants it to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection
from typing import Any

import ggml
import numpy as np
import pytest

from gemloom.ggml import backends
from gemloom.ggml.backends import Found
from gemloom.ggml.device import Device

# Structures of ggml-backend-impl.h, as pointers: how many, and which is what.
_POINTER = ctypes.sizeof(ctypes.c_void_p)
_KIND, _ALLOC_BUFFER, _IS_HOST, _KIND_DEVICE = 8, 1, 5, 6
_DEVICE, _SUPPORTS_BUFT = 17, 10
_GRAPH_COMPUTE, _BACKEND_DEVICE = 13 * _POINTER, 17 * _POINTER
_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_SUPPORTS = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)
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
    """What a test lets go wrong on a device."""

    def __init__(self) -> None:
        self.most = 1 << 60  # bytes it gives a buffer
        self.buffers = 1 << 60  # how many it gives before it gives none
        self.computes = 1 << 60  # how many graphs it computes before it fails at each
        self.status = ggml.GGML_STATUS_FAILED  # then
        self.kept: list[object] = []

    def hook(self, place: ctypes.c_void_p, kind: Any, make: Callable[[Any], Any]) -> None:
        """Put what ``make`` makes of the function at a place there."""
        hooked = kind(make(kind(place.value)))
        place.value = ctypes.cast(hooked, ctypes.c_void_p).value
        self.kept.append(hooked)

    def fail(self, backend: int) -> None:
        """Let this backend of ggml's fail when it has computed enough."""

        def make(real: Callable[[int, int], int]) -> Callable[[int, int], int]:
            def compute(this: int, graph: int) -> int:
                self.computes -= 1
                return self.status if self.computes < 0 else real(this, graph)

            return compute

        self.hook(ctypes.c_void_p.from_address(backend + _GRAPH_COMPUTE), _COMPUTE, make)


def own(monkeypatch: pytest.MonkeyPatch) -> Faults:
    """Let "own0" be found besides: the CPU with memory of its own, and with faults.

    ggml copies there and back what other devices have and want, as it does for a GPU.
    """
    faults, there, start = Faults(), backends.listed(), backends.start
    cpu = ggml.ggml_backend_dev_by_type(ggml.GGML_BACKEND_DEVICE_TYPE_CPU)
    device, kind = _copy(cpu, _DEVICE), _copy(ggml.ggml_backend_dev_buffer_type(cpu), _KIND)
    address = ctypes.addressof(kind)
    faults.kept += device, kind

    def allocate(give: Callable[[int, int], int]) -> Callable[[int, int], int | None]:
        def given(this: int, size: int) -> int | None:
            faults.buffers -= 1
            return give(this, size) if size <= faults.most and faults.buffers >= 0 else None

        return given

    def begin(pointer: int, name: str) -> int:
        backend = int(start(pointer, name))
        if name == "own0":
            ctypes.c_void_p.from_address(backend + _BACKEND_DEVICE).value = ctypes.addressof(device)
            faults.fail(backend)
        return backend

    faults.hook(_at(kind, _ALLOC_BUFFER), _ALLOCATE, allocate)
    faults.hook(_at(device, _SUPPORTS_BUFT), _SUPPORTS, lambda _: lambda _, asked: asked == address)
    kind[_IS_HOST], kind[_KIND_DEVICE] = None, ctypes.addressof(device)
    own0 = Found("own0", ctypes.addressof(device), address)
    monkeypatch.setattr(backends, "listed", lambda: there | {"own0": own0})
    monkeypatch.setattr(backends, "start", begin)
    return faults


def _copy(address: int, count: int) -> ctypes.Array[ctypes.c_void_p]:
    pointers = ctypes.c_void_p * count
    return pointers(*pointers.from_address(address))


def _at(pointers: ctypes.Array[ctypes.c_void_p], index: int) -> ctypes.c_void_p:
    return ctypes.c_void_p.from_buffer(pointers, index * _POINTER)


def lack(monkeypatch: pytest.MonkeyPatch, lacking: Collection[int]) -> None:
    """Let the devices lack these operations."""
    lack_where(monkeypatch, lambda node: node.op in lacking)


def lack_where(monkeypatch: pytest.MonkeyPatch, lacks: Callable[[Any], bool]) -> None:
    """Let the devices lack the nodes, ggml's structures, of which ``lacks`` is true."""
    real = Device.supports

    def supports(device: Device, index: int, node: Any) -> bool:
        there = index == device.host or not lacks(node.contents)
        return there and real(device, index, node)

    monkeypatch.setattr(Device, "supports", supports)
