"""A graph over several backends: where its nodes run, what they read there, and taking that back.

Not used where all is on the host.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ggml

from gemloom.ggml.device import Device, Tensor
from gemloom.ggml.pinning import Marks, pins, survey
from gemloom.ggml.uploads import Upload, uploads


class Spread:
    """What ``graph``, built in ``context``, needs there. Free with ``close()``, the graph first.

    ``fallbacks`` are its nodes that a device lacks, by operation, once it has begun.
    """

    def __init__(self, device: Device, context: Any, graph: Any) -> None:
        self._device, self._context, self._graph = device, context, graph
        self.marks = Marks(context, 0)
        self.fallbacks: Counter[str] = Counter()
        self.uploads: list[Upload] = []
        self._pins: list[tuple[Any, int]] | None = None  # nodes and where they run
        self._built: bytes | None = None  # its memory before the scheduler cut it

    def begin(self, inputs: Sequence[Tensor]) -> None:
        """Tell the scheduler, which knows nothing of it yet, where nodes run, and give inputs room.

        Where it cuts a graph it changes what nodes read, so that is put back first.
        """
        if self._pins is None:
            found, self.fallbacks = pins(self._device, self._graph, self.marks)
            self.uploads += uploads(self._device, self._graph, inputs, found)
            self._pins = found
        for upload in self.uploads:
            upload.settle()
        self._restore()
        for node, index in self._pins:
            backend = self._device.backends[index]
            ggml.ggml_backend_sched_set_tensor_backend(self._device.scheduler, node, backend)

    def _restore(self) -> None:
        """Make nodes and tensors what they were when this was called first."""
        start = ggml.ggml_get_mem_buffer(self._context)
        if self._built is None:
            self._built = ctypes.string_at(start, ggml.ggml_used_mem(self._context))
        ctypes.memmove(start, self._built, len(self._built))

    def send(self) -> None:
        """Copy the inputs to the devices, as they are now."""
        for upload in self.uploads:
            upload.send()

    def survey(self) -> tuple[Counter[str], int]:
        """What devices lack of it, by operation, and of how many nodes; needs no memory."""
        return survey(self._device, self._graph, self.marks)

    def close(self) -> None:
        """Free what is not the graph's own."""
        while self.uploads:
            self.uploads.pop().close()
