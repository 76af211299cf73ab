"""Which form a tensor's bytes get on the host, and so what memory of its own they take.

Packed for our own kernels, in a layout of the CPU's own, in place in the file's pages, or copied.
``weights.py`` makes what is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGMLQuantizationType

from gemloom.files.gguf import GGUF, TensorInfo, nbytes
from gemloom.ggml.arena import ALIGNMENT
from gemloom.ggml.device import Device, address
from gemloom.ggml.joining import can_join
from gemloom.ggml.repacking import Repacking
from gemloom.kernels import packed_file
from gemloom.kernels.packing import PackingPlan
from gemloom.models.layout import Layout
from gemloom.models.tensor_names import PER_LAYER_TABLE
from gemloom.options import Options


@dataclass(frozen=True, slots=True)
class Own:
    """Bytes of memory that are no pages of a file, by tensor, for those that are on the host."""

    packed: Mapping[str, int]
    copied: Mapping[str, int]
    mapped: int  # bytes that are pages of a file

    def of(self, name: str) -> int:
        """Of one tensor, in both forms."""
        return self.packed.get(name, 0) + self.copied.get(name, 0)


class Homes:
    """Decides for each tensor that is on the host."""

    def __init__(self, device: Device, layout: Layout, options: Options) -> None:
        self._own, self._layout, self._options = device.kernels, layout, options
        self._repacking = Repacking(device)

    def serves(self, info: TensorInfo) -> bool:
        """Whether our own kernels can multiply with this tensor."""
        whole = info.name not in self._layout.sliced or info.name == self._layout.head
        return bool(self._own and whole and self._own.serves(info.type, info.shape[0]))

    def better(self, info: TensorInfo, shape: tuple[int, ...]) -> Any:
        """The buffer type of the CPU's own layout for this tensor; None where it has none."""
        if self._options.kernels == "plain" or info.name in self._layout.sliced:
            return None
        return self._repacking.buffer_type(kind_of(info, shape), shape)

    def in_place(self, info: TensorInfo, shape: tuple[int, ...]) -> bool:
        """Whether the bytes can be used where they are, other than by our own kernels."""
        if not self._options.mmap or kind_of(info, shape) != info.type or self.better(info, shape):
            return False
        pieces = info.blob.in_memory(info.offset, info.nbytes)
        if not pieces or address(pieces[0]) % alignment(info.name):
            return False
        return len(pieces) == 1 or can_join(info.blob, info.offset, info.nbytes)

    def plan(self, file: GGUF, which: Callable[[TensorInfo], bool]) -> PackingPlan | None:
        """Where such matrices are packed to; None where there are none."""
        chosen = [
            (file.tensors[name], shape)
            for name, shape in self._layout.required.items()
            if name in file.tensors and which(file.tensors[name])
        ]
        return PackingPlan(self._own, chosen) if self._own and chosen else None

    def own(self, file: GGUF) -> Own:
        """The memory that they will take, if all are on the host."""
        plan, mapped = self.plan(file, self.serves), 0
        packed = {matrix.info.name: matrix.nbytes for matrix in plan.matrices} if plan else {}
        if plan and self._kept(plan):
            mapped, packed = sum(packed.values()), {}
        copied = {}
        for name, shape in self._layout.required.items():
            info = file.tensors.get(name)
            if info is None or not self._needs_plain(info):
                continue
            if self.in_place(info, shape):
                mapped += info.nbytes
            else:
                copied[name] = nbytes(kind_of(info, shape), shape)
        return Own(packed, copied, mapped)

    def _needs_plain(self, info: TensorInfo) -> bool:
        return info.name in self._layout.sliced or not self.serves(info)

    def _kept(self, plan: PackingPlan) -> bool:
        """Whether the packed bytes are pages of a file beside the model, or will be."""
        options = self._options
        there = options.mmap and options.packed != "off" and packed_file.is_there(plan)
        return there or (options.packed == "keep" and packed_file.can_keep(plan))


def alignment(name: str) -> int:
    """Of the addresses at which a tensor can be used in place."""
    # Rows of the per-layer table are copied out by get_rows, which takes any address.
    return 4 if name == PER_LAYER_TABLE else ALIGNMENT


def kind_of(info: TensorInfo, shape: tuple[int, ...]) -> GGMLQuantizationType:
    """The type a tensor gets: the file's, but f32 for vectors, which are small."""
    return GGMLQuantizationType.F32 if len(trimmed(shape)) == 1 else info.type


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without trailing dimensions of 1, which files may have or not."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
