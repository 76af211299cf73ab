"""Whether a device can compute with weights and K/V cells as a model has them.

Asked with tensors that have no memory: drivers judge by type and shape.
"""

from __future__ import annotations

from typing import Any

import ggml
from gguf.constants import GGMLQuantizationType

from gemloom.ggml.arena import Arena
from gemloom.ggml.device import Device, Tensor

_F32, _F16 = int(GGMLQuantizationType.F32), int(GGMLQuantizationType.F16)
_I32, _I64 = int(GGMLQuantizationType.I32), int(GGMLQuantizationType.I64)
Shape = tuple[int, ...]


class Probe:
    """Asks the devices of ``device``, each thing once."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._known: dict[tuple[Any, ...], bool] = {}

    def multiplies(self, kind: GGMLQuantizationType, shape: Shape) -> bool:
        """Whether all can multiply with a matrix [k, m] or experts' matrices [k, m, n_expert]."""
        key = ("product", kind, shape)
        if key not in self._known:
            arena = Arena(self._device, 8)
            w = arena.tensor("w", kind, shape)
            self._known[key] = self._all_support(product(arena.context, w))
            arena.close()
        return self._known[key]

    def attends(self, kind: GGMLQuantizationType, heads: tuple[int, int, int], cells: int) -> bool:
        """Whether all can write to K/V cells of a type, and attend to them.

        ``heads`` are head_dim, n_head and n_kv.
        """
        key = ("cells", kind, heads, cells)
        if key not in self._known:
            arena = Arena(self._device, 16)
            store = arena.tensor("k", kind, (heads[0] * heads[2], cells))
            nodes = (_written(arena.context, store), _attended(arena.context, store, heads))
            self._known[key] = _grouped(heads) and all(map(self._all_support, nodes))
            arena.close()
        return self._known[key]

    def _all_support(self, node: Any) -> bool:
        return all(self._device.supports(i, node) for i in range(self._device.host))


def _grouped(heads: tuple[int, int, int]) -> bool:
    """Whether attention is what ggml's CUDA backend has kernels for.

    With heads above 256 and two query heads to one of K/V it says so, and then aborts.
    """
    head_dim, n_head, n_kv = heads
    return head_dim <= 256 or n_head > 2 * n_kv


def product(context: Any, w: Tensor) -> Any:
    """The node that multiplies with ``w``."""
    x = ggml.ggml_new_tensor_3d(context, _F32, w.shape[0], 1, 1)
    if len(w.shape) == 2:
        return ggml.ggml_mul_mat(context, w.pointer, x)
    ids = ggml.ggml_new_tensor_2d(context, _I32, 1, 1)
    return ggml.ggml_mul_mat_id(context, w.pointer, x, ids)


def _written(context: Any, store: Tensor) -> Any:
    row = ggml.ggml_new_tensor_2d(context, _F32, store.shape[0], 1)
    return ggml.ggml_set_rows(
        context, store.pointer, row, ggml.ggml_new_tensor_1d(context, _I64, 1)
    )


def _attended(context: Any, store: Tensor, heads: tuple[int, int, int]) -> Any:
    head_dim, n_head, n_kv = heads
    cells, row = store.shape[1], store.strides[1]
    k = ggml.ggml_view_3d(context, store.pointer, head_dim, cells, n_kv, row, row // n_kv, 0)
    q = ggml.ggml_new_tensor_3d(context, _F32, head_dim, 1, n_head)
    mask = ggml.ggml_new_tensor_2d(context, _F16, cells, 1)
    return ggml.ggml_flash_attn_ext(context, q, k, k, mask, 1.0, 0.0, 0.0)
