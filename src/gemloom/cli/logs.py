"""What the library logs, as notes of a command that ends.

Not for ``gemloom serve``, whose log is where people look for what went wrong, and its traceback.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from gemloom.cli.terminal import note

_TOLD = ("gemloom.engine",)  # its failures reach the command as errors: once is enough


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.name not in _TOLD:
            note(record.getMessage())


@contextmanager
def as_notes() -> Iterator[None]:
    """While the block runs, warnings of the library are lines on stderr."""
    log, handler = logging.getLogger("gemloom"), _Notes(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
