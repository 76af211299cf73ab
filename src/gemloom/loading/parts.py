"""What a loaded model is made of, before its engine starts."""

from __future__ import annotations

from dataclasses import dataclass

from gemloom.compute.kv_store import KVStore
from gemloom.compute.placement import Placement
from gemloom.compute.program import Program
from gemloom.ggml.device import Device
from gemloom.models.config import Config
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
