"""Gemma 4 and Gemma 3 forward passes in plain numpy, float64, one sequence, no cache.

Written from the description of the models alone and shared with nothing else, so that
an error in the runtime is not repeated here. It reads metadata and tensors under their
GGUF names. Not fast, and it checks nothing: its input is what ``tiny.py`` makes.
Arrays are [tokens, features] or [tokens, heads, head_dim].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray


def logits(metadata: Mapping[str, Any], tensors: Mapping[str, Array], ids: Sequence[int]) -> Array:
    """The final logits after every token, [tokens, vocabulary], float64."""
    arch = metadata["general.architecture"]
    keys = {k.removeprefix(f"{arch}."): v for k, v in metadata.items()}
    weights = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    x = weights["token_embd.weight"][list(ids)] * keys["embedding_length"] ** 0.5
    forward = _gemma4 if arch == "gemma4" else _gemma3
    x = rms(forward(keys, weights, ids, x), weights["output_norm.weight"])
    out = x @ weights.get("output.weight", weights["token_embd.weight"]).T
    cap = keys.get("final_logit_softcapping")
    return cap * np.tanh(out / cap) if cap else out


@dataclass(frozen=True)
class Layer:
    """One layer's weights by their short names, and what its attention needs to know."""

    w: dict[str, Array]
    head_dim: int
    window: int | None  # None: attends to everything before
    inv_freq: Array  # [head_dim / 2] radians a position
    scale: float


# --- Gemma 4 ------------------------------------------------------------------


def _gemma4(keys: dict[str, Any], weights: dict[str, Array], ids: Sequence[int], x: Array) -> Array:
    ple = (
        _per_layer_inputs(keys, weights, ids, x)
        if keys["embedding_length_per_layer_input"]
        else None
    )
    sliding = keys["attention.sliding_window_pattern"]
    first_shared = keys["block_count"] - keys["attention.shared_kv_layers"]
    last_kv: dict[bool, tuple[Array, Array]] = {}  # by kind of layer: the newest K and V
    for i in range(keys["block_count"]):
        layer = _gemma4_layer(keys, weights, i)
        h = rms(x, layer.w["attn_norm"])
        if i < first_shared:
            last_kv[sliding[i]] = _gemma4_kv(layer, h)
        q = rope(rms(heads(h @ layer.w["attn_q"].T, layer), layer.w["attn_q_norm"]), layer)
        a = attend(q, *last_kv[sliding[i]], layer) @ layer.w["attn_output"].T
        x = x + rms(a, layer.w["post_attention_norm"])
        x = x + rms(_gemma4_ffn(keys, layer.w, x), layer.w["post_ffw_norm"])
        if ple is not None:
            gated = gelu(x @ layer.w["inp_gate"].T) * ple[:, i]
            x = x + rms(gated @ layer.w["proj"].T, layer.w["post_norm"])
        x = x * layer.w["layer_output_scale"]
    return x


def _gemma4_layer(keys: dict[str, Any], weights: dict[str, Array], i: int) -> Layer:
    sliding = keys["attention.sliding_window_pattern"][i]
    dim = keys["attention.key_length_swa" if sliding else "attention.key_length"]
    base = keys["rope.freq_base_swa" if sliding else "rope.freq_base"]
    inv_freq = base ** (-2.0 * np.arange(dim // 2) / dim)
    if not sliding:
        inv_freq = inv_freq / weights["rope_freqs.weight"]
    window = keys["attention.sliding_window"] if sliding else None
    return Layer(_block(weights, i), dim, window, inv_freq, scale=1.0)


def _gemma4_kv(layer: Layer, h: Array) -> tuple[Array, Array]:
    k = heads(h @ layer.w["attn_k"].T, layer)
    v = heads(h @ layer.w["attn_v"].T, layer) if "attn_v" in layer.w else k
    return rope(rms(k, layer.w["attn_k_norm"]), layer), rms(v)


def _gemma4_ffn(keys: dict[str, Any], w: dict[str, Array], x: Array) -> Array:
    dense = mlp(w, rms(x, w["ffn_norm"]))
    if "ffn_gate_inp" not in w:
        return dense
    experts = _experts(w, x, keys["expert_used_count"])
    return rms(dense, w["post_ffw_norm_1"]) + rms(experts, w["post_ffw_norm_2"])


def _experts(w: dict[str, Array], x: Array, n_used: int) -> Array:
    routed = rms(x) * w["ffn_gate_inp.scale"] * x.shape[1] ** -0.5
    p = softmax(routed @ w["ffn_gate_inp"].T)
    h = rms(x, w["pre_ffw_norm_2"])
    out = np.zeros_like(x)
    for t in range(len(x)):
        best = np.argsort(-p[t])[:n_used]
        for e in best:
            gate, up = np.split(w["ffn_gate_up_exps"][e] @ h[t], 2)
            y = w["ffn_down_exps"][e] @ (gelu(gate) * up)
            out[t] += p[t, e] / p[t, best].sum() * w["ffn_down_exps.scale"][e] * y
    return out


def _per_layer_inputs(
    keys: dict[str, Any], weights: dict[str, Array], ids: Sequence[int], x: Array
) -> Array:
    """[tokens, layers, n_ple]"""
    shape = (len(ids), keys["block_count"], keys["embedding_length_per_layer_input"])
    table = weights["per_layer_token_embd.weight"][list(ids)].reshape(shape) * shape[2] ** 0.5
    projected = (x @ weights["per_layer_model_proj.weight"].T * x.shape[1] ** -0.5).reshape(shape)
    return (rms(projected, weights["per_layer_proj_norm.weight"]) + table) / 2**0.5


# --- Gemma 3 ------------------------------------------------------------------


def _gemma3(keys: dict[str, Any], weights: dict[str, Array], ids: Sequence[int], x: Array) -> Array:
    for i in range(keys["block_count"]):
        layer = _gemma3_layer(keys, weights, i)
        h = rms(x, layer.w["attn_norm"])
        q = rope(rms(heads(h @ layer.w["attn_q"].T, layer), layer.w["attn_q_norm"]), layer)
        k = rope(rms(heads(h @ layer.w["attn_k"].T, layer), layer.w["attn_k_norm"]), layer)
        v = heads(h @ layer.w["attn_v"].T, layer)
        a = attend(q, k, v, layer) @ layer.w["attn_output"].T
        x = x + rms(a, layer.w["post_attention_norm"])
        f = mlp(layer.w, rms(x, layer.w["ffn_norm"]))
        x = x + rms(f, layer.w["post_ffw_norm"])
    return x


def _gemma3_layer(keys: dict[str, Any], weights: dict[str, Array], i: int) -> Layer:
    full = i % 6 == 5
    dim = keys["attention.key_length"]
    base = keys["rope.freq_base"] if full else 1e4
    inv_freq = base ** (-2.0 * np.arange(dim // 2) / dim)
    if full:
        inv_freq = inv_freq / keys.get("rope.scaling.factor", 1.0)
    window = None if full else keys["attention.sliding_window"]
    return Layer(_block(weights, i), dim, window, inv_freq, scale=dim**-0.5)


# --- parts --------------------------------------------------------------------


def _block(weights: dict[str, Array], i: int) -> dict[str, Array]:
    prefix = f"blk.{i}."
    return {
        name.removeprefix(prefix).removesuffix(".weight"): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def rms(x: Array, weight: Array | float = 1.0) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def mlp(w: dict[str, Array], h: Array) -> Array:
    return (gelu(h @ w["ffn_gate"].T) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T


def heads(x: Array, layer: Layer) -> Array:
    return x.reshape(len(x), -1, layer.head_dim)


def rope(x: Array, layer: Layer) -> Array:
    """Turn the pairs (i, i + head_dim / 2) by the position times their frequency."""
    angle = np.arange(len(x))[:, None, None] * layer.inv_freq
    a, b = np.split(x, 2, axis=-1)
    turned = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return np.concatenate(turned, axis=-1)


def attend(q: Array, k: Array, v: Array, layer: Layer) -> Array:
    """[tokens, heads * head_dim]; each K/V head serves as many successive heads of Q."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    back = np.arange(len(q))[:, None] - np.arange(len(k))  # how far each key lies behind
    seen = (back >= 0) & (back < (layer.window or len(k)))
    scores = np.where(seen, np.einsum("qhd,khd->hqk", q, k) * layer.scale, -np.inf)
    return np.einsum("hqk,khd->qhd", softmax(scores), v).reshape(len(q), -1)
