"""A Lora from a GGUF file, and back, as llama.cpp's converter writes them.

Keys: ``general.type`` "adapter", ``adapter.type`` "lora", ``general.architecture`` of the base,
``adapter.lora.alpha`` (0 or absent: no division by the rank), for an aLoRA
``adapter.alora.invocation_tokens`` (u32). A matrix NAME [k, m] has NAME.lora_a [k, r] and
NAME.lora_b [r, m], all in ggml order; that of experts one more dimension. A table that is read by
row has the two the other way round: lora_a [r, m], lora_b [r, k]. Whether an adapter fits a model
is not asked here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from gemloom.adapters.factors import Lora, Pair
from gemloom.adapters.limits import room
from gemloom.errors import AdapterError
from gemloom.files.gguf import GGUF, Metadata, TensorInfo
from gemloom.models.tensor_names import TABLE, modality

NORM = "a norm, which is not a matrix"
OTHER_MODALITY = "of the vision or audio part"
_BLOCKS = 1 << 14  # that are made float32 at once: this takes some copies of them
_TYPE, _ALPHA = "adapter.type", "adapter.lora.alpha"
_INVOCATION = "adapter.alora.invocation_tokens"
_DTYPES = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2"}
_KINDS = {
    np.dtype(np.float32): GGMLQuantizationType.F32,
    np.dtype(np.float16): GGMLQuantizationType.F16,
}


def from_gguf(file: GGUF) -> Lora:
    """The adapter in a GGUF; f32 and f16 stay where they lie, other types become float32.

    Raises AdapterError for a file that is no LoRA, for half a pair, for ranks that differ within
    one, and for a tensor of any other name; ConfigError for a key of a wrong type.
    """
    _check_kind(file)
    alpha = file.metadata.number(_ALPHA, 0.0)
    _check_room(file)
    halves: dict[str, dict[str, TensorInfo]] = {}
    ignored: dict[str, str] = {}
    for name, info in file.tensors.items():
        base, _, side = name.rpartition(".")
        if why := _reason(name):
            ignored[name] = why
        elif side in ("lora_a", "lora_b"):
            halves.setdefault(base, {})[side] = info
        else:
            raise AdapterError(
                f"{file.name}: the tensor {name} is not a lora_a or lora_b; is it a whole model?"
            )
    return Lora(
        name=file.name,
        architecture=file.metadata.string("general.architecture"),
        pairs={base: _pair(file.name, base, found, alpha) for base, found in halves.items()},
        invocation=_invocation(file.metadata),
        ignored=ignored,
    )


def _check_kind(file: GGUF) -> None:
    kind = file.metadata.string("general.type", "model")
    if kind != "adapter":
        raise AdapterError(f"{file.name}: general.type is {kind[:40]!r}, not 'adapter'")
    method = file.metadata.string(_TYPE)
    if method != "lora":
        raise AdapterError(f"{file.name}: {_TYPE} is {method[:40]!r}; only 'lora' is supported")


def _check_room(file: GGUF) -> None:
    infos = file.tensors.values()
    wide = sum(4 * prod(info.shape) for info in infos if info.type not in _DTYPES)
    check_room(file.name, wide, sum(info.nbytes for info in infos))


def check_room(name: str, wide: int, size: int) -> None:
    """AdapterError where ``size`` bytes would become ``wide`` bytes of float32, far more."""
    if wide > room(size):
        raise AdapterError(
            f"{name}: its {size:,} bytes would take {wide:,} as float32; save it as F16"
        )


def _reason(name: str) -> str | None:
    """Why a tensor is left out, if it is."""
    if modality(name) is not None:
        return OTHER_MODALITY
    return NORM if name.endswith("_norm.weight") else None


def _pair(name: str, base: str, halves: Mapping[str, TensorInfo], alpha: float) -> Pair:
    for side in ("lora_a", "lora_b"):
        if side not in halves:
            raise AdapterError(f"{name}: the tensor {base}.{side} is missing")
    a, b = _values(name, halves["lora_a"]), _values(name, halves["lora_b"])
    if read_by_row(base):
        a, b = np.swapaxes(b, -1, -2), a
    return paired(name, base, a, b, alpha / a.shape[-2] if alpha else 1.0)


def read_by_row(base: str) -> bool:
    """Whether the matrix is a table whose lora_a and lora_b lie the other way round."""
    return base.endswith(TABLE)


def paired(name: str, base: str, a: np.ndarray, b: np.ndarray, scale: float) -> Pair:
    """The Pair of a [.., r, k] and b [.., m, r]. AdapterError where they do not belong together."""
    if a.ndim != b.ndim or a.ndim not in (2, 3) or a.shape[:-2] != b.shape[:-2]:
        raise AdapterError(
            f"{name}: {base}: A of shape {list(a.shape)} and B of {list(b.shape)} are not a pair"
        )
    if a.shape[-2] != b.shape[-1] or 0 in a.shape or 0 in b.shape:
        raise AdapterError(f"{name}: {base}: A has the rank {a.shape[-2]}, B {b.shape[-1]}")
    return Pair(a, b, scale)


def _values(name: str, info: TensorInfo) -> np.ndarray:
    """A tensor as numpy has it, slowest first, of two dimensions at least."""
    shape = info.shape if len(info.shape) > 1 else (*info.shape, 1)
    data = np.frombuffer(info.data(), np.uint8)
    if info.type in _DTYPES:
        values: np.ndarray = data.view(_DTYPES[info.type])
    else:
        values = _dequantized(name, info, data)
    return values.reshape(shape[::-1])


def _dequantized(name: str, info: TensorInfo, data: np.ndarray) -> np.ndarray:
    block, size = GGML_QUANT_SIZES[info.type]
    step = _BLOCKS * size
    values = np.empty(data.size // size * block, np.float32)
    unsupported = AdapterError(f"{name}: {info.name} is of type {info.type.name}, unsupported")
    if block == 1 and info.type != GGMLQuantizationType.BF16:
        raise unsupported
    for start in range(0, data.size, step):
        at = start // size * block
        try:
            with np.errstate(all="ignore"):  # scales may be anything; what comes out is checked
                part = dequantize(data[start : start + step], info.type)
        except NotImplementedError:
            raise unsupported from None
        values[at : at + part.size] = part
    return values


def _invocation(metadata: Metadata) -> tuple[int, ...]:
    if _INVOCATION not in metadata:
        return ()
    tokens = metadata.array(_INVOCATION)
    return checked_invocation(metadata.name, _INVOCATION, tokens.tolist())


def checked_invocation(name: str, key: str, tokens: Any) -> tuple[int, ...]:
    """Token ids from a file. AdapterError for anything but a list of some."""
    sound = isinstance(tokens, list) and 0 < len(tokens) <= 1024
    if not sound or any(type(t) is not int or not 0 <= t < 2**31 for t in tokens):
        raise AdapterError(f"{name}: {key} must be a list of token ids")
    return tuple(tokens)


# -- writing -----------------------------------------------------------------------------


def write_gguf(lora: Lora, architecture: str, path: str | os.PathLike[str]) -> None:
    """Write an adapter for bases of ``architecture``; llama.cpp can load the file.

    There is one alpha for all pairs, the one that most have; of the others B is scaled, in f32.
    Raises OutputError.
    """
    from gemloom.files.writing import GGUFWriter, Planned

    alpha = common_alpha(lora)
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        _TYPE: "lora",
        _ALPHA: np.float32(alpha),
    }
    if lora.invocation:
        metadata[_INVOCATION] = np.array(lora.invocation, np.uint32)
    tensors = {
        f"{base}.{side}": values
        for base, pair in lora.pairs.items()
        for side, values in _sides(base, pair, alpha).items()
    }
    plan = [Planned(name, _KINDS[x.dtype], x.shape[::-1]) for name, x in tensors.items()]
    with GGUFWriter(path, metadata, plan) as out:
        for name, values in tensors.items():
            out.write(name, values)


def common_alpha(lora: Lora) -> float:
    """The alpha, scale times rank, of most pairs."""
    return Counter(alpha_of(pair) for pair in lora.pairs.values()).most_common(1)[0][0]


def alpha_of(pair: Pair) -> float:
    """Scale times rank, to the precision that a file keeps."""
    return float(np.float32(pair.scale * pair.rank))


def _sides(base: str, pair: Pair, alpha: float) -> dict[str, np.ndarray]:
    a, b = pair.a, pair.b
    if alpha_of(pair) != alpha:
        b = b.astype(np.float32) * np.float32(pair.scale * pair.rank / alpha)
    if read_by_row(base):
        a, b = b, np.swapaxes(a, -1, -2)
    return {"lora_a": np.ascontiguousarray(a), "lora_b": np.ascontiguousarray(b)}
