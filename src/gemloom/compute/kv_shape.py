"""K/V cells in numbers: how many there are, where a position lies, which cells a row sees.

A full layer has one cell a position. A sliding layer has a ring: position p lies in cell
p mod ring. The ring holds the window and one chunk more, so that a chunk can be written whole
before its first row reads. Pure: the bytes are in ``kv_store.py``, the graph's part in ``kv.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemloom.models.config import Config, Kind, LayerSpec

KV_TYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
# Cells are read in steps of this many, so that a graph serves as many positions. CUDA's attention
# takes heads of 512 with no other numbers of them, and those of 256 slower.
PAD = 256


@dataclass(frozen=True, slots=True)
class Extent:
    """A number of cells for each kind of layer: those of a slot, or those that a step reads."""

    full: int
    sliding: int

    def of(self, kind: Kind) -> int:
        """The number for one kind of layer."""
        return self.sliding if kind is Kind.SLIDING else self.full


def slot_cells(config: Config, context: int, chunk: int) -> Extent:
    """The cells of one slot that holds ``context`` positions and is filled ``chunk`` at a time."""
    full = -(-context // PAD) * PAD
    ring = -(-(config.window + chunk) // 32) * 32
    return Extent(full, min(full, ring))


def layer_cell_bytes(spec: LayerSpec, kv_type: str) -> int:
    """Bytes that one cell takes in a layer, K and V; 0 where it reads another's."""
    block, nbytes = GGML_QUANT_SIZES[KV_TYPES[kv_type]]
    return 2 * (spec.head_dim * spec.n_kv // block * nbytes) if spec.owns_kv else 0


def cell_bytes(config: Config, kv_type: str, kind: Kind) -> int:
    """Bytes that one cell takes in all layers of a kind together, K and V."""
    return sum(layer_cell_bytes(spec, kv_type) for spec in config.layers if spec.kind is kind)


@dataclass(frozen=True, slots=True)
class KVShape:
    """The cells of a model: ``slots`` of them, each with ``cells`` and filled ``chunk`` at a time.

    ``window`` is how many positions a row of a sliding layer sees.
    """

    slots: int
    cells: Extent
    window: int
    chunk: int

    def extent(self, end: int) -> Extent:
        """Cells to read when a slot holds ``end`` positions, padded so that graphs fit longer."""
        padded = -(-end // PAD) * PAD
        return Extent(min(self.cells.full, padded), min(self.cells.sliding, padded))

    def indices(self, slot: int | np.ndarray, positions: np.ndarray, kind: Kind) -> np.ndarray:
        """The rows of a store where a slot, or one for each, keeps these positions; i64."""
        cells = self.cells.of(kind)
        return (positions % cells).astype(np.int64) + slot * cells

    def visible(
        self, positions: np.ndarray, until: np.ndarray, end: int, cells: int, kind: Kind
    ) -> np.ndarray:
        """bool [rows, cells]: which of a slot's first ``cells`` each row sees.

        The slot holds ``end`` positions. A row sees positions up to its ``until``, which is its
        own position in causal attention. On a sliding layer those must be in its window too.
        """
        held = np.arange(cells)
        if kind is Kind.FULL:
            return held[None, :] <= until[:, None]
        held = (end - 1) - (end - 1 - held) % self.cells.sliding  # the position in each cell
        age = positions[:, None] - held[None, :]
        return (held >= 0)[None, :] & (held[None, :] <= until[:, None]) & (age < self.window)

    def rows(self, slot: int, start: int, end: int, kind: Kind) -> list[tuple[int, int]]:
        """Where a store has a slot's positions ``start`` to ``end``: (first row, rows), in order.

        Two pieces where they go round a ring's end.
        """
        cells = self.cells.of(kind)
        first, n = start % cells, max(0, end - start)
        head = min(n, cells - first)
        rows = [(slot * cells + first, head), (slot * cells, n - head)]
        return [(row, n) for row, n in rows if n]

    def window_rows(self, slot: int, end: int) -> list[tuple[int, int]]:
        """As ``rows``, of a sliding layer's window before position ``end``."""
        start = max(0, end - min(self.window, self.cells.sliding))
        return self.rows(slot, start, end, Kind.SLIDING)
