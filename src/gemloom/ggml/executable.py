"""A compute graph as ggml runs it: its memory, its inputs and outputs, and computing it.

What can be computed in one is in ``graph.py``.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ggml
import numpy as np
from gguf.constants import GGMLQuantizationType

from gemloom.ggml.device import Device, Tensor
from gemloom.ggml.multi_device import Spread

if TYPE_CHECKING:
    from gemloom.kernels.library import Library

F32 = GGMLQuantizationType.F32


class GraphFullError(Exception):
    """A graph has more nodes than it was made for; ggml would end the process."""


class Executable:
    """A graph that is built once and computed as often as its shapes fit.

    ``taps`` are names of intermediates to keep; after ``compute()`` they are in ``tapped``. Where
    one is a weight's name and SUMS, that is the sum over rows of the squares of what the weight is
    multiplied with: [k, 1]; for experts [k, n_expert], and under IDS which of them each row met.
    At most ``max_nodes`` tensors can be made: GraphFullError comes from the method that would make
    one more. Free with ``close()``.
    """

    def __init__(self, device: Device, max_nodes: int, taps: Collection[str] = ()) -> None:
        assert max_nodes <= device.max_nodes, (max_nodes, device.max_nodes)
        self._device = device
        size = (max_nodes + 64) * ggml.ggml_tensor_overhead()
        size += ggml.ggml_graph_overhead_custom(max_nodes, False)
        self._memory = ggml.ggml_init(ggml.ggml_init_params(size, None, True))
        self._graph = ggml.ggml_new_graph_custom(self._memory, max_nodes, False)
        self._left = max_nodes  # tensors that can still be made
        self._taps = frozenset(taps)
        self.tapped: dict[str, Tensor] = {}
        self.threads = device.threads
        self._made: dict[tuple[str, int], Tensor] = {}
        self._kept: list[Any] = []
        self._inputs: list[Tensor] = []
        self._constants: list[tuple[Tensor, np.ndarray[Any, Any]]] = []
        self.names: list[str] = []
        self._built: bytes | None = None  # its memory before the scheduler changed it
        self._spreading = None if device.on_host else Spread(device, self._memory, self._graph)

    @property
    def fallbacks(self) -> Counter[str]:
        """Nodes that a device lacks, by operation."""
        return self._spreading.fallbacks if self._spreading else Counter()

    @property
    def _context(self) -> Any:
        """ggml's memory, for one more tensor."""
        self._left -= 1
        if self._left < 0:
            raise GraphFullError
        return self._memory

    @property
    def nbytes(self) -> int:
        """Memory of its descriptions, without what it computes in."""
        return int(ggml.ggml_used_mem(self._memory)) + len(self._built or b"")

    @property
    def place(self) -> int:
        """The device of what is made now."""
        return self._spreading.marks.now if self._spreading else self._device.host

    @property
    def kernels(self) -> Library | None:
        """Our own, if what is made now runs on the host."""
        return self._device.kernels if self.place == self._device.host else None

    # -- inputs, outputs, running ------------------------------------------------------------

    def input(self, name: str, kind: GGMLQuantizationType, *shape: int) -> Tensor:
        """A tensor whose ``array`` is to be written before each ``compute()``."""
        sizes = (ctypes.c_int64 * len(shape))(*shape)
        pointer = ggml.ggml_new_tensor(self._context, int(kind), len(shape), sizes)
        ggml.ggml_set_input(pointer)
        ggml.ggml_set_name(pointer, name.encode())
        self._inputs.append(Tensor(pointer, kind, shape, name=name))
        return self._inputs[-1]

    def constant(self, name: str, values: np.ndarray[Any, Any]) -> Tensor:
        """f32 ``values``, slowest dimension first; read from the array at each ``compute()``."""
        self._constants.append((self.input(name, F32, *values.shape[::-1]), values))
        return self._constants[-1][0]

    def output(self, x: Tensor) -> Tensor:
        """Keep ``x`` so that it can be read after ``compute()``, and compute all it needs.

        Not a view of another tensor: that one's memory would be given away all the same.
        """
        ggml.ggml_set_output(x.pointer)
        self.expand(x)
        return x

    def expand(self, x: Tensor) -> None:
        """Put ``x`` and what it needs into the graph here, before whatever comes later."""
        ggml.ggml_build_forward_expand(self._graph, x.pointer)

    def at(self, index: int) -> None:
        """What is made from now on runs on this device (``Device.found``), while it can."""
        if self._spreading:
            self._spreading.marks.at(index)

    @contextmanager
    def on(self, index: int) -> Iterator[None]:
        """As ``at``, for a while."""
        before = self.place
        self.at(index)
        try:
            yield
        finally:
            self.at(before)

    @contextmanager
    def beside(self, w: Tensor, operation: str) -> Iterator[None]:
        """On the host for a while if w had to stay there, so that it does not travel each time."""
        host = self._device.host
        if not self._spreading or w.where != host or self.place == host:
            yield
            return
        self._spreading.marks.brought[operation] += 1
        with self.on(host):
            yield

    def tapping(self, name: str) -> bool:
        """Whether an intermediate is to be kept; it is listed as one that can be."""
        self.names.append(name)
        return name in self._taps

    def reserve(self) -> None:
        """Let the scheduler take the memory this graph needs.

        OutOfMemoryError where there is none; another graph may have been given less.
        """
        self._begin()
        self._device.reserve(self._graph)

    def allocate(self) -> None:
        """Give every tensor memory, taking it from the graph that had it before. As ``reserve``."""
        if self._device.current is self:
            return
        self.reserve()
        self._begin()
        there = ggml.ggml_backend_sched_alloc_graph(self._device.scheduler, self._graph)
        assert there, "what was reserved is there"
        self._device.current = self
        for tensor in self._inputs:
            tensor.map()

    def _begin(self) -> None:
        """Make the scheduler forget the graph before, and tell it of this one what it must know."""
        self._device.current = None
        ggml.ggml_backend_sched_reset(self._device.scheduler)
        if self._spreading:
            self._spreading.prepare(self._inputs)
        self._restore()
        if self._spreading:
            self._spreading.pin()

    def _restore(self) -> None:
        """Make nodes and tensors what they were before the scheduler first got them.

        It gives them addresses, and where it cuts a graph it changes what nodes read.
        """
        start = ggml.ggml_get_mem_buffer(self._memory)
        if self._built is None:
            self._built = ctypes.string_at(start, ggml.ggml_used_mem(self._memory))
        ctypes.memmove(start, self._built, len(self._built))

    def survey(self) -> tuple[Counter[str], int]:
        """What devices lack of it, by operation, and of how many nodes; needs no memory."""
        return self._spreading.survey() if self._spreading else (Counter(), 0)

    def compute(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Run it; ``allocate()`` and all inputs must have come before. DeviceError if it fails,
        LostError if on a device.

        ``meanwhile`` is called while a device computes: after all was computed on the CPU.
        """
        assert self._device.current is self
        for tensor, values in self._constants:
            if tensor.array is not None:  # else no node reads it
                tensor.array[...] = values
        if self._spreading:
            self._spreading.send()
        scheduler = self._device.scheduler
        status = ggml.ggml_backend_sched_graph_compute_async(scheduler, self._graph)
        try:
            meanwhile()
        finally:
            ggml.ggml_backend_sched_synchronize(scheduler)
        if status != ggml.GGML_STATUS_SUCCESS:
            self._device.fail(ggml.ggml_status_to_string(status).decode())
        self._device.check()

    def close(self) -> None:
        """Free the graph and its tensors."""
        if self._device.current is self:
            self._device.current = None
        if self._memory:
            ggml.ggml_free(self._memory)
            self._memory = None
            if self._spreading:
                self._spreading.close()
