"""Names of matrices: those of transformers' modules, which PEFT uses, and those of GGUF.

Not a reader of files. The modules are those of transformers' modeling_gemma3.py and
modeling_gemma4.py; the GGUF names those of llama.cpp's converter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LAYER = {  # below layers.N
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "router.proj": "ffn_gate_inp",
    "experts.gate_up_proj": "ffn_gate_up_exps",
    "experts.down_proj": "ffn_down_exps",
}
_TOP = {
    "embed_tokens": "token_embd",
    "embed_tokens_per_layer": "per_layer_token_embd",
    "per_layer_model_projection": "per_layer_model_proj",
    "lm_head": "output",
}
_GGUF_LAYER = {gguf: module for module, gguf in _LAYER.items()}
_GGUF_TOP = {gguf: module for module, gguf in _TOP.items()}
# What classes, wrappers and versions put before a module's own name, in any number and order.
_WRAPPERS = r"(?:(?:base_model|model|language_model|module|_orig_mod|_fsdp_wrapped_module)\.)*"
_OTHER = re.compile(
    rf"{_WRAPPERS}(?:vision_tower|vision_model|audio_tower|embed_vision|embed_audio|"
    r"multi_modal_projector|multimodal_embedder|vision_embedder|audio_embedder)\."
)
_MODULE = re.compile(rf"{_WRAPPERS}(?:layers\.(?P<layer>0|[1-9]\d{{0,3}})\.)?(?P<name>.+)")
_KEY = re.compile(
    r"(?P<module>.+?)(?P<nested>(?:\.base_layer)*)\."
    r"(?:lora_(?P<side>[AB])(?:\.[^.]+)?\.weight|lora_embedding_(?P<row_side>[AB])(?:\.[^.]+)?)"
)


@dataclass(frozen=True, slots=True)
class Half:
    """What a key of adapter_model.safetensors says: A or B of which module."""

    module: str  # as in the file, without lora_A and what follows
    side: str  # "A" or "B"
    by_row: bool  # an embedding, whose A is [r, rows] and B [columns, r]
    depth: int  # of several adapted parameters of one module, how far inside


def parse(key: str) -> Half | None:
    """The half of a pair that ``key`` names; None where it names something else."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    side, depth = match["side"] or match["row_side"], match["nested"].count(".base_layer")
    return Half(match["module"], side, match["row_side"] is not None, depth)


def of_other_modality(key: str) -> bool:
    """Whether a key belongs to the vision or audio part of a multimodal model."""
    return _OTHER.match(key) is not None


def plain(module: str) -> str:
    """The name by which PEFT matches patterns: without what PEFT itself puts before it."""
    return module.removeprefix("base_model.model.")


def gguf_name(module: str) -> str | None:
    """The GGUF tensor of a module, whatever the class around it; None if unknown."""
    match = _MODULE.fullmatch(module)
    if match is None:
        return None
    if match["layer"] is None:
        name = _TOP.get(match["name"])
        return name and f"{name}.weight"
    name = _LAYER.get(match["name"])
    return name and f"blk.{match['layer']}.{name}.weight"


def module_name(tensor: str, *, multimodal: bool) -> str | None:
    """The module of a GGUF tensor in transformers' causal or multimodal class, if it is one."""
    inner = "model.language_model." if multimodal else "model."
    name = tensor.removesuffix(".weight")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", name):
        module = _GGUF_LAYER.get(match[2])
        return module and f"{inner}layers.{match[1]}.{module}"
    top = _GGUF_TOP.get(name)
    return top if top in (None, "lm_head") else f"{inner}{top}"
