"""Adapters on the command line: of run, chat and serve."""

import json
from pathlib import Path

import pytest

import gemloom
import tiny
from command_line import GREEDY, call, fine, served, write
from gemloom.adapters.gguf_lora import write_gguf
from gemloom.cli.load import adapter_file
from http_serving import http
from random_lora import random_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write(folder)
    with gemloom.load(folder / "e2b.gguf", threads=1, context=64) as model:
        for seed, name in enumerate(("a", "b"), 1):
            write_gguf(random_lora(model, seed), "gemma4", folder / f"{name}.gguf")
    write_gguf(random_lora(gemma3(), 1), "gemma3", folder / "other.gguf")
    return folder


def gemma3() -> gemloom.Model:
    return gemloom.load(tiny.gguf_bytes(tiny.VARIANTS["gemma3"]), threads=1, context=64)


def test_run(folder: Path) -> None:
    def tokens(*adapters: str) -> list[int]:
        given = [f"--adapter={folder / adapter}" for adapter in adapters]
        done = fine("run", folder / "e2b.gguf", "hello", "-n", "8", "--json", *GREEDY, *given)
        notes = [line for line in done.stderr.splitlines() if "matrices changed" in line]
        assert len(notes) == len(adapters)
        return list(json.loads(done.stdout)["tokens"])

    with gemloom.load(folder / "e2b.gguf", threads=1, context=64) as model:
        model.adapters.load("a", folder / "a.gguf")
        model.adapters.load("b", folder / "b.gguf")
        for given, on in (
            ((), {}),
            (("a.gguf",), {"a": 1}),
            (("a.gguf@0.5", "b.gguf@-1"), {"a": 0.5, "b": -1}),
        ):
            done = model.generate("hello", adapters=on, temperature=0, max_tokens=8)
            assert tokens(*given) == done.tokens


def test_chat(folder: Path) -> None:
    said = {
        given: fine("chat", folder / "e2b.gguf", "-n", "8", *GREEDY, *given, input="hello\n").stdout
        for given in ((), (f"--adapter={folder / 'a.gguf'}",))
    }
    assert len(set(said.values())) == 2


@pytest.mark.parametrize(
    ("command", "adapter", "status", "message"),
    [
        ("run", "nowhere.gguf", 1, "nowhere.gguf"),
        ("run", "{folder}/other.gguf", 1, "the architecture 'gemma3'"),
        ("run", "{folder}/a.gguf@nan", 2, "must be a finite number"),
        ("serve", "{folder}/a.gguf", 2, "not NAME=PATH"),
        ("serve", "a=", 2, "not NAME=PATH"),
        ("serve", "a b={folder}/a.gguf", 2, "letters"),
        ("serve", "a={folder}/a.gguf@inf", 2, "finite"),
        ("serve", "a=nowhere.gguf", 1, "nowhere.gguf"),
    ],
)
def test_wrong_ones(folder: Path, command: str, adapter: str, status: int, message: str) -> None:
    more = ["hello"] if command == "run" else ["--port", "0"]
    given = f"--adapter={adapter.format(folder=folder)}"
    done = call(command, folder / "e2b.gguf", *more, given, "--threads", "1")
    assert (done.exit_code, message in done.stderr) == (status, True), done.output


def test_a_name_twice_and_sending_without_a_key(folder: Path) -> None:
    twice = [f"--adapter=a={folder / name}.gguf" for name in ("a", "b")]
    done = call("serve", folder / "e2b.gguf", *twice)
    assert (done.exit_code, "two adapters are named a" in done.stderr) == (2, True)
    done = call("serve", folder / "e2b.gguf", "--adapter-upload")
    assert (done.exit_code, "needs an --api-key" in done.stderr) == (2, True)


def test_serve(folder: Path) -> None:
    given = ("--adapter", f"a={folder / 'a.gguf'}", "--adapter", f"b={folder / 'b.gguf'}@0.5")
    with served(folder / "e2b.gguf", "--context", "64", *given) as (_, url), http(url) as client:
        data = client.get("/v1/adapters").json()["data"]
        assert [(entry["name"], entry["scale"]) for entry in data] == [("a", 1.0), ("b", 0.5)]


def test_an_adapter_and_its_scale(tmp_path: Path) -> None:
    """One rule for every command; what is there by the whole name is meant by it."""
    there = tmp_path / "a@2"
    assert adapter_file(str(there)) == (str(tmp_path / "a"), 2.0)
    there.write_bytes(b"")
    assert adapter_file(str(there)) == (str(there), 1.0)
    assert adapter_file("u@host/a.gguf") == ("u@host/a.gguf", 1.0)
    assert adapter_file("@2") == ("@2", 1.0)
