"""Does an adapter fit a model, and what will it do? Nothing it holds is passed over in silence.

Not a reader of files, and nothing is computed with the model. The norms are those of scale * B A,
found without that product: |B A|^2 = tr((B^T B) (A A^T)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from gemloom.adapters import fusing
from gemloom.adapters.factors import Lora, Pair
from gemloom.errors import AdapterError
from gemloom.models.config import Config
from gemloom.models.tensor_names import HEAD, TABLE

Shapes = Mapping[str, tuple[int, ...]]
# Checkpoints of Gemma 3 from 4B up have so many rows more than tokens; no token reads them.
_PADDING = {"gemma3": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """One pair of an adapter, and the matrix of the model that it changes."""

    name: str  # as the adapter has it: "blk.0.attn_q.weight"
    tensor: str  # of the model, which may have several in one: "blk.0.attn_qkv.weight"
    shape: tuple[int, ...]  # of the change, ggml order: [k, m] or [k, m, n_expert]
    rank: int
    scale: float
    norm: float  # Frobenius norm of scale * B A


@dataclass(frozen=True, slots=True)
class Report:
    """What an adapter does to a model."""

    matched: tuple[Matched, ...]
    ignored: Mapping[str, str]  # what it has besides: why that does nothing
    lora: Lora  # the adapter with a pair for each matrix as this model has them

    @property
    def norm(self) -> float:
        """Of all changes together."""
        return sqrt(sum(match.norm**2 for match in self.matched))

    @property
    def parameters(self) -> int:
        """Values in all A and B that are used."""
        return sum(pair.a.size + pair.b.size for pair in self.lora.pairs.values())


def check(lora: Lora, config: Config, shapes: Shapes) -> Report:
    """Hold an adapter against a model; ``shapes`` are the model's (``Layout.required``).

    A pair of ``token_embd.weight`` changes what is looked up, one of ``output.weight`` the head,
    also where the model has one matrix for both, as in transformers. Raises AdapterError naming
    the tensor: another architecture, a matrix this model does not have, another shape, a value
    that is not finite, and where nothing would be changed.
    """
    if lora.architecture not in (None, config.architecture):
        raise AdapterError(
            f"{lora.name}: made for the architecture {lora.architecture!r}, the model is "
            f"{config.architecture!r}"
        )
    ignored = dict(lora.ignored)
    used: dict[str, Pair] = {}
    for name, pair in fusing.split(lora, shapes).items():
        why = _unused(config, name)
        if why is None:
            used[name] = _fitting(lora.name, config, shapes, name, pair)
        else:
            ignored[name] = why
    if not used:
        raise AdapterError(f"{lora.name}: {_nothing(lora, ignored)}")
    matched = tuple(_matched(lora.name, shapes, name, pair) for name, pair in used.items())
    fitted = Lora(
        lora.name, config.architecture, fusing.fuse(used, shapes), lora.invocation, ignored
    )
    return Report(matched, ignored, fitted)


def measure(lora: Lora) -> Report:
    """What can be told without a model. AdapterError for a value that is not finite."""
    if not lora.pairs:
        raise AdapterError(f"{lora.name}: {_nothing(lora, lora.ignored)}")
    matched = tuple(_matched(lora.name, {}, name, pair) for name, pair in lora.pairs.items())
    return Report(matched, lora.ignored, lora)


def _nothing(lora: Lora, ignored: Mapping[str, str]) -> str:
    if not ignored:
        return "there is nothing in it"
    name, why = next(iter(ignored.items()))
    return f"nothing in it would change the model; {name[:200]}: {why}"


def _unused(config: Config, name: str) -> str | None:
    """Why the model has no use for a pair, where that is in the nature of its layers."""
    index, which = _place(name)
    if index is None or index >= config.n_layer or which not in ("attn_k", "attn_v"):
        return None
    spec = config.layers[index]
    if not spec.owns_kv:
        return f"layer {index} has no K/V of its own, it reads those of layer {spec.kv_owner}"
    if which == "attn_v" and not spec.has_v:
        return f"layer {index} makes V from K"
    return None


def _place(name: str) -> tuple[int | None, str]:
    """The layer of a tensor, None for one outside the layers, and what it is there."""
    parts = name.removesuffix(".weight").split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal():
        return int(parts[1][:9]), parts[2]
    return None, name


def _fitting(name: str, config: Config, shapes: Shapes, tensor: str, pair: Pair) -> Pair:
    """The pair, without rows that only pad a vocabulary. AdapterError where it does not fit."""
    shape = _expected(shapes, tensor)
    if shape is None:
        index, _ = _place(tensor)
        beyond = index is not None and index >= config.n_layer
        why = f"has {config.n_layer} layers" if beyond else "has no such matrix"
        raise AdapterError(f"{name}: {tensor[:200]}: the model {why}; another base?")
    surplus = pair.b.shape[-2] - shape[1]
    if tensor in (TABLE, HEAD) and surplus == _PADDING.get(config.architecture):
        pair = Pair(pair.a, pair.b[: shape[1]], pair.scale)
    if delta_shape(pair) != shape:
        raise AdapterError(
            f"{name}: {tensor}: made for a matrix of shape {list(delta_shape(pair))}, the model's "
            f"is {list(shape)}; another base?"
        )
    return pair


def _expected(shapes: Shapes, tensor: str) -> tuple[int, ...] | None:
    """The shape of a matrix of the model, be it a part of a fused one; None if there is none."""
    if tensor == HEAD and tensor not in shapes:
        tensor = TABLE
    shape = shapes.get(tensor) or fusing.part_shape(tensor, shapes)
    return shape if shape and len(shape) > 1 else None


def delta_shape(pair: Pair) -> tuple[int, ...]:
    """The shape of B A in ggml order: [k, m] or [k, m, n_expert]."""
    return (pair.a.shape[-1], pair.b.shape[-2], *pair.a.shape[:-2])


def _matched(name: str, shapes: Shapes, tensor: str, pair: Pair) -> Matched:
    norm = abs(pair.scale) * sqrt(_squared_norm(name, tensor, pair))
    target = fusing.target(tensor, shapes)
    return Matched(
        name=tensor,
        tensor=target,
        shape=delta_shape(pair),
        rank=pair.rank,
        scale=pair.scale,
        norm=norm,
    )


def _squared_norm(name: str, tensor: str, pair: Pair) -> float:
    """|B A|^2. AdapterError for a value that is not finite, or so large that its square is not."""
    if not np.isfinite(pair.scale):
        raise AdapterError(f"{name}: {tensor} has the scale {pair.scale}")
    for side, values in (("A", pair.a), ("B", np.swapaxes(pair.b, -1, -2))):
        with np.errstate(all="ignore"):
            squares = np.einsum("...ij,...ij->...i", values, values, dtype=np.float32)
        if not np.isfinite(squares).all():
            raise AdapterError(f"{name}: {side} of {tensor} {_unsound(values)}")
    experts = zip(pair.a, pair.b, strict=True) if pair.a.ndim == 3 else [(pair.a, pair.b)]
    return sum(_squared_product(a, b) for a, b in experts)


def _squared_product(a: np.ndarray, b: np.ndarray) -> float:
    """|B A|^2 of one expert: of the product, or with the smaller of both, r columns and rows."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    if a.shape[0] > min(a.shape[1], b.shape[0]):  # by hand of a client, r may be anything
        size = float(np.abs(b).max()) or 1.0
        return float(np.square((b / size) @ a, dtype=np.float64).sum()) * size**2
    return max(0.0, float(np.sum((b.T @ b) * (a @ a.T), dtype=np.float64)))


def _unsound(values: np.ndarray[Any, Any]) -> str:
    if np.isnan(values).any():
        return "has a value that is not a number"
    return "has infinite values" if np.isinf(values).any() else "has values beyond 1e18"
