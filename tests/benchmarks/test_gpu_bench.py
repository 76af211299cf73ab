"""benchmarks/gpu.py: its whole course on the CPU with tiny models, and its build with a compiler
that only notes what it is told. No time is held against anything, and nothing here needs a GPU.
"""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

import cpu_devices
import gemloom
import tiny
from gemloom.errors import DeviceError
from gemloom.testing import parts_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_build  # noqa: E402
import gpu_parity  # noqa: E402
import synthetic  # noqa: E402


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(BENCHMARKS / "gpu.py"), "--threads", "1", *arguments]
    return subprocess.run(script, capture_output=True, text=True)


def test_a_dry_run_measures_each_part_once(tmp_path: Path) -> None:
    common = ("--device", "cpu", "--tiny", "--cache", str(tmp_path), "--name", "dry")
    first = command(*common, "--only", "parity", "e2b", "--out", str(tmp_path / "out"))
    assert first.returncode == 0, first.stderr
    for row in (
        "| e2b f32, f16 cells |", "| e2b-q4_k_m, q8_0 cells |", "| e2b | prompt 24 by 16 |",
        "| e2b | prompt 24 by 32 |", "| e2b | decode 2 at 24 |",
    ):  # fmt: skip
        assert row in first.stdout
    before = json.loads((tmp_path / "dry.json").read_text())
    plan, ours = gpu.TINY, before["parts"]["e2b"]["gemloom"]
    assert set(ours["prompt"]) == set(map(str, plan["chunks"]))
    assert {int(n) for n in ours["prompt"]["16"]} == set(plan["prompts"])
    steps = {f"{n} at {depth}" for n in plan["sequences"] for depth in plan["depths"]}
    assert set(ours["decode"]) == steps
    assert all(s > 0 for each in ours["decode"].values() for s in each["seconds"])
    assert before["parts"]["parity"]["e2b f32, f16 cells"]["greedy"] > 0
    assert json.loads((tmp_path / "out" / "dry.json").read_text()) == before
    assert (tmp_path / "out" / "dry.md").read_text() == first.stdout

    second = command(*common, "--only", "bandwidth", "e2b")
    assert second.returncode == 0, second.stderr
    after = json.loads((tmp_path / "dry.json").read_text())
    assert after["parts"].pop("bandwidth")["bytes"] > 0
    assert after == before  # nothing of it was measured again
    assert "GB/s" in second.stdout and "| e2b f32, f16 cells |" in second.stdout


def test_what_was_found_before_a_failure_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def begin(path: Path, *_: Any) -> Any:
        return json.loads(path.read_text()) if path.is_file() else {"parts": {}}

    def step(name: str) -> str:
        asked.append(name)
        if asked == ["a", "llama.cpp"]:
            raise DeviceError("gone")
        return name

    steps = {name: partial(step, name) for name in ("a", "llama.cpp")}
    monkeypatch.setattr(gpu, "_begin", begin)
    monkeypatch.setattr(gpu, "_steps", lambda *_: steps)
    options = Namespace(
        tiny=True, cache=tmp_path, out=None, name="kept", only=["e2b"], again=False, folder=None,
        peer=None,
    )  # fmt: skip
    with pytest.raises(DeviceError):
        gpu.measure(options)
    gpu.measure(options)
    gpu.measure(options)
    assert asked == ["a", "llama.cpp", "llama.cpp"]
    found = json.loads((tmp_path / "kept.json").read_text())
    assert found["parts"]["e2b"] == {"a": "a", "llama.cpp": "llama.cpp"}


def test_an_unknown_device_is_named(tmp_path: Path) -> None:
    done = command("--device", "cuda7", "--tiny", "--cache", str(tmp_path), "--only", "parity")
    assert done.returncode == 1
    assert "cuda7" in done.stderr and "Traceback" not in done.stderr


def result(**parts: Any) -> dict[str, Any]:
    device = {"description": "A chip", "name": "CUDA0", "ggml": "1"}
    return {"device": device, "when": "now", "parts": parts}


def step(seconds: float, **milliseconds: float) -> dict[str, Any]:
    phases = {"launch": 0.0, "compute": 0.0, "ahead": 0.0} | milliseconds
    return {"seconds": [seconds], "milliseconds": phases, "outside": 0.0625}


def test_ratios_and_shares_are_of_medians() -> None:
    ours = {
        "prompt": {"512": {"100": [2.0, 1.0, 9.0]}, "2048": {"100": [1.0]}},
        "decode": {"4 at 10": {**step(0, launch=1, compute=3), "seconds": [3.0, 2.0, 1.0]}},
        "whole": {"4 at 10": step(4.0, compute=1)}, "fallbacks": {"top_k": 2},
    }  # fmt: skip
    peer = {
        "prompt": {"512": {"100": [3.0]}, "2048": {"100": [2.0]}}, "decode": {"4 at 10": [1.0]},
    }  # fmt: skip
    found = {
        "plan": {"decode": 8}, "gemloom": ours, "llama.cpp": peer, "bytes": {"4 at 10": 50},
    }  # fmt: skip
    text = gpu.tables(result(e2b=found, bandwidth={"bytes": 1000.0}))
    assert "| e2b | prompt 100 by 512 | 50.0 | 33.3 | 1.50 |  |  |  |" in text
    assert "| e2b | prompt 100 by 2048 | 100.0 | 50.0 | 2.00 |  |  |  |" in text
    # 8 steps of 50 bytes in 2 s are 200 bytes a second of 1,000
    assert "| e2b | decode 4 at 10 | 16.0 | 32.0 | 0.50 | 20% | 6.2% | 25.0% |" in text
    assert "| e2b | decode 4 at 10, all logits read | 8.0 |  |  | 10% | 6.2% | 0.0% |" in text
    assert "top_k" in text


def compared(worst: float, **lacking: int) -> dict[str, Any]:
    return {
        "mean": worst / 2, "worst": worst, "max": 1.0, "same": 1.0, "greedy": None,
        "lacking": lacking,
    }  # fmt: skip


def test_an_error_that_is_no_rounding_fails() -> None:
    each = {
        "a f32, f16 cells": 0.001, "a q4_k, f16 cells": 0.06, "b f32, f16 cells": 0.06,
        "b q4_k, f16 cells": 0.6, "c f32, f16 cells": float("nan"),
    }  # fmt: skip
    small = {name: compared(worst) for name, worst in each.items()}
    real = {"parity": {"f16 cells": compared(0.3), "q8_0 cells": compared(0.9)}}
    assert gpu.wrong({"parts": {"parity": small, "26b": real}}) == [
        "b f32, f16 cells", "b q4_k, f16 cells", "c f32, f16 cells", "26b-cut, q8_0 cells",
    ]  # fmt: skip
    assert gpu.wrong(result()) == []


def test_what_was_not_on_the_device_was_not_compared() -> None:
    small = {"a f32, f16 cells": compared(0.0, attention=3), "b q4_k, f16 cells": compared(0.0)}
    found = result(parity=small | {"c q4_k, f16 cells": compared(0.0, top_k=1)})
    assert gpu.wrong(found) == ["a f32, f16 cells"]
    assert "| 3 attention |" in gpu.tables(found)


@pytest.mark.parametrize("name", gpu.SMALL["structures"])
def test_small_models_have_the_heads_of_real_ones(name: str) -> None:
    """By the shapes of the files that are measured, where there is one."""
    made = gpu_parity.variant(name)
    assert (made.head_dim, made.head_dim_full) == (256, 512)
    assert {"s", "f"} == set(made.pattern) and made.window % 128 == 0
    files = {"e2b": synthetic.E2B, "e4b": synthetic.E4B, "26b": synthetic.A4B}
    if shape := files.get(name):
        heads = (shape.n_head, shape.n_kv, shape.n_kv_full)
        assert (made.n_head, made.n_kv, made.n_kv_full) == heads
        assert bool(made.n_shared) == bool(shape.n_shared)


def test_a_window_of_one_cell_more_is_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    made = gpu_parity.variant("e2b")
    job = {
        "device": "cpu", "threads": 1, "sequences": 2, "cells": "f16", "window": made.window,
        "chunk": made.window,
    }  # fmt: skip
    data, loaded = tiny.gguf_bytes(made), gpu_parity._loaded
    assert gpu_parity._beside(data, job)["worst"] < gpu.WORST_F32 / 4

    @contextmanager
    def wider(source: Any, device: str, kernels: str, job: Any) -> Iterator[gemloom.Model]:
        with loaded(source, device, kernels, job) as model:
            shape = parts_of(model).store.shape
            parts_of(model).store.shape = replace(shape, window=shape.window + (kernels == "auto"))
            yield model

    monkeypatch.setattr(gpu_parity, "_loaded", wider)
    assert gpu_parity._beside(data, job)["worst"] > 4 * gpu.WORST_F32


@pytest.mark.parametrize(("heads", "told"), [(8, {}), (2, {"attention": 1})])
def test_attention_that_is_not_on_the_device_is_told(
    heads: int, told: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads of 512 to one of K/V are what CUDA says it takes, and aborts at."""
    cpu_devices.add(monkeypatch)
    data = tiny.gguf_bytes(replace(gpu_parity.variant("12b"), n_head=heads, n_kv=1))
    job = {
        "device": "cpu0", "threads": 1, "sequences": 2, "cells": "f16", "window": 128, "chunk": 128,
    }  # fmt: skip
    found = gpu_parity._beside(data, job)
    assert found["lacking"] == told and found["worst"] < gpu.WORST_F32


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
            f'#!/bin/sh\ntest {name} != cmake || echo "$@" >>{place}/notes\n'
            f'test "$1" != -S || mkdir -p "$4"\ntest ! -e {place}/fail\n'
        )
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return place


NAMES = tuple(gpu_build.SOURCES)


def build(folder: Path, **options: Any) -> None:
    for name in NAMES:
        gpu_build.build(folder, name, **{"cuda": True, "architectures": "90-real", **options})


def test_a_build_goes_on_where_it_failed(folder: Path, tools: Path) -> None:
    (tools / "fail").touch()
    with pytest.raises(gpu_build.BuildError, match=r"cmake -S .* failed with status 1"):
        build(folder)
    assert not gpu_build.built(folder, NAMES[0])
    (tools / "fail").unlink()
    (tools / "notes").unlink()
    build(folder, jobs=7)
    assert all(gpu_build.built(folder, name) for name in NAMES)
    notes = (tools / "notes").read_text().splitlines()
    configured = [line for line in notes if line.startswith("-S")]
    assert len(configured) == 2 and len(notes) == 6
    for line in configured:
        for option in ("GGML_CUDA=ON", "GGML_CUDA_GRAPHS=ON", "CMAKE_CUDA_ARCHITECTURES=90-real"):
            assert f"-D{option}" in line.split()
    assert sum(line.endswith("--parallel 7") for line in notes) == 2
    for package in ("thing", "ggml", "llama_cpp"):
        assert (gpu_build.site(folder) / package / "__init__.py").is_file()
    build(folder)
    assert (tools / "notes").read_text().splitlines() == notes  # nothing to be done


def test_a_build_is_for_the_chips_that_are_there(folder: Path, tools: Path) -> None:
    smi = tools / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '[N/A]'\n")
    smi.chmod(0o755)
    with pytest.raises(gpu_build.BuildError, match="name it by --arch"):
        build(folder, architectures=None)
    smi.write_text("#!/bin/sh\nprintf '9.0\\n8.6\\n9.0\\n'\n")
    build(folder, architectures=None)
    notes = (tools / "notes").read_text()
    assert notes.count("-DCMAKE_CUDA_ARCHITECTURES=86-real;90-real ") == 2


def test_what_a_toolkit_lacks_comes_from_packages(
    folder: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS, which a toolkit of Python's packages does not have in the compiler's own."""
    top, package = folder / "cuda", folder / "packages" / "nvidia" / "cu13"
    (top / "lib").mkdir(parents=True)
    (top / "lib" / "libcudart.so.13").touch()
    (tools / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={top}/bin/..' >&2\n")
    (top / "bin").mkdir()
    monkeypatch.setattr(sys, "path", [str(folder / "packages")])
    with pytest.raises(gpu_build.BuildError, match="has cuBLAS"):
        build(folder)
    for name in ("include/cublas_v2.h", "include/cuda.h", "lib/libcublas.so.13"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    build(folder)
    notes = (tools / "notes").read_text()
    assert notes.count(f"-DCUDA_cublas_LIBRARY={package}/lib/libcublas.so.13 ") == 2
    assert notes.count(f"-DCMAKE_CUDA_FLAGS=-I{folder}/cublas ") == 2
    assert notes.count(f"-DCMAKE_SHARED_LINKER_FLAGS=-Wl,-rpath,{top}/lib ") == 2
    assert [path.name for path in (folder / "cublas").iterdir()] == ["cublas_v2.h"]


def test_what_a_build_lacks_is_named(
    folder: Path, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wheel in (folder / "wheels").iterdir():
        wheel.unlink()
    with pytest.raises(gpu_build.BuildError, match="has no wheels: fill it with --fetch"):
        build(folder, cuda=False)
    monkeypatch.setenv("PATH", str(folder / "nothing"))
    with pytest.raises(gpu_build.BuildError, match="cmake is not on the PATH"):
        build(folder)
    done = command("--from", str(folder), "--only", "parity")
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {folder} is not built: run with --only build first"
    options = Namespace(folder=folder, peer=None)
    with pytest.raises(gpu_build.BuildError, match="--only peer first"):
        gpu._need_peer(options)


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
