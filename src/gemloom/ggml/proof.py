"""Products by what ggml has beside its plain kernels, compared with those.

For the child process of ``trust.py`` alone: a kernel that is wrong may end it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from gemloom.files.gguf import nbytes
from gemloom.ggml.arena import Arena
from gemloom.ggml.backends import accelerator
from gemloom.ggml.device import Device, Tensor
from gemloom.ggml.graph import F32, I32, Graph
from gemloom.ggml.quants import NEEDS_IMPORTANCE, WRITABLE, dequantize, quantize
from gemloom.ggml.repacking import BARRED, offered, takes
from gemloom.ggml.trust import PLAIN

if TYPE_CHECKING:
    from gemloom.kernels.library import Library

Array = np.ndarray[Any, Any]
Op = Callable[[Graph, list[Tensor]], Tensor]
Input = tuple[
    GGMLQuantizationType, Array, tuple[int, ...]
]  # its data, and its shape in ggml's order
# A type or operation, and what tells whether it gives what the plain kernels do.
Case = tuple[str, Callable[[], bool]]
# A name, and what gives its cases, since listing them may end the process too; None: it is barred.
Subject = tuple[str, Callable[[], Iterator[Case]] | None]

COLUMNS, THREADS, NODES = 512, 2, 64
_SHAPES = ((COLUMNS, 32), (COLUMNS, 16), (COLUMNS, 32, 2), (COLUMNS, 16, 2))
_ROWS = (1, 6)  # of activations: kernels take one, or four at once
_MOST_ROWS = 72
_WIDE = 64  # rows of both: BLAS takes 32 and more
_COMMON = [GGMLQuantizationType[n] for n in ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K")]
# Of the plain result's deviation. Roundings of activations to 8 bits differ by 0.05 at most.
_NEAR = 0.1


def subjects() -> Iterator[Subject]:
    """Everything there is to try of ggml's here: first its plain kernels, which judge the rest."""
    device = plain_device()
    yield PLAIN, lambda: _common(_multiplies, device)
    for name, buffer_type in offered(device.cpu).items():
        yield name, None if name in BARRED else partial(_layouts, device, buffer_type)
    if faster := accelerator():
        yield faster[0], lambda: _common(_accelerates, device)
    device.close()


def _common(
    multiplies: Callable[[Device, GGMLQuantizationType], bool], device: Device
) -> Iterator[Case]:
    for kind in _COMMON:
        yield kind.name, partial(multiplies, device, kind)


def _layouts(device: Device, buffer_type: Any) -> Iterator[Case]:
    for kind in sorted(WRITABLE):
        if shapes := [s for s in _SHAPES if takes(device, buffer_type, kind, s)]:
            yield kind.name, partial(_repacks, device, buffer_type, kind, shapes)


def plain_device(kernels: Library | None = None) -> Device:
    """The CPU with no library beside it."""
    return Device("cpu", THREADS, NODES, kernels, trusts=lambda _: False)


def agree(found: Array, plain: Array) -> bool:
    """Whether two results are the same but for roundings."""
    return bool(np.abs(found - plain).max() <= _NEAR * plain.std())


def normal(*shape: int) -> Array:
    """Float32 noise, the same each time."""
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


def matrix(kind: GGMLQuantizationType, rows: int) -> Array:
    """So many rows of COLUMNS values in a type, as bytes."""
    return _most(kind)[: nbytes(kind, (COLUMNS, rows))]


@cache
def _most(kind: GGMLQuantizationType) -> Array:
    """As many rows as anything here has: quantizing takes longer than all products."""
    importance = np.ones(COLUMNS, np.float32) if kind in NEEDS_IMPORTANCE else None
    return np.frombuffer(quantize(normal(_MOST_ROWS, COLUMNS), kind, importance), np.uint8)


def computed(device: Device, op: Op, *inputs: Input) -> Array:
    """What an operation makes of inputs."""
    graph = Graph(device, NODES)
    tensors = [graph.input(f"in{i}", kind, *shape) for i, (kind, _, shape) in enumerate(inputs)]
    out = graph.output(op(graph, tensors))
    graph.allocate()
    for tensor, (_, data, _) in zip(tensors, inputs, strict=True):
        tensor.write(data)
    graph.compute()
    result = out.numpy()
    graph.close()
    return result


def _multiplies(device: Device, kind: GGMLQuantizationType) -> bool:
    """Whether the plain kernels multiply as numpy does."""
    w, x = matrix(kind, _WIDE), normal(_ROWS[-1], COLUMNS)
    plain = computed(
        device, lambda g, t: g.mul_mat(*t), (kind, w, (COLUMNS, _WIDE)), (F32, x, x.shape[::-1])
    )
    return agree(plain, x @ dequantize(w.data, kind).reshape(_WIDE, COLUMNS).T)


def _repacks(
    device: Device,
    buffer_type: Any,
    kind: GGMLQuantizationType,
    shapes: Sequence[tuple[int, ...]],
) -> bool:
    """Whether matrices in a buffer type multiply as they do in plain memory."""
    for shape in shapes:
        for rows in _ROWS:
            found, plain = (_product(device, t, kind, shape, rows) for t in (buffer_type, None))
            if not agree(found, plain):
                return False
    return True


def _product(
    device: Device, buffer_type: Any, kind: GGMLQuantizationType, shape: tuple[int, ...], rows: int
) -> Array:
    arena = Arena(device, 1, buffer_type, weights=True)
    w = arena.tensor("w", kind, shape)
    arena.allocate("a proof")
    w.write(matrix(kind, int(np.prod(shape[1:]))))
    x = normal(rows, COLUMNS)
    if len(shape) == 2:
        result = computed(device, lambda g, t: g.mul_mat(w, t[0]), (F32, x, (COLUMNS, rows)))
    else:
        ids = I32, np.arange(rows, dtype=np.int32) % shape[2], (1, rows)
        one = F32, x, (COLUMNS, 1, rows)
        result = computed(device, lambda g, t: g.mul_mat_id(w, *t), one, ids)
    arena.close()
    return result


def _accelerates(device: Device, kind: GGMLQuantizationType) -> bool:
    """Whether the library beside the CPU multiplies as the CPU does."""
    w = kind, matrix(kind, _WIDE), (COLUMNS, _WIDE)
    x = F32, normal(_WIDE, COLUMNS), (COLUMNS, _WIDE)
    faster = Device("cpu", THREADS, NODES, trusts=lambda _: True)
    found, plain = (computed(d, lambda g, t: g.mul_mat(*t), w, x) for d in (faster, device))
    faster.close()
    return agree(found, plain)
