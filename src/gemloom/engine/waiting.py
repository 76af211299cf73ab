"""Who waits for a slot, in the order of their turn: requests, and those that want one to hold."""

from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

from gemloom.compute.slots import Slot
from gemloom.engine.request import Request

Wanted = Request | Future[Slot]


class Waiting:
    """The queue. ``lock``, which may be taken twice, is held for every look and change."""

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self._lock, self._all = lock, list[Wanted]()

    def __len__(self) -> int:
        return len(self._all)

    def all(self) -> list[Wanted]:
        """Everybody."""
        with self._lock:
            return list(self._all)

    def ready(self) -> list[Wanted]:
        """Those that wait for nothing but a slot."""
        with self._lock:
            return [w for w in self._all if not (isinstance(w, Request) and w.after)]

    def any_cancelled(self) -> bool:
        """Whether one is to be taken out that nobody waits for any more."""
        with self._lock:
            return any(isinstance(w, Request) and w.cancelled for w in self._all)

    def add(self, wanted: Wanted, after: Request | None = None) -> None:
        """Put it behind the others. One ``after`` another has no turn until that has ended."""
        with self._lock:
            if isinstance(wanted, Request) and after and not after.ended:
                wanted.after = after
            self._all.append(wanted)

    def remove(self, wanted: Wanted) -> None:
        """Take it out, if it is still there."""
        with self._lock:
            if wanted in self._all:
                self._all.remove(wanted)

    def follow(self, ended: Request) -> None:
        """Put those that came after a request, which has ended, behind all that wait now."""
        with self._lock:
            ended.ended = True
            followers = [w for w in self._all if isinstance(w, Request) and w.after is ended]
            for follower in followers:
                follower.after = None
                self._all.remove(follower)
            self._all += followers

    def clear(self) -> None:
        """Take everybody out."""
        with self._lock:
            self._all.clear()
