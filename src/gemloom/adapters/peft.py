"""A Lora from a PEFT adapter: adapter_config.json and adapter_model.safetensors, as bytes.

Where the two come from is ``reading.py``'s business. Shapes are numpy's, slowest first: lora_A is
[r, k], lora_B [m, r]; of an embedding A is [r, rows] and B [columns, r]; of experts, which PEFT
calls target_parameters, A is [n_expert * r, k] and B [m, r * n_expert], the expert fastest. Where
every expert is a module of its own, each has a pair as every other matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from gemloom.adapters import peft_names
from gemloom.adapters.factors import Lora, Pair
from gemloom.adapters.gguf_lora import NORM, OTHER_MODALITY, check_room, paired
from gemloom.adapters.peft_config import FILE, PeftConfig, parse_config
from gemloom.adapters.safetensors_file import DamagedError, StoredTensor, tensors
from gemloom.errors import AdapterError
from gemloom.models.tensor_names import modality

WEIGHTS = "adapter_model.safetensors"
_IN_PLACE = ("F32", "F16")
_DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}
# By the order of the module's parameters PEFT wraps one after the other: the first is innermost.
_PARAMETERS = ("gate_up_proj", "down_proj")
_Place = tuple[str, int]  # a module, and how deep in it


def from_peft(name: str, config: bytes, weights: memoryview) -> Lora:
    """The adapter of a PEFT folder's two files.

    f32 and f16 stay where they lie, bf16 and f64 become float32. Raises AdapterError naming the
    field or tensor for anything that cannot be used, an unknown module among it.
    """
    fields = parse_config(name, config)
    halves: dict[_Place, dict[str, np.ndarray]] = {}
    by_row: set[_Place] = set()
    ignored: dict[str, str] = {}
    for key, tensor in _tensors(name, weights).items():
        half = peft_names.parse(key)
        if half is None or modality(key) is not None:
            ignored[key] = _reason(name, key, fields)
            continue
        place = (half.module, half.depth)
        sides = halves.setdefault(place, {})
        if half.side in sides:
            raise AdapterError(f"{name}: {key[:200]} is there twice, for two adapters")
        sides[half.side] = _values(name, key, tensor)
        if half.by_row:
            by_row.add(place)
    pairs = _PairReader(name, fields, halves).pairs(by_row)
    return Lora(name, fields.architecture, pairs, fields.invocation, ignored)


def _tensors(name: str, weights: memoryview) -> dict[str, StoredTensor]:
    """Each tensor. AdapterError where they would take much more memory than the file."""
    try:
        found = tensors(weights)
    except DamagedError as error:
        raise AdapterError(f"{name}: {WEIGHTS} is damaged: {error}") from None
    wide = sum(4 * prod(t.shape) for t in found.values() if t.dtype not in _IN_PLACE)
    check_room(name, wide, weights.nbytes)
    return found


def _reason(name: str, key: str, config: PeftConfig) -> str:
    """Why a tensor is left out. AdapterError for one that cannot be."""
    if modality(key) is not None:
        return OTHER_MODALITY
    if key.endswith(".base_layer.weight"):
        return "a copy of the base's own"
    if config.saved:
        raise AdapterError(
            f"{name}: {key[:200]} is a whole module (modules_to_save), not lora_A or lora_B; merge "
            "it into the model"
        )
    if key.endswith("norm.weight"):
        return NORM
    raise AdapterError(
        f"{name}: {key[:200]} is not a lora_A or lora_B; "
        "only matrices plus scale * B A are supported"
    )


def _values(name: str, key: str, tensor: StoredTensor) -> np.ndarray:
    if tensor.dtype not in _DTYPES:
        raise AdapterError(f"{name}: {key[:200]} is of type {tensor.dtype}, unsupported")
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        shape = list(tensor.shape)
        raise AdapterError(f"{name}: {key[:200]} has the shape {shape}, is not a matrix")
    found = np.frombuffer(tensor.data, _DTYPES[tensor.dtype]).reshape(tensor.shape)
    if tensor.dtype == "BF16":
        bits = found.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is checked
        return found.astype(np.float32) if tensor.dtype == "F64" else found


@dataclass(frozen=True, slots=True)
class _PairReader:
    """Puts the halves of one file together."""

    name: str
    config: PeftConfig
    halves: Mapping[_Place, Mapping[str, np.ndarray]]

    def pairs(self, by_row: Collection[_Place]) -> dict[str, Pair]:
        """All pairs by their GGUF names."""
        found: dict[str, Pair] = {}
        experts: dict[str, dict[int, Pair]] = {}
        for place in self.halves:
            tensor, number, pair = self.pair(place, place in by_row)
            there = found if number is None else experts.setdefault(tensor, {})
            key: Any = tensor if number is None else number
            if key in there or (number is not None and tensor in found):
                raise AdapterError(f"{self.name}: {place[0][:200]} is there under two names")
            there[key] = pair
        for tensor, by_number in experts.items():
            if tensor in found:
                raise AdapterError(f"{self.name}: {tensor} is there whole and by expert")
            found[tensor] = self._all_experts(tensor, by_number)
        return found

    def pair(self, place: _Place, by_row: bool) -> tuple[str, int | None, Pair]:
        """The GGUF name of a place, the expert if it is of a single one, and its pair."""
        module, depth = place
        for side in "AB":
            if side not in self.halves[place]:
                raise AdapterError(f"{self.name}: {module[:200]} has no lora_{side}")
        a, b = self.halves[place]["A"], self.halves[place]["B"]
        if module.endswith(".experts"):
            module = f"{module}.{self._parameter(module, depth)}"
        elif depth:
            raise AdapterError(f"{self.name}: {module[:200]} is wrapped {depth + 1} times")
        tensor, number = peft_names.expert(module) or (peft_names.gguf_name(module), None)
        if tensor is None:
            raise AdapterError(f"{self.name}: {module[:200]} is not a matrix of Gemma 3 or Gemma 4")
        if by_row:
            a, b = b.T, a.T
        rank = self.config.rank(peft_names.plain(module))
        if number is None and tensor.endswith("_exps.weight"):
            a, b = self._by_expert(module, a, b, rank)
        pair = paired(self.name, module, a, b, self.config.scale(peft_names.plain(module), rank))
        if pair.rank != rank:
            raise AdapterError(
                f"{self.name}: {module[:200]} has the rank {pair.rank}, not {rank} as {FILE} says"
            )
        return tensor, number, pair

    def _all_experts(self, tensor: str, pairs: Mapping[int, Pair]) -> Pair:
        """One pair of what the file has for each expert."""
        missing = next((i for i in range(len(pairs)) if i not in pairs), None)
        if missing is not None:
            raise AdapterError(f"{self.name}: {tensor}: expert {missing} has no pair, others have")
        ordered = [pairs[i] for i in range(len(pairs))]
        if len({(pair.a.shape, pair.b.shape) for pair in ordered}) > 1:
            raise AdapterError(f"{self.name}: {tensor}: its experts differ in rank or shape")
        scales = {pair.scale for pair in ordered}
        a = np.stack([pair.a for pair in ordered])
        if len(scales) == 1:
            return Pair(a, np.stack([pair.b for pair in ordered]), scales.pop())
        scaled = [pair.b.astype(np.float32) * np.float32(pair.scale) for pair in ordered]
        return Pair(a, np.stack(scaled), 1.0)

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
                f"{list(b.shape)} are not experts of rank {rank}"
            )
        n = a.shape[0] // rank
        return a.reshape(n, rank, -1), b.reshape(b.shape[0], rank, n).transpose(2, 0, 1)
