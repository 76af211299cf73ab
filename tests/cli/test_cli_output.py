"""What commands write: what is there already, pipes and devices, being stopped."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import checkpoints
import tiny_lora
from command_line import ENVIRONMENT, call, fine, write
from gemloom.adapters.reading import read
from gemloom.cli.output import output
from gemloom.errors import OptionError, OutputError
from gemloom.files import gguf, source

SMALL = ("--context", "32", "--threads", "1", "--chunks", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands read: models, adapters, a text, a key, a checkpoint."""
    folder = tmp_path_factory.mktemp("written")
    write(folder).rename(folder / "model.gguf")
    for seed, name in enumerate(("a1.gguf", "a2.gguf")):
        adapter = tiny_lora.lora("e2b", only="attn_q", seed=seed)
        (folder / name).write_bytes(tiny_lora.gguf_bytes(adapter))
    (folder / "text").write_text("The quick brown fox jumps over the lazy dog. " * 3)
    fine("seal", "--new-key", folder / "key")
    fine("seal", folder / "model.gguf", folder / "sealed", "--key-file", folder / "key")
    checkpoints.checkpoint(folder / "checkpoint")
    return folder


COMMANDS = {
    "quantize": "quantize {0}/model.gguf {1} --type Q8_0",
    "convert": "convert {0}/checkpoint {1}",
    "imatrix": "imatrix {0}/model.gguf {0}/text {1} --context 32 --threads 1 --chunks 1",
    "seal": "seal {0}/model.gguf {1} --key-file {0}/key",
    "unseal": "unseal {0}/sealed {1} --key-file {0}/key",
    "adapter convert": "adapter convert {0}/a1.gguf {1}",
    "adapter merge": "adapter merge {0}/model.gguf {0}/a1.gguf {1}",
    "adapter extract": "adapter extract {0}/model.gguf {0}/model.gguf {1} --rank 1",
    "compare": "compare {0}/model.gguf {0}/model.gguf {0}/text --picture {1}",
}


def arguments(command: str, folder: Path, out: Path) -> list[str]:
    return [word.format(folder, out) for word in COMMANDS[command].split()]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_there_is_not_replaced(command: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / ("out.png" if command == "compare" else "out.gguf")
    out.write_bytes(b"of great value")
    result = call(*arguments(command, folder, out))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"gemloom: {out}: already exists; ")
    assert result.stderr.endswith("--force replaces it\n") and result.stderr.count("\n") == 1
    assert out.read_bytes() == b"of great value"
    assert "--force" in fine(*command.split(), "--help").stdout


@pytest.mark.parametrize("command", ["quantize", "imatrix", "unseal", "adapter merge"])
def test_force_replaces_it(command: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"of no value")
    fine(*arguments(command, folder, out), "--force")
    gguf.read(source.resolve(out))
    assert os.listdir(tmp_path) == ["out.gguf"]


def test_an_adapter_taken_for_out(folder: Path) -> None:
    """OUT forgotten, the last adapter stands in its place."""
    before = (folder / "a2.gguf").read_bytes()
    names = [folder / name for name in ("model.gguf", "a1.gguf", "a2.gguf")]
    result = call("adapter", "merge", *names)
    assert (result.exit_code, "a2.gguf: already exists" in result.stderr) == (1, True)
    result = call("adapter", "merge", *names, names[1], "--force")
    assert (result.exit_code, "is the source itself" in result.stderr) == (2, True)
    assert (folder / "a2.gguf").read_bytes() == before


def test_a_folder_keeps_what_is_not_the_adapters(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "peft"
    fine("adapter", "convert", folder / "a1.gguf", out)
    (out / "optimizer.pt").write_text("of great value")
    first = read(str(out))
    result = call("adapter", "convert", folder / "a2.gguf", out)
    assert result.exit_code == 1
    assert result.stderr == f"gemloom: {out}: already exists; --force replaces the adapter in it\n"
    tiny_lora.assert_same(read(str(out)), first)
    fine("adapter", "convert", folder / "a2.gguf", out, "--force")
    tiny_lora.assert_same(read(str(out)), read(str(folder / "a2.gguf")))
    assert len(os.listdir(out)) == 3 and (out / "optimizer.pt").read_text() == "of great value"


def test_an_importance_matrix_is_a_gguf_or_a_dat(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "seal.key"
    result = call("imatrix", folder / "model.gguf", folder / "text", out, *SMALL)
    assert (result.exit_code, out.exists()) == (2, False)
    assert "is a .gguf, or a .dat" in result.stderr


def test_a_pipe_gets_it_all(folder: Path, tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", bytearray()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.extend(pipe.read_bytes()))
    reader.start()
    fine(*arguments("unseal", folder, pipe))
    reader.join()
    assert got == (folder / "model.gguf").read_bytes()
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_stdout_gets_it_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    args = [sys.executable, "-m", "gemloom", *arguments("quantize", folder, Path("/dev/stdout"))]
    with open(tmp_path / "out.gguf", "wb") as out:
        done = subprocess.run(args, env=ENVIRONMENT, stdout=out, stderr=subprocess.PIPE)
    assert (done.returncode, b"bits" in done.stderr) == (0, True)
    assert gguf.read(source.resolve(tmp_path / "out.gguf")).tensors
    assert Path("/dev/stdout").is_symlink()


def test_devices_stay_what_they_are(folder: Path) -> None:
    fine(*arguments("unseal", folder, Path("/dev/null")))
    assert Path("/dev/null").is_char_device()
    result = call(*arguments("unseal", folder, Path("/dev/full")))
    assert (result.exit_code, "No space left" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("name", "kind"), [("folder", OutputError), ("no/out", OutputError), ("link", OptionError)]
)
def test_where_nothing_can_be_written(tmp_path: Path, name: str, kind: type[Exception]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "source").touch()
    (tmp_path / "link").symlink_to("source")
    with pytest.raises(kind), output(tmp_path / name, tmp_path / "source", force=True):
        pytest.fail("it was begun")


HALF_WAY = """
import sys, time
from gemloom.tools.quantization import quantize
from gemloom.cli import main
real = quantize._make
def make(*given):
    print("made", flush=True)
    time.sleep(0.05)
    return real(*given)
quantize._make = make
sys.argv[0] = "gemloom"
main()
"""


def test_sigterm_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    args = arguments("quantize", folder, tmp_path / "out.gguf")
    with subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, *args],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout and process.stdout.readline() == b"made\n"
        assert os.listdir(tmp_path) == ["out.gguf.partial"]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, b"")
    assert os.listdir(tmp_path) == []
