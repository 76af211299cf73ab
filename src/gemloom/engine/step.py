"""One step: requests are admitted, a batch is planned and computed, and tokens are delivered.

Only the engine's thread is in here. What calls it, and what becomes of requests when it fails, is
in ``engine.py``.
"""

from __future__ import annotations

import logging
from collections import abc
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import islice

from gemloom.adapters.request_adapters import marks
from gemloom.compute.batch import Chunk
from gemloom.compute.cells import Cells
from gemloom.compute.program import Program
from gemloom.compute.slots import Slot
from gemloom.compute.want import Want
from gemloom.engine.request import Request
from gemloom.engine.scheduler import plan
from gemloom.engine.waiting import Waiting
from gemloom.errors import GemloomError, OutOfMemoryError
from gemloom.options import Options
from gemloom.sampling.candidates import Candidates
from gemloom.sampling.params import Floats

MOST_STRETCHES = 32  # of rows with an adapter in one step: each adds thousands of nodes
_log = logging.getLogger("gemloom.engine")


class Steps:
    """Takes steps with the requests that wait and run. ``context`` is in positions.

    ``running`` has the requests by the index of their slot; ``counts`` those of tokens and steps.
    """

    def __init__(
        self, program: Program, cells: Cells, options: Options, context: int, waiting: Waiting
    ) -> None:
        self._program, self._cells, self._options = program, cells, options
        self._context, self._waiting = context, waiting
        self.running: dict[int, Request] = {}
        self.counts = dict.fromkeys(("prompt", "cached", "generated", "steps"), 0)

    def step(self) -> None:
        """Compute one batch: a row of each request that decodes, a part of each other's prompt."""
        self._admit()
        self._make_room()
        batch = plan(self._turn(), self._options.chunk, self._options.budget)
        if not batch:
            return
        for chunk in batch:
            self._prepare(chunk)
        try:
            rows = self._compute(batch)
        except OutOfMemoryError as error:  # before anything was computed: others can go on
            for request in self._requests(batch):
                self._give_up(request, error)
            return
        self.counts["steps"] += 1
        self._deliver(batch, rows)

    def _requests(self, batch: abc.Sequence[Chunk]) -> list[Request]:
        """Those of a batch that have not ended: a grammar can fail before its step."""
        return [self.running[chunk.slot] for chunk in batch if chunk.slot in self.running]

    def _compute(self, batch: abc.Sequence[Chunk]) -> abc.Iterable[Floats | Candidates]:
        """The wanted rows of a batch; their largest logits where those may do for some request."""
        wanted = [self.running.get(chunk.slot) for chunk in batch if chunk.wanted]
        few = self._program.ranks and any(request and request.few for request in wanted)
        return self._program.run(batch, Want("largest" if few else "all")).rows

    def _turn(self) -> list[Request]:
        """The requests of the next step: all, or where they have too many adapters for a graph,
        those that have waited longest."""
        chosen, sets = [], set[tuple[int, ...]]()
        for request in self.running.values():
            wider = sets | {tuple(active.adapter.version for active in request.adapters)}
            if sum(map(len, wider)) <= MOST_STRETCHES:
                chosen.append(request)
                sets = wider
        if len(chosen) < len(self.running):
            for request in chosen:  # behind the others, for the next time
                index = next(i for i, there in self.running.items() if there is request)
                self.running[index] = self.running.pop(index)
        return chosen

    def _admit(self) -> None:
        """Give free slots to those that have waited longest."""
        while self._cells.free and (ready := self._waiting.ready()):
            first = ready[0]  # it stays there for _end_all, should this fail
            if isinstance(first, Request):
                self._begin(first)
            elif first.set_running_or_notify_cancel():
                self._give_slot(first)
            self._waiting.remove(first)

    def _give_slot(self, future: Future[Slot]) -> None:
        try:
            future.set_result(self._cells.acquire())
        except BaseException as error:
            future.set_exception(error)
            raise

    def _begin(self, request: Request) -> None:
        slot = self._cells.acquire(request.tokens, marks(request.adapters))
        self.running[slot.index] = request
        request.begin(slot, len(slot.tokens))
        self.counts["prompt"] += request.n_prompt
        self.counts["cached"] += request.n_cached

    def _make_room(self) -> None:
        """Where a slot is full, drop the older half of what comes after the first ``keep``."""
        keep, shape = self._options.keep, self._cells.shape
        for request in list(self.running.values()):
            n, slot = request.n_done, request.slot
            if keep is None or n < self._context or slot is None:
                continue
            drop = (n - keep) // 2
            if n > shape.cells.sliding:  # the ring has lost the kept tokens: none may be seen
                drop = min(drop, n - keep - shape.window + 1)
            try:
                self._program.shift(slot.index, keep, drop, n)
            except OutOfMemoryError as error:
                self._give_up(request, error)
                continue
            request.forget(keep, drop)
            self._cells.cut(slot, 0)  # cells such as no prompt would give

    def _prepare(self, chunk: Chunk) -> None:
        request = self.running[chunk.slot]
        if chunk.wanted and request.constraint:
            with self._alone(request):
                request.constraint.prepare()

    @contextmanager
    def _alone(self, request: Request) -> Iterator[None]:
        """What goes wrong in here ends this request and no other."""
        try:
            yield
        except BaseException as error:
            self._give_up(request, _typed(error))

    def _deliver(
        self, batch: abc.Sequence[Chunk], logits: abc.Iterable[Floats | Candidates]
    ) -> None:
        """Give each request the rows of its chunk, in order, until it ends."""
        rows = iter(logits)
        for chunk in batch:
            mine = list(islice(rows, len(chunk.wanted)))
            request = self.running.get(chunk.slot)
            if request is None:  # its grammar failed
                continue
            self._advance(request, chunk)
            with self._alone(request):
                for row in mine:
                    if request.finish_reason is None:
                        self._emit(request, row)

    def _advance(self, request: Request, chunk: Chunk) -> None:
        """Take note that a chunk's K/V are in the cells, and keep what may be come back to."""
        request.n_done = chunk.end
        if request.shifted:
            return
        slot = self._cells.all[chunk.slot]
        self._cells.extend(slot, chunk.tokens)
        for at in request.boundaries:
            if chunk.start < at <= chunk.end:
                self._cells.snapshot(slot, at)

    def _emit(self, request: Request, logits: Floats | Candidates) -> None:
        """Pick the next token of a request and send it."""
        piece = request.accept(logits)
        self.counts["generated"] += 1
        if piece.finish_reason:
            self.end(request)
        request.sink(piece)

    def end(self, request: Request) -> None:
        """Take a request out of the queue, or give its slot back, and let its adapters go."""
        if request.slot is None:
            self._waiting.remove(request)
        else:
            del self.running[request.slot.index]
            self._cells.release(request.slot)
        request.release()
        self._waiting.follow(request)

    def _give_up(self, request: Request, error: GemloomError) -> None:
        self.end(request)
        request.sink(error)


def _typed(error: BaseException) -> GemloomError:
    """The error itself, or one that says what kind it was."""
    if isinstance(error, GemloomError):
        return error
    _log.error("a request failed", exc_info=error)
    return GemloomError(f"the request failed: {type(error).__name__}: {error}")
