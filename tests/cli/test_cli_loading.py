"""While a model is loaded: what the bar says, and Ctrl-C."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import gemloom
import tiny
from command_line import write
from gemloom.cli import terminal
from gemloom.cli.load import open_model
from gemloom.cli.options import LoadOptions
from gemloom.cli.progress import bar
from gemloom.files import gguf, source
from gemloom.loading.build import build_model
from gemloom.options import Options
from gemloom.text.tokenizer import Tokenizer
from gemloom.weights.copying import Filling

ONE = LoadOptions(threads=1, context=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("loading"))


def test_ctrl_c_is_heard_between_two_tensors(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred tensors, those that the pool has not begun are not read any more."""
    used, real = [], Filling._use

    def use(self: Filling, share: Any, apply: Any) -> None:
        time.sleep(0.01)
        used.append(share)
        real(self, share, apply)

    def interrupt(done: int, of: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Filling, "_use", use)
    file, options = gguf.read(source.resolve(model)), Options(threads=2, mmap=False, context=64)
    with pytest.raises(KeyboardInterrupt):
        build_model(file, options, progress=interrupt)
    assert len(used) < 5 < 50 < len(tiny.tensors(tiny.VARIANTS["e2b"]))
    assert [thread for thread in threading.enumerate() if "Pool" in thread.name] == []


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The vocabulary takes its time."""

    def read(metadata: gguf.Metadata, rows: int) -> Tokenizer:
        time.sleep(seconds)
        return Tokenizer(metadata, rows)

    monkeypatch.setattr("gemloom.loading.build.read_tokenizer", read)


@pytest.mark.parametrize("seen", [True, False])
def test_ctrl_c_says_that_it_was_heard(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, seen: bool
) -> None:
    slow(monkeypatch, 1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: seen)
    heard = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    heard.start()
    with pytest.raises(KeyboardInterrupt):
        open_model(str(model), ONE)
    assert ("stopping; Ctrl-C again" in capfd.readouterr().err) is seen
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_bar_is_not_shown_while_more_is_to_come(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(terminal, "_SPINNER_AFTER", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")  # the file's name is long
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    slow(monkeypatch, 0.5)
    with open_model(str(model), LoadOptions(threads=1, context=64, mmap=False)):
        said = capsys.readouterr().err
    assert "e2b.gguf: reading the vocabulary" in said
    assert "100%" not in said.rpartition("reading the vocabulary")[2]


def test_nor_one_of_bytes(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("gemloom.cli.progress._BAR_AFTER", 0.0)
    monkeypatch.setattr("gemloom.cli.progress._LOOK_EVERY", 0.01)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with bar("writing x", 100, lambda: 100):
        time.sleep(0.3)
    assert "writing x: finishing" in capsys.readouterr().err


def test_it_is_loaded_as_ever(model: Path) -> None:
    with open_model(str(model), ONE) as opened, gemloom.load(model, threads=1) as other:
        assert opened.fingerprint == other.fingerprint
