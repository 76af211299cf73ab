"""The CPU once or twice more, as devices "cpu0" and "cpu1": several backends without a GPU.

Their memory is the host's, so nothing is copied between them; all else is as with real devices:
arenas, splits of the graph, K/V cells by layer, and what each is said to lack.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import ggml
import numpy as np
import pytest

from gemloom.ggml import backends
from gemloom.ggml.backends import Found
from gemloom.ggml.device import Device

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
