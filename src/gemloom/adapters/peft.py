"""A Lora from a PEFT adapter: adapter_config.json and adapter_model.safetensors, as bytes.

Where the two come from is ``reading.py``'s business. Shapes are numpy's, slowest first: lora_A is
[r, k], lora_B [m, r]; of an embedding A is [r, rows] and B [columns, r]; of experts, which PEFT
calls target_parameters, A is [n_expert * r, k] and B [m, r * n_expert], the expert fastest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemloom.adapters import peft_names
from gemloom.adapters.gguf_lora import NORM, OTHER_MODALITY, paired
from gemloom.adapters.lora import Lora, Pair
from gemloom.adapters.peft_config import FILE, PeftConfig, parse_config
from gemloom.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
_DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
# By the order of the module's parameters PEFT wraps one after the other: the first is innermost.
_PARAMETERS = ("gate_up_proj", "down_proj")
_Place = tuple[str, int]  # a module, and how deep in it


def from_peft(name: str, config: bytes, weights: memoryview) -> Lora:
    """The adapter of a PEFT folder's two files.

    f32 and f16 keep their type, bf16 and f64 become float32. Raises AdapterError naming the field
    or tensor for anything that cannot be used, an unknown module among it.
    """
    fields = parse_config(name, config)
    halves: dict[_Place, dict[str, np.ndarray]] = {}
    by_row: set[_Place] = set()
    ignored: dict[str, str] = {}
    for key, entry in _tensors(name, weights):
        half = peft_names.parse(key)
        if half is None or peft_names.of_other_modality(key):
            ignored[key] = _reason(name, key)
            continue
        place = (half.module, half.depth)
        sides = halves.setdefault(place, {})
        if half.side in sides:
            raise AdapterError(f"{name}: {key[:200]} is there twice, for two adapters")
        sides[half.side] = _values(name, key, entry)
        if half.by_row:
            by_row.add(place)
    pairs = _Reader(name, fields, halves).pairs(by_row)
    return Lora(name, fields.architecture, pairs, fields.invocation, ignored)


def _tensors(name: str, weights: memoryview) -> list[tuple[str, dict[str, Any]]]:
    """Each tensor with its type, shape and bytes, which are copied."""
    import safetensors

    try:
        found: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(bytes(weights))
    except safetensors.SafetensorError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise AdapterError(f"{name}: {WEIGHTS} is damaged: {reason[:200]}") from None
    for key, _ in found:
        if not key.isprintable():
            raise AdapterError(f"{name}: the tensor name {key[:80]!r} is unprintable")
    return sorted(found, key=lambda item: item[0])  # the library has no order


def _reason(name: str, key: str) -> str:
    """Why a tensor is left out. AdapterError for one that cannot be."""
    if peft_names.of_other_modality(key):
        return OTHER_MODALITY
    if key.endswith(".base_layer.weight"):
        return "a copy of the base's own"
    if key.endswith("norm.weight"):
        return NORM
    raise AdapterError(
        f"{name}: {key[:200]} is no lora_A or lora_B; only matrices plus scale * B A are supported"
    )


def _values(name: str, key: str, entry: Mapping[str, Any]) -> np.ndarray:
    kind, data = entry["dtype"], entry["data"]
    if kind == "BF16":
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif kind in _DTYPES:
        values = np.frombuffer(data, _DTYPES[kind])
    else:
        raise AdapterError(f"{name}: {key[:200]} is of type {kind}, unsupported")
    if len(entry["shape"]) != 2 or 0 in entry["shape"]:
        raise AdapterError(f"{name}: {key[:200]} has the shape {entry['shape']}, is no matrix")
    if kind == "F64":
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is checked
            values = values.astype(np.float32)
    return values.reshape(entry["shape"])


@dataclass(frozen=True, slots=True)
class _Reader:
    """Puts the halves of one file together."""

    name: str
    config: PeftConfig
    halves: Mapping[_Place, Mapping[str, np.ndarray]]

    def pairs(self, by_row: Collection[_Place]) -> dict[str, Pair]:
        """All pairs by their GGUF names."""
        found: dict[str, Pair] = {}
        for place in self.halves:
            tensor, pair = self.pair(place, place in by_row)
            if tensor in found:
                raise AdapterError(f"{self.name}: {place[0][:200]} is there under two names")
            found[tensor] = pair
        return found

    def pair(self, place: _Place, by_row: bool) -> tuple[str, Pair]:
        """The GGUF name of a place, and its pair."""
        module, depth = place
        for side in "AB":
            if side not in self.halves[place]:
                raise AdapterError(f"{self.name}: {module[:200]} has no lora_{side}")
        a, b = self.halves[place]["A"], self.halves[place]["B"]
        if module.endswith(".experts"):
            module = f"{module}.{self._parameter(module, depth)}"
        elif depth:
            raise AdapterError(f"{self.name}: {module[:200]} is wrapped {depth + 1} times")
        tensor = peft_names.gguf_name(module)
        if tensor is None:
            raise AdapterError(f"{self.name}: {module[:200]} is no matrix of Gemma 3 or Gemma 4")
        if by_row:
            a, b = b.T, a.T
        rank = self.config.rank(peft_names.plain(module))
        if tensor.endswith("_exps.weight"):
            a, b = self._by_expert(module, a, b, rank)
        pair = paired(self.name, module, a, b, self.config.scale(peft_names.plain(module), rank))
        if pair.rank != rank:
            raise AdapterError(
                f"{self.name}: {module[:200]} has the rank {pair.rank}, not {rank} as {FILE} says"
            )
        return tensor, pair

    def _parameter(self, experts: str, depth: int) -> str:
        """Which parameter of the experts is adapted at this depth."""
        there = sum(module == experts for module, _ in self.halves)
        named = {name.rpartition(".")[2] for name in self.config.parameters}
        adapted = [name for name in _PARAMETERS if name in named]
        if len(adapted) != there or depth >= there:
            raise AdapterError(
                f"{self.name}: {experts[:200]}: target_parameters names {len(adapted)} of "
                f"{', '.join(_PARAMETERS)}, the file has {there}"
            )
        return adapted[::-1][depth]

    def _by_expert(
        self, module: str, a: np.ndarray, b: np.ndarray, rank: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A as [n_expert, r, k] and B as [n_expert, m, r]."""
        if a.shape[0] % rank or a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"{self.name}: {module[:200]}: A of shape {list(a.shape)} and B of "
                f"{list(b.shape)} are no experts of rank {rank}"
            )
        n = a.shape[0] // rank
        return a.reshape(n, rank, -1), b.reshape(b.shape[0], rank, n).transpose(2, 0, 1)
