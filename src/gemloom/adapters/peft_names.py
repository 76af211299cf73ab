"""Names of matrices: those of transformers' modules, which PEFT uses, and those of GGUF.

Not a reader of files. The modules are those of transformers' modeling_gemma3.py and
modeling_gemma4.py; the GGUF names those of llama.cpp's converter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gemloom.models.tensor_names import inner, unwrapped

_LAYER = {  # below layers.N
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "router.proj": "ffn_gate_inp",
    "experts.gate_up_proj": "ffn_gate_up_exps",
    "experts.down_proj": "ffn_down_exps",
}
_TOP = {
    "embed_tokens": "token_embd",
    "embed_tokens_per_layer": "per_layer_token_embd",
    "per_layer_model_projection": "per_layer_model_proj",
    "lm_head": "output",
}
_GGUF_LAYER = {gguf: module for module, gguf in _LAYER.items()}
_GGUF_TOP = {gguf: module for module, gguf in _TOP.items()}
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
    if layer is None:
        top = _TOP.get(name)
        return top and f"{top}.weight"
    short = _LAYER.get(name)
    return short and f"blk.{layer}.{short}.weight"


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
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", name):
        module = _GGUF_LAYER.get(match[2])
        return module and f"{prefix}layers.{match[1]}.{module}"
    top = _GGUF_TOP.get(name)
    return top if top in (None, "lm_head") else f"{prefix}{top}"
