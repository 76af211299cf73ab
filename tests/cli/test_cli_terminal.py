"""Conversations, and what a terminal, a pipe and a signal do to the command line."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import Result

import gemloom
from command_line import ENVIRONMENT, GREEDY, call, command, endless, fine, terminal, write
from conftest import paced
from gemloom.cli.chat_history import SavedChat
from gemloom.cli.terminal import clean
from gemloom.errors import LostError, RequestError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def untaught(keys: dict[str, Any], _: Any) -> None:
        del keys["tokenizer.chat_template"]

    return write(tmp_path_factory.mktemp("base"), "gemma3", edit=untaught)


@pytest.fixture(scope="module")
def opened(model: Path) -> Iterator[gemloom.Model]:
    with gemloom.load(model, context=256, threads=1) as opened:
        yield opened


# -- what a terminal gets --------------------------------------------------------------------


@given(st.text())
def test_clean_takes_out_controls_and_nothing_else(text: str) -> None:
    controls = {chr(c) for c in (*range(32), *range(127, 160))} - {"\n", "\t"}
    assert clean(text) == "".join(char for char in text if char not in controls)


def test_controls_reach_a_pipe_but_no_terminal(model: Path, opened: gemloom.Model) -> None:
    escape = opened.tokenize("\x1b")[0]
    args = ("run", model, "hello", "-n", "5", f"--logit-bias={escape}=100", *GREEDY)
    piped = subprocess.run(command(*args), env=ENVIRONMENT, capture_output=True)
    assert piped.stdout == b"\x1b" * 5 + b"\n"
    with terminal(*args) as shown:
        status, text = shown.finish()
    assert status == 0
    assert "generated 5" in text
    before = text.partition("\x1b[2mprompt")[0]  # the line of our own, dim
    assert "\x1b" not in before


def test_a_reader_that_goes_away(model: Path, opened: gemloom.Model) -> None:
    process = subprocess.Popen(
        command("run", model, "hello", *endless(opened), "--threads", "1"),
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    assert process.stderr
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("args", [("--help",), ("run", "--help"), ("inspect",), ("tokenize", "x")])
def test_a_reader_that_has_gone(model: Path, args: tuple[str, ...]) -> None:
    """The same status from every command, whatever prints."""
    given = args if "--help" in args else (args[0], model, *args[1:])
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as closed:
        done = subprocess.run(
            command(*given), env=ENVIRONMENT, stdout=closed, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("args", [("doctor", "--json"), ("--help",)])
def test_a_full_disk(args: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(*args), env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert re.fullmatch(rb"gemloom: .*No space left on device\n", done.stderr)


def test_stdout_that_is_closed(model: Path) -> None:
    """What was asked for is lost, and that is no success."""
    line = shlex.join(command("tokenize", model, "hello"))
    done = subprocess.run(["sh", "-c", f"exec {line} >&-"], env=ENVIRONMENT, capture_output=True)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"stdout is closed" in done.stderr


INTERRUPTED_IMPORT = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "gemloom.cli.quantize":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
runpy.run_module("gemloom", run_name="__main__", alter_sys=True)
"""


def test_ctrl_c_before_anything_has_begun() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT], env=ENVIRONMENT, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_ctrl_c_ends_run(model: Path, opened: gemloom.Model) -> None:
    process = subprocess.Popen(
        command("run", model, "hello", *endless(opened), "--threads", "1"),
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""


@pytest.mark.parametrize("name", ["run", "chat"])
def test_a_lost_worker_is_told_once(
    name: str, model: Path, opened: gemloom.Model, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(1_000_000))
    lost = "the worker 10.0.0.7:50052 was lost: connection reset by peer"

    def check(_: Any) -> None:
        if next(steps) > 12:
            raise LostError(lost)

    monkeypatch.setattr("gemloom.compute.program.Program.check", check)
    args = [*(["hello"] if name == "run" else []), "--threads", "1", *endless(opened)]
    result = call(name, model, *args, input="hello\n")
    assert result.exit_code == 1
    assert result.stdout.strip() and result.stdout.endswith("\n")
    told = [line for line in result.stderr.splitlines() if "worker" in line]
    assert told == [f"gemloom: {lost}; once it is back, run the command again"]
    assert capfd.readouterr().err == ""


# -- chat ------------------------------------------------------------------------------------


def talk(model: Path, *lines: str, options: Sequence[str] = ()) -> Result:
    args = ["-n", "6", *GREEDY, "--context", "256", *options]
    return fine("chat", model, *args, input="".join(f"{line}\n" for line in lines))


def test_chat_answers_as_the_model_does(model: Path, opened: gemloom.Model) -> None:
    result = talk(model, "hello", "", "the world", options=["--system", "is"])
    messages: list[dict[str, str]] = [{"role": "system", "content": "is"}]
    for text, said in zip(("hello", "the world"), result.stdout.splitlines(), strict=False):
        messages.append({"role": "user", "content": text})
        answer = opened.chat(messages, max_tokens=6, temperature=0).message["content"].strip()
        assert said.rstrip() == answer
        messages.append({"role": "assistant", "content": answer})
    assert result.stderr.count("tok/s") == 4
    assert "cached" in result.stderr.splitlines()[1]


def test_chat_answers_one_message_and_ends(model: Path) -> None:
    typed = talk(model, "hello")
    args = ("-n", "6", *GREEDY, "--context", "256")
    told = fine("chat", model, "hello", *args)
    piped = fine("chat", model, "-", *args, input="hello\n")
    assert told.stdout == piped.stdout == typed.stdout
    assert told.stderr.count("\n") == 1
    long = call("chat", model, "hello " * 400, *args)
    assert (long.exit_code, long.stderr.count("\n")) == (1, 1)


def test_chat_with_a_message_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemloom.cli.load.default_model", lambda: str(base))
    args = ("-n", "6", *GREEDY, "--context", "256")
    assert fine("chat", "hello", *args).stdout == talk(base, "hello").stdout


def test_chat_with_a_base_model(base: Path) -> None:
    result = talk(base, "hello", options=["--stop", "zz"])
    assert "base model" in result.stderr.splitlines()[0]
    with gemloom.load(base, context=256, threads=1) as opened:
        prompt = "User: hello\nAssistant:"
        done = opened.generate(prompt, max_tokens=6, temperature=0, stop=["zz", "\nUser:"])
    assert result.stdout == done.text.strip() + "\n"


def test_a_backslash_goes_on(model: Path, tmp_path: Path) -> None:
    talk(model, "hello\\", "world", f"/save {tmp_path / 'c.json'}")
    assert json.loads((tmp_path / "c.json").read_text())[0]["content"] == "hello\nworld"


def test_save_and_load(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "my talk é.json"
    first = talk(model, "hello", f"/save {path}", "the world", options=["--system", "is"])
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    second = talk(model, "sword", f"/load {path}", "the world")
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def message(role: str, content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


BAD = {
    "nothing": "",
    "no json": "{",
    "not utf-8": b"[\xff]",
    "too deep": "[" * 100_000,
    "no list": {"role": "user"},
    "no message": [1],
    "no content": [{"role": "user"}],
    "more than content": [message("user", name="x"), message("assistant")],
    "content of another type": [message("user", 1), message("assistant")],
    "unknown role": [message("tool")],
    "answer first": [message("assistant")],
    "system twice": [message("system"), message("system")],
    "system late": [message("user"), message("assistant"), message("system")],
    "unanswered": [message("user"), message("assistant"), message("user")],
}


@pytest.fixture
def conversation(opened: gemloom.Model) -> SavedChat:
    made = SavedChat(opened, {}, "be brief")
    made.keep("hello", "world")
    return made


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_changes_nothing(case: str, conversation: SavedChat, tmp_path: Path) -> None:
    content = BAD[case]
    data = content if isinstance(content, str | bytes) else json.dumps(content)
    path = tmp_path / "bad.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    before = list(conversation.messages)
    with pytest.raises(RequestError, match=r"bad\.json"):
        conversation.load(path)
    assert conversation.messages == before
    conversation.reset()
    assert conversation.messages == before[:1]


def test_what_is_there_is_not_saved_over(conversation: SavedChat, tmp_path: Path) -> None:
    """But for the file that the conversation was saved to before, or comes from."""
    path = tmp_path / "notes.json"
    path.write_text("of great value")
    with pytest.raises(RequestError, match="already exists"):
        conversation.save(path)
    assert path.read_text() == "of great value"
    path.unlink()
    for _ in range(2):
        conversation.save(path)
    conversation.load(path)
    conversation.save(path)
    with pytest.raises(RequestError, match="already exists"):
        SavedChat(None, {}).save(path)  # type: ignore[arg-type]


def test_saving_where_it_cannot_be(conversation: SavedChat, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "gone" / "x.json", folder):
        with pytest.raises(RequestError, match=re.escape(str(path))):
            conversation.save(path)
    assert list(tmp_path.iterdir()) == [folder]


@given(texts=st.lists(st.text(), max_size=6).map(lambda x: x[: len(x) // 2 * 2]))
def test_what_is_saved_is_loaded(texts: list[str], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "talk.json"
    one, other = (SavedChat(None, {}) for _ in range(2))  # type: ignore[arg-type]
    for said, answer in zip(texts[::2], texts[1::2], strict=True):
        one.keep(said, answer)
    path.unlink(missing_ok=True)
    one.save(path)
    other.load(path)
    assert other.messages == one.messages


def test_commands_of_the_chat(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    lines = ["/help", "/nonsense", "/save", f"/load {tmp_path / 'bad.json'}", "/reset now"]
    result = talk(model, *lines, "hello", "/exit", "never read")
    assert "/load FILE" in result.stdout
    errors = result.stderr.splitlines()
    assert [line.startswith("gemloom: ") for line in errors] == [True] * 4 + [False]
    assert "not a list of messages" in errors[2]


def test_a_message_too_long_is_told_and_forgotten(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    result = talk(model, "hello " * 400, "hello", f"/save {path}")
    assert re.search(r"gemloom: the prompt has .* /reset forgets", result.stderr)
    assert json.loads(path.read_text())[0]["content"] == "hello"


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    model: Path, opened: gemloom.Model, tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    with terminal("chat", model, *GREEDY, *endless(opened)) as shown:
        shown.read("> ")
        shown.type("hello\n")
        shown.read(r"hello\r\n")
        shown.read(r"\S{3}")
        shown.process.send_signal(signal.SIGINT)
        answer = shown.read("(?s)stopped.*> ")
        shown.type(f"/save {path}\n")
        shown.read("2 messages written")
        shown.read("> ")
        status, rest = shown.finish(interrupted=True)
    assert status == 0
    assert "Traceback" not in answer + rest
    said = json.loads(path.read_text(encoding="utf-8"))
    assert said[0]["content"] == "hello"
    assert len(said[1]["content"]) > 2


def test_ctrl_d_ends_the_chat(model: Path) -> None:
    with terminal("chat", model, "--threads", "1") as shown:
        shown.read("> ")
        shown.type("\x04")
        status, rest = shown.finish()
    assert (status, rest.strip("\r\n")) == (0, "")


# -- stopping a request ----------------------------------------------------------------------


def test_cancel_stops_between_two_steps_and_keeps_the_cells(opened: gemloom.Model) -> None:
    ids = [2, *range(20, 60)]
    with paced(opened, 5):
        run = opened.stream(ids, seed=1)
        tokens = [next(run).token for _ in range(3)]
        run.cancel()
    left = list(run)  # what was computed before
    assert len(left) <= 2 and all(piece.finish_reason is None for piece in left)
    tokens += [piece.token for piece in left]
    again = opened.generate([*ids, *tokens], max_tokens=1)
    assert again.usage.cached_tokens >= len(ids) + len(tokens) - 1  # the last has no K/V yet


def test_cancel_before_the_first_token(model: Path) -> None:
    ids = [2, *range(20, 60)]
    with gemloom.load(model, chunk=8, threads=1) as opened:
        with paced(opened):
            run = opened.stream(ids)
            run.cancel()
        assert list(run) == []
        assert opened.generate(ids, max_tokens=1).usage.cached_tokens == 0
