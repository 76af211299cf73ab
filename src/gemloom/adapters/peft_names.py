"""Names of matrices: those of transformers' modules, which PEFT uses, and those of GGUF.

Not a reader of files. The names themselves are with the architectures (``models/*_facts.py``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gemloom.models.facts import module_names
from gemloom.models.tensor_names import inner, unwrapped

_EXPERT = {  # below experts.M
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "gate_up_proj": "ffn_gate_up_exps",
    "down_proj": "ffn_down_exps",
}
_NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")


@dataclass(frozen=True, slots=True)
class Half:
    """What a key of adapter_model.safetensors says: A or B of which module."""

    module: str  # as in the file, without wrappers, lora_A and what follows
    side: str  # "A" or "B"
    by_row: bool  # an embedding, whose A is [r, rows] and B [columns, r]
    depth: int  # of several adapted parameters of one module, how far inside


def parse(key: str) -> Half | None:
    """The half of a pair that ``key`` names; None where it names something else."""
    parts = unwrapped(key).split(".")
    found = _side(parts)
    if found is None:
        return None
    side, by_row, count = found
    rest = parts[:-count]
    depth = 0
    while len(rest) > 1 and rest[-1] == "base_layer":
        rest.pop()
        depth += 1
    return Half(".".join(rest), side, by_row, depth)


def _side(parts: Sequence[str]) -> tuple[str, bool, int] | None:
    """A or B, whether of a table, and how many parts say so: an adapter's name may follow."""
    weight = parts[-1] == "weight"
    for count in (2, 3) if weight else (1, 2):
        named = parts[-count] if len(parts) > count else ""
        known = ("lora_A", "lora_B") if weight else ("lora_embedding_A", "lora_embedding_B")
        if named in known:
            return named[-1], not weight, count
    return None


def plain(module: str) -> str:
    """The name by which PEFT matches patterns: without what PEFT itself puts before it."""
    return module.removeprefix("base_model.model.")


def gguf_name(module: str) -> str | None:
    """The GGUF tensor of a module, whatever the classes around it; None if unknown."""
    layer, name = _place(module)
    short = module_names().matrix(name, in_layer=layer is not None)
    if short is None or layer is None:
        return short and f"{short}.weight"
    return f"blk.{layer}.{short}.weight"


def expert(module: str) -> tuple[str, int] | None:
    """Of a module of one expert, "layers.0.experts.7.up_proj": the GGUF tensor that has all, 7."""
    layer, name = _place(module)
    owner, _, rest = name.removeprefix("mlp.").partition(".")
    number, _, which = rest.partition(".")
    if layer is None or owner != "experts" or which not in _EXPERT or not _NUMBER.fullmatch(number):
        return None
    return f"blk.{layer}.{_EXPERT[which]}.weight", int(number)


def _place(module: str) -> tuple[str | None, str]:
    """The number of its layer, None outside the layers, and its name there."""
    name = inner(module)
    first, _, rest = name.partition(".")
    number, _, below = rest.partition(".")
    if first == "layers" and below and _NUMBER.fullmatch(number):
        return number, below
    return None, name


def module_name(tensor: str, *, multimodal: bool) -> str | None:
    """The module of a GGUF tensor in transformers' causal or multimodal class, if it is one."""
    prefix = "model.language_model." if multimodal else "model."
    name = tensor.removesuffix(".weight")
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", name)
    module = module_names().module(match[2] if match else name, in_layer=match is not None)
    if match:
        return module and f"{prefix}layers.{match[1]}.{module}"
    return module if module in (None, "lm_head") else f"{prefix}{module}"
