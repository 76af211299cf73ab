"""What each device here lacks for a model, told from its header: no weights are read."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass

from gemloom.compute.kv import KV
from gemloom.compute.kv_store import KVStore
from gemloom.compute.placement import CellChoice, Placement
from gemloom.compute.program import Program
from gemloom.files.gguf import GGUF
from gemloom.ggml import backends
from gemloom.ggml.device import Device
from gemloom.models.network import Network
from gemloom.options import Options
from gemloom.weights.weights import Sketch, check


@dataclass(frozen=True, slots=True)
class Survey:
    """Of one device."""

    nodes: int  # of the largest prefill step
    lacking: dict[str, int]  # of these, those that run on the CPU instead, by operation


def survey(file: GGUF, options: Options) -> dict[str, Survey]:
    """For each device by name: what of a model it would leave to the CPU, had it all layers.

    Raises ConfigError, TensorError, OptionError, DeviceError.
    """
    return {name: _survey(file, options, name) for name in backends.listed()}


def _survey(file: GGUF, options: Options, name: str) -> Survey:
    network = Network.of(file)
    config, layout = network.config, network.layout
    check(file, layout)
    choice = CellChoice(options.context_for(config), options.kv_type or "f16")
    here = (0,) * config.n_layer
    placement = Placement(
        layers=here, head=0, host=1, choice=choice, table=(), roles=layout.roles, cells=here
    )
    with ExitStack() as stack:
        device = stack.enter_context(closing(Device(name, options.threads)))
        weights = stack.enter_context(closing(Sketch(device, file, layout, placement)))
        store = stack.enter_context(
            closing(
                KVStore(device, config, options.slots, options.chunk, placement, allocate=False)
            )
        )
        lacking, nodes = Program(device, network, weights, KV(store)).survey()
    return Survey(nodes, dict(lacking))
