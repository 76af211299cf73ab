"""Where weights come from: everything a caller may name or hand over becomes a list of Blobs.

Not a parser: the bytes are looked at only for the first few, which tell a GGUF and a sealed
file (``gguf.py`` and ``sealed.py`` read the rest). Files are mapped, buffers used where they
lie, URLs read where a tensor is wanted; only streams are read from end to end. GGUF has no
checksum, so parts in the wrong order are noticed where the first is not first, or the header is
cut wrongly, and not where two later parts were swapped: only the built-in model is checked, by
its SHA-256, and sealed files, chunk by chunk.
"""

import io
import mmap
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gemloom.errors import FormatError, GemloomError, OptionError, SourceError
from gemloom.files import builtin, hub, sealed, urls
from gemloom.files.blob import Blob, Mapping, Origin, Stream
from gemloom.files.builtin import DEFAULT_MODEL
from gemloom.files.gguf import MAGIC
from gemloom.files.names import cleaned, is_url, shown
from gemloom.files.sealed import Key

__all__ = ["DEFAULT_MODEL", "folder", "locate", "resolve"]

_PIECE = 8 << 20
_SPLIT = re.compile(
    r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<kind>\.gguf(\.sealed)?)", re.DOTALL
)
_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<wanted>.+))?")
_NO_MODEL = re.compile(r"(?<![a-z0-9])(mmproj|assistant|mtp|imatrix)(?![a-z0-9])", re.IGNORECASE)
_BEGINNINGS = (MAGIC, sealed.MAGIC[:4])
_PREFERRED = ("Q4_K_M", "Q4_0")


def resolve(
    source: object,
    *,
    key: Key | str | bytes | os.PathLike[str] | None = None,
    forward: bool = False,
) -> list[Blob]:
    """The bytes that ``source`` names or is: one Blob, or one for each file of a split GGUF.

    ``source`` is one of

    - a path (``str`` or ``os.PathLike``): mapped, never read, but for a pipe; of a split GGUF, the
      first file. A mapped file must not be cut short while in use;
    - ``"hf:owner/repo"``, ``"hf:owner/repo:file.gguf"`` or ``"hf:owner/repo:Q4_K_M"``: a
      repository of the Hugging Face hub, kept in its cache. With no file named: the only
      model there, else the one in Q4_K_M, else the one in Q4_0;
    - a URL that fsspec knows (``"https://..."``, ``"s3://..."``): read by ranges, what is wanted
      and when it is wanted; of a split GGUF, the first file;
    - a built-in name, ``"gemma-3-270m"`` (a file of that name: ``"./gemma-3-270m"``);
    - any object with the buffer protocol (``bytes``, ``bytearray``, ``mmap``, numpy array, ...),
      contiguous: used in place and kept alive. A ``bytearray`` cannot be resized meanwhile;
    - a list or tuple of paths and buffers: the parts of one file, cut anywhere, in order; or,
      where every one of them begins as a file of its own, the files of a split GGUF;
    - an iterator of buffers: the parts of one file, cut anywhere, in order, as they arrive;
    - a binary file object: a real file is mapped from its position on, which does not move;
      any other (a pipe, a socket's ``makefile("rb")``, a decompressor) is read to its end.

    Any of these may be a sealed file: ``key`` opens it, 32 bytes, their base64 or the path of a
    file that holds that; by default, what the environment variable GEMLOOM_KEY holds.

    With ``forward`` True, iterators, files that are no real ones and URLs without ranges become a
    Stream, which gives its bytes in order, once; else they are read to their end here.

    Raises SourceError where the bytes cannot be had or the key is another, FormatError for an
    empty file or damaged built-in model, OptionError for a source or key of another kind, and for
    a key where nothing is sealed: whoever gives one relies on its seal.
    """
    given = None if key is None else sealed.read_key(key)  # a wrong one is told before all else
    blobs = locate(source, forward=forward)
    if given is None and not any(map(sealed.is_sealed, blobs)):
        return blobs
    opener = given or sealed.read_key()
    return [_unsealed(blob, opener) for blob in blobs]


def locate(source: object, *, forward: bool = False) -> list[Blob]:
    """As ``resolve``, but a sealed file stays sealed."""
    if isinstance(source, str):
        return _named(source, forward)
    if isinstance(source, os.PathLike):
        return _files(os.fsdecode(source), forward)
    if isinstance(source, list | tuple):
        return _parts(source, forward)
    if _is_buffer(source):
        buffer = _buffer(source)
        return [Blob(_buffer_name(source, buffer), [buffer])]
    if callable(getattr(source, "read", None)):
        return [_file_object(source, forward)]
    if isinstance(source, Iterator):
        name = f"<{type(source).__name__} of parts>"
        return [_in_order(name, _arriving(name, source), forward)]
    if hasattr(source, "__aiter__"):
        raise OptionError("parts of an asynchronous iterator are for gemloom.load_async")
    raise OptionError(
        f"a model source is a path, a URL, a name, bytes, a list or an iterator of parts or "
        f"a binary file, not {type(source).__name__}"
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
    files = hub.files(name, match["repo"])
    found = {}
    for file in (file for file in wanted if file in files):
        path = hub.download(f"{name}:{file}", match["repo"], file)
        found[file] = Blob(f"{name}:{file}", [_map(path)])
    return found or None


def _unsealed(blob: Blob, key: Key | None) -> Blob:
    if not sealed.is_sealed(blob):
        raise OptionError(f"{blob.name}: not sealed, so no key proves that it is what it should be")
    if key is None:
        raise SourceError(f"{blob.name}: sealed; give its key, or set {sealed.VARIABLE} to it")
    return sealed.opened(blob, key)


def _named(name: str, forward: bool) -> list[Blob]:
    if name.startswith("hf:"):
        return _hub(name)
    if is_url(name):
        return _url(name, forward)
    if name == DEFAULT_MODEL:
        blob = Blob(name, [_map(os.fspath(path)) for path in builtin.part_paths()])
        builtin.verify(blob)
        return [blob]
    return _files(name, forward)


def _url(url: str, forward: bool) -> list[Blob]:
    if url.startswith(("file://", "local://")):
        return _files(shown(url).split("://", 1)[1], forward)
    _split_names(shown(url))  # a complaint about the name is not to show what is secret in it
    return [_at_url(name, forward) for name in _split_names(url)]


def _at_url(url: str, forward: bool) -> Blob:
    found = urls.open_url(url)
    return found if isinstance(found, Blob) else _in_order(shown(url), found, forward)


def _in_order(name: str, parts: Iterable[memoryview], forward: bool) -> Blob:
    """Parts that come in order, as they come or, without ``forward``, when they have come."""
    return Stream(name, iter(parts)) if forward else Blob(name, list(parts))


# -- files ---------------------------------------------------------------------------


def _files(name: str, forward: bool) -> list[Blob]:
    return [_file(path, path, forward) for path in _split_names(name)]


def _file(name: str, path: str, forward: bool) -> Blob:
    """One whole file; of a pipe, what comes."""
    if forward and is_pipe(path):
        return Stream(name, _from_pipe(path))
    part = _map(path)
    try:
        status = os.stat(path)
    except OSError:  # deleted since; the mapping holds its bytes
        return Blob(name, [part])
    regular = stat.S_ISREG(status.st_mode)
    origin = Origin(path, status.st_size, status.st_mtime_ns) if regular else None
    return Blob(name, [part], origin)


def is_pipe(path: str) -> bool:
    """Whether what comes from there can be had but once."""
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):  # told where it is opened
        return False


def _from_pipe(path: str) -> Iterator[memoryview]:
    try:
        with open(path, "rb") as file:
            yield from _pieces(path, file)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error


def _split_names(name: str) -> list[str]:
    """Every file of the split GGUF whose first is ``name``; ``[name]`` where it is not split."""
    match = _SPLIT.fullmatch(name)
    if match is None or int(match["count"]) == 0:
        return [name]
    stem, count, kind = match["stem"], int(match["count"]), match["kind"]
    names = [f"{stem}-{number:05}-of-{count:05}{kind}" for number in range(1, count + 1)]
    if name != names[0]:
        raise SourceError(f"{name}: a later part of a split file; name its first part, {names[0]}")
    return names


def _map(path: str) -> memoryview:
    """The whole file, mapped read-only; one that cannot be mapped (a pipe) is read."""
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise SourceError(f"{path}: a folder; {_in_folder(path)}")
        with open(path, "rb") as file:
            return _map_file(path, file)
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file{_hint(path)}") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise SourceError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _in_folder(path: str) -> str:
    """What to do with a folder."""
    if os.path.exists(os.path.join(path, "config.json")):
        return f"gemloom convert {path} OUT.gguf makes a GGUF of a checkpoint"
    return "name a .gguf file in it"


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
    return memoryview(Mapping(file.fileno(), 0, access=mmap.ACCESS_READ))[start:]


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


def _parts(sources: Sequence[Any], forward: bool) -> list[Blob]:
    if not sources:
        raise OptionError("a model source cannot be an empty list")
    if all(isinstance(source, str) and is_url(source) for source in sources):
        return _parts_at_urls(sources, forward)
    named = [_part(number, source) for number, source in enumerate(sources)]
    if len(named) > 1 and all(bytes(part[:4]) in _BEGINNINGS for _, part in named):
        return [Blob(name, [part]) for name, part in named]
    return [Blob(_with_more(named[0][0], len(named)), [part for _, part in named])]


def _parts_at_urls(names: Sequence[str], forward: bool) -> list[Blob]:
    blobs = [_at_url(name, forward=False) for name in names]
    if all(bytes(blob.head(4)) in _BEGINNINGS for blob in blobs):
        return blobs
    pieces = (piece for blob in blobs for piece in blob.pieces(0, blob.size))
    return [_in_order(_with_more(blobs[0].name, len(blobs)), pieces, forward)]


def _with_more(first: str, count: int) -> str:
    return first + (f" and {count - 1} more parts" if count > 1 else "")


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


def _file_object(file: Any, forward: bool) -> Blob:
    name = _file_name(file)
    if isinstance(file, io.TextIOBase):
        raise OptionError(f"{name}: open in text mode; open it with 'rb'")
    try:
        if _is_plain_file(file) and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return Blob(name, [_map_file(name, file)])
    except (OSError, ValueError) as error:  # ValueError: closed
        raise SourceError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    return Stream(name, _pieces(name, file)) if forward else Blob(name, [_read(name, file)])


def _is_plain_file(file: Any) -> bool:
    """Whether the descriptor's bytes are what ``read`` gives: not so for ``gzip.open`` and such."""
    file = getattr(file, "file", file)  # what tempfile.NamedTemporaryFile wraps
    return isinstance(getattr(file, "raw", file), io.FileIO)


def _file_name(file: object) -> str:
    name = getattr(file, "name", None)
    if isinstance(name, str | bytes) and name:
        return shown(os.fsdecode(name))
    return f"<{type(file).__name__}>"


def _read(name: str, file: Any) -> memoryview:
    """All that is left in a stream, in one growing buffer: at no time are there two copies."""
    data = bytearray()
    for piece in _pieces(name, file):
        data += piece
    if not data:
        raise FormatError(f"{name}: empty")
    return memoryview(data)


def _pieces(name: str, file: Any) -> Iterator[memoryview]:
    """What is left in a stream, piece by piece."""
    done = 0
    while True:
        try:
            piece = file.read(_PIECE)
        except Exception as error:  # whatever the stream is made of may raise its own
            reason = cleaned(str(error))  # it may quote a URL
            raise SourceError(f"{name}: reading failed after {done:,} bytes: {reason}") from error
        if piece is None:
            raise SourceError(f"{name}: a non-blocking stream; make it blocking")
        if not isinstance(piece, bytes | bytearray | memoryview):
            raise OptionError(f"{name}: gives {type(piece).__name__}, not bytes; open it with 'rb'")
        if not piece:
            return
        done += len(piece)
        yield memoryview(piece)
        del piece


def _arriving(name: str, parts: Iterator[Any]) -> Iterator[memoryview]:
    """Parts from whoever makes them; none is held here while the next is asked for."""
    number = done = 0
    while True:
        number += 1
        try:
            part = next(parts)
        except StopIteration:
            return
        except GemloomError:
            raise
        except Exception as error:
            raise SourceError(
                f"{name}: part {number:,} did not come, after {done:,} bytes: "
                f"{type(error).__name__}: {cleaned(str(error))}"
            ) from error
        if not _is_buffer(part):
            raise OptionError(f"{name}: part {number:,} is of {type(part).__name__}, not of bytes")
        buffer = _buffer(part)
        done += buffer.nbytes
        yield buffer
        del part, buffer


# -- the Hugging Face hub ------------------------------------------------------------


def _hub(name: str) -> list[Blob]:
    match = _HUB.fullmatch(name)
    if match is None:
        raise OptionError(f"{shown(name)}: write hf:owner/repo or hf:owner/repo:file.gguf")
    repo, first = match["repo"], match["wanted"]
    if first is None or not first.endswith((".gguf", ".gguf.sealed")):
        first = _choose(repo, hub.files(shown(name), repo), wanted=first)
    prefix = f"hf:{repo}:"
    blobs = []
    for part in _split_names(prefix + first):
        path = hub.download(shown(part), repo, part.removeprefix(prefix))
        blobs.append(_file(shown(part), path, forward=False))
    return blobs


def _choose(repo: str, files: list[str], wanted: str | None) -> str:
    """The one model of the wanted type; with none wanted the only one, or a preferred type."""
    models = sorted(file for file in files if _is_model(file))
    if not models:
        hint = "; gemloom convert makes one of a checkpoint that was downloaded"
        checkpoint = any(file.endswith(".safetensors") for file in files)
        raise SourceError(
            f"hf:{repo}: no GGUF model in this repository{hint if checkpoint else ''}"
        )
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
