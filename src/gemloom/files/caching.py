"""The user's cache folder, and small files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from gemloom.errors import SourceError


def cache_folder() -> Path:
    """Where this user's copies of what can be had again lie. SourceError without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG rules: a relative one is to be ignored
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError as error:
            raise SourceError(f"no cache folder: {error} Set XDG_CACHE_HOME.") from error
    return Path(base) / "gemloom"


def write_whole(path: Path, text: str) -> None:
    """Write beside ``path``, then rename: it is never there half-written. OSError.

    Several processes may do so at once; the last one wins.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
