"""Quantizing: the bytes are ggml's and gguf's, errors are within bounds, wrong wishes are told."""

import json
import os
import signal
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
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
from command_line import ENVIRONMENT, call, command, fine
from conftest import prompt
from gemloom import gguf, imatrix_file, quantize, source
from gemloom.errors import OptionError, OutputError, TensorError
from gemloom.ggml import quants
from gemloom.gguf import GGUF
from gemloom.imatrix_file import Importance, ImportanceMatrix
from gemloom.quantize import TensorRule, Wanted
from gemloom.recipes import RECIPES, recipe
from tiny import VARIANTS

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
    """By gguf's own code, but for Q1_0, which it has none for."""
    if kind == "Q1_0":
        return quants.dequantize(data, Type[kind]).reshape(-1, n)
    return reference_dequantize(np.frombuffer(data, np.uint8), Type[kind]).reshape(-1, n)


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
    if kind == "Q1_0":
        pytest.skip("gguf has no code for it")
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


def small() -> tiny.Variant:
    """A model of two layers whose rows fit every type."""
    return replace(VARIANTS["gemma3"].wide(), pattern="sf", n_ff=256)


def edited(change: Callable[[np.ndarray], np.ndarray]) -> tiny.Edit:
    def edit(keys: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        for name, weight in weights.items():
            if tiny._is_matrix(name, weight):
                weights[name] = change(weight)

    return edit


def opened(data: bytes) -> GGUF:
    return gguf.read(source.resolve(data))


def uniform(kind: str) -> Wanted:
    """Every matrix in one type."""
    ones = Importance(np.ones((1, 256), np.float32), np.ones(1, int))
    names = tiny.tensors(small())
    return Wanted(
        RECIPES["F32"],
        [TensorRule.parse(f".={kind}")],
        ImportanceMatrix(dict.fromkeys(names, ones)),
    )


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


# -- whole files -----------------------------------------------------------------------------


def write(folder: Path, variant: tiny.Variant, **forms: Any) -> Path:
    path = folder / "in.gguf"
    path.write_bytes(tiny.gguf_bytes(variant, **forms))
    return path


def cli(folder: Path, *args: str | Path) -> dict[str, Any]:
    return dict(json.loads(fine("quantize", folder / "in.gguf", *args, "--json").stdout))


@pytest.mark.parametrize("variant", ["e2b", "12b", "gemma3"])
@pytest.mark.parametrize("kind", ["Q8_0", "F16", "BF16"])
def test_a_quantized_model_says_nearly_the_same(tmp_path: Path, variant: str, kind: str) -> None:
    path, out = write(tmp_path, VARIANTS[variant]), tmp_path / "out.gguf"
    told = cli(tmp_path, out, "--type", kind)
    made = gguf.read(source.resolve(out))
    assert told["bytes"] == sum(info.nbytes for info in made.tensors.values())
    assert made.tensors.keys() == gguf.read(source.resolve(path)).tensors.keys()
    logits = []
    for file in (path, out):
        with gemloom.load(file, threads=1, context=64, kv_type="f32") as model:
            logits.append(model.logits(prompt(30)))
    assert np.abs(logits[0] - logits[1]).mean() < 0.08 * logits[0].std()


@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_do_not_depend_on_threads_and_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Each tensor whole, by one call, is what many pieces make; experts too, each by its own."""
    file = opened(tiny.gguf_bytes(replace(VARIANTS["26b"].wide(), pattern="sf")))
    rng = np.random.default_rng(5)
    entries = {
        name: Importance(rng.random((info.shape[2], info.shape[0]), np.float32), np.ones(8, int))
        for name, info in file.tensors.items()
        if len(info.shape) > 2
    }
    assert entries
    plan = quantize.plan(file, Wanted(recipe("Q4_K_M"), imatrix=ImportanceMatrix(entries)))
    monkeypatch.setattr(quantize, "_PIECE", 1000)
    quantize.write(plan, tmp_path / "out.gguf", threads)
    made = gguf.read(source.resolve(tmp_path / "out.gguf"))
    for choice in plan.choices:
        info = choice.info
        rows = info.shape[1] if len(info.shape) > 1 else 1
        values = quants.dequantize(info.data(), info.type).reshape(-1, rows, info.shape[0])
        means = entries[info.name].means if info.name in entries else [None] * len(values)
        whole = b"".join(
            quants.quantize(matrix, choice.type, weights)
            for matrix, weights in zip(values, means, strict=True)
        )
        assert bytes(made.tensors[info.name].data()) == whole, info.name


def test_metadata_is_kept(tmp_path: Path) -> None:
    """Byte for byte, but for what says how the file is quantized."""
    path = write(tmp_path, VARIANTS["e2b"])
    imatrix = ImportanceMatrix(
        {"blk.0.attn_q.weight": Importance(np.ones((1, 96), np.float32), np.ones(1, int))},
        ("calibration.txt",),
        7,
    )
    imatrix_file.write(tmp_path / "i.dat", imatrix)
    cli(tmp_path, tmp_path / "out.gguf", "--type", "Q4_0", "--imatrix", tmp_path / "i.dat")
    old, new = (gguf.read(source.resolve(p)).metadata for p in (path, tmp_path / "out.gguf"))
    changed = {key for key in old | new if old.encoded.get(key) != new.encoded.get(key)}
    assert changed == {"general.file_type"} | {k for k in new if k.startswith("quantize.")}
    assert new["general.file_type"] == 2
    assert new["quantize.imatrix.dataset"] == "calibration.txt"
    assert new["quantize.imatrix.chunks_count"] == 7


def test_rules_come_first_and_in_order(tmp_path: Path) -> None:
    write(tmp_path, small())
    told = cli(
        tmp_path, "--dry-run", "--type", "Q4_K_M",
        "--tensor-type", r"blk\.0\.ffn_down=q8_0", "--tensor-type", "ffn_=F16",
    )  # fmt: skip
    types = {tensor["name"]: tensor["to"] for tensor in told["tensors"]}
    assert types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["blk.1.ffn_down.weight"] == types["blk.0.ffn_up.weight"] == "F16"
    assert types["blk.0.attn_q.weight"] == "Q4_K"
    assert types["blk.0.ffn_norm.weight"] == "F32"
    assert os.listdir(tmp_path) == ["in.gguf"]


def test_a_dry_run_says_what_is_made(tmp_path: Path) -> None:
    write(tmp_path, small())
    dry = cli(tmp_path, "--dry-run", "--type", "Q4_K_M")
    told = cli(tmp_path, tmp_path / "out.gguf", "--type", "Q4_K_M")
    assert {key: told[key] for key in dry} == dry
    assert sum(part["bytes"] for part in dry["parts"]) == dry["bytes"]
    text = fine("quantize", tmp_path / "in.gguf", "--dry-run", "--type", "Q4_K_M").stdout
    assert "attention" in text
    assert max(map(len, text.splitlines())) <= 80


def test_rows_that_blocks_do_not_divide_are_told(tmp_path: Path) -> None:
    variant = replace(VARIANTS["gemma3"], n_ff=80)  # ffn_down's rows: no whole blocks of 32 either
    write(tmp_path, variant)
    told = cli(tmp_path, "--dry-run", "--type", "Q4_K_S")
    types = {tensor["name"]: tensor["to"] for tensor in told["tensors"]}
    assert types["blk.3.attn_q.weight"] == "Q5_0"
    assert types["blk.3.ffn_down.weight"] == "F16"
    shown = " ".join(told["warnings"])
    assert "Q5_0, not Q4_K: rows of 96 are no whole blocks of 256" in shown
    assert "F16, not Q4_K: rows of 80 are no whole blocks of 256" in shown


def test_ternary_types_are_warned_of(tmp_path: Path) -> None:
    write(tmp_path, small())
    assert any(
        "was not trained for" in w for w in cli(tmp_path, "--dry-run", "-t", "TQ2_0")["warnings"]
    )
    assert not cli(tmp_path, "--dry-run", "-t", "Q8_0")["warnings"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name[:3] in ("IQ1", "IQ2") else ())
        for name in sorted(RECIPES.keys() - {"IQ3_XXS"})  # which has IQ2_S in it
    ],
)
def test_no_recipe_makes_a_file_that_does_not_load(tmp_path: Path, name: str) -> None:
    """Whatever a recipe makes of a model whose rows fit, it loads and its logits are finite."""
    file = opened(tiny.gguf_bytes(small()))
    plan = quantize.plan(file, replace(uniform("F32"), recipe=recipe(name), rules=[]))
    quantize.write(plan, tmp_path / "out.gguf", 1)
    with gemloom.load(tmp_path / "out.gguf", threads=1, context=64) as model:
        assert np.isfinite(model.logits(prompt(5))).all()


def test_quantized_again_only_where_asked(tmp_path: Path) -> None:
    write(tmp_path, small(), types="q8_0")
    result = call("quantize", tmp_path / "in.gguf", tmp_path / "out.gguf", "--type", "Q4_K_M")
    assert result.exit_code == 2
    assert "quantized already" in result.stderr
    assert os.listdir(tmp_path) == ["in.gguf"]
    told = cli(tmp_path, tmp_path / "out.gguf", "--type", "Q4_K_M", "--requantize")
    assert told["bytes"] < told["source_bytes"]
    same = cli(tmp_path, tmp_path / "out.gguf", "--type", "Q8_0")  # nothing changes its type
    assert same["bytes"] == same["source_bytes"]


# -- what cannot be --------------------------------------------------------------------------

WRONG = {
    "no such type": (["--type", "Q9"], "no quantization is called 'Q9'"),
    "no such rule type": (["--type", "Q8_0", "--tensor-type", "attn=Q9"], "no type is called 'Q9'"),
    "not a rule": (["--type", "Q8_0", "--tensor-type", "attn"], "is not regex=type"),
    "no regex": (["--type", "Q8_0", "--tensor-type", "(=Q8_0"], "no regular expression"),
    "rule for nothing": (["--type", "Q8_0", "--tensor-type", "atn=Q8_0"], "no matrix"),
    "a type for activations": (["--type", "F16", "--tensor-type", "attn=Q8_K"], "no type"),
    "no imatrix": (["--type", "IQ2_XXS"], "needs an importance matrix"),
    "no imatrix for Q2_K_S": (["--type", "Q2_K_S"], "Q2_K needs an importance matrix"),
    "ruled without imatrix": (
        ["--type", "Q8_0", "--tensor-type", "token_embd=IQ1_S"], "needs an importance matrix",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_wishes(tmp_path: Path, name: str) -> None:
    args, message = WRONG[name]
    write(tmp_path, small())
    result = call("quantize", tmp_path / "in.gguf", tmp_path / "out.gguf", *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert os.listdir(tmp_path) == ["in.gguf"]


def test_no_file_to_make(tmp_path: Path) -> None:
    result = call("quantize", write(tmp_path, small()), "--type", "Q8_0")
    assert result.exit_code == 2
    assert "OUT is missing" in result.stderr


def test_imatrix_of_another_model(tmp_path: Path) -> None:
    write(tmp_path, small())
    entry = Importance(np.ones((1, 77), np.float32), np.ones(1, int))
    imatrix_file.write(tmp_path / "i.gguf", ImportanceMatrix({"blk.0.attn_q.weight": entry}))
    args = ("--type", "Q4_K_M", "--imatrix", tmp_path / "i.gguf", "--dry-run")
    result = call("quantize", tmp_path / "in.gguf", *args)
    assert result.exit_code == 2
    assert "of another model" in result.stderr


def test_imatrix_that_has_not_all(tmp_path: Path) -> None:
    write(tmp_path, small())
    entry = Importance(np.ones((1, 256), np.float32), np.ones(1, int))
    imatrix_file.write(tmp_path / "i.gguf", ImportanceMatrix({"blk.0.attn_q.weight": entry}))
    args = ("--type", "IQ1_S", "--imatrix", tmp_path / "i.gguf", "--dry-run")
    result = call("quantize", tmp_path / "in.gguf", *args)
    assert result.exit_code == 2
    assert "has nothing on it" in result.stderr


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, small())
    before = path.read_bytes()
    os.link(path, tmp_path / "link.gguf")
    for target in (path, tmp_path / "link.gguf"):
        result = call("quantize", path, target, "--type", "Q8_0")
        assert result.exit_code == 2
        assert "the source itself" in result.stderr
    assert path.read_bytes() == before


def test_no_model(tmp_path: Path) -> None:
    def adapter(keys: dict[str, Any], weights: object) -> None:
        keys["general.type"] = "adapter"

    path = write(tmp_path, small(), edit=adapter)
    result = call("quantize", path, tmp_path / "out.gguf", "--type", "Q8_0")
    assert result.exit_code == 1
    assert "general.type is adapter, no model" in result.stderr


def test_a_value_that_is_not_finite_names_its_tensor(tmp_path: Path) -> None:
    def spoil(keys: object, weights: dict[str, np.ndarray]) -> None:
        weights["blk.1.ffn_up.weight"] = weights["blk.1.ffn_up.weight"] * np.float32(np.nan)

    path = write(tmp_path, small(), edit=spoil)
    result = call("quantize", path, tmp_path / "out.gguf", "--type", "Q4_0")
    assert result.exit_code == 2
    assert f"{path}: blk.1.ffn_up.weight: Q4_0: a value to quantize is not finite" in result.stderr
    assert os.listdir(tmp_path) == ["in.gguf"]


# -- memory, a full disk, a kill -------------------------------------------------------------


def large(folder: Path, rows: int) -> Path:
    """A model with embeddings of ``rows`` kilobytes."""

    def edit(keys: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        weights["token_embd.weight"] = np.zeros((rows, 256), np.float32)

    return write(folder, small(), edit=edit)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """64 MiB of one tensor go through in pieces of 1 MiB, of which there are a few at a time."""
    file = gguf.read(source.resolve(large(tmp_path, 1 << 16)))
    plan = quantize.plan(file, Wanted(recipe("Q8_0")))
    tracemalloc.start()
    try:
        quantize.write(plan, tmp_path / "out.gguf", 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.source_bytes > 64 << 20
    assert peak < 12 << 20


def test_disk_full(tmp_path: Path) -> None:
    import resource

    path = large(tmp_path, 1 << 13)
    plan = quantize.plan(gguf.read(source.resolve(path)), Wanted(recipe("Q8_0")))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, old[1]))
    try:
        with pytest.raises(OutputError, match="File too large"):
            quantize.write(plan, tmp_path / "out.gguf", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert os.listdir(tmp_path) == ["in.gguf"]


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """The old file is there until the new one is whole, and a second run makes it."""
    path, out = large(tmp_path, 1 << 15), tmp_path / "out.gguf"
    out.write_bytes(b"old")
    args = command("quantize", path, out, "--type", "Q8_0", "--tensor-type", "token_embd=Q4_K")
    with subprocess.Popen(args, env=ENVIRONMENT) as process:
        end = time.monotonic() + 60
        while not (tmp_path / "out.gguf.partial").exists():
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert out.read_bytes() == b"old"
    subprocess.run(args, env=ENVIRONMENT, check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert gguf.read(source.resolve(out)).tensors["token_embd.weight"].type == Type.Q4_K
    assert sorted(os.listdir(tmp_path)) == ["in.gguf", "out.gguf"]
