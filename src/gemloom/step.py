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

from gemloom.adapters.active import marks
from gemloom.candidates import Candidates
from gemloom.cells import Cells
from gemloom.errors import GemloomError, OutOfMemoryError
from gemloom.options import Options
from gemloom.program import Program
from gemloom.sampling import Floats
from gemloom.scheduler import plan
from gemloom.sequence import Chunk, Sequence
from gemloom.slots import Slot
from gemloom.waiting import Waiting
from gemloom.want import Want

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
        self.running: dict[int, Sequence] = {}
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

    def _requests(self, batch: abc.Sequence[Chunk]) -> list[Sequence]:
        """Those of a batch that have not ended: a grammar can fail before its step."""
        return [self.running[chunk.slot] for chunk in batch if chunk.slot in self.running]

    def _compute(self, batch: abc.Sequence[Chunk]) -> abc.Iterable[Floats | Candidates]:
        """The wanted rows of a batch; their largest logits where those may do for some request."""
        wanted = [self.running.get(chunk.slot) for chunk in batch if chunk.wanted]
        few = self._program.ranks and any(sequence and sequence.few for sequence in wanted)
        return self._program.run(batch, Want("largest" if few else "all")).rows

    def _turn(self) -> list[Sequence]:
        """The requests of the next step: all, or where they have too many adapters for a graph,
        those that have waited longest."""
        chosen, sets = [], set[tuple[int, ...]]()
        for sequence in self.running.values():
            wider = sets | {tuple(active.adapter.version for active in sequence.adapters)}
            if sum(map(len, wider)) <= MOST_STRETCHES:
                chosen.append(sequence)
                sets = wider
        if len(chosen) < len(self.running):
            for sequence in chosen:  # behind the others, for the next time
                index = next(i for i, there in self.running.items() if there is sequence)
                self.running[index] = self.running.pop(index)
        return chosen

    def _admit(self) -> None:
        """Give free slots to those that have waited longest."""
        while self._cells.free and (ready := self._waiting.ready()):
            first = ready[0]  # it stays there for _end_all, should this fail
            if isinstance(first, Sequence):
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

    def _begin(self, sequence: Sequence) -> None:
        slot = self._cells.acquire(sequence.tokens, marks(sequence.adapters))
        self.running[slot.index] = sequence
        sequence.begin(slot, len(slot.tokens))
        self.counts["prompt"] += sequence.n_prompt
        self.counts["cached"] += sequence.n_cached

    def _make_room(self) -> None:
        """Where a slot is full, drop the older half of what comes after the first ``keep``."""
        keep, shape = self._options.keep, self._cells.shape
        for sequence in list(self.running.values()):
            n, slot = sequence.n_done, sequence.slot
            if keep is None or n < self._context or slot is None:
                continue
            drop = (n - keep) // 2
            if n > shape.cells.sliding:  # the ring has lost the kept tokens: none may be seen
                drop = min(drop, n - keep - shape.window + 1)
            try:
                self._program.shift(slot.index, keep, drop, n)
            except OutOfMemoryError as error:
                self._give_up(sequence, error)
                continue
            sequence.forget(keep, drop)
            self._cells.cut(slot, 0)  # cells such as no prompt would give

    def _prepare(self, chunk: Chunk) -> None:
        sequence = self.running[chunk.slot]
        if chunk.wanted and sequence.constraint:
            with self._alone(sequence):
                sequence.constraint.prepare()

    @contextmanager
    def _alone(self, sequence: Sequence) -> Iterator[None]:
        """What goes wrong in here ends this request and no other."""
        try:
            yield
        except BaseException as error:
            self._give_up(sequence, _typed(error))

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

    def _advance(self, sequence: Sequence, chunk: Chunk) -> None:
        """Take note that a chunk's K/V are in the cells, and keep what may be come back to."""
        sequence.n_done = chunk.end
        if sequence.shifted:
            return
        slot = self._cells.all[chunk.slot]
        self._cells.extend(slot, chunk.tokens)
        for at in sequence.boundaries:
            if chunk.start < at <= chunk.end:
                self._cells.snapshot(slot, at)

    def _emit(self, sequence: Sequence, logits: Floats | Candidates) -> None:
        """Pick the next token of a request and send it."""
        piece = sequence.accept(logits)
        self.counts["generated"] += 1
        if piece.finish_reason:
            self.end(sequence)
        sequence.sink(piece)

    def end(self, sequence: Sequence) -> None:
        """Take a request out of the queue, or give its slot back, and let its adapters go."""
        if sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            del self.running[sequence.slot.index]
            self._cells.release(sequence.slot)
        sequence.release()
        self._waiting.follow(sequence)

    def _give_up(self, sequence: Sequence, error: GemloomError) -> None:
        self.end(sequence)
        sequence.sink(error)


def _typed(error: BaseException) -> GemloomError:
    """The error itself, or one that says what kind it was."""
    if isinstance(error, GemloomError):
        return error
    _log.error("a request failed", exc_info=error)
    return GemloomError(f"the request failed: {type(error).__name__}: {error}")
