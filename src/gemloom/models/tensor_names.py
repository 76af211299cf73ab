"""What the name of a tensor, or of a module of transformers, says. Nothing is read here.

Here is the one list of what belongs to vision and audio: this is a text runtime, and every file
format keeps such parts under names of its own.
"""

from __future__ import annotations

import re

TABLE = "token_embd.weight"  # token embeddings, and the head as well where there is no HEAD
PER_LAYER_TABLE = "per_layer_token_embd.weight"
HEAD = "output.weight"
ROPE_FREQS = "rope_freqs.weight"

_LAYER = re.compile(r"blk\.(\d+)\.")
# What stands before a module's own name: classes in classes, in any number and order.
_CLASSES = frozenset(("base_model", "model", "language_model"))
# What training wraps around modules at any depth, and takes off again.
_WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)  # fmt: skip
_MODALITY = re.compile(
    r"(?P<vision>v|mm|vision(?:_\w*)?|embed_vision|multi_modal_projector|multimodal_embedder)|"
    r"(?P<audio>a|audio(?:_\w*)?|embed_audio)"
)


def unwrapped(name: str) -> str:
    """The name without what compilers and trainers wrap around modules."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def inner(name: str) -> str:
    """The name below all classes and wrappers: "layers.0.mlp.up_proj", "vision_tower.encoder"."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    first = next((i for i, part in enumerate(parts) if part not in _CLASSES), len(parts))
    return ".".join(parts[first:])


def modality(name: str) -> str | None:
    """ "vision" or "audio" where the name is of such a part of a model, else None."""
    first, dot, _ = inner(name).partition(".")
    found = _MODALITY.fullmatch(first) if dot else None
    return found.lastgroup if found else None


def layer_of(name: str) -> int | None:
    """The layer that a GGUF tensor belongs to, if it is of one."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def kv_names(layer: int) -> frozenset[str]:
    """A layer's K/V tensors. Nothing reads them where it attends to the K/V of another."""
    return frozenset(f"blk.{layer}.{name}.weight" for name in ("attn_k", "attn_v", "attn_k_norm"))


def unit(name: str, row: int, per_layer: int) -> int:
    """How many values of a tensor are read at once, which its blocks must divide.

    A whole row, but of the per-layer table the part of one layer: ``per_layer`` values.
    """
    return per_layer if per_layer and name == PER_LAYER_TABLE else row
