"""What tests of quantizing share: a model whose rows fit every type, and wishes for it."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import tiny
from gemloom.files import gguf, source
from gemloom.files.gguf import GGUF
from gemloom.tools.quantization import quantize
from gemloom.tools.quantization.imatrix_file import Importance, ImportanceMatrix
from gemloom.tools.quantization.quantize import TensorRule, Wanted
from gemloom.tools.quantization.recipes import RECIPES


def small() -> tiny.Variant:
    """A model of two layers whose rows fit every type."""
    return replace(tiny.VARIANTS["gemma3"].wide(), pattern="sf", n_ff=256)


def opened(data: bytes) -> GGUF:
    return gguf.read(source.resolve(data))


def in_type(data: bytes, kind: str) -> bytes:
    """The same model with every matrix in one type."""
    wanted = Wanted(RECIPES["F32"], [TensorRule.parse(f".={kind}")])
    with TemporaryDirectory() as folder:
        quantize.write(quantize.plan(opened(data), wanted), Path(folder, "m.gguf"), 1)
        return Path(folder, "m.gguf").read_bytes()


def uniform(kind: str) -> Wanted:
    """Every matrix of ``small`` in one type, with importances that are all the same."""
    ones = Importance(np.ones((1, 256), np.float32), np.ones(1, int))
    matrix = ImportanceMatrix(dict.fromkeys(tiny.tensors(small()), ones))
    return Wanted(RECIPES["F32"], [TensorRule.parse(f".={kind}")], matrix)
