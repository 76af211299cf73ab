"""Bytes at a URL, through ``fsspec``: by ranges, several at once, or in order where there are none.

Any URL that fsspec knows: ``https://``, ``s3://``, ``memory://``, ``zip://in.gguf::https://...``.
What a scheme needs beyond fsspec (s3fs, gcsfs, ...) is the user's to install; credentials and
endpoints are where that library looks for them, or in fsspec's own configuration. A URL may hold
secrets: it is shown as ``names.py`` says, and so are the texts of libraries' errors.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from gemloom.errors import FormatError, SourceError
from gemloom.files.blob import Blocks
from gemloom.files.names import cleaned, shown

BLOCK = 4 << 20  # bytes of one read
READERS = 8  # at once
PATIENCE = (30.0, 60.0)  # seconds for a connection over HTTP, and for the next bytes of an answer
PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before each further try of a read
_PIECE = 1 << 20
_STATUS = {
    401: "the server wants credentials (HTTP status 401)",
    403: "the server refuses it to these credentials (HTTP status 403)",
    404: "no such file",
}
_FINAL = (  # errors that another try would only repeat
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError,
    ImportError, LookupError, NotImplementedError, TypeError, ValueError,
)  # fmt: skip

_T = TypeVar("_T")


def open_url(url: str) -> Blocks | Iterator[memoryview]:
    """The file at a URL; its parts in order where no others can be had.

    Raises SourceError where there is none or it cannot be reached, FormatError if it is empty.
    """
    name = shown(url)
    system, path = _once(name, lambda: _filesystem(url))
    facts = _once(name, lambda: system.info(path))
    size = facts.get("size")
    if facts.get("type") == "directory":
        raise SourceError(f"{name}: a folder; name a .gguf file in it")
    if size == 0:
        raise FormatError(f"{name}: empty")
    if size is None or not _once(name, lambda: _has_ranges(system, path, facts)):
        return _in_order(name, system, path)
    blob = Blocks(name, size, BLOCK, lambda index: _block(name, system, path, index, size))
    blob.readers = READERS
    return blob


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url, **_http_options(url))
    return system, path


def _http_options(url: str) -> dict[str, Any]:
    """For HTTP: a limit for each wait and not for a whole file, and bytes as they lie there."""
    schemes = [scheme for scheme in ("http", "https") if re.search(rf"(^|::){scheme}://", url)]
    if not schemes:
        return {}
    from aiohttp import ClientTimeout
    from fsspec.config import conf

    timeout = ClientTimeout(total=None, sock_connect=PATIENCE[0], sock_read=PATIENCE[1])
    configured = conf.get("http", {}).get("client_kwargs", {})
    configured = configured | conf.get("https", {}).get("client_kwargs", {})
    headers = {"Accept-Encoding": "identity", **configured.get("headers", {})}
    options = {"client_kwargs": {"timeout": timeout, **configured, "headers": headers}}
    return dict.fromkeys(schemes, options)


def _has_ranges(system: Any, path: str, facts: dict[str, Any]) -> bool:
    """Whether a part in the middle can be had without what is before it."""
    from fsspec.archive import AbstractArchiveFileSystem

    if isinstance(system, AbstractArchiveFileSystem):
        return False  # a member would be unpacked from its beginning for each part
    if not facts.get("partial", True):
        return False
    if "http" not in system.protocol:
        return True
    with system.open(path, block_size=BLOCK, cache_type="none", size=facts["size"]) as file:
        try:
            file.seek(1)
            file.read(1)
        except ValueError:  # fsspec's way to say that the server began to send the whole
            return False
    return True


def _in_order(name: str, system: Any, path: str) -> Iterator[memoryview]:
    size = {"block_size": 0} if "http" in system.protocol else {}
    with _once(name, lambda: system.open(path, "rb", **size)) as file:
        while piece := _once(name, lambda: file.read(_PIECE)):
            yield memoryview(piece)
            del piece


def _block(name: str, system: Any, path: str, index: int, size: int) -> bytes:
    """One block; where an answer is short, what it lacks is asked for again."""
    start, end = index * BLOCK, min((index + 1) * BLOCK, size)
    data = b""
    for pause in (*PAUSES, None):
        at = start + len(data)
        try:
            data += system.cat_file(path, at, end)
        except Exception as error:  # each library that fsspec uses has its own
            reason, final = _reason(error), _is_final(error)
        else:
            reason, final = f"{len(data):,} bytes came of {end - start:,}", len(data) > end - start
        if len(data) == end - start:
            return data
        if pause is None or final:
            break
        time.sleep(pause)
    raise SourceError(f"{name}: at byte {at:,}: {reason}")  # not "from": its text may quote the URL


def _once(name: str, ask: Callable[[], _T]) -> _T:
    """An answer. SourceError with one line that says what is wrong."""
    try:
        return ask()
    except Exception as error:
        reason = _reason(error)
    raise SourceError(f"{name}: {reason}")


def _is_final(error: Exception) -> bool:
    """Whether another try is useless; lost connections, timeouts, servers in trouble may pass."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return status < 500 and status not in (408, 429)
    return isinstance(error, _FINAL)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.__cause__:
        error = error.__cause__  # what fsspec makes of every error of a first contact over HTTP
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return _STATUS.get(status, f"the server answered with HTTP status {status}")
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    system = getattr(error, "os_error", error)  # what aiohttp's has inside
    if isinstance(system, socket.gaierror):
        return "no server is known by that name"
    ours = system is not error or isinstance(error, ConnectionError)  # others' texts say more
    if ours and isinstance(system, OSError) and system.errno:
        return os.strerror(system.errno)
    lines = cleaned(str(error)).strip().splitlines() or ["no reason was given"]
    kind = "" if isinstance(error, ImportError | ValueError) else f"{type(error).__name__}: "
    return f"{kind}{lines[0][:200]}"
