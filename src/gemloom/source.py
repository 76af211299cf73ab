"""Where weights come from: everything a caller may name or hand over becomes a list of Blobs.

Not a parser: the bytes are looked at only for the four that begin every GGUF
(``gguf.py`` reads the rest). Files are mapped, buffers used where they lie; only
streams are read. GGUF has no checksum, so parts in the wrong order are noticed where
the first is not first, or the header is cut wrongly, and not where two later parts
were swapped: the built-in model alone is checked, by its SHA-256.
"""

import io
import mmap
import os
import re
import stat
from collections.abc import Callable, Collection, Sequence
from errno import EACCES, ENOSPC, EROFS
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gemloom import builtin
from gemloom.blob import Blob, Origin
from gemloom.builtin import DEFAULT_MODEL
from gemloom.errors import FormatError, OptionError, SourceError
from gemloom.gguf import MAGIC

__all__ = ["DEFAULT_MODEL", "folder", "resolve"]

_PIECE = 8 << 20
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<wanted>.+))?")
_NO_MODEL = re.compile(r"(?<![a-z0-9])(mmproj|assistant|mtp|imatrix)(?![a-z0-9])", re.IGNORECASE)
_PREFERRED = ("Q4_K_M", "Q4_0")
_SECRET = re.compile(r"Bearer .*|hf_\w+")

_T = TypeVar("_T")


def resolve(source: object) -> list[Blob]:
    """The bytes that ``source`` names or is: one Blob, or one for each file of a split GGUF.

    ``source`` is one of

    - a path (``str`` or ``os.PathLike``): mapped, never read; of a split GGUF, the first file.
      A mapped file must not be cut short while in use;
    - ``"hf:owner/repo"``, ``"hf:owner/repo:file.gguf"`` or ``"hf:owner/repo:Q4_K_M"``: a
      repository of the Hugging Face hub, kept in its cache. With no file named: the only
      model there, else the one in Q4_K_M, else the one in Q4_0;
    - a built-in name, ``"gemma-3-270m"`` (a file of that name: ``"./gemma-3-270m"``);
    - any object with the buffer protocol (``bytes``, ``bytearray``, ``mmap``, numpy array, ...),
      contiguous: used in place and kept alive. A ``bytearray`` cannot be resized meanwhile;
    - a list or tuple of paths and buffers: the parts of one file, cut anywhere, in order; or,
      where every one of them begins as a GGUF, the files of a split GGUF;
    - a binary file object: a real file is mapped from its position on, which does not move;
      any other (a pipe, a socket's ``makefile("rb")``, a decompressor) is read to its end.

    Raises SourceError where the bytes cannot be had, FormatError for an empty file or damaged
    built-in model, OptionError for a source of another kind.
    """
    if isinstance(source, str):
        return _named(source)
    if isinstance(source, os.PathLike):
        return _files(os.fsdecode(source))
    if isinstance(source, list | tuple):
        return _parts(source)
    if _is_buffer(source):
        buffer = _buffer(source)
        return [Blob(_buffer_name(source, buffer), [buffer])]
    if callable(getattr(source, "read", None)):
        return [_file_object(source)]
    raise OptionError(
        f"a model source is a path, a name, bytes, a list of parts or a binary file, "
        f"not {type(source).__name__}"
    )


def folder(source: object, names: Collection[str]) -> dict[str, Blob] | None:
    """The files of these names in a folder or a hub repository; None for any other source.

    ``source`` is a path or ``"hf:owner/repo"``, which counts as a folder where any of ``names`` is
    there. Raises SourceError where the bytes cannot be had.
    """
    if isinstance(source, str) and source.startswith("hf:"):
        return _hub_folder(source, names)
    if not isinstance(source, str | os.PathLike):
        return None
    path = os.fsdecode(source)
    try:
        there = set(os.listdir(path))
    except (NotADirectoryError, FileNotFoundError, ValueError):
        return None  # resolve() says what is wrong
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error
    found = (os.path.join(path, name) for name in names if name in there)
    return {os.path.basename(file): Blob(file, [_map(file)]) for file in found}


def _hub_folder(name: str, wanted: Collection[str]) -> dict[str, Blob] | None:
    match = _HUB.fullmatch(name)
    if match is None or match["wanted"] is not None:
        return None
    files = _ask_hub(name, partial(_hub_files, match["repo"]))
    found = {}
    for file in (file for file in wanted if file in files):
        path = _ask_hub(f"{name}:{file}", partial(_download, match["repo"], file))
        found[file] = Blob(f"{name}:{file}", [_map(path)])
    return found or None


def _named(name: str) -> list[Blob]:
    if name.startswith("hf:"):
        return _hub(name)
    if name == DEFAULT_MODEL:
        blob = Blob(name, [_map(os.fspath(path)) for path in builtin.part_paths()])
        builtin.verify(blob)
        return [blob]
    return _files(name)


# -- files ---------------------------------------------------------------------------


def _files(name: str) -> list[Blob]:
    return [_file(path, path) for path in _split_names(name)]


def _file(name: str, path: str) -> Blob:
    """One whole file; of a pipe, all that comes."""
    part = _map(path)
    try:
        status = os.stat(path)
    except OSError:  # deleted since; the mapping holds its bytes
        return Blob(name, [part])
    regular = stat.S_ISREG(status.st_mode)
    origin = Origin(path, status.st_size, status.st_mtime_ns) if regular else None
    return Blob(name, [part], origin)


def _split_names(name: str) -> list[str]:
    """Every file of the split GGUF whose first is ``name``; ``[name]`` where it is not split."""
    match = _SPLIT.fullmatch(name)
    if match is None or int(match["count"]) == 0:
        return [name]
    stem, count = match["stem"], int(match["count"])
    first = f"{stem}-00001-of-{count:05}.gguf"
    if name != first:
        raise SourceError(f"{name}: a later part of a split file; name its first part, {first}")
    return [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def _map(path: str) -> memoryview:
    """The whole file, mapped read-only; one that cannot be mapped (a pipe) is read."""
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise SourceError(f"{path}: a folder; name a .gguf file in it")
        with open(path, "rb") as file:
            return _map_file(path, file)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file{_hint(path)}") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise SourceError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _hint(path: str) -> str:
    """What a bare word that is no file may have been meant for."""
    if os.path.basename(path) != path or path.endswith(".gguf"):
        return ""
    return f"; the built-in model is {DEFAULT_MODEL}, one of the hub is hf:owner/repo"


def _map_file(name: str, file: Any) -> memoryview:
    """An open file from its position to its end: mapped if it is a regular one, else read."""
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        return _read(name, file)
    start = file.tell()
    if start >= status.st_size:
        raise FormatError(f"{name}: empty{f' after byte {start:,}' if start else ''}")
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[start:]


# -- buffers and parts ---------------------------------------------------------------


def _is_buffer(source: Any) -> bool:
    try:
        memoryview(source)
    except TypeError:
        return False
    except (ValueError, BufferError):  # a buffer, but a released or a strange one
        return True
    return True


def _buffer(source: Any) -> memoryview:
    """The bytes of a buffer of any item type, in place."""
    try:
        # numpy takes item types that memoryview.cast refuses, ctypes arrays' among them
        return np.frombuffer(source, np.uint8).data
    except (ValueError, BufferError, TypeError) as error:
        raise OptionError(
            f"{type(source).__name__} cannot be used as bytes in place: {error}"
        ) from error


def _buffer_name(source: object, buffer: memoryview) -> str:
    return f"<{type(source).__name__} of {buffer.nbytes:,} bytes>"


def _parts(sources: Sequence[Any]) -> list[Blob]:
    if not sources:
        raise OptionError("a model source cannot be an empty list")
    named = [_part(number, source) for number, source in enumerate(sources)]
    if len(named) > 1 and all(bytes(part[:4]) == MAGIC for _, part in named):
        return [Blob(name, [part]) for name, part in named]
    name = named[0][0] + (f" and {len(named) - 1} more parts" if len(named) > 1 else "")
    return [Blob(name, [part for _, part in named])]


def _part(number: int, source: Any) -> tuple[str, memoryview]:
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        return path, _map(path)
    if _is_buffer(source):
        buffer = _buffer(source)
        return _buffer_name(source, buffer), buffer
    raise OptionError(
        f"part {number + 1} of the model must be a path or bytes, not {type(source).__name__}"
    )


# -- file objects --------------------------------------------------------------------


def _file_object(file: Any) -> Blob:
    name = _file_name(file)
    if isinstance(file, io.TextIOBase):
        raise OptionError(f"{name}: open in text mode; open it with 'rb'")
    if not _is_plain_file(file):
        return Blob(name, [_read(name, file)])
    try:
        return Blob(name, [_map_file(name, file)])
    except (OSError, ValueError) as error:  # ValueError: closed
        raise SourceError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def _is_plain_file(file: Any) -> bool:
    """Whether the descriptor's bytes are what ``read`` gives: not so for ``gzip.open`` and such."""
    file = getattr(file, "file", file)  # what tempfile.NamedTemporaryFile wraps
    return isinstance(getattr(file, "raw", file), io.FileIO)


def _file_name(file: object) -> str:
    name = getattr(file, "name", None)
    if isinstance(name, str | bytes) and name:
        return os.fsdecode(name)
    return f"<{type(file).__name__}>"


def _read(name: str, file: Any) -> memoryview:
    """All that is left in a stream, in one growing buffer: at no time are there two copies."""
    data = bytearray()
    while True:
        try:
            piece = file.read(_PIECE)
        except Exception as error:  # whatever the stream is made of may raise its own
            raise SourceError(
                f"{name}: reading failed after {len(data):,} bytes: {error}"
            ) from error
        if piece is None:
            raise SourceError(f"{name}: a non-blocking stream; make it blocking")
        if not isinstance(piece, bytes | bytearray | memoryview):
            raise OptionError(f"{name}: gives {type(piece).__name__}, not bytes; open it with 'rb'")
        if not piece:
            break
        data += piece
    if not data:
        raise FormatError(f"{name}: empty")
    return memoryview(data)


# -- the Hugging Face hub ------------------------------------------------------------


def _hub(name: str) -> list[Blob]:
    match = _HUB.fullmatch(name)
    if match is None:
        raise OptionError(f"{name}: write hf:owner/repo or hf:owner/repo:file.gguf")
    repo, first = match["repo"], match["wanted"]
    if first is None or not first.endswith(".gguf"):
        first = _choose(repo, _ask_hub(name, partial(_hub_files, repo)), wanted=first)
    prefix = f"hf:{repo}:"
    blobs = []
    for part in _split_names(prefix + first):
        path = _ask_hub(part, partial(_download, repo, part.removeprefix(prefix)))
        blobs.append(_file(part, path))
    return blobs


def _download(repo: str, file: str) -> str:
    import huggingface_hub

    return huggingface_hub.hf_hub_download(repo, file)


def _hub_files(repo: str) -> list[str]:
    """Names of the repository's files; offline, of those in the cache."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE:
        return huggingface_hub.list_repo_files(repo)
    root = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _choose(repo: str, files: list[str], wanted: str | None) -> str:
    """The one model of the wanted type; with none wanted the only one, or a preferred type."""
    models = sorted(file for file in files if _is_model(file))
    if not models:
        raise SourceError(f"hf:{repo}: no GGUF model in this repository")
    if wanted is None and len(models) == 1:
        return models[0]
    for kind in (wanted,) if wanted else _PREFERRED:
        found = [file for file in models if _has_type(file, kind)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise SourceError(f"hf:{repo}: name one model, as hf:{repo}:FILE, of {', '.join(models)}")


def _is_model(file: str) -> bool:
    match = _SPLIT.fullmatch(file)
    later = match is not None and int(match["number"]) != 1
    return file.endswith(".gguf") and not later and not _NO_MODEL.search(file)


def _has_type(file: str, kind: str) -> bool:
    """Whether the name says this quantization: Q4_K is not in Q4_K_M, nor Q4_0 in IQ4_0."""
    pattern = rf"(?<![a-z0-9]){re.escape(kind)}(?![a-z0-9_])"
    return re.search(pattern, file, re.IGNORECASE) is not None


def _ask_hub(name: str, question: Callable[[], _T]) -> _T:
    """The hub's answer. Raises SourceError with one line that says what to do."""
    try:
        return question()
    except Exception as error:  # errors of whichever HTTP library the hub package uses come through
        reason = _hub_reason(error)
    raise SourceError(f"{name}: {reason}")  # not "from": its text may quote the token


def _hub_reason(error: BaseException) -> str:
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if isinstance(error, errors.LocalEntryNotFoundError):
        if HF_HUB_OFFLINE:
            return "not in the hub's cache, and HF_HUB_OFFLINE is set; unset it to download"
        error = error.__cause__ or error
    for kind, reason in (
        (errors.GatedRepoError, "gated; accept its terms on its page, then set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "no such repository, or private; for that set HF_TOKEN"),
        (errors.EntryNotFoundError, "no such file in the repository"),
    ):
        if isinstance(error, kind):
            return reason
    return _network_reason(error)


def _network_reason(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub refuses the token; set HF_TOKEN to a valid one, or unset it"
    if status is not None:
        return f"the hub answered with HTTP status {status}; try again later"
    if isinstance(error, OSError) and error.errno in (ENOSPC, EACCES, EROFS):
        return f"{error.filename or 'the cache'}: {error.strerror}"
    lines = _SECRET.sub("***", str(error)).strip().splitlines() or [""]
    return (
        f"no answer from the hub ({type(error).__name__}: {lines[0][:200]}); "
        "check the network, or set HF_HUB_OFFLINE=1 to use the cache alone"
    )
