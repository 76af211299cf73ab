"""The parts of a model that people speak of, told by a tensor's name. Nothing is computed here."""

import re

from gemloom.models.tensor_names import modality

# In order: the first whose pattern is found in the name.
_PATTERNS = (
    ("norms and scales", r"_norm|norm\.|_scale|\.scale$|\.bias$|^rope_freqs"),
    ("per-layer table", r"^per_layer_token_embd"),
    ("per-layer inputs", r"per_layer|\binp_gate\b|^blk\.\d+\.proj\."),
    ("embeddings", r"^token_embd"),
    ("head", r"^output\."),
    ("experts", r"_exps|ffn_gate_inp"),
    ("attention", r"\.attn_"),
    ("feed-forward", r"\.ffn_"),
)
_MODALITIES = "other modalities"
PARTS = (_MODALITIES, *(name for name, _ in _PATTERNS), "other")


def part(name: str) -> str:
    """Which of ``PARTS`` a tensor belongs to. Embeddings are the head too where there is none."""
    if modality(name) is not None:
        return _MODALITIES
    return next((part for part, pattern in _PATTERNS if re.search(pattern, name)), "other")
