"""What adapter_config.json says: rank and scale of each module, and what is refused.

The rules are PEFT's own (LoraConfig, get_pattern_key). Fields that do not change what an adapter
computes are not looked at: with fan_in_fan_out, say, A and B are the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gemloom.adapters.gguf_lora import checked_invocation
from gemloom.errors import AdapterError

FILE = "adapter_config.json"
_REFUSED = {  # field: what makes it more than W + scale * B A
    "use_dora": "DoRA rescales the matrices",
    "lora_bias": "there are biases beside B",
    "modules_to_save": "whole modules are replaced; merge them into the model",
    "trainable_token_indices": "single embeddings are replaced",
    "layer_replication": "layers are repeated",
    "use_qalora": "inputs are pooled",
    "use_bdlora": "its matrices are block-diagonal",
    "arrow_config": "a router chooses between adapters",
    "kasa_config": "it changes the base",
    "monteclora_config": "it adds noise",
}
# Others change the base matrices before training, which an adapter file does not tell.
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
_MAX_PATTERNS, _MAX_PATTERN = 20_000, 200
# A group that repeats, or many wildcards, can take a regular expression for ever.
_COSTLY = re.compile(r"\)[*+{]|\\[1-9]|\(\?[^:]|\[\[|--|&&|~~|\|\||(?:[*+{][^*+{]*){7}")
_Patterns = tuple[tuple[re.Pattern[str], Any], ...]


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields that decide what an adapter computes."""

    name: str  # of the adapter, for messages
    r: int
    alpha: float
    ranks: _Patterns  # of modules that have another
    alphas: _Patterns
    rslora: bool
    invocation: tuple[int, ...]
    parameters: tuple[str, ...]  # target_parameters: "experts.down_proj"
    architecture: str | None

    def rank(self, module: str) -> int:
        """The rank of a module, named without "base_model.model."."""
        return int(_first_match(self.ranks, module, self.r))

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha = float(_first_match(self.alphas, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _first_match(patterns: _Patterns, module: str, default: float) -> float:
    """The value of the first pattern that matches, as PEFT's get_pattern_key chooses it."""
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def parse_config(name: str, data: bytes) -> PeftConfig:
    """Read adapter_config.json. AdapterError naming the field for anything that cannot be used."""
    fields = _Fields(name, _json(name, data))
    _check(fields)
    invocation = fields.values.get("alora_invocation_tokens")
    return PeftConfig(
        name=name,
        r=fields.rank("r", fields.values.get("r")),
        alpha=fields.alpha("lora_alpha", fields.values.get("lora_alpha")),
        ranks=fields.patterns("rank_pattern", fields.rank),
        alphas=fields.patterns("alpha_pattern", fields.alpha),
        rslora=fields.values.get("use_rslora") is True,
        invocation=checked_invocation(name, "alora_invocation_tokens", invocation)
        if invocation
        else (),
        parameters=fields.names("target_parameters"),
        architecture=fields.architecture(),
    )


def _json(name: str, data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{name}: {FILE} is not JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{name}: {FILE} holds no object")
    return values


def _check(fields: _Fields) -> None:
    kind = fields.values.get("peft_type")
    if kind != "LORA":
        fields.refuse("peft_type", f"is {_shown(kind)}; only LORA is supported")
    for field, why in _REFUSED.items():
        if fields.values.get(field):
            fields.refuse(field, f"is {_shown(fields.values[field])}, not supported: {why}")
    bias = fields.values.get("bias", "none")
    if bias not in ("none", None):
        fields.refuse("bias", f"is {_shown(bias)}; only 'none' is supported")
    initial = fields.values.get("init_lora_weights")
    if not any(initial is known or initial == known for known in _INITIAL):
        fields.refuse(
            "init_lora_weights",
            f"is {_shown(initial)}, which changes the base; save the adapter as a plain LoRA "
            "(path_initial_model_for_weight_conversion)",
        )


@dataclass(frozen=True, slots=True)
class _Fields:
    """The values of the file, and getters that name a field which is not as it must be."""

    name: str
    values: Mapping[str, Any]

    def refuse(self, field: str, why: str) -> None:
        raise AdapterError(f"{self.name}: {FILE}: {field[:80]} {why}")

    def rank(self, field: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= 2**20:
            self.refuse(field, f"must be a rank from 1 on, is {_shown(value)}")
        return int(value)

    def alpha(self, field: str, value: Any) -> float:
        sound = isinstance(value, int | float) and not isinstance(value, bool)
        if not sound or not 0 < abs(value) < 1e9:
            self.refuse(field, f"must be a number other than 0, is {_shown(value)}")
        return float(value)

    def patterns(self, field: str, checked: Callable[[str, Any], float]) -> _Patterns:
        """Each pattern, to be matched from the name's beginning or from a dot on."""
        value = self.values.get(field) or {}
        if not isinstance(value, dict) or len(value) > _MAX_PATTERNS:
            self.refuse(field, f"must be an object, is {_shown(value)}")
        return tuple(
            (self._pattern(field, pattern), checked(f"{field}[{_shown(pattern)}]", number))
            for pattern, number in value.items()
        )

    def _pattern(self, field: str, pattern: str) -> re.Pattern[str]:
        if len(pattern) > _MAX_PATTERN or _COSTLY.search(pattern):
            self.refuse(field, f"has {_shown(pattern)}, too costly a regular expression")
        try:
            return re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError):
            raise AdapterError(
                f"{self.name}: {FILE}: {field} has {_shown(pattern)}, no regular expression"
            ) from None

    def names(self, field: str) -> tuple[str, ...]:
        value = self.values.get(field) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.refuse(field, f"must be a list of names, is {_shown(value)}")
        return tuple(value)

    def architecture(self) -> str | None:
        """Of the base, where PEFT wrote down its class: "gemma3" of transformers.models.gemma3."""
        mapping = self.values.get("auto_mapping")
        library = mapping.get("parent_library") if isinstance(mapping, dict) else None
        match = (
            re.match(r"transformers\.models\.(\w{1,40})", library)
            if isinstance(library, str)
            else None
        )
        return match[1].removesuffix("_unified") if match else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
