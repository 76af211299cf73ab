"""The tokens and K/V cells of a slot as bytes, and back; versioned, checked against the model.

Layout: magic, u32 length of a JSON header, the header, tokens as i32, then for each layer
that owns K/V its K cells and its V cells. A sliding layer's ring is stored as it lies.
"""

from __future__ import annotations

import json
import struct

import numpy as np

from gemloom.compute.cells import Cells, Saved
from gemloom.compute.slots import Slot
from gemloom.errors import StateError

MAGIC = b"GEMLOOM-STATE-2\n"
_LENGTH = struct.Struct("<I")
_MEANING = {"model": "model", "kv_type": "kv_type", "ring": "chunk or context"}


def save(model: str, cells: Cells, slot: Slot) -> bytes:
    """The state of a slot. ``model`` is its fingerprint.

    StateError for what was computed with adapters: their versions mean nothing elsewhere.
    """
    if slot.marks:
        names = ", ".join(sorted({name for _, name, _, _ in slot.marks}))
        raise StateError(f"the request that ended last had adapters ({names}): it cannot be saved")
    saved = cells.save(slot)
    held = {"tokens": len(saved.tokens), "intact": saved.intact}
    header = json.dumps({**_header(model, cells), **held}).encode()
    tokens = np.asarray(saved.tokens, "<i4").tobytes()
    return b"".join([MAGIC, _LENGTH.pack(len(header)), header, tokens, saved.cells])


def parse(model: str, cells: Cells, data: bytes) -> Saved:
    """What ``save`` wrote. StateError if it is damaged or of another model."""
    header, body = _split(data)
    count, intact = header.get("tokens"), header.get("intact")
    wanted, most = _header(model, cells), cells.shape.cells.full
    if other := [key for key in wanted if header.get(key) != wanted[key]]:
        raise StateError(
            f"the state does not fit this model as it is loaded: other {_MEANING[other[0]]}"
        )
    if not isinstance(count, int) or not 0 <= count <= most:
        raise StateError(f"the state has {count} tokens, a slot {most:,} cells")
    if not isinstance(intact, int) or not 0 <= intact <= count:
        raise StateError("the state is damaged: its header contradicts itself")
    if len(body) != 4 * count + cells.saved_bytes(count):
        raise StateError("the state is damaged: its length is wrong")
    return Saved(np.frombuffer(body[: 4 * count], "<i4").tolist(), intact, body[4 * count :])


def _header(model: str, cells: Cells) -> dict[str, object]:
    return {"model": model, "kv_type": cells.kv_type, "ring": cells.shape.cells.sliding}


def _split(state: bytes) -> tuple[dict[str, object], memoryview]:
    try:
        data = memoryview(state).cast("B")
    except TypeError:
        raise StateError(f"a state is bytes, not {type(state).__name__}") from None
    start = len(MAGIC) + _LENGTH.size
    if bytes(data[: len(MAGIC)]) != MAGIC or len(data) < start:
        raise StateError("these bytes are not a saved state of this version")
    stop = start + _LENGTH.unpack_from(data, len(MAGIC))[0]
    try:
        header = json.loads(bytes(data[start:stop]))
    except (ValueError, RecursionError):
        raise StateError("the state is damaged: its header cannot be read") from None
    if not isinstance(header, dict):
        raise StateError("the state is damaged: its header cannot be read")
    return header, data[stop:]
