"""The names in one request that nobody knows: how a client and the log are told of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

from gemloom.errors import nearest, suggestion
from gemloom.server.errors import FieldError

HEADER = "x-gemloom-ignored"
MAX_NAMES = 16  # further ones are told as MORE
MAX_LENGTH = 64  # characters of a name
MORE = "+more"
_UNSAFE = re.compile(r"[^A-Za-z0-9_.:-]")


class Ignored:
    """Collects the names of one request; with ``strict`` the first one is an error.

    ``template`` is the model's chat template: what it reads of a message is not ignored.
    """

    def __init__(self, *, strict: bool = False, template: str = "") -> None:
        self.strict, self._template = strict, template
        self._names: dict[str, str | None] = {}  # each with the nearest name there is
        self._more = False

    def add(self, name: str, known: Iterable[str] = ()) -> None:
        """Take note of a dotted name; ``known`` are those it may have been meant for.

        FieldError with ``strict``.
        """
        if self.strict:
            hint = suggestion(name.rpartition(".")[2], known)
            text = f"{name[:MAX_LENGTH]!r} is not a field of this request{hint}"
            raise FieldError(name.partition(".")[0], text)
        if self._more:  # whatever it is: there may be a million
            return
        shown = _UNSAFE.sub("_", name[:MAX_LENGTH]) or "_"
        if shown in self._names:
            return
        if len(self._names) == MAX_NAMES:
            self._more = True
            return
        self._names[shown] = nearest(name.rpartition(".")[2], known)

    def read_by_template(self, key: str) -> bool:
        """Whether the model's chat template has such a word."""
        return key in self._words

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", self._template))

    def __str__(self) -> str:
        """As the header has it: ``temprature;near=temperature, tools:web_search``; "" for none."""
        told = [name + (f";near={near}" if near else "") for name, near in self._names.items()]
        return ", ".join([*told, MORE] if self._more else told)
