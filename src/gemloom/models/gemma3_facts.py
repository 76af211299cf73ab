"""Gemma 3's files: the Config that their keys make, their tensors, and those of checkpoints.

The forward pass is in ``gemma3.py``.
"""

from __future__ import annotations

from collections.abc import Collection

from gemloom.files.gguf import GGUF
from gemloom.models.config import Config, Kind, LayerSpec, Rope
from gemloom.models.keys import (
    FULL_BASE,
    SLIDING_BASE,
    ArchitectureKeys,
    linear_scale,
    make_config,
    softcap,
    usual_dim,
)
from gemloom.models.layout import Layout, layer_shapes, model_tensors, sliced_names
from gemloom.models.module_names import DECODER

NAMES = DECODER


def config(file: GGUF, keys: ArchitectureKeys) -> Config:
    """The Config that a file's keys make."""
    # A file without a window has no sliding layer; with one, every sixth is full by architecture.
    window = keys.integer("attention.sliding_window", 0)
    pattern = "attention.sliding_window_pattern"
    sliding = keys.pattern(pattern, 6) if window else [False] * keys.n_layer
    n_head = keys.per_layer("attention.head_count")
    n_kv = keys.per_layer("attention.head_count_kv", n_head)
    n_ff = keys.per_layer("feed_forward_length")
    head_dim = keys.head_dim(default=usual_dim(keys, n_head))
    n_dims = keys.count("rope.dimension_count", head_dim)
    full_rope = Rope(n_dims, keys.positive("rope.freq_base", FULL_BASE), scale=_linear_scale(keys))
    swa_rope = Rope(n_dims, keys.positive("rope.freq_base_swa", SLIDING_BASE))
    layers = tuple(
        LayerSpec(
            index=i,
            kind=Kind.SLIDING if sliding[i] else Kind.FULL,
            head_dim=head_dim,
            n_head=n_head[i],
            n_kv=n_kv[i],
            n_ff=n_ff[i],
            rope=swa_rope if sliding[i] else full_rope,
            kv_owner=i,
        )
        for i in range(keys.n_layer)
    )
    # The 27B, the one with 62 layers, scales by width per head; no key says so.
    scaled = keys.count("embedding_length") / n_head[0] if keys.n_layer == 62 else head_dim
    return make_config(
        file, keys, layers,
        window=max(window, 1),
        attn_scale=scaled**-0.5,
        softcap=softcap(keys, 0.0),
    )  # fmt: skip


def _linear_scale(keys: ArchitectureKeys) -> float:
    """1/factor of linear position scaling, on full layers.

    Ollama's files of the 4B, 12B and 27B, which have it, leave it all to the reader.
    """
    if any(key.startswith(f"{keys.prefix}.rope.") for key in keys.metadata):
        return linear_scale(keys)
    return 1 / 8 if keys.count("context_length") >= 131_072 else 1.0


def layout(config: Config, there: Collection[str]) -> Layout:
    """The tensors of this architecture; ``there`` are the file's, where it has a choice."""
    shapes, roles = model_tensors(config, there)
    for spec in config.layers:
        shapes |= layer_shapes(config, spec, there)
    return Layout(required=shapes, roles=roles, sliced=sliced_names(shapes))
