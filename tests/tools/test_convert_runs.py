"""Conversions that are stopped, killed or refused on the way, and those that go on after them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType as Type

import checkpoints
from command_line import ENVIRONMENT, call
from gemloom.errors import OptionError, OutputError
from gemloom.files import gguf, source, writing
from gemloom.tools import convert
from gemloom.tools.convert import checkpoint as reading
from tiny import VARIANTS


def test_what_is_there_stays(tmp_path: Path) -> None:
    folder, path = checkpoints.checkpoint(tmp_path / "in"), tmp_path / "out.gguf"
    path.write_bytes(b"old")
    plan = convert.plan(folder)
    with pytest.raises(OutputError, match="already exists; --force"):
        convert.write(plan, path)
    assert path.read_bytes() == b"old"
    convert.write(plan, path, force=True)
    assert gguf.read(source.resolve(path)).tensors


def test_types_that_are_not_made(tmp_path: Path) -> None:
    folder = checkpoints.checkpoint(tmp_path / "in")
    with pytest.raises(OptionError, match="Q4_K"):
        convert.plan(folder, Type.Q4_K)


def stopped(folder: Path, path: Path, after: int) -> None:
    """A run that ends by itself once so many bytes are read."""

    def stop(done: int) -> None:
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.write(convert.plan(folder), path, progress=stop)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SYNC", 200_000)
    monkeypatch.setattr(reading, "PIECE", 50_000)


def test_resumed_is_the_same_file(tmp_path: Path, small_steps: None) -> None:
    folder, path = checkpoints.checkpoint(tmp_path / "in", dtype="bfloat16"), tmp_path / "out.gguf"
    whole = tmp_path / "whole.gguf"
    total = convert.write(convert.plan(folder), whole)
    for after in (1, 1_000_000, 1_500_000):
        stopped(folder, path, after)
        assert not path.exists()
    made = convert.write(convert.plan(folder), path)
    assert 0 < made.resumed < sum(total.types.values())
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["in", "out.gguf", "whole.gguf"]


def test_other_weights_are_not_gone_on_with(tmp_path: Path, small_steps: None) -> None:
    """Another checkpoint of the same model differs in nothing that the new file's header has."""
    variant, path = VARIANTS["e2b"], tmp_path / "out.gguf"
    first = checkpoints.checkpoint(tmp_path / "1" / "in")
    second = checkpoints.write(
        tmp_path / "2" / "in", checkpoints.tensors(variant, seed=1), checkpoints.files(variant)
    )
    stopped(first, path, 3_000_000)
    assert convert.write(convert.plan(second), path).resumed == 0
    convert.write(convert.plan(second), tmp_path / "whole.gguf")
    assert path.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_changed_weights_are_not_gone_on_with(tmp_path: Path, small_steps: None) -> None:
    folder, path = checkpoints.checkpoint(tmp_path / "in"), tmp_path / "out.gguf"
    stopped(folder, path, 3_000_000)
    checkpoints.save(
        folder / "model.safetensors", checkpoints.tensors(VARIANTS["e2b"], seed=2), "float32"
    )
    assert convert.write(convert.plan(folder), path).resumed == 0


HALF_WAY = """
import sys, time
from gemloom.tools import convert
from gemloom.files import writing
from gemloom.tools.convert import checkpoint
writing._SYNC = checkpoint.PIECE = 100_000
def pause(done):
    if done > int(sys.argv[3]):
        print("half", flush=True)
        time.sleep(300)
made = convert.write(convert.plan(sys.argv[1]), sys.argv[2], progress=pause)
print(made.resumed)
"""


def test_killed_in_the_middle(tmp_path: Path) -> None:
    folder, path = checkpoints.checkpoint(tmp_path / "in"), tmp_path / "out.gguf"
    partial = tmp_path / "out.gguf.partial"
    command = [sys.executable, "-c", HALF_WAY, str(folder), str(path)]
    with subprocess.Popen(
        [*command, "1_000_000"], env=ENVIRONMENT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert partial.stat().st_size > 1_000_000
    assert not path.exists()
    again = subprocess.run(
        [*command, "1_000_000_000"], env=ENVIRONMENT, check=True, capture_output=True
    )
    assert int(again.stdout) > 0
    convert.write(convert.plan(folder), tmp_path / "whole.gguf")
    assert path.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["in", "out.gguf", "whole.gguf"]


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
sys.argv = ["gemloom", "convert", *sys.argv[1:]]
from gemloom.cli import main
main()
"""


def test_disk_full_on_the_way(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writes fail half-way all the same."""
    folder, path = checkpoints.checkpoint(tmp_path / "in"), tmp_path / "out.gguf"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder), str(path)],
        env=ENVIRONMENT, timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert "out.gguf: File too large; " in done.stderr and "go on from" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not path.exists()
    convert.write(convert.plan(folder), path)
    assert sorted(os.listdir(tmp_path)) == ["in", "out.gguf"]


def test_command_line(tmp_path: Path) -> None:
    folder = checkpoints.checkpoint(tmp_path / "in")
    for arguments, status, words in (
        ((tmp_path / "nowhere", tmp_path / "x.gguf"), 1, "is not a folder"),
        ((folder, tmp_path / "no" / "x.gguf"), 1, "there is no folder"),
        ((folder, tmp_path / "x.gguf", "--type", "Q4_K"), 2, "none of F32, F16, BF16, Q8_0"),
        ((folder, folder / "config.json"), 1, "--force"),
    ):
        result = call("convert", *arguments)
        assert (result.exit_code, len(result.stderr.splitlines())) == (status, 1), result.stderr
        assert words in result.stderr
