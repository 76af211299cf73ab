"""Loads the model again when a device was lost: a worker that died, a driver whose step failed.

Other failures are not cured by that, and are left for people to see.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing

from gemloom.errors import GemloomError
from gemloom.server.backend import Backend

_LOOK = 0.5  # seconds between two looks at the engine
_PAUSES = (1, 2, 4, 8, 15, 30)  # seconds before each try, the last of them for good
_END = 5.0  # seconds that a try under way gets to end
_log = logging.getLogger("gemloom.server")


class Recovery:
    """A thread that watches ``current()``, and gives ``take`` what ``load`` makes in its place.

    ``take`` may raise what ``load`` may: both are tried again. End it with ``close()``.
    """

    def __init__(
        self,
        current: Callable[[], Backend],
        load: Callable[[], Backend],
        take: Callable[[Backend], None],
    ) -> None:
        self._current, self._load, self._take = current, load, take
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gemloom-recovery", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it. What a try under way still loads is freed."""
        self._stop.set()
        self._thread.join(_END)

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK):
            if self._current().stats().lost:
                self._current().close()  # its memory is needed
                self._recover()

    def _recover(self) -> None:
        tries = 0
        while not self._stop.wait(_PAUSES[min(tries, len(_PAUSES) - 1)]):
            tries += 1
            try:
                self._replace()
            except GemloomError as error:
                _log.warning("the model cannot be loaded again yet: %s", error)
            except Exception:
                _log.exception("the model cannot be loaded again yet")
            else:
                return

    def _replace(self) -> None:
        with ExitStack() as stack:
            backend = stack.enter_context(closing(self._load()))
            if not self._stop.is_set():
                self._take(backend)
                _log.warning("the model was loaded again")
                stack.pop_all()
