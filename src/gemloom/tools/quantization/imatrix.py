"""An importance matrix of a model, from a text: what each column of each matrix is met with.

Per column the sum of squares of what it is multiplied with, over all tokens of the text; for
experts, of the tokens that came to each. The text is cut as llama.cpp's llama-imatrix does:
windows that do not overlap, each with BOS in place of its first token, every row counted. Unlike
there, the matrix that makes the logits is among them, under the name of the tensor it is in.
The files are ``imatrix_file.py``'s, what a quantizer does with them is ``quantize.py``'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import accumulate

import numpy as np

from gemloom.errors import OptionError, RequestError
from gemloom.ggml.graph import IDS, SUMS
from gemloom.model import Model
from gemloom.tools.quantization.imatrix_file import Importance, ImportanceMatrix
from gemloom.tools.quantization.perplexity import Cut, cut, read_tokens


def collect(
    model: Model, text: str, how: Cut, dataset: str, earlier: ImportanceMatrix | None = None
) -> Iterator[tuple[int, ImportanceMatrix]]:
    """After each window of the text: how many there are in all, and what is known so far.

    ``dataset`` is the text's name. ``earlier`` is what another run came to on the same text; this
    one goes on behind it, and the result is to the bit what one run would have come to.
    RequestError for a text shorter than a window and for an ``earlier`` that is not of this text
    and model, OptionError for windows that overlap.
    """
    if how.stride:
        raise OptionError("windows of an importance matrix do not overlap: leave out the stride")
    windows = cut(read_tokens(model.tokenizer, text), how, model.tokenizer.bos)
    digests = list(accumulate(windows, _digest, initial=model.fingerprint))
    matrix = earlier or ImportanceMatrix({}, (dataset,), 0, how.context, digests[0])
    if not matrix.digest or digests[matrix.chunks : matrix.chunks + 1] != [matrix.digest]:
        raise RequestError(
            f"cannot go on with {matrix.chunks} windows of {matrix.chunk_size} tokens: "
            "they are not of this model and the beginning of this text"
        )
    for index in range(matrix.chunks, len(windows)):
        entries = _added(matrix.entries, squares(model, windows[index]))
        datasets, digest = matrix.datasets, digests[index + 1]
        matrix = ImportanceMatrix(entries, datasets, index + 1, how.context, digest)
        yield len(windows), matrix


def squares(model: Model, window: Sequence[int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of one window, by tensor name: float64 [n, k] sums, int64 [n] rows; n as many as experts."""
    sums: dict[str, np.ndarray] = {}
    met: dict[str, list[np.ndarray]] = defaultdict(list)
    for step in model.input_squares(window):
        for tap, values in step.items():
            if tap.endswith(SUMS):
                name = tap.removesuffix(SUMS)
                sums[name] = sums.get(name, 0) + values.astype(np.float64)
            else:
                met[tap.removesuffix(IDS)].append(values)
    return {name: (total, _rows(met[name], total, len(window))) for name, total in sums.items()}


def _rows(met: Sequence[np.ndarray], sums: np.ndarray, count: int) -> np.ndarray:
    """How many rows came to each expert; to the one matrix that is none, all ``count``."""
    if not met:
        return np.array([count])
    return np.bincount(np.concatenate([ids.ravel() for ids in met]), minlength=len(sums))


def _added(
    before: Mapping[str, Importance], more: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, Importance]:
    """Sums of both, rounded to float32 as files hold them, so that going on changes nothing."""
    entries = {}
    for name, (sums, rows) in more.items():
        if (known := before.get(name)) is not None:
            sums, rows = known.sums + sums, known.counts + rows
        entries[name] = Importance(sums.astype(np.float32), rows)
    return entries


def _digest(before: str, window: Sequence[int]) -> str:
    """Of all windows up to this one; ``before`` is that of those before it."""
    return sha256(before.encode() + np.array(window, "<i4").tobytes()).hexdigest()
