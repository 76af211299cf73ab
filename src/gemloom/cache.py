"""K/V cells: one store per layer that owns K/V, of a size fixed at load.

A full layer has one cell a position. A sliding layer has a ring: position p lies in cell
p mod ring, and the ring holds the window and one chunk more, so that a chunk may be written
whole before its first row reads. Which cells a row may see is in the masks (``Span``); which
sequence sits in which slot is decided elsewhere (``slots.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType

from gemloom.adapters.delta import Delta
from gemloom.config import Config, LayerSpec
from gemloom.ggml.arena import Arena
from gemloom.ggml.device import Device, Tensor, contiguous_strides
from gemloom.ggml.graph import Graph
from gemloom.kernels.operations import attention, serves_attention
from gemloom.placement import Placement

KV_TYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
Rotate = Callable[[Tensor], Tensor]
# Cells are read in steps of this many, so that a graph serves as many positions. CUDA's attention
# takes heads of 512 with no other numbers of them, and those of 256 slower.
PAD = 256


@dataclass(frozen=True, slots=True)
class Extent:
    """How many cells a slot has, and how many of them a step reads; by kind of layer."""

    full: int
    sliding: int

    def of(self, sliding: bool) -> int:
        """The number for one kind of layer."""
        return self.sliding if sliding else self.full


@dataclass(frozen=True, slots=True)
class Span:
    """The rows ``first`` to ``first + count`` of a step: one sequence's, with what they see."""

    slot: int
    first: int
    count: int
    cells: Extent  # cells read
    full_mask: Tensor  # f16 [cells.full, count]
    sliding_mask: Tensor  # f16 [cells.sliding, count]

    def mask(self, sliding: bool) -> Tensor:
        """The mask for one kind of layer."""
        return self.sliding_mask if sliding else self.full_mask


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that pass through a layer together, and the graph inputs that describe them."""

    tokens: Tensor  # i32 [n]
    positions: Tensor  # i32 [n]
    spans: tuple[Span, ...]
    full_cells: Tensor | None = None  # i64 [n], where K/V go; None for rows that write none
    sliding_cells: Tensor | None = None
    source: Tensor | None = None  # i32 [n], which of the step's rows these are; None: all
    deltas: tuple[Delta, ...] = ()  # what adapters add, each on some of these rows

    @property
    def of_step(self) -> Tensor:
        """i32 [n]: which of the step's rows these are."""
        assert self.source is not None
        return self.source

    @property
    def count(self) -> int:
        """How many rows."""
        return self.tokens.shape[0]


def slot_cells(config: Config, context: int, chunk: int) -> Extent:
    """The cells of one slot that holds ``context`` positions and is filled ``chunk`` at a time."""
    full = -(-context // PAD) * PAD
    ring = -(-(config.window + chunk) // 32) * 32
    return Extent(full, min(full, ring))


def layer_cell_bytes(spec: LayerSpec, kv_type: str) -> int:
    """Bytes that one cell takes in a layer, K and V; 0 where it reads another's."""
    size = spec.head_dim * spec.n_kv if spec.owns_kv else 0
    return 2 * contiguous_strides(KV_TYPES[kv_type], (size, 1))[1]


def cell_bytes(config: Config, kv_type: str, sliding: bool) -> int:
    """Bytes that one cell takes in all layers of a kind together, K and V."""
    return sum(layer_cell_bytes(s, kv_type) for s in config.layers if s.sliding == sliding)


class _Store(NamedTuple):
    k: Tensor  # [head_dim * n_kv, cells * slots]
    v: Tensor


class KVCache:
    """All stores. ``close()`` frees them. DeviceError where there is no memory for them."""

    def __init__(
        self, device: Device, config: Config, slots: int, chunk: int, placement: Placement, *,
        allocate: bool = True,
    ) -> None:  # fmt: skip
        """Without ``allocate`` they have no memory, and graphs can only be judged by them."""
        context, kv_type = placement.choice.context, placement.choice.kv_type
        self.slots, self.window, self.chunk, self.kv_type = slots, config.window, chunk, kv_type
        self.cells = slot_cells(config, context, chunk)
        self._specs = [spec for spec in config.layers if spec.owns_kv]
        self._where = [placement.cells[spec.kv_owner] for spec in config.layers]
        self._arenas = {
            index: Arena(device, 2 * len(self._specs), where=index) for index in set(self._where)
        }
        self._stores = {spec.index: self._store(spec, KV_TYPES[kv_type]) for spec in self._specs}
        self._ends = [0] * slots  # of the positions that may have left something in a slot's cells
        try:
            for arena in self._arenas.values() if allocate else ():
                arena.allocate(f"the K/V cells of {slots} x {context:,} positions")
        except BaseException:
            self.close()
            raise

    def _store(self, spec: LayerSpec, kind: GGMLQuantizationType) -> _Store:
        arena = self._arenas[self._where[spec.index]]
        shape = (spec.head_dim * spec.n_kv, self.cells.of(spec.sliding) * self.slots)
        return _Store(
            arena.tensor(f"cache.{spec.index}.k", kind, shape),
            arena.tensor(f"cache.{spec.index}.v", kind, shape),
        )

    def nbytes(self, sliding: bool) -> int:
        """Memory of one kind of layer, in bytes."""
        stores = (self._stores[spec.index] for spec in self._specs if spec.sliding == sliding)
        return sum(store.k.nbytes + store.v.nbytes for store in stores)

    def close(self) -> None:
        """Free the cells."""
        for arena in self._arenas.values():
            arena.close()

    # -- numbers for the inputs of a graph ---------------------------------------------------

    def extent(self, end: int) -> Extent:
        """Cells to read when a slot holds ``end`` positions, padded so that graphs fit longer."""
        padded = -(-end // PAD) * PAD
        return Extent(min(self.cells.full, padded), min(self.cells.sliding, padded))

    def indices(self, slot: int | np.ndarray, positions: np.ndarray, sliding: bool) -> np.ndarray:
        """The rows of a store where a slot, or one for each, keeps these positions; i64."""
        cells = self.cells.of(sliding)
        return (positions % cells if sliding else positions).astype(np.int64) + slot * cells

    def visible(self, positions: np.ndarray, end: int, cells: int, sliding: bool) -> np.ndarray:
        """bool [n, cells]: which cells rows at ``positions`` see once ``end`` are written."""
        held = np.arange(cells)
        if not sliding:
            return held[None, :] <= positions[:, None]
        held = (end - 1) - (end - 1 - held) % self.cells.sliding  # the position in each cell
        age = positions[:, None] - held[None, :]
        return (held >= 0)[None, :] & (age >= 0) & (age < self.window)

    # -- what a slot holds -------------------------------------------------------------------

    def mark(self, slot: int, end: int) -> None:
        """Take note that positions before ``end`` are being written to a slot."""
        self._ends[slot] = max(self._ends[slot], end)

    def clear(self, slot: int, start: int) -> None:
        """Clear what another sequence left in a slot, of positions from ``start`` on.

        No row sees it. But where that sequence's activations overflowed it is no number, and such
        times a hidden cell's weight of 0 is no number either.
        """
        end, self._ends[slot] = self._ends[slot], min(self._ends[slot], start)
        for spec in self._specs:
            first = max(start, end - self.cells.of(spec.sliding))
            for row, n in self._rows(slot, first, end, spec.sliding):
                for store in self._stores[spec.index]:
                    store.clear(row * store.strides[1], n * store.strides[1])

    def _used(self, spec: LayerSpec, count: int) -> int:
        return min(count, self.cells.of(spec.sliding))

    def export_sizes(self, count: int) -> list[int]:
        """Bytes of each part of the state of a slot that holds ``count`` positions."""
        return [
            self._used(spec, count) * store.strides[1]
            for spec in self._specs
            for store in self._stores[spec.index]
        ]

    def export(self, slot: int, count: int) -> Iterator[bytearray]:
        """The cells of a slot that holds ``count`` positions: K and V of each owning layer."""
        for spec in self._specs:
            for store in self._stores[spec.index]:
                first = slot * self.cells.of(spec.sliding) * store.strides[1]
                yield store.read(first, self._used(spec, count) * store.strides[1])

    def restore(self, slot: int, count: int, data: memoryview) -> None:
        """Put back what ``export`` gave."""
        self.mark(slot, count)
        for spec in self._specs:
            for store in self._stores[spec.index]:
                size = self._used(spec, count) * store.strides[1]
                store.write(data[:size], slot * self.cells.of(spec.sliding) * store.strides[1])
                data = data[size:]

    @property
    def window_bytes(self) -> int:
        """Bytes of a whole window, as ``window_before`` gives it."""
        rows = min(self.window, self.cells.sliding)
        return sum(rows * store.strides[1] for store in self._sliding())

    def window_before(self, slot: int, end: int) -> bytes:
        """The sliding cells of the window's positions before ``end``, K and V of each layer."""
        return b"".join(
            store.read(row * store.strides[1], n * store.strides[1])
            for store in self._sliding()
            for row, n in self._window_rows(slot, end)
        )

    def restore_window(self, slot: int, end: int, data: bytes) -> None:
        """Put back what ``window_before`` gave for the same ``end``, from this slot or another."""
        self.mark(slot, end)
        view = memoryview(data)
        for store in self._sliding():
            for row, n in self._window_rows(slot, end):
                store.write(view[: n * store.strides[1]], row * store.strides[1])
                view = view[n * store.strides[1] :]

    def copy_full(self, source: int, to: int, count: int) -> None:
        """Copy the first ``count`` cells of every full layer from one slot to another."""
        self.mark(to, count)
        for spec in self._specs:
            if not spec.sliding:
                for store in self._stores[spec.index]:
                    size = self.cells.full * store.strides[1]
                    cells = store.read(source * size, count * store.strides[1])
                    store.write(memoryview(cells), to * size)

    def _sliding(self) -> Iterator[Tensor]:
        return (t for spec in self._specs if spec.sliding for t in self._stores[spec.index])

    def _window_rows(self, slot: int, end: int) -> list[tuple[int, int]]:
        """Where the window before ``end`` lies in a sliding store: (first row, rows), in order."""
        start = max(0, end - min(self.window, self.cells.sliding))
        return self._rows(slot, start, end, sliding=True)

    def _rows(self, slot: int, start: int, end: int, sliding: bool) -> list[tuple[int, int]]:
        """Where a store has positions ``start`` to ``end``: (first row, rows), in order."""
        cells = self.cells.of(sliding)
        first, n = start % cells, max(0, end - start)
        head = min(n, cells - first)
        rows = [(slot * cells + first, head), (slot * cells, n - head)]
        return [(row, n) for row, n in rows if n]

    # -- graph -------------------------------------------------------------------------------

    def write(self, g: Graph, spec: LayerSpec, rows: Rows, k: Tensor, v: Tensor) -> None:
        """Store k and v [head_dim, n_kv, n] of ``rows`` before any later read."""
        store, size = self._stores[spec.index], spec.head_dim * spec.n_kv
        cells = rows.sliding_cells if spec.sliding else rows.full_cells
        assert cells is not None
        with g.on(self._where[spec.index]):
            g.set_rows(store.k, g.reshape(k, size, rows.count), cells)
            g.set_rows(store.v, g.reshape(v, size, rows.count), cells)

    def attend(self, g: Graph, spec: LayerSpec, rows: Rows, q: Tensor, scale: float) -> Tensor:
        """q [head_dim, n_head, n] -> [head_dim * n_head, n]: each span over its own cells.

        That is done where the cells are, which take longer to move than q.
        """
        with g.on(self._where[spec.index]):
            return reduce(g.concat, self._attend(g, spec, rows, q, scale))

    def _attend(
        self, g: Graph, spec: LayerSpec, rows: Rows, q: Tensor, scale: float
    ) -> Iterator[Tensor]:
        for span in rows.spans:
            part = g.slice(q, 2, span.first, span.first + span.count)
            (k, v), mask = self._read(g, spec, span), span.mask(spec.sliding)
            if serves_attention(g, k):
                yield attention(g, part, k, v, mask, scale)
            else:
                yield g.attention(g.swap(part), k, v, mask, scale)

    def move(self, g: Graph, spec: LayerSpec, rotate: Rotate, source: Tensor, to: Tensor) -> None:
        """Copy cells i32 ``source`` [n] to i64 ``to`` [n], K through ``rotate`` [hd, KV, n]."""
        store, size = self._stores[spec.index], spec.head_dim * spec.n_kv
        n = source.shape[0]
        with g.on(self._where[spec.index]):
            k = rotate(g.reshape(g.get_rows(store.k, source), spec.head_dim, spec.n_kv, n))
            v = g.get_rows(store.v, source)
            g.set_rows(store.k, g.reshape(k, size, n), to)
            g.set_rows(store.v, v, to)

    def _read(self, g: Graph, spec: LayerSpec, span: Span) -> tuple[Tensor, Tensor]:
        """K and V of a span's slot, [head_dim, cells, n_kv], in place."""
        store = self._stores[spec.kv_owner]
        first = span.slot * self.cells.of(spec.sliding)
        cells = span.cells.of(spec.sliding)
        head = g.row_bytes(store.k.type, spec.head_dim)

        def heads(x: Tensor) -> Tensor:
            strides = (x.strides[0], x.strides[1], head)
            return g.view(x, (spec.head_dim, cells, spec.n_kv), strides, first * x.strides[1])

        return heads(store.k), heads(store.v)
