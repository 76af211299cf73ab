"""What is told of a loaded adapter: pure data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Scales = Mapping[str, float | None]  # of a request, by name; None: the adapter's own

Named = Scales | Sequence[str]  # or their names alone


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """One adapter that requests can name."""

    name: str
    version: int  # no two loads have the same
    scale: float  # where a request gives none
    rank: int  # the largest
    matrices: int  # that it changes
    nbytes: int
    norm: float  # of all that it adds, at scale 1
    ignored: Mapping[str, str]  # what its file has besides: why that does nothing
    invocation: tuple[int, ...]  # aLoRA: it acts from where these tokens begin
    users: int  # requests under way, of this version
    requests: int  # that have named it since the first load under the name
