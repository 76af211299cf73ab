"""Write beside a file, then rename: it is there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gemloom.errors import OutputError


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file that takes the name ``path`` when the block has ended well.

    It reaches the disk first. Nothing is left of it otherwise. OutputError where it cannot be
    written.
    """
    partial = Path(path).with_name(Path(path).name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}; nothing is left there") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a small file whole or not at all. OutputError where that cannot be."""
    with replaced(path) as file:
        file.write(data)
