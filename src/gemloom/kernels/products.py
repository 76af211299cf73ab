"""Products with packed weights, as operations of a ggml graph."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import ggml
from gguf.constants import GGMLQuantizationType

from gemloom.ggml.device import Tensor
from gemloom.ggml.graph import F32, Graph
from gemloom.kernels.library import Library, Weight, supported

I8 = GGMLQuantizationType.I8


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [k, m] or experts [k, m, n_expert] as our kernels want them, in ``tensor``'s bytes."""

    library: Library
    weight: Weight
    tensor: Tensor


def library() -> Library | None:
    """The best kernels for this processor, if any, told how ggml lays out its tensors."""
    for found in supported()[:1]:
        names = ("data", "ne", "nb", "src")
        found.use({name: getattr(ggml.ggml_tensor, name).offset for name in names})
        return found
    return None


def product(g: Graph, w: Packed, x: Tensor) -> Tensor:
    """w [k, m], x [k, ...] -> [m, ...] = W x."""
    assert w.weight.k == x.shape[0], (w, x)
    args = (w.tensor, quantized(g, w.library, x))
    shape = (int(w.weight.m), *x.shape[1:])
    return g.custom(w.library.address("product"), F32, shape, args, w.weight)


def expert_product(g: Graph, w: Packed, x: Tensor, ids: Tensor) -> Tensor:
    """w [k, m, n_expert], x [k, 1 or used, n], ids [used, n] -> [m, used, n], as named by ids."""
    assert w.weight.k == x.shape[0] and x.shape[2] == ids.shape[1], (w, x, ids)
    args = (w.tensor, quantized(g, w.library, x), ids)
    shape = (int(w.weight.m), *ids.shape)
    return g.custom(w.library.address("expert_product"), F32, shape, args, w.weight)


def quantized(g: Graph, library: Library, x: Tensor) -> Tensor:
    """x [k, ...] in 8 bits; the same node for every product that has the same x."""

    def make() -> Tensor:
        shape = (library.activation_bytes(x.shape[0]), *x.shape[1:])
        return g.custom(library.address("quantize"), I8, shape, (x,))

    return g.once("quantized", x, make)


def packed_shape(library: Library, weight: Weight, shape: tuple[int, ...]) -> tuple[int]:
    """Of the I8 tensor for a matrix [k, m] or experts [k, m, n_expert]."""
    return (library.packed_bytes(weight) * prod(shape[2:]),)
