"""K/V cells in a graph: what ``forward`` writes to them, and attention over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

from gemloom.adapters.delta import Delta
from gemloom.compute.kv_shape import Extent, KVShape
from gemloom.compute.kv_store import KVStore
from gemloom.ggml.device import Tensor
from gemloom.ggml.graph import Graph
from gemloom.kernels.operations import attention, serves_attention
from gemloom.models.config import Kind, LayerSpec

Rotate = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Span:
    """The rows ``first`` to ``first + count`` of a step: one sequence's, with what they see."""

    slot: int
    first: int
    count: int
    cells: Extent  # cells read
    masks: Mapping[Kind, Tensor]  # f16 [cells of that kind, count]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows that pass through a layer together, and the graph inputs that describe them."""

    tokens: Tensor  # i32 [n]
    positions: Tensor  # i32 [n]
    spans: tuple[Span, ...]
    cells: Mapping[Kind, Tensor] | None = None  # i64 [n], where K/V go; None: they write none
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


class KV:
    """The K/V cells as a forward pass sees them: it writes to them, and attends over them."""

    def __init__(self, store: KVStore) -> None:
        self.store = store

    @property
    def shape(self) -> KVShape:
        """How many cells there are, and where positions lie."""
        return self.store.shape

    def write(self, g: Graph, spec: LayerSpec, rows: Rows, k: Tensor, v: Tensor) -> None:
        """Store k and v [head_dim, n_kv, n] of ``rows`` before any later read."""
        assert rows.cells is not None
        assert spec.owns_kv
        store, cells = self.store.of(spec), rows.cells[spec.kind]
        size = spec.head_dim * spec.n_kv
        with g.on(self.store.where(spec)):
            g.set_rows(store.k, g.reshape(k, size, rows.count), cells)
            g.set_rows(store.v, g.reshape(v, size, rows.count), cells)

    def attend(self, g: Graph, spec: LayerSpec, rows: Rows, q: Tensor, scale: float) -> Tensor:
        """q [head_dim, n_head, n] -> [head_dim * n_head, n]: each span over its own cells.

        It runs where the cells are: they take longer to move than q.
        """
        with g.on(self.store.where(spec)):
            return reduce(g.concat, self._attend(g, spec, rows, q, scale))

    def _attend(
        self, g: Graph, spec: LayerSpec, rows: Rows, q: Tensor, scale: float
    ) -> Iterator[Tensor]:
        for span in rows.spans:
            part = g.slice(q, 2, span.first, span.first + span.count)
            (k, v), mask = self._read(g, spec, span), span.masks[spec.kind]
            if serves_attention(g, k):
                yield attention(g, part, k, v, mask, scale)
            else:
                yield g.attention(g.swap(part), k, v, mask, scale)

    def _read(self, g: Graph, spec: LayerSpec, span: Span) -> tuple[Tensor, Tensor]:
        """K and V of a span's slot, [head_dim, cells, n_kv], in place."""
        store = self.store.of(spec)
        first = span.slot * self.shape.cells.of(spec.kind)
        cells = span.cells.of(spec.kind)
        head = g.row_bytes(store.k.type, spec.head_dim)

        def heads(x: Tensor) -> Tensor:
            strides = (x.strides[0], x.strides[1], head)
            return g.view(x, (spec.head_dim, cells, spec.n_kv), strides, first * x.strides[1])

        return heads(store.k), heads(store.v)

    def move(self, g: Graph, spec: LayerSpec, rotate: Rotate, source: Tensor, to: Tensor) -> None:
        """Copy cells i32 ``source`` [n] to i64 ``to`` [n], K through ``rotate`` [hd, KV, n]."""
        store, size = self.store.of(spec), spec.head_dim * spec.n_kv
        n = source.shape[0]
        with g.on(self.store.where(spec)):
            k = rotate(g.reshape(g.get_rows(store.k, source), spec.head_dim, spec.n_kv, n))
            v = g.get_rows(store.v, source)
            g.set_rows(store.k, g.reshape(k, size, n), to)
            g.set_rows(store.v, v, to)
