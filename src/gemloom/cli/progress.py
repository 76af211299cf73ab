"""A progress bar on stderr for what takes over a second; nothing where that is no terminal."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gemloom.cli.terminal import one_line

if TYPE_CHECKING:
    from rich.progress import Progress

_BAR_AFTER = 1.0  # seconds
_LOOK_EVERY = 0.2  # seconds, at how much has been done


@contextmanager
def bar(
    what: str, total: int | None, done: Callable[[], int], then: str = "finishing"
) -> Iterator[None]:
    """Show how many bytes of ``total`` are ``done()`` while the block runs; None: not known.

    When all are done ``then`` says what the block still does: a full bar would say it is over.
    """
    if not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(_made(), (what, then), total, done, ended))
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _made() -> "Progress":
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _watch(
    shown: "Progress",
    what: tuple[str, str],
    total: int | None,
    done: Callable[[], int],
    ended: threading.Event,
) -> None:
    if ended.wait(_BAR_AFTER):
        return
    with shown:
        task = shown.add_task(one_line(what[0]), total=total)
        while not ended.wait(_LOOK_EVERY) and (total is None or done() < total):
            shown.update(task, completed=done())
        if not ended.is_set():
            shown.remove_task(task)
            shown.add_task(one_line(": ".join(what)), total=None)
            ended.wait()
