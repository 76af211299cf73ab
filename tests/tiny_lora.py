"""Adapters for the tiny models: made at random, and written as GGUF and PEFT files.

The files are not written by the code under test: GGUF by the gguf package, PEFT's layout by what
the peft package itself saved for these models.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from safetensors.numpy import save

import tiny
from gemloom.adapters.factors import Lora, Pair
from gemloom.files import gguf, source
from gemloom.tools.adapters.base_shapes import Base, open_base

Pairs = dict[str, Pair]
PREFIX = "base_model.model.model."
F16 = GGMLQuantizationType.F16

LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection", "ffn_gate_inp": "router.proj",
}  # fmt: skip
TOP = {
    "token_embd.weight": "embed_tokens",
    "per_layer_token_embd.weight": "embed_tokens_per_layer",
    "per_layer_model_proj.weight": "per_layer_model_projection",
}


def base(variant: str = "e2b", **forms: Any) -> Base:
    """A tiny model as the tools see it."""
    return base_of(tiny.gguf_bytes(tiny.VARIANTS[variant], **forms))


def base_of(model: Any) -> Base:
    """A model from any source."""
    return open_base(gguf.read(source.resolve(model)))


def matrices(variant: str) -> dict[str, tuple[int, ...]]:
    """The model's matrices, shapes as numpy has them."""
    weights = tiny.tensors(tiny.VARIANTS[variant])
    return {name: weight.shape for name, weight in weights.items() if weight.ndim > 1}


def pair(
    rng: np.random.Generator, shape: tuple[int, ...], rank: int, *, norm: float = 0.1,
    dtype: Any = np.float32, scale: float = 2.0,
) -> Pair:  # fmt: skip
    """A random pair for a matrix of this shape (numpy's): scale * B A has about this norm."""
    *deep, m, k = shape
    size = (norm / abs(scale)) ** 0.5 / (m * k * rank * int(np.prod(deep))) ** 0.25
    a = (size * rng.standard_normal((*deep, rank, k))).astype(dtype)
    b = (size * rng.standard_normal((*deep, m, rank))).astype(dtype)
    return Pair(a, b, scale)


def lora(
    variant: str = "e2b", rank: int = 4, *, only: str = ".", seed: int = 0, **options: Any
) -> Lora:
    """A random adapter for every matrix whose GGUF name has ``only`` (a regular expression)."""
    rng = np.random.default_rng(seed)
    names = {name: shape for name, shape in matrices(variant).items() if re.search(only, name)}
    pairs = {name: pair(rng, shape, rank, **options) for name, shape in names.items()}
    return Lora("random", tiny.VARIANTS[variant].arch, pairs)


def delta(one: Pair) -> np.ndarray:
    """scale * B A in float64, as numpy has the matrix."""
    return np.asarray(one.scale * (one.b.astype(np.float64) @ one.a.astype(np.float64)))


# -- files -------------------------------------------------------------------------------


def gguf_bytes(
    adapter: Lora,
    *,
    alpha: float | None = None,
    type_of: Callable[[str], GGMLQuantizationType] | None = None,
    keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    drop: Iterable[str] = (),
) -> bytes:
    """A GGUF LoRA as llama.cpp's converter writes it. All scales must be alpha / rank."""
    first = next(iter(adapter.pairs.values()))
    metadata: dict[str, Any] = {
        "general.architecture": adapter.architecture, "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": first.scale * first.rank if alpha is None else alpha,
    }  # fmt: skip
    if adapter.invocation:
        metadata["adapter.alora.invocation_tokens"] = list(adapter.invocation)
    tensors: dict[str, np.ndarray] = {}
    for name, one in adapter.pairs.items():
        a, b = one.a, one.b
        if name.endswith("token_embd.weight"):
            a, b = b, a.T
        tensors |= {f"{name}.lora_a": np.ascontiguousarray(a), f"{name}.lora_b": b}
    for name in drop:
        del tensors[name]
    tensors |= extra or {}
    kinds = {n: F16 if x.dtype == np.float16 else tiny.F32 for n, x in tensors.items()}
    wide = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    return tiny.write(metadata | dict(keys or {}), wide, type_of or kinds.__getitem__)


def module(tensor: str) -> str:
    """The module of a GGUF tensor, below the model: "layers.0.self_attn.q_proj"."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor):
        return f"layers.{match[1]}.{LAYER[match[2]]}"
    return TOP[tensor]


def peft_files(
    adapter: Lora,
    prefix: str = PREFIX,
    extra: Mapping[str, np.ndarray] | None = None,
    **fields: Any,
) -> tuple[bytes, bytes]:
    """adapter_config.json and adapter_model.safetensors; ``fields`` replace those of the first."""
    first = next(iter(adapter.pairs.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA", "r": first.rank, "lora_alpha": first.scale * first.rank,
        "bias": "none", "target_modules": ["q_proj"],
    }  # fmt: skip
    tensors: dict[str, np.ndarray] = {}
    for name, one in adapter.pairs.items():
        if name == "output.weight":
            tensors |= _sides("base_model.model.lm_head", one)
        elif name.endswith("_exps.weight"):
            config["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
            tensors |= _expert_sides(prefix, name, one)
        elif name.endswith("token_embd.weight"):
            at = f"{prefix}{module(name)}.lora_embedding_"
            tensors |= {f"{at}A": one.b.T, f"{at}B": one.a.T}
        else:
            tensors |= _sides(prefix + module(name), one)
    contiguous = {
        name: np.ascontiguousarray(x) for name, x in (tensors | dict(extra or {})).items()
    }
    return json.dumps(config | fields).encode(), save(contiguous)


def _sides(name: str, one: Pair) -> dict[str, np.ndarray]:
    return {f"{name}.lora_A.weight": one.a, f"{name}.lora_B.weight": one.b}


def _expert_sides(prefix: str, name: str, one: Pair) -> dict[str, np.ndarray]:
    """Of the two parameters of one module PEFT wraps gate_up_proj first, so it lies deeper."""
    layer = name.split(".")[1]
    deep = ".base_layer" if "gate_up" in name else ""
    n, r, k = one.a.shape
    a, b = one.a.reshape(n * r, k), np.einsum("nmr->mrn", one.b).reshape(-1, r * n)
    at = f"{prefix}layers.{layer}.experts{deep}"
    return {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}


def peft_folder(folder: Path, files: tuple[bytes, bytes]) -> Path:
    """A PEFT folder."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(files[0])
    (folder / "adapter_model.safetensors").write_bytes(files[1])
    return folder


def archive(files: tuple[bytes, bytes], kind: str, inside: str = "") -> bytes:
    """An archive of a PEFT folder: "zip", "tar" or "tar.gz"; ``inside`` is a folder in it."""
    named = dict(zip(("adapter_config.json", "adapter_model.safetensors"), files, strict=True))
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in named.items():
                packed.writestr(inside + name, data)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w:gz" if kind == "tar.gz" else "w") as tar:
        for name, data in named.items():
            info = tarfile.TarInfo(inside + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def assert_same(found: Lora, wanted: Lora, tolerance: float = 1e-6) -> None:
    """The same matrices, changed in the same way; B A and its factors alike up to rounding."""
    assert set(found.pairs) == set(wanted.pairs)
    for name, one in wanted.pairs.items():
        assert found.pairs[name].rank == one.rank, name
        difference = np.linalg.norm(delta(found.pairs[name]) - delta(one))
        assert difference <= tolerance * np.linalg.norm(delta(one)), name
