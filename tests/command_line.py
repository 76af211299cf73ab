"""The command line from outside: called in this process, in one of its own, at a terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

import gemloom
import tiny
from gemloom.cli import app

# One thread: two only get in each other's way where other tests run too.
GREEDY = ("--temperature", "0", "--threads", "1")


def call(*args: str | Path, input: str | bytes | None = None) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(arg) for arg in args], input=input)


def fine(*args: str | Path, input: str | bytes | None = None) -> Result:
    result = call(*args, input=input)
    assert result.exit_code == 0, result.output
    return result


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "gemloom", *map(str, args)]


ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(gemloom.__file__).parents[1]),
    "TERM": "xterm",
    "COLUMNS": "80",
    "PYTHONUNBUFFERED": "",  # errors of buffered output come late, so that is what is tried
}


def write(folder: Path, variant: str = "e2b", **forms: Any) -> Path:
    path = folder / f"{variant}.gguf"
    path.write_bytes(tiny.gguf_bytes(tiny.VARIANTS[variant], **forms))
    return path


class Terminal:
    """A process whose stdin, stdout and stderr are a terminal."""

    def __init__(self, *args: str | Path) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command(*args), stdin=slave, stdout=slave, stderr=slave, env=ENVIRONMENT
        )
        os.close(slave)
        self.seen = b""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read(self, pattern: str, seconds: float = 60) -> str:
        """All that came until ``pattern`` did; later calls see what comes after it."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern.encode(), self.seen)):
            assert time.monotonic() < end, f"no {pattern} in {self.seen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536)
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text.decode()

    def finish(self, seconds: float = 60, *, interrupted: bool = False) -> tuple[int, str]:
        """Exit status and all that came until then.

        ``interrupted`` presses Ctrl-C until it works: readline misses a signal that comes after
        the prompt was shown and before it waits.
        """
        again, end = time.monotonic(), time.monotonic() + seconds
        while time.monotonic() < end:
            if interrupted and self.process.poll() is None and time.monotonic() >= again:
                self.process.send_signal(signal.SIGINT)
                again = time.monotonic() + 5
            if not select.select([self.master], [], [], 0.5)[0]:
                continue
            try:
                self.seen += os.read(self.master, 65536)
            except OSError:  # the other side has gone
                break
        return self.process.wait(1), self.seen.decode()


@contextmanager
def terminal(*args: str | Path) -> Iterator[Terminal]:
    opened = Terminal(*args)
    try:
        yield opened
    finally:
        opened.process.kill()
        opened.process.wait()
        os.close(opened.master)


def endless(opened: gemloom.Model) -> list[str]:
    """Options under which the model never ends by itself."""
    return [f"--logit-bias={token}=-100" for token in opened.tokenizer.eog]


@contextmanager
def served(*args: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of the command and its URL; killed at the end if it is still there."""
    process = subprocess.Popen(
        command("serve", *args, "--port", "0", "--threads", "1"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert process.stdout
        line = process.stdout.readline()
        found = re.search(r"http://(127\.0\.0\.1|0\.0\.0\.0):\d+", line)
        assert found, process.communicate()
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()
