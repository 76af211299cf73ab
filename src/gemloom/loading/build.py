"""Builds a model from an open file: the one way, for the Python API and the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from gemloom.adapters.registry import Adapters
from gemloom.compute.cells import Cells
from gemloom.compute.fitting import place
from gemloom.compute.kv import KV
from gemloom.compute.kv_store import KVStore
from gemloom.compute.placement import Placement
from gemloom.compute.program import Program
from gemloom.engine.engine import Engine
from gemloom.files.gguf import GGUF
from gemloom.ggml.memory import trim_memory
from gemloom.ggml.rpc import speaking
from gemloom.kernels.library import fastest
from gemloom.kernels.packing import Progress
from gemloom.loading.fingerprint import fingerprint
from gemloom.loading.parts import Parts
from gemloom.model import Model
from gemloom.models.network import Network
from gemloom.models.registry import Architecture
from gemloom.options import Options
from gemloom.text.no_vocabulary import read_tokenizer
from gemloom.weights.weights import Weights


def build_model(
    file: GGUF,
    options: Options,
    *,
    progress: Progress | None = None,
    planned: Callable[[Placement], None] | None = None,
    architecture: Architecture | None = None,
) -> Model:
    """Load what ``file`` holds and start its engine. Raises what ``load`` raises.

    ``progress`` gets the bytes of weights packed so far, and their total. ``planned`` gets the
    placement before any weight is loaded. ``architecture`` is as in ``load``.
    """
    network = Network.of(file, architecture)
    config, layout = network.config, network.layout
    options.context_for(config)  # refused before any device is opened
    with speaking(options.devices), ThreadPoolExecutor(1) as aside, ExitStack() as stack:
        tokenizer = aside.submit(read_tokenizer, file.metadata, config.n_vocab)
        own = fastest() if options.kernels == "auto" else None
        device, placement = place(file, network, options, own)
        stack.callback(device.close)
        if planned:
            planned(placement)
        weights = Weights(device, file, layout, options, placement, progress)
        stack.callback(weights.close)
        store = KVStore(device, config, options.slots, options.chunk, placement)
        stack.callback(store.close)
        program = Program(device, network, weights, KV(store))
        stack.callback(program.close)
        program.reserve()
        parts = Parts(
            name=file.name,
            options=options,
            config=config,
            tokenizer=tokenizer.result(),
            fingerprint=fingerprint(file, config, weights.first_bytes),
            device=device,
            placement=placement,
            weights=weights,
            store=store,
            program=program,
        )
        program.check()
        model = _start(parts, layout.required, stack.pop_all())
    trim_memory()  # making the tokenizer took much memory that nothing needs any more
    return model


def _start(parts: Parts, shapes: Mapping[str, tuple[int, ...]], free: ExitStack) -> Model:
    """Start the engine. It closes ``free`` when it ends; a failed start closes it too."""
    with ExitStack() as stack:
        stack.enter_context(free)
        options, program = parts.options, parts.program
        cells = Cells(parts.store, options.snapshots << 20)
        engine = Engine(program, cells, options, parts.placement.choice.context, free.close)
        stack.callback(engine.close)
        adapters = Adapters(
            parts.device, parts.placement, parts.config, shapes, engine, program.discard
        )
        free.callback(adapters.close)
        model = Model(parts, engine, adapters)
        stack.pop_all()
    return model
