"""Fixtures of all tests: tiny models, made and closed for each."""

import os
import signal
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy loads: it would fight with ggml
# Threads that wait for others sleep: more of them than cores are free would spin for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from threading import Thread
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import gemloom
import tiny
from gemloom.testing import paced
from shelf import Shelf

# A job in the background starts with SIGINT ignored, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The gate judges a change, so it draws the same examples for all; a run by hand draws new ones.
# How long they take is no fault of theirs where the machine is busy. Examples do share fixtures.
settings.register_profile(
    "ours",
    derandomize=bool(os.environ.get("CI")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("ours")

__all__ = ["Load", "endless", "paced", "prompt", "until"]
Load = Callable[..., gemloom.Model]
QUICK = 10.0  # seconds: what takes longer gets the marker "slow"
_overdue: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test that should have the marker."""
    if report.when == "call" and report.duration > QUICK and "slow" not in report.keywords:
        _overdue.append(f"{report.duration:.1f} s: {report.nodeid}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was noted: not an error, since the machine may have been busy."""
    for line in _overdue:
        terminalreporter.write_line(f"not marked slow, took {line}")


@pytest.fixture
def load() -> Iterator[Load]:
    """``load("e2b", chunk=7, forms={"untied": True}, context=128)``: a tiny model, with one thread.

    "e2b_wide" has rows that K-quants can hold.
    """
    with ExitStack() as stack:

        def make(
            variant: str = "e2b", *, forms: dict[str, Any] | None = None, **options: Any
        ) -> gemloom.Model:
            made = tiny.VARIANTS[variant.removesuffix("_wide")]
            made = made.wide() if variant.endswith("_wide") else made
            data = tiny.gguf_bytes(made, **(forms or {}))
            options = {"kv_type": "f32", "context": 256, "threads": 1, **options}
            return stack.enter_context(gemloom.load(data, **options))

        yield make


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    """A server of files, none yet, which is asked again at once where it fails."""
    monkeypatch.setattr("gemloom.files.urls.PAUSES", (0.0,) * 4)
    with Shelf() as made:
        thread = Thread(target=made.serve_forever, args=[0.01])
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def endless(model: gemloom.Model) -> dict[str, Any]:
    """Options with which a text ends only where the context or ``max_tokens`` does."""
    return {"logit_bias": dict.fromkeys(model.tokenizer.eog, -100)}


def until(met: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for a condition; the time is one that not even a machine under load takes."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def prompt(n: int, seed: int = 9, n_vocab: int = 300) -> list[int]:
    """<bos> and n - 1 tokens."""
    import numpy as np

    return [2, *np.random.RandomState(seed).randint(n_vocab, size=n - 1).tolist()]
