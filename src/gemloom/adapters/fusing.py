"""Matrices that one file has as one and another as several: Q, K, V; the experts' gate and up.

Splitting a pair takes rows of its B. Fusing pairs puts their A's below each other and their B's
into their own rows and columns, so the rank grows, and the product is exactly the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gemloom.adapters.factors import Lora, Pair
from gemloom.errors import AdapterError

Shapes = Mapping[str, tuple[int, ...]]
_FUSED = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
_WHOLE = {part: whole for whole, parts in _FUSED.items() for part in parts}


def split(lora: Lora, shapes: Shapes) -> dict[str, Pair]:
    """The adapter's pairs, those of a fused matrix that the model has in parts in parts too.

    AdapterError where the parts do not add up to the rows of B.
    """
    pairs: dict[str, Pair] = {}
    for name, pair in lora.pairs.items():
        prefix, which = _taken_apart(name)
        parts = [f"{prefix}{part}.weight" for part in _FUSED.get(which, ())]
        if name in shapes or not any(part in shapes for part in parts):
            pieces = {name: pair}
        else:
            pieces = _rows(lora.name, name, pair, parts, shapes)
        for piece, value in pieces.items():
            if piece in pairs:
                raise AdapterError(f"{lora.name}: {piece} is changed twice, alone and in {name}")
            pairs[piece] = value
    return pairs


def _rows(name: str, fused: str, pair: Pair, parts: list[str], shapes: Shapes) -> dict[str, Pair]:
    """A pair for each part the model has. Sharing layers have no K and V: their rows are left."""
    sizes = [shapes[part][1] for part in parts if part in shapes]
    m = pair.b.shape[-2]
    missing = len(parts) - len(sizes)
    if m < sum(sizes) or (not missing and m != sum(sizes)):
        raise AdapterError(f"{name}: {fused} has {m:,} rows, the model's parts {sum(sizes):,}")
    ends = np.cumsum(
        [shapes[part][1] if part in shapes else (m - sum(sizes)) // missing for part in parts]
    )
    starts = [0, *ends[:-1]]
    return {
        part: Pair(pair.a, pair.b[..., start:end, :], pair.scale)
        for part, start, end in zip(parts, starts, ends, strict=True)
    }


def fuse(pairs: Mapping[str, Pair], shapes: Shapes) -> dict[str, Pair]:
    """The pairs under the names of the model's matrices, which they fit."""
    by_target: dict[str, list[str]] = {}
    for name in pairs:
        by_target.setdefault(target(name, shapes), []).append(name)
    return {
        whole: pairs[whole] if names == [whole] else _fused(whole, names, pairs, shapes)
        for whole, names in by_target.items()
    }


def _fused(whole: str, names: list[str], pairs: Mapping[str, Pair], shapes: Shapes) -> Pair:
    m = shapes[whole][1]
    rows = {name: (0, m) if name == whole else part_rows(name, shapes) for name in names}
    return _stacked([(pairs[name], rows[name]) for name in names], m)


def fuse_experts(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The pairs with the experts' gate and up in one; where only one is there, the other is 0."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, pair in pairs.items():
        prefix, which = _taken_apart(name)
        if _WHOLE.get(which) == "ffn_gate_up_exps":
            shapes[f"{prefix}ffn_gate_up_exps.weight"] = (0, 2 * pair.b.shape[-2])
    return fuse(pairs, shapes)


def _stacked(placed: Sequence[tuple[Pair, tuple[int, int]]], m: int) -> Pair:
    """One pair of m rows that does what each of ``placed`` does to its own rows."""
    scales = {pair.scale for pair, _ in placed}
    factor = len(scales) > 1  # else the one scale stays apart, and the values as they are
    kind = np.float32 if factor else np.result_type(*(pair.b.dtype for pair, _ in placed))
    a = np.concatenate([pair.a for pair, _ in placed], axis=-2)
    b = np.zeros((*a.shape[:-2], m, a.shape[-2]), kind)
    column = 0
    for pair, (start, stop) in placed:
        values = pair.b.astype(np.float32) * np.float32(pair.scale) if factor else pair.b
        b[..., start:stop, column : column + pair.rank] = values
        column += pair.rank
    return Pair(a, b, 1.0 if factor else scales.pop())


def target(name: str, shapes: Shapes) -> str:
    """The model's matrix that a pair changes: that of its name, or the fused one it is part of."""
    prefix, which = _taken_apart(name)
    whole = f"{prefix}{_WHOLE.get(which)}.weight"
    return whole if name not in shapes and which in _WHOLE and whole in shapes else name


def part_shape(name: str, shapes: Shapes) -> tuple[int, ...] | None:
    """The shape, in ggml order, of a part of a fused matrix of the model; None if it is none."""
    whole = target(name, shapes)
    if whole == name:
        return None
    start, stop = part_rows(name, shapes)
    return (shapes[whole][0], stop - start, *shapes[whole][2:])


def part_rows(name: str, shapes: Shapes) -> tuple[int, int]:
    """Where in the rows of its fused matrix a part lies."""
    prefix, which = _taken_apart(name)
    whole = f"{prefix}{_WHOLE[which]}.weight"
    m = shapes[whole][1]
    if which.endswith("_exps"):
        return (0, m // 2) if which == "ffn_gate_exps" else (m // 2, m)
    q = shapes[f"{prefix}attn_output.weight"][0]  # as many rows as the heads have values
    k = (m - q) // 2
    return {"attn_q": (0, q), "attn_k": (q, q + k), "attn_v": (q + k, m)}[which]


def _taken_apart(name: str) -> tuple[str, str]:
    """ "blk.0.attn_q.weight" -> "blk.0.", "attn_q"."""
    prefix, _, which = name.removesuffix(".weight").rpartition(".")
    return f"{prefix}.", which
