"""An adapter from the difference of two models: of each matrix the best change of a given rank.

The truncated singular value decomposition is found by subspace iteration (Halko, Martinsson, Tropp
2011, arXiv:0909.4061), whose cost is that of a few products with the matrix, and whose memory is
one block of rows: the difference itself is never there as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite, sqrt

import numpy as np

from gemloom.adapters.factors import Lora, Pair
from gemloom.errors import AdapterError, OptionError
from gemloom.files.gguf import TensorInfo
from gemloom.ggml.quants import READABLE
from gemloom.models.tensor_names import HEAD, TABLE
from gemloom.tools.adapters.base_shapes import Base
from gemloom.tools.adapters.merging import rows

Advance = Callable[[int], None]
_BLOCK = 32 << 20  # values of the difference in memory, float32
_SPARE = 10  # directions more than the rank: the last wanted ones converge sooner
_MOST, _SETTLED = 12, 1e-6  # iterations; change of the norm kept that is none


@dataclass(frozen=True, slots=True)
class Kept:
    """How much of one matrix's difference the adapter has."""

    tensor: str
    rank: int
    norm: float  # Frobenius norm of the difference
    kept: float  # of the adapter's part of it

    @property
    def share(self) -> float:
        """Part of the norm that is kept, up to 1."""
        return min(1.0, self.kept / self.norm)


@dataclass(frozen=True, slots=True)
class Extracted:
    """The adapter, and what it is worth."""

    lora: Lora
    matrices: tuple[Kept, ...]
    left: tuple[str, ...]  # tensors that differ and are no matrices, which no LoRA can change

    @property
    def norm(self) -> float:
        """Of all differences of matrices together."""
        return sqrt(sum(matrix.norm**2 for matrix in self.matrices))

    @property
    def share(self) -> float:
        """Part of that norm that the adapter has."""
        return min(1.0, sqrt(sum(matrix.kept**2 for matrix in self.matrices)) / self.norm)


def extract(base: Base, tuned: Base, rank: int, advance: Advance = lambda done: None) -> Extracted:
    """The LoRA of ``rank`` that brings ``base`` nearest to ``tuned``, matrix by matrix.

    Where both use one matrix for embeddings and head, the adapter has the change for both.
    ``advance`` is called with the bytes of the base dealt with. Raises OptionError for a rank below
    1, AdapterError where the two are of different architecture or size, or do not differ.
    """
    if rank < 1:
        raise OptionError(f"rank must be 1 or more, is {rank}")
    _check_alike(base, tuned)
    pairs: dict[str, Pair] = {}
    kept, left = [], []
    for name in tuned.file.tensors:
        if name not in tuned.shapes:
            continue
        old = base.file.tensors[name if name in base.shapes else TABLE]
        difference = Difference(old, tuned.file.tensors[name])
        if difference.none():
            pass
        elif len(tuned.shapes[name]) < 2:
            left.append(name)
        else:
            pairs[name], found = _matrix(difference, name, rank)
            kept.append(found)
        advance(old.nbytes)
    if not pairs:
        raise AdapterError(f"{tuned.file.name}: no matrix differs from {base.file.name}'s")
    if TABLE in pairs and HEAD not in tuned.shapes:
        pairs[HEAD] = pairs[TABLE]
    lora = Lora(tuned.file.name, base.config.architecture, pairs)
    return Extracted(lora, tuple(kept), tuple(left))


def _check_alike(base: Base, tuned: Base) -> None:
    if base.config.architecture != tuned.config.architecture:
        raise AdapterError(
            f"{tuned.file.name} is a {tuned.config.architecture}, {base.file.name} a "
            f"{base.config.architecture}"
        )
    optional = {HEAD}
    for name in dict.fromkeys((*base.shapes, *tuned.shapes)):
        first, second = base.shapes.get(name), tuned.shapes.get(name)
        if first != second and not (name in optional and first is None):
            raise AdapterError(
                f"{name}: of shape {_shown(first)} in {base.file.name}, {_shown(second)} in "
                f"{tuned.file.name}"
            )
        for model in (base, tuned):
            info = model.file.tensors.get(name)
            if info is not None and info.type not in READABLE:
                raise AdapterError(f"{model.file.name}: {name} is of type {info.type.name}")


def _shown(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _matrix(difference: Difference, name: str, rank: int) -> tuple[Pair, Kept]:
    """The pair of one matrix; of experts each has its own decomposition."""
    norm = sqrt(sum(difference.squared_norm(expert) for expert in range(difference.experts)))
    if not isfinite(norm):
        raise AdapterError(f"{name}: a value of one of the two models is not finite")
    parts = [truncated_svd(difference, expert, rank) for expert in range(difference.experts)]
    b, a = (np.stack(sides) for sides in zip(*parts, strict=True))
    # The columns of B are orthogonal, and each as long as the row of A.
    kept = sqrt(float((np.linalg.norm(b.astype(np.float64), axis=-2) ** 4).sum()))
    pair = Pair(a, b, 1.0) if difference.experts > 1 or difference.deep else Pair(a[0], b[0], 1.0)
    return pair, Kept(name, pair.rank, norm, kept)


class Difference:
    """tuned - base of one tensor [k, m] or [k, m, n_expert], by blocks of rows, float32."""

    def __init__(self, base: TensorInfo, tuned: TensorInfo) -> None:
        self.base, self.tuned = base, tuned
        self.k, self.m, self.experts = (*base.shape, 1, 1)[:3]
        self.deep = len(base.shape) > 2
        self._held: tuple[int, np.ndarray] | None = None  # one block of one expert

    def none(self) -> bool:
        """Whether there is no difference."""
        if self.base.type == self.tuned.type:
            first, second = (np.frombuffer(t.data(), np.uint8) for t in (self.base, self.tuned))
            if np.array_equal(first, second):
                return True
        return not any(block.any() for e in range(self.experts) for _, block in self.blocks(e))

    def blocks(self, expert: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Blocks of rows, and where they lie. One that is the whole matrix is kept for the next."""
        if self._held and self._held[0] == expert:
            yield slice(0, self.m), self._held[1]
            return
        step = max(1, _BLOCK // self.k)
        for start in range(0, self.m, step):
            place = (expert, start, min(self.m, start + step))
            block = rows(self.tuned, *place) - rows(self.base, *place)
            if step >= self.m:
                self._held = expert, block
            yield slice(place[1], place[2]), block

    def times(self, expert: int, z: np.ndarray) -> np.ndarray:
        """D z: [m, n] of z [k, n]."""
        return np.concatenate([block @ z for _, block in self.blocks(expert)])

    def transposed_times(self, expert: int, q: np.ndarray) -> np.ndarray:
        """D^T q: [k, n] of q [m, n]."""
        out = np.zeros((self.k, q.shape[1]), np.float32)
        for where, block in self.blocks(expert):
            out += block.T @ q[where]
        return out

    def squared_norm(self, expert: int) -> float:
        """|D|^2."""
        return sum(
            float(np.einsum("ij,ij->", block, block, dtype=np.float64))
            for _, block in self.blocks(expert)
        )


def truncated_svd(d: Difference, expert: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """B [m, r] and A [r, k], float32: B A is the best approximation of D of that rank.

    r is at most the smaller side of D. Singular values are shared evenly between the two.
    """
    r = min(rank, d.k, d.m)
    n = min(r + _SPARE, d.k, d.m)
    z = np.random.default_rng(0).standard_normal((d.k, n), np.float32)
    before = 0.0
    for _ in range(_MOST):
        q, _ = np.linalg.qr(d.times(expert, z))
        z, small = np.linalg.qr(d.transposed_times(expert, q))
        u, s, vt = np.linalg.svd(small.T)  # D is nearly q small^T z^T
        kept = float(np.linalg.norm(s[:r]))
        if kept - before <= _SETTLED * kept:
            break
        before = kept
    root = np.sqrt(s[:r])
    return (q @ u[:, :r]) * root, (root[:, None] * vt[:r]) @ z.T
