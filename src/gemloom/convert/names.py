"""Tensor names: those of Hugging Face checkpoints and those of GGUF files. No bytes in here."""

from __future__ import annotations

import re

# Of a text model alone; of the text part of one that also sees and hears, new form and old.
_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")
_OTHER_PARTS = {  # prefix -> what to call it
    name + tower: part
    for name in ("", "model.")
    for tower, part in {
        "vision_tower.": "vision", "vision_model.": "vision", "vision_embedder.": "vision",
        "embed_vision.": "vision", "multi_modal_projector.": "vision",
        "audio_tower.": "audio", "embed_audio.": "audio",
    }.items()
}  # fmt: skip

_TOP = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
}
_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}
_ASSISTANT = {
    "pre_projection.weight": "nextn.pre_projection.weight",
    "post_projection.weight": "nextn.post_projection.weight",
}
_MASKED = "masked_embedding."  # an assistant's clusters of tokens, which no GGUF reader uses


def to_gguf(name: str) -> str | None:
    """The GGUF name of a checkpoint's tensor, or None where it is none of a text model."""
    if name in _HEADS:
        return "output.weight"
    if name in _ASSISTANT:
        return _ASSISTANT[name]
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    if prefix is None:
        return None
    inner = name.removeprefix(prefix)
    match = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,3})\.(.+)", inner)
    if match is None:
        return _TOP.get(inner)
    short = _BLOCK.get(match[2])
    return f"blk.{match[1]}.{short}" if short else None


def to_hf(name: str) -> str:
    """How a checkpoint calls the tensor of this GGUF name, without the prefix; for messages."""
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    table = _BLOCK if match else _TOP | _ASSISTANT | {"lm_head.weight": "output.weight"}
    wanted = match[2] if match else name
    short = next((hf for hf, gguf in table.items() if gguf == wanted), name)
    return f"layers.{match[1]}.{short}" if match else short


def left_out(name: str) -> str | None:
    """What a tensor belongs to that a text GGUF does not hold: vision, audio, ...; else None."""
    if name.startswith(_MASKED):
        return "ordered-embedding"
    return next((part for prefix, part in _OTHER_PARTS.items() if name.startswith(prefix)), None)
