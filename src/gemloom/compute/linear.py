"""The one door through which activations meet a weight matrix, and adapters theirs.

Each product is W x, then what each delta adds on its own rows; nothing else adds any.
"""

from collections.abc import Sequence

from gemloom.adapters.delta import Delta
from gemloom.ggml.device import Tensor
from gemloom.ggml.graph import Graph
from gemloom.kernels.operations import (
    add_deltas,
    dense_product,
    expert_product,
    product,
    serves_dense,
)

Part = tuple[int, int]  # of a matrix: its rows (or columns, of a table) from the one to the other


def linear(
    g: Graph,
    w: Tensor,
    x: Tensor,
    deltas: Sequence[Delta],
    part: Part | None = None,
    name: str = "",
) -> Tensor:
    """w [k, m], x [k, n] -> [m, n] = W x, named as the weight without ``.weight``.

    With ``part`` only so many rows of w are used, and the result has no name. Adapters may know
    the matrix by another ``name`` than its own.
    """
    g.watch(w.name, x)
    name = name or w.name
    with g.beside(w, "mul_mat"):
        y = _product(g, w, x, part)
        if g.kernels:
            there = [stretch for delta in deltas if (stretch := delta.stretch(g, name, part))]
            if there:
                add_deltas(g, there, x, y)
        else:
            for delta in deltas:
                delta.add_product(g, name, x, y, part)
            y = g.changed(y) if deltas else y
    return y if part else g.name(y, name.removesuffix(".weight"))


def _product(g: Graph, w: Tensor, x: Tensor, part: Part | None) -> Tensor:
    if w.packed and not part:
        return product(g, w.packed, x)
    rows = g.slice(w, 1, *part) if part else w
    return dense_product(g, rows, x) if serves_dense(g, w) else g.mul_mat(rows, x)


def expert_linear(g: Graph, w: Tensor, x: Tensor, ids: Tensor, deltas: Sequence[Delta]) -> Tensor:
    """w [k, m, n_expert], x [k, 1 or used, n], ids [used, n] -> [m, used, n], as named by ids."""
    g.watch_experts(w.name, w.shape[2], x, ids)
    with g.beside(w, "mul_mat_id"):
        y = expert_product(g, w.packed, x, ids) if w.packed else g.mul_mat_id(w, x, ids)
        for delta in deltas:
            delta.add_expert_product(g, w.name, x, ids, y)
        y = g.changed(y) if deltas else y
    return g.name(y, w.name.removesuffix(".weight"))


def table_rows(
    g: Graph, table: Tensor, tokens: Tensor, deltas: Sequence[Delta], part: Part | None = None
) -> Tensor:
    """table [k, n_vocab], tokens [n] i32 -> [k, n]: the rows of the tokens; of k only ``part``."""
    y = g.get_rows(g.slice(table, 0, *part) if part else table, tokens)
    for delta in deltas:
        delta.add_rows(g, table.name, tokens, y, part)
    return g.changed(y) if deltas else y
