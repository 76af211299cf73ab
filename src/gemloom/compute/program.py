"""One network on devices: a Batch becomes graph inputs, a graph runs, what is wanted comes back.

A graph is built once for a shape of batch and kept for the next batches of that shape, as long as
all kept graphs fit into GRAPH_BYTES. Then a step only writes its inputs. Positions, cells and
masks are inputs, so nothing about them is baked into a graph.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np

from gemloom.adapters.request_adapters import Versioned
from gemloom.compute.batch import Batch
from gemloom.compute.inputs import GraphKey, Inputs, Part, declare, key_of, write
from gemloom.compute.kv import KV, Rows
from gemloom.compute.want import ALL, Output, Want
from gemloom.errors import OptionError
from gemloom.ggml.device import Device, Tensor
from gemloom.ggml.executable import GraphFullError
from gemloom.ggml.graph import F32, I32, I64, Graph
from gemloom.models.config import Kind
from gemloom.models.network import Network
from gemloom.sampling.candidates import COUNT, Candidates, candidates
from gemloom.sampling.params import Floats, Ids
from gemloom.weights.weights import Tensors

FEW_NODES, MOST_NODES = 1 << 12, 1 << 17  # of one graph: tried first, and not exceeded
GRAPH_BYTES = 32 << 20  # of all graphs that are kept, besides the memory they compute in
HIDDEN = "output_norm"  # the intermediate that goes into the head
_log = logging.getLogger("gemloom.program")


@dataclass(frozen=True, slots=True)
class _Ranked:
    """The largest logits of each row, where the device finds them itself."""

    ids: Tensor  # i32 [COUNT, rows]
    values: Tensor  # f32 [1, COUNT, rows]
    sums: Tensor  # f32 [1, rows], of all logits: not finite where one is not


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A graph with its inputs and its output."""

    key: GraphKey
    graph: Graph
    rows: Rows
    wanted: Rows | None
    logits: Tensor | None
    ranked: _Ranked | None


class Program:
    """Runs batches on one network. Not thread-safe: one caller at a time. ``close()`` frees it.

    ``ranks`` says that the device that makes the logits can find the largest of them as well, so
    that wanting the "largest" saves reading them all. ``times`` are the seconds since it was made
    by phase of ``run``: build (and allocate), input, launch (handing the graph to devices, and
    what of it runs on the CPU; nothing where all does), ahead (Python's work on the next step
    meanwhile), compute, read.
    """

    def __init__(self, device: Device, network: Network, weights: Tensors, kv: KV) -> None:
        config = network.config
        self.config, self.kv = config, kv
        self._device = device
        self._model = network.architecture(config, weights)
        self._reserved = False
        self._nodes = FEW_NODES  # what the largest graph so far needed, rounded up
        self._plans: OrderedDict[GraphKey, _Plan] = OrderedDict()  # the one used last at the end
        logits, count = weights.placement.logits, min(COUNT, config.n_vocab)
        self.ranks = _finds_largest(device, logits, config.n_vocab, count)
        self._inputs = Inputs(kv)
        self.times = dict.fromkeys(("build", "input", "launch", "ahead", "compute", "read"), 0.0)
        self._warned: set[str] = set()
        places = weights.placement
        owners = [spec.kv_owner for spec in config.layers]
        self._attention_on_host = sum(places.layers[i] != places.cells[i] for i in owners)

    def reserve(self) -> None:
        """Take the compute memory of the largest steps now, rather than in a request.

        Those are a prompt's part alone, and parts of as many prompts as there are slots.
        OutOfMemoryError where there is none.
        """
        shape = self.kv.shape
        count, slots = min(shape.chunk, shape.cells.full), shape.slots
        each = -(-count // slots)
        alone = (Part(0, count, 1, shape.cells),)
        shared = tuple(Part(slot, each, 1, shape.cells) for slot in range(slots))
        want = Want("largest") if self.ranks else ALL
        for parts in dict.fromkeys((alone, shared)):
            with closing(self._build(GraphKey(parts, want)).graph) as graph:
                graph.reserve()
        self._reserved = True

    def survey(self) -> tuple[Counter[str], int]:
        """What devices lack of the largest prefill step, and of how many nodes."""
        shape = self.kv.shape
        count = min(shape.chunk, shape.cells.full)
        plan = self._build(GraphKey((Part(0, count, 1, shape.cells),)))
        with closing(plan.graph):
            return plan.graph.survey()

    def run(self, batch: Batch, want: Want = ALL) -> Output:
        """Compute a batch; K/V of every row are in the cells afterwards.

        Where the largest logits are wanted, a row with one that is not finite is given whole.
        """
        key = key_of(self.kv.shape, batch, want)
        plan = self._compute(batch, key)
        rows: list[Floats | Candidates] | np.ndarray
        if plan.ranked:
            rows = self._ranked_rows(plan, plan.ranked)
        elif plan.logits:
            rows = self._read(plan.logits)
        else:
            rows = np.empty((0, self.config.n_vocab), np.float32)
        tapped = self._tapped(plan)
        return Output(rows=rows, hidden=tapped.get(HIDDEN), tapped=tapped)

    def _ranked_rows(self, plan: _Plan, ranked: _Ranked) -> list[Floats | Candidates]:
        start = perf_counter()
        ids, values = ranked.ids.numpy(), ranked.values.numpy()[..., 0]
        sound = np.isfinite(ranked.sums.numpy()[:, 0])
        self.check()
        values = self._model.finish(values)
        self.check()
        self._lap("read", start)
        return [self._row(plan, i, ids[i], values[i], bool(sound[i])) for i in range(len(ids))]

    def _row(
        self, plan: _Plan, row: int, ids: Ids, values: Floats, sound: bool
    ) -> Floats | Candidates:
        assert plan.logits
        read = partial(self._read, plan.logits, row)
        return candidates(ids, values, self.config.n_vocab, read) if sound else read()

    def _read(self, logits: Tensor, row: int | None = None) -> np.ndarray:
        """All logits, float32 [rows, n_vocab], or those of one row, [n_vocab]."""
        start = perf_counter()
        values = self._model.finish(logits.numpy() if row is None else logits.numpy_row(row))
        self.check()
        self._lap("read", start)
        return values

    def _compute(self, batch: Batch, key: GraphKey) -> _Plan:
        """Run the graph of ``key``, built if need be, on a batch."""
        start = perf_counter()
        plan = self._allocated(key)
        start = self._lap("build", start)
        self._inputs.write(plan.rows, plan.wanted, batch, key)
        start = self._lap("input", start)
        for chunk in batch:
            self.kv.store.mark(chunk.slot, chunk.end)
        waiting = start

        def meanwhile() -> None:
            nonlocal waiting
            launched = self._lap("compute" if self._device.on_host else "launch", start)
            self._inputs.foresee(batch)
            waiting = self._lap("ahead", launched)

        plan.graph.compute(meanwhile)
        self._lap("compute", waiting)
        return plan

    def _allocated(self, key: GraphKey) -> _Plan:
        """The graph of ``key``, built unless it is kept, with memory to compute in."""
        plan = self._plans.get(key) or self._added(key)
        self._plans.move_to_end(key)
        plan.graph.allocate()
        return plan

    def _added(self, key: GraphKey) -> _Plan:
        """Build the graph of ``key`` and keep it; those unused for longest make room for it."""
        plan = self._build(key)
        try:
            plan.graph.allocate()
        except BaseException:
            plan.graph.close()
            raise
        self._plans[key] = plan
        self._warn(plan)
        while len(self._plans) > 1 and self.graph_bytes > GRAPH_BYTES:
            self._plans.popitem(last=False)[1].graph.close()
        return plan

    @property
    def graph_bytes(self) -> int:
        """Memory of the graphs that are kept, besides what they compute in."""
        return sum(plan.graph.nbytes for plan in self._plans.values())

    @property
    def _last(self) -> _Plan | None:
        """The graph that was used last."""
        return next(reversed(self._plans.values()), None)

    def check(self) -> None:
        """LostError where a device went away: what was read from it then is no result."""
        self._device.check()

    def abandon(self) -> None:
        """Have no step wait for a worker any more; from any thread, and for good."""
        self._device.abandon()

    def _warn(self, plan: _Plan) -> None:
        """Say once of each operation that it is slower than it might be."""
        if new := sorted(set(self._fallbacks(plan)) - self._warned):
            self._warned.update(new)
            _log.warning("not on the device, so on the CPU: %s", ", ".join(new))

    @property
    def fallbacks(self) -> dict[str, int]:
        """Operations of the last step which its devices lack, and how many each."""
        return self._fallbacks(self._last)

    def _fallbacks(self, plan: _Plan | None) -> dict[str, int]:
        lacking = Counter(plan.graph.fallbacks if plan else ())
        return dict(lacking + Counter(attention=self._attention_on_host))

    def _lap(self, phase: str, start: float) -> float:
        """Book the time since ``start`` on a phase; gives the time now."""
        now = perf_counter()
        self.times[phase] += now - start
        return now

    def shift(self, slot: int, keep: int, drop: int, count: int) -> None:
        """Drop ``drop`` positions after the first ``keep`` of a slot that holds ``count``.

        What follows moves down by as much: K is rotated back, each layer with its own dimensions,
        base and factors.
        """
        with closing(Graph(self._device, self._nodes)) as g:
            inputs = []
            for kind in Kind:
                first = max(keep + drop, count - self.kv.shape.cells.of(kind))
                positions = np.arange(first, count, dtype=np.int32)
                inputs += self._move(g, slot, positions, drop, kind)
            g.allocate()
            for tensor, values in inputs:
                write(tensor, [values])
            g.compute()

    def _move(
        self, g: Graph, slot: int, positions: np.ndarray, drop: int, kind: Kind
    ) -> list[tuple[Tensor, np.ndarray]]:
        """Put the moves of one kind of layer into the graph; gives its inputs."""
        n, shape = len(positions), self.kv.shape
        source, to = g.input(f"{kind.value}_source", I32, n), g.input(f"{kind.value}_to", I64, n)
        by = g.input(f"{kind.value}_by", I32, n)
        for spec in self.config.layers:
            if spec.owns_kv and spec.kind is kind:
                rotate = partial(self._model.rope, g, spec, by)
                self.kv.move(g, spec, rotate, source, to)
        return [
            (source, shape.indices(slot, positions, kind)),
            (to, shape.indices(slot, positions - drop, kind)),
            (by, np.full(n, -drop)),
        ]

    def _tapped(self, plan: _Plan) -> dict[str, np.ndarray]:
        """Values of a step's taps; slowest dimension, the rows, first."""
        values = {name: tensor.numpy() for name, tensor in plan.graph.tapped.items()}
        if "logits" in values:
            self._model.finish(values["logits"])
        if values:
            self.check()
        return values

    def names(self) -> list[str]:
        """Every name that can be tapped."""
        part = Part(0, 1, 1, self.kv.shape.extent(1))
        plan = self._build(GraphKey((part,)))
        plan.graph.close()
        return list(dict.fromkeys(plan.graph.names))

    def discard(self, adapter: Versioned) -> None:
        """Drop the graphs that have this adapter's tensors."""
        for key in [key for key in self._plans if any(s.adapter is adapter for s in key.adapters)]:
            self._plans.pop(key).graph.close()

    def close(self) -> None:
        """Free the graphs that are kept."""
        self.forget()

    def forget(self) -> None:
        """Drop the graphs that are kept: the next step builds its own."""
        while self._plans:
            self._plans.popitem()[1].graph.close()

    # -- building ----------------------------------------------------------------------------

    def _build(self, key: GraphKey) -> _Plan:
        """A graph with room for as many nodes as it turns out to need.

        OptionError where those are more than any graph may have.
        """
        while True:
            if self._device.grow(self._nodes) and self._reserved:
                self.reserve()
            with suppress(GraphFullError):
                return self._filled(key)
            if self._nodes == MOST_NODES:
                raise OptionError(
                    f"a step of {len(key.parts)} slots takes over {MOST_NODES:,} operations; "
                    "load the model with fewer"
                )
            self._nodes *= 2

    def _filled(self, key: GraphKey) -> _Plan:
        taps = key.want.taps | ({HIDDEN} if key.want.hidden else set())
        g = Graph(self._device, self._nodes, taps)
        try:
            rows, wanted = declare(g, key)
            logits = self._model.forward(g, rows, wanted, self.kv)
            logits = g.output(logits) if logits and key.want.logits != "none" else None
            largest = logits and key.want.logits == "largest"
            ranked = self._ranked(g, logits) if logits and largest else None
            return _Plan(key=key, graph=g, rows=rows, wanted=wanted, logits=logits, ranked=ranked)
        except BaseException:
            g.close()
            raise

    def _ranked(self, g: Graph, logits: Tensor) -> _Ranked:
        n_vocab, n = logits.shape
        ids = g.output(g.largest(logits, min(COUNT, n_vocab)))
        values = g.get_experts(g.reshape(logits, 1, n_vocab, n), ids)
        return _Ranked(ids, g.output(values), g.output(g.sum_rows(logits)))


def _finds_largest(device: Device, index: int, n: int, k: int) -> bool:
    """Whether a device is known to find the k largest of n numbers itself; not the host's CPU."""
    if index == device.host or not device.knows(index):
        return False
    with closing(Graph(device, 8)) as g:
        return device.supports(index, g.largest(g.input("x", F32, n, 1), k).pointer)
