"""The thread that owns the arithmetic: requests go in, their events come out, step by step.

Any thread may submit and cancel; all that touches cells and graphs happens in the one
thread here, between two steps or in one. A request ends in exactly one way: with a piece that has
a ``finish_reason``, with an error, or with None after it was cancelled. An error within a request
(its sampling, its grammar) ends that request; a step that fails ends all of them, and the
engine, and so does a device that is lost: what comes later is refused at once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import abc, deque
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from gemloom.compute.cells import Cells
from gemloom.compute.program import Program
from gemloom.compute.slots import Slot
from gemloom.engine.request import Request
from gemloom.engine.step import Steps
from gemloom.engine.waiting import Waiting, Wanted
from gemloom.errors import (
    ClosedError,
    DeviceError,
    EngineError,
    GemloomError,
    LostError,
    QueueFullError,
    RequestError,
)
from gemloom.options import Options
from gemloom.system.signals import undisturbed

T = TypeVar("T")
_LAST_STEP = 0.5  # seconds that workers get to end the step under way when a model is closed
_log = logging.getLogger("gemloom.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What the engine has to do, and what it has done since the model was loaded."""

    running: int
    waiting: int
    slots: int
    slots_busy: int
    prompt_tokens: int  # of the prompts begun
    cached_tokens: int  # of these, found in the cells
    generated_tokens: int
    steps: int
    snapshot_bytes: int
    error: str | None  # why the engine stopped
    lost: bool = False  # and whether that was a device that went away, which may come back


class Engine:
    """Computes the requests submitted to it, until ``close()``.

    ``free`` is called once, when nothing computes any more. ``context`` is in positions.
    """

    def __init__(
        self,
        program: Program,
        cells: Cells,
        options: Options,
        context: int,
        free: abc.Callable[[], Any],
    ) -> None:
        self._program, self._options = program, options
        self.cells = cells
        self._calls: deque[tuple[abc.Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._waiting = Waiting(self._wake)
        self._steps = Steps(program, cells, options, context, self._waiting)
        self._free = free
        self._closing, self._failure, self._lost = False, "", False
        self._cause: BaseException | None = None  # of the failure
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._loop, name="gemloom-engine", daemon=True)
        self._thread.start()

    # -- from any thread -----------------------------------------------------------------------

    def submit(self, request: Request, after: Request | None = None) -> None:
        """Queue a request. QueueFullError, EngineError or ClosedError where it cannot be taken.

        One ``after`` another is queued when that has ended, behind all that wait by then, and no
        queue is too full for it.
        """
        self._queue(request, after)

    def _queue(self, wanted: Wanted, after: Request | None = None) -> None:
        with self._wake:
            self._check()
            most = self._options.queue + len(self.cells.free)
            if after is None and len(self._waiting.ready()) >= most:
                raise QueueFullError(
                    f"{self._options.queue} requests are waiting already; try again later"
                )
            self._waiting.add(wanted, after)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """End a request before the next step; nothing happens if it has ended."""
        request.cancelled = True
        with self._wake:
            self._wake.notify()

    def check(self) -> None:
        """Raise EngineError or ClosedError where nothing is computed any more."""
        with self._wake:
            self._check()

    def post(self, function: abc.Callable[[], object]) -> None:
        """Have ``function`` run between two steps, if there will be any. Never waits."""
        with self._wake:
            self._calls.append((function, Future()))
            self._wake.notify()

    def call(self, function: abc.Callable[[], T]) -> T:
        """Run ``function`` between two steps, and give what it returns or raise what it raises."""
        if threading.current_thread() is self._thread:
            return function()
        future: Future[T] = Future()
        with self._wake:
            self._check()
            self._calls.append((function, future))
            self._wake.notify()
        return future.result()

    def hold(self) -> Slot:
        """A slot for ``call``s of one's own, to be given back with ``release``; waits its turn.

        Raises as ``submit``.
        """
        future: Future[Slot] = Future()
        self._queue(future)
        try:
            return future.result()
        except BaseException:
            self._waiting.remove(future)
            if not future.cancel() and not future.exception():  # Ctrl-C, and it had come
                self.release(future.result())
            raise

    @contextmanager
    def held_slot(self) -> abc.Iterator[Slot]:
        """``hold`` for a ``with`` block. After an error nobody reuses what the slot holds."""
        slot = self.hold()
        try:
            yield slot
        except BaseException:
            self.release(slot, forget=True)  # a failed step may have written anything
            raise
        else:
            self.release(slot)

    @property
    def allowance(self) -> int:
        """Rows that a ``call`` may compute at once: fewer where requests wait for their turn."""
        return self._options.budget if self._steps.running else self._options.chunk

    def release(self, slot: Slot, *, forget: bool = False) -> None:
        """Give back a slot that ``hold`` gave, after the step under way. Never waits."""
        self.post(partial(self.cells.release, slot, forget=forget))

    def reset(self) -> None:
        """Forget all results: kept graphs, prefixes and snapshots. RequestError if any runs."""
        self.call(self._reset)

    def _reset(self) -> None:
        if self.cells.busy:
            raise RequestError("requests are under way: a model is reset between them")
        self.cells.forget()
        self._program.forget()

    def stats(self) -> Stats:
        """Numbers of this moment."""
        counts = self._steps.counts
        return Stats(
            running=len(self._steps.running),
            waiting=len(self._waiting),
            slots=len(self.cells.all),
            slots_busy=self.cells.busy,
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            generated_tokens=counts["generated"],
            steps=counts["steps"],
            snapshot_bytes=self.cells.snapshot_bytes,
            error=self._failure or None,
            lost=self._lost,
        )

    def close(self) -> None:
        """End all requests with ClosedError and free the model; a second call does nothing.

        From any thread, a garbage collector's call in the engine's own among them.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:  # a garbage collector runs anywhere
            self._thread.join(_LAST_STEP)
            if self._thread.is_alive():
                self._program.abandon()
            self._thread.join()

    def _check(self) -> None:
        if self._closing:
            raise ClosedError("the model is closed")
        if self._failure:
            raise self._refusal()
        if os.getpid() != self._process:
            raise EngineError("a model does not live through a fork: load it in the child")

    # -- the engine's own thread ---------------------------------------------------------------

    def _loop(self) -> None:
        with undisturbed():
            try:
                while self._wait():
                    try:
                        self.step()
                    except BaseException as error:
                        if not self._closing:  # else the device was let go of in the middle
                            self._fail(error)
            except BaseException as error:  # a bug of ours: nobody may wait for ever even so
                self._fail(error)
            finally:
                self._end_all(ClosedError("the model is closed"))
                self._free()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False to end."""
        with self._wake:
            while not (self._closing or self._calls or self._steps.running or self._can_admit()):
                self._wake.wait(1.0)  # a finalizer that runs in here wakes nobody
                if not self._failure and self._loss():  # to be told before somebody asks
                    break
            return not self._closing

    def _loss(self) -> BaseException | None:
        """Why nothing that devices compute means anything, if that is so."""
        try:
            self._program.check()
        except BaseException as error:
            return error
        return None

    def _can_admit(self) -> bool:
        """Whether a request waits that a step would take out of the queue."""
        return self._waiting.any_cancelled() or bool(self.cells.free and self._waiting.ready())

    def step(self) -> None:
        """What the thread does again and again, until there is nothing to do."""
        self._answer_calls()
        self._end_cancelled()
        if self._failure:
            return
        self._program.check()
        self._steps.step()

    def _answer_calls(self) -> None:
        for _ in range(len(self._calls)):  # those that come meanwhile wait for a step
            function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function()
                self._program.check()  # or it may be made of nothing
                future.set_result(result)
            except BaseException as error:
                future.set_exception(error)

    def _end_cancelled(self) -> None:
        for request in [*self._steps.running.values(), *self._waiting.all()]:
            if isinstance(request, Request) and request.cancelled:
                self._steps.end(request)
                request.sink(None)

    def _fail(self, error: BaseException) -> None:
        lost = self._loss()  # whatever failed, that is why
        if not isinstance(lost, DeviceError):
            _log.error("a step failed", exc_info=lost or error)
        with self._wake:
            line = " ".join(str(lost or error).split()) or type(lost or error).__name__
            self._failure = f"the engine stopped: {line}"
            self._lost, self._cause = isinstance(lost, LostError), lost or error
        _log.error("%s", self._refusal())
        self._end_all(self._refusal())

    def _refusal(self) -> EngineError:
        refusal = EngineError(f"{self._failure}; the model must be loaded again")
        refusal.__cause__ = self._cause
        return refusal

    def _end_all(self, error: GemloomError) -> None:
        """End every request, and whoever waits for a call, with ``error``."""
        with self._wake:
            there = [*self._steps.running.values(), *self._waiting.all()]
            futures = [w for w in there if isinstance(w, Future)] + [f for _, f in self._calls]
            self._steps.running.clear()
            self._waiting.clear()
            self._calls.clear()
        for request in there:
            if isinstance(request, Request):
                self._tell(request, error)
        for future in futures:
            if not future.done():
                with suppress(InvalidStateError):  # cancelled in this very moment
                    future.set_exception(error)

    def _tell(self, request: Request, error: GemloomError) -> None:
        """End a request with ``error``, in whatever state what it holds is."""
        try:
            if request.slot:
                self.cells.release(request.slot, forget=True)
            request.release()
        except Exception:
            _log.exception("what a request held could not be given back")
        request.sink(error)
