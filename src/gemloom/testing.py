"""The one door to the inside of a model, for tests and benchmarks.

It gives a model's parts and its engine, computes chunks, and holds the engine between steps.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gemloom.compute.batch import Chunk
from gemloom.compute.want import ALL, Output, Want
from gemloom.engine.engine import Engine
from gemloom.loading.parts import Parts
from gemloom.model import Model


def parts_of(model: Model) -> Parts:
    """The parts of a model: its device, weights, store and program."""
    return model._parts


def engine_of(model: Model) -> Engine:
    """The engine of a model."""
    return model._engine


def run(model: Model, chunks: Sequence[Chunk], want: Want = ALL) -> Output:
    """Compute chunks as one step, in the engine's thread, whatever the slots hold."""
    return engine_of(model).call(lambda: parts_of(model).program.run(chunks, want))


@contextmanager
def paced(model: Model, steps: int = 0) -> Iterator[threading.Semaphore]:
    """Let the engine take ``steps`` steps, and one more for each ``release()`` of what this gives.

    When the block ends it goes on freely. So what happens in the block does not depend on which
    thread is the quicker.
    """
    engine, allowed = engine_of(model), threading.Semaphore(steps)
    step = engine.step

    def when_allowed() -> None:
        allowed.acquire()
        step()

    engine.step = when_allowed  # type: ignore[method-assign]
    try:
        yield allowed
    finally:
        engine.step = step  # type: ignore[method-assign]
        allowed.release()  # to the step that waits
