"""What this process may use: processor cores, and memory.

The system grants less than the machine has: by affinity, by the quota and the limits of control
groups (versions 1 and 2, and each group around this process counts), and by ``ulimit -v``. Other
systems than Linux have none of these files; there the machine is the only limit. Each function
takes the folder that stands for ``/``, so that a test can make one. Nothing here raises for what
a file holds: a file that cannot be understood sets no limit.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_MOST = 1 << 20  # bytes that are read of a file
_NO_LIMIT = 1 << 60  # version 1 has a number near 2^63 where there is none
_PERIOD = 100_000  # microseconds, where a quota has none
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")

_log = logging.getLogger("gemloom.limits")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that can be had without swapping, of how many, and who limits them."""

    free: int
    limit: int
    limiter: str


# -- cores -----------------------------------------------------------------------------------


def usable_cores(root: Path = _ROOT) -> int:
    """Cores this process may keep busy, and so the threads used where nobody says how many.

    A quota of 1.5 cores counts as one. Threads wait for each other after every operation. With
    two of them the quota is used up early, and then both stand still until the next period.
    """
    quotas = [quota for folder in _groups("cpu", root) if (quota := _quota(folder)) is not None]
    return max(1, min([_cores_of_affinity(), *quotas]))


def threads_for(asked: int | None, root: Path = _ROOT) -> int:
    """How many threads to use. What was asked for counts; a line is logged if it is too many."""
    usable = usable_cores(root)
    if asked is not None and asked > usable:
        _warn_of_threads(asked, usable)
    return asked or usable


@cache
def _warn_of_threads(asked: int, usable: int) -> None:
    """Once for each pair of numbers."""
    cores = "core" if usable == 1 else "cores"
    _log.warning(
        "%d threads, but this process may use %d %s: fewer threads are faster",
        asked, usable, cores,
    )  # fmt: skip


def _cores_of_affinity() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(folder: Path) -> int | None:
    """Whole cores that a control group may use; 0 is less than one of them."""
    fields = _read(folder / "cpu.max").split()
    quota = _number(fields[0]) if fields else _number(_read(folder / "cpu.cfs_quota_us"))
    period = _number(fields[1] if fields[1:] else _read(folder / "cpu.cfs_period_us"))
    return None if not quota else quota // (period or _PERIOD)


# -- memory ----------------------------------------------------------------------------------


def memory(root: Path = _ROOT) -> Memory | None:
    """Where least is free: the machine, a control group or the address space. None: not known.

    Cached pages of files count as free, since the system gives them up for what needs memory.
    """
    found = [*_of_machine(root), *_of_groups(root), *_of_address_space(root)]
    return min(found, key=lambda memory: memory.free, default=None)


def free_memory(root: Path = _ROOT) -> int | None:
    """The bytes of ``memory`` that are free."""
    found = memory(root)
    return None if found is None else found.free


def _of_machine(root: Path) -> Iterator[Memory]:
    fields = _fields(_read(root / "proc/meminfo").replace(":", " "))
    if (free := fields.get("MemAvailable")) is not None:
        total = fields.get("MemTotal", free) * 1024
        yield Memory(free * 1024, total, "this machine")


def _of_groups(root: Path) -> Iterator[Memory]:
    for folder in _groups("memory", root):
        limits = _numbers(folder, "memory.max", "memory.high", "memory.limit_in_bytes")
        limit = min(limits, default=_NO_LIMIT)
        if limit < _NO_LIMIT:
            used = sum(_numbers(folder, "memory.current", "memory.usage_in_bytes"))
            held = max(0, used - _reclaimable(folder))
            yield Memory(max(0, limit - held), limit, "the control group")


def _reclaimable(folder: Path) -> int:
    """Bytes of a group that the system takes back when it needs them, its subgroups' included."""
    fields = _fields(_read(folder / "memory.stat"))
    return sum(fields.get(f"total_{name}", fields.get(name, 0)) for name in _RECLAIMABLE)


def _of_address_space(root: Path) -> Iterator[Memory]:
    """What ``ulimit -v`` leaves: there every mapped byte counts."""
    try:
        import resource  # not on Windows
    except ImportError:
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _fields(_read(root / "proc/self/status").replace(":", " ")).get("VmSize")
    if 0 <= limit < _NO_LIMIT and used is not None:
        yield Memory(max(0, limit - used * 1024), limit, "the address space (ulimit -v)")


# -- control groups --------------------------------------------------------------------------


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of the groups that this process is in, and of those around them.

    Both versions of the hierarchy may be there, and the controller in either.
    """
    paths = _group_paths(root)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        found = _MOUNT.match(line)
        if not found:
            continue
        name = "" if found["kind"] == "cgroup2" else controller
        if (name and name not in found["options"].split(",")) or name not in paths:
            continue
        mounted = root / _unescaped(found["at"]).lstrip("/")
        yield from _upwards(mounted, _below(paths[name], _unescaped(found["root"])))


_MOUNT = re.compile(
    r"\S+ \S+ \S+ (?P<root>\S+) (?P<at>\S+) .*?- (?P<kind>cgroup2?) \S+ (?P<options>\S+)"
)


def _group_paths(root: Path) -> dict[str, str]:
    """This process's group by controller; that of version 2, which has all of them, by ""."""
    paths = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon:
            paths.update(dict.fromkeys(controllers.split(","), path))
    return paths


def _below(path: str, root: str) -> PurePosixPath:
    """Where a group is below the folder that is mounted; that folder itself, if it is not."""
    try:
        below = PurePosixPath(path).relative_to(root)
    except ValueError:  # a container, which sees its own group alone
        return PurePosixPath()
    return PurePosixPath() if ".." in below.parts else below


def _upwards(mounted: Path, below: PurePosixPath) -> Iterator[Path]:
    yield mounted / below
    if below.parts:
        yield from (mounted / parent for parent in below.parents)


def _unescaped(path: str) -> str:
    """A path of mountinfo, which writes blanks as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda digits: chr(int(digits[1], 8)), path)


# -- files -----------------------------------------------------------------------------------


def _read(path: Path) -> str:
    """What a file of the system says; nothing where it is not there or cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(_MOST).decode(errors="replace")
    except (OSError, ValueError):  # a path with a zero byte is a ValueError
        return ""


def _fields(text: str) -> dict[str, int]:
    """The numbers of lines that have a name and a number."""
    rows = (line.split() for line in text.splitlines())
    pairs = ((row[0], _number(row[1])) for row in rows if len(row) > 1)
    return {name: number for name, number in pairs if number is not None}


def _numbers(folder: Path, *names: str) -> list[int]:
    """What those of the files hold that are there and hold a number."""
    found = (_number(_read(folder / name)) for name in names)
    return [number for number in found if number is not None]


def _number(text: str) -> int | None:
    """A number from 0 on; None for "max", -1 (which mean none) and what is no number."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
