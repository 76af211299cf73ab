"""A file's tensors as ggml tensors under their GGUF names; strict both ways.

Bytes are used in place where one buffer holds them aligned, and copied, tensor by
tensor, where not. Nothing is computed here but the widening of small f16/bf16 vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from gemloom.errors import TensorError
from gemloom.ggml.device import ALIGNMENT, Arena, Device, Tensor
from gemloom.gguf import GGUF, TensorInfo, nbytes
from gemloom.kernels import packed_file
from gemloom.kernels.operations import I8, Packed
from gemloom.kernels.packing import Matrix, Plan, Progress
from gemloom.options import Options

F32 = GGMLQuantizationType.F32
_FLOATS = {F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
# Quantized forms that ggml gives activations; it cannot multiply with weights of these types.
_ACTIVATIONS = {GGMLQuantizationType.Q8_1, GGMLQuantizationType.Q8_K}
# Vision and audio parts that some makers keep in the same file; this is a text runtime.
_OTHER_MODALITIES = ("v.", "a.", "mm.", "model.vision", "model.audio")
PER_LAYER_TABLE = "per_layer_token_embd.weight"


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors an architecture wants: name -> shape (ggml order), and how it uses some."""

    required: Mapping[str, tuple[int, ...]]
    ignored: frozenset[str] = frozenset()
    sliced: frozenset[str] = frozenset()  # not only multiplied whole: read by row or in slices
    head: str = ""  # of these, the one that is multiplied whole as well


class Weights:
    """All tensors of a model. ``close()`` frees them."""

    def __init__(
        self,
        device: Device,
        file: GGUF,
        layout: Layout,
        options: Options,
        progress: Progress | None = None,
    ) -> None:
        """Check the file against ``layout`` and give every tensor its bytes.

        With ``options.mmap`` False everything is copied, and the file may go away afterwards;
        ``kernels`` decides which matrices are copied into another layout, and ``packed`` whether
        that comes from a file or goes to one. ``progress`` is told how far packing is.
        Raises TensorError, before anything is allocated, for a tensor that is missing, extra,
        of another shape or of a type that cannot be used.
        """
        self.ignored = check(file, layout)
        self._arenas: dict[Any, Arena] = {}  # by buffer type; None: the CPU's own
        self._tensors: dict[str, Tensor] = {}
        self.bytes_mapped = 0
        self.bytes_packed = 0  # of matrices in the layout of our own kernels, mapped or copied
        self._device, self._layout, self._in_place = device, layout, options.mmap
        self._repack = options.kernels != "plain"
        self._jobs: list[Callable[[], None]] = []
        try:
            self._fill(file)
            self._pack(file, options, progress)
        except BaseException:
            self.close()
            raise
        self.bytes, self.per_layer_bytes = planned_bytes(file, layout)

    def _fill(self, file: GGUF) -> None:
        for name, shape in self._layout.required.items():
            info = file.tensors[name]
            if not self._packs(info) or name in self._layout.sliced:
                self._place(info, shape)
        for arena in self._arenas.values():
            arena.allocate("the weights")
        with ThreadPoolExecutor(self._device.threads) as pool:
            list(pool.map(lambda job: job(), self._jobs))
        self._jobs.clear()

    def _packs(self, info: TensorInfo) -> bool:
        """Whether our own kernels multiply with this tensor."""
        whole = info.name not in self._layout.sliced or info.name == self._layout.head
        own = self._device.kernels
        return bool(own and whole and own.serves(info.type, info.shape[0]))

    def _place(self, info: TensorInfo, shape: tuple[int, ...]) -> None:
        """Let a tensor use its bytes where they are, or have them copied."""
        kind, better = _kind(info, shape), None
        if self._repack and info.name not in self._layout.sliced:
            better = self._device.repacked(kind, shape)
        self._tensors[info.name] = self._arena(better).tensor(info.name, kind, shape)
        if better or not self._in_place or not self._map(info):
            self._jobs.append(partial(self._copy, info))

    def _pack(self, file: GGUF, options: Options, progress: Progress | None) -> None:
        """Have the matrices of our own kernels in their layout: from a file, or made anew."""
        own, wanted = self._device.kernels, self._layout.required.items()
        chosen = [(file.tensors[n], shape) for n, shape in wanted if self._packs(file.tensors[n])]
        if not own or not chosen:
            return
        plan, threads, kept = Plan(own, chosen), self._device.threads, None
        if self._in_place and options.packed != "off":
            kept = packed_file.find(plan, threads)
        if kept is None and options.packed == "keep":
            kept = packed_file.keep(plan, threads, progress)
        for matrix, (_, shape) in zip(plan.matrices, chosen, strict=True):
            self._use_packed(matrix, shape, kept)
        if kept is None:
            self._arenas["packed"].allocate("the packed weights")
            plan.pack(self._packed_address, threads, progress)
        self.bytes_packed = plan.nbytes
        self.bytes_mapped += len(kept or b"")

    def _use_packed(self, matrix: Matrix, shape: tuple[int, ...], kept: memoryview | None) -> None:
        info, arena = matrix.info, self._arena("packed")
        place = arena.tensor(info.name, I8, (matrix.nbytes,))
        if kept is not None:
            mapped = arena.map(place, kept, matrix.start, ALIGNMENT)
            assert mapped, info
        if info.name not in self._tensors:
            self._tensors[info.name] = Tensor(place.pointer, info.type, shape, name=info.name)
        self._tensors[info.name].packed = Packed(matrix.weight, place)

    def _packed_address(self, matrix: Matrix) -> int:
        packed = self._tensors[matrix.info.name].packed
        assert packed
        return packed.tensor.address

    def _arena(self, kind: Any) -> Arena:
        if kind not in self._arenas:
            count = len(self._layout.required)
            buffer_type = None if kind == "packed" else kind
            self._arenas[kind] = Arena(self._device, count, buffer_type, weights=True)
        return self._arenas[kind]

    def _copy(self, info: TensorInfo) -> None:
        tensor, data = self._tensors[info.name], info.data()
        if tensor.type != info.type:
            data = dequantize(np.frombuffer(data, np.uint8), info.type)
        tensor.write(data)

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
        return True

    @property
    def bytes_copied(self) -> int:
        """Memory of tensors that could not be used in place."""
        return sum(arena.bytes_allocated for arena in self._arenas.values())

    @property
    def bytes_repacked(self) -> int:
        """Of these, memory of matrices in a layout of the CPU's own."""
        others = (None, "packed")
        return sum(a.bytes_allocated for kind, a in self._arenas.items() if kind not in others)

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
