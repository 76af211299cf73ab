"""The structures of released models, without a weight: shapes and keys, as ``tiny.py`` has them."""

from itertools import groupby
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

import tiny
from gemloom.files.blob import Blob
from gemloom.files.gguf import GGUF, Metadata, TensorInfo
from tiny import Variant

_G3 = {"head_dim": 256, "head_dim_full": 256}
_G4 = {"head_dim": 256, "head_dim_full": 512, "n_ple": 0}
RELEASED = {
    v.name: v
    for v in (
        Variant("gemma3-270m", "gemma3", "sssssf" * 3, 640, 4, 1, 1, 2048, **_G3),
        Variant("gemma3-1b", "gemma3", "sssssf" * 4 + "ss", 1152, 4, 1, 1, 6912, **_G3),
        Variant("gemma3-4b", "gemma3", "sssssf" * 5 + "ssss", 2560, 8, 4, 4, 10240, **_G3),
        Variant("gemma3-12b", "gemma3", "sssssf" * 8, 3840, 16, 8, 8, 15360, **_G3),
        Variant(
            "gemma3-27b", "gemma3", "sssssf" * 10 + "ss", 5376, 32, 16, 16, 21504,
            head_dim=128, head_dim_full=128,
        ),
        Variant(
            "gemma4-e2b", "gemma4", "ssssf" * 7, 1536, 8, 1, 1, 6144,
            n_ff_shared=12288, n_shared=20, **_G4 | {"n_ple": 256},
        ),
        Variant(
            "gemma4-e4b", "gemma4", "sssssf" * 7, 2560, 8, 2, 2, 10240,
            n_shared=18, **_G4 | {"n_ple": 256},
        ),
        Variant("gemma4-12b", "gemma4", "sssssf" * 8, 3840, 16, 8, 1, 15360, k_eq_v=True, **_G4),
        Variant(
            "gemma4-26b", "gemma4", "sssssf" * 5, 2816, 16, 8, 2, 2112,
            k_eq_v=True, n_expert=128, n_expert_used=8, n_ff_exp=704, **_G4,
        ),
        Variant("gemma4-31b", "gemma4", "sssssf" * 10, 5376, 32, 16, 4, 21504, k_eq_v=True, **_G4),
    )
}  # fmt: skip


def shapes(variant: Variant, untied: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape in ggml order; ``untied`` with a head of its own."""
    made = {name: shape[::-1] for name, shape in tiny._shapes(variant).items()}
    if variant.arch == "gemma4":
        made["rope_freqs.weight"] = (variant.head_dim_full // 2,)
    if untied:
        made["output.weight"] = made["token_embd.weight"]
    return made


def keys(variant: Variant) -> dict[str, Any]:
    """The metadata, but for the vocabulary."""
    made = tiny.metadata(variant)
    return {key: value for key, value in made.items() if not key.startswith("tokenizer.")}


def header(variant: Variant, untied: bool = False) -> GGUF:
    """As ``gguf.read`` gives it, of a file in F32 whose bytes nobody has."""
    blob = Blob(variant.name, [])
    values = {k: np.asarray(v) if isinstance(v, list) else v for k, v in keys(variant).items()}
    tensors = {
        name: TensorInfo(name, GGMLQuantizationType.F32, shape, blob, 0)
        for name, shape in shapes(variant, untied).items()
    }
    return GGUF(variant.name, Metadata(variant.name, values), tensors)


def brief(types: dict[str, str]) -> str:
    """Types of tensors by name, F32 left out, with runs over the layers on one line.

    "attn_v, ffn_down: Q6_K*3 Q4_K*2": the first three layers that have one, then two more.
    """
    by_name: dict[str, list[str]] = {}
    for name, kind in types.items():
        if kind != "F32":
            own = name.split(".", 2)[2] if name.startswith("blk.") else name
            by_name.setdefault(own, []).append(kind)
    told: dict[str, list[str]] = {}
    for name, kinds in by_name.items():
        runs = " ".join(f"{kind}*{len(list(run))}" for kind, run in groupby(kinds))
        told.setdefault(runs, []).append(name.removesuffix(".weight"))
    return "; ".join(f"{', '.join(names)}: {runs}" for runs, names in sorted(told.items()))
