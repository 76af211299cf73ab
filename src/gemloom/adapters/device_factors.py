"""An adapter's factors in ggml memory of their own, laid out as the products want them.

For ggml all are f32: factors of f16 were no faster there, and the activations that meet them
would be cut to f16, whose range Gemma's feed-forward parts can leave. Our own kernels take f16 as
it is in the file, half the bytes to read. They lie where the product with their matrix runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemloom.adapters.factors import Lora, Pair
from gemloom.compute.placement import Placement
from gemloom.ggml.arena import Arena
from gemloom.ggml.device import Device, Tensor
from gemloom.ggml.graph import F16, F32

_SLICE = 1 << 18  # elements that are converted at once: they stay in a core's cache


@dataclass(frozen=True, slots=True)
class Factors:
    """Of one matrix W [k, m]: a [k, r] and b, f32 or f16; their product is to be scaled.

    b is [m, r], ``upright``, so that sums run along m; but [r, m] of a table, of which rows are
    picked, and on devices, which are as fast with that. Of an expert matrix [k, m, n_expert] they
    are [k, r, n_expert] and [r, m, n_expert].
    """

    a: Tensor
    b: Tensor
    scale: float  # 1 where it is in a already
    upright: bool


class Loaded:
    """A version of an adapter, ready to be computed with. ``close()`` frees it."""

    def __init__(
        self, device: Device, placement: Placement, name: str, version: int, lora: Lora
    ) -> None:
        """Copy the factors. DeviceError where there is no memory for them."""
        self.name, self.version, self.invocation = name, version, lora.invocation
        self.rank = max(pair.rank for pair in lora.pairs.values())
        self._own, self._host = device.kernels is not None, device.host
        self._placement = placement
        places = {matrix: placement.products(matrix) for matrix in lora.pairs}
        self._arenas = {
            index: Arena(device, 2 * len(lora.pairs), weights=True, where=index)
            for index in set().union(*places.values())
        }
        try:
            self.pairs = {
                matrix: {where: self._factors(matrix, pair, where) for where in places[matrix]}
                for matrix, pair in lora.pairs.items()
            }
            for arena in self._arenas.values():
                arena.allocate(f"the adapter {name}")
            copier = _Copier(max(max(*p.a.shape, *p.b.shape) for p in lora.pairs.values()))
            for matrix, pair in lora.pairs.items():
                for factors in self.pairs[matrix].values():
                    copier.copy(pair.a, factors.a, pair.scale / factors.scale)
                    copier.copy(pair.b.T if factors.upright else pair.b, factors.b)
        except BaseException:
            self.close()
            raise

    def pair(self, name: str, where: int) -> Factors | None:
        """Its factors for a matrix, as they are on the device where the product runs."""
        there = self.pairs.get(name)
        return there[where] if there else None

    def _factors(self, name: str, pair: Pair, where: int) -> Factors:
        arena = self._arenas[where]
        upright = where == self._host and not self._placement.by_row(name) and pair.a.ndim == 2
        halves = upright and self._own and pair.a.dtype == pair.b.dtype == np.float16
        kind = F16 if halves else F32

        def tensor(which: str, array: np.ndarray) -> Tensor:
            return arena.tensor(f"{name}.{which}", kind, array.shape[::-1])

        scale = pair.scale if kind == F16 and pair.scale else 1.0
        b = tensor("b", pair.b.T if upright else pair.b)
        return Factors(tensor("a", pair.a), b, scale, upright)

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
