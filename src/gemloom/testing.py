"""What tests may use of the inside: computing chunks of one's own, and stopping the engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gemloom.compute.batch import Chunk
from gemloom.compute.want import ALL, Output, Want
from gemloom.model import Model


def run(model: Model, chunks: Sequence[Chunk], want: Want = ALL) -> Output:
    """Compute chunks as one step, in the engine's thread, whatever the slots hold."""
    return model._engine.call(lambda: model._program.run(chunks, want))


@contextmanager
def paced(model: Model, steps: int = 0) -> Iterator[threading.Semaphore]:
    """Let the engine take ``steps`` steps, and one more for each ``release()`` of what this gives.

    When the block ends it goes on freely. So what happens in the block does not depend on which
    thread is the quicker.
    """
    engine, allowed = model._engine, threading.Semaphore(steps)
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
