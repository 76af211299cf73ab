"""Which matrices are packed, where each lies in one run of bytes, and packing them by all cores.

Not here: the memory or file that the bytes go to (``weights.py``, ``packed_file.py``), nor what
they mean (``native/types.h``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import numpy as np

from gemloom.files.gguf import TensorInfo, nbytes
from gemloom.ggml.device import address
from gemloom.kernels.library import GROUP, TYPES, Library, Weight

ALIGNMENT = 64  # bytes: a cache line, and what AVX-512 loads at once
_PIECE = 2 << 20  # bytes of the file that one thread packs at a time
_TOLD_EVERY = 0.1  # seconds

Progress = Callable[[int, int], None]  # gets the bytes done and all there are


@contextmanager
def no_more_if_stopped(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Where the block is left by Ctrl-C or an error, what the pool has not begun stays undone."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [k, m], or ``count`` of them behind one another, and where it is packed to."""

    info: TensorInfo
    weight: Weight
    count: int
    start: int  # of its packed bytes in those of all matrices
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlock:
    """Some rows of a matrix, in whole groups: a matrix too, with a place of its own."""

    matrix: Matrix
    weight: Weight
    offset: int  # in the tensor's bytes
    length: int
    start: int
    nbytes: int

    def rows(self) -> memoryview:
        """Its bytes in the model file."""
        info = self.matrix.info
        return info.blob.view(info.offset + self.offset, self.length)

    def drop(self) -> None:
        """Its bytes in the model file were read."""
        info = self.matrix.info
        info.blob.drop(info.offset + self.offset, self.length)


class _Read:
    """Lets go of the file's pages behind those who read it."""

    def __init__(self, pieces: Sequence[RowBlock]) -> None:
        self._pieces, self._done = pieces, 0

    def until(self, count: int) -> None:
        """So many pieces were read."""
        for piece in self._pieces[self._done : count]:
            piece.drop()
        self._done = max(self._done, count)


class PackingPlan:
    """Where every packed matrix lies, one behind the other."""

    def __init__(self, own: Library, tensors: Iterable[tuple[TensorInfo, tuple[int, ...]]]) -> None:
        """``tensors`` with the shapes that the model knows them by, [k, m, ...]."""
        self.own = own
        self.matrices: list[Matrix] = []
        self.nbytes = 0
        for info, shape in tensors:
            weight, count = Weight(info.type, *shape[:2]), prod(shape[2:])
            matrix = Matrix(info, weight, count, self.nbytes, own.packed_bytes(weight) * count)
            self.matrices.append(matrix)
            self.nbytes += -(-matrix.nbytes // ALIGNMENT) * ALIGNMENT

    @cached_property
    def pieces(self) -> list[RowBlock]:
        """Everything there is to pack, in the order of its places."""
        return [piece for matrix in self.matrices for piece in self.cut(matrix)]

    def cut(self, matrix: Matrix) -> Iterator[RowBlock]:
        """The pieces of one matrix, in the order of its bytes, none of which is in two."""
        info, whole = matrix.info, matrix.weight
        k, m = int(whole.k), int(whole.m)
        row, group = nbytes(info.type, (k,)), self.own.packed_bytes(whole) // whole.groups
        step = max(1, _PIECE // (GROUP * row)) * GROUP
        for index in range(matrix.count):
            start = matrix.start + index * whole.groups * group
            for first in range(0, m, step):
                weight = Weight(info.type, k, min(step, m - first))
                yield RowBlock(
                    matrix=matrix,
                    weight=weight,
                    offset=(index * m + first) * row,
                    length=int(weight.m) * row,
                    start=start + first // GROUP * group,
                    nbytes=weight.groups * group,
                )

    def pack(
        self, target: Callable[[Matrix], int], threads: int, progress: Progress | None
    ) -> None:
        """Pack every matrix to the address that ``target`` gives, by so many threads."""
        rows = [piece.rows() for piece in self.pieces]  # held: where a file is cut they are copies
        packings = self.own.packings(
            [
                (p.weight, address(r), target(p.matrix) + p.start - p.matrix.start)
                for p, r in zip(self.pieces, rows, strict=True)
            ]
        )
        ends = [0, *accumulate(piece.nbytes for piece in self.pieces)]
        read = _Read(self.pieces)
        with ThreadPoolExecutor(threads) as pool:
            running = {pool.submit(packings.run) for _ in range(threads)}
            try:
                while running:
                    running = wait(running, _TOLD_EVERY).not_done
                    read.until(packings.begun() - len(running))
                    if progress:
                        progress(ends[packings.begun()], ends[-1])
            finally:
                packings.stop()

    def pack_apart(
        self, put: Callable[[RowBlock], None], threads: int, progress: Progress | None
    ) -> None:
        """Have ``put`` called with every piece, by so many threads."""
        done, total = 0, sum(piece.nbytes for piece in self.pieces)
        with ThreadPoolExecutor(threads) as pool, no_more_if_stopped(pool):
            for piece, _ in zip(self.pieces, pool.map(put, self.pieces), strict=True):
                done += piece.nbytes
                if progress:
                    progress(done, total)

    def pack_piece(self, piece: RowBlock, source: int, target: int) -> None:
        """Pack one piece, whose rows are at the address ``source``, to the address ``target``."""
        self.own.pack(piece.weight, source, target, 0, piece.weight.groups)

    def layout(self) -> str:
        """A fingerprint of the layout itself: of what noise of these types is packed to.

        So nobody has to remember to count up a version when they change the layout.
        """
        digest = hashlib.blake2b(digest_size=16)
        for kind in sorted({matrix.info.type for matrix in self.matrices}):
            weight = Weight(kind, 2 * TYPES[kind][1], GROUP + 1)
            size = nbytes(kind, (int(weight.k), int(weight.m)))
            noise = np.frombuffer(hashlib.shake_128(kind.name.encode()).digest(size), np.uint8)
            packed = np.zeros(self.own.packed_bytes(weight), np.uint8)
            self.own.pack(weight, noise.ctypes.data, packed.ctypes.data, 0, weight.groups)
            digest.update(packed.tobytes())
        return digest.hexdigest()
