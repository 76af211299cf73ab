"""The inputs of a graph as its devices read them: all in one buffer of each, one copy a step.

Left to itself, ggml's scheduler copies every input apart, and waits for the device before each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import ggml
import numpy as np
from gguf.constants import GGMLQuantizationType

from gemloom.ggml.device import Device, Tensor
from gemloom.ggml.input_buffer import Room

_I8 = int(GGMLQuantizationType.I8)


class Upload:
    """Inputs that a graph's nodes read on one device. Free with ``close()``, the graph first."""

    def __init__(self, room: Room, inputs: Sequence[Tensor]) -> None:
        """``copies`` are those on the device, in the order of ``inputs``."""
        count = len(inputs) + 1
        params = ggml.ggml_init_params(count * ggml.ggml_tensor_overhead(), None, True)
        self._context = ggml.ggml_init(params)
        self._room, self.inputs = room, inputs
        self.copies = [_like(self._context, each) for each in inputs]
        self._places = [0]
        for copy in self.copies:
            self._places.append(self._places[-1] + room.size_of(copy))
        size = self._places[-1]
        self._all = ggml.ggml_new_tensor_1d(self._context, _I8, size)
        self._bytes = np.zeros(size, np.uint8)

    def settle(self) -> None:
        """Give the copies memory, which another graph's may have had since. OutOfMemoryError."""
        self._room.grow(self._bytes.nbytes)
        buffer = self._room.buffer
        base = int(ggml.ggml_backend_buffer_get_base(buffer))
        for tensor, place in zip((self._all, *self.copies), (0, *self._places), strict=False):
            tensor.contents.buffer = tensor.contents.data = None
            ggml.ggml_backend_tensor_alloc(buffer, tensor, base + place)

    def send(self) -> None:
        """Copy the inputs, as they are now, to the device."""
        for tensor, place in zip(self.inputs, self._places, strict=False):
            assert tensor.array is not None, tensor
            self._bytes[place : place + tensor.nbytes] = tensor.array.reshape(-1).view(np.uint8)
        ggml.ggml_backend_tensor_set(self._all, self._bytes.ctypes.data, 0, self._bytes.nbytes)

    def close(self) -> None:
        """Free the tensors; their memory is the device's room."""
        ggml.ggml_free(self._context)


def _like(context: Any, tensor: Tensor) -> Any:
    sizes = (ctypes.c_int64 * len(tensor.shape))(*tensor.shape)
    copy = ggml.ggml_new_tensor(context, int(tensor.type), len(tensor.shape), sizes)
    ggml.ggml_set_name(copy, tensor.name.encode())
    return copy


def uploads(
    device: Device, graph: Any, inputs: Sequence[Tensor], pins: Sequence[tuple[Any, int]]
) -> Iterator[Upload]:
    """Let the nodes that run on devices read copies there; ``pins`` are nodes and their devices.

    Inputs of which they read a view are left to the scheduler.
    """
    known = {ctypes.addressof(each.pointer.contents): each for each in inputs}
    for index in range(device.host):
        nodes = (node for node, place in pins if place == index)
        reads = [read for node in nodes for read in _reads(node) if read[2] in known]
        if not reads:
            continue
        read = list(dict.fromkeys(source for _, _, source in reads))
        upload = Upload(device.rooms[index], [known[source] for source in read])
        copies = dict(zip(read, upload.copies, strict=True))
        for copy in copies.values():  # ggml sizes its tables by what it knows to be in a graph
            ggml.ggml_build_forward_expand(graph, copy)
        for node, which, source in reads:
            node.contents.src[which] = copies[source]
        yield upload


def _reads(node: Any) -> Iterator[tuple[Any, int, int]]:
    """Of every source of a node: the node, the source's number and its address."""
    for which, source in enumerate(takewhile(bool, node.contents.src)):
        yield node, which, ctypes.addressof(source.contents)
