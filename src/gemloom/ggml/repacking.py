"""The CPU's own layouts of weights, which are faster; products alone can read them."""

from __future__ import annotations

import ctypes
from itertools import takewhile
from typing import Any

import ggml
from gguf.constants import GGMLQuantizationType

from gemloom.ggml.arena import Arena
from gemloom.ggml.device import Device
from gemloom.ggml.probing import product


class Repacking:
    """Finds for each kind of matrix the layout that this CPU has for it, if any."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._known: dict[tuple[GGMLQuantizationType, tuple[int, ...]], Any] = {}

    def buffer_type(self, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> Any:
        """The buffer type whose kernels are faster for such a matrix, or None."""
        if len(shape) < 2 or shape[1] % 16:
            return None
        probe = (shape[0], 32 if shape[1] % 32 == 0 else 16, 2)[: len(shape)]
        if (kind, probe) not in self._known:
            self._known[kind, probe] = self._find(kind, probe)
        return self._known[kind, probe]

    def _find(self, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> Any:
        """Ask each extra buffer type of the CPU with a small matrix of the kind."""
        cpu = self._device.cpu
        registry = ggml.ggml_backend_dev_backend_reg(cpu)
        name = b"ggml_backend_dev_get_extra_bufts"
        address = ggml.ggml_backend_reg_get_proc_address(registry, name)
        if not address:
            return None
        pointers = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        for buffer_type in takewhile(bool, pointers(cpu)):
            arena = Arena(self._device, 8, buffer_type)
            w = arena.tensor("w", kind, shape)
            arena.allocate("a probe")
            node = product(arena.context, w)
            supported = bool(ggml.ggml_backend_dev_supports_op(cpu, node))
            arena.close()
            if supported:
                return buffer_type
        return None
