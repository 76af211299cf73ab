"""Importance matrices: the sums against a forward pass in f64, and runs that stop and go on."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gemloom
import oracle
import tiny
from conftest import Load
from gemloom.errors import OptionError, RequestError
from gemloom.tools.quantization import imatrix_file
from gemloom.tools.quantization.imatrix import collect
from gemloom.tools.quantization.imatrix_file import ImportanceMatrix
from gemloom.tools.quantization.perplexity import Cut, cut, read_tokens

TEXT = "The quick brown fox jumps over the lazy dog, and nobody asks why; it does so again. " * 3
CUT = Cut(context=32)


def last(found: Iterator[tuple[int, ImportanceMatrix]]) -> ImportanceMatrix:
    return [matrix for _, matrix in found][-1]


def all_of(model: gemloom.Model, how: Cut = CUT) -> ImportanceMatrix:
    return last(collect(model, TEXT, how, "fox"))


def assert_equal(one: ImportanceMatrix, two: ImportanceMatrix) -> None:
    """To the bit, with all that is said of them."""
    assert one.entries.keys() == two.entries.keys()
    for name, entry in one.entries.items():
        assert np.array_equal(entry.sums, two.entries[name].sums), name
        assert np.array_equal(entry.counts, two.entries[name].counts), name
    for field in ("datasets", "chunks", "chunk_size", "digest"):
        assert getattr(one, field) == getattr(two, field)


# -- the sums --------------------------------------------------------------------------------


class Watched(np.ndarray[Any, Any]):
    """A matrix of the oracle that notes under its name what it is multiplied with."""

    name: Any = ""
    met: dict[Any, list[np.ndarray]]

    def __array_finalize__(self, parent: Any) -> None:
        self.name, self.met = getattr(parent, "name", ""), getattr(parent, "met", {})

    def __getitem__(self, index: Any) -> Any:  # one expert
        part = super().__getitem__(index)
        part.name = (self.name, int(index))
        return part

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        self.met[self.name].append(x)
        return x @ np.asarray(self)

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        self.met[self.name].append(x[None])
        return np.asarray(self) @ x


def inputs(variant: tiny.Variant, ids: list[int]) -> dict[Any, list[np.ndarray]]:
    """By matrix, or matrix and expert: the rows that met it, in f64, found by the oracle."""
    met: dict[Any, list[np.ndarray]] = defaultdict(list)
    keys = {k.removeprefix(f"{variant.arch}."): v for k, v in tiny.metadata(variant).items()}
    weights: dict[str, Any] = {}
    for name, value in tiny.tensors(variant).items():
        weights[name] = value.astype(np.float64)
        if value.ndim > 1 and "token_embd" not in name:
            weights[name] = weights[name].view(Watched)
            weights[name].name, weights[name].met = name, met
    x = weights["token_embd.weight"][ids] * variant.n_embd**0.5
    forward = oracle._gemma4 if variant.arch == "gemma4" else oracle._gemma3
    x = forward(keys, weights, ids, x)
    met["token_embd.weight"].append(oracle.rms(x, weights["output_norm.weight"]))
    return met


@pytest.mark.parametrize("variant", ["e2b", "12b", "26b", "gemma3"])
def test_sums_are_those_of_the_oracle(load: Load, variant: str) -> None:
    """Every matrix and every expert; f32 and ggml's GELU table against f64."""
    model = load(variant, threads=1)
    found = all_of(model, Cut(24, windows=2)).entries
    sums: dict[Any, Any] = defaultdict(float)
    counts: dict[Any, int] = defaultdict(int)
    for window in cut(read_tokens(model.tokenizer, TEXT), Cut(24, windows=2), 2):
        for name, rows in inputs(tiny.VARIANTS[variant], window).items():
            sums[name] += (np.concatenate(rows) ** 2).sum(axis=0)
            counts[name] += sum(map(len, rows))
    assert {name if isinstance(name, str) else name[0] for name in sums} == found.keys()
    for name, entry in found.items():
        experts = [(name, i) for i in range(len(entry.counts))]
        for i, key in enumerate([name] if name in sums else experts):
            assert entry.counts[i] == counts[key], key
            error = np.abs(entry.sums[i] - sums[key]) / np.mean(sums[key])
            assert error.mean() <= 0.004 and error.max() <= 0.03, key  # a row too few: 0.02


def test_experts_share_the_rows(load: Load) -> None:
    variant = tiny.VARIANTS["26b"]
    matrix = all_of(load("26b", threads=1))
    rows = matrix.chunks * CUT.context
    for name, entry in matrix.entries.items():
        experts = name.endswith("_exps.weight")
        assert entry.counts.sum() == rows * (variant.n_expert_used if experts else 1)
        assert entry.sums.shape[0] == (variant.n_expert if experts else 1)
        assert not entry.sums[entry.counts == 0].any()


@pytest.mark.parametrize("chunk", [1, 7, 31])
def test_any_chunks_give_the_same(load: Load, chunk: int) -> None:
    one, many = (all_of(load("26b", chunk=n, threads=1), Cut(32, windows=2)) for n in (32, chunk))
    for name, entry in one.entries.items():
        other = many.entries[name]
        assert np.abs(entry.counts - other.counts).sum() <= 2, name  # a near-tie of two experts
        if np.array_equal(entry.counts, other.counts):
            assert np.allclose(entry.sums, other.sums, rtol=0.02, atol=1e-3), name


def test_other_layouts_of_the_file(load: Load) -> None:
    """Matrices in one tensor have one input; the entries are named as the file's tensors."""
    plain = all_of(load("26b", threads=1)).entries
    fused = all_of(load("26b", forms={"fused_qkv": True}, threads=1)).entries
    split = all_of(load("26b", forms={"split_experts": True}, threads=1)).entries
    untied = all_of(load("26b", forms={"untied": True}, threads=1)).entries
    assert np.allclose(fused["blk.0.attn_qkv.weight"].sums, plain["blk.0.attn_q.weight"].sums)
    assert "blk.0.attn_q.weight" not in fused
    for name in ("gate", "up"):
        both = plain["blk.5.ffn_gate_up_exps.weight"]
        assert np.allclose(split[f"blk.5.ffn_{name}_exps.weight"].sums, both.sums, rtol=1e-3)
    assert "token_embd.weight" not in untied
    assert np.allclose(untied["output.weight"].sums, plain["token_embd.weight"].sums, rtol=1e-3)


def test_requests_are_as_they_were(load: Load) -> None:
    """Neither graphs nor cells of the collection are left behind."""
    model, fresh = load(threads=1), load(threads=1)
    before = model.logits([2, 5, 6])
    all_of(model)
    assert np.array_equal(model.logits([2, 5, 6]), before)
    assert np.array_equal(before, fresh.logits([2, 5, 6]))


# -- stop and go on --------------------------------------------------------------------------


def test_resumed_is_uninterrupted(load: Load, tmp_path: Path) -> None:
    """Wherever it stopped, and through the file; by another process's model."""
    model = load("26b", threads=1)
    states = [matrix for _, matrix in collect(model, TEXT, CUT, "fox")]
    assert [matrix.chunks for matrix in states] == list(range(1, len(states) + 1))
    for stopped in states[:-1]:
        imatrix_file.write(tmp_path / "part.gguf", stopped)
        earlier = imatrix_file.read(tmp_path / "part.gguf")
        assert_equal(earlier, stopped)
        again = load("26b", threads=1)
        assert_equal(last(collect(again, TEXT, CUT, "fox", earlier)), states[-1])
    assert not list(collect(model, TEXT, CUT, "fox", states[-1]))


def test_both_formats_hold_the_same_means(load: Load, tmp_path: Path) -> None:
    """llama.cpp's older format has means alone, 1 where an expert met nothing."""
    matrix = all_of(load("26b", threads=1))
    for name in ("m.gguf", "m.dat"):
        imatrix_file.write(tmp_path / name, matrix)
        read = imatrix_file.read(tmp_path / name)
        assert (read.chunks, read.datasets) == (matrix.chunks, ("fox",))
        for key, entry in matrix.entries.items():
            means = read.entries[key].means.reshape(entry.means.shape)
            assert np.allclose(means, entry.means, rtol=1e-6)


def test_what_cannot_be_gone_on_with(load: Load) -> None:
    model = load(threads=1)
    first = next(collect(model, TEXT, CUT, "fox"))[1]
    edited = load(forms={"seed": 1}, threads=1)
    for arguments in (
        (model, "Another text. " * 30, CUT, "fox", first),
        (model, TEXT, Cut(33), "fox", first),
        (edited, TEXT, CUT, "fox", first),
        (model, TEXT, Cut(32, windows=1), "fox", all_of(model)),
        (model, TEXT, CUT, "fox", ImportanceMatrix(first.entries, ("fox",), 1, 32)),
    ):
        with pytest.raises(RequestError, match="cannot go on with"):
            next(collect(*arguments))


def test_texts_and_windows_that_cannot_be(load: Load) -> None:
    model = load(threads=1)
    with pytest.raises(OptionError, match="stride"):
        next(collect(model, TEXT, Cut(32, stride=8), "fox"))
    with pytest.raises(RequestError, match="needed for one window"):
        next(collect(model, "short", CUT, "fox"))
