"""OUT of every command that writes: one rule for what is there already, and for being stopped."""

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from gemloom.errors import OptionError, OutputError

Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
_STREAMS = ("/dev", "/dev/fd", "/proc/self/fd")  # what is named here is never renamed over


class Terminated(KeyboardInterrupt):
    """SIGTERM came while a command was writing: it cleans up as after Ctrl-C."""


@contextmanager
def output(
    out: Path, *sources: str | Path | None, force: bool, instead: str = "--force replaces it"
) -> Iterator[Path]:
    """Where to write what is to be ``out``; SIGTERM is as Ctrl-C meanwhile.

    That is ``out`` itself, or for a pipe or a device a file that is sent there when the block has
    ended well. OutputError, before anything is read, where it is there and ``force`` is not set
    (``instead`` says what could be done), or cannot be written; OptionError, force or not, where
    it is one of ``sources``.
    """
    check_output(out, *sources, force=force, instead=instead)
    with _stopped_by_sigterm(), ExitStack() as stack:
        if not _is_special(out):
            yield out
            return
        made = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=roomy())), out.name)
        if _is_stdout(out):
            stack.enter_context(redirect_stdout(sys.stderr))  # reports are not part of it
        yield made
        _send(made, out)


def check_output(
    out: Path, *sources: str | Path | None, force: bool, instead: str = "--force replaces it"
) -> None:
    """As ``output`` checks. A pipe or a device is not replaced, so it may be there."""
    if any(os.path.exists(name) and _is_same(name, out) for name in sources if name):
        raise OptionError(f"{out}: is the source itself; name another file")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: there is no folder {out.parent}")
    if _is_special(out):
        return
    if out.is_dir():
        raise OutputError(f"{out}: is a folder")
    if os.path.lexists(out) and not force:
        raise OutputError(f"{out}: already exists; {instead}")


def check_folder(out: Path, *, force: bool) -> bool:
    """Whether a folder with something in it is to get files. OutputError as ``output``."""
    if not out.parent.is_dir():
        raise OutputError(f"{out}: there is no folder {out.parent}")
    if os.path.lexists(out) and not out.is_dir():
        raise OutputError(f"{out}: already exists, and is not a folder")
    used = out.is_dir() and any(out.iterdir())
    if used and not force:
        raise OutputError(f"{out}: already exists; --force replaces the adapter in it")
    return used


def roomy() -> str:
    """Where to put much for a short time. /tmp is often in memory."""
    disk = "/var/tmp"  # noqa: S108  (for files that others cannot read)
    return disk if "TMPDIR" not in os.environ and Path(disk).is_dir() else tempfile.gettempdir()


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending, and has to clean up
        raise Terminated

    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_special(path: Path) -> bool:
    """Whether it is a pipe, a device or a stream: written to, and never replaced."""
    if os.fspath(path.parent) in _STREAMS:
        return path.exists()
    return path.exists() and not (path.is_file() or path.is_dir())


def _is_same(name: str | Path, out: Path) -> bool:
    return out.exists() and os.path.samefile(name, out)


def _is_stdout(path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(1), path.stat())
    except OSError:  # closed
        return False


def _send(made: Path, out: Path) -> None:
    try:
        with open(made, "rb") as source, open(out, "wb") as target:
            shutil.copyfileobj(source, target)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror or error}") from error
