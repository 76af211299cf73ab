"""Tensor names: those of Hugging Face checkpoints and those of GGUF files. No bytes in here."""

from __future__ import annotations

import re

from gemloom.models.facts import module_names
from gemloom.models.tensor_names import inner, modality

_ASSISTANT = {
    "pre_projection.weight": "nextn.pre_projection.weight",
    "post_projection.weight": "nextn.post_projection.weight",
}
# What transformers computes when it makes a model, and some exporters save all the same.
_BUFFER = re.compile(
    r"(?:\w+_)?inv_freq|embed_scale|position_ids|causal_mask|(?:cos|sin)_cached|"
    r"per_layer_(?:input|projection)_scale|scalar_root_size|attention_scaling"
)
_MASKED = "masked_embedding."  # an assistant's clusters of tokens, which no GGUF reader uses


def to_gguf(name: str) -> str | None:
    """The GGUF name of a checkpoint's tensor, or None where it is none of a text model.

    Classes and wrappers before it do not matter: exports of one model differ in them.
    """
    name = inner(name)
    match = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,3})\.(.+)", name)
    if match is None:
        return _outside().get(name)
    short = module_names().tensors(in_layer=True).get(match[2])
    return f"blk.{match[1]}.{short}" if short else None


def to_hf(name: str) -> str:
    """How a checkpoint calls the tensor of this GGUF name, without the prefix; for messages."""
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    table = module_names().tensors(in_layer=True) if match else _outside()
    wanted = match[2] if match else name
    short = next((hf for hf, gguf in table.items() if gguf == wanted), name)
    return f"layers.{match[1]}.{short}" if match else short


def _outside() -> dict[str, str]:
    return module_names().tensors(in_layer=False) | _ASSISTANT


def left_out(name: str) -> str | None:
    """What a tensor belongs to that a text GGUF does not hold: vision, audio, ...; else None."""
    name = inner(name)
    if name.startswith(_MASKED):
        return "ordered-embedding"
    if _BUFFER.fullmatch(name.rpartition(".")[2]):
        return "buffer (computed from the config)"
    return modality(name)
