"""The tiny models as Hugging Face checkpoints: safetensors, config, tokenizer; no torch.

Written as the released ones are, in the names and forms that transformers reads. What a GGUF holds
otherwise (norms of Gemma 3, factors of RoPE) is undone here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType
from safetensors.numpy import save as numpy_save

import tiny
import tiny_vocab
from tiny import Variant

TOP = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "per_layer_token_embd.weight": "embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "per_layer_projection_norm.weight",
}

BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
}
KINDS = {"s": "sliding_attention", "f": "full_attention"}

Arrays = dict[str, np.ndarray]


def hf_name(name: str, prefix: str = "model.") -> str:
    """What a checkpoint calls the tensor of this GGUF name."""
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    return prefix + (f"layers.{match[1]}.{BLOCK[match[2]]}" if match else TOP[name])


def tensors(variant: Variant, prefix: str = "model.", seed: int = 0) -> Arrays:
    """The weights under their checkpoint names, float32."""
    return {
        hf_name(name, prefix): stored(variant, name, value)
        for name, value in tiny.tensors(variant, seed).items()
        if name != "rope_freqs.weight"
    }


def stored(variant: Variant, name: str, value: np.ndarray) -> np.ndarray:
    """A weight as a checkpoint has it: norms of Gemma 3 without the 1 that they add."""
    return value - np.float32(1) if variant.arch == "gemma3" and "norm" in name else value


def config(variant: Variant, form: str = "original") -> dict[str, Any]:
    """Its config.json; ``form`` is that of the releases or of newer ones, "per_layer"."""
    common = {
        "vocab_size": variant.n_vocab,
        "hidden_size": variant.n_embd,
        "intermediate_size": variant.n_ff,
        "num_hidden_layers": variant.n_layer,
        "num_attention_heads": variant.n_head,
        "num_key_value_heads": variant.n_kv,
        "head_dim": variant.head_dim,
        "rms_norm_eps": tiny.EPS,
        "sliding_window": variant.window,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
    if variant.arch == "gemma3":
        return common | _gemma3(variant, form)
    return common | _gemma4(variant) | _per_layer(variant, form)


def _gemma3(v: Variant, form: str) -> dict[str, Any]:
    made = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "max_position_embeddings": 32768,
        "query_pre_attn_scalar": v.head_dim,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    scaled = {"rope_type": "linear", "factor": v.rope_factor} if v.rope_factor != 1 else None
    if form == "original":
        bases = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
        return made | bases | {"sliding_window_pattern": 6, "rope_scaling": scaled}
    full = {"rope_theta": 1e6} | (scaled or {"rope_type": "default"})
    sliding = {"rope_theta": 1e4, "rope_type": "default"}
    return made | {
        "layer_types": [KINDS[letter] for letter in v.pattern],
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
    }


def _gemma4(v: Variant) -> dict[str, Any]:
    full = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "max_position_embeddings": 131072,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": v.n_ple,
        "vocab_size_per_layer_input": v.n_vocab,
        "attention_k_eq_v": v.k_eq_v,
        "num_kv_shared_layers": v.n_shared,
        "use_double_wide_mlp": v.n_ff_shared > 0,
        "enable_moe_block": v.n_expert > 0,
        "num_experts": v.n_expert or None,
        "top_k_experts": v.n_expert_used or None,
        "moe_intermediate_size": v.n_ff_exp or None,
        "use_bidirectional_attention": None,
        "layer_types": [KINDS[letter] for letter in v.pattern],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": full,
        },
    }


def _per_layer(v: Variant, form: str) -> dict[str, Any]:
    heads = v.n_kv_full if v.k_eq_v else None
    if form == "original":
        return {"global_head_dim": v.head_dim_full, "num_global_key_value_heads": heads}
    changes = {"head_dim": v.head_dim_full} | ({"num_key_value_heads": heads} if heads else {})
    full = [i for i in range(v.n_layer) if not v.sliding(i)]
    return {"per_layer_config": {f"{i:02}": changes for i in full}}


def tokenizer(arch: str) -> dict[str, Any]:
    """The tiny vocabulary as a tokenizer.json."""
    entries = list(enumerate(tiny_vocab.entries(arch)))
    special = {*tiny_vocab.GEMMA4_USER} if arch == "gemma4" else set()
    added = [
        {
            "id": i,
            "content": text.replace(" ", tiny_vocab.SPACE),
            "special": kind == TokenType.CONTROL or text in special,
        }
        for i, (text, _, kind) in entries
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    vocab = {text.replace(" ", tiny_vocab.SPACE): i for i, (text, _, _) in entries}
    merges = [merge.split(" ") for merge in tiny_vocab.merges()]
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": merges}
    return {"version": "1.0", "added_tokens": added, "model": model}


def files(variant: Variant, form: str = "original") -> dict[str, Any]:
    """Every file but the weights: name -> JSON value, or text."""
    arch = variant.arch
    gemma4 = arch == "gemma4"
    named = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "unk", "pad")}
    found: dict[str, Any] = {
        "config.json": config(variant, form),
        "tokenizer.json": tokenizer(arch),
        "tokenizer_config.json": named | ({"mask_token": "<mask>"} if gemma4 else {}),
        "chat_template.jinja": tiny_vocab.metadata(arch)["tokenizer.chat_template"],
        "generation_config.json": {"eos_token_id": 1, "bos_token_id": 2},
    }
    if variant.suppress:
        ids = [tiny_vocab.token_id(arch, text) for text in variant.suppress]
        found["generation_config.json"]["suppress_tokens"] = ids
    return found


def write(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    others: Mapping[str, Any],
    *,
    dtype: str = "float32",
    shards: int = 1,
) -> Path:
    """A checkpoint in ``folder``, its weights in so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in others.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name).write_text(text, encoding="utf-8")
    names = list(arrays)
    parts = [names[i::shards] for i in range(shards)]
    paths = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    if shards == 1:
        paths = ["model.safetensors"]
    else:
        places = {name: paths[i % shards] for i, name in enumerate(names)}
        index = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(index)
    for path, part in zip(paths, parts, strict=True):
        save(folder / path, {name: arrays[name] for name in part}, dtype)
    return folder


def save(path: Path, arrays: Mapping[str, np.ndarray], dtype: str) -> None:
    """One safetensors file; integers keep their type."""
    floats = [name for name, value in arrays.items() if value.dtype == np.float32]
    data = numpy_save(dict(arrays) | {name: _cast(arrays[name], dtype) for name in floats})
    path.write_bytes(_as_bfloat16(data) if dtype == "bfloat16" else data)


def _cast(value: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":  # by leaving bits out
        return np.ascontiguousarray((value.view("<u4") >> 16).astype("<u2"))
    return np.ascontiguousarray(value.astype(dtype))


def _as_bfloat16(data: bytes) -> bytes:
    """Call what numpy knows as uint16 what it is."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].replace(b'"U16"', b'"BF16"')
    return len(header).to_bytes(8, "little") + header + data[end:]


def checkpoint(folder: Path, name: str = "e2b", form: str = "original", **options: Any) -> Path:
    """One of the tiny models."""
    variant = tiny.VARIANTS[name]
    return write(folder, tensors(variant), files(variant, form), **options)
