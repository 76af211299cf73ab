"""A Lora as a PEFT folder that ``PeftModel.from_pretrained`` loads.

The modules are named as transformers' classes have them; PEFT passes over names that the class
it is given does not know with no more than a warning, so the class must be the right one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemloom.adapters import fusing
from gemloom.adapters.factors import Lora, Pair
from gemloom.adapters.gguf_lora import alpha_of, common_alpha
from gemloom.adapters.peft import WEIGHTS
from gemloom.adapters.peft_config import FILE
from gemloom.adapters.peft_names import module_name
from gemloom.errors import AdapterError, OutputError

_PREFIX = "base_model.model."


def write_peft(lora: Lora, path: str | os.PathLike[str], *, multimodal: bool) -> None:
    """Write the folder ``path``, new or empty, whole or not at all.

    ``multimodal`` names the modules as ...ForConditionalGeneration has them, else as
    ...ForCausalLM. Raises AdapterError for a matrix that transformers' models do not have,
    OutputError.
    """
    from safetensors.numpy import save

    target = Path(path)
    modules = _modules(lora, multimodal)
    files = {
        FILE: json.dumps(_config(lora, modules), indent=2).encode(),
        WEIGHTS: save(_tensors(modules), metadata={"format": "pt"}),
    }
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
            whole = Path(folder, "whole")  # with the usual rights, which a temporary folder has not
            whole.mkdir()
            for name, data in files.items():
                (whole / name).write_bytes(data)
            whole.rename(target)
    except OSError as error:
        raise OutputError(
            f"{target}: {error.strerror or error}; nothing was written there"
        ) from error


def _modules(lora: Lora, multimodal: bool) -> dict[str, Pair]:
    """The pairs by module; the experts' gate and up in one, as transformers has them."""
    found: dict[str, Pair] = {}
    for tensor, pair in fusing.fuse_experts(lora.pairs).items():
        module = module_name(tensor, multimodal=multimodal)
        if module is None:
            raise AdapterError(f"{lora.name}: {tensor}: transformers has no such matrix")
        found[module] = pair
    return found


def _config(lora: Lora, modules: Mapping[str, Pair]) -> dict[str, Any]:
    """What LoraConfig needs; what is not there has its default."""
    alpha = common_alpha(lora)
    rank = Counter(pair.rank for pair in modules.values()).most_common(1)[0][0]
    experts = [name for name, pair in modules.items() if pair.a.ndim == 3]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {name: p.rank for name, p in modules.items() if p.rank != rank},
        "alpha_pattern": {
            name: _number(alpha_of(p)) for name, p in modules.items() if alpha_of(p) != alpha
        },
        "target_modules": [name for name in modules if name not in experts],
        "target_parameters": experts or None,
        "bias": "none",
        "use_rslora": False,
        "lora_dropout": 0.0,
        **({"alora_invocation_tokens": list(lora.invocation)} if lora.invocation else {}),
    }


def _number(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def _tensors(modules: Mapping[str, Pair]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for module, pair in modules.items():
        if pair.a.ndim == 3:
            sides = _expert_sides(module, pair, modules)
        elif module.rpartition(".")[2].startswith("embed_tokens"):
            sides = {f"{module}.lora_embedding_A": pair.b.T, f"{module}.lora_embedding_B": pair.a.T}
        else:
            sides = {f"{module}.lora_A.weight": pair.a, f"{module}.lora_B.weight": pair.b}
        tensors |= {f"{_PREFIX}{name}": np.ascontiguousarray(x) for name, x in sides.items()}
    return tensors


def _expert_sides(module: str, pair: Pair, modules: Mapping[str, Pair]) -> dict[str, np.ndarray]:
    """A [n_expert * r, k] and B [m, r * n_expert]; of two parameters the first lies deeper."""
    experts, _, which = module.rpartition(".")
    inner = which == "gate_up_proj" and f"{experts}.down_proj" in modules
    place = f"{experts}.base_layer" if inner else experts
    a = pair.a.reshape(-1, pair.a.shape[-1])
    b = pair.b.transpose(1, 2, 0).reshape(pair.b.shape[1], -1)
    return {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
