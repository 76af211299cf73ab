"""A file's tensors as ggml tensors under their GGUF names; strict both ways.

Bytes are used in place where one buffer holds them aligned; where not, and where our own kernels
want another layout, ``copying.py`` copies and packs them.
"""

from __future__ import annotations

from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemloom.compute.placement import Placement
from gemloom.errors import TensorError
from gemloom.files.gguf import GGUF, TensorInfo, nbytes
from gemloom.ggml.arena import Arena
from gemloom.ggml.device import Device, Packed, Tensor, address
from gemloom.ggml.joining import join
from gemloom.ggml.memory import pages
from gemloom.kernels import packed_file
from gemloom.kernels.operations import I8
from gemloom.kernels.packing import ALIGNMENT as PACKED_ALIGNMENT
from gemloom.kernels.packing import PackingPlan, Progress
from gemloom.models.layout import Layout
from gemloom.models.tensor_names import PER_LAYER_TABLE, modality, unit
from gemloom.options import Options
from gemloom.weights.copying import FIRST_BYTES, Filling
from gemloom.weights.homes import Homes, alignment, kind_of, trimmed

F32 = GGMLQuantizationType.F32
_FLOATS = {F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
# Quantized forms that ggml gives activations; it cannot multiply with weights of these types.
_ACTIVATIONS = {GGMLQuantizationType.Q8_1, GGMLQuantizationType.Q8_K}


class Tensors:
    """Tensors by name, on the devices that a placement says. ``close()`` frees them."""

    def __init__(self, device: Device, layout: Layout, placement: Placement) -> None:
        self.placement = placement
        self._device, self._layout = device, layout
        self._arenas: dict[tuple[str, Any], Arena] = {}  # by what for: "own", a device ...
        self._tensors: dict[str, Tensor] = {}
        self._there: dict[tuple[str, int], Tensor] = {}  # by name and device, where not the host's

    def _arena(self, use: str, which: Any = None) -> Arena:
        """For tensors of one use: on the device or of the buffer type ``which``."""
        if (use, which) not in self._arenas:
            self._arenas[use, which] = Arena(
                self._device, len(self._layout.required),
                buffer_type=which if use == "repacked" else None,
                where=which if use == "device" else None, weights=True,
            )  # fmt: skip
        return self._arenas[use, which]

    def _bytes(self, use: str) -> int:
        return sum(arena.bytes_allocated for (of, _), arena in self._arenas.items() if of == use)

    def _on_device(self, info: TensorInfo, shape: tuple[int, ...], index: int) -> Tensor:
        """Make a tensor on a device."""
        tensor = self._arena("device", index).tensor(info.name, kind_of(info, shape), shape)
        self._there[info.name, index] = tensor
        self._tensors.setdefault(info.name, tensor)
        return tensor

    @property
    def matrices(self) -> list[str]:
        """Names of the tensors of two dimensions or three."""
        return [name for name, tensor in self._tensors.items() if len(tensor.shape) > 1]

    @property
    def head(self) -> str:
        """Name of the matrix that makes logits."""
        return self._layout.head

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def on(self, name: str, index: int) -> Tensor:
        """The tensor of that name as a device has it: its own copy, or the only one there is."""
        return self._there.get((name, index)) or self._tensors[name]

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
        """Free the tensors and let go of the bytes they use."""
        for arena in self._arenas.values():
            arena.close()
        self._tensors.clear()


class Sketch(Tensors):
    """The tensors of a model without memory, to judge graphs by."""

    def __init__(self, device: Device, file: GGUF, layout: Layout, placement: Placement) -> None:
        super().__init__(device, layout, placement)
        for name, shape in layout.required.items():
            for index in placement.places(name):
                if index != device.host:
                    self._on_device(file.tensors[name], shape, index)
                else:
                    kind = kind_of(file.tensors[name], shape)
                    self._tensors[name] = self._arena("own").tensor(name, kind, shape)


class Weights(Tensors):
    """All tensors of a model, with their bytes."""

    def __init__(
        self,
        device: Device,
        file: GGUF,
        layout: Layout,
        options: Options,
        placement: Placement,
        progress: Progress | None = None,
    ) -> None:
        """Check the file against ``layout`` and give every tensor its bytes.

        With ``options.mmap`` False everything is copied, and the file may go away afterwards;
        ``kernels`` decides which matrices are copied into another layout, and ``packed`` whether
        that comes from a file or goes to one. ``placement`` says which devices hold what.
        ``progress`` is told how far copying and packing are.
        Raises TensorError, before anything is allocated, for a tensor that is missing, extra,
        of another shape or of a type that cannot be used.
        """
        super().__init__(device, layout, placement)
        self.ignored = check(file, layout)
        self.first_bytes: dict[str, bytes] = {}  # of each, as in the file; to tell models apart
        self.bytes_mapped = 0
        self.bytes_packed = 0  # of matrices in the layout of our own kernels, mapped or copied
        self._bytes_packed_here = 0
        self._homes = Homes(device, layout, options)
        self._repacked: set[str] = set()  # in a layout of the CPU's own
        try:
            self._fill(file, options, progress)
        except BaseException:
            self.close()
            raise
        self.bytes, self.per_layer_bytes = planned_bytes(file, layout)

    def _fill(self, file: GGUF, options: Options, progress: Progress | None) -> None:
        copies = self._place_all(file)
        for arena in self._arenas.values():
            arena.allocate("the weights")
        filling = Filling(self._device.threads, in_turn=not self._device.on_host)
        packed = None
        if plan := self._homes.plan(file, self._packs):
            packed = self._kept(file, options, progress)
            packed = packed or (plan, self._pack(plan, filling, copies, progress))
        for name, tensors in copies.items():
            filling.copy(file.tensors[name], tensors, whole=name in self._repacked)
        filling.run(progress)
        self._note_first_bytes(file, filling.first_bytes)
        file.finish()
        if packed:
            self._use_packed(*packed)

    def _pack(
        self, plan: PackingPlan, filling: Filling, copies: dict[str, list[Tensor]],
        progress: Progress | None,
    ) -> memoryview:  # fmt: skip
        """Memory for packed matrices: filled now, or by ``filling`` where their bytes arrive."""
        home = pages(plan.nbytes, "the packed weights")
        self._bytes_packed_here = home.nbytes
        if all(self._in_memory(matrix.info) for matrix in plan.matrices):
            start = address(home)
            plan.pack(lambda m: start + m.start, self._device.threads, progress)
        else:
            for matrix in plan.matrices:
                filling.pack(plan, matrix, home, copies.pop(matrix.info.name, ()))
        return home

    @staticmethod
    def _in_memory(info: TensorInfo) -> bool:
        return info.blob.locate(info.offset, info.nbytes) is not None

    def _place_all(self, file: GGUF) -> dict[str, list[Tensor]]:
        """Make tensors of all but what is only packed; gives those that do not use the file's."""
        copies = {}
        for name, shape in self._layout.required.items():
            info = file.tensors[name]
            if self._packs(info) and name not in self._layout.sliced:
                continue
            if made := self._place_everywhere(info, shape):
                copies[name] = made
        return copies

    def _place_everywhere(self, info: TensorInfo, shape: tuple[int, ...]) -> list[Tensor]:
        """Make a tensor on every device that holds it; gives those whose bytes must be copied."""
        copies = []
        for index in self.placement.places(info.name):
            if index == self._device.host:
                if not self._place(info, shape):
                    copies.append(self._tensors[info.name])
            else:
                copies.append(self._on_device(info, shape, index))
        return copies

    def _packs(self, info: TensorInfo) -> bool:
        """Whether our own kernels multiply with this tensor: if that is done on the host."""
        return self._homes.serves(info) and self.placement.places(info.name)[0] == self._device.host

    def _place(self, info: TensorInfo, shape: tuple[int, ...]) -> bool:
        """Make a tensor; True where it uses its bytes where they are."""
        kind, better = kind_of(info, shape), self._homes.better(info, shape)
        arena = self._arena("repacked", better) if better else self._arena("own")
        self._tensors[info.name] = arena.tensor(info.name, kind, shape)
        if better:
            self._repacked.add(info.name)
        return self._homes.in_place(info, shape) and self._map(info)

    def _kept(
        self, file: GGUF, options: Options, progress: Progress | None
    ) -> tuple[PackingPlan, memoryview] | None:
        """The packed matrices in a file that was there or is made now; None: no such file.

        It has those of all layers, wherever they run this time.
        """
        kept, threads = None, self._device.threads
        plan = self._homes.plan(file, self._homes.serves)
        assert plan
        if options.mmap and options.packed != "off":
            kept = packed_file.find(plan, threads)
        if kept is None and options.packed == "keep":
            kept = packed_file.keep(plan, threads, progress)
        return None if kept is None else (plan, kept)

    def _use_packed(self, plan: PackingPlan, home: memoryview) -> None:
        arena = self._arena("packed")
        for matrix in filter(lambda matrix: self._packs(matrix.info), plan.matrices):
            info, shape = matrix.info, self._layout.required[matrix.info.name]
            self.bytes_packed += matrix.nbytes
            place = arena.tensor(info.name, I8, (matrix.nbytes,))
            mapped = arena.map(place, home, matrix.start, PACKED_ALIGNMENT)
            assert mapped, info
            if info.name not in self._tensors:
                host = self._device.host
                self._tensors[info.name] = Tensor(
                    place.pointer, info.type, shape, name=info.name, where=host
                )
            self._tensors[info.name].packed = Packed(matrix.weight, place)
        self.bytes_mapped += 0 if self._bytes_packed_here else self.bytes_packed

    def _note_first_bytes(self, file: GGUF, read: dict[str, bytes]) -> None:
        """Of every tensor: what was read anyway, and where it lies for the others, not read now."""
        for name in self._layout.required:
            info = file.tensors[name]
            length = min(FIRST_BYTES, info.nbytes)
            first = read[name] if name in read else info.blob.view(info.offset, length)
            self.first_bytes[name] = bytes(first)

    def _map(self, info: TensorInfo) -> bool:
        tensor, step = self._tensors[info.name], alignment(info.name)
        place = info.blob.locate(info.offset, info.nbytes)
        place = place or join(info.blob, info.offset, info.nbytes)
        if place is None or not self._arena("own").map(tensor, *place, step):
            return False
        self.bytes_mapped += info.nbytes
        return True

    @property
    def bytes_copied(self) -> int:
        """Memory of tensors that could not be used in place."""
        return self._bytes("own") + self._bytes("repacked") + self._bytes_packed_here

    @property
    def bytes_repacked(self) -> int:
        """Of these, memory of matrices in a layout of the CPU's own."""
        return self._bytes("repacked")

    @property
    def bytes_on_devices(self) -> int:
        """Memory of the devices besides the CPU."""
        return self._bytes("device")


def tensor_bytes(file: GGUF, layout: Layout) -> dict[str, int]:
    """Memory of each tensor; a missing one has none."""
    return {
        name: nbytes(kind_of(file.tensors[name], shape), shape)
        for name, shape in layout.required.items()
        if name in file.tensors
    }


def planned_bytes(file: GGUF, layout: Layout) -> tuple[int, int]:
    """Memory of the weights, and of the per-layer table apart."""
    sizes = tensor_bytes(file, layout)
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
        if trimmed(info.shape) != trimmed(shape):
            raise TensorError(
                f"{file.name}: the tensor {name} has the shape {list(info.shape)}, "
                f"not {list(shape)}"
            )
        _check_type(file.name, info)
        _check_unit(file.name, info, layout)
    extra = [name for name in file.tensors if name not in layout.required]
    for name in extra:
        if name not in layout.ignored and modality(name) is None:
            raise TensorError(
                f"{file.name}: the tensor {name} does not belong to this architecture"
            )
    return tuple(extra)


def _check_type(name: str, info: TensorInfo) -> None:
    vector = len(trimmed(info.shape)) == 1
    quantized = GGML_QUANT_SIZES[info.type][0] > 1
    if info.type not in _FLOATS and (vector or not quantized or info.type in _ACTIVATIONS):
        raise TensorError(
            f"{name}: the tensor {info.name} is of type {info.type.name}, unsupported"
        )


def _check_unit(name: str, info: TensorInfo, layout: Layout) -> None:
    values = unit(info.name, info.shape[0], layout.per_layer)
    if values % GGML_QUANT_SIZES[info.type][0]:
        raise TensorError(
            f"{name}: {info.name}: {info.type.name} blocks do not divide into the {values} values "
            "of a layer; quantize it again"
        )
