"""Packed weights kept in a file: the same logits, and whatever is wrong with it, packed again."""

import errno
import io
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemloom
import tiny
from conftest import prompt, until
from gemloom.cli import terminal as cli_terminal
from gemloom.errors import OptionError
from gemloom.files import gguf, source
from gemloom.kernels import packed_file
from gemloom.kernels.library import supported
from gemloom.kernels.packing import PackingPlan
from gemloom.loading.build import build_model
from gemloom.options import Options
from tiny import VARIANTS

pytestmark = pytest.mark.skipif(not supported(), reason="no kernels for this processor")

Child = Callable[..., subprocess.Popen[str]]
PROMPT = prompt(12)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny.gguf_bytes(VARIANTS["gemma3"], types="q8_0"))
    return path


@pytest.fixture
def kept(model: Path) -> Path:
    logits(model, packed="keep")
    return model.with_name("model.gguf.packed")


def logits(model: Path, packed: str = "auto", **options: Any) -> np.ndarray:
    with gemloom.load(model, context=64, threads=1, packed=packed, **options) as loaded:
        return loaded.logits(PROMPT)


def memory(model: Path, packed: str = "auto") -> dict[str, int]:
    with gemloom.load(model, context=64, threads=1, packed=packed) as loaded:
        return loaded.memory()


@pytest.fixture
def plan(model: Path) -> PackingPlan:
    """A few matrices of the file, kept as if no others were packed."""
    file, own = gguf.read(source.resolve(model)), supported()[0]
    served = [t for t in file.tensors.values() if own.serves(t.type, t.shape[0])]
    made = PackingPlan(own, [(t, t.shape) for t in served[:9] if len(t.shape) > 1])
    assert packed_file.keep(made, 1, None) is not None
    return made


def path_of(plan: PackingPlan) -> Path:
    origin = plan.matrices[0].info.blob.origin
    assert origin
    return Path(origin.path + ".packed")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno >= logging.WARNING]


# -- kept and used -----------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "kind"), [("e2b", "q8_0"), ("26b", "q4_0")])
def test_not_a_bit_of_the_logits_changes(variant: str, kind: str, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny.gguf_bytes(VARIANTS[variant], types=kind))
    expected = logits(model, packed="off")
    assert np.array_equal(logits(model, packed="keep"), expected)  # written, then mapped
    assert np.array_equal(logits(model), expected)
    here, mapped = memory(model, "off"), memory(model)
    assert here["packed"] == mapped["packed"] > 0
    assert mapped["copied"] < here["copied"]
    assert mapped["mapped"] == here["mapped"] + here["packed"]


def test_nothing_is_written_unasked(model: Path) -> None:
    logits(model)
    assert os.listdir(model.parent) == [model.name]


def test_only_the_file_is_left(kept: Path) -> None:
    assert sorted(os.listdir(kept.parent)) == ["model.gguf", "model.gguf.packed"]


def test_it_may_be_read_by_who_may_read_the_model(model: Path) -> None:
    model.chmod(0o600)
    logits(model, packed="keep")
    assert model.with_name("model.gguf.packed").stat().st_mode & 0o777 == 0o600


def test_a_split_model(tmp_path: Path) -> None:
    variant = VARIANTS["gemma3"]
    weights = list(tiny.tensors(variant).items())
    for number, part in enumerate((weights[:5], weights[5:])):
        keys = {"split.no": number, "split.count": 2, "split.tensors.count": len(weights)}
        data = tiny.write(
            {**tiny.metadata(variant), **keys}, dict(part), tiny._type_of("q8_0", dict(part))
        )
        (tmp_path / f"m-{number + 1:05}-of-00002.gguf").write_bytes(data)
    first, second = sorted(tmp_path.iterdir())
    expected = logits(first, packed="keep")
    assert first.with_name(f"{first.name}.packed").exists()
    assert np.array_equal(logits(first), expected)
    assert memory(first)["mapped"] > memory(first, "off")["mapped"]
    os.utime(second)
    assert memory(first)["mapped"] == memory(first, "off")["mapped"]


def test_what_is_in_no_file_is_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    data = tiny.gguf_bytes(VARIANTS["gemma3"], types="q8_0")
    with gemloom.load(data, context=64, threads=1, packed="keep") as loaded:
        assert loaded.memory()["packed"] > 0
    line = "the model is not from a plain file here, so its packed weights are not kept"
    assert said(caplog) == [line]


@pytest.mark.parametrize("other", [{"mmap": False}, {"kernels": "ggml"}, {"kernels": "plain"}])
def test_keeping_what_is_not_used_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="keep"):
        Options(packed="keep", **other)


def test_a_package_without_kernels_takes_no_notice(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kept.with_suffix("")
    expected = logits(model, kernels="ggml")
    monkeypatch.setattr("gemloom.loading.build.fastest", lambda: None)
    for packed in ("auto", "keep"):
        assert np.array_equal(logits(model, packed=packed), expected)


# -- stale or damaged --------------------------------------------------------------------


def keep_time(path: Path, change: Callable[[bytearray], None]) -> None:
    """Change a file, and leave it its time."""
    before = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    os.utime(path, ns=(before, before))


def test_the_model_has_another_time(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = kept.with_suffix("")
    os.utime(model)
    assert memory(model)["mapped"] == memory(model, "off")["mapped"]
    assert said(caplog) == [
        f"{kept} belongs to another state of the model file; packing the weights again"
    ]
    assert memory(model, "keep")["mapped"] == memory(model)["mapped"]  # and it is made anew
    assert len(said(caplog)) == 2


def test_the_model_has_another_size(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = kept.with_suffix("")
    keep_time(model, lambda data: data.extend(bytes(32)))
    assert memory(model)["mapped"] == memory(model, "off")["mapped"]
    assert "another state of the model file" in said(caplog)[0]


def test_another_model_as_large_and_as_old(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, other = kept.with_suffix(""), VARIANTS["gemma3"]
    before, size = model.stat().st_mtime_ns, model.stat().st_size
    model.write_bytes(tiny.gguf_bytes(other, seed=1, types="q8_0"))
    os.utime(model, ns=(before, before))
    assert model.stat().st_size == size
    assert np.array_equal(logits(model), logits(model, packed="off"))
    assert "belongs to a model with other weights" in said(caplog)[0]


def test_packed_by_another_version(
    kept: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kept.with_suffix("")
    monkeypatch.setattr(PackingPlan, "layout", lambda plan: "00" * 16)
    assert memory(model)["mapped"] == memory(model, "off")["mapped"]
    assert "was packed by another version" in said(caplog)[0]


def test_every_byte_of_header_and_trailer_counts(plan: PackingPlan) -> None:
    """One after the other: none is taken for right, none raises."""
    kept = path_of(plan)
    data = bytearray(kept.read_bytes())
    assert_used(plan)
    header = int.from_bytes(data[16:24], "little")
    trailer = 4 * len(plan.pieces) + 64
    stamp = kept.stat().st_mtime_ns
    with open(kept, "r+b", buffering=0) as file:
        for at in [*range(header), *range(len(data) - trailer, len(data))]:
            os.pwrite(file.fileno(), bytes([data[at] ^ 1 << at % 8]), at)
            os.utime(kept, ns=(stamp, stamp))
            assert packed_file.find(plan, 1) is None, at
            os.pwrite(file.fileno(), data[at : at + 1], at)
    os.utime(kept, ns=(stamp, stamp))
    assert_used(plan)


def assert_used(plan: PackingPlan) -> None:
    assert packed_file.find(plan, 1) is not None


@settings(max_examples=100)
@given(data=st.data())
def test_a_byte_that_was_changed_since(plan: PackingPlan, data: st.DataObject) -> None:
    """Anywhere in the packed matrices: the time of the change makes all of them be compared."""
    kept = path_of(plan)
    whole = kept.read_bytes()
    piece = data.draw(st.sampled_from(plan.pieces))
    header = int.from_bytes(whole[16:24], "little")
    at = header + piece.start + data.draw(st.integers(0, piece.nbytes - 1))
    stamp = kept.stat().st_mtime_ns
    with open(kept, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), bytes([whole[at] ^ data.draw(st.integers(1, 255))]), at)
        assert packed_file.find(plan, 1) is None
        os.pwrite(file.fileno(), whole[at : at + 1], at)
    os.utime(kept, ns=(stamp, stamp))
    assert_used(plan)


@settings(max_examples=60)
@given(data=st.data())
def test_cut_short_or_longer(plan: PackingPlan, data: st.DataObject) -> None:
    kept = path_of(plan)
    whole = kept.read_bytes()
    stamp = kept.stat().st_mtime_ns
    edges = [0, 1, 23, 24, 4095, 4096, len(whole) - 1, len(whole) + 1]
    size = data.draw(st.sampled_from(edges) | st.integers(0, len(whole) - 1))
    kept.write_bytes(whole[:size].ljust(size))
    os.utime(kept, ns=(stamp, stamp))
    assert packed_file.find(plan, 1) is None
    kept.write_bytes(whole)


def test_a_copy_is_compared_whole_and_then_trusted(plan: PackingPlan) -> None:
    kept = path_of(plan)
    os.utime(kept)
    assert_used(plan)
    assert kept.stat().st_mtime_ns == kept.with_suffix("").stat().st_mtime_ns


def test_a_folder_of_that_name(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    model.with_name("model.gguf.packed").mkdir()
    assert np.array_equal(logits(model, packed="keep"), logits(model, packed="off"))
    found, written = said(caplog)
    assert "cannot be used (Is a directory)" in found
    assert "cannot be written (Is a directory); the weights are packed in memory" in written
    assert not model.with_name("model.gguf.packed.part").exists()


# -- writing goes wrong ------------------------------------------------------------------

CHILD = """
    import os, resource, signal, sys, time
    import gemloom
    {before}
    with gemloom.load({model!r}, context=64, threads=1, packed="keep") as model:
        print(model.memory()["mapped"], model.generate([2, 5], max_tokens=3, temperature=0).text)
"""


@pytest.fixture
def child(model: Path) -> Iterator[Child]:
    """Starts a process that loads the model and keeps its packed weights."""
    with ExitStack() as stack:

        def start(before: str = "") -> subprocess.Popen[str]:
            code = textwrap.dedent(CHILD).format(model=str(model), before=before)
            command, pipe = [sys.executable, "-c", code], subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def test_a_disk_that_is_full(model: Path, child: Child) -> None:
    """The second half of the file is refused; what there was before is left alone."""
    half = model.stat().st_size // 2
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({half}, {half}))"
    out, told = child(limit).communicate(timeout=60)
    mapped = int(out.split()[0])
    assert mapped == memory(model, "off")["mapped"]
    assert told.count("\n") == 1
    assert "cannot be written (File too large); the weights are packed in memory" in told
    assert os.listdir(model.parent) == [model.name]


def test_a_disk_that_is_known_to_be_full(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_file, "_free", lambda fd: 1000)
    assert np.array_equal(logits(model, packed="keep"), logits(model, packed="off"))
    assert "cannot be written (No space left on device)" in said(caplog)[0]
    assert os.listdir(model.parent) == [model.name]


# It waits for the end of stdin, which ``communicate`` closes.
HALF_WAY = textwrap.dedent("""
    from gemloom.kernels import packed_file as p
    put = p._write_piece
    def waiting(*args):
        put(*args); print("wrote", flush=True); sys.stdin.read()
    p._write_piece = waiting
""")


def test_killed_in_the_middle(model: Path, child: Child) -> None:
    """What it left is taken over by the next writer, and never used."""
    process = child(HALF_WAY)
    assert process.stdout
    assert process.stdout.readline() == "wrote\n"
    process.kill()
    process.communicate()
    assert sorted(os.listdir(model.parent)) == ["model.gguf", "model.gguf.packed.part"]
    assert memory(model)["mapped"] == memory(model, "off")["mapped"]
    assert memory(model, "keep")["mapped"] > memory(model, "off")["mapped"]
    assert sorted(os.listdir(model.parent)) == ["model.gguf", "model.gguf.packed"]


def test_interrupted_in_the_middle(model: Path, child: Child) -> None:
    process = child(HALF_WAY)
    assert process.stdout
    assert process.stdout.readline() == "wrote\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert os.listdir(model.parent) == ["model.gguf"]


def test_two_writers(model: Path, child: Child, caplog: pytest.LogCaptureFixture) -> None:
    """The second packs in memory; the file of the first is whole."""
    process = child(HALF_WAY)
    assert process.stdout
    assert process.stdout.readline() == "wrote\n"
    assert np.array_equal(logits(model, packed="keep"), logits(model, packed="off"))
    assert "cannot be written (another process is writing it)" in said(caplog)[0]
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (0, "")
    caplog.clear()
    assert memory(model)["mapped"] > memory(model, "off")["mapped"]
    assert not said(caplog)


def test_renamed_just_before_the_lock(plan: PackingPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor is that of the finished file, which others have mapped: it is not cut."""
    kept, really = path_of(plan), os.open
    whole = kept.read_bytes()

    def late(path: str, *args: Any, **more: Any) -> int:
        if str(path).endswith(".part"):
            os.rename(kept, path)
            opened = really(path, *args, **more)
            os.rename(path, kept)
            return opened
        return really(path, *args, **more)

    monkeypatch.setattr(os, "open", late)
    assert packed_file.keep(plan, 1, None) is None
    assert kept.read_bytes() == whole


def test_a_link_is_not_followed(plan: PackingPlan, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path_of(plan).with_name("model.gguf.packed.part").symlink_to(victim)
    assert packed_file.keep(plan, 1, None) is None
    assert victim.read_text() == "precious"


def test_a_folder_that_cannot_be_written(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.open

    def refuse(path: str, flags: int, *more: Any) -> int:
        if str(path).startswith(str(model.parent)) and flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return really(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    assert np.array_equal(logits(model, packed="keep"), logits(model, packed="off"))
    assert "cannot be written (Read-only file system)" in said(caplog)[0]


# -- a bar -------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("packed", ["off", "keep"])
def test_progress_goes_up_to_the_end(model: Path, packed: str) -> None:
    told: list[tuple[int, int]] = []
    options = Options(context=64, threads=1, packed=packed)
    file = gguf.read(source.resolve(model))
    with build_model(
        file, options, progress=lambda done, total: told.append((done, total))
    ) as loaded:
        packed_bytes = loaded.memory()["packed"]
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == packed_bytes


def test_the_bar_shows_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    with cli_terminal.progress("loading [red]m.gguf") as advance:
        advance(1, 4)
    assert not shown.getvalue()
    monkeypatch.setattr(cli_terminal, "_SPINNER_AFTER", 0.0)
    with cli_terminal.progress("loading [red]m.gguf") as advance:
        until(lambda: "loading [red]m.gguf" in shown.getvalue())
        advance(1, 4)
        until(lambda: "25%" in shown.getvalue())
