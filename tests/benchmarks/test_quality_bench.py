"""benchmarks/quality.py on a tiny model: what it makes, measures, keeps and shows."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

import tiny
from gemloom.files import gguf, source
from gemloom.files.gguf import GGUF
from gemloom.tools.quantization import imatrix_file
from gemloom.tools.quantization.imatrix_file import Importance, ImportanceMatrix

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quality
import quality_models
import quality_tables


def opened(path: Path) -> GGUF:
    return gguf.read(source.resolve(path))


def values(file: GGUF) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(info.data(), np.float32).reshape(info.shape[::-1])
        for name, info in file.tensors.items()
    }


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 as the real one comes: quantized, with rows of no whole large blocks."""
    path = tmp_path_factory.mktemp("package") / "tiny.gguf"
    path.write_bytes(tiny.gguf_bytes(tiny.VARIANTS["gemma3"], types="q4_0"))
    return path


@pytest.fixture(scope="module")
def base(package: Path) -> GGUF:
    path = package.with_name("base.gguf")
    quality_models.make_base(opened(package), path, threads=1)
    return opened(path)


def test_the_base_is_off_the_grid_by_as_much_as_a_rounding(package: Path, base: GGUF) -> None:
    before = {
        name: quality_models.quants.dequantize(info.data(), info.type).reshape(info.shape[::-1])
        for name, info in opened(package).tensors.items()
    }
    after = values(base)
    assert {info.type for info in base.tensors.values()} == {Type.F32}
    assert base.metadata.string("general.architecture") == "gemma3"
    for name, value in after.items():
        if value.ndim == 1:
            assert np.array_equal(value, before[name])
            continue
        noise = (value - before[name]) / before[name].std(axis=1, keepdims=True)
        assert noise.std() == pytest.approx(quality_models.rounding(Type.Q4_0), rel=0.1)
        assert abs(noise.mean()) < 0.1 * noise.std()
    assert 0.05 < quality_models.rounding(Type.Q4_0) < 0.12
    assert quality_models.rounding(Type.F32) == 0


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_K, Type.IQ2_XXS])
def test_rounded_copies(base: GGUF, tmp_path: Path, kind: Type) -> None:
    """Only what was chosen is changed, by less where the importances say that it matters."""
    flat = {n: np.ones((1, t.shape[0]), "f") for n, t in base.tensors.items() if len(t.shape) > 1}
    first = {
        name: np.where(np.arange(ones.size) < 32, 1e4, 1) * ones for name, ones in flat.items()
    }
    errors = []
    for weights in (flat, first):
        entries = {n: Importance(w.astype("f"), np.array([1])) for n, w in weights.items()}
        path = tmp_path / "rounded.gguf"
        quality_models.round_matrices(
            base, path, kind, lambda name: name == "blk.1.ffn_up.weight",
            ImportanceMatrix(entries), 1,
        )  # fmt: skip
        before, after = values(base), values(opened(path))
        changed = [name for name in before if not np.array_equal(before[name], after[name])]
        assert changed == ["blk.1.ffn_up.weight"]
        change = after[changed[0]] - before[changed[0]]
        errors.append(np.sqrt((change[:, :32] ** 2).mean()) / before[changed[0]].std())
    assert 0 < errors[1] <= errors[0] < {Type.Q8_0: 0.01, Type.Q4_K: 0.12, Type.IQ2_XXS: 0.6}[kind]


def test_measured_kept_and_shown(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(quality, "MODEL", str(package))
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.json")
    monkeypatch.setattr(quality, "CALIBRATION", 2)
    wanted = [
        quality.Case("files", "Q8_0"), quality.Case("types", "Q8_0"),
        quality.Case("types", "IQ4_NL", importance=True), quality.Case("embeddings", "Q4_0"),
    ]  # fmt: skip
    monkeypatch.setattr(quality, "cases", lambda: iter(wanted))
    options = argparse.Namespace(
        windows=1, threads=1, cache=tmp_path / "cache", groups=["files", "types", "embeddings"]
    )
    quality.measure(options)
    found = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    cases = found["cases"]
    assert set(cases) == {"package", *(case.key for case in wanted)}
    kl = {key: case["divergence"]["value"] for key, case in cases.items()}
    assert 0 < kl["types Q8_0"] < kl["types IQ4_NL imatrix"]
    assert 0 < kl["files Q8_0"] < kl["package"]
    assert cases["files Q8_0"]["types"] == ["Q8_0"]
    assert imatrix_file.read(tmp_path / "cache" / "quality-imatrix.gguf").chunks == 2
    monkeypatch.setattr(quality.Bench, "measure", None)  # nothing is left to be measured
    quality.measure(options)
    quality_tables.show(found, tmp_path / "quality.png")
    shown = capsys.readouterr().out
    assert f"{kl['embeddings Q4_0']:.5f}" in shown
    assert shown.count("| IQ4_NL |") == 1
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_every_type_and_recipe_is_a_case() -> None:
    cases = list(quality.cases())
    assert len({case.key for case in cases}) == len(cases)
    types = {case.name for case in cases if case.group == "types"}
    assert types == {kind.name for kind in quality.quants.WRITABLE} - {"F32", "F16", "BF16"}
    assert {case.name for case in cases if case.group == "files"} == set(quality.recipes.RECIPES)
