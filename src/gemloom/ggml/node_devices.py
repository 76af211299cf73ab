"""Which backend each node of a graph runs on, where there are several.

ggml's scheduler would guess from the weights. Instead every node is pinned to the device that the
graph named when the node was made (``Graph.at``). If that device lacks the operation, the node runs
on the CPU. A node that writes into a tensor in place runs where that tensor is. Not used if
everything is on the host.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ggml

from gemloom.errors import DeviceError
from gemloom.ggml.device import Device

_VIEWS = {  # these follow what they are views of
    ggml.GGML_OP_NONE, ggml.GGML_OP_RESHAPE, ggml.GGML_OP_VIEW,
    ggml.GGML_OP_PERMUTE, ggml.GGML_OP_TRANSPOSE,
}  # fmt: skip


class Marks:
    """Ranges of a graph's memory and the device that the nodes in each belong to."""

    def __init__(self, context: Any, first: int) -> None:
        self._context, self._base = context, int(ggml.ggml_get_mem_buffer(context) or 0)
        self._starts, self._places = [0], [first]
        self.brought: Counter[str] = Counter()  # nodes on the host, where a weight had to stay

    @property
    def now(self) -> int:
        """The device of nodes made next."""
        return self._places[-1]

    def at(self, index: int) -> None:
        """Nodes made from now on belong to this device."""
        self._starts.append(self._base + int(ggml.ggml_used_mem(self._context)))
        self._places.append(index)

    def of(self, address: int) -> int:
        """The device of the tensor at this address."""
        return self._places[bisect_right(self._starts, address) - 1]


def pins(device: Device, graph: Any, marks: Marks) -> tuple[list[tuple[Any, int]], Counter[str]]:
    """The device that each node runs on, and counts of nodes that devices lack, by operation.

    DeviceError if a device lacks an operation that writes into one of its tensors in place: that
    one cannot move.
    """
    lacking = marks.brought.copy()
    places: dict[int, int] = {}
    pinned = []
    for node in _nodes(graph):
        address = ctypes.addressof(node.contents)
        index = places.get(_root(node), marks.of(address))
        if index < device.host and not device.supports(index, node):
            name = _name(node)
            if node.contents.view_src:
                raise DeviceError(f"{device.name(index)} cannot {name} in place; use device cpu")
            lacking[name] += 1
            index = device.host
        places[address] = index
        pinned.append((node, index))
    return pinned, lacking


def survey(device: Device, graph: Any, marks: Marks) -> tuple[Counter[str], int]:
    """Counts of the nodes that devices lack, by operation, and of all nodes meant for them."""
    meant = [
        (node, index)
        for node in _nodes(graph)
        if (index := marks.of(ctypes.addressof(node.contents))) < device.host
    ]
    lacking = Counter(_name(node) for node, index in meant if not device.supports(index, node))
    return lacking + marks.brought, len(meant) + marks.brought.total()


def _name(node: Any) -> str:
    """ggml's name of a node's operation."""
    return str(ggml.ggml_op_desc(node).decode().lower())


def _nodes(graph: Any) -> Iterator[Any]:
    for i in range(ggml.ggml_graph_n_nodes(graph)):
        node = ggml.ggml_graph_node(graph, i)
        if node.contents.op not in _VIEWS:
            yield node


def _root(node: Any) -> int:
    """Address of the tensor whose memory a node writes into; 0 if it has its own."""
    source = node.contents.view_src
    return ctypes.addressof(source.contents) if source else 0
