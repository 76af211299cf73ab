"""benchmarks/gpu.py: its whole course on the CPU with tiny models, and its build with a compiler
that only notes what it is told. No time is held against anything, and nothing here needs a GPU.
"""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_build  # noqa: E402


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(BENCHMARKS / "gpu.py"), "--threads", "1", *arguments]
    return subprocess.run(script, capture_output=True, text=True)


def test_a_dry_run_measures_each_part_once(tmp_path: Path) -> None:
    common = ("--device", "cpu", "--tiny", "--cache", str(tmp_path), "--name", "dry")
    first = command(*common, "--only", "parity", "e2b")
    assert first.returncode == 0, first.stderr
    for row in ("| e2b f32 |", "| e2b | prompt 24 |", "| e2b | decode 2 at 24 |"):
        assert row in first.stdout
    before = json.loads((tmp_path / "dry.json").read_text())
    plan, ours = gpu.TINY, before["parts"]["e2b"]["gemloom"]
    assert {int(n) for n in ours["prompt"]} == set(plan["prompts"])
    steps = {f"{n} at {depth}" for n in plan["sequences"] for depth in plan["depths"]}
    assert set(ours["decode"]) == set(ours["outside"]) == steps
    assert all(s > 0 for seconds in ours["decode"].values() for s in seconds)
    assert before["parts"]["parity"]["e2b f32"]["greedy"] > 0

    second = command(*common, "--only", "bandwidth", "e2b")
    assert second.returncode == 0, second.stderr
    after = json.loads((tmp_path / "dry.json").read_text())
    assert after["parts"].pop("bandwidth")["bytes"] > 0
    assert after == before  # nothing of it was measured again
    assert "GB/s" in second.stdout and "| e2b f32 |" in second.stdout


def test_an_unknown_device_is_named(tmp_path: Path) -> None:
    done = command("--device", "cuda7", "--tiny", "--cache", str(tmp_path), "--only", "parity")
    assert done.returncode == 1
    assert "cuda7" in done.stderr and "Traceback" not in done.stderr


def result(**parts: Any) -> dict[str, Any]:
    device = {"description": "A chip", "name": "CUDA0", "ggml": "1"}
    return {"device": device, "when": "now", "parts": parts}


def test_ratios_and_shares_are_of_medians() -> None:
    ours = {
        "prompt": {"100": [2.0, 1.0, 9.0]}, "decode": {"4 at 10": [3.0, 2.0, 1.0]},
        "outside": {"4 at 10": 0.0625}, "fallbacks": {"top_k": 2},
    }  # fmt: skip
    peer = {"prompt": {"100": [3.0]}, "decode": {"4 at 10": [1.0]}}
    found = {
        "plan": {"decode": 8}, "gemloom": ours, "llama.cpp": peer, "bytes": {"4 at 10": 50},
    }  # fmt: skip
    text = gpu.tables(result(e2b=found, bandwidth={"bytes": 1000.0}))
    assert "| e2b | prompt 100 | 50.0 | 33.3 | 1.50 |  |  |" in text
    # 8 steps of 50 bytes in 2 s are 200 bytes a second of 1,000
    assert "| e2b | decode 4 at 10 | 16.0 | 32.0 | 0.50 | 20% | 6.2% |" in text
    assert "top_k" in text


def test_an_error_that_is_no_rounding_fails() -> None:
    each = {"a f32": 0.001, "a q4_k": 0.06, "b f32": 0.06, "b q4_k": 0.6, "c f32": float("nan")}
    parity = {name: {"mean": mean, "max": 1.0, "greedy": 3} for name, mean in each.items()}
    assert gpu.wrong(result(parity=parity)) == ["b f32", "b q4_k", "c f32"]
    assert gpu.wrong(result()) == []


# --- building -------------------------------------------------------------------


def archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as made:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, BytesIO(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As ``fetch`` leaves it, with next to nothing in it."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "sources").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing/__init__.py", "")
    for name, package in (("ggml-python", "ggml"), ("llama-cpp-python", "llama_cpp")):
        stem = gpu_build._stem(name)
        members = {f"{stem}/{package}/__init__.py": b"", f"{stem}/CMakeLists.txt": b""}
        archive(tmp_path / "sources" / f"{stem}.tar.gz", members)
    return tmp_path


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """cmake, c++ and nvcc; cmake only makes its folder and notes its arguments, or fails."""
    place = tmp_path / "tools"
    place.mkdir()
    for name in ("cmake", "c++", "nvcc"):
        tool = place / name
        tool.write_text(
            f'#!/bin/sh\necho "$@" >>{place}/notes\n'
            f'test "$1" != -S || mkdir -p "$4"\ntest ! -e {place}/fail\n'
        )
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return place


def test_a_build_goes_on_where_it_failed(folder: Path, tools: Path) -> None:
    (tools / "fail").touch()
    with pytest.raises(gpu_build.BuildError, match=r"cmake -S .* failed with status 1"):
        gpu_build.build(folder, cuda=True)
    assert not gpu_build.built(folder)
    (tools / "fail").unlink()
    (tools / "notes").unlink()
    gpu_build.build(folder, cuda=True, architectures="90")
    assert gpu_build.built(folder)
    notes = (tools / "notes").read_text().splitlines()
    configured = [line for line in notes if line.startswith("-S")]
    assert len(configured) == 2 and len(notes) == 6
    for line in configured:
        assert "-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90 -DGGML_CUDA_GRAPHS=ON" in line
    for package in ("thing", "ggml", "llama_cpp"):
        assert (gpu_build.site(folder) / package / "__init__.py").is_file()
    gpu_build.build(folder, cuda=True)
    assert (tools / "notes").read_text().splitlines() == notes  # nothing to be done


def test_what_a_build_lacks_is_named(
    folder: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wheel in (folder / "wheels").iterdir():
        wheel.unlink()
    with pytest.raises(gpu_build.BuildError, match="has no wheels: fill it with --fetch"):
        gpu_build.build(folder, cuda=False)
    monkeypatch.setenv("PATH", str(folder / "nothing"))
    with pytest.raises(gpu_build.BuildError, match="cmake is not on the PATH"):
        gpu_build.build(folder, cuda=True)
    done = command("--from", str(folder), "--only", "parity")
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {folder} is not built: run with --only build first"


def test_only_what_no_build_reads_is_left_out(tmp_path: Path) -> None:
    kept = [
        "x-1/CMakeLists.txt", "x-1/x/__init__.py", "x-1/vendor/llama.cpp/CMakeLists.txt",
        "x-1/vendor/llama.cpp/src/models/gemma.cpp", "x-1/vendor/llama.cpp/ggml/src/ggml.c",
        "x-1/vendor/ggml/src/ggml-cuda/top-k.cu", "x-1/vendor/llama.cpp/cmake/git.cmake",
    ]  # fmt: skip
    left = [
        "x-1/vendor/llama.cpp/models/vocab.gguf", "x-1/vendor/llama.cpp/docs/a.md",
        "x-1/.git/objects/pack/a.pack", "x-1/vendor/ggml/examples/a.c",
        "x-1/vendor/llama.cpp/ggml/tests/a.c",
    ]  # fmt: skip
    path = tmp_path / "x.tar.gz"
    archive(path, {name: name.encode() for name in [*kept, *left]})
    gpu_build._trim(path)
    with tarfile.open(path) as made:
        found = {member.name: made.extractfile(member) for member in made}
        assert set(found) == set(kept)
        assert all(file and file.read() == name.encode() for name, file in found.items())
