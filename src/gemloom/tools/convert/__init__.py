"""A Hugging Face checkpoint of Gemma 3 or Gemma 4 to a GGUF of its text model.

``checkpoint.py`` finds the tensors, ``settings.py`` and ``vocabulary.py`` make the metadata,
``plan.py`` holds all against what the model needs. Here the bytes go through, some rows at a time:
memory holds a piece and what becomes of it, however large a tensor is. A run that was stopped goes
on where it was.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from gemloom.errors import OptionError, OutputError, TensorError
from gemloom.files.replacing import replace_file
from gemloom.files.writing import GGUFWriter
from gemloom.ggml import quants
from gemloom.tools.convert.checkpoint import Checkpoint, Stored
from gemloom.tools.convert.plan import ConversionPlan, Item, plan

__all__ = ["Conversion", "Plan", "plan", "write"]

_RECIPE = 1  # to be raised when other bytes are made of the same checkpoint
_EXPONENTS: dict[
    Type, tuple[np.dtype[Any], int]
] = {  # unsigned, and the bits that are all set where a value is not finite
    Type.F32: (np.dtype("<u4"), 0x7F800000),
    Type.F16: (np.dtype("<u2"), 0x7C00),
    Type.BF16: (np.dtype("<u2"), 0x7F80),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was made."""

    path: str
    architecture: str
    bytes: int
    types: dict[str, int]  # how many tensors of each
    resumed: int  # tensors that an earlier run had made
    notes: tuple[str, ...]  # what the user should know

    def json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def write(
    chosen: ConversionPlan,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Conversion:
    """Make the file of a plan; ``progress`` is told the bytes of the checkpoint that are done.

    While it runs, and if it is stopped, all there is lies in PATH.partial; the same call then goes
    on from it. Raises OutputError where the file cannot be written, or is there and ``force`` is
    not set; TensorError for a value that is not finite, or that its type cannot hold.
    """
    if os.path.exists(path) and not force:
        raise OutputError(f"{path}: already exists; --force replaces it")
    if not Path(path).parent.is_dir():
        raise OutputError(f"{path}: {Path(path).parent} is not a folder")
    planned = [item.planned for item in chosen.items]
    out = GGUFWriter(path, chosen.metadata, planned, resume=True)
    with _journal(out, chosen.checkpoint), out:
        _write_all(out, chosen.items, progress)
    return Conversion(
        path=str(path),
        architecture=str(chosen.metadata["general.architecture"]),
        bytes=out.nbytes,
        types=dict(Counter(tensor.type.name for tensor in planned)),
        resumed=len(out.done),
        notes=chosen.notes,
    )


def _write_all(out: GGUFWriter, items: Sequence[Item], progress: Callable[[int], None]) -> None:
    done = 0

    def counted(item: Item) -> Iterator[bytes | bytearray]:
        nonlocal done
        for read, made in _pieces(item):
            yield made
            done += read
            progress(done)

    for item in items:
        if item.planned.name in out.done:
            done += item.made_of.nbytes
        else:
            out.write(item.planned.name, counted(item))


# -- going on with an earlier run ------------------------------------------------------------


@contextmanager
def _journal(out: GGUFWriter, checkpoint: Checkpoint) -> Iterator[None]:
    """Keeps PATH.partial.json beside PATH.partial: what the latter is made of.

    The writer goes on only where metadata and plan are the same; two checkpoints of one model
    differ in neither, so a file made of other weights is taken away first.
    """
    path = out.partial.with_name(out.partial.name + ".json")
    made_of = json.dumps(_fingerprint(checkpoint)).encode()
    if not path.is_file() or path.read_bytes() != made_of:
        out.discard()
        replace_file(path, made_of)
    try:
        yield
    finally:
        if not out.partial.exists():
            path.unlink(missing_ok=True)


def _fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Changes with every change of the weights' files: name, size, time in nanoseconds."""
    facts = [(path, path.stat()) for path in checkpoint.files]
    return {
        "recipe": _RECIPE,
        "files": [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in facts],
    }


# -- bytes -----------------------------------------------------------------------------------


def _pieces(item: Item) -> Iterator[tuple[int, bytes | bytearray]]:
    """Of each piece how many bytes were read, and what became of them."""
    if isinstance(item.made_of, np.ndarray):
        yield item.made_of.nbytes, item.made_of.tobytes()
        return
    for piece in item.made_of.pieces():
        yield len(piece), _made(item, item.made_of, piece)


def _made(item: Item, stored: Stored, piece: bytes) -> bytes | bytearray:
    """Some rows in the type that they are to have. TensorError for a value that it cannot hold."""
    kind = item.planned.type
    if kind == stored.type and not item.shift:
        _check_finite(stored, piece)
        return piece
    values = quants.dequantize(piece, stored.type).reshape(-1, item.planned.shape[0])
    try:
        return quants.quantize(values + np.float32(item.shift) if item.shift else values, kind)
    except OptionError as error:
        raise TensorError(f"{stored.path}: {stored.name}: {error}") from error


def _check_finite(stored: Stored, piece: bytes) -> None:
    dtype, bits = _EXPONENTS[stored.type]
    if ((np.frombuffer(piece, dtype) & bits) == bits).any():
        raise TensorError(f"{stored.path}: {stored.name}: a value is not finite")
