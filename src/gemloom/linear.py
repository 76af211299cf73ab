"""The one door through which activations meet a weight matrix."""

from gemloom.ggml.device import Tensor
from gemloom.ggml.graph import Graph
from gemloom.kernels.operations import expert_product, product


def linear(g: Graph, w: Tensor, x: Tensor) -> Tensor:
    """w [k, m], x [k, n] -> [m, n] = W x, named as the weight without ``.weight``."""
    y = product(g, w.packed, x) if w.packed else g.mul_mat(w, x)
    return g.name(y, w.name.removesuffix(".weight"))


def expert_linear(g: Graph, w: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """w [k, m, n_expert], x [k, 1 or used, n], ids [used, n] -> [m, used, n], as named by ids."""
    y = expert_product(g, w.packed, x, ids) if w.packed else g.mul_mat_id(w, x, ids)
    return g.name(y, w.name.removesuffix(".weight"))
