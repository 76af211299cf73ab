"""An adapter's factors in ggml memory of their own, laid out as the products want them.

For ggml all are f32: factors of f16 were no faster there, and the activations that meet them
would be cut to f16, whose range Gemma's feed-forward parts can leave. Our own kernels take f16 as
it is in the file, half the bytes to read. They lie where the product with their matrix runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemloom.adapters.lora import Lora, Pair
from gemloom.ggml.arena import Arena
from gemloom.ggml.device import Device, Tensor
from gemloom.ggml.graph import F16, F32
from gemloom.placement import TABLES, Placement

_SLICE = 1 << 18  # elements that are converted at once: they stay in a core's cache


@dataclass(frozen=True, slots=True)
class Factors:
    """Of one matrix W [k, m]: a [k, r] and b, f32 or f16; their product is to be scaled.

    b is [m, r], so that sums run along m; but [r, m] of a table, of which rows are picked, and
    where there are devices, which are as fast with that. Of an expert matrix [k, m, n_expert] they
    are [k, r, n_expert] and [r, m, n_expert].
    """

    a: Tensor
    b: Tensor
    scale: float  # 1 where it is in a already


class Loaded:
    """A version of an adapter, ready to be computed with. ``close()`` frees it."""

    def __init__(
        self, device: Device, placement: Placement, name: str, version: int, lora: Lora
    ) -> None:
        """Copy the factors. DeviceError where there is no memory for them."""
        self.name, self.version, self.invocation = name, version, lora.invocation
        self.rank = max(pair.rank for pair in lora.pairs.values())
        self._own, self.upright = device.kernels is not None, device.on_host
        self._where = {matrix: placement.product(matrix) for matrix in lora.pairs}
        self._arenas = {
            index: Arena(device, 2 * len(lora.pairs), weights=True, where=index)
            for index in set(self._where.values())
        }
        try:
            self.pairs = {
                matrix: self._factors(matrix, pair) for matrix, pair in lora.pairs.items()
            }
            for arena in self._arenas.values():
                arena.allocate(f"the adapter {name}")
            copier = _Copier(max(max(*p.a.shape, *p.b.shape) for p in lora.pairs.values()))
            for matrix, pair in lora.pairs.items():
                factors = self.pairs[matrix]
                copier.copy(pair.a, factors.a, pair.scale / factors.scale)
                copier.copy(self._turned(matrix, pair), factors.b)
        except BaseException:
            self.close()
            raise

    def _factors(self, name: str, pair: Pair) -> Factors:
        arena = self._arenas[self._where[name]]
        product = self._own and name not in TABLES and pair.a.ndim == 2
        kind = F16 if product and pair.a.dtype == pair.b.dtype == np.float16 else F32

        def tensor(which: str, array: np.ndarray) -> Tensor:
            return arena.tensor(f"{name}.{which}", kind, array.shape[::-1])

        scale = pair.scale if kind == F16 and pair.scale else 1.0
        return Factors(tensor("a", pair.a), tensor("b", self._turned(name, pair)), scale)

    def _turned(self, name: str, pair: Pair) -> np.ndarray:
        """B as it is to lie in memory, slowest dimension first."""
        as_it_is = name in TABLES or pair.b.ndim == 3 or not self.upright
        return pair.b if as_it_is else pair.b.T

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(arena.bytes_allocated for arena in self._arenas.values())

    def close(self) -> None:
        """Free it; no graph with it may be computed any more."""
        for arena in self._arenas.values():
            arena.close()


class _Copier:
    """Copies arrays of any float type into tensors of f32 or f16, slice by slice."""

    def __init__(self, longest: int) -> None:
        self._buffer = np.empty(max(_SLICE, longest), np.float32)

    def copy(self, array: np.ndarray, tensor: Tensor, factor: float = 1.0) -> None:
        """Write the array, times ``factor``."""
        buffer = self._buffer.view(np.float16 if tensor.type == F16 else np.float32)
        flat = array.reshape(-1, array.shape[-1]) if array.ndim == 3 else array
        step, offset = buffer.size // flat.shape[1], 0
        for start in range(0, len(flat), step):
            part = flat[start : start + step]
            wide = buffer[: part.size].reshape(part.shape)
            np.copyto(wide, part, casting="same_kind")
            if factor != 1:
                np.multiply(wide, factor, out=wide)
            tensor.write(wide, offset)
            offset += wide.nbytes
