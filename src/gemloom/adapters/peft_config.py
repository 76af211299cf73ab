"""What adapter_config.json says: rank and scale of each module, and what is refused.

The rules are PEFT's own (LoraConfig, get_pattern_key). Fields that do not change what an adapter
computes are not looked at: with fan_in_fan_out, say, A and B are the same.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gemloom.adapters.gguf_lora import checked_invocation
from gemloom.adapters.patterns import PatternError, Patterns
from gemloom.errors import AdapterError

FILE = "adapter_config.json"
# Field: what makes it more than W + scale * B A. Fields that add tensors of their own are not here:
# those tensors tell, as a list of modules says nothing where the file has none of them.
_REFUSED = {
    "use_dora": "DoRA rescales the matrices",
    "layer_replication": "layers are repeated",
    "use_qalora": "inputs are pooled",
    "use_bdlora": "its matrices are block-diagonal",
    "arrow_config": "a router chooses between adapters",
    "kasa_config": "it changes the base",
    "monteclora_config": "it adds noise",
}
# Others change the base matrices before training, which an adapter file does not tell.
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """The fields that decide what an adapter computes."""

    name: str  # of the adapter, for messages
    r: int
    alpha: float
    ranks: Patterns  # of modules that have another
    alphas: Patterns
    rslora: bool
    invocation: tuple[int, ...]
    parameters: tuple[str, ...]  # target_parameters: "experts.down_proj"
    saved: tuple[str, ...]  # modules_to_save: what is replaced whole, where the file has it
    architecture: str | None

    def rank(self, module: str) -> int:
        """The rank of a module, named without "base_model.model."."""
        return int(self._value("rank_pattern", self.ranks, module, self.r))

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha = self._value("alpha_pattern", self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _value(self, field: str, patterns: Patterns, module: str, default: float) -> float:
        try:
            return patterns.of(module, default)
        except PatternError:
            raise AdapterError(
                f"{self.name}: {FILE}: {field} has regular expressions that cost too much for so "
                "many modules; write module names"
            ) from None


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
        saved=fields.names("modules_to_save"),
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

    def patterns(self, field: str, checked: Callable[[str, Any], float]) -> Patterns:
        """Numbers by pattern, as PEFT's get_pattern_key chooses among them."""
        value = self.values.get(field) or {}
        if not isinstance(value, dict):
            self.refuse(field, f"must be an object, is {_shown(value)}")
        numbers = {key: checked(f"{field}[{_shown(key)}]", value[key]) for key in value}
        try:
            return Patterns(numbers)
        except PatternError as error:
            raise AdapterError(
                f"{self.name}: {FILE}: {field} has {_shown(str(error))}, a regular expression that "
                "is not supported, or too many; write module names"
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
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
