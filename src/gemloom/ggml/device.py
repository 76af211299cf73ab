"""Tensors, and the backends, threads and scheduler that a model computes with.

ggml answers a broken precondition by aborting the process. So everything that
comes from outside is checked before it gets here, and what is checked here are
our own invariants. Which devices there are is in ``backends.py``, long-lived memory in
``arena.py``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import ggml
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemloom.errors import DeviceError, LostError, OutOfMemoryError
from gemloom.files.gguf import nbytes
from gemloom.ggml import backends, trust
from gemloom.ggml.input_buffer import Room
from gemloom.system.limits import free_memory, threads_for

if TYPE_CHECKING:
    from gemloom.kernels.library import Library, Weight

_NUMPY: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.I32: np.dtype(np.int32),
    GGMLQuantizationType.I64: np.dtype(np.int64),
}


class Tensor:
    """A ggml tensor: its pointer, and what Python needs to know of it without asking C.

    ``shape`` is in ggml order (fastest first) and has as many dimensions as were given. ``packed``
    is the same matrix in the layout of our own kernels, where there is one for it. ``where`` is the
    device of a weight, None for what a graph makes. ``array`` is the memory of a graph's input,
    once it has some, in the shape of ``numpy()``.
    """

    __slots__ = ("array", "name", "packed", "pointer", "shape", "strides", "type", "where")

    def __init__(
        self,
        pointer: Any,
        type: GGMLQuantizationType,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        name: str = "",
        where: int | None = None,
    ) -> None:
        self.pointer, self.type, self.shape, self.name = pointer, type, shape, name
        self.where = where
        self.packed: Packed | None = None
        self.array: np.ndarray[Any, Any] | None = None
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
        if ggml.ggml_backend_buffer_is_host(self.pointer.contents.buffer):
            ggml.ggml_backend_tensor_memset(self.pointer, 0, offset, length)
        else:  # not every device can, a worker among them; ggml aborts where one cannot
            self.write(bytes(length), offset)

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy as an array; the shape is reversed, slowest first, as numpy has it."""
        return np.frombuffer(self.read(), _NUMPY[self.type]).reshape(self.shape[::-1])

    def map(self) -> None:
        """Make ``array`` of its memory, which must be the host's; None without any, or a dtype."""
        self.array = None
        if self.allocated and self.type in _NUMPY:
            assert ggml.ggml_backend_buffer_is_host(self.pointer.contents.buffer), self
            memory = (ctypes.c_uint8 * self.nbytes).from_address(self.pointer.contents.data)
            flat = np.frombuffer(memoryview(memory), _NUMPY[self.type])
            self.array = flat.reshape(self.shape[::-1])

    def numpy_row(self, row: int) -> np.ndarray[Any, Any]:
        """A copy of one row of a matrix."""
        size = self.strides[1]
        return np.frombuffer(self.read(row * size, size), _NUMPY[self.type])


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix [k, m] or experts [k, m, n_expert] in our kernels' layout, in ``tensor``'s bytes."""

    weight: Weight
    tensor: Tensor


def contiguous_strides(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Bytes from one element (block, for quantized types) or row to the next."""
    block, size = GGML_QUANT_SIZES[kind]
    strides = [size, shape[0] // block * size]
    for n in shape[1:]:
        strides.append(strides[-1] * n)
    return tuple(strides[: len(shape)])


def tensor_offsets() -> tuple[int, int, int, int]:
    """Where ggml's tensors have their data, ne, nb and src, in bytes: our own kernels read them."""
    kind = ggml.ggml_tensor
    return kind.data.offset, kind.ne.offset, kind.nb.offset, kind.src.offset


def address(view: memoryview) -> int:
    """Where the first byte of a buffer lies."""
    return int(np.frombuffer(view, np.uint8).ctypes.data)


class Device:
    """The backends a model computes on, with the scheduler that spreads a graph over them.

    ``found`` are the devices in use besides the CPU, preferred first; where a tensor lies or a
    node runs is said by its index among them, ``host`` being that of the CPU. With none of them
    all is on the host (``on_host``), with BLAS in front of it where ggml was built with it and
    ``trusts`` it by its name. ``kernels`` are our own, which graphs use on the host. ``names`` are
    the backends in use. Raises DeviceError where one does not start. Free with ``close()``.
    """

    def __init__(
        self,
        names: str | Sequence[str] = "auto",
        threads: int | None = None,
        max_nodes: int = 4096,
        kernels: Library | None = None,
        trusts: Callable[[str], bool] = trust.proven,
    ) -> None:
        self.max_nodes = max_nodes  # of one graph
        self.found = backends.choose([names] if isinstance(names, str) else names)
        self._workers = dict.fromkeys(found.worker for found in self.found if found.worker)
        self._closers: list[Callable[[], None]] = [worker.close for worker in self._workers]
        self.host = len(self.found)
        self.on_host = not self.found
        self.kernels = kernels
        self.threads = threads_for(threads)
        self.cpu = ggml.ggml_backend_dev_by_type(ggml.GGML_BACKEND_DEVICE_TYPE_CPU)
        self._lost = ""  # why nothing is to be computed any more
        self.current: object = None  # the graph whose tensors have memory now
        self.compute_bytes = 0  # for the intermediate tensors of graphs, when last some were taken
        try:
            self.backends = self._start(trusts)
        except BaseException:
            self.close()
            raise
        self.scheduler = self._schedule()
        self._closers.append(self._free_scheduler)
        # For the inputs of graphs, on each device.
        self.rooms = [Room(each.buffer_type, each.name, self.check) for each in self.found]
        self._closers += [room.close for room in self.rooms]
        self.names = [self._backend_name(index) for index in range(len(self.backends))]

    def _start(self, trusts: Callable[[str], bool]) -> list[Any]:
        started = [self._open(found.pointer, found.name) for found in self.found]
        faster = backends.accelerator() if self.on_host else None
        if faster and trusts(faster[0]):
            started.append(self._open(faster[1], "accel"))
        started.append(self._open(self.cpu, backends.HOST))
        for backend in started:
            self._set_threads(backend)
        return started

    def _open(self, device: Any, name: str) -> Any:
        backend = backends.start(device, name)
        self._closers.append(lambda: ggml.ggml_backend_free(backend))
        return backend

    def _set_threads(self, backend: Any) -> None:
        registry = ggml.ggml_backend_dev_backend_reg(ggml.ggml_backend_get_device(backend))
        function = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        if function:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(function)(backend, self.threads)

    def _schedule(self) -> Any:
        count = len(self.backends)
        pointers = (ggml.ggml_backend_t_ctypes * count)(*self.backends)
        types = None
        if not self.on_host:
            # The CPU's own memory, not what a driver reads directly: Vulkan's copies from there
            # while the CPU goes on, and writes its next result over what is still to be copied.
            each = [self.buffer_type(i) for i in range(count)]
            types = (ggml.ggml_backend_buffer_type_t_ctypes * count)(*each)
        return ggml.ggml_backend_sched_new(pointers, types, count, self.max_nodes, False, False)

    def _free_scheduler(self) -> None:
        ggml.ggml_backend_sched_free(self.scheduler)

    def buffer_type(self, index: int) -> Any:
        """In which the tensors of a device lie."""
        if index < self.host:
            return self.found[index].buffer_type
        return ggml.ggml_backend_dev_buffer_type(self.cpu)

    def name(self, index: int) -> str:
        """Of a device, as it is asked for."""
        return self.found[index].name if index < self.host else backends.HOST

    def _backend_name(self, index: int) -> str:
        if index < self.host and self.found[index].worker:  # ggml's tells of the relay
            return self.found[index].name
        return str(ggml.ggml_backend_name(self.backends[index]).decode())

    def supports(self, index: int, node: Any) -> bool:
        """Whether a device can compute an operation; ``node`` is ggml's pointer to its result.

        Yes, where that is not known (``knows``): a worker ends at what its GPU lacks.
        """
        judge = self.found[index].judge if index < self.host else self.cpu
        return judge is None or bool(ggml.ggml_backend_dev_supports_op(judge, node))

    def knows(self, index: int) -> bool:
        """Whether it is known what a device can compute: of a worker's, of its CPU alone."""
        return index == self.host or self.found[index].judge is not None

    def check(self) -> None:
        """LostError if a device was lost, so that what it computed means nothing."""
        for worker in self._workers:
            worker.check()
        if self._lost:
            raise LostError(self._lost)

    def abandon(self) -> None:
        """Wait for no worker any more, from any thread; ``check`` raises LostError from then on."""
        for worker in self._workers:
            worker.abandon()

    def fail(self, reason: str) -> NoReturn:
        """Raise for a graph that a backend could not compute: the devices are not used after it."""
        self.check()
        if self.on_host:
            raise DeviceError(f"the CPU failed to compute: {reason}")
        names = ", ".join(found.name for found in self.found)
        self._lost = f"a step failed on {names}: {reason}"
        raise LostError(self._lost)

    def reserve(self, graph: Any) -> None:
        """Take the memory that a graph of ggml's needs beyond what the scheduler holds.

        A graph that is given memory without this ends the process where there is none. Raises
        OutOfMemoryError, and nothing is held then; LostError.
        """
        free, held = free_memory(), self.compute_sizes()
        there = ggml.ggml_backend_sched_reserve(self.scheduler, graph)
        self.check()  # one that is lost gives whatever is asked for
        sizes = self.compute_sizes()
        more = sum(sizes[self.host :]) - sum(held[self.host :])  # on the host, not touched yet
        if not there or (free is not None and more > free):
            full = self.host if there else min(sizes.index(0), self.host)
            self._empty()
            raise OutOfMemoryError(
                f"no memory on {self.name(full)} for intermediate results; "
                "take a smaller chunk or context, fewer slots or fewer gpu_layers"
            )
        self.compute_bytes = sum(sizes) + sum(room.nbytes for room in self.rooms)

    def _empty(self) -> None:
        """Let the scheduler hold nothing.

        A graph without nodes first: ggml would free twice what backends shared when one got none.
        """
        context = ggml.ggml_init(ggml.ggml_init_params(1 << 16, None, True))
        nothing = ggml.ggml_new_graph_custom(context, 1, False)
        ggml.ggml_backend_sched_reserve(self.scheduler, nothing)
        ggml.ggml_free(context)
        self._renew()

    def _renew(self) -> None:
        self._free_scheduler()
        self.current = None
        self.scheduler = self._schedule()

    def grow(self, nodes: int) -> bool:
        """Make room for graphs of so many nodes; True where that took what had been reserved.

        The graph that has memory now loses it then.
        """
        if nodes <= self.max_nodes:
            return False
        self.max_nodes = 1 << (nodes - 1).bit_length()
        self._renew()
        return True

    def compute_sizes(self) -> list[int]:
        """Bytes the scheduler holds on each backend now."""
        size = ggml.ggml_backend_sched_get_buffer_size
        return [int(size(self.scheduler, backend)) for backend in self.backends]

    def close(self) -> None:
        """Free scheduler and backends; no graph may be used afterwards."""
        while self._closers:
            self._closers.pop()()
