"""What config.json says, as the metadata keys of a GGUF. Neither tensors nor tokens in here.

Keys that Gemma 3's own checkpoints leave out have the defaults of transformers' Gemma3TextConfig;
those of Gemma 4 are complete, so there only what newer relatives do not have may be absent.
What no key of a GGUF can say must be what its readers take for granted, or is a ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from gemloom.errors import ConfigError
from gemloom.files.gguf import Metadata, Value
from gemloom.models.keys import MOST_LAYERS

Keys = dict[str, Value]

_GEMMA3_DEFAULTS = {
    "attention_bias": False, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072, "num_attention_heads": 8, "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 1e4,
    "rope_theta": 1e6, "sliding_window_pattern": 6, "vocab_size": 262_208,
}  # fmt: skip
_GEMMA4_DEFAULTS = {
    "attention_bias": False, "attention_k_eq_v": False, "enable_moe_block": False,
    "hidden_activation": "gelu_pytorch_tanh", "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
}  # fmt: skip
_NO_PER_LAYER_INPUTS = {"hidden_size_per_layer_input": 0}
_FAMILIES: dict[str, tuple[str, Mapping[str, Any]]] = {  # model_type -> architecture, defaults
    "gemma3": ("gemma3", _GEMMA3_DEFAULTS),
    "gemma3_text": ("gemma3", _GEMMA3_DEFAULTS),
    "gemma4": ("gemma4", _GEMMA4_DEFAULTS),
    "gemma4_text": ("gemma4", _GEMMA4_DEFAULTS),
    "gemma4_unified": ("gemma4", _GEMMA4_DEFAULTS | _NO_PER_LAYER_INPUTS),
    "gemma4_unified_text": ("gemma4", _GEMMA4_DEFAULTS | _NO_PER_LAYER_INPUTS),
    "gemma4_assistant": ("gemma4-assistant", _GEMMA4_DEFAULTS | _NO_PER_LAYER_INPUTS),
    "gemma4_unified_assistant": ("gemma4-assistant", _GEMMA4_DEFAULTS | _NO_PER_LAYER_INPUTS),
}
_PER_LAYER = ("head_dim", "num_key_value_heads", "intermediate_size")
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSettings:
    """A config.json as GGUF has it."""

    architecture: str
    keys: Keys  # all but the tokenizer's, with their prefix
    n_vocab: int
    tied: bool  # the embedding table is the output matrix too
    k_is_v: bool  # full layers make V from K
    rotated: float | None  # the share of a full layer's dimensions that rotate; None: no factors


def read(config: Mapping[str, Any], name: str) -> CheckpointSettings:
    """The settings in a config.json. ConfigError, with ``name``, for what is missing or unknown."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ConfigError(
            f"{name}: the model_type {kind!r} cannot be converted; {', '.join(_FAMILIES)} can"
        )
    if config.get("quantization_config"):
        raise ConfigError(f"{name}: a quantized checkpoint; take the one it was made from")
    architecture, defaults = _FAMILIES[kind]
    text = config if config.get("text_config") is None else config["text_config"]
    if not isinstance(text, dict):
        raise ConfigError(f"{name}: text_config is not an object")
    source = _Config(name, text, defaults)
    source.check_common()
    build = _gemma3 if architecture == "gemma3" else _gemma4
    keys, rotated = build(source)
    if architecture == "gemma4-assistant":
        keys |= _assistant(source, _Config(name, config, {}))
    spelled = {f"{architecture}.{key}": value for key, value in keys.items()}
    tied = config.get("tie_word_embeddings") is not False  # of the whole, not of its text part
    k_is_v = architecture != "gemma3" and source.scalars.boolean("attention_k_eq_v")
    return CheckpointSettings(
        architecture=architecture,
        keys=spelled,
        n_vocab=source.count("vocab_size"),
        tied=tied,
        k_is_v=k_is_v,
        rotated=rotated,
    )


class _Config:
    """The text part of a config.json: typed getters, and what differs between layers."""

    def __init__(self, name: str, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.name, self.raw = name, raw
        # null is a value of its own in these files: "none", not "as ever"
        self.scalars = Metadata(
            name,
            {
                key: value
                for key, value in {**defaults, **raw}.items()
                if isinstance(value, bool | int | float | str)
            },
        )

    def refuse(self, key: str, why: str) -> NoReturn:
        raise ConfigError(f"{self.name}: {key}: {why}")

    def count(self, key: str) -> int:
        """A size: 1 or more."""
        value = self.scalars.integer(key)
        if not 1 <= value < 2**31:
            self.refuse(key, f"{value:,} is not a size")
        return value

    def n_layer(self) -> int:
        """How many layers there are; lists are made of them, so not any number will do."""
        n = self.count("num_hidden_layers")
        if n > MOST_LAYERS:
            self.refuse("num_hidden_layers", f"{n:,} are more than {MOST_LAYERS}")
        return n

    def table(self, key: str) -> Mapping[str, Any]:
        """A nested object, empty where there is none."""
        value = self.raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(key, "is not an object")
        return value

    def check_common(self) -> None:
        """What the forward pass of every Gemma takes for granted."""
        activation = self.scalars.string("hidden_activation")
        if activation != "gelu_pytorch_tanh":
            self.refuse("hidden_activation", f"{activation!r} is not gelu_pytorch_tanh")
        if self.scalars.boolean("attention_bias"):
            self.refuse("attention_bias", "biases have no place in these models' GGUF")
        if self.raw.get("attn_logit_softcapping"):
            self.refuse("attn_logit_softcapping", "these models have none")
        if self.raw.get("use_bidirectional_attention") not in (None, False, "vision"):
            self.refuse("use_bidirectional_attention", "text that sees what comes after it")

    def sliding(self) -> list[bool]:
        """Which layers slide: one boolean a layer."""
        n, kinds = self.n_layer(), self.raw.get("layer_types")
        if kinds is None and "sliding_window_pattern" in self.scalars:
            every = self.count("sliding_window_pattern")
            return [(i + 1) % every != 0 for i in range(n)]
        found = kinds if isinstance(kinds, list) else []
        if len(found) != n or any(kind not in (_SLIDING, _FULL) for kind in found):
            self.refuse("layer_types", f"needs {n} of {_SLIDING} and {_FULL}")
        return [kind == _SLIDING for kind in found]

    def per_layer(self, key: str, sliding: Sequence[bool]) -> list[int]:
        """A size of every layer, from any of the forms in which configs tell that they differ."""
        base = self.count(key)
        values = [base] * len(sliding)
        if self.raw.get("per_layer_config") is None:
            full = self._of_full_layers(key, base)
            return [base if slides else full for slides in sliding]
        for layer, changed in self.table("per_layer_config").items():
            if not layer.isdecimal() or int(layer) >= len(sliding) or not isinstance(changed, dict):
                self.refuse("per_layer_config", f"{layer!r} is not a layer with its changes")
            if unknown := set(changed) - set(_PER_LAYER):
                self.refuse("per_layer_config", f"{min(unknown)!r} of a layer is unknown")
            if changed.get(key) is not None:
                values[int(layer)] = _Config(self.name, changed, {}).count(key)
        return values

    def _of_full_layers(self, key: str, base: int) -> int:
        if key == "head_dim":
            return self.count("global_head_dim")
        shares = key == "num_key_value_heads" and self.scalars.boolean("attention_k_eq_v")
        if shares and self.raw.get("num_global_key_value_heads") is not None:
            return self.count("num_global_key_value_heads")
        return base

    def rope(self, kind: str) -> _Config:
        """The rotary settings of sliding or full layers."""
        tables = _Config(f"{self.name}: rope_parameters", self.table("rope_parameters"), {})
        return _Config(f"{tables.name}: {kind}", tables.table(kind), {})


def _common(c: _Config, sliding: Sequence[bool]) -> Keys:
    keys: Keys = {
        "block_count": len(sliding),
        "context_length": c.count("max_position_embeddings"),
        "embedding_length": c.count("hidden_size"),
        "attention.head_count": c.count("num_attention_heads"),
        "attention.layer_norm_rms_epsilon": c.scalars.number("rms_norm_eps"),
        "attention.sliding_window": c.count("sliding_window"),
    }
    if c.raw.get("final_logit_softcapping") is not None:
        keys["final_logit_softcapping"] = c.scalars.number("final_logit_softcapping")
    return keys


# -- Gemma 3 ---------------------------------------------------------------------------------


def _gemma3(c: _Config) -> tuple[Keys, None]:
    sliding = c.sliding()
    head_dim = c.count("head_dim")
    keys = _common(c, sliding) | {
        "feed_forward_length": c.count("intermediate_size"),
        "attention.head_count_kv": c.count("num_key_value_heads"),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    _check_gemma3_scale(c, len(sliding), head_dim)
    if sliding != [i % 6 != 5 for i in range(len(sliding))]:
        keys["attention.sliding_window_pattern"] = np.array(sliding)
    return keys | _gemma3_rope(c), None


def _check_gemma3_scale(c: _Config, n_layer: int, head_dim: int) -> None:
    """No key says by what scores are scaled; readers know the 27B by its 62 layers."""
    scalar = c.scalars.number("query_pre_attn_scalar")
    taken = c.count("hidden_size") / c.count("num_attention_heads") if n_layer == 62 else head_dim
    if scalar != taken:
        c.refuse("query_pre_attn_scalar", f"{scalar:g}, but readers of a GGUF take {taken:g}")


def _gemma3_rope(c: _Config) -> Keys:
    """From rope_parameters, a table for each kind of layer, or the older keys."""
    if "rope_parameters" in c.raw:
        full, sliding = c.rope(_FULL), c.rope(_SLIDING)
        base, base_swa = full.scalars.number("rope_theta"), sliding.scalars.number("rope_theta")
        _check_rope_type(sliding, "default")
    else:
        full = _Config(f"{c.name}: rope_scaling", c.table("rope_scaling"), {})
        base, base_swa = (c.scalars.number(k) for k in ("rope_theta", "rope_local_base_freq"))
    keys: Keys = {"rope.freq_base": base, "rope.freq_base_swa": base_swa}
    if _check_rope_type(full, "default", "linear") == "linear":
        keys["rope.scaling.type"] = "linear"
        keys["rope.scaling.factor"] = full.scalars.number("factor")
    return keys


def _check_rope_type(rope: _Config, *known: str) -> str:
    kind = rope.scalars.get("rope_type", rope.scalars.get("type", "default"))
    if kind not in known:
        rope.refuse("rope_type", f"{kind!r} is none of {', '.join(known)}")
    return str(kind)


# -- Gemma 4 ---------------------------------------------------------------------------------


def _gemma4(c: _Config) -> tuple[Keys, float]:
    sliding = c.sliding()
    if sliding[-1]:
        c.refuse("layer_types", f"the last layer of a Gemma 4 is {_FULL}")
    head_dims = c.per_layer("head_dim", sliding)
    full, swa = (_one_size(c, head_dims, sliding, kind) for kind in (False, True))
    shared = c.scalars.integer("num_kv_shared_layers")
    keys = _common(c, sliding) | {
        "feed_forward_length": _folded(_n_ff(c, sliding, shared)),
        "attention.head_count_kv": _folded(c.per_layer("num_key_value_heads", sliding)),
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": swa,
        "attention.value_length_swa": swa,
        "attention.sliding_window_pattern": np.array(sliding),
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": c.scalars.integer("hidden_size_per_layer_input"),
        "rope.dimension_count": full,
        "rope.dimension_count_swa": swa,
    }
    rope_keys, rotated = _gemma4_rope(c)
    return keys | rope_keys | _experts(c), rotated


def _one_size(c: _Config, sizes: Sequence[int], sliding: Sequence[bool], kind: bool) -> int:
    """The size of all sliding, or of all full, layers: a GGUF has one key for each kind."""
    found = {size for size, slides in zip(sizes, sliding, strict=True) if slides == kind}
    if len(found) > 1:
        c.refuse("head_dim", f"layers of one kind have heads of {min(found)} and {max(found)}")
    return found.pop() if found else c.count("head_dim")


def _n_ff(c: _Config, sliding: Sequence[bool], shared: int) -> list[int]:
    sizes = c.per_layer("intermediate_size", sliding)
    if not c.scalars.boolean("use_double_wide_mlp"):
        return sizes
    first = len(sizes) - shared
    return [size * (2 if i >= first else 1) for i, size in enumerate(sizes)]


def _folded(sizes: Sequence[int]) -> Value:
    """One number where all layers are alike, else an array."""
    return sizes[0] if len(set(sizes)) == 1 else np.array(sizes, np.int32)


def _gemma4_rope(c: _Config) -> tuple[Keys, float]:
    full, sliding = c.rope(_FULL), c.rope(_SLIDING)
    _check_rope_type(sliding, "default")
    _check_rope_type(full, "proportional")
    for rope in (full, sliding):
        if rope.raw.get("factor", 1.0) != 1.0:
            rope.refuse("factor", "scaled positions have no place in these models' GGUF")
    share = full.scalars.number("partial_rotary_factor")
    if not 0 < share <= 1:
        full.refuse("partial_rotary_factor", f"{share} is not a share of the dimensions")
    keys: Keys = {
        "rope.freq_base": full.scalars.number("rope_theta"),
        "rope.freq_base_swa": sliding.scalars.number("rope_theta"),
    }
    return keys, share


def _experts(c: _Config) -> Keys:
    if not c.scalars.boolean("enable_moe_block"):
        return {}
    return {
        "expert_count": c.count("num_experts"),
        "expert_used_count": c.count("top_k_experts"),
        "expert_feed_forward_length": c.count("moe_intermediate_size"),
    }


def _assistant(c: _Config, top: _Config) -> Keys:
    """A drafter owns no K/V: all its layers read those of the model it drafts for."""
    n_layer = c.n_layer()
    return {
        "attention.shared_kv_layers": n_layer,
        "embedding_length_out": top.count("backbone_hidden_size"),
        "nextn_predict_layers": n_layer,
    }
