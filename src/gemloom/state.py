"""The tokens and K/V cells of a slot as bytes, and back; versioned, checked against the model.

Layout: magic, u32 length of a JSON header, the header, tokens as i32, then for each layer
that owns K/V its K cells and its V cells. A sliding layer's ring is stored as it lies.
"""

from __future__ import annotations

import json
import struct
from hashlib import sha256

import numpy as np

from gemloom.cache import KVCache
from gemloom.errors import StateError
from gemloom.gguf import GGUF
from gemloom.slots import Slot

MAGIC = b"GEMLOOM-STATE-1\n"
_SAMPLE = 256  # bytes hashed of each tensor
_LENGTH = struct.Struct("<I")


def fingerprint(file: GGUF) -> str:
    """Tells models apart: names, types, shapes and the first bytes of all tensors, hashed."""
    digest = sha256()
    for info in sorted(file.tensors.values(), key=lambda info: info.name):
        digest.update(f"{info.name} {info.type} {info.shape} ".encode())
        digest.update(info.blob.view(info.offset, min(_SAMPLE, info.nbytes)))
    return digest.hexdigest()


def save(model: str, kv: KVCache, slot: Slot) -> bytes:
    """The state of a slot. ``model`` is its fingerprint."""
    header = json.dumps({**_header(model, kv), "tokens": len(slot.tokens)}).encode()
    tokens = np.asarray(slot.tokens, "<i4").tobytes()
    cells = [bytes(view) for view in kv.export(slot.index, len(slot.tokens))]
    return b"".join([MAGIC, _LENGTH.pack(len(header)), header, tokens, *cells])


def load(model: str, kv: KVCache, slot: Slot, data: bytes) -> int:
    """Put a state into a slot; returns its number of tokens.

    StateError, and nothing changed, if it is damaged or of another model.
    """
    header, body = _split(memoryview(data))
    count = header.pop("tokens", None)
    wanted = _header(model, kv)
    if other := [key for key in wanted if header.get(key) != wanted[key]]:
        raise StateError(f"the state does not fit this model as it is loaded: other {other[0]}")
    if not isinstance(count, int) or not 0 <= count <= kv.cells.full:
        raise StateError(f"the state has {count} tokens, the context {kv.cells.full:,}")
    sizes = kv.export_sizes(count)
    if len(body) != 4 * count + sum(sizes):
        raise StateError("the state is damaged: its length is wrong")
    tokens = np.frombuffer(body[: 4 * count], "<i4").tolist()
    kv.restore(slot.index, count, body[4 * count :])
    slot.tokens[:] = tokens
    return count


def _header(model: str, kv: KVCache) -> dict[str, object]:
    return {"model": model, "kv_type": kv.kv_type, "ring": kv.cells.sliding}


def _split(data: memoryview) -> tuple[dict[str, object], memoryview]:
    start = len(MAGIC) + _LENGTH.size
    if bytes(data[: len(MAGIC)]) != MAGIC or len(data) < start:
        raise StateError("these bytes are no saved state of this version")
    stop = start + _LENGTH.unpack_from(data, len(MAGIC))[0]
    try:
        header = json.loads(bytes(data[start:stop]))
    except ValueError:
        raise StateError("the state is damaged: its header cannot be read") from None
    if not isinstance(header, dict):
        raise StateError("the state is damaged: its header cannot be read")
    return header, data[stop:]
