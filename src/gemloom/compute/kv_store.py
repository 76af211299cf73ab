"""The bytes of K/V cells: one store per layer that owns K/V, of a size fixed at load.

Where a position lies is in ``kv_shape.py``; which sequence sits in which slot is in ``slots.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gguf.constants import GGMLQuantizationType

from gemloom.compute.kv_shape import KV_TYPES, KVShape, slot_cells
from gemloom.compute.placement import Placement
from gemloom.ggml.arena import Arena
from gemloom.ggml.device import Device, Tensor
from gemloom.models.config import Config, Kind, LayerSpec


class Store(NamedTuple):
    """The cells of one layer, of all slots: K and V [head_dim * n_kv, cells * slots]."""

    k: Tensor
    v: Tensor


class KVStore:
    """The stores of all layers. ``close()`` frees them. DeviceError where memory is short."""

    def __init__(
        self, device: Device, config: Config, slots: int, chunk: int, placement: Placement, *,
        allocate: bool = True,
    ) -> None:  # fmt: skip
        """Without ``allocate`` they have no memory: graphs can be judged by them, not run."""
        context, self.kv_type = placement.choice.context, placement.choice.kv_type
        self.shape = KVShape(slots, slot_cells(config, context, chunk), config.window, chunk)
        self._specs = [spec for spec in config.layers if spec.owns_kv]
        self._where = placement.cells
        self._arenas = {
            index: Arena(device, 2 * len(self._specs), where=index)
            for index in {placement.cells[spec.index] for spec in self._specs}
        }
        self._stores = {
            spec.index: self._store(spec, KV_TYPES[self.kv_type]) for spec in self._specs
        }
        self._ends = [0] * slots  # of the positions that may have left something in a slot's cells
        try:
            for arena in self._arenas.values() if allocate else ():
                arena.allocate(f"the K/V cells of {slots} x {context:,} positions")
        except BaseException:
            self.close()
            raise

    def _store(self, spec: LayerSpec, kind: GGMLQuantizationType) -> Store:
        arena = self._arenas[self.where(spec)]
        shape = (spec.head_dim * spec.n_kv, self.shape.cells.of(spec.kind) * self.shape.slots)
        return Store(
            arena.tensor(f"cache.{spec.index}.k", kind, shape),
            arena.tensor(f"cache.{spec.index}.v", kind, shape),
        )

    def of(self, spec: LayerSpec) -> Store:
        """The cells that a layer reads: its own, or its owner's."""
        return self._stores[spec.kv_owner]

    def where(self, spec: LayerSpec) -> int:
        """The device that has the cells a layer reads."""
        return self._where[spec.kv_owner]

    def nbytes(self, kind: Kind) -> int:
        """Memory of one kind of layer, in bytes."""
        stores = (self.of(spec) for spec in self._specs if spec.kind is kind)
        return sum(store.k.nbytes + store.v.nbytes for store in stores)

    def close(self) -> None:
        """Free the cells."""
        for arena in self._arenas.values():
            arena.close()

    # -- what a slot holds -------------------------------------------------------------------

    def mark(self, slot: int, end: int) -> None:
        """Note that positions before ``end`` are being written to a slot."""
        self._ends[slot] = max(self._ends[slot], end)

    def clear(self, slot: int, start: int) -> None:
        """Zero what another sequence left in a slot, from position ``start`` on.

        These cells are masked. But they may hold NaN after an overflow, and 0 x NaN would leak
        through the mask.
        """
        end, self._ends[slot] = self._ends[slot], min(self._ends[slot], start)
        for spec in self._specs:
            first = max(start, end - self.shape.cells.of(spec.kind))
            for row, n in self.shape.rows(slot, first, end, spec.kind):
                for tensor in self.of(spec):
                    tensor.clear(row * tensor.strides[1], n * tensor.strides[1])

    def _used(self, spec: LayerSpec, count: int) -> int:
        return min(count, self.shape.cells.of(spec.kind))

    def export_sizes(self, count: int) -> list[int]:
        """Bytes of each part of the state of a slot that holds ``count`` positions."""
        return [
            self._used(spec, count) * tensor.strides[1]
            for spec in self._specs
            for tensor in self.of(spec)
        ]

    def export(self, slot: int, count: int) -> Iterator[bytearray]:
        """The cells of a slot that holds ``count`` positions: K and V of each owning layer."""
        for spec in self._specs:
            for tensor in self.of(spec):
                first = slot * self.shape.cells.of(spec.kind) * tensor.strides[1]
                yield tensor.read(first, self._used(spec, count) * tensor.strides[1])

    def restore(self, slot: int, count: int, data: memoryview) -> None:
        """Put back what ``export`` gave."""
        self.mark(slot, count)
        for spec in self._specs:
            for tensor in self.of(spec):
                size = self._used(spec, count) * tensor.strides[1]
                first = slot * self.shape.cells.of(spec.kind) * tensor.strides[1]
                tensor.write(data[:size], first)
                data = data[size:]

    @property
    def window_bytes(self) -> int:
        """Bytes of a whole window, as ``window_before`` gives it."""
        rows = min(self.shape.window, self.shape.cells.sliding)
        return sum(rows * tensor.strides[1] for tensor in self._tensors(Kind.SLIDING))

    def window_before(self, slot: int, end: int) -> bytes:
        """The sliding cells of the window's positions before ``end``, K and V of each layer."""
        return b"".join(
            tensor.read(row * tensor.strides[1], n * tensor.strides[1])
            for tensor in self._tensors(Kind.SLIDING)
            for row, n in self.shape.window_rows(slot, end)
        )

    def restore_window(self, slot: int, end: int, data: bytes) -> None:
        """Put back what ``window_before`` gave for the same ``end``, from this slot or another."""
        self.mark(slot, end)
        view = memoryview(data)
        for tensor in self._tensors(Kind.SLIDING):
            for row, n in self.shape.window_rows(slot, end):
                tensor.write(view[: n * tensor.strides[1]], row * tensor.strides[1])
                view = view[n * tensor.strides[1] :]

    def copy_full(self, source: int, to: int, count: int) -> None:
        """Copy the first ``count`` cells of every full layer from one slot to another."""
        self.mark(to, count)
        for tensor in self._tensors(Kind.FULL):
            size = self.shape.cells.full * tensor.strides[1]
            cells = tensor.read(source * size, count * tensor.strides[1])
            tensor.write(memoryview(cells), to * size)

    def _tensors(self, kind: Kind) -> Iterator[Tensor]:
        return (t for spec in self._specs if spec.kind is kind for t in self.of(spec))
