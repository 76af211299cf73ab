"""Long-lived memory on a device or the host: weights, K/V cells, adapters."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import ggml
from gguf.constants import GGMLQuantizationType

from gemloom.errors import OutOfMemoryError
from gemloom.ggml.device import Device, Tensor, address
from gemloom.ggml.memory import check_free

ALIGNMENT = 32  # bytes, of addresses that ggml's CPU kernels get


class Arena:
    """Tensors that live as long as the model: weights, K/V cells.

    Make them with ``tensor()``, put those whose bytes are in place with ``map()``, and give all
    others memory with ``allocate()``. Free with ``close()``.
    """

    def __init__(
        self, device: Device, count: int, buffer_type: Any = None, *,
        weights: bool = False, where: int | None = None,
    ) -> None:  # fmt: skip
        """``where`` is a device's index, of the host if None; ``buffer_type`` other than its own.

        ``count`` is how many tensors it may have.
        """
        self._device, self._weights = device, weights
        self._where = device.host if where is None else where
        self._buffer_type = buffer_type or device.buffer_type(self._where)
        params = ggml.ggml_init_params(count * ggml.ggml_tensor_overhead() + 1024, None, True)
        self.context = ggml.ggml_init(params)
        self._closers = [lambda: ggml.ggml_free(self.context)]
        self._mapped: dict[int, Any] = {}
        self._kept: list[memoryview] = []
        self.bytes_allocated = 0

    def tensor(self, name: str, kind: GGMLQuantizationType, shape: Sequence[int]) -> Tensor:
        """A new tensor with no memory yet."""
        sizes = (ctypes.c_int64 * len(shape))(*shape)
        pointer = ggml.ggml_new_tensor(self.context, int(kind), len(shape), sizes)
        ggml.ggml_set_name(pointer, name.encode())
        return Tensor(pointer, kind, tuple(shape), name=name, where=self._where)

    def map(self, tensor: Tensor, part: memoryview, start: int, alignment: int) -> bool:
        """Let ``tensor`` use the bytes of ``part`` from ``start`` on, if their address allows.

        Returns False, and changes nothing, where it is no multiple of ``alignment``. The part is
        kept alive until ``close()``.
        """
        base = address(part)
        if (base + start) % alignment:
            return False
        if base not in self._mapped:
            self._mapped[base] = self._host_buffer(base, part)
        ggml.ggml_backend_tensor_alloc(self._mapped[base], tensor.pointer, base + start)
        return True

    def _host_buffer(self, base: int, part: memoryview) -> Any:
        # ggml wants the buffer itself aligned; the bytes before the part are never touched.
        slack = base % ALIGNMENT
        buffer = ggml.ggml_backend_dev_buffer_from_host_ptr(
            self._device.cpu, base - slack, part.nbytes + slack, part.nbytes
        )
        ggml.ggml_backend_buffer_set_usage(buffer, ggml.GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
        self._closers.append(lambda: ggml.ggml_backend_buffer_free(buffer))
        self._kept.append(part)
        return buffer

    def allocate(self, what: str) -> None:
        """Memory for every tensor that has none yet, cleared unless weights will fill it.

        OutOfMemoryError if there is not enough; ``what`` names it there.
        """
        kind = self._buffer_type
        size = ggml.ggml_backend_alloc_ctx_tensors_from_buft_size(self.context, kind)
        if not size:
            return
        if self._where != self._device.host:
            what = f"{what} on {self._device.name(self._where)}"
        self._check_free(size, what)
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.context, kind)
        if buffer:
            self._closers.append(lambda: ggml.ggml_backend_buffer_free(buffer))
        self._device.check()  # one that is lost gives whatever is asked for
        if not buffer:
            raise OutOfMemoryError(
                f"no memory for {what}: {size / 2**20:,.0f} MiB could not be allocated"
            )
        if self._weights:  # keeps the scheduler from moving a product away from its weights
            usage = ggml.GGML_BACKEND_BUFFER_USAGE_WEIGHTS
            ggml.ggml_backend_buffer_set_usage(buffer, usage)
        else:
            ggml.ggml_backend_buffer_clear(buffer, 0)
        self.bytes_allocated += int(ggml.ggml_backend_buffer_get_size(buffer))

    def _check_free(self, size: int, what: str) -> None:
        if self._where == self._device.host:
            check_free(size, what)
        else:
            info = self._device.found[self._where].info
            # A driver that does not tell says 0; then its own refusal is all there is.
            check_free(size, what, info.free if info.total else size)

    def close(self) -> None:
        """Free buffers and tensors, and let go of what was mapped."""
        while self._closers:
            self._closers.pop()()
        self._mapped.clear()
        self._kept.clear()
