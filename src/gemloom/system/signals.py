"""Keeping signals away from a thread that is in a library which cannot bear them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_FATAL = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave signals to other threads; Python calls their handlers in the main thread as ever.

    ggml takes one that comes while it speaks to a worker for the end of the connection, and that
    ends the process. Where no other thread takes them, they wait until the block ends.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, which has none that interrupt
        yield
        return
    fatal = {getattr(signal, name) for name in _FATAL if hasattr(signal, name)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - fatal)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
