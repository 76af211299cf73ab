"""What a batch puts into a graph: which inputs there are, and their values.

The shapes are all that a graph depends on, so they are its key; the values are written for every
step. Not here: what is computed of them (``models/``), and when (``program.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from gemloom.adapters.delta import Delta
from gemloom.adapters.device_factors import Loaded
from gemloom.adapters.request_adapters import Stretch, stretches
from gemloom.compute.batch import Batch, Chunk
from gemloom.compute.kv import KV, Rows, Span
from gemloom.compute.kv_shape import Extent, KVShape
from gemloom.compute.want import ALL, Want
from gemloom.ggml.device import Tensor
from gemloom.ggml.graph import F16, I32, I64, Graph
from gemloom.models.config import Kind


@dataclass(frozen=True, slots=True)
class Part:
    """What of a chunk decides the shape of the graph."""

    slot: int
    count: int
    wanted: int
    cells: Extent


@dataclass(frozen=True, slots=True)
class GraphKey:
    """All that a graph depends on."""

    parts: tuple[Part, ...]
    want: Want = ALL
    adapters: tuple[Stretch, ...] = ()  # on all rows
    wanted_adapters: tuple[Stretch, ...] = ()  # on those wanted


def key_of(shape: KVShape, batch: Batch, want: Want) -> GraphKey:
    """The key of the graph that computes a batch."""
    parts = tuple(
        Part(chunk.slot, len(chunk.tokens), len(chunk.wanted), shape.extent(chunk.end))
        for chunk in batch
    )
    key = GraphKey(parts, want)
    if not any(chunk.adapters for chunk in batch):
        return key
    at = [(np.arange(chunk.start, chunk.end), chunk.adapters) for chunk in batch]
    wanted = [(chunk.start + np.asarray(chunk.wanted, np.int64), chunk.adapters) for chunk in batch]
    return replace(key, adapters=stretches(at), wanted_adapters=stretches(wanted))


# -- in the graph ----------------------------------------------------------------------------


def declare(g: Graph, key: GraphKey) -> tuple[Rows, Rows | None]:
    """The inputs for all rows, and for those wanted: the same where all are, None where none is."""
    rows = _all_rows(g, key)
    if all(part.wanted == part.count for part in key.parts):
        return rows, rows
    return rows, _wanted_rows(g, key)


def _all_rows(g: Graph, key: GraphKey) -> Rows:
    n = sum(part.count for part in key.parts)
    return Rows(
        tokens=g.input("tokens", I32, n),
        positions=g.input("positions", I32, n),
        spans=_spans(g, "", [(part, part.count) for part in key.parts]),
        cells={kind: g.input(f"{kind.value}_cells", I64, n) for kind in Kind},
        deltas=_deltas(key.adapters),
    )


def _wanted_rows(g: Graph, key: GraphKey) -> Rows | None:
    n = sum(part.wanted for part in key.parts)
    if not n:
        return None
    return Rows(
        tokens=g.input("wanted_tokens", I32, n),
        positions=g.input("wanted_positions", I32, n),
        spans=_spans(g, "wanted_", [(part, part.wanted) for part in key.parts if part.wanted]),
        source=g.input("wanted_rows", I32, n),
        deltas=_deltas(key.wanted_adapters),
    )


def _spans(g: Graph, prefix: str, counts: Sequence[tuple[Part, int]]) -> tuple[Span, ...]:
    spans, first = [], 0
    for i, (part, count) in enumerate(counts):
        masks = {
            kind: g.input(f"{prefix}{kind.value}_mask.{i}", F16, part.cells.of(kind), count)
            for kind in Kind
        }
        spans.append(Span(part.slot, first, count, part.cells, masks))
        first += count
    return tuple(spans)


def _deltas(there: Sequence[Stretch]) -> tuple[Delta, ...]:
    """What is put into a graph for them; the adapters are those the registry has loaded."""
    return tuple(Delta(cast(Loaded, s.adapter), s.first, s.count) for s in there)


# -- their values ----------------------------------------------------------------------------


def write(tensor: Tensor | None, arrays: Sequence[np.ndarray]) -> None:
    """Fill an input with the arrays, one behind the other."""
    if tensor is not None and tensor.array is not None:  # else no node reads it
        tensor.array[...] = np.concatenate(arrays)


class Inputs:
    """Writes batches into graphs whose key is theirs."""

    def __init__(self, kv: KV) -> None:
        self._kv = kv
        self._foreseen: dict[tuple[int, Kind], np.ndarray] = {}  # masks of single causal rows

    def write(self, rows: Rows, wanted: Rows | None, batch: Batch, key: GraphKey) -> None:
        """Fill all inputs; ``rows`` and ``wanted`` are what ``declare`` gave for the key."""
        self._write_rows(rows, batch)
        _write_scales(rows, key.adapters)
        if wanted and wanted is not rows:
            self._write_wanted(wanted, batch)
            _write_scales(wanted, key.wanted_adapters)

    def foresee(self, batch: Batch) -> None:
        """Make the masks of the next step, if all decode on: none depends on the tokens."""
        self._foreseen = {
            (chunk.end, kind): self._mask(at, at, chunk.end + 1, kind)
            for chunk in batch
            if chunk.wanted
            for at in (np.array([chunk.end]),)
            for kind in Kind
        }

    def _write_rows(self, rows: Rows, batch: Batch) -> None:
        positions = [np.arange(chunk.start, chunk.end, dtype=np.int32) for chunk in batch]
        write(rows.tokens, [np.asarray(chunk.tokens, np.int32) for chunk in batch])
        write(rows.positions, positions)
        slots = np.repeat([c.slot for c in batch], [len(c.tokens) for c in batch])
        assert rows.cells is not None
        for kind, cells in rows.cells.items():
            write(cells, [self._kv.shape.indices(slots, np.concatenate(positions), kind)])
        self._write_masks(rows, batch, positions)

    def _write_wanted(self, rows: Rows, batch: Batch) -> None:
        chunks = [chunk for chunk in batch if chunk.wanted]
        wanted = [np.asarray(chunk.wanted, np.int32) for chunk in chunks]
        firsts = np.cumsum([0, *(len(chunk.tokens) for chunk in batch)])
        starts = [first for first, chunk in zip(firsts, batch, strict=False) if chunk.wanted]
        positions = [chunk.start + w for chunk, w in zip(chunks, wanted, strict=True)]
        tokens = [np.asarray(c.tokens, np.int32)[w] for c, w in zip(chunks, wanted, strict=True)]
        write(rows.tokens, tokens)
        write(rows.positions, positions)
        write(rows.source, [w + s for w, s in zip(wanted, starts, strict=True)])
        self._write_masks(rows, chunks, positions)

    def _write_masks(
        self, rows: Rows, chunks: Sequence[Chunk], positions: Sequence[np.ndarray]
    ) -> None:
        for span, chunk, at in zip(rows.spans, chunks, positions, strict=True):
            for kind, mask in span.masks.items():
                write(mask, [self._seen(chunk, at, kind)])

    def _seen(self, chunk: Chunk, at: np.ndarray, kind: Kind) -> np.ndarray:
        """f16 [rows, cells]: what the rows of a chunk at these positions see."""
        until = chunk.until.get(kind)
        if until is not None:
            return self._mask(at, np.asarray(until)[at - chunk.start], chunk.end, kind)
        last = len(at) == 1 and int(at[0]) == chunk.end - 1
        foreseen = self._foreseen.get((int(at[0]), kind)) if last else None
        return self._mask(at, at, chunk.end, kind) if foreseen is None else foreseen

    def _mask(self, at: np.ndarray, until: np.ndarray, end: int, kind: Kind) -> np.ndarray:
        """f16 [rows, cells]: rows at these positions of a slot that holds ``end``."""
        shape = self._kv.shape
        cells = shape.extent(end).of(kind)
        return f16_mask(shape.visible(at, until, end, cells, kind))


def _write_scales(rows: Rows, there: Sequence[Stretch]) -> None:
    for delta, stretch in zip(rows.deltas, there, strict=True):
        delta.write(stretch.scales)


def f16_mask(visible: np.ndarray) -> np.ndarray:
    """bool [n, cells] -> f16 mask for ``attention``: 0 where visible, minus infinity elsewhere."""
    return np.where(visible, np.float16(0), np.float16(-np.inf))
