"""A model file as the tools for adapters need it: its architecture and its tensors' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gemloom.errors import AdapterError
from gemloom.files.gguf import GGUF
from gemloom.models.config import Config
from gemloom.models.network import Network
from gemloom.weights import weights

ROUTER = "ffn_gate_inp.weight"  # small, and kept as it is by quantizers too


@dataclass(frozen=True, slots=True)
class Base:
    """A checked model file; no weight of it has been read."""

    file: GGUF
    config: Config
    shapes: Mapping[str, tuple[int, ...]]  # by name, ggml order

    @property
    def matrices(self) -> list[str]:
        """The tensors that an adapter can change, in the file's order."""
        return [name for name in self.file.tensors if len(self.shapes.get(name, ())) > 1]


def open_base(file: GGUF) -> Base:
    """Check a model file. AdapterError for an adapter, ConfigError and TensorError for the rest."""
    kind = file.metadata.string("general.type", "model")
    if kind == "adapter":
        raise AdapterError(f"{file.name}: an adapter, not a model")
    network = Network.of(file)
    weights.check(file, network.layout)
    return Base(file, network.config, network.layout.required)
