"""What tests of quantizing share: a model whose rows fit every type, and wishes for it."""

from dataclasses import replace

import numpy as np

import tiny
from gemloom import gguf, source
from gemloom.gguf import GGUF
from gemloom.imatrix_file import Importance, ImportanceMatrix
from gemloom.quantize import TensorRule, Wanted
from gemloom.recipes import RECIPES


def small() -> tiny.Variant:
    """A model of two layers whose rows fit every type."""
    return replace(tiny.VARIANTS["gemma3"].wide(), pattern="sf", n_ff=256)


def opened(data: bytes) -> GGUF:
    return gguf.read(source.resolve(data))


def uniform(kind: str) -> Wanted:
    """Every matrix of ``small`` in one type, with importances that are all the same."""
    ones = Importance(np.ones((1, 256), np.float32), np.ones(1, int))
    matrix = ImportanceMatrix(dict.fromkeys(tiny.tensors(small()), ones))
    return Wanted(RECIPES["F32"], [TensorRule.parse(f".={kind}")], matrix)
