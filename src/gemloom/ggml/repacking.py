"""The CPU's own layouts of weights, which are faster; products alone can read them."""

from __future__ import annotations

import ctypes
from itertools import takewhile
from typing import Any

import ggml
from gguf.constants import GGMLQuantizationType

from gemloom.ggml import trust
from gemloom.ggml.arena import Arena
from gemloom.ggml.capabilities import product
from gemloom.ggml.device import Device

# Never used, whoever built ggml: GCC 12 drops stores of the tiles' configuration, and whether that
# ends the process or not is up to what lies on the stack.
BARRED = frozenset({"AMX"})


def offered(cpu: Any) -> dict[str, Any]:
    """The buffer types that ggml's CPU has beside plain memory, by name, the fastest first."""
    registry = ggml.ggml_backend_dev_backend_reg(cpu)
    name = b"ggml_backend_dev_get_extra_bufts"
    address = ggml.ggml_backend_reg_get_proc_address(registry, name)
    if not address:
        return {}
    pointers = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    return {_name(pointer): pointer for pointer in takewhile(bool, pointers(cpu))}


def _name(buffer_type: Any) -> str:
    return str(ggml.ggml_backend_buft_name(buffer_type).decode()).replace(" ", "_")


def takes(
    device: Device, buffer_type: Any, kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> bool:
    """Whether ggml says that it multiplies with such a matrix there."""
    arena = Arena(device, 8, buffer_type)
    w = arena.tensor("w", kind, shape)
    arena.allocate("a probe")
    node = product(arena.context, w)
    supported = bool(ggml.ggml_backend_dev_supports_op(device.cpu, node))
    arena.close()
    return supported


class Repacking:
    """Finds for each kind of matrix the layout that this CPU has for it, if any."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._known: dict[tuple[GGMLQuantizationType, tuple[int, ...]], Any] = {}

    def buffer_type(self, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> Any:
        """The buffer type whose kernels are faster for such a matrix, or None.

        Only one whose products were proven (``trust.py``), and none of ``BARRED``.
        """
        if len(shape) < 2 or shape[1] % 16:
            return None
        probe = (shape[0], 32 if shape[1] % 32 == 0 else 16, 2)[: len(shape)]
        if (kind, probe) not in self._known:
            self._known[kind, probe] = self._find(kind, probe)
        return self._known[kind, probe]

    def _find(self, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> Any:
        """Ask each with a small matrix of the kind."""
        for name, buffer_type in offered(self._device.cpu).items():
            if name in BARRED or not takes(self._device, buffer_type, kind, shape):
                continue
            if trust.proven(f"{name} {kind.name}"):
                return buffer_type
        return None
