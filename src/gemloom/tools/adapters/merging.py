"""Adapters into the weights: a new GGUF of base + scale * B A, tensor by tensor, by blocks of rows.

The sum is made in float32 and rounded once, to the type that the tensor gets. The base is read and
nothing else.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gemloom.adapters.checking import check
from gemloom.adapters.factors import Lora, Pair
from gemloom.errors import AdapterError, OptionError, TensorError
from gemloom.files.gguf import TensorInfo, nbytes
from gemloom.files.writing import GGUFWriter, Planned
from gemloom.ggml.quants import NEEDS_IMPORTANCE, QUANTIZABLE, READABLE, dequantize, quantize
from gemloom.models.tensor_names import HEAD, TABLE, unit
from gemloom.system.limits import usable_cores
from gemloom.tools.adapters.base_shapes import ROUTER, Base

Advance = Callable[[int], None]
_BLOCK = 4 << 20  # values that are in memory as float32 for each thread
_DROPPED = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True, slots=True)
class _Job:
    """One tensor to be written."""

    planned: Planned
    source: TensorInfo
    changes: Sequence[Pair]

    @property
    def copied(self) -> bool:
        return not self.changes and self.planned.type == self.source.type


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written."""

    changed: tuple[str, ...]  # tensors
    kinds: Mapping[str, GGMLQuantizationType]  # of all tensors
    nbytes: int  # of the file


def merge(
    base: Base,
    adapters: Sequence[tuple[Lora, float]],
    path: str | os.PathLike[str],
    kind: GGMLQuantizationType | None = None,
    advance: Advance = lambda done: None,
) -> Merged:
    """Write ``path``: the base with each adapter, times its scale, added.

    Every tensor keeps its type, and those that no adapter changes their bytes. With ``kind`` the
    matrices get that type, or F16 where their rows are no whole blocks of it; the router stays.
    Where the base has one matrix for embeddings and head and only one of them is changed, the head
    becomes a tensor of its own. ``advance`` is called with the bytes of the base dealt with.
    Raises AdapterError for an adapter that does not fit or is an aLoRA, OptionError for a type that
    cannot be made or an output that would replace the base, OutputError.
    """
    _check_output(base, path)
    jobs = _jobs(base, _changes(base, adapters), kind)
    metadata: dict[str, Any] = dict(base.file.metadata.encoded)
    for key in (*_DROPPED, *(("general.file_type",) if kind is not None else ())):
        metadata.pop(key, None)  # a loader then takes the type from the tensors
    threads = usable_cores()
    with (
        GGUFWriter(path, metadata, [job.planned for job in jobs]) as out,
        ThreadPoolExecutor(threads) as pool,
    ):
        for job in jobs:
            name = job.planned.name
            out.write(name, job.source.data() if job.copied else _pieces(job, pool, threads))
            advance(job.source.nbytes)
    return Merged(
        tuple(job.planned.name for job in jobs if job.changes),
        {job.planned.name: job.planned.type for job in jobs},
        out.nbytes,
    )


def _check_output(base: Base, path: str | os.PathLike[str]) -> None:
    for source in {info.blob.name for info in base.file.tensors.values()}:
        if os.path.exists(source) and os.path.exists(path) and os.path.samefile(source, path):
            raise OptionError(f"{os.fspath(path)}: is the base, which is not to be replaced")


# -- the plan ----------------------------------------------------------------------------


def _changes(base: Base, adapters: Sequence[tuple[Lora, float]]) -> dict[str, list[Pair]]:
    """What is added to each matrix, the caller's scale in it."""
    changes: dict[str, list[Pair]] = {}
    for lora, factor in adapters:
        if not np.isfinite(factor):
            raise OptionError(f"{lora.name}: the scale {factor} is not finite")
        if lora.invocation:
            raise AdapterError(
                f"{lora.name}: an aLoRA, which acts only from its invocation on, cannot be merged"
            )
        for name, pair in check(lora, base.config, base.shapes).lora.pairs.items():
            changes.setdefault(name, []).append(Pair(pair.a, pair.b, pair.scale * factor))
    return changes


def _jobs(
    base: Base, changes: Mapping[str, list[Pair]], kind: GGMLQuantizationType | None
) -> list[_Job]:
    if kind is not None and kind not in QUANTIZABLE:
        known = ", ".join(sorted(known.name for known in QUANTIZABLE))
        raise OptionError(f"cannot write the type {kind.name}; there are {known}")
    jobs = []
    for name, info in base.file.tensors.items():
        jobs.append(_job(base, name, info, changes.get(name, ()), kind))
        tied = name == TABLE and HEAD not in base.file.tensors
        if tied and not _alike(changes.get(TABLE, ()), changes.get(HEAD, ())):
            jobs.append(_job(base, HEAD, info, changes.get(HEAD, ()), kind))
    return jobs


def _alike(first: Sequence[Pair], second: Sequence[Pair]) -> bool:
    """Whether two matrices are changed in the same way, so that they can stay one."""
    return len(first) == len(second) and all(
        p.scale == q.scale and np.array_equal(p.a, q.a) and np.array_equal(p.b, q.b)
        for p, q in zip(first, second, strict=True)
    )


def _job(
    base: Base,
    name: str,
    info: TensorInfo,
    changes: Sequence[Pair],
    kind: GGMLQuantizationType | None,
) -> _Job:
    matrix = info.name in base.matrices and not name.endswith(ROUTER)
    target = _target(base, info, kind) if kind is not None and matrix else info.type
    job = _Job(Planned(name, target, info.shape), info, changes)
    if job.copied:
        return job
    if target in NEEDS_IMPORTANCE or target not in QUANTIZABLE:
        raise OptionError(f"{name} is of type {target.name}, which cannot be made anew; use --type")
    if info.type not in READABLE:
        raise TensorError(f"{base.file.name}: {name} is of type {info.type.name}, unsupported")
    return job


def _target(base: Base, info: TensorInfo, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    values = unit(info.name, info.shape[0], base.config.n_per_layer)
    whole = values % GGML_QUANT_SIZES[kind][0] == 0
    return kind if whole else GGMLQuantizationType.F16


# -- the work ----------------------------------------------------------------------------


def _pieces(job: _Job, pool: ThreadPoolExecutor, ahead: int) -> Iterator[bytearray]:
    """The bytes of a tensor in order, at most ``ahead`` blocks of rows being worked on."""
    waiting: deque[Future[bytearray]] = deque()
    for expert, start, stop in _blocks(job.source.shape):
        if len(waiting) == ahead:
            yield waiting.popleft().result()
        waiting.append(pool.submit(_piece, job, expert, start, stop))
    for future in waiting:
        yield future.result()


def _blocks(shape: Sequence[int]) -> Iterable[tuple[int, int, int]]:
    """Blocks of rows that do not go beyond an expert: which expert, first and last row."""
    k, m, experts = (*shape, 1)[:3] if len(shape) > 1 else (shape[0], 1, 1)
    step = max(1, _BLOCK // k)
    for expert in range(experts):
        for start in range(0, m, step):
            yield expert, start, min(m, start + step)


def _piece(job: _Job, expert: int, start: int, stop: int) -> bytearray:
    values = rows(job.source, expert, start, stop)
    for pair in job.changes:
        a, b = (pair.a[expert], pair.b[expert]) if pair.a.ndim == 3 else (pair.a, pair.b)
        b_rows = b[start:stop].astype(np.float32) * np.float32(pair.scale)
        values = values + b_rows @ a.astype(np.float32)
    try:
        return quantize(values, job.planned.type)
    except OptionError as error:
        raise TensorError(f"{job.planned.name}: {error}") from None


def rows(info: TensorInfo, expert: int, start: int, stop: int) -> np.ndarray:
    """Rows of a matrix, or of one expert's, as float32 [stop - start, k]; not to be written to."""
    k, m = info.shape[0], prod(info.shape[1:2])
    size = nbytes(info.type, (k,))
    first = info.offset + (expert * m + start) * size
    data = info.blob.view(first, (stop - start) * size)
    return dequantize(data, info.type).reshape(stop - start, k)
