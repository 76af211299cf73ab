"""Blocks of every ggml type: the bytes are ggml's and gguf's, errors in bounds, all compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize as reference_dequantize
from gguf.quants import quantize as reference_quantize
from hypothesis import given
from hypothesis import strategies as st

import gemloom
import tiny
from conftest import prompt
from gemloom.errors import OptionError, TensorError
from gemloom.files import gguf, source
from gemloom.ggml import quants
from gemloom.tools.quantization import quantize
from quantized_files import opened, small, uniform

# The root mean square error of normal values, relative to theirs, that each type may have without
# an importance matrix (with one that is flat for the three that need it).
ERROR = {
    "F32": 0, "BF16": 0.0018, "F16": 0.0003, "Q8_0": 0.0058, "Q6_K": 0.019, "Q5_K": 0.038,
    "Q5_1": 0.04, "Q5_0": 0.045, "Q4_K": 0.075, "Q4_1": 0.082, "Q4_0": 0.09, "IQ4_NL": 0.08,
    "IQ4_XS": 0.081, "MXFP4": 0.12, "NVFP4": 0.1, "Q3_K": 0.16, "IQ3_S": 0.18, "IQ3_XXS": 0.23,
    "Q2_K": 0.31, "IQ2_S": 0.29, "IQ2_XS": 0.35, "IQ2_XXS": 0.4, "IQ1_M": 0.62, "IQ1_S": 0.56,
    "TQ1_0": 0.84, "TQ2_0": 0.84, "Q1_0": 0.63,
}  # fmt: skip
# Types whose blocks gguf makes too, in numpy.
REFERENCE = ["BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
SLOW_TO_MAKE = {name for name in ERROR if name.startswith("IQ")}
# ggml makes tables for these first, once a process, in two to seven seconds.
BIG_TABLES = {"IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS"}
types = pytest.mark.parametrize(
    "kind",
    [pytest.param(name, marks=pytest.mark.slow if name in BIG_TABLES else ()) for name in ERROR],
)


def flat(kind: str, n: int) -> np.ndarray | None:
    return np.ones(n, np.float32) if Type[kind] in quants.NEEDS_IMPORTANCE else None


def normal(rows: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, n), np.float32)


def back(data: bytes | bytearray, kind: str, n: int) -> np.ndarray:
    """By gguf's own code, but for Q1_0, which it has none for: a scale and 128 signs."""
    blocks = np.frombuffer(data, np.uint8)
    if kind == "Q1_0":
        scales = blocks.reshape(-1, 18)[:, :2].copy().view(np.float16).astype(np.float32)
        signs = np.unpackbits(blocks.reshape(-1, 18)[:, 2:], axis=1, bitorder="little")
        return (scales * (2 * signs.astype(np.float32) - 1)).reshape(-1, n)
    return reference_dequantize(blocks, Type[kind]).reshape(-1, n)


# -- blocks ----------------------------------------------------------------------------------


def test_every_type_has_a_bound() -> None:
    assert {Type[name] for name in ERROR} == quants.WRITABLE


@types
def test_error_is_within_the_types_bound(kind: str) -> None:
    rows, n = (4, 256) if kind in SLOW_TO_MAKE else (64, 512)
    values = normal(rows, n)
    found = back(quants.quantize(values, Type[kind], flat(kind, n)), kind, n)
    error = np.sqrt(np.mean((found - values) ** 2) / np.mean(values**2))
    assert error <= ERROR[kind]
    if kind != "F32":
        assert error > ERROR[kind] / 3  # else the bound says nothing


@given(data=st.data())
def test_any_shape_comes_back_within_the_bound(data: st.DataObject) -> None:
    """Also of rows of very different sizes, which share no scale; NVFP4's end at 0.002."""
    kind = data.draw(st.sampled_from(sorted(ERROR.keys() - SLOW_TO_MAKE)))
    rows = data.draw(st.integers(1, 5))
    n = max(32, GGML_QUANT_SIZES[Type[kind]][0]) * data.draw(st.integers(1, 6))
    scales = data.draw(st.lists(st.floats(1e-2, 1e2), min_size=rows, max_size=rows))
    values = normal(rows, n, data.draw(st.integers(0, 99))) * np.array(scales, np.float32)[:, None]
    found = back(quants.quantize(values, Type[kind]), kind, n)
    for row, other in zip(values, found, strict=True):
        error = np.sqrt(np.mean((other - row) ** 2) / np.mean(row**2))
        assert error <= 1.6 * ERROR[kind] + 1e-7  # few values: their largest is not typical


@given(data=st.data())
@pytest.mark.parametrize("kind", REFERENCE)
def test_blocks_are_gguf_numpys(kind: str, data: st.DataObject) -> None:
    """But for blocks of zeros, whose scales are zeros of the other sign."""
    rows = data.draw(st.integers(1, 4))
    n = GGML_QUANT_SIZES[Type[kind]][0] * data.draw(st.integers(1, 4))
    values = normal(rows, n, data.draw(st.integers(0, 9999)))
    values *= np.float32(data.draw(st.sampled_from([1e-4, 1, 300])))
    mine = quants.quantize(values, Type[kind])
    assert bytes(mine) == reference_quantize(values, Type[kind]).tobytes()


@types
def test_dequantized_as_gguf_does(kind: str) -> None:
    n = 256
    data = quants.quantize(normal(4, n), Type[kind], flat(kind, n))
    found = quants.dequantize(data, Type[kind]).reshape(-1, n)
    np.testing.assert_allclose(found, back(data, kind, n), rtol=1e-6, atol=1e-7)


@types
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(kind: str, bad: float) -> None:
    values = normal(2, 256)
    values[1, 100] = bad
    with pytest.raises(OptionError, match="not finite"):
        quants.quantize(values, Type[kind], flat(kind, 256))


@types
def test_values_that_are_huge(kind: str) -> None:
    """Too large for half floats: told for a type that has such scales, kept by one that has not."""
    values = normal(2, 256) * np.float32(1e30)
    if kind in ("F32", "BF16"):
        found = back(quants.quantize(values, Type[kind]), kind, 256)
        np.testing.assert_allclose(found, values, rtol=0.01)
    else:
        with pytest.raises(OptionError, match="65,504"):
            quants.quantize(values, Type[kind], flat(kind, 256))


@types
@pytest.mark.parametrize("values", ["zeros", "small", "large", "constant", "one"])
def test_strange_values(kind: str, values: str) -> None:
    """ggml does not abort, and what it makes is finite, whatever the importances."""
    if (kind, values) == ("MXFP4", "small"):
        return  # its scales go down to 1e-38, and ggml's for less are none: refused
    n, one = 256, np.eye(1, 256, 77, dtype=np.float32)
    given = {
        "zeros": np.zeros((1, n), np.float32),
        "small": normal(1, n) * np.float32(1e-38),
        "large": normal(1, n) * np.float32(1e4),
        "constant": np.full((1, n), -3, np.float32),
        "one": one,
    }[values]
    for importance in (np.ones(n), np.zeros(n), one[0], np.full(n, 1e18), np.full(n, 1e-30)):
        data = quants.quantize(given, Type[kind], importance.astype(np.float32))
        assert np.isfinite(back(data, kind, n)).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q5_K", "Q2_K", "Q6_K", "IQ4_XS", "Q3_K"])
def test_importances_move_the_error(kind: str) -> None:
    """Where a column matters more, its error is smaller than it is without, weighted so."""
    values, importance = normal(32, 256), np.ones(256, np.float32)
    importance[::4] = 100
    plain, weighted = (
        back(quants.quantize(values, Type[kind], given), kind, 256) for given in (None, importance)
    )
    errors = [float(((found - values) ** 2 * importance).sum()) for found in (plain, weighted)]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize(
    "importance", [np.ones(255), np.full(256, -1), np.full(256, np.nan), np.full(256, 1e30)]
)
def test_importances_that_are_none(importance: np.ndarray) -> None:
    with pytest.raises(OptionError, match="importance"):
        quants.quantize(normal(1, 256), Type.Q4_K, importance.astype(np.float32))


@pytest.mark.parametrize("kind", sorted(set(Type) - quants.WRITABLE))
def test_types_that_ggml_cannot_write(kind: Type) -> None:
    with pytest.raises(OptionError, match=kind.name):
        quants.quantize(normal(1, 256), kind)


# -- computing with them ---------------------------------------------------------------------


def edited(change: Callable[[np.ndarray], np.ndarray]) -> tiny.Edit:
    def edit(keys: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        for name, weight in weights.items():
            if tiny._is_matrix(name, weight):
                weights[name] = change(weight)

    return edit


@types
def test_every_type_computes(kind: str, tmp_path: Path) -> None:
    """A file of it gives the logits of its dequantized weights, but for 8-bit activations.

    The error of those is 0.01 to 0.05 of the logits' deviation on average; a block read wrongly
    gives 1 or more.
    """
    plan = quantize.plan(opened(tiny.gguf_bytes(small())), uniform(kind))
    path = tmp_path / "model.gguf"
    quantize.write(plan, path, 1)
    made = gguf.read(source.resolve(path)).tensors

    def exact(keys: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        for name in weights:
            values = quants.dequantize(made[name].data(), made[name].type)
            weights[name] = values.reshape(weights[name].shape).copy()

    ids = prompt(40)
    logits = []
    for file in (path, tiny.gguf_bytes(small(), edit=exact)):
        with gemloom.load(file, threads=1, context=64, kv_type="f32") as model:
            logits.append(model.logits(ids))
    assert made["blk.0.ffn_down.weight"].type == made["token_embd.weight"].type == Type[kind]
    error = np.abs(logits[0] - logits[1]).mean() / logits[1].std()
    assert error < (1e-6 if kind == "F32" else 0.08)


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"])
def test_types_that_cannot_be_multiplied_are_refused(kind: str) -> None:
    """At load, by name, before ggml sees them."""
    name = "blk.0.ffn_down.weight"
    data = bytearray(tiny.gguf_bytes(small()))
    at = data.index(name.encode()) + len(name) + 4 + 2 * 8
    data[at : at + 4] = int(Type[kind]).to_bytes(4, "little")
    data += bytes(len(data))  # room for a type of twice the size
    with pytest.raises(TensorError, match=f"{name} is of type {kind}"):
        gemloom.load(bytes(data), threads=1)
