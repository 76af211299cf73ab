"""A graph over several backends: where its nodes run, what they read there, and taking that back.

Not used where all is on the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import ggml

from gemloom.ggml.device import Device, Tensor
from gemloom.ggml.input_upload import Upload, uploads
from gemloom.ggml.node_devices import Marks, pins, survey


class Spread:
    """What ``graph``, built in ``context``, needs there. Free with ``close()``, the graph first.

    ``fallbacks`` are its nodes that a device lacks, by operation, once it has begun.
    """

    def __init__(self, device: Device, context: Any, graph: Any) -> None:
        self._device, self._graph = device, graph
        self.marks = Marks(context, 0)
        self.fallbacks: Counter[str] = Counter()
        self.uploads: list[Upload] = []
        self._pins: list[tuple[Any, int]] | None = None  # nodes and where they run

    def prepare(self, inputs: Sequence[Tensor]) -> None:
        """Find out where nodes run, once, and give inputs room."""
        if self._pins is None:
            found, self.fallbacks = pins(self._device, self._graph, self.marks)
            self.uploads += uploads(self._device, self._graph, inputs, found)
            self._pins = found
        for upload in self.uploads:
            upload.settle()

    def pin(self) -> None:
        """Tell the scheduler, which knows nothing of the graph yet, where nodes run."""
        for node, index in self._pins or ():
            backend = self._device.backends[index]
            ggml.ggml_backend_sched_set_tensor_backend(self._device.scheduler, node, backend)

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
