"""Tiny seeded models with the whole structure of real ones, as GGUF bytes; no download, no torch.

Each variant copies what is peculiar about one real size: which layers slide, which
share K/V, where V is K, per-layer embeddings, experts, RoPE scaling. The weights are
random but scaled so that attention is spread and no activation runs away, otherwise
rounding alone would upset a comparison. Not a model of language: the text is noise.
Vocabularies and templates are in ``tiny_vocab.py``.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import quantize

import tiny_vocab
from gemloom.ggml import quants

Tensors = dict[str, np.ndarray]
Metadata = dict[str, Any]
Edit = Callable[[Metadata, Tensors], None]
TypeOf = Callable[[str], GGMLQuantizationType]

F32 = GGMLQuantizationType.F32
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Variant:
    """What makes one tiny model; the counts are those of GGUF's keys."""

    name: str
    arch: str  # "gemma4" or "gemma3"
    pattern: str  # a letter a layer: s sliding, f full
    n_embd: int
    n_head: int
    n_kv: int  # on sliding layers
    n_kv_full: int
    n_ff: int
    n_ff_shared: int = 0  # on layers without K/V of their own; 0: as the others
    n_shared: int = 0  # the last so many layers read the K/V of an earlier one
    n_ple: int = 0  # width of the per-layer embeddings; 0: none
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_exp: int = 0
    head_dim: int = 32  # on sliding layers
    head_dim_full: int = 64
    window: int = 16
    rope_factor: float = 1.0  # linear scaling of the full layers
    k_eq_v: bool = False  # full layers have no V of their own
    suppress: tuple[str, ...] = ()  # tokens never to be sampled

    @property
    def n_layer(self) -> int:
        return len(self.pattern)

    @property
    def n_vocab(self) -> int:
        return len(tiny_vocab.entries(self.arch))

    def sliding(self, layer: int) -> bool:
        return self.pattern[layer] == "s"

    def owns_kv(self, layer: int) -> bool:
        return layer < self.n_layer - self.n_shared

    def has_v(self, layer: int) -> bool:
        return self.owns_kv(layer) and not (self.k_eq_v and not self.sliding(layer))

    def dim(self, layer: int) -> int:
        """Size of one head."""
        return self.head_dim if self.sliding(layer) else self.head_dim_full

    def kv(self, layer: int) -> int:
        """Number of K/V heads."""
        return self.n_kv if self.sliding(layer) else self.n_kv_full

    def ff(self, layer: int) -> int:
        """Width of the dense feed-forward part."""
        return self.n_ff if self.owns_kv(layer) else self.n_ff_shared or self.n_ff

    def wide(self) -> Variant:
        """The same structure with every matrix row a multiple of 256, as K-quants need."""
        return replace(
            self,
            name=f"{self.name}_wide",
            n_embd=256,
            n_head=8,
            n_ff=512,
            n_ff_shared=1024 if self.n_ff_shared else 0,
            n_ple=256 if self.n_ple else 0,
            n_ff_exp=256 if self.n_expert else 0,
        )


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant(
            "e2b", "gemma4", "ssssfssssf", 96, 4, 1, 1, 128,
            n_ff_shared=256, n_shared=5, n_ple=32,
        ),
        Variant("e4b", "gemma4", "sssssfsssssf", 64, 4, 2, 2, 128, n_shared=6, n_ple=32),
        Variant(
            "12b", "gemma4", "sssssf", 96, 4, 4, 1, 160,
            k_eq_v=True, suppress=("<image|>", "<audio|>"),
        ),
        Variant(
            "26b", "gemma4", "sssssf", 64, 4, 4, 2, 96,
            k_eq_v=True, n_expert=8, n_expert_used=3, n_ff_exp=32,
        ),
        Variant("31b", "gemma4", "sssssfsssssf", 128, 8, 4, 2, 256, k_eq_v=True),
        Variant("gemma3", "gemma3", "sssssfsssssf", 96, 4, 1, 1, 128, head_dim_full=32),
        Variant(
            "gemma3_scaled", "gemma3", "sssssfss", 64, 4, 2, 2, 128,
            head_dim_full=32, rope_factor=8.0,
        ),
    )
}  # fmt: skip


def tensors(variant: Variant, seed: int = 0) -> Tensors:
    """Every weight under its GGUF name, float32, read-only; shapes are ggml's reversed."""
    return dict(_tensors(variant, seed))


def metadata(variant: Variant) -> Metadata:
    """Every key of the file, with those that real files have.

    Integers become u32, floats f32, lists arrays of i32, f32, bool or strings.
    """
    keys = _gemma4_keys(variant) if variant.arch == "gemma4" else _gemma3_keys(variant)
    return {
        "general.architecture": variant.arch,
        "general.type": "model",
        "general.name": f"tiny {variant.name}",
        **{f"{variant.arch}.{key}": value for key, value in keys.items()},
        **tiny_vocab.metadata(variant.arch, variant.suppress),
        "general.quantization_version": 2,
        "general.file_type": 0,
    }


def gguf_bytes(
    variant: Variant,
    seed: int = 0,
    *,
    types: str | TypeOf | None = None,
    drop: Iterable[str] = (),
    extra: Mapping[str, np.ndarray] | None = None,
    edit: Edit | None = None,
    **forms: bool,
) -> bytes:
    """The model as one GGUF file.

    ``types``: None for F32 throughout, "q8_0", "q4_k" or another for the matrices, or a function
    of the tensor's name. ``forms`` are other layouts of the same file, by their names in
    ``FORMS``. Then the tensors of ``drop`` go, those of ``extra`` come or replace others,
    and ``edit(metadata, tensors)`` may change both, to make files that are wrong.
    """
    if not (drop or extra or edit or callable(types)):
        return _unedited(variant, seed, types, tuple(sorted(forms.items())))
    keys, weights = _formed(variant, seed, forms)
    for name in drop:
        del weights[name]
    weights.update(extra or {})
    if edit is not None:
        edit(keys, weights)
    return write(keys, weights, _type_of(types, weights))


@functools.lru_cache(maxsize=24)
def _unedited(
    variant: Variant, seed: int, types: str | None, forms: tuple[tuple[str, bool], ...]
) -> bytes:
    """Many tests load the same file, and quantizing it takes longer than what they do with it."""
    keys, weights = _formed(variant, seed, dict(forms))
    return write(keys, weights, _type_of(types, weights))


def _formed(variant: Variant, seed: int, forms: Mapping[str, bool]) -> tuple[Metadata, Tensors]:
    keys, weights = metadata(variant), tensors(variant, seed)
    for name, wanted in forms.items():
        if wanted:
            FORMS[name](variant, keys, weights)
    return keys, weights


def write(keys: Metadata, weights: Tensors, type_of: TypeOf = lambda name: F32) -> bytes:
    """A GGUF file of these keys and tensors, each converted to its type."""
    writer = GGUFWriter(None, arch="")  # the architecture is among the keys
    for key, value in keys.items():
        writer.add_key_value(key, value, _value_type(value))
    for name, value in weights.items():
        writer.add_tensor(name, quantized(value, type_of(name)), raw_dtype=type_of(name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiny.gguf")
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def quantized(weight: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """A tensor's bytes in a type; by ggml where the format's own package only reads it."""
    if not kind.name.endswith("_K"):
        return quantize(weight, kind)
    rows = np.frombuffer(quants.quantize(weight.reshape(-1, weight.shape[-1]), kind), np.uint8)
    return rows.reshape(*weight.shape[:-1], -1)


def _value_type(value: Any) -> GGUFValueType:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return GGUFValueType.UINT32
    return GGUFValueType.get_type(value)


def _type_of(types: str | TypeOf | None, weights: Tensors) -> TypeOf:
    if callable(types):
        return types
    kind = GGMLQuantizationType[(types or "f32").upper()]
    return lambda name: kind if _is_matrix(name, weights[name]) else F32


def _is_matrix(name: str, weight: np.ndarray) -> bool:
    """Whether quantizers touch it: the router is kept as it is in real files too."""
    return weight.ndim > 1 and "ffn_gate_inp" not in name


# --- metadata -----------------------------------------------------------------


def _gemma4_keys(v: Variant) -> Metadata:
    uniform_kv = v.n_kv == v.n_kv_full
    keys: Metadata = {
        "block_count": v.n_layer,
        "context_length": 131072,
        "embedding_length": v.n_embd,
        "feed_forward_length": [v.ff(i) for i in range(v.n_layer)] if v.n_ff_shared else v.n_ff,
        "attention.head_count": v.n_head,
        "attention.head_count_kv": v.n_kv if uniform_kv else [v.kv(i) for i in range(v.n_layer)],
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "attention.layer_norm_rms_epsilon": EPS,
        "attention.key_length": v.head_dim_full,
        "attention.value_length": v.head_dim_full,
        "final_logit_softcapping": 30.0,
        "attention.sliding_window": v.window,
        "attention.shared_kv_layers": v.n_shared,
        "embedding_length_per_layer_input": v.n_ple,
        "attention.sliding_window_pattern": [v.sliding(i) for i in range(v.n_layer)],
        "attention.key_length_swa": v.head_dim,
        "attention.value_length_swa": v.head_dim,
        "rope.dimension_count": v.head_dim_full,
        "rope.dimension_count_swa": v.head_dim,
    }
    if v.n_expert:
        keys["expert_count"] = v.n_expert
        keys["expert_used_count"] = v.n_expert_used
        keys["expert_feed_forward_length"] = v.n_ff_exp
    return keys


def _gemma3_keys(v: Variant) -> Metadata:
    keys: Metadata = {
        "context_length": 32768,
        "embedding_length": v.n_embd,
        "block_count": v.n_layer,
        "feed_forward_length": v.n_ff,
        "attention.head_count": v.n_head,
        "attention.layer_norm_rms_epsilon": EPS,
        "attention.key_length": v.head_dim,
        "attention.value_length": v.head_dim,
        "rope.freq_base": 1e6,
        "attention.sliding_window": v.window,
        "attention.head_count_kv": v.n_kv,
    }
    if v.rope_factor != 1.0:
        keys["rope.scaling.type"] = "linear"
        keys["rope.scaling.factor"] = v.rope_factor
    return keys


# --- weights ------------------------------------------------------------------


@functools.cache
def _tensors(variant: Variant, seed: int) -> Tensors:
    rng = np.random.RandomState(seed)
    weights = {name: _draw(rng, variant, name, s) for name, s in _shapes(variant).items()}
    if variant.arch == "gemma4":
        half = variant.head_dim_full // 2
        weights["rope_freqs.weight"] = np.repeat([1.0, 1e30], [half // 4, half - half // 4])
    out = {name: weight.astype(np.float32) for name, weight in weights.items()}
    for weight in out.values():
        weight.setflags(write=False)
    return out


def _draw(rng: np.random.RandomState, v: Variant, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random values of one tensor, such that what it makes has a deviation of about 1."""
    if name.endswith(("layer_output_scale.weight", "ffn_down_exps.scale")):
        return rng.uniform(0.5, 1.2, shape)
    noise = rng.standard_normal(shape)
    if "norm" in name or name.endswith("ffn_gate_inp.scale"):
        return _norm_level(v, name, shape) * (1 + 0.2 * noise)
    if name.endswith("ffn_gate_inp.weight"):
        return 2 * noise  # its input has a length of 1; experts should not nearly tie
    if name == "token_embd.weight":  # small beside what the layers add, or every token repeats
        return 0.5 * noise * shape[-1] ** -0.5
    fan_in = v.n_ple if name == "per_layer_token_embd.weight" else shape[-1]
    return noise * fan_in**-0.5


def _norm_level(v: Variant, name: str, shape: tuple[int, ...]) -> float:
    if name.endswith(("attn_q_norm.weight", "attn_k_norm.weight")) and v.arch == "gemma4":
        return shape[0] ** -0.25  # Gemma 4 has no attention scale; this gives scores of about 1
    return 12.0 if name == "output_norm.weight" else 1.0  # logits so large that the cap matters


def _shapes(v: Variant) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (v.n_vocab, v.n_embd)}
    if v.n_ple:
        shapes["per_layer_token_embd.weight"] = (v.n_vocab, v.n_layer * v.n_ple)
        shapes["per_layer_model_proj.weight"] = (v.n_layer * v.n_ple, v.n_embd)
        shapes["per_layer_proj_norm.weight"] = (v.n_ple,)
    for i in range(v.n_layer):
        parts = _attention_shapes(v, i) | _ffn_shapes(v, i)
        if v.n_expert:
            parts |= _expert_shapes(v)
        if v.n_ple:
            parts |= _ple_shapes(v)
        shapes |= {f"blk.{i}.{name}": shape for name, shape in parts.items()}
    shapes["output_norm.weight"] = (v.n_embd,)
    return shapes


def _attention_shapes(v: Variant, layer: int) -> dict[str, tuple[int, ...]]:
    dim, d = v.dim(layer), v.n_embd
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (d,),
        "attn_q.weight": (v.n_head * dim, d),
        "attn_q_norm.weight": (dim,),
        "attn_output.weight": (d, v.n_head * dim),
        "post_attention_norm.weight": (d,),
    }
    if v.owns_kv(layer):
        shapes["attn_k.weight"] = (v.kv(layer) * dim, d)
        shapes["attn_k_norm.weight"] = (dim,)
    if v.has_v(layer):
        shapes["attn_v.weight"] = (v.kv(layer) * dim, d)
    return shapes


def _ffn_shapes(v: Variant, layer: int) -> dict[str, tuple[int, ...]]:
    d, ff = v.n_embd, v.ff(layer)
    shapes: dict[str, tuple[int, ...]] = {
        "ffn_norm.weight": (d,),
        "ffn_gate.weight": (ff, d),
        "ffn_up.weight": (ff, d),
        "ffn_down.weight": (d, ff),
        "post_ffw_norm.weight": (d,),
    }
    if v.arch == "gemma4":
        shapes["layer_output_scale.weight"] = (1,)
    return shapes


def _expert_shapes(v: Variant) -> dict[str, tuple[int, ...]]:
    d, ff, n = v.n_embd, v.n_ff_exp, v.n_expert
    return {
        "ffn_gate_inp.weight": (n, d),
        "ffn_gate_inp.scale": (d,),
        "pre_ffw_norm_2.weight": (d,),
        "post_ffw_norm_1.weight": (d,),
        "post_ffw_norm_2.weight": (d,),
        "ffn_gate_up_exps.weight": (n, 2 * ff, d),
        "ffn_down_exps.weight": (n, d, ff),
        "ffn_down_exps.scale": (n,),
    }


def _ple_shapes(v: Variant) -> dict[str, tuple[int, ...]]:
    return {
        "inp_gate.weight": (v.n_ple, v.n_embd),
        "proj.weight": (v.n_embd, v.n_ple),
        "post_norm.weight": (v.n_embd,),
    }


# --- other layouts of the same model ------------------------------------------


def redundant_kv(variant: Variant, keys: Metadata, weights: Tensors) -> None:
    """Sharing layers carry K and V tensors that nothing may use, as older converters wrote them."""
    rng = np.random.RandomState(1)
    own = replace(variant, n_shared=0, n_ff_shared=0)
    for i in range(variant.n_layer - variant.n_shared, variant.n_layer):
        for name, shape in _attention_shapes(own, i).items():
            full = f"blk.{i}.{name}"
            if full not in weights:
                weights[full] = _draw(rng, variant, full, shape).astype(np.float32)


def split_experts(variant: Variant, keys: Metadata, weights: Tensors) -> None:
    """The experts' gate and up matrices as two tensors."""
    for i in range(variant.n_layer):
        both = weights.pop(f"blk.{i}.ffn_gate_up_exps.weight")
        gate, up = np.split(both, 2, axis=1)
        weights[f"blk.{i}.ffn_gate_exps.weight"] = np.ascontiguousarray(gate)
        weights[f"blk.{i}.ffn_up_exps.weight"] = np.ascontiguousarray(up)


def untied(variant: Variant, keys: Metadata, weights: Tensors) -> None:
    """An output matrix of its own, other than the embeddings. Another model, so other logits."""
    table = weights["token_embd.weight"]
    weights["output.weight"] = np.ascontiguousarray(table[::-1])


def fused_qkv(variant: Variant, keys: Metadata, weights: Tensors) -> None:
    """Q, K and V in one matrix wherever a layer has all three."""
    for i in filter(variant.has_v, range(variant.n_layer)):
        parts = [weights.pop(f"blk.{i}.attn_{letter}.weight") for letter in "qkv"]
        weights[f"blk.{i}.attn_qkv.weight"] = np.concatenate(parts)


def arrays(variant: Variant, keys: Metadata, weights: Tensors) -> None:
    """Counts that are the same on all layers as arrays too."""
    for key in ("attention.head_count_kv", "feed_forward_length"):
        value = keys[f"{variant.arch}.{key}"]
        if isinstance(value, int):
            keys[f"{variant.arch}.{key}"] = [value] * variant.n_layer


FORMS = {form.__name__: form for form in (redundant_kv, split_experts, untied, fused_qkv, arrays)}
