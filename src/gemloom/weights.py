"""A file's tensors as ggml tensors under their GGUF names; strict both ways.

Bytes are used in place where one buffer holds them aligned, and copied, tensor by
tensor, where not. Nothing is computed here but the widening of small f16/bf16 vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from gemloom.errors import TensorError
from gemloom.ggml.device import ALIGNMENT, Arena, Device, Tensor
from gemloom.gguf import GGUF, TensorInfo, nbytes

F32 = GGMLQuantizationType.F32
_FLOATS = {F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
# Quantized forms that ggml gives activations; it cannot multiply with weights of these types.
_ACTIVATIONS = {GGMLQuantizationType.Q8_1, GGMLQuantizationType.Q8_K}
# Vision and audio parts that some makers keep in the same file; this is a text runtime.
_OTHER_MODALITIES = ("v.", "a.", "mm.", "model.vision", "model.audio")
FIRST_BYTES = 256
PER_LAYER_TABLE = "per_layer_token_embd.weight"


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors an architecture wants: name -> shape (ggml order), and how it uses some."""

    required: Mapping[str, tuple[int, ...]]
    ignored: frozenset[str] = frozenset()
    sliced: frozenset[str] = frozenset()  # not only multiplied whole: read by row or in slices


class Weights:
    """All tensors of a model. ``close()`` frees them."""

    def __init__(
        self, device: Device, file: GGUF, layout: Layout, *, in_place: bool, repack: bool
    ) -> None:
        """Check the file against ``layout`` and give every tensor its bytes.

        With ``in_place`` False everything is copied, and the file may go away afterwards. With
        ``repack`` True matrices are copied into the layout that this CPU's kernels like best, if
        there is one for their type.
        Raises TensorError, before anything is allocated, for a tensor that is missing, extra,
        of another shape or of a type that cannot be used.
        """
        self.ignored = check(file, layout)
        self._arenas: dict[Any, Arena] = {}  # by buffer type; None: the CPU's own
        self._tensors: dict[str, Tensor] = {}
        self.first_bytes: dict[str, bytes] = {}  # of each, as in the file; to tell models apart
        self.bytes_mapped = 0
        self._device, self._layout = device, layout
        try:
            self._fill(file, in_place, repack)
        except BaseException:
            self.close()
            raise
        self.bytes, self.per_layer_bytes = planned_bytes(file, layout)

    def _fill(self, file: GGUF, in_place: bool, repack: bool) -> None:
        copies: list[TensorInfo] = []
        whole: set[str] = set()  # those that cannot be written piece by piece
        for name, shape in self._layout.required.items():
            info = file.tensors[name]
            kind = _kind(info, shape)
            packed = None
            if repack and name not in self._layout.sliced:
                packed = self._device.repacked(kind, shape)
            if packed not in self._arenas:
                count = len(self._layout.required)
                self._arenas[packed] = Arena(self._device, count, packed, weights=True)
            self._tensors[name] = self._arenas[packed].tensor(name, kind, shape)
            if packed or kind != info.type:
                whole.add(name)
            if packed or not in_place or not self._map(info):
                copies.append(info)
        for arena in self._arenas.values():
            arena.allocate("the weights")
        self._copy_all(copies, whole)
        file.finish()

    def _copy_all(self, infos: list[TensorInfo], whole: set[str]) -> None:
        """Copy in the order of the file, with as many readers as it bears: a stream has one."""
        infos.sort(key=lambda info: info.offset)
        readers = {info.blob.readers or self._device.threads for info in infos}
        if 1 in readers:  # here and not in a thread: what makes the parts may care
            for info in infos:
                self._copy(info, info.name in whole)
        elif readers:
            with ThreadPoolExecutor(max(readers)) as pool:
                list(pool.map(lambda info: self._copy(info, info.name in whole), infos))

    def _copy(self, info: TensorInfo, whole: bool) -> None:
        tensor = self._tensors[info.name]
        first, at = b"", 0
        for piece in [info.data()] if whole else info.pieces():
            first += bytes(piece[: FIRST_BYTES - len(first)])
            data: Any = piece
            if tensor.type != info.type:
                data = dequantize(np.frombuffer(piece, np.uint8), info.type)
            tensor.write(data, at)
            at += piece.nbytes
            del piece, data  # a stream waits for its next part meanwhile
        self.first_bytes[info.name] = first

    def _map(self, info: TensorInfo) -> bool:
        tensor = self._tensors[info.name]
        if tensor.type != info.type:
            return False
        # Rows of the per-layer table are copied out by get_rows, which takes any address.
        alignment = 4 if info.name == PER_LAYER_TABLE else ALIGNMENT
        place = info.blob.locate(info.offset, info.nbytes)
        if place is None or not self._arenas[None].map(tensor, *place, alignment):
            return False
        self.bytes_mapped += info.nbytes
        self.first_bytes[info.name] = bytes(place[0][place[1] :][: min(FIRST_BYTES, info.nbytes)])
        return True

    @property
    def bytes_copied(self) -> int:
        """Memory of tensors that could not be used in place."""
        return sum(arena.bytes_allocated for arena in self._arenas.values())

    @property
    def bytes_repacked(self) -> int:
        """Of these, memory of matrices in a layout of the CPU's own."""
        return sum(arena.bytes_allocated for kind, arena in self._arenas.items() if kind)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name, or None."""
        return self._tensors.get(name)

    def block(self, index: int) -> dict[str, Tensor]:
        """The tensors of one layer, by their names without ``blk.N.`` and ``.weight``."""
        prefix = f"blk.{index}."
        return {
            name.removeprefix(prefix).removesuffix(".weight"): tensor
            for name, tensor in self._tensors.items()
            if name.startswith(prefix)
        }

    def close(self) -> None:
        """Free the tensors and let go of the file's bytes."""
        for arena in self._arenas.values():
            arena.close()
        self._tensors.clear()


def planned_bytes(file: GGUF, layout: Layout) -> tuple[int, int]:
    """Memory of the weights, and of the per-layer table apart; a missing tensor has none."""
    sizes = {
        name: nbytes(_kind(file.tensors[name], shape), shape)
        for name, shape in layout.required.items()
        if name in file.tensors
    }
    table = sizes.pop(PER_LAYER_TABLE, 0)
    return sum(sizes.values()), table


def check(file: GGUF, layout: Layout) -> tuple[str, ...]:
    """Hold a file against the tensors wanted; returns the names that are not used.

    Raises TensorError naming the first tensor that is missing, extra, misshapen or of a wrong type.
    """
    for name, shape in layout.required.items():
        info = file.tensors.get(name)
        if info is None:
            raise TensorError(f"{file.name}: the tensor {name} is missing")
        if _trim(info.shape) != _trim(shape):
            raise TensorError(
                f"{file.name}: the tensor {name} has the shape {list(info.shape)}, "
                f"not {list(shape)}"
            )
        _check_type(file.name, info)
    extra = [name for name in file.tensors if name not in layout.required]
    for name in extra:
        if name not in layout.ignored and not name.startswith(_OTHER_MODALITIES):
            raise TensorError(
                f"{file.name}: the tensor {name} does not belong to this architecture"
            )
    return tuple(extra)


def _trim(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without trailing dimensions of 1, which files may have or not."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _check_type(name: str, info: TensorInfo) -> None:
    vector = len(_trim(info.shape)) == 1
    quantized = GGML_QUANT_SIZES[info.type][0] > 1
    if info.type not in _FLOATS and (vector or not quantized or info.type in _ACTIVATIONS):
        raise TensorError(
            f"{name}: the tensor {info.name} is of type {info.type.name}, unsupported"
        )


def _kind(info: TensorInfo, shape: tuple[int, ...]) -> GGMLQuantizationType:
    """The type a tensor gets: the file's, but f32 for vectors, which are small."""
    return F32 if len(_trim(shape)) == 1 else info.type
