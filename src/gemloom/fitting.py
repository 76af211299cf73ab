"""How large a model would be on this machine's devices, and where it goes: numbers for a plan.

The plan itself is in ``placement.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from gemloom.cache import KV_TYPES, layer_cell_bytes, slot_cells
from gemloom.config import Config, from_gguf
from gemloom.errors import OptionError
from gemloom.ggml.backends import Found
from gemloom.ggml.device import Device
from gemloom.ggml.memory import free_memory
from gemloom.ggml.probing import Probe
from gemloom.ggml.rpc import speaking
from gemloom.gguf import GGUF
from gemloom.kernels.library import Library
from gemloom.models import ARCHITECTURES
from gemloom.options import Options
from gemloom.placement import SHARED, TABLES, Choice, Placement, Sizes, Space, Wanted, plan
from gemloom.weights import Layout, check, tensor_bytes

SMALLEST = 1024  # positions, to which a context nobody asked for may be cut
_FLOAT, _HALF = 4, 2  # bytes


def place(
    file: GGUF, config: Config, layout: Layout, options: Options, max_nodes: int,
    own: Library | None,
) -> tuple[Device, Placement]:  # fmt: skip
    """Open the devices that are asked for, and plan what goes where; the CPU alone where none does.

    ``own`` are our kernels. TensorError for a file that does not fit ``layout``; DeviceError for
    a device that is not there or has not enough memory.
    """
    check(file, layout)
    names = ("cpu",) if options.gpu_layers == 0 else options.devices
    while True:
        device = Device(names, options.threads, max_nodes, own)
        try:
            placement = fit(file, config, layout, options, device)
        except BaseException:
            device.close()
            raise
        if device.on_host or not placement.on_host:
            return device, placement
        device.close()  # nothing fits on it, and a scheduler for it alone would cost time
        names = ("cpu",)


def propose(file: GGUF, options: Options) -> Placement:
    """Where a model would go, from its header; raises what ``place`` does."""
    config = from_gguf(file)
    layout = ARCHITECTURES[config.architecture].layout(config, file.tensors)
    with speaking(options.devices):
        device, placement = place(file, config, layout, options, 64, None)
        device.close()
    return placement


def fit(file: GGUF, config: Config, layout: Layout, options: Options, device: Device) -> Placement:
    """Where everything goes on ``device``, with what context and K/V cells.

    What the options leave open is fitted to what is free. DeviceError where it cannot be.
    """
    spaces = [*map(_space, device.found), Space("cpu", free_memory())]
    split = options.tensor_split
    if split is not None and device.host and len(split) != device.host:
        raise OptionError(f"tensor_split has {len(split)} shares for {device.host} devices")
    shares = None if split is None else tuple(float(share) for share in split)
    insists = "auto" not in options.devices and options.gpu_layers is None
    wanted = Wanted(options.gpu_layers, shares, insists)
    probe, tied = Probe(device), layout.head == "token_embd.weight"
    kept = frozenset(_kept(file, layout, probe)) if device.host else frozenset()
    sizes = partial(measure, config, tensor_bytes(file, layout), options, kept)
    if device.host:
        sizes = partial(_with_cells, sizes, config, options, probe)
    return plan(sizes, choices(config, options), spaces, wanted, tied, kept)


def _kept(file: GGUF, layout: Layout, probe: Probe) -> Iterator[str]:
    """The matrices that some device cannot multiply with."""
    for name, shape in layout.required.items():
        matrix = len(shape) > 1 and (name not in TABLES or name == layout.head)
        if matrix and name in file.tensors and not probe.multiplies(file.tensors[name].type, shape):
            yield name


def _with_cells(
    sizes: Callable[[Choice], Sizes], config: Config, options: Options, probe: Probe, choice: Choice
) -> Sizes:
    """Sizes that tell which layers' K/V cells the devices can compute with."""
    cells, kind = slot_cells(config, choice.context, options.chunk), KV_TYPES[choice.kv_type]
    moves = tuple(
        probe.attends(
            kind, (spec.head_dim, spec.n_head, spec.n_kv), cells.of(spec.sliding) * options.slots
        )
        for spec in config.layers
    )
    return replace(sizes(choice), moves=moves)


def _space(found: Found) -> Space:
    info = found.info
    return Space(found.name, info.free if info.total else None, info.total)


def choices(config: Config, options: Options) -> list[Choice]:
    """Contexts and types of K/V cells to try, the one that is wanted most first."""
    contexts = [options.context_for(config)]
    least = max(SMALLEST, config.window + (options.keep or 0) + 1)
    while options.context is None and contexts[-1] // 2 >= least:
        contexts.append(contexts[-1] // 2)
    types: Sequence[str] = (options.kv_type,) if options.kv_type else ("f16", "q8_0")
    return [Choice(context, kind) for kind in types for context in contexts]


def measure(
    config: Config, tensors: dict[str, int], options: Options, kept: frozenset[str], choice: Choice
) -> Sizes:
    """Bytes of a model: ``tensors`` are those of its tensors by name, ``kept`` on the host."""
    layers = [0] * config.n_layer
    head = shared = tables = 0
    for name, size in tensors.items():
        if name in TABLES or name in kept:
            tables += size
        elif name.startswith("blk."):
            layers[int(name.split(".")[1])] += size
        elif name in SHARED:
            shared += size
        else:
            head += size
    tied = "output.weight" not in tensors and "token_embd.weight" not in kept
    duplicate = tensors["token_embd.weight"] if tied else 0
    cells = slot_cells(config, choice.context, options.chunk)
    each = (
        options.slots * cells.of(spec.sliding) * layer_cell_bytes(spec, choice.kv_type)
        for spec in config.layers
    )
    compute = compute_bytes(config, options, choice.context)
    return Sizes(
        tuple(layers), tuple(each), head + duplicate, shared, tables, compute, duplicate,
        not options.mmap,
    )  # fmt: skip


def compute_bytes(config: Config, options: Options, context: int) -> int:
    """About what intermediate results of the largest step take on a device; not less."""
    cells = slot_cells(config, context, options.chunk)
    rows = min(options.chunk, cells.full)
    heads = max(spec.n_head * spec.head_dim for spec in config.layers)
    widest = max(_feed_forward(config, i) for i in range(config.n_layer))
    per_layer = config.n_per_layer * config.n_layer
    row = _FLOAT * (6 * config.n_embd + 3 * heads + widest + 4 * per_layer)
    masks = 2 * _HALF * (cells.full + cells.sliding)
    logits = _FLOAT * config.n_vocab * max(options.slots, 1)
    return rows * (row + masks) + logits


def _feed_forward(config: Config, index: int) -> int:
    spec = config.layers[index]
    experts = 3 * spec.experts.used * spec.experts.n_ff if spec.experts else 0
    chosen = 2 * spec.experts.used * config.n_embd if spec.experts else 0
    return 3 * spec.n_ff + experts + chosen
