"""Starts the runs of a request: all of them, or none."""

from __future__ import annotations

from collections.abc import Sequence

from gemloom.adapters.info import Scales
from gemloom.engine.generation import Run
from gemloom.errors import QueueFullError
from gemloom.server.backend import Backend
from gemloom.text.compose import Composed


def start(backend: Backend, answers: Sequence[Composed], adapters: Scales) -> list[Run]:
    """Start all, or none: those started before one that fails are cancelled.

    As many as there are slots are in the queue at once, fewer where it is full; the others take
    the places of these. So a request with many prompts is one in the queue, not one a prompt, and
    other requests get their turn between its runs. QueueFullError where there is no room for one.
    """
    runs: list[Run] = []
    most = backend.stats().slots
    try:
        for answer in answers:
            try:
                after = runs[-most] if len(runs) >= most else None
                run = backend.answer(answer, adapters, after)
            except QueueFullError:
                if not runs:
                    raise
                most = len(runs)
                run = backend.answer(answer, adapters, runs[0])
            runs.append(run)
    except BaseException:
        for run in runs:
            run.cancel()
        raise
    return runs
