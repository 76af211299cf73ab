"""Backends, threads and long-lived memory: what ggml has on this machine.

ggml answers a broken precondition by aborting the process. So everything that
comes from outside is checked before it gets here, and what is checked here are
our own invariants.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

# A thread that waits for the others spins this often before it sleeps. libgomp's own default
# starves whatever else runs on the same cores, another of its teams or OpenBLAS among it.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import ggml
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemloom.errors import DeviceError
from gemloom.gguf import nbytes

if TYPE_CHECKING:
    from gemloom.kernels.library import Library
    from gemloom.kernels.operations import Packed

ALIGNMENT = 32  # bytes, of addresses that ggml's CPU kernels get

_log = logging.getLogger("gemloom.ggml")
_TYPES = {ggml.GGML_BACKEND_DEVICE_TYPE_CPU: "cpu", ggml.GGML_BACKEND_DEVICE_TYPE_ACCEL: "accel"}
_NUMPY: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.I32: np.dtype(np.int32),
    GGMLQuantizationType.I64: np.dtype(np.int64),
}


@ggml.ggml_log_callback
def _on_log(level: int, text: bytes, _data: Any) -> None:
    _log.debug("%s", text.decode("utf-8", "replace").rstrip())


ggml.ggml_log_set(_on_log, None)


class Tensor:
    """A ggml tensor: its pointer, and what Python needs to know of it without asking C.

    ``shape`` is in ggml order (fastest first) and has as many dimensions as were given. ``packed``
    is the same matrix in the layout of our own kernels, where there is one for it.
    """

    __slots__ = ("name", "packed", "pointer", "shape", "strides", "type")

    def __init__(
        self,
        pointer: Any,
        type: GGMLQuantizationType,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        name: str = "",
    ) -> None:
        self.pointer, self.type, self.shape, self.name = pointer, type, shape, name
        self.packed: Packed | None = None
        self.strides = strides or contiguous_strides(type, shape)

    def __repr__(self) -> str:
        return f"<Tensor {self.name or '?'} {self.type.name} {list(self.shape)}>"

    @property
    def nbytes(self) -> int:
        """Bytes of the data, if contiguous."""
        return nbytes(self.type, self.shape)

    @property
    def allocated(self) -> bool:
        """Whether it has memory. An input that no node of a graph reads never gets any."""
        return bool(self.pointer.contents.data)

    @property
    def address(self) -> int:
        """Of its first byte."""
        assert self.allocated, self
        return int(self.pointer.contents.data)

    def write(self, array: np.ndarray[Any, Any] | memoryview | bytes, offset: int = 0) -> None:
        """Copy ``array`` in, from byte ``offset`` on."""
        data = np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array
        view = np.frombuffer(data, np.uint8)
        if offset + view.nbytes > self.nbytes or not self.allocated:
            raise AssertionError(f"{self}: cannot take {view.nbytes} bytes at {offset}")
        ggml.ggml_backend_tensor_set(self.pointer, view.ctypes.data, offset, view.nbytes)

    def read(self, offset: int = 0, length: int | None = None) -> bytearray:
        """``length`` bytes from byte ``offset``; all of them if no length is given."""
        length = self.nbytes - offset if length is None else length
        if offset + length > self.nbytes or not self.allocated:
            raise AssertionError(f"{self}: cannot give {length} bytes at {offset}")
        out = bytearray(length)
        address = np.frombuffer(out, np.uint8).ctypes.data
        ggml.ggml_backend_tensor_get(self.pointer, address, offset, length)
        return out

    def clear(self, offset: int, length: int) -> None:
        """Set ``length`` bytes from byte ``offset`` on to 0."""
        if offset + length > self.nbytes or not self.allocated:
            raise AssertionError(f"{self}: cannot clear {length} bytes at {offset}")
        ggml.ggml_backend_tensor_memset(self.pointer, 0, offset, length)

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy as an array; the shape is reversed, slowest first, as numpy has it."""
        return np.frombuffer(self.read(), _NUMPY[self.type]).reshape(self.shape[::-1])


def contiguous_strides(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Bytes from one element (block, for quantized types) or row to the next."""
    block, size = GGML_QUANT_SIZES[kind]
    strides = [size, shape[0] // block * size]
    for n in shape[1:]:
        strides.append(strides[-1] * n)
    return tuple(strides[: len(shape)])


def address(view: memoryview) -> int:
    """Where the first byte of a buffer lies."""
    return int(np.frombuffer(view, np.uint8).ctypes.data)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device that this build of ggml knows."""

    name: str
    description: str
    kind: str  # "cpu", "accel" (a library beside the CPU, such as BLAS) or "gpu"
    free: int  # bytes
    total: int  # bytes


def devices() -> list[DeviceInfo]:
    """Every device ggml has here."""
    found = []
    for index in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found.append(
            DeviceInfo(
                ggml.ggml_backend_dev_name(device).decode(),
                ggml.ggml_backend_dev_description(device).decode(),
                _TYPES.get(ggml.ggml_backend_dev_type(device), "gpu"),
                free.value,
                total.value,
            )
        )
    return found


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell.

    malloc gives more than there is, and the kernel ends the process when it is touched.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def check_free(size: int, what: str) -> None:
    """DeviceError where so many bytes are not free; ``what`` they are for is named in it."""
    free = free_memory()
    if free is not None and size > free:
        raise DeviceError(
            f"no memory for {what}: {size / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} free"
        )


def pages(size: int, what: str) -> memoryview:
    """Memory of its own for much that is filled at once. DeviceError as ``check_free``.

    Not in huge pages: making those takes longer than clearing small ones, where memory is full
    of cached files (5 s to 1.5 for 1.4 GiB).
    """
    check_free(size, what)
    try:
        return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError as error:
        raise DeviceError(f"no memory for {what}: {error.strerror}") from error


def trim_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim:
        trim(0)


def cpu_features() -> dict[str, bool]:
    """The instruction sets that this build of ggml's CPU backend uses."""
    prefix = "ggml_cpu_has_"
    names = (
        "sse3 ssse3 avx avx_vnni avx2 f16c fma bmi2 avx512 avx512_vbmi avx512_vnni avx512_bf16 "
        "amx_int8 neon arm_fma fp16_va dotprod matmul_int8 sve sme riscv_v vsx llamafile"
    )
    return {name: bool(getattr(ggml, prefix + name)()) for name in names.split()}


def ggml_version() -> str:
    """The version of the ggml library itself."""
    return str(ggml.ggml_version().decode())


def usable_cores() -> int:
    """Cores this process may run on, and so the threads used where nobody says how many."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Device:
    """The backends a model computes on, with the scheduler that spreads a graph over them.

    ``name`` is "auto" or "cpu": the CPU, with BLAS in front of it where ggml was built with it.
    ``names`` are the backends then in use, preferred first; ``kernels`` are our own, which
    graphs use where they can.
    Raises DeviceError for any other name. Free with ``close()``.
    """

    def __init__(
        self,
        name: str = "auto",
        threads: int | None = None,
        max_nodes: int = 4096,
        kernels: Library | None = None,
    ) -> None:
        if name not in ("auto", "cpu"):
            there = ", ".join(info.name for info in devices())
            raise DeviceError(
                f'device {name!r}: only "auto" and "cpu" are supported (here: {there})'
            )
        self.max_nodes = max_nodes  # of one graph
        self.kernels = kernels
        if self.kernels:
            fields = ("data", "ne", "nb", "src")
            self.kernels.use({name: getattr(ggml.ggml_tensor, name).offset for name in fields})
        self.threads = threads or usable_cores()
        self._closers: list[Callable[[], None]] = []
        self.backends = [self._open(kind) for kind in self._kinds()]
        self.cpu = ggml.ggml_backend_dev_by_type(ggml.GGML_BACKEND_DEVICE_TYPE_CPU)
        for backend in self.backends:
            self._set_threads(backend)
        self.scheduler = self._schedule()
        self._closers.append(self._free_scheduler)
        self._repacked: dict[tuple[GGMLQuantizationType, tuple[int, ...]], Any] = {}
        self.current: object = None  # the graph whose tensors have memory now
        self.names = [ggml.ggml_backend_name(backend).decode() for backend in self.backends]
        self.compute_bytes = 0  # for the intermediate tensors of graphs

    def _kinds(self) -> list[int]:
        accelerated = ggml.ggml_backend_dev_by_type(ggml.GGML_BACKEND_DEVICE_TYPE_ACCEL)
        kinds = [ggml.GGML_BACKEND_DEVICE_TYPE_ACCEL] if accelerated else []
        return [*kinds, ggml.GGML_BACKEND_DEVICE_TYPE_CPU]

    def _open(self, kind: int) -> Any:
        backend = ggml.ggml_backend_init_by_type(kind, None)
        if not backend:
            raise DeviceError(f"ggml's {_TYPES[kind]} backend did not start")
        self._closers.append(lambda: ggml.ggml_backend_free(backend))
        return backend

    def _set_threads(self, backend: Any) -> None:
        registry = ggml.ggml_backend_dev_backend_reg(ggml.ggml_backend_get_device(backend))
        function = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        if function:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(function)(backend, self.threads)

    def _schedule(self) -> Any:
        pointers = (ggml.ggml_backend_t_ctypes * len(self.backends))(*self.backends)
        return ggml.ggml_backend_sched_new(
            pointers, None, len(self.backends), self.max_nodes, False, False
        )

    def _free_scheduler(self) -> None:
        ggml.ggml_backend_sched_free(self.scheduler)

    def grow(self, nodes: int) -> bool:
        """Make room for graphs of so many nodes; True where that took what had been reserved.

        The graph that has memory now loses it then.
        """
        if nodes <= self.max_nodes:
            return False
        self._free_scheduler()
        self.current = None
        self.max_nodes = 1 << (nodes - 1).bit_length()
        self.scheduler = self._schedule()
        return True

    def measure(self) -> None:
        """Look how much memory the scheduler holds, which only changes where a graph gets some."""
        size = ggml.ggml_backend_sched_get_buffer_size
        self.compute_bytes = sum(int(size(self.scheduler, backend)) for backend in self.backends)

    def repacked(self, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> Any:
        """The buffer type whose kernels are faster for such a matrix, or None.

        Its layout is its own: only whole matrix products can read what lies there.
        """
        if len(shape) < 2 or shape[1] % 16:
            return None
        probe = (shape[0], 32 if shape[1] % 32 == 0 else 16, 2)[: len(shape)]
        if (kind, probe) not in self._repacked:
            self._repacked[kind, probe] = self._find_repacked(kind, probe)
        return self._repacked[kind, probe]

    def _find_repacked(self, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> Any:
        """Ask each extra buffer type of the CPU with a small matrix of the kind."""
        registry = ggml.ggml_backend_dev_backend_reg(self.cpu)
        address = ggml.ggml_backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if not address:
            return None
        pointers = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        for buffer_type in takewhile(bool, pointers(self.cpu)):
            arena = Arena(self, 8, buffer_type)
            w = arena.tensor("w", kind, shape)
            arena.allocate("a probe")
            supported = arena.supports_product(w)
            arena.close()
            if supported:
                return buffer_type
        return None

    def close(self) -> None:
        """Free scheduler and backends; no graph may be used afterwards."""
        while self._closers:
            self._closers.pop()()


class Arena:
    """Tensors that live as long as the model: weights, K/V cells.

    Make them with ``tensor()``, put those whose bytes are in place with ``map()``, and give all
    others memory with ``allocate()``. Free with ``close()``.
    """

    def __init__(
        self, device: Device, count: int, buffer_type: Any = None, *, weights: bool = False
    ) -> None:
        self._device, self._weights = device, weights
        self._buffer_type = buffer_type or ggml.ggml_backend_dev_buffer_type(device.cpu)
        params = ggml.ggml_init_params(count * ggml.ggml_tensor_overhead() + 1024, None, True)
        self._context = ggml.ggml_init(params)
        self._closers = [lambda: ggml.ggml_free(self._context)]
        self._mapped: dict[int, Any] = {}
        self._kept: list[memoryview] = []
        self.bytes_allocated = 0

    def tensor(self, name: str, kind: GGMLQuantizationType, shape: Sequence[int]) -> Tensor:
        """A new tensor with no memory yet."""
        sizes = (ctypes.c_int64 * len(shape))(*shape)
        pointer = ggml.ggml_new_tensor(self._context, int(kind), len(shape), sizes)
        ggml.ggml_set_name(pointer, name.encode())
        return Tensor(pointer, kind, tuple(shape), name=name)

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

        DeviceError if there is not enough; ``what`` names it there.
        """
        kind = self._buffer_type
        size = ggml.ggml_backend_alloc_ctx_tensors_from_buft_size(self._context, kind)
        if not size:
            return
        check_free(size, what)
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self._context, kind)
        if not buffer:
            raise DeviceError(
                f"no memory for {what}: {size / 2**20:,.0f} MiB could not be allocated"
            )
        if self._weights:  # keeps the scheduler from moving a product away from its weights
            usage = ggml.GGML_BACKEND_BUFFER_USAGE_WEIGHTS
            ggml.ggml_backend_buffer_set_usage(buffer, usage)
        else:
            ggml.ggml_backend_buffer_clear(buffer, 0)
        self._closers.append(lambda: ggml.ggml_backend_buffer_free(buffer))
        self.bytes_allocated += int(ggml.ggml_backend_buffer_get_size(buffer))

    def supports_product(self, w: Tensor) -> bool:
        """Whether the CPU can multiply with ``w`` as it lies here."""
        x = ggml.ggml_new_tensor_3d(self._context, int(GGMLQuantizationType.F32), w.shape[0], 1, 1)
        if len(w.shape) == 2:
            product = ggml.ggml_mul_mat(self._context, w.pointer, x)
        else:
            ids = ggml.ggml_new_tensor_2d(self._context, int(GGMLQuantizationType.I32), 1, 1)
            product = ggml.ggml_mul_mat_id(self._context, w.pointer, x, ids)
        return bool(ggml.ggml_backend_dev_supports_op(self._device.cpu, product))

    def close(self) -> None:
        """Free buffers and tensors, and let go of what was mapped."""
        while self._closers:
            self._closers.pop()()
        self._mapped.clear()
        self._kept.clear()
