"""How large a model would be on this machine's devices, and where it goes: numbers for a plan.

The plan itself is in ``placement.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from gemloom.compute.kv_shape import KV_TYPES, layer_cell_bytes, slot_cells
from gemloom.compute.placement import (
    CellChoice,
    OnHost,
    Placement,
    Sizes,
    Space,
    Wishes,
    plan,
)
from gemloom.errors import OptionError
from gemloom.files.gguf import GGUF
from gemloom.ggml.backends import Found
from gemloom.ggml.capabilities import Probe
from gemloom.ggml.device import Device
from gemloom.ggml.rpc import speaking
from gemloom.kernels.library import Library, fastest
from gemloom.models.config import Config, LayerSpec
from gemloom.models.layout import Layout, Role
from gemloom.models.network import Network
from gemloom.models.tensor_names import layer_of
from gemloom.options import Options
from gemloom.system import limits
from gemloom.weights.homes import Homes, Own
from gemloom.weights.weights import check, tensor_bytes

SMALLEST = 1024  # positions, to which a default context may be cut
_FLOAT, _HALF = 4, 2  # bytes
_TOKEN = 660  # bytes of a tokenizer a token while it is built, its two merges among them
_NUMBERS = 8  # floats' worth of a row's token, position and cells, with what aligning them takes


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of a model by kind, without its cells."""

    copied: int  # weights in their own memory, including packed ones
    mapped: int  # weights that are pages of a file
    compute: int  # at most
    tokenizer: int  # while it is built


def place(
    file: GGUF, network: Network, options: Options, own: Library | None
) -> tuple[Device, Placement]:  # fmt: skip
    """Open the requested devices and plan what goes where; only the CPU if nothing fits on them.

    ``own`` are our kernels. TensorError for a file that does not fit its layout; DeviceError for
    a device that is not there, OutOfMemoryError where there is not enough memory.
    """
    check(file, network.layout)
    names = ("cpu",) if options.gpu_layers == 0 else options.devices
    while True:
        device = Device(names, options.threads, kernels=own)
        try:
            placement = fit(file, network, options, device)
        except BaseException:
            device.close()
            raise
        if device.on_host or not placement.on_host:
            return device, placement
        device.close()  # nothing fits on it, and a scheduler for it alone would cost time
        names = ("cpu",)


def propose(file: GGUF, options: Options) -> Placement:
    """Where a model would go, from its header; raises what ``place`` does."""
    network = Network.of(file)
    with speaking(options.devices):
        device, placement = place(file, network, options, None)
        device.close()
    return placement


def fit(file: GGUF, network: Network, options: Options, device: Device) -> Placement:
    """Where everything goes on ``device``, with what context and K/V cells.

    Options that are None are fitted to the free memory. OutOfMemoryError if nothing fits.
    """
    spaces = [*map(_space, device.found), _host()]
    split = options.tensor_split
    if split is not None and device.host and len(split) != device.host:
        raise OptionError(f"tensor_split has {len(split)} shares for {device.host} devices")
    shares = None if split is None else tuple(float(share) for share in split)
    insists = "auto" not in options.devices and options.gpu_layers is None
    wanted = Wishes(options.gpu_layers, shares, insists)
    config, layout, probe = network.config, network.layout, Probe(device)
    kept = frozenset(_kept(file, layout, probe)) if device.host else frozenset()
    own = Homes(device, layout, options).own(file)
    sizes = partial(measure, network, tensor_bytes(file, layout), own, options, kept)
    if device.host:
        sizes = partial(_with_cells, sizes, config, options, probe)
    return plan(sizes, choices(config, options), spaces, wanted, layout.roles, kept)


def estimate(file: GGUF, network: Network, options: Options) -> MemoryEstimate:
    """What a model takes that is on the host as a whole; nothing is held against what is free."""
    kernels = fastest() if options.kernels == "auto" else None
    device = Device("cpu", options.threads, 64, kernels)
    own = Homes(device, network.layout, options).own(file)
    device.close()
    held = on_host(network, own)
    weights = sum(held.layers) + held.head + held.tables
    config = network.config
    compute, _ = compute_bytes(config, options, options.context_for(config))
    return MemoryEstimate(weights, own.mapped, compute, held.tokenizer)


def _kept(file: GGUF, layout: Layout, probe: Probe) -> Iterator[str]:
    """The matrices that at least one device cannot multiply with."""
    for name, shape in layout.required.items():
        matrix = len(shape) > 1 and (not layout.role(name).by_row or name == layout.head)
        if matrix and name in file.tensors and not probe.multiplies(file.tensors[name].type, shape):
            yield name


def _with_cells(
    sizes: Callable[[CellChoice], Sizes],
    config: Config,
    options: Options,
    probe: Probe,
    choice: CellChoice,
) -> Sizes:
    """Sizes that also say which layers' K/V cells the devices can use."""
    cells, kind = slot_cells(config, choice.context, options.chunk), KV_TYPES[choice.kv_type]
    moves = tuple(
        probe.attends(
            kind, (spec.head_dim, spec.n_head, spec.n_kv), cells.of(spec.kind) * options.slots
        )
        for spec in config.layers
    )
    return replace(sizes(choice), moves=moves)


def _space(found: Found) -> Space:
    info = found.info
    return Space(found.name, info.free if info.total else None, info.total)


def _host() -> Space:
    found = limits.memory()
    return Space("cpu", found.free, found.limit, found.limiter) if found else Space("cpu", None)


def choices(config: Config, options: Options) -> list[CellChoice]:
    """Contexts and types of K/V cells to try, the one that is wanted most first."""
    contexts = [options.context_for(config)]
    least = max(SMALLEST, config.window + (options.keep or 0) + 1)
    while options.context is None and contexts[-1] // 2 >= least:
        contexts.append(contexts[-1] // 2)
    types: Sequence[str] = (options.kv_type,) if options.kv_type else ("f16", "q8_0")
    return [CellChoice(context, kind) for kind in types for context in contexts]


def measure(
    network: Network, tensors: dict[str, int], own: Own, options: Options, kept: frozenset[str],
    choice: CellChoice,
) -> Sizes:  # fmt: skip
    """Bytes of a model: ``tensors`` are those of its tensors by name, ``kept`` on the host."""
    config, layout = network.config, network.layout
    layers, head, shared, tables = _sums(network, tensors, kept)
    duplicate = tensors[layout.head] if layout.tied and layout.head not in kept else 0
    cells = slot_cells(config, choice.context, options.chunk)
    each = (
        options.slots * cells.of(spec.kind) * layer_cell_bytes(spec, choice.kv_type)
        for spec in config.layers
    )
    compute, inputs = compute_bytes(config, options, choice.context)
    inputs = compute if kept else inputs
    return Sizes(
        layers=layers,
        cells=tuple(each),
        head=head + duplicate,
        shared=shared,
        tables=tables,
        compute=compute,
        inputs=inputs,
        duplicate=duplicate,
        on_host=on_host(network, own, kept),
        owners=tuple(spec.kv_owner for spec in config.layers),
    )


def on_host(network: Network, own: Own, kept: frozenset[str] = frozenset()) -> OnHost:
    """The host's own memory that a model takes, by what may go to devices."""
    packed, copied = (_sums(network, sizes, kept) for sizes in (own.packed, own.copied))
    # A tied head is packed from the table, and goes where the head goes.
    layout = network.layout
    moves = layout.tied and layout.head not in kept
    tied = own.packed.get(layout.head, 0) if moves else 0
    layers = tuple(a + b for a, b in zip(packed[0], copied[0], strict=True))
    tables = packed[3] + copied[3] + packed[2] + copied[2] - tied
    return OnHost(layers, packed[1] + copied[1] + tied, tables, network.config.n_vocab * _TOKEN)


def _sums(
    network: Network, sizes: Mapping[str, int], kept: frozenset[str]
) -> tuple[tuple[int, ...], int, int, int]:
    """Bytes of the tensors of each layer, of the head, of what devices share, and of tables."""
    layers = [0] * network.config.n_layer
    head = shared = tables = 0
    for name, size in sizes.items():
        role = network.layout.role(name)
        if role.by_row or name in kept:
            tables += size
        elif (layer := layer_of(name)) is not None:
            layers[layer] += size
        elif role is Role.SHARED:
            shared += size
        else:
            head += size
    return tuple(layers), head, shared, tables


def compute_bytes(config: Config, options: Options, context: int) -> tuple[int, int]:
    """Upper bounds of the bytes that the largest step needs for intermediate results.

    The first is for a device with layers, the second for a host without any. Adapters and logits
    of many rows need more.
    """
    cells, last = slot_cells(config, context, options.chunk), config.last_owner
    rows, few = min(options.chunk, cells.full), options.slots
    through = config.layers[: last + 1]  # these all rows go through, and all layers a few
    kinds = {spec.kind for spec in through[:-1]}  # the last one attends for those few
    masks = _HALF * (rows * sum(map(cells.of, kinds)) + few * (cells.full + cells.sliding))
    read = config.n_embd + config.n_per_layer * last  # of tables
    inputs = masks + _FLOAT * (rows * (read + _NUMBERS) + few * config.n_per_layer * config.n_layer)
    # The embeddings are kept for later layers; what per-layer inputs were made of leaves a gap.
    kept = 2 * read if config.n_per_layer else read
    layers = rows * (kept + _NUMBERS + _widest(config, through))
    layers += few * (_widest(config, config.layers) + config.n_vocab)
    # Some is lost between tensors, on a device the more where masks have a buffer of their own.
    return masks + _FLOAT * layers * 4 // 3, inputs * 9 // 8


def _widest(config: Config, specs: Sequence[LayerSpec]) -> int:
    """The most numbers that a row needs at once in one of these layers, besides kept ones."""
    inputs = 2 * config.n_per_layer * len(specs)  # before they are mixed
    return max([inputs, *(max(_attention(config, s), _feed_forward(config, s)) for s in specs)])


def _attention(config: Config, spec: LayerSpec) -> int:
    q, kv = spec.n_head * spec.head_dim, spec.n_kv * spec.head_dim
    return config.n_embd + max(config.n_embd + q + 2 * kv, 2 * q, q + config.n_embd)


def _feed_forward(config: Config, spec: LayerSpec) -> int:
    dense = config.n_embd + max(3 * spec.n_ff, config.n_embd + 2 * spec.n_ff)
    if not spec.experts:
        return dense
    used, n_ff = spec.experts.used, spec.experts.n_ff
    chosen = max(3 * used * n_ff, used * (n_ff + config.n_embd), 2 * used * config.n_embd)
    return max(dense, 3 * config.n_embd + 2 * spec.experts.count + chosen)
