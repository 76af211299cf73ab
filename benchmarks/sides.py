"""The two sides of a comparison, each measured by a script in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import anonymous
from rich.console import Console

from gemloom.errors import GemloomError, OptionError

HERE = Path(__file__).parent
PACKAGE = "llama-cpp-python==0.3.36"
ENVIRONMENT = HERE.parent / ".venv-peer"
LIMIT = 1_800  # seconds that one process may take
_SAMPLE = 0.005  # seconds between two looks at a process's memory


@dataclass(frozen=True, slots=True)
class Side:
    """A program that measures: ``python script JOB`` prints one JSON object."""

    name: str
    python: str
    script: str


@dataclass(frozen=True, slots=True)
class Done:
    """What a process answered, and the most memory of its own that it had, in bytes."""

    answer: dict[str, Any]
    peak: int


OURS = Side("gemloom", sys.executable, "ours.py")


def peer_side(python: str | None, console: Console) -> Side | None:
    """llama.cpp, built for this machine if need be; None, and why on ``console``, if it cannot be.

    ``python`` is the interpreter of an environment that has it already. OptionError if it has not.
    """
    if python is not None:
        side = Side("llama.cpp", python, "peer.py")
        try:
            run(side, {"task": "version"})
        except (GemloomError, OSError) as error:
            raise OptionError(f"--peer {python}: {error}") from error
        return side
    built = ENVIRONMENT / "bin" / "python"
    marker = ENVIRONMENT / f".{PACKAGE}"
    if not marker.is_file():
        why = _build(built, console)
        if why:
            console.print(f"llama.cpp is missing, only Gemloom is measured: {why}")
            return None
        marker.touch()
    return Side("llama.cpp", str(built), "peer.py")


def _build(python: Path, console: Console) -> str:
    """Make the peer's environment; why it failed, or an empty string."""
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)],
        # not from a cache: that wheel may have been compiled for another processor
        [str(python), "-m", "pip", "install", "--no-cache-dir", "--no-binary", "llama-cpp-python",
         "--disable-pip-version-check", PACKAGE],
    ]  # fmt: skip
    with console.status(f"compiling {PACKAGE} for this machine (10 minutes on two cores)"):
        for command in commands:
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                return str(error)
            if done.returncode:
                return last_line(done.stderr or done.stdout)
    return ""


def run(side: Side, job: dict[str, Any]) -> Done:
    """Do one job in a fresh process. GemloomError if it fails or takes too long.

    Its peak is the most RssAnon and RssShmem seen from outside, every 5 ms: memory of its own,
    without the pages of mapped files.
    """
    command = [side.python, str(HERE / side.script), json.dumps(job)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        try:
            peak = _watch(process, side.name)
        finally:
            process.kill()
            process.wait()
        out.seek(0), err.seek(0)
        if process.returncode:
            why = last_line(err.read().decode("utf-8", "replace"))
            raise GemloomError(f"{side.name}: {why.removeprefix('error: ')}")
        return Done(json.loads(out.read()), peak)


def _watch(process: subprocess.Popen[bytes], name: str) -> int:
    peak, end = 0, time.monotonic() + LIMIT
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        if time.monotonic() > end:
            raise GemloomError(f"{name}: not done after {LIMIT:,} seconds")
        time.sleep(_SAMPLE)
    return peak


def last_line(text: str) -> str:
    """The last line that says something."""
    return (text.strip().splitlines() or ["no message"])[-1].strip()
