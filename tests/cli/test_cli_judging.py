"""``gemloom perplexity``, ``compare`` and ``imatrix`` from outside."""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import gemloom
import tiny
from command_line import call, fine, terminal, write
from gemloom.tools.quantization import imatrix, imatrix_file
from gemloom.tools.quantization.perplexity import Cut, compare, perplexity

TEXT = "The quick brown fox jumps over the lazy dog, and nobody asks why; it does so again. " * 3
SMALL = ("--context", "32", "--threads", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.gguf and other.gguf, which quantizing has changed, with fox.txt."""
    folder = tmp_path_factory.mktemp("judging")
    write(folder).rename(folder / "base.gguf")
    write(folder, types="q8_0").rename(folder / "other.gguf")
    (folder / "fox.txt").write_text(TEXT + "\n", encoding="utf-8")
    return folder


def load(path: Path) -> gemloom.Model:
    return gemloom.load(path, context=64, threads=1)


# -- perplexity ------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--stride", "8"), ("--chunks", "2")])
def test_perplexity_is_the_librarys(folder: Path, more: tuple[str, ...]) -> None:
    done = fine("perplexity", folder / "base.gguf", folder / "fox.txt", *SMALL, *more, "--json")
    given = dict(zip(more[::2], map(int, more[1::2]), strict=True))
    how = Cut(32, given.get("--stride", 0), given.get("--chunks"))
    with load(folder / "base.gguf") as model:
        assert json.loads(done.stdout) == perplexity(model, TEXT, how).json()


def test_perplexity_for_people(folder: Path) -> None:
    shown = fine("perplexity", folder / "base.gguf", folder / "fox.txt", *SMALL).stdout
    found = json.loads(
        fine("perplexity", folder / "base.gguf", "-", *SMALL, "--json", input=TEXT).stdout
    )
    figure = found["perplexity"]
    assert f"{figure['value']:.4f} ± {figure['error']:.4f}" in shown
    assert shown.splitlines()[1].split()[-2:] == [f"{found['tokens']:,}", str(found["windows"])]


def test_a_bar_with_the_estimate(folder: Path) -> None:
    with terminal("perplexity", folder / "base.gguf", folder / "fox.txt", *SMALL) as opened:
        status, text = opened.finish()
    assert status == 0
    assert re.search(r"base\.gguf: perplexity \d+\.\d{4} ±", re.sub(r"\x1b\[[\d;]*m", "", text))


# -- compare ---------------------------------------------------------------------------------


def test_compare_is_the_librarys(folder: Path) -> None:
    names = [str(folder / name) for name in ("base.gguf", "other.gguf", "base.gguf")]
    done = json.loads(fine("compare", *names, folder / "fox.txt", *SMALL, "--json").stdout)
    with load(folder / "base.gguf") as base, load(folder / "other.gguf") as other:
        found = compare(base, other, TEXT, Cut(32)).json()
    first, same = done["models"]
    assert {**first, "model": found["model"]} == first | found
    assert first["divergence"]["value"] > 0 == same["divergence"]["value"]
    assert [done["base"]["file"], first["file"], same["file"]] == names
    assert first["bits_per_weight"] < 9 < 31 < same["bits_per_weight"] <= 32
    weights = sum(value.nbytes for value in tiny.tensors(tiny.VARIANTS["e2b"]).values())
    assert same["bytes"] == done["base"]["bytes"] == weights


def test_the_base_is_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For three models, of which none is loaded beside another."""
    loaded: list[str] = []
    real = gemloom.Model.logits_in_parts

    def watched(model: gemloom.Model, *given: Any) -> Any:
        if model.name not in loaded[-1:]:
            loaded.append(model.name)
        return real(model, *given)

    monkeypatch.setattr(gemloom.Model, "logits_in_parts", watched)
    names = [folder / f"{name}.gguf" for name in ("base", "other", "base", "other")]
    fine("compare", *names, folder / "fox.txt", *SMALL, "--chunks", "2")
    assert len(loaded) == 4


def test_a_disk_that_is_full(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # what it found before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Mock(free=4096))
    names = [folder / "base.gguf", folder / "other.gguf", folder / "other.gguf"]
    failed = call("compare", *names, folder / "fox.txt", *SMALL)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert f"{tmp_path} has 4.0 KiB free: fewer --chunks" in failed.stderr
    assert not list(tmp_path.iterdir())
    fine("compare", *names[:2], folder / "fox.txt", *SMALL)  # one model needs no disk


def test_compare_for_people(folder: Path) -> None:
    names = (folder / "base.gguf", folder / "other.gguf")
    lines = fine("compare", *names, folder / "fox.txt", *SMALL).stdout.splitlines()
    begun = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert begun == ["model", "base.gguf", "other.gguf"]
    assert max(map(len, lines)) <= 80


def test_a_picture(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    names, out = [folder / "base.gguf", folder / "other.gguf"], tmp_path / "quality.png"
    fine("compare", *names, names[0], folder / "fox.txt", *SMALL, "--chunks", "1", "--picture", out)
    image = imread(out)
    assert image.shape[0] > 400 and image.shape[1] > 800
    assert 0.001 < np.mean(image[..., :3].min(axis=2) < 0.5) < 0.3  # something is drawn


def test_pictures_that_cannot_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is loaded."""
    arguments = ("compare", "no.gguf", "no.gguf", folder / "fox.txt", "--picture")
    for name, told, status in (("q.pdf", "only .png", 2), ("no/q.png", "no folder no", 1)):
        failed = call(*arguments, name)
        assert failed.exit_code == status and told in failed.stderr
    monkeypatch.setattr("gemloom.cli.picture.find_spec", lambda name: None)
    failed = call(*arguments, "q.png")
    assert failed.exit_code == 2
    assert failed.stderr == "gemloom: --picture needs matplotlib: pip install 'gemloom[pictures]'\n"


# -- imatrix ---------------------------------------------------------------------------------


def test_imatrix_is_the_librarys(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "fox.gguf"
    done = fine("imatrix", folder / "base.gguf", folder / "fox.txt", out, *SMALL)
    with load(folder / "base.gguf") as model:
        *_, (_, expected) = imatrix.collect(model, TEXT, Cut(32), "fox.txt")
    found = imatrix_file.read(out)
    assert (found.datasets, found.chunks, found.chunk_size) == (("fox.txt",), expected.chunks, 32)
    for name, entry in expected.entries.items():
        assert np.array_equal(found.entries[name].sums, entry.sums)
    count = expected.chunks
    assert done.stdout == ""
    assert f"{count} of {count} windows, {len(found.entries)} matrices" in done.stderr


@pytest.mark.parametrize("resumed", [False, True])
def test_imatrix_for_programs(folder: Path, tmp_path: Path, resumed: bool) -> None:
    """Also where all windows were there already."""
    out = tmp_path / "fox.gguf"
    arguments = ("imatrix", folder / "base.gguf", folder / "fox.txt", out, *SMALL)
    if resumed:
        fine(*arguments)
    done = fine(*arguments, "--json", *(["--resume"] if resumed else []))
    found = imatrix_file.read(out)
    assert json.loads(done.stdout) == {
        "file": str(out), "windows": found.chunks, "of": found.chunks, "context": 32,
        "datasets": ["fox.txt"], "matrices": len(found.entries), "experts_unmet": 0,
    }  # fmt: skip
    assert done.stderr == ""


def test_interrupted_and_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the third window: two are there, whole; then the rest, to the byte."""
    arguments = ("imatrix", folder / "base.gguf", folder / "fox.txt")
    whole, out = tmp_path / "whole.gguf", tmp_path / "part.gguf"
    fine(*arguments, whole, *SMALL)
    real, calls = imatrix.squares, iter([False, False, True])

    def squares(*given: object) -> object:
        if next(calls, False):
            raise KeyboardInterrupt
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(imatrix, "squares", squares)
    stopped = call(*arguments, out, *SMALL)
    assert stopped.exit_code == 130
    assert imatrix_file.read(out).chunks == 2
    fine(*arguments, out, *SMALL, "--resume")
    assert out.read_bytes() == whole.read_bytes()
    assert "all windows are there already" in fine(*arguments, out, *SMALL, "--resume").stderr
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["part.gguf", "whole.gguf"]


def test_written_meanwhile(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is killed has on disk what it knew a minute ago; here, a window ago."""
    monkeypatch.setattr("gemloom.cli.imatrix.SAVE_EVERY", 0.0)
    written: list[int] = []
    monkeypatch.setattr(imatrix_file, "write", lambda path, matrix: written.append(matrix.chunks))
    fine("imatrix", folder / "base.gguf", folder / "fox.txt", tmp_path / "m.gguf", *SMALL)
    assert len(written) > 2
    assert written == list(range(1, written[-1] + 1))


def test_the_older_format(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "fox.dat"
    fine("imatrix", folder / "base.gguf", folder / "fox.txt", out, *SMALL, "--chunks", "1")
    assert imatrix_file.read(out).datasets == ("fox.txt",)
    failed = call("imatrix", folder / "base.gguf", folder / "fox.txt", out, "--resume")
    assert failed.exit_code == 2 and "write a .gguf" in failed.stderr


# -- what is wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["perplexity", "compare", "imatrix"])
@pytest.mark.parametrize(
    ("text", "options", "status", "told"),
    [
        ("fox.txt", ("--context", "4"), 2, "context must be at least 8"),
        ("fox.txt", ("--context", "2048"), 1, "are needed for one window"),
        ("fox.txt", ("--chunks", "0"), 2, "windows must be at least 1"),
        ("none.txt", (), 1, "none.txt: No such file"),
        ("base.gguf", (), 1, "is not UTF-8"),
    ],
)
def test_wrong_usage(
    folder: Path, command: str, text: str, options: tuple[str, ...], status: int, told: str
) -> None:
    models = [folder / "base.gguf"] * (2 if command == "compare" else 1)
    out = [folder / "out.gguf"] if command == "imatrix" else []
    failed = call(command, *models, folder / text, *out, *options)
    assert (failed.exit_code, failed.stdout) == (status, "")
    assert told in failed.stderr and failed.stderr.count("\n") == 1
    assert not (folder / "out.gguf").exists()


def test_no_folder_for_the_matrix(folder: Path) -> None:
    failed = call("imatrix", folder / "base.gguf", folder / "fox.txt", folder / "no" / "m.gguf")
    assert failed.exit_code == 1 and "there is no folder" in failed.stderr
