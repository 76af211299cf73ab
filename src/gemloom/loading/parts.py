"""What a loaded model is made of, before its engine starts."""

from __future__ import annotations

from dataclasses import dataclass

from gemloom.compute.kv_store import KVStore
from gemloom.compute.placement import Placement
from gemloom.compute.program import Program
from gemloom.ggml.device import Device
from gemloom.models.config import Config, Kind
from gemloom.options import Options
from gemloom.text.tokenizer import Tokenizer
from gemloom.weights.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of one model. The engine frees them when it closes."""

    name: str  # of the file
    options: Options
    config: Config
    tokenizer: Tokenizer
    fingerprint: str
    device: Device
    placement: Placement
    weights: Weights
    store: KVStore
    program: Program

    def memory(self, adapters: int) -> dict[str, int]:
        """Bytes by kind, as ``Model.memory``; ``adapters`` are those of the adapters."""
        weights, store = self.weights, self.store
        return {
            "weights": weights.bytes,
            "per_layer_table": weights.per_layer_bytes,
            "kv_full": store.nbytes(Kind.FULL),
            "kv_sliding": store.nbytes(Kind.SLIDING),
            "adapters": adapters,
            "compute": self.device.compute_bytes,
            "mapped": weights.bytes_mapped,
            "copied": weights.bytes_copied,
            "on_devices": weights.bytes_on_devices,
            "repacked": weights.bytes_repacked,
            "packed": weights.bytes_packed,
        }
