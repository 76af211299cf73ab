"""GGUF to GGUF in other types: first a plan, which tensor becomes what, then the file.

Types are chosen by ``recipes.py``; blocks are made by ggml. The source stays mapped and the
output is streamed, so memory holds a few pieces of rows for each thread, however large the model.
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from math import prod
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from numpy.typing import NDArray

from gemloom.errors import ConfigError, OptionError, TensorError
from gemloom.files.gguf import GGUF, TensorInfo, nbytes
from gemloom.files.writing import GGUFWriter, Planned, Value
from gemloom.ggml import quants
from gemloom.models.tensor_names import HEAD, kv_names, layer_of, modality, unit
from gemloom.system.limits import threads_for
from gemloom.tools.quantization.imatrix_file import ImportanceMatrix
from gemloom.tools.quantization.recipes import (
    EMBEDDINGS,
    KEPT,
    NEEDS_IMATRIX,
    Place,
    Recipe,
    fitting,
    part_of,
)

TERNARY = frozenset({Type.TQ1_0, Type.TQ2_0})
# What TQ2_0 does to a model that was not trained for it, as a table of `gemloom perplexity` shows.
TERNARY_LOSS = (
    ": on Gemma 3 270M perplexity goes from 19 to 3e11, and no prediction stays (docs/quality.md)"
)

_PIECE = 1 << 18  # values that a thread makes at a time: so many lie in its cache
_QUANTIZATION_VERSION = 2  # of ggml's block formats


@dataclass(frozen=True, slots=True)
class TensorRule:
    """Matrices whose name ``pattern`` is found in get ``type``, whatever the recipe says."""

    pattern: re.Pattern[str]
    type: Type

    @classmethod
    def parse(cls, text: str) -> TensorRule:
        """From "regex=type", as in "ffn_down=Q6_K". OptionError for anything else."""
        pattern, _, name = text.rpartition("=")
        if not pattern:
            raise OptionError(f"{text!r} is not regex=type, as in ffn_down=Q6_K")
        kind = Type.__members__.get(name.upper())
        if kind not in quants.WRITABLE:
            known = ", ".join(sorted(kind.name for kind in quants.WRITABLE))
            raise OptionError(f"{text!r}: no type is called {name!r}; there are {known}")
        try:
            return cls(re.compile(pattern), kind)
        except re.error as error:
            raise OptionError(f"{text!r}: no regular expression: {error}") from None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a caller wants of a quantization."""

    recipe: Recipe
    rules: Sequence[TensorRule] = ()
    imatrix: ImportanceMatrix | None = None
    imatrix_name: str = ""
    requantize: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one tensor."""

    info: TensorInfo
    type: Type
    instead_of: Type | None = None  # what its rows do not fit
    unit: int = 0  # values that are read at once, which are whole blocks; 0 where it stays as it is
    importance: NDArray[np.float32] | None = field(default=None, repr=False)  # [n, k]

    @property
    def nbytes(self) -> int:
        """Size in the new file."""
        return nbytes(self.type, self.info.shape)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the metadata tell of tensors."""

    per_layer: int  # values of the per-layer table that a layer reads
    unread: frozenset[str]  # K/V tensors of layers that read another's


@dataclass(frozen=True, slots=True)
class QuantizationPlan:
    """Every tensor of the new file in its order, its metadata, and what the user should know."""

    choices: tuple[Choice, ...]
    metadata: Mapping[str, Value] = field(repr=False)
    warnings: tuple[str, ...]
    lacking: str = ""  # what has to be there before the file can be made

    @property
    def source_bytes(self) -> int:
        """What has to be read."""
        return sum(choice.info.nbytes for choice in self.choices)

    @property
    def bytes(self) -> int:
        """What is written, but for the header."""
        return sum(choice.nbytes for choice in self.choices)


def plan(file: GGUF, wanted: Wanted) -> QuantizationPlan:
    """Choose the type of every tensor; nothing is read but the header.

    A type that needs an importance matrix where there is none is told by ``lacking``, so that sizes
    can be looked at before one is made. Raises OptionError for a rule that no matrix fits,
    importances of another model, or a source that is quantized already; ConfigError for a file
    that is no model.
    """
    infos = sorted(file.tensors.values(), key=lambda info: (_layer(info.name), info.name))
    places = _places(file, infos, wanted.imatrix is not None)
    facts = _facts(file)
    choices = tuple(_choose(info, places.get(info.name), facts, wanted) for info in infos)
    _check_rules(wanted.rules, infos)
    for choice in choices:
        _check(file.name, choice, wanted)
    warnings = tuple(_warnings(choices, wanted))
    return QuantizationPlan(choices, _metadata(file, wanted), warnings, _lacking(choices, wanted))


def write(
    chosen: QuantizationPlan,
    path: str | os.PathLike[str],
    threads: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Make the file of a plan, on ``threads`` cores, all by default.

    ``progress`` is told the bytes of the source that are done. Whatever happens, the path holds the
    whole new file or what it held before. Raises OptionError for a plan that lacks something,
    TensorError for a value that a type cannot hold, OutputError where the file cannot be written.
    """
    if chosen.lacking:
        raise OptionError(chosen.lacking)
    _check_target(chosen, path)
    planned = [Planned(c.info.name, c.type, c.info.shape) for c in chosen.choices]
    threads = threads_for(threads)
    pool = ThreadPoolExecutor(threads)
    try:
        with GGUFWriter(path, chosen.metadata, planned) as out:
            made = _ahead(pool, chosen.choices, 2 * threads)
            told = _Progress(progress)
            for choice in chosen.choices:
                count = sum(1 for _ in _spans(choice))
                out.write(
                    choice.info.name, told.of(islice(made, count), choice.info.nbytes / count)
                )
    finally:
        pool.shutdown(cancel_futures=True)


# -- choosing --------------------------------------------------------------------------------


def _layer(name: str) -> int:
    layer = layer_of(name)
    return -1 if layer is None else layer


def _is_matrix(info: TensorInfo) -> bool:
    """Whether it may change its type. Vision and audio parts stay as their makers chose."""
    matrix = prod(info.shape[1:]) > 1 and info.name.endswith("weight")
    return matrix and modality(info.name) is None


def _recipes_apply(info: TensorInfo) -> bool:
    return _is_matrix(info) and not any(piece in info.name for piece in KEPT)


def _places(file: GGUF, infos: Sequence[TensorInfo], has_imatrix: bool) -> dict[str, Place]:
    """By name, where each matrix is that the recipes speak of."""
    metadata = file.metadata
    if (what := metadata.string("general.type", "model")) != "model":
        raise ConfigError(f"{file.name}: general.type is {what!r}, no model")
    arch = metadata.string("general.architecture")
    n_layer = metadata.integer(f"{arch}.block_count")
    n_expert = metadata.integer(f"{arch}.expert_count", 0)
    n_kv = _first(file, f"{arch}.attention.head_count_kv")
    heads_per_kv = _first(file, f"{arch}.attention.head_count") // n_kv if n_kv else 0
    tied = HEAD not in file.tensors
    parts = {info.name: part_of(info.name, tied) for info in infos if _recipes_apply(info)}
    counts, seen = Counter(parts.values()), Counter[str]()
    places = {}
    for info in infos:
        if (part := parts.get(info.name)) is not None:
            places[info.name] = Place(
                part=part,
                row=info.shape[0],
                layer=_layer(info.name),
                n_layer=n_layer,
                nth=seen[part],
                count=counts[part],
                heads_per_kv=heads_per_kv,
                n_expert=n_expert,
                experts=prod(info.shape[2:]) > 1,
                has_imatrix=has_imatrix,
            )
            seen[part] += 1
    return places


def _facts(file: GGUF) -> _Facts:
    metadata = file.metadata
    arch = metadata.string("general.architecture")
    n_layer = metadata.integer(f"{arch}.block_count")
    per_layer = metadata.integer(f"{arch}.embedding_length_per_layer_input", 0)
    shared = metadata.integer(f"{arch}.attention.shared_kv_layers", 0)
    layers = {layer for name in file.tensors if (layer := _layer(name)) >= n_layer - shared}
    return _Facts(per_layer, frozenset().union(*map(kv_names, layers)) if shared else frozenset())


def _first(file: GGUF, key: str) -> int:
    """An integer, or the first layer's where there is one a layer."""
    value = file.metadata.get(key)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value):
        return int(value[0])
    return file.metadata.integer(key)


def _choose(info: TensorInfo, place: Place | None, facts: _Facts, wanted: Wanted) -> Choice:
    ruled = [rule.type for rule in wanted.rules if rule.pattern.search(info.name)]
    if ruled and _is_matrix(info):
        kind = ruled[0]
    elif place is not None:
        kind = wanted.recipe.choose(place)
    else:
        return Choice(info, info.type)
    values = unit(info.name, info.shape[0], facts.per_layer)
    fits = fitting(kind, values)
    importance = None if fits == info.type else _importance(info, wanted)
    choice = Choice(info, fits, None if fits == kind else kind, values, importance)
    if importance is None and info.name in facts.unread and _needs_imatrix(choice, wanted.recipe):
        # No matrix tells of what nothing reads, so there all columns are alike.
        alike = np.ones((prod(info.shape[2:]), info.shape[0]), np.float32)
        return replace(choice, importance=alike)
    return choice


def _importance(info: TensorInfo, wanted: Wanted) -> NDArray[np.float32] | None:
    """Of each column, of each expert: float32 [n, k]."""
    entry = wanted.imatrix.entries.get(info.name) if wanted.imatrix else None
    if entry is None:
        return None
    k, n = info.shape[0], prod(info.shape[2:])
    if entry.sums.size != k * n:
        raise OptionError(
            f"{wanted.imatrix_name}: {entry.sums.size:,} importances of {info.name}, whose shape "
            f"is {list(info.shape)}: an importance matrix of another model"
        )
    return np.ascontiguousarray(entry.means.reshape(n, k))


def _check_rules(rules: Sequence[TensorRule], infos: Sequence[TensorInfo]) -> None:
    for rule in rules:
        if not any(rule.pattern.search(info.name) for info in infos if _is_matrix(info)):
            raise OptionError(
                f"--tensor-type: no matrix has a name that {rule.pattern.pattern!r} fits"
            )


def _check(name: str, choice: Choice, wanted: Wanted) -> None:
    """Whether a tensor can become what was chosen for it, with what there is."""
    info = choice.info
    if choice.type == info.type:
        return
    if info.type not in quants.READABLE:
        raise TensorError(
            f"{name}: the tensor {info.name} is of type {info.type.name}, unsupported"
        )
    if GGML_QUANT_SIZES[info.type][0] > 1 and not wanted.requantize:
        raise OptionError(
            f"{name}: quantized already ({info.name} is {info.type.name}); take the F16 or BF16 "
            "file it was made from, or lose more with --requantize"
        )


def _lacking(choices: Sequence[Choice], wanted: Wanted) -> str:
    needy = [c for c in choices if c.importance is None and _needs_imatrix(c, wanted.recipe)]
    if not needy:
        return ""
    first, others = needy[0], f" and {len(needy) - 1} more" if len(needy) > 1 else ""
    why = (
        f"{wanted.imatrix_name} has nothing on it"
        if wanted.imatrix
        else "make one with gemloom imatrix and give it by --imatrix"
    )
    return f"{first.type.name} needs an importance matrix ({first.info.name}{others}); {why}"


def _needs_imatrix(choice: Choice, recipe: Recipe) -> bool:
    if choice.type == choice.info.type:
        return False
    if choice.type in quants.NEEDS_IMPORTANCE:
        return True
    used_by_row = choice.info.name in (*EMBEDDINGS, HEAD)
    return not used_by_row and choice.type in NEEDS_IMATRIX | recipe.needs_imatrix


def _metadata(file: GGUF, wanted: Wanted) -> dict[str, Value]:
    """The source's keys as they were, but for those on how it is split and quantized."""
    replaced = ("general.quantization_version", "general.file_type")
    metadata: dict[str, Value] = {
        key: value
        for key, value in file.metadata.encoded.items()
        if key not in replaced and not key.startswith("split.")
    }
    metadata |= dict(
        zip(replaced, (_QUANTIZATION_VERSION, int(wanted.recipe.file_type)), strict=True)
    )
    if wanted.imatrix:
        metadata["quantize.imatrix.file"] = wanted.imatrix_name
        if wanted.imatrix.datasets:
            metadata["quantize.imatrix.dataset"] = wanted.imatrix.datasets[0]
        metadata["quantize.imatrix.entries_count"] = len(wanted.imatrix.entries)
        metadata["quantize.imatrix.chunks_count"] = wanted.imatrix.chunks
    return metadata


def _warnings(choices: Sequence[Choice], wanted: Wanted) -> Iterator[str]:
    stood_in = Counter((c.instead_of, c.type, c.unit) for c in choices if c.instead_of)
    for (instead_of, kind, values), count in stood_in.items():
        assert instead_of is not None
        block = GGML_QUANT_SIZES[instead_of][0]
        what = f"{count} tensors become" if count > 1 else "1 tensor becomes"
        yield (
            f"{what} {kind.name}, not {instead_of.name}: rows of {values:,} are not whole blocks "
            f"of {block}"
        )
    if ternary := sorted({c.type.name for c in choices if c.type in TERNARY}):
        yield (
            f"{' and '.join(ternary)} has three values a weight: a model that was not trained for "
            f"it loses its quality{TERNARY_LOSS}"
        )
    if wanted.imatrix and not any(c.importance is not None for c in choices):
        yield f"{wanted.imatrix_name} has nothing on any tensor that is quantized"


# -- making ----------------------------------------------------------------------------------


class _Progress:
    """Tells somebody how much of the source is done, piece by piece."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell, self._done = tell, 0.0

    def of(self, pieces: Iterator[Any], size: float) -> Iterator[Any]:
        """The same pieces; each stands for ``size`` bytes of the source."""
        for piece in pieces:
            yield piece
            self._done += size
            self._tell(round(self._done))


def _check_target(chosen: QuantizationPlan, path: str | os.PathLike[str]) -> None:
    """The source is most often the only good copy there is, so it is never replaced."""
    for name in {choice.info.blob.name for choice in chosen.choices}:
        if os.path.exists(name) and os.path.exists(path) and os.path.samefile(name, path):
            raise OptionError(f"{path}: is the source itself; name another file")


def _spans(choice: Choice) -> Iterator[tuple[int, int, int]]:
    """Matrix, first row and rows of each piece; none goes over the edge of a matrix."""
    shape = choice.info.shape
    rows, matrices = (shape[1] if len(shape) > 1 else 1), prod(shape[2:])
    step = max(1, _PIECE // shape[0])
    for matrix in range(matrices):
        for first in range(0, rows, step):
            yield matrix, first, min(step, rows - first)


def _ahead(pool: ThreadPoolExecutor, choices: Sequence[Choice], window: int) -> Iterator[Any]:
    """The bytes of all pieces of all tensors in order, of which ``window`` are in the making."""
    waiting: deque[Future[Any]] = deque()
    for choice in choices:
        for span in _spans(choice):
            waiting.append(pool.submit(_make, choice, *span))
            if len(waiting) > window:
                yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _make(choice: Choice, matrix: int, first: int, rows: int) -> bytearray | memoryview:
    """The bytes of some rows in their new type."""
    info, k = choice.info, choice.info.shape[0]
    of_row = nbytes(info.type, (k,))
    above = matrix * (info.shape[1] if len(info.shape) > 1 else 1) + first
    data = info.blob.view(info.offset + above * of_row, rows * of_row)
    if choice.type == info.type:
        return data
    values = quants.dequantize(data, info.type).reshape(rows, k)
    weights = None if choice.importance is None else choice.importance[matrix]
    try:
        return quants.quantize(values, choice.type, weights)
    except OptionError as error:  # a value that the type cannot hold, which is the file's fault
        raise TensorError(f"{info.blob.name}: {info.name}: {error}") from error
