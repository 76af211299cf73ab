"""How much work a model's file asks for: what a measured speed is held against a ceiling with.

Counted is what no exact implementation can leave out. A prompt: the matrices of the layers that
own K/V for every row, all others for the last row alone, and attention over what each row may
see. A decoded token: each matrix once from memory (of experts those used), and the cells it sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from gemloom.files import gguf, source
from gemloom.models.config import Config, LayerSpec
from gemloom.models.facts import from_gguf
from gemloom.models.tensor_names import PER_LAYER_TABLE

F16_BYTES = 2  # of one value in the K/V cells


@dataclass(frozen=True, slots=True)
class Work:
    """What one model needs."""

    config: Config
    matrices: dict[str, gguf.TensorInfo]  # those that are multiplied; no lookup tables

    def prompt(self, rows: int) -> float:
        """Multiply-adds of a prompt, with the logits of its last row."""
        each = sum(self._multiplied(name) for name in self.matrices)
        owning = sum(self._multiplied(name) * self._for_all_rows(name) for name in self.matrices)
        attention = sum(
            self._attention(spec, rows)
            for spec in self.config.layers
            if spec.index < self.config.last_owner
        )
        return owning * rows + (each - owning) + attention

    def decoded(self, depth: int) -> float:
        """Bytes to read for one token after ``depth`` positions."""
        weights = sum(info.nbytes * self._share(name) for name, info in self.matrices.items())
        cells = sum(
            2 * F16_BYTES * spec.n_kv * spec.head_dim * self._seen(spec, depth)
            for spec in self.config.layers
        )
        return weights + cells

    def stepped(self, depth: int, requests: int) -> float:
        """Bytes to read for a token of each of so many requests, if no two use the same expert."""
        once = sum(
            info.nbytes * min(1.0, self._share(name) * (requests if "_exps" in name else 1))
            for name, info in self.matrices.items()
        )
        return once + requests * (self.decoded(depth) - self.decoded(0))

    def _multiplied(self, name: str) -> float:
        return prod(self.matrices[name].shape) * self._share(name)

    def _share(self, name: str) -> float:
        """How much of a matrix one row uses."""
        experts = self.config.layers[0].experts
        return experts.used / experts.count if experts and "_exps" in name else 1.0

    def _for_all_rows(self, name: str) -> float:
        """How much of a matrix every row of a prompt needs."""
        last = self.config.last_owner
        if name == "per_layer_model_proj.weight":
            return last / self.config.n_layer
        if not name.startswith("blk."):
            return 0.0  # the head
        layer = int(name.split(".")[1])
        return float(layer < last or (layer == last and ("attn_k" in name or "attn_v" in name)))

    def _seen(self, spec: LayerSpec, positions: int) -> int:
        return min(positions, self.config.window) if spec.sliding else positions

    def _attention(self, spec: LayerSpec, rows: int) -> float:
        """Multiply-adds of all rows with the keys and values they may see."""
        seen = self._seen(spec, rows)
        pairs = seen * (seen + 1) / 2 + (rows - seen) * seen
        return 2 * spec.n_head * spec.head_dim * pairs


def of(path: Path) -> Work:
    """Read a file's head. Raises as ``gemloom.load`` does."""
    file = gguf.read(source.resolve(path))
    lookup = {PER_LAYER_TABLE}
    if "output.weight" in file.tensors:
        lookup.add("token_embd.weight")  # else it is the head as well
    matrices = {
        name: info
        for name, info in file.tensors.items()
        if len(info.shape) > 1 and name not in lookup
    }
    return Work(from_gguf(file), matrices)
