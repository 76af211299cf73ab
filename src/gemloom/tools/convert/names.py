"""Tensor names: those of Hugging Face checkpoints and those of GGUF files. No bytes in here."""

from __future__ import annotations

import re

from gemloom.models.tensor_names import inner, modality

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
    if name == "lm_head.weight":
        return "output.weight"
    if name in _ASSISTANT:
        return _ASSISTANT[name]
    match = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,3})\.(.+)", name)
    if match is None:
        return _TOP.get(name)
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
    name = inner(name)
    if name.startswith(_MASKED):
        return "ordered-embedding"
    if _BUFFER.fullmatch(name.rpartition(".")[2]):
        return "buffer (computed from the config)"
    return modality(name)
