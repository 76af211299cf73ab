"""Which kernels beside ggml's plain ones can be trusted on this machine.

A compiler's mistake in one of them ends the process, or gives wrong results in silence. So
``proving.py`` computes small products with each, in a child process, and what it finds is kept in
the user's cache: one small file for each machine and build. Loads no native library.

A kernel is named by its subject, or by its subject and a type: "CPU_REPACK", "CPU_REPACK Q4_0".
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

from gemloom import __version__
from gemloom.errors import DeviceError, SourceError
from gemloom.files.caching import cache_folder, write_whole
from gemloom.ggml.processor import first_cpu

MODULE = "gemloom.kernels.proving"
PLAIN = "plain"  # the subject that all others are compared with, and that itself is with numpy
END = "end"  # the child's last line, so that one that stops early is not taken for done
_LIMIT = 30.0  # seconds that the child may take; it takes less than one
_CHILD = "GEMLOOM_PROVING"  # set in the child, so that it never starts another
_CPU = ("vendor_id", "model name", "cpu family", "model", "stepping", "flags", "microcode",
        "CPU implementer", "CPU part", "CPU variant", "Features")  # fmt: skip
_KERNELS_FAULT = ("SIGSEGV", "SIGILL", "SIGBUS", "SIGFPE", "SIGABRT", "SIGTRAP", "SIGSYS")

_log = logging.getLogger("gemloom.ggml")
_lock = Lock()
_known: Verdicts | None = None


class _Unproven(Exception):
    """Why nothing could be proven: what comes after "the kernels could not be proven"."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What was found of each kernel that was tried: "" where it is right, else what is wrong."""

    found: dict[str, str]
    file: str = ""  # in which it is kept; empty where it is not
    problem: str = ""  # why nothing was proven, if nothing was

    def proven(self, name: str) -> bool:
        """Whether a subject or one type of it was tried, and all that was tried of it is right."""
        tried = [wrong for kernel, wrong in self.found.items() if _of(kernel, name)]
        return bool(tried) and not any(tried)

    def refuted(self, name: str) -> bool:
        """Whether anything that was tried of it is wrong."""
        return any(wrong for kernel, wrong in self.found.items() if _of(kernel, name))

    @property
    def left_out(self) -> dict[str, str]:
        """What is wrong, by kernel."""
        return {kernel: wrong for kernel, wrong in self.found.items() if wrong}


def _of(kernel: str, name: str) -> bool:
    return kernel == name or kernel.startswith(f"{name} ")


def verdicts(again: bool = False) -> Verdicts:
    """What is known of the kernels here; proven now where nothing is, or if ``again``.

    That takes under a second, once for each machine and build. Any thread may ask.
    """
    global _known
    with _lock:
        if _known is None or again:
            _known = (None if again else _kept()) or _prove()
        return _known


def proven(name: str) -> bool:
    """Whether a kernel of ggml's was tried and is right. DeviceError if its plain ones are not."""
    return _sound().proven(name)


def refuted(name: str) -> bool:
    """Whether a kernel was tried and is wrong. DeviceError if ggml's plain ones are."""
    return _sound().refuted(name)


def _sound() -> Verdicts:
    found = verdicts()
    for kernel, wrong in found.left_out.items():
        if _of(kernel, PLAIN):
            raise DeviceError(
                f"ggml does not run on this CPU: {kernel}: {wrong}; build it for this one: pip "
                "install --force-reinstall --no-deps --no-cache-dir --no-binary ggml-python "
                f"ggml-python=={version('ggml-python')}"
            )
    return found


# -- the child ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Told:
    """What a child said before it ended."""

    found: dict[str, str]
    begun: str  # the subject or kernel that it was at
    done: bool


def _prove() -> Verdicts:
    try:
        found = _run_all()
    except _Unproven as error:
        _log.warning("the kernels could not be proven (%s); ggml's faster ones are left out", error)
        return Verdicts({}, problem=str(error))
    for kernel, wrong in found.items():
        if wrong:
            _log.info("%s is left out: %s", kernel, wrong)
    return Verdicts(found, _keep(found))


def _run_all() -> dict[str, str]:
    """What was found of all. A subject that ends the child is not in the next child's list."""
    found: dict[str, str] = {}
    ended: list[str] = []
    while True:
        told, code, error = _run(ended)
        found |= told.found
        if told.done:
            return found
        subject, fault = told.begun.partition(" ")[0], _fault(code)
        if not fault or not subject or subject in ended:
            raise _Unproven(error or fault or f"the child ended with status {code}")
        found = {kernel: wrong for kernel, wrong in found.items() if not _of(kernel, subject)}
        found[subject] = f"{told.begun} {fault}"
        if subject == PLAIN:  # then all others end as well
            return found
        ended.append(subject)


def _run(without: Sequence[str]) -> tuple[_Told, int | None, str]:
    """What a child told, its exit status (None: it hung) and the last line of what it complained.

    A session of its own, so that Ctrl-C does not look like a fault of a kernel.
    """
    path = [entry for entry in (*sys.path, str(Path(__file__).parents[2])) if entry]
    environment = {**os.environ, _CHILD: "1", "PYTHONPATH": os.pathsep.join(path)}
    try:
        child = subprocess.run(  # noqa: S603  (ours)
            [*_command(), *without], capture_output=True, stdin=subprocess.DEVNULL,
            env=environment, timeout=_LIMIT, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as hung:
        return _read(hung.stdout or b""), None, ""
    except OSError as error:
        raise _Unproven(f"{sys.executable}: {error.strerror or error}") from error
    complaint = child.stderr.decode(errors="replace").strip() if child.returncode > 0 else ""
    return _read(child.stdout), child.returncode, complaint.rpartition("\n")[2]


def _command() -> list[str]:
    """What starts the child: this Python, with nothing of the current folder on its path."""
    if os.environ.get(_CHILD):
        raise _Unproven("this is the child that proves them")
    name = Path(sys.executable or "").name.lower()
    if getattr(sys, "frozen", False) or not name.startswith(("python", "pypy")):
        raise _Unproven(f"there is no Python to do it: sys.executable is {sys.executable!r}")
    return [sys.executable, "-P", "-m", MODULE]


def _read(output: bytes) -> _Told:
    """Lines are a subject or kernel that is begun, one with what was found, or END."""
    found: dict[str, str] = {}
    begun, done = "", False
    for line in output.decode(errors="replace").splitlines():
        kernel, tab, wrong = line.partition("\t")
        if tab:
            found[kernel] = wrong
        begun, done = kernel.partition(" ")[0] if tab else kernel, line == END
    return _Told(found, begun, done)


def _fault(code: int | None) -> str:
    """What a kernel did to end its process; empty where it may be the system's doing."""
    if code is None:
        return f"hung: no result in {_LIMIT:.0f} s"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else ""
    return f"ended its process ({name})" if name in _KERNELS_FAULT else ""


# -- the memory --------------------------------------------------------------------------


def _machine() -> dict[str, Any]:
    """All that what was found depends on: the processor and the builds."""
    package = find_spec("ggml")
    home = Path(package.origin).parent / "lib" if package and package.origin else Path()
    ours = Path(__file__).parents[1] / "kernels"
    built = sorted([*home.glob("*ggml*"), *ours.glob("_native.*")])
    cpu = first_cpu()
    return {
        "cpu": {name: cpu[name] for name in _CPU if name in cpu},
        "system": [platform.system(), platform.machine(), platform.processor()],
        "libraries": [
            [path.name, status.st_size, status.st_mtime_ns]
            for path in built
            for status in [path.stat()]
        ],
        "ggml_python": version("ggml-python"),
        "gemloom": __version__,
    }


def _file(machine: dict[str, Any]) -> Path:
    """Where what was found on a machine is kept. SourceError."""
    digest = hashlib.blake2b(json.dumps(machine).encode(), digest_size=8).hexdigest()
    return cache_folder() / "kernels" / f"{digest}.json"


def _kept() -> Verdicts | None:
    """What was found before; None where that is not there or not whole."""
    machine = _machine()
    try:
        path = _file(machine)
        kept = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError, SourceError):
        return None
    if not isinstance(kept, dict) or kept.get("machine") != machine:
        return None
    found = kept.get("found")
    if not isinstance(found, dict) or not all(isinstance(wrong, str) for wrong in found.values()):
        return None
    return Verdicts(found, str(path))


def _keep(found: dict[str, str]) -> str:
    """Where it is kept for later starts; empty where it cannot be: then the next proves again."""
    machine = _machine()
    try:
        path = _file(machine)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"machine": machine, "found": found}, indent=1) + "\n")
    except (OSError, SourceError) as error:
        _log.info("what was proven of the kernels cannot be kept: %s", error)
        return ""
    return str(path)
