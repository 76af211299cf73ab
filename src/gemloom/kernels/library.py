"""The native library: which kernels this processor can run, packing, and their operations.

ctypes ends here. What the bytes of a packed matrix mean is drawn in ``native/types.h``.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from gemloom.ggml import trust
from gemloom.ggml.device import tensor_offsets
from gemloom.kernels.build import NAME

TYPES = {  # as enum Type in types.h; and the columns that one block of it has
    GGMLQuantizationType.Q4_0: (0, 32),
    GGMLQuantizationType.Q8_0: (1, 32),
    GGMLQuantizationType.TQ2_0: (2, 256),
    GGMLQuantizationType.Q4_K: (3, 256),
    GGMLQuantizationType.Q5_K: (4, 256),
    GGMLQuantizationType.Q6_K: (5, 256),
}
GROUP = 64  # rows that are packed together

_log = logging.getLogger("gemloom.kernels")


class Weight(ctypes.Structure):
    """A matrix [k, m] of one type, or several behind one another: struct Weight of library.cpp."""

    _fields_ = [("type", ctypes.c_int64), ("k", ctypes.c_int64), ("m", ctypes.c_int64)]

    def __init__(self, kind: GGMLQuantizationType, k: int, m: int) -> None:
        super().__init__(TYPES[kind][0], k, m)

    @property
    def groups(self) -> int:
        """Groups of rows, which may be packed apart."""
        return -(-int(self.m) // GROUP)


class Call(ctypes.Structure):
    """What an operation gets from ggml: which kernels compute it, and its own structure."""

    _fields_ = [("kernels", ctypes.c_void_p), ("data", ctypes.c_void_p)]

    def __init__(self, kernels: int, data: Any = None) -> None:
        super().__init__(kernels, None if data is None else ctypes.addressof(data))
        self._kept = data  # as long as this


class Attention(ctypes.Structure):
    """How attention is computed: struct Attention of library.cpp."""

    _fields_ = [
        ("scale", ctypes.c_float), ("halves", ctypes.c_int32), ("parts", ctypes.c_void_p),
        ("done", ctypes.c_int32),
    ]  # fmt: skip


class DeltaStretch(ctypes.Structure):
    """Rows of a graph that have one adapter, and its factors for a matrix: as in library.cpp."""

    _fields_ = [
        ("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("scale", ctypes.c_void_p),
        ("first", ctypes.c_int64), ("count", ctypes.c_int64), ("rank", ctypes.c_int64),
        ("b_stride", ctypes.c_int64), ("halves", ctypes.c_int64),
    ]  # fmt: skip


class Stretches(ctypes.Structure):
    """All stretches of a product: as in library.cpp."""

    _fields_ = [("count", ctypes.c_int64), ("all", ctypes.POINTER(DeltaStretch))]

    def __init__(self, all: Sequence[DeltaStretch]) -> None:
        super().__init__(len(all), (DeltaStretch * len(all))(*all))


class Packing(ctypes.Structure):
    """A matrix to pack, and the addresses from which and to which: struct Packing."""

    _fields_ = [("weight", Weight), ("source", ctypes.c_void_p), ("target", ctypes.c_void_p)]


class Packings:
    """Matrices that several threads pack together, each of which calls ``run`` once.

    That is all one call, so they do not have to wait for the interpreter in between.
    """

    def __init__(self, native: ctypes.CDLL, matrices: Sequence[tuple[Weight, int, int]]) -> None:
        self._native, self.count = native, len(matrices)
        self._matrices = (Packing * self.count)(*(Packing(*matrix) for matrix in matrices))
        self._next = ctypes.c_int64(0)

    def run(self) -> None:
        """Pack until all are packed or being packed by other threads."""
        self._native.gemloom_pack_all(self._matrices, self.count, ctypes.byref(self._next))

    def begun(self) -> int:
        """How many were begun, by any thread."""
        return min(self._next.value, self.count)

    def stop(self) -> None:
        """Begin no more."""
        self._next.value = self.count


class Library:
    """The kernels of one instruction set, named ``name``; ``table`` is where their table lies."""

    def __init__(self, native: ctypes.CDLL, index: int, name: str) -> None:
        self._native, self.name = native, name
        native.gemloom_kernels.restype = ctypes.c_void_p
        self.table = int(native.gemloom_kernels(index))
        native.gemloom_activation_bytes.restype = ctypes.c_int64
        native.gemloom_activation_bytes.argtypes = [ctypes.c_int64]
        native.gemloom_packed_bytes.restype = ctypes.c_int64
        native.gemloom_packed_bytes.argtypes = [ctypes.POINTER(Weight)]
        native.gemloom_pack.restype = None
        numbers = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        native.gemloom_pack.argtypes = [ctypes.POINTER(Weight), *numbers]
        native.gemloom_pack_all.restype = None
        native.gemloom_pack_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]

    def serves(self, kind: GGMLQuantizationType, k: int) -> bool:
        """Whether there is a kernel for weights of this type with rows of k columns."""
        return kind in TYPES and k % TYPES[kind][1] == 0

    def activation_bytes(self, k: int) -> int:
        """Bytes of k activations in 8 bits, with their scales."""
        return int(self._native.gemloom_activation_bytes(k))

    def packed_bytes(self, weight: Weight) -> int:
        """Bytes of one packed matrix."""
        return int(self._native.gemloom_packed_bytes(weight))

    def pack(self, weight: Weight, source: int, target: int, first: int, last: int) -> None:
        """Pack groups ``first`` to ``last`` of the matrix at one address to another."""
        self._native.gemloom_pack(weight, source, target, first, last)

    def packings(self, matrices: Sequence[tuple[Weight, int, int]]) -> Packings:
        """Matrices, with the addresses they are at and go to, for several threads to pack."""
        return Packings(self._native, matrices)

    def address(self, operation: str) -> int:
        """Where the function of a ggml operation is, such as "product"; it wants a ``call``."""
        function = getattr(self._native, f"gemloom_{operation}")
        return int(ctypes.cast(function, ctypes.c_void_p).value or 0)

    def call(self, data: Any = None) -> Call:
        """What ggml has to hand to an operation of these kernels: ``data`` is a structure."""
        return Call(self.table, data)


@cache
def supported() -> tuple[Library, ...]:
    """The kernels that this processor can run, fastest first; none where none were built."""
    path = Path(__file__).with_name(NAME)
    try:
        native = ctypes.CDLL(os.fspath(path))
        name_of: Any = native.gemloom_supported
        native.gemloom_set_offsets((ctypes.c_int64 * 4)(*tensor_offsets()))
    except (OSError, AttributeError) as error:
        _log.info("no kernels of our own: %s", error)
        return ()
    name_of.restype = ctypes.c_char_p
    names: list[str] = []
    while name := name_of(len(names)):
        names.append(name.decode())
    return tuple(Library(native, i, name) for i, name in enumerate(names))


def fastest() -> Library | None:
    """The first of them that was not found wrong on this machine (``ggml/trust.py``)."""
    return next((library for library in supported() if not trust.refuted(library.name)), None)
