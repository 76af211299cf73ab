"""The tiny models in transformers, float32, with the very weights of the GGUF file.

Every parameter of the transformers model is filled and every tensor of the file used;
either left over is an error. Needs torch; only ``make test-reference`` and
``make_golden.py`` come here.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma4ForCausalLM, Gemma4TextConfig

import checkpoints
import tiny
from tiny import Variant


def logits(variant: Variant, seed: int, ids: Sequence[int]) -> np.ndarray:
    """The final (soft-capped) logits after every token, [tokens, vocabulary], float32."""
    with torch.inference_mode():
        out = model(variant, seed)(input_ids=torch.tensor([list(ids)]), use_cache=False)
    return out.logits[0].numpy()


@functools.cache
def model(variant: Variant, seed: int) -> Any:
    """The transformers model of ``variant`` with the weights of ``seed``."""
    if variant.arch == "gemma4":
        net = Gemma4ForCausalLM(_gemma4_config(variant))
    else:
        net = Gemma3ForCausalLM(_gemma3_config(variant))
    weights = tiny.tensors(variant, seed)
    if variant.arch == "gemma4":
        _check_rope(net, weights.pop("rope_freqs.weight"))
    state = {
        checkpoints.hf_name(name): torch.tensor(checkpoints.stored(variant, name, value))
        for name, value in weights.items()
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    net.load_state_dict(state, strict=True)
    return net.float().eval()


def _check_rope(net: Any, divisors: np.ndarray) -> None:
    """The file's frequency divisors mean what transformers computes from its config."""
    rotary = net.model.rotary_emb
    head_dim = 2 * len(divisors)
    expected = 1e6 ** (-2.0 * np.arange(len(divisors)) / head_dim) / divisors
    np.testing.assert_allclose(rotary.full_attention_inv_freq, expected, rtol=1e-6, atol=1e-29)


def _layer_types(variant: Variant) -> list[str]:
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    return [kinds[letter] for letter in variant.pattern]


def _common(variant: Variant) -> dict[str, Any]:
    return {
        "vocab_size": variant.n_vocab,
        "hidden_size": variant.n_embd,
        "intermediate_size": variant.n_ff,
        "num_hidden_layers": variant.n_layer,
        "num_attention_heads": variant.n_head,
        "num_key_value_heads": variant.n_kv,
        "head_dim": variant.head_dim,
        "rms_norm_eps": tiny.EPS,
        "sliding_window": variant.window,
        "layer_types": _layer_types(variant),
        "attn_implementation": "eager",
    }


def _gemma4_config(variant: Variant) -> Gemma4TextConfig:
    overrides = {"head_dim": variant.head_dim_full, "num_key_value_heads": variant.n_kv_full}
    full = [i for i in range(variant.n_layer) if not variant.sliding(i)]
    return Gemma4TextConfig(
        **_common(variant),
        per_layer_config={i: overrides for i in full},
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1e6,
            },
        },
        final_logit_softcapping=30.0,
        vocab_size_per_layer_input=variant.n_vocab,
        hidden_size_per_layer_input=variant.n_ple,
        attention_k_eq_v=variant.k_eq_v,
        num_kv_shared_layers=variant.n_shared,
        use_double_wide_mlp=variant.n_ff_shared == 2 * variant.n_ff,
        enable_moe_block=variant.n_expert > 0,
        num_experts=variant.n_expert or None,
        top_k_experts=variant.n_expert_used or None,
        moe_intermediate_size=variant.n_ff_exp or None,
    )


def _gemma3_config(variant: Variant) -> Gemma3TextConfig:
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    if variant.rope_factor != 1.0:
        full |= {"rope_type": "linear", "factor": variant.rope_factor}
    return Gemma3TextConfig(
        **_common(variant),
        query_pre_attn_scalar=variant.head_dim,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": full,
        },
    )
