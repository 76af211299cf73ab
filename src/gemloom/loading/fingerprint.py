"""What tells one loaded model from another, without reading all of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from gemloom.files.gguf import GGUF
from gemloom.models.config import Config


def fingerprint(file: GGUF, config: Config, first_bytes: Mapping[str, bytes]) -> str:
    """Tells models apart: config, and names, types, shapes and ``first_bytes`` of its tensors."""
    digest = sha256(repr(config).encode())
    for name, first in sorted(first_bytes.items()):
        info = file.tensors[name]
        digest.update(f"{info.name} {info.type} {info.shape} ".encode())
        digest.update(first)
    return digest.hexdigest()
