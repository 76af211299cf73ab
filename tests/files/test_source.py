"""Where weights come from: every kind of source gives the same bytes, or one line of why not."""

from __future__ import annotations

import array
import ctypes
import gc
import gzip
import io
import lzma
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

from gemloom.errors import FormatError, OptionError, SourceError
from gemloom.files import gguf, source
from small_gguf import SMALL, blob, content, cut, part, places, plain, refusal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    path.write_bytes(SMALL)
    return path


# -- paths ----------------------------------------------------------------------------


def test_path_is_mapped_and_not_read(path: Path) -> None:
    for given in (path, str(path), os.fsencode(path).decode()):
        (only,) = source.resolve(given)
        assert content([only]) == SMALL
        assert only.name == str(path)
        assert isinstance(only.parts[0].obj, mmap.mmap)
        assert only.parts[0].readonly


def test_opening_a_large_file_costs_milliseconds(tmp_path: Path) -> None:
    large = tmp_path / "large.gguf"
    with large.open("wb") as file:
        file.write(SMALL)
        file.truncate(1 << 40)  # 1 TiB with a hole in it
    started = time.process_time()
    file = gguf.read(source.resolve(large))
    assert time.process_time() - started < 1.0
    assert plain(file) == plain(gguf.read([blob(SMALL)]))


def test_paths_that_are_no_file(tmp_path: Path, path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    assert refusal(tmp_path) == (SourceError, f"{tmp_path}: a folder; name a .gguf file in it")
    missing = tmp_path / "missing.gguf"
    assert refusal(missing) == (SourceError, f"{missing}: no such file")
    assert refusal(tmp_path / "empty.gguf") == (FormatError, f"{tmp_path / 'empty.gguf'}: empty")
    assert refusal(path / "x") == (SourceError, f"{path / 'x'}: Not a directory")
    assert refusal("a\0b")[0] is SourceError
    assert refusal("gemma-4")[1].startswith("gemma-4: no such file; the built-in model is gemma-3")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads anything")
def test_path_without_permission(path: Path) -> None:
    path.chmod(0)
    assert refusal(path) == (SourceError, f"{path}: Permission denied")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipe_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[SMALL])
    writer.start()
    assert content(source.resolve(pipe)) == SMALL
    writer.join()


# -- split files ----------------------------------------------------------------------


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"m-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    for number, file in enumerate(paths):
        one = part(number, 3, f"t{number}", 3)
        file.write_bytes(one.view(0, one.size))
    return paths


def test_split_file_by_its_first_part_or_by_all(split: list[Path]) -> None:
    for given in (split[0], split, tuple(map(str, split)), [file.read_bytes() for file in split]):
        assert list(gguf.read(source.resolve(given)).tensors) == ["t0", "t1", "t2"]


def test_split_file_by_another_part(split: list[Path]) -> None:
    kind, message = refusal(split[1])
    assert kind is SourceError
    assert message == f"{split[1]}: a later part of a split file; name its first part, {split[0]}"


def test_split_file_with_a_part_missing(split: list[Path]) -> None:
    split[2].unlink()
    assert refusal(split[0]) == (SourceError, f"{split[2]}: no such file")
    assert refusal(split[:2])[1].startswith(
        f"{split[0]}: expected part 1 of 2, but its split.count"
    )


def test_split_file_in_the_wrong_order(split: list[Path]) -> None:
    assert refusal(split[::-1])[1].endswith("expected part 1 of 3, but its split.no is 2")


def test_a_count_of_zero_is_part_of_the_name(tmp_path: Path) -> None:
    odd = tmp_path / "m-00001-of-00000.gguf"
    odd.write_bytes(SMALL)
    assert content(source.resolve(odd)) == SMALL


# -- buffers --------------------------------------------------------------------------


def address(buffer: Any) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def padded() -> bytes:
    return SMALL + bytes(-len(SMALL) % 32)


@pytest.mark.parametrize(
    "kind",
    [
        bytes,
        bytearray,
        memoryview,
        lambda data: np.frombuffer(data, np.uint8),
        lambda data: np.frombuffer(data, "<f4").reshape(-1, 2),
        lambda data: np.frombuffer(data, ">i8"),
        lambda data: array.array("B", data),
        lambda data: (ctypes.c_ubyte * len(data)).from_buffer_copy(data),
    ],
)
def test_buffers_are_used_in_place(kind: Any) -> None:
    given = kind(padded())
    (only,) = source.resolve(given)
    assert content([only]) == padded()
    assert address(only.parts[0]) == address(given)
    assert only.parts[0].readonly


def test_mmap_is_used_in_place(path: Path) -> None:
    with path.open("rb") as file:
        given = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    blobs = source.resolve(given)
    assert content(blobs) == SMALL
    with pytest.raises(BufferError):
        given.close()


def test_the_caller_s_buffer_lives_as_long_as_the_blob() -> None:
    class Bytes(bytearray):
        pass

    given = Bytes(SMALL)
    alive, blobs = weakref.ref(given), source.resolve(given)
    with pytest.raises(BufferError):
        given.append(0)
    del given
    gc.collect()
    assert alive() is not None
    assert content(blobs) == SMALL
    del blobs
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    "given",
    [
        np.zeros((4, 4), np.uint8)[:, ::2],
        memoryview(b"abcd")[::2],
        np.zeros((2, 2), np.uint8).T[:1],
    ],
)
def test_buffers_that_are_not_contiguous(given: object) -> None:
    kind, message = refusal(given)
    assert kind is OptionError
    assert "not C-contiguous" in message


def test_a_released_buffer() -> None:
    view = memoryview(b"abc")
    view.release()
    assert refusal(view)[0] is OptionError


@pytest.mark.parametrize(
    "given", [None, 5, {"a": b""}, {b""}, iter(["a"]), object(), socket.socket, [5], [[b""]], []]
)
def test_anything_else_is_named(given: object) -> None:
    kind, message = refusal(given)
    assert kind is OptionError
    inner = given[0] if isinstance(given, list) and given else given
    assert type(inner).__name__ in message


# -- parts of one file ----------------------------------------------------------------


@hypothesis.given(places)
def test_parts_cut_anywhere(places: list[int]) -> None:
    pieces = cut(SMALL, places)
    assert content(source.resolve(pieces)) == SMALL
    assert plain(gguf.read(source.resolve(tuple(pieces)))) == plain(gguf.read([blob(SMALL)]))


def test_parts_may_be_paths_and_buffers_mixed(tmp_path: Path) -> None:
    first, second, third = cut(SMALL, [100, 1000])
    (tmp_path / "a").write_bytes(first)
    (tmp_path / "c").write_bytes(third)
    (only,) = source.resolve([tmp_path / "a", bytearray(second), str(tmp_path / "c")])
    assert content([only]) == SMALL
    assert only.name == f"{tmp_path / 'a'} and 2 more parts"


def test_parts_in_the_wrong_order_or_missing() -> None:
    first, second, third = cut(SMALL, [100, 1000])
    kind, message = refusal([second, first, third])
    assert kind is FormatError
    assert message.endswith("are its parts in order?")
    assert "truncated: tensor" in refusal(cut(SMALL, [100, len(SMALL) - 200])[:2])[1]
    assert refusal([first, third, second])[0] is FormatError


# -- file objects ---------------------------------------------------------------------


def test_a_real_file_is_mapped_from_its_position(path: Path) -> None:
    path.write_bytes(b"ahead" + SMALL)
    with path.open("rb") as file:
        assert file.read(5) == b"ahead"
        (only,) = source.resolve(file)
        assert file.tell() == 5
    assert content([only]) == SMALL  # also after the file is closed
    assert only.name == str(path)
    whole = only.parts[0].obj
    assert isinstance(whole, mmap.mmap)


def test_other_real_files(path: Path) -> None:
    with path.open("rb", buffering=0) as raw, tempfile.NamedTemporaryFile() as named:
        named.write(SMALL)
        named.seek(0)
        for file in (raw, named):
            (only,) = source.resolve(file)
            assert content([only]) == SMALL
            assert isinstance(only.parts[0].obj, mmap.mmap)


def test_files_whose_bytes_are_not_those_on_disk(tmp_path: Path) -> None:
    for module, ending in ((gzip, "gz"), (lzma, "xz")):
        packed = tmp_path / f"small.{ending}"
        with module.open(packed, "wb") as file:
            file.write(SMALL)
        with module.open(packed, "rb") as file:
            assert content(source.resolve(file)) == SMALL


def test_streams_are_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_PIECE", 100)
    stream = io.BytesIO(b"ahead" + SMALL)
    stream.seek(5)
    assert content(source.resolve(stream)) == SMALL
    left, right = socket.socketpair()
    with left, right, right.makefile("rb") as receiver:
        threading.Thread(target=lambda: (left.sendall(SMALL), left.close())).start()
        assert content(source.resolve(receiver)) == SMALL
    command = [sys.executable, "-c", "import sys; sys.stdout.buffer.write(bytes(range(256)) * 999)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert content(source.resolve(child.stdout)) == bytes(range(256)) * 999


class Broken(io.RawIOBase):
    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        raise EOFError("half a file")


class NonBlocking(io.RawIOBase):
    def read(self, size: int = -1) -> None:
        return None


def test_file_objects_that_cannot_be_used(path: Path) -> None:
    assert refusal(io.StringIO("GGUF"))[0] is OptionError
    with path.open() as text:
        assert refusal(text) == (OptionError, f"{path}: open in text mode; open it with 'rb'")
    with tempfile.NamedTemporaryFile("w+") as text:
        assert refusal(text)[0] is OptionError
    with path.open("rb") as closed:
        pass
    assert refusal(closed)[0] is SourceError
    with path.open("r+b") as end:
        end.seek(0, os.SEEK_END)
        assert refusal(end) == (FormatError, f"{path}: empty after byte {len(SMALL):,}")
    with path.open("ab") as unreadable:
        unreadable.seek(0)
        assert refusal(unreadable) == (SourceError, f"{path}: Permission denied")
    assert refusal(io.BytesIO()) == (FormatError, "<BytesIO>: empty")
    broken = "<Broken>: reading failed after 0 bytes: half a file"
    assert refusal(Broken()) == (SourceError, broken)
    assert refusal(NonBlocking())[0] is SourceError
