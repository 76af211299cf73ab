"""The one door for adapters: whatever a caller names or hands over becomes a Lora.

What it is, GGUF or PEFT, is told by the bytes, not by a name. Whether it fits a model is asked in
``checking.py``.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Mapping
from typing import Any

from gemloom.adapters import archive, peft_config
from gemloom.adapters.factors import Lora
from gemloom.adapters.gguf_lora import from_gguf
from gemloom.adapters.limits import MAX_CONFIG
from gemloom.adapters.peft import WEIGHTS, from_peft
from gemloom.errors import AdapterError
from gemloom.files import gguf, source
from gemloom.files.blob import Blob

CONFIG = peft_config.FILE
PICKLE = "adapter_model.bin"
_FILES = (CONFIG, WEIGHTS, PICKLE)


def read(adapter: Any) -> Lora:
    """Read a LoRA adapter.

    ``adapter`` is a GGUF LoRA; a PEFT folder, or an archive of one (.zip, .tar, .tar.gz); or the
    pair (adapter_config.json, adapter_model.safetensors) as bytes. Files come from every source
    that a model may come from: a path, bytes, a file object, a list of parts,
    ``hf:owner/repo[:file]``. A GGUF's f16 and f32 are used where they lie; nothing is written.
    Raises AdapterError; SourceError, FormatError, ConfigError and OptionError as for a model.
    """
    files = source.folder(adapter, _FILES)
    if files is not None:
        return _peft(str(adapter), files)
    blobs = source.resolve(adapter)
    blob = blobs[0]
    head = bytes(blob.view(0, min(blob.size, 512)))
    if archive.is_archive(head):
        inside = archive.members(blob.name, blob.view(0, blob.size), _FILES)
        return _peft(blob.name, {n: Blob(n, [data]) for n, data in inside.items()})
    if len(blob.parts) == 2 and head.removeprefix(BOM_UTF8).lstrip().startswith(b"{"):
        config, weights = (Blob(blob.name, [part]) for part in blob.parts)
        return _peft(blob.name, {CONFIG: config, WEIGHTS: weights})
    _check_alone(blob.name, head)
    return from_gguf(gguf.read(blobs))


def _peft(name: str, files: Mapping[str, Blob]) -> Lora:
    if CONFIG not in files:
        raise AdapterError(f"{name}: no {CONFIG} in it; is it a PEFT adapter?")
    if WEIGHTS not in files:
        pickle = f"; {PICKLE} is a pickle, which can run code: save it as safetensors"
        raise AdapterError(f"{name}: no {WEIGHTS} in it{pickle if PICKLE in files else ''}")
    config, weights = files[CONFIG], files[WEIGHTS]
    if config.size > MAX_CONFIG:
        raise AdapterError(f"{name}: {CONFIG} of {config.size:,} bytes is too large")
    return from_peft(name, bytes(config.view(0, config.size)), weights.view(0, weights.size))


def _check_alone(name: str, head: bytes) -> None:
    """AdapterError for half a PEFT adapter, or a pickle; GGUF's reader tells of anything else."""
    if head.startswith(gguf.MAGIC):
        return
    if head[8:9] == b"{" or head.startswith(b"{"):
        raise AdapterError(f"{name}: half a PEFT adapter; name the folder, with {CONFIG} in it")
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise AdapterError(f"{name}: a pickle, which can run code: save it as safetensors")
