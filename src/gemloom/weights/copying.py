"""A file's bytes go into memory: copied, packed for our own kernels, or both.

In one pass in the order of the file, each byte once and some MiB at a time, so that a stream will
do, and takes little more memory than what is made of it. ``weights.py`` says what goes where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from gemloom.files.gguf import TensorInfo
from gemloom.ggml.device import Tensor, address
from gemloom.kernels.packing import Matrix, PackingPlan, Progress, RowBlock, no_more_if_stopped

FIRST_BYTES = 256
_SHARE = 4 << 20  # bytes


@dataclass(frozen=True, slots=True)
class _Share:
    """Some bytes of a tensor of the file, and what is made of them."""

    info: TensorInfo
    offset: int  # in the tensor's bytes
    length: int
    copies: Sequence[Tensor]  # get them as they are, or widened
    pieces: Sequence[RowBlock] = ()  # are packed of them

    @property
    def place(self) -> int:
        """Where they begin in the file."""
        return self.info.offset + self.offset

    def read(self) -> memoryview:
        """The bytes."""
        return self.info.blob.view(self.place, self.length)


class Filling:
    """What is to be made of a file: told with ``copy`` and ``pack``, then done by ``run``."""

    def __init__(self, threads: int, in_turn: bool = False) -> None:
        """``in_turn``: one copy at a time, as the drivers of devices want it."""
        self.first_bytes: dict[str, bytes] = {}  # of every tensor that was read, as in the file
        self._threads = threads
        self._shares: list[_Share] = []
        self._plan: PackingPlan | None = None
        self._start = 0  # address that the plan's places count from
        self._writing = Lock() if in_turn else nullcontext()

    def copy(self, info: TensorInfo, tensors: Sequence[Tensor], whole: bool) -> None:
        """Write a tensor's bytes to each of ``tensors``; all at once where ``whole``."""
        step = info.nbytes if whole or tensors[0].type != info.type else _SHARE
        for first in range(0, info.nbytes, step):
            self._shares.append(_Share(info, first, min(step, info.nbytes - first), tensors))

    def pack(
        self, plan: PackingPlan, matrix: Matrix, home: memoryview, copies: Sequence[Tensor]
    ) -> None:
        """Pack a matrix to its place in ``home``, and write its bytes to ``copies`` too."""
        self._plan, self._start = plan, address(home)
        info, pieces = matrix.info, list(plan.cut(matrix))
        # A stream is read by one thread; so that all pack, each gets a piece of what it read.
        count = self._threads if info.blob.readers == 1 else 1
        for first in range(0, len(pieces), count):
            some = pieces[first : first + count]
            length = sum(piece.length for piece in some)
            self._shares.append(_Share(info, some[0].offset, length, copies, some))

    def run(self, progress: Progress | None) -> None:
        """Do it all, with as many readers as the file bears. ``progress`` gets bytes read."""
        self._shares.sort(key=lambda share: share.place)
        readers = {share.info.blob.readers or self._threads for share in self._shares}
        total, done = sum(share.length for share in self._shares), 0
        in_order = 1 in readers  # then here and not in a thread: what makes the parts may care
        count = self._threads if in_order else max(readers, default=1)
        with ThreadPoolExecutor(count) as pool, no_more_if_stopped(pool):
            outer, inner = (map, pool.map) if in_order else (pool.map, map)
            work = outer(lambda share: self._use(share, inner), self._shares)
            for share, _ in zip(self._shares, work, strict=True):
                done += share.length
                if progress:
                    progress(done, total)

    def _use(self, share: _Share, apply: Callable[..., Iterator[None]]) -> None:
        data = share.read()
        if share.offset == 0:
            self.first_bytes[share.info.name] = bytes(data[:FIRST_BYTES])
        for tensor in share.copies:
            with self._writing:
                _write(tensor, share.info.type, data, share.offset)
        # The address, so that no other thread holds a stream's part when the next is asked for.
        source = address(data) - share.offset
        list(apply(lambda piece: self._pack(piece, source + piece.offset), share.pieces))
        share.info.blob.drop(share.place, share.length)

    def _pack(self, piece: RowBlock, source: int) -> None:
        assert self._plan
        self._plan.pack_piece(piece, source, self._start + piece.start)


def _write(tensor: Tensor, kind: GGMLQuantizationType, data: memoryview, offset: int) -> None:
    values: Any = data
    if tensor.type != kind:
        values = dequantize(np.frombuffer(data, np.uint8), kind)
    tensor.write(values, offset)
