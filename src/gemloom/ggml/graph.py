"""A compute graph: ops as methods that check shapes, name what they make, and keep order.

Shapes in docstrings are in ggml order, fastest first. Results are float32 unless stated.
A shape that does not fit is a bug of ours (AssertionError): ggml itself would abort.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeVar

import ggml
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemloom.ggml.device import Tensor, contiguous_strides
from gemloom.ggml.executable import Executable

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
I32, I64 = GGMLQuantizationType.I32, GGMLQuantizationType.I64
SUMS, IDS = ".in_sum2", ".ids"  # after a weight's name: taps of what it is multiplied with

T = TypeVar("T")
_ALL_THREADS = -1  # GGML_N_TASKS_MAX


class Graph(Executable):
    """One forward pass: what can be computed, and under which names."""

    def name(self, x: Tensor, name: str) -> Tensor:
        """Name an intermediate, so that it can be tapped; returns it."""
        ggml.ggml_set_name(x.pointer, name.encode())
        x.name = name
        self.names.append(name)
        if name in self._taps:
            self.tapped[name] = self.output(self.cont(x))
        return x

    # -- products and rows -------------------------------------------------------------------

    def mul_mat(self, w: Tensor, x: Tensor) -> Tensor:
        """w [k, m, ...], x [k, n, ...] -> [m, n, ...]: each row of x times each row of w."""
        assert w.shape[0] == x.shape[0], (w, x)
        assert all(b % a == 0 for a, b in zip(w.shape[2:], x.shape[2:], strict=False)), (w, x)
        result = ggml.ggml_mul_mat(self._context, w.pointer, x.pointer)
        return Tensor(result, F32, (w.shape[1], *x.shape[1:]))

    def mul_mat_id(self, w: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        """w [k, m, n_expert], x [k, 1 or used, n], ids [used, n] -> [m, used, n]."""
        assert w.shape[0] == x.shape[0], (w, x)
        assert x.shape[2] == ids.shape[1] and ids.shape[0] % x.shape[1] == 0, (x, ids)
        result = ggml.ggml_mul_mat_id(self._context, w.pointer, x.pointer, ids.pointer)
        return Tensor(result, F32, (w.shape[1], *ids.shape))

    def once(self, what: str, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` makes of ``x``: one node, whoever asks for it."""
        key = what, ctypes.addressof(x.pointer.contents)
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def keep(self, data: T) -> T:
        """Let ``data`` live as long as the graph."""
        self._kept.append(data)
        return data

    def custom(
        self, operation: str, kind: GGMLQuantizationType, shape: tuple[int, ...],
        args: Sequence[Tensor], data: Any = None,
    ) -> Tensor:  # fmt: skip
        """What an operation of our own kernels makes of ``args``, by all threads.

        ``data`` is a ctypes structure that it gets besides.
        """
        pointers = (ctypes.POINTER(ggml.ggml_tensor) * len(args))(*(arg.pointer for arg in args))
        sizes = (*shape, 1, 1, 1)[:4]
        result = ggml.ggml_custom_4d(
            self._context, int(kind), *sizes, pointers, len(args), *self._call(operation, data)
        )
        return Tensor(result, kind, shape)

    def custom_into(self, operation: str, x: Tensor, args: Sequence[Tensor], data: Any) -> None:
        """As ``custom``, but x is changed in place, before whatever comes later."""
        pointers = (ctypes.POINTER(ggml.ggml_tensor) * len(args))(*(arg.pointer for arg in args))
        result = ggml.ggml_custom_inplace(
            self._context, x.pointer, pointers, len(args), *self._call(operation, data)
        )
        self.expand(Tensor(result, x.type, x.shape, x.strides))

    def _call(self, operation: str, data: Any) -> tuple[Any, int, int]:
        """What ggml calls, by how many threads, and what it hands over then."""
        assert self.kernels, operation
        function = ggml.ggml_custom_op_t(self.kernels.address(operation))
        return function, _ALL_THREADS, ctypes.addressof(self.keep(self.kernels.call(data)))

    def out_prod(self, a: Tensor, b: Tensor) -> Tensor:
        """a [m, r, c], b [r, n, c], both f32 -> [m, n, c]: columns of a, as much as b says, summed.

        ``mul_mat`` takes dot products, which are slow where r is a few dozen: ggml's loops begin to
        pay at 64 elements. This one runs along m.
        """
        assert a.shape[1] == b.shape[0] and a.shape[2:] == b.shape[2:], (a, b)
        turned = ggml.ggml_transpose(self._context, b.pointer)
        result = ggml.ggml_out_prod(self._context, a.pointer, turned)
        return Tensor(result, F32, (a.shape[0], *b.shape[1:]))

    def watch(self, name: str, x: Tensor) -> None:
        """Sum the squares of x [k, n] by column, if the taps ask for what meets this matrix."""
        if (tap := name + SUMS) in self._taps and tap not in self.tapped:
            sums = self.reshape(self.column_sums(self.mul(x, x)), x.shape[0], 1)
            self.tapped[tap] = self.output(self.cont(sums))

    def watch_experts(self, name: str, count: int, x: Tensor, ids: Tensor) -> None:
        """As ``watch``, for each of ``count`` experts apart: x [k, 1 or used, n], ids [used, n]."""
        if (tap := name + SUMS) not in self._taps or tap in self.tapped:
            return
        met, rows = self.output(self.cont(ids)), prod(ids.shape)
        squares = self.repeat(self.mul(x, x), x.shape[0], *ids.shape)
        squares, each = self.reshape(squares, x.shape[0], rows), self.reshape(met, rows)
        self.tapped[tap] = self.output(self.sum_by(squares, each, count))
        self.tapped[name + IDS] = met

    def get_rows(self, table: Tensor, ids: Tensor) -> Tensor:
        """table [k, n] of any type, ids [m] i32 -> [k, m], the rows named by ids."""
        assert len(table.shape) == 2 and len(ids.shape) == 1, (table, ids)
        result = ggml.ggml_get_rows(self._context, table.pointer, ids.pointer)
        return Tensor(result, F32, (table.shape[0], ids.shape[0]))

    def get_experts(self, table: Tensor, ids: Tensor) -> Tensor:
        """table [1, n_expert, n], ids [used, n] i32 -> [1, used, n], per row the entries named."""
        assert table.shape[0] == 1 and table.shape[2] == ids.shape[1], (table, ids)
        result = ggml.ggml_get_rows(self._context, table.pointer, ids.pointer)
        return Tensor(result, F32, (1, *ids.shape))

    def set_rows(self, table: Tensor, x: Tensor, ids: Tensor) -> None:
        """Write x [k, m] into the rows ids [m] i64 of table [k, n], before whatever comes later."""
        assert table.shape[0] == x.shape[0] and x.shape[1:] == ids.shape, (table, x, ids)
        result = ggml.ggml_set_rows(self._context, table.pointer, x.pointer, ids.pointer)
        self.expand(Tensor(result, table.type, table.shape))

    # -- element by element ------------------------------------------------------------------

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b, b repeated where its dimensions are shorter."""
        return self._binary(ggml.ggml_add, a, b)

    def add_into(self, x: Tensor, y: Tensor) -> None:
        """x += y in the memory of x; what that is a view of is then read through ``changed``."""
        assert x.shape == y.shape, (x, y)
        result = ggml.ggml_add_inplace(self._context, x.pointer, y.pointer)
        self.expand(Tensor(result, F32, x.shape, x.strides))

    def changed(self, x: Tensor) -> Tensor:
        """x as the additions into it left it.

        Backends may change the order of nodes that do not depend on each other. Two views of one
        tensor do, for all of them; a tensor and a view of it, for Vulkan, do not.
        """
        return self.reshape(x, *x.shape)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """a * b, b repeated where its dimensions are shorter."""
        return self._binary(ggml.ggml_mul, a, b)

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        """a / b, b repeated where its dimensions are shorter."""
        return self._binary(ggml.ggml_div, a, b)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """x * factor."""
        return Tensor(ggml.ggml_scale(self._context, x.pointer, factor), F32, x.shape)

    def apply(self, function: Callable[[Any, Any], Any], x: Tensor) -> Tensor:
        """What one of ggml's functions of one tensor makes of x, such as ``ggml.ggml_relu``."""
        return Tensor(function(self._context, x.pointer), F32, x.shape)

    def gelu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """gelu(gate) * up, GELU in its tanh form; both of one shape, rows contiguous."""
        assert gate.shape == up.shape, (gate, up)
        if self.kernels:
            return self.custom("gelu_mul", F32, gate.shape, (gate, up))
        a, b = self._spread(gate), self._spread(up)
        result = ggml.ggml_geglu_split(self._context, a.pointer, b.pointer)
        return self.reshape(Tensor(result, F32, a.shape), *gate.shape)

    def _spread(self, x: Tensor) -> Tensor:
        """The same elements in 16 times as many rows: ggml never gives two threads one row."""
        if x.shape[0] % 16 or x.strides != contiguous_strides(x.type, x.shape):
            return x
        return self.reshape(x, x.shape[0] // 16, prod(x.shape[1:]) * 16)

    def rms_norm(self, x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
        """x / sqrt(mean(x^2) + eps) over the first dimension, times weight if there is one."""
        if self.kernels and (weight is None or weight.shape == x.shape[:1]):
            return self._norm(x, eps, *((weight,) if weight else ()))
        result = Tensor(ggml.ggml_rms_norm(self._context, x.pointer, eps), F32, x.shape)
        return self.mul(result, weight) if weight else result

    def add_norm(
        self, a: Tensor, x: Tensor, eps: float, weight: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """(a + rms_norm(x) * weight) * scale, with a scale [1] if there is one; all at once."""
        assert self.kernels and a.shape == x.shape and weight.shape == x.shape[:1], (a, x, weight)
        return self._norm(x, eps, weight, a, *((scale,) if scale else ()))

    def _norm(self, x: Tensor, eps: float, *more: Tensor) -> Tensor:
        return self.custom("norm", F32, x.shape, (x, *more), ctypes.c_float(eps))

    def soft_max(self, x: Tensor) -> Tensor:
        """Softmax over the first dimension."""
        return Tensor(ggml.ggml_soft_max(self._context, x.pointer), F32, x.shape)

    def sum_rows(self, x: Tensor) -> Tensor:
        """x [k, ...] -> [1, ...]."""
        return Tensor(ggml.ggml_sum_rows(self._context, x.pointer), F32, (1, *x.shape[1:]))

    def column_sums(self, x: Tensor) -> Tensor:
        """x [k, n] -> [1, k]: each column summed over the rows."""
        turned = ggml.ggml_cont(self._context, ggml.ggml_transpose(self._context, x.pointer))
        return self.sum_rows(Tensor(turned, F32, x.shape[::-1]))

    def sum_by(self, x: Tensor, ids: Tensor, n: int) -> Tensor:
        """x [k, m], ids [m] i32 below n -> [k, n]: the rows with the same id summed."""
        assert x.shape[1:] == ids.shape, (x, ids)
        like = ggml.ggml_new_tensor_2d(self._context, int(F32), x.shape[0], n)
        result = ggml.ggml_get_rows_back(self._context, x.pointer, ids.pointer, like)
        return Tensor(result, F32, (x.shape[0], n))

    def top_k(self, x: Tensor, k: int) -> Tensor:
        """x [n, m] -> i32 [k, m]: where the k largest are, the largest first."""
        assert k <= x.shape[0], (x, k)
        self._left -= 1  # it makes two
        result = ggml.ggml_argsort_top_k(self._context, x.pointer, k)
        return Tensor(result, I32, (k, *x.shape[1:]), contiguous_strides(I32, x.shape))

    def largest(self, x: Tensor, k: int) -> Tensor:
        """x [n, m] -> i32 [k, m]: where the k largest are, in any order, and any of equals."""
        assert k <= x.shape[0], (x, k)
        return Tensor(ggml.ggml_top_k(self._context, x.pointer, k), I32, (k, *x.shape[1:]))

    def _binary(self, op: Any, a: Tensor, b: Tensor) -> Tensor:
        wide = b.shape + (1,) * (len(a.shape) - len(b.shape))
        assert all(m % n == 0 for m, n in zip(a.shape, wide, strict=True)), (a, b)
        return Tensor(op(self._context, a.pointer, b.pointer), F32, a.shape)

    # -- attention ---------------------------------------------------------------------------

    def rope(
        self, x: Tensor, positions: Tensor, n_dims: int, base: float, scale: float,
        factors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Rotate x [head_dim, n_head, n] by positions [n] i32; pairs are (i, i + n_dims/2).

        The angle of pair i is position * scale * base^(-2i/n_dims) / factors[i].
        """
        assert x.shape[2:] == positions.shape and n_dims <= x.shape[0], (x, positions)
        assert factors is None or factors.shape == (n_dims // 2,), factors
        result = ggml.ggml_rope_ext(
            self._context, x.pointer, positions.pointer, factors and factors.pointer,
            n_dims, ggml.GGML_ROPE_TYPE_NEOX, 0, base, scale, 0.0, 1.0, 0.0, 0.0,
        )  # fmt: skip
        return Tensor(result, F32, x.shape)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """Softmax(scale * q k + mask) v with accumulators in f32.

        q [head_dim, n, n_head], k and v [head_dim, cells, n_kv], mask f16 [cells, n]
        -> [head_dim * n_head, n].
        """
        assert q.shape[0] == k.shape[0] and k.shape == v.shape, (q, k, v)
        assert q.shape[2] % k.shape[2] == 0 and mask.shape == (k.shape[1], q.shape[1]), (q, k, mask)
        out = ggml.ggml_flash_attn_ext(
            self._context, q.pointer, k.pointer, v.pointer, mask.pointer, scale, 0.0, 0.0
        )
        ggml.ggml_flash_attn_ext_set_prec(out, ggml.GGML_PREC_F32)
        head_dim, n, n_head = q.shape
        return self.reshape(Tensor(out, F32, (head_dim, n_head, n)), head_dim * n_head, n)

    # -- the same bytes seen otherwise -------------------------------------------------------

    def reshape(self, x: Tensor, *shape: int) -> Tensor:
        """The same elements in another shape; x must be contiguous."""
        assert prod(shape) == prod(x.shape), (x, shape)
        ops = (ggml.ggml_reshape_1d, ggml.ggml_reshape_2d, ggml.ggml_reshape_3d)
        return Tensor(ops[len(shape) - 1](self._context, x.pointer, *shape), x.type, shape)

    def slice(self, x: Tensor, axis: int, start: int, stop: int) -> Tensor:
        """x[start:stop] along ``axis``; in place. On axis 0, whole blocks of quantized types."""
        assert 0 <= start < stop <= x.shape[axis], (x, axis, start, stop)
        assert axis or not start % GGML_QUANT_SIZES[x.type][0], (x, start)
        shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])
        offset = start * x.strides[axis]
        if axis == 0:
            offset = self.row_bytes(x.type, start)
        return self.view(x, shape, x.strides, offset)

    def view(
        self, x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> Tensor:
        """Other shape and strides (bytes, one a dimension) from byte ``offset`` of x."""
        ops = (None, ggml.ggml_view_1d, ggml.ggml_view_2d, ggml.ggml_view_3d)
        result = ops[len(shape)](self._context, x.pointer, *shape, *strides[1:], offset)  # type: ignore[misc]
        return Tensor(result, x.type, shape, strides)

    @staticmethod
    def row_bytes(kind: GGMLQuantizationType, n: int) -> int:
        """Bytes of n elements in a row."""
        return contiguous_strides(kind, (n, 1))[1]

    def swap(self, x: Tensor) -> Tensor:
        """[a, b, c] -> [a, c, b], in place."""
        result = ggml.ggml_permute(self._context, x.pointer, 0, 2, 1, 3)
        a, b, c = x.shape
        return Tensor(result, x.type, (a, c, b), (x.strides[0], x.strides[2], x.strides[1]))

    def cont(self, x: Tensor) -> Tensor:
        """A contiguous copy."""
        return Tensor(ggml.ggml_cont(self._context, x.pointer), x.type, x.shape)

    def repeat(self, x: Tensor, *shape: int) -> Tensor:
        """x again and again until it has this shape, of as many dimensions."""
        assert all(m % n == 0 for m, n in zip(shape, x.shape, strict=True)), (x, shape)
        sizes = (*shape, 1, 1, 1)[:4]
        result = ggml.ggml_repeat_4d(self._context, x.pointer, *sizes)
        return Tensor(result, x.type, shape)

    def concat(self, a: Tensor, b: Tensor) -> Tensor:
        """[k, m] and [k, n] -> [k, m + n]."""
        assert a.shape[0] == b.shape[0] and len(a.shape) == 2, (a, b)
        result = ggml.ggml_concat(self._context, a.pointer, b.pointer, 1)
        return Tensor(result, a.type, (a.shape[0], a.shape[1] + b.shape[1]))
