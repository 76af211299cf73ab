"""What tests of a running model look at: logits that must agree, batches, and that all is idle."""

import numpy as np
import pytest

import gemloom
from conftest import until
from gemloom import testing
from gemloom.compute.batch import Batch, Chunk


def idle(model: gemloom.Model) -> None:
    """Wait until nothing runs, and check that no slot was lost."""
    until(lambda: not (model.stats().running or model.stats().waiting or model.stats().slots_busy))


def watch_batches(model: gemloom.Model, monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    batches: list[Batch] = []
    program = testing.parts_of(model).program
    run = program.run
    monkeypatch.setattr(
        program, "run", lambda batch, *a, **k: batches.append(batch) or run(batch, *a, **k)
    )
    return batches


def assert_same(ours: np.ndarray, reference: np.ndarray) -> None:
    """The same arithmetic in another order.

    ggml's GELU reads a table of half floats, so a sum that differs in its last bit can move an
    activation by 2^-11 of itself: 0.0003 of the deviation on average, 0.004 at most was seen. The
    smallest mistake tried (a window one too long) gives 0.14 on average.
    """
    error = np.abs(ours - reference) / reference.std()
    assert error.mean() < 0.001
    assert error.max() < 0.015


def run(model: gemloom.Model, *chunks: Chunk) -> np.ndarray:
    return testing.run(model, chunks).logits
