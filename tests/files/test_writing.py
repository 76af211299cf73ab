"""A GGUF that is written is there whole or not at all; what it holds is what was given."""

import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import given
from hypothesis import strategies as st

import tiny
from command_line import ENVIRONMENT
from gemloom.errors import ConfigError, OutputError, TensorError
from gemloom.files import gguf, source, writing
from gemloom.files.blob import Blob
from gemloom.files.writing import GGUFWriter, Planned, encode

F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
KEYS = {"general.architecture": "gemma3", "general.file_type": 7}
PLAN = [Planned("a", F32, (8, 3)), Planned("b", Q8_0, (64, 5)), Planned("c", F32, (1,))]


def content(planned: Planned) -> bytes:
    return bytes(np.random.default_rng(len(planned.name)).bytes(planned.nbytes))


def write(path: Path, plan: list[Planned] = PLAN, **options: Any) -> None:
    with GGUFWriter(path, KEYS, plan, **options) as out:
        for planned in plan:
            if planned.name not in out.done:
                out.write(planned.name, content(planned))


class StoppedError(Exception):
    """What ends a run before its end."""


def stopped(path: Path, count: int, keys: dict[str, Any] = KEYS, **options: Any) -> frozenset[str]:
    """A run that ends after ``count`` tensors; returns what it had not to write."""
    done: frozenset[str] = frozenset()
    try:
        with GGUFWriter(path, keys, PLAN, **options) as out:
            done = out.done
            for planned in PLAN[:count]:
                out.write(planned.name, content(planned))
            raise StoppedError
    except StoppedError:
        return done


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_copy_is_the_same_file(tmp_path: Path, variant: str) -> None:
    """Byte for byte what gguf's own writer made, from its values as they lay there."""
    data = tiny.gguf_bytes(tiny.VARIANTS[variant], types="q8_0")
    file = gguf.parse(Blob(variant, [memoryview(data)]))
    plan = [Planned(t.name, t.type, t.shape) for t in file.tensors.values()]
    with GGUFWriter(tmp_path / "copy.gguf", file.metadata.encoded, plan) as out:
        for info in file.tensors.values():
            out.write(info.name, info.data())
    assert (tmp_path / "copy.gguf").read_bytes() == data
    assert left(tmp_path) == ["copy.gguf"]


numbers = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(width=32, allow_nan=False),
    st.text(),
    st.lists(st.text(), min_size=1),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1),
    st.lists(st.booleans(), min_size=1),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1),
)


@given(value=numbers)
def test_values_come_back(value: Any) -> None:
    key = b"k"
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 1) + key
    data = head + encode("k", value)
    read = gguf.parse(Blob("x", [memoryview(data)])).metadata["k"]
    assert (list(read) if isinstance(value, list) else read) == value  # type: ignore[arg-type]
    assert not isinstance(value, bool) or isinstance(read, bool)


@pytest.mark.parametrize(
    "value", [[], [1, "a"], None, [[1]], {"a": 1}, [2**70], 1e39, np.float16(1)]
)
def test_values_that_no_gguf_holds(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"some\.key"):
        encode("some.key", value)


@pytest.mark.parametrize(
    "plan",
    [
        [Planned("a", F32, (1,)), Planned("a", F32, (1,))],
        [Planned("a", Q8_0, (33,))],
        [Planned("a", F32, ())],
        [Planned("a", F32, (1, 1, 1, 1, 1))],
        [Planned("a", F32, (4, 0))],
        [Planned("a" * 64, F32, (1,))],
        [Planned("", F32, (1,))],
    ],
)
def test_plans_that_no_gguf_holds(tmp_path: Path, plan: list[Planned]) -> None:
    with pytest.raises(TensorError):
        GGUFWriter(tmp_path / "x.gguf", KEYS, plan)


def test_pieces_and_alignment(tmp_path: Path) -> None:
    """Another reader finds every tensor where it was put, however it came."""

    def pieces(data: bytes) -> Iterator[memoryview]:
        for start in range(0, len(data), 7):
            yield memoryview(data)[start : start + 7]

    keys = KEYS | {"general.alignment": 64}
    with GGUFWriter(tmp_path / "x.gguf", keys, PLAN) as out:
        for planned in PLAN:
            out.write(planned.name, pieces(content(planned)))
    reader = GGUFReader(tmp_path / "x.gguf")
    assert reader.alignment == 64
    for planned, tensor in zip(PLAN, reader.tensors, strict=True):
        assert (tensor.name, tensor.tensor_type) == (planned.name, planned.type)
        assert tuple(tensor.shape) == planned.shape
        assert tensor.data.tobytes() == content(planned)


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")
    stopped(path, 2)
    assert path.read_bytes() == b"old"
    assert left(tmp_path) == ["x.gguf"]


def test_a_tensor_not_written_is_noticed(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="not written"),
        GGUFWriter(tmp_path / "x.gguf", KEYS, PLAN) as out,
    ):
        out.write("a", content(PLAN[0]))
    assert left(tmp_path) == []


def test_two_that_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with GGUFWriter(path, KEYS, PLAN) as out:
        with pytest.raises(OutputError, match="another process"):
            write(path)
        for planned in PLAN:
            out.write(planned.name, content(planned))
    assert list(gguf.read(source.resolve(path)).tensors) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["no/such/x.gguf", "folder", "file/x.gguf"])
def test_no_place_to_write(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=name):
        write(tmp_path / name)
    assert left(tmp_path) == ["file", "folder"]


def test_a_disk_too_small_is_told_first(tmp_path: Path) -> None:
    huge = [Planned("a", F32, (2**40, 2**10))]
    with pytest.raises(OutputError, match="free"):
        write(tmp_path / "x.gguf", huge)
    assert left(tmp_path) == []


def test_disk_full_on_the_way(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writes fail half-way all the same."""
    big = [Planned(name, F32, (1 << 16, 4)) for name in "abc"]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, old[1]))
    try:
        with pytest.raises(OutputError, match=r"x\.gguf: File too large"):
            write(tmp_path / "x.gguf", big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert left(tmp_path) == []
    write(tmp_path / "x.gguf", big)
    assert left(tmp_path) == ["x.gguf"]


# -- going on with what is there -------------------------------------------------------------


@pytest.fixture
def small_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SYNC", 100)


@pytest.mark.parametrize("count", range(4))
def test_resumed_is_the_same_file(tmp_path: Path, small_sync: None, count: int) -> None:
    whole, path = tmp_path / "whole.gguf", tmp_path / "x.gguf"
    write(whole)
    assert not stopped(path, count, resume=True)
    assert left(tmp_path) == ["whole.gguf", "x.gguf.partial"]
    with GGUFWriter(path, KEYS, PLAN, resume=True) as out:
        assert len(out.done) >= count - 2  # the last one may not have reached the disk
        for planned in PLAN:
            if planned.name not in out.done:
                out.write(planned.name, content(planned))
    assert path.read_bytes() == whole.read_bytes()
    assert left(tmp_path) == ["whole.gguf", "x.gguf"]


def test_other_metadata_is_not_gone_on_with(tmp_path: Path, small_sync: None) -> None:
    path = tmp_path / "x.gguf"
    stopped(path, 3, resume=True)
    assert not stopped(path, 0, KEYS | {"x": 1}, resume=True)


def test_discarded_is_begun_anew(tmp_path: Path, small_sync: None) -> None:
    path = tmp_path / "x.gguf"
    stopped(path, 3, resume=True)
    GGUFWriter(path, KEYS, PLAN, resume=True).discard()
    assert left(tmp_path) == []
    assert not stopped(path, 0, resume=True)


def test_what_is_being_written_is_not_discarded(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with GGUFWriter(path, KEYS, PLAN) as out:
        with pytest.raises(OutputError, match="another process"):
            GGUFWriter(path, KEYS, PLAN).discard()
        for planned in PLAN:
            out.write(planned.name, content(planned))
    assert left(tmp_path) == ["x.gguf"]


WRITER = """
import sys, time
from gguf import GGMLQuantizationType
from gemloom.files.writing import GGUFWriter, Planned
plan = [Planned(f"t{i}", GGMLQuantizationType.F32, (1 << 10,)) for i in range(200)]
resume = sys.argv[2] == "resume"
with GGUFWriter(sys.argv[1], {"general.architecture": "gemma3"}, plan, resume=resume) as out:
    for planned in plan:
        if planned.name not in out.done:
            out.write(planned.name, bytes(planned.nbytes))
            if planned.name == sys.argv[3]:
                print("half", flush=True)
                time.sleep(300)
"""


@pytest.mark.parametrize("mode", ["resume", "anew"])
def test_killed_in_the_middle(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")
    partial = tmp_path / "x.gguf.partial"
    command = [sys.executable, "-c", WRITER, str(path), mode]
    with subprocess.Popen([*command, "t100"], env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert partial.stat().st_size > 50_000
    assert path.read_bytes() == b"old"
    subprocess.run([*command, "none"], env=ENVIRONMENT, check=True)
    assert len(gguf.read(source.resolve(path)).tensors) == 200
    assert os.listdir(tmp_path) == ["x.gguf"]
