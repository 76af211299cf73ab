"""A worker that dies: every request is told, nothing hangs, and another one can take its place."""

import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

import gemloom
import tiny
from command_line import ENVIRONMENT, command, write
from conftest import Load, endless, prompt
from fake_worker import FakeWorker
from gemloom.adapters import registry
from gemloom.adapters.gguf_lora import write_gguf
from gemloom.errors import ClosedError, DeviceError, EngineError, LostError, OutOfMemoryError
from gemloom.ggml import relay
from gemloom.ggml.wire import Command
from gemloom.loading import build
from gemloom.server import recovery
from gemloom.server.adapters import AdapterFile
from gemloom.testing import parts_of
from http_serving import events, http, serving, until
from random_lora import random_lora
from worker_processes import Worker, needs_rpc, worker

pytestmark = needs_rpc
FOREVER: dict[str, Any] = {"max_tokens": 200}


@pytest.fixture(scope="module")
def survivor() -> Iterator[Worker]:
    with worker() as started:
        yield started


@pytest.fixture
def pair(survivor: Worker) -> Iterator[tuple[Worker, Worker]]:
    """Two workers, the second of which may die."""
    with worker() as victim:
        yield survivor, victim


def stop(process: Any) -> None:
    process.send_signal(signal.SIGSTOP)


def kill(process: Any) -> None:
    process.kill()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (kill, "it closed the connection|[Cc]onnection reset by peer|[Bb]roken pipe"),
        (stop, "it did not answer in 0.5 seconds"),
    ],
)
def test_a_worker_lost_in_the_middle_ends_all_requests(
    load: Load,
    pair: tuple[Worker, Worker],
    monkeypatch: pytest.MonkeyPatch,
    how: Callable[[Any], None],
    why: str,
) -> None:
    monkeypatch.setattr(relay, "PATIENCE", 0.5)
    model = load("e2b", device=[w.device for w in pair], slots=2, threads=1)
    runs = [model.stream(prompt(5, seed=i), **FOREVER, **endless(model)) for i in range(3)]
    next(runs[0])
    next(runs[1])
    how(pair[1].process)
    lost = time.monotonic()
    for run in runs:
        with pytest.raises(EngineError, match=f"the worker {pair[1].device[4:]} was lost: ({why})"):
            list(run)
    assert time.monotonic() - lost < 5
    with pytest.raises(EngineError, match="the model must be loaded again"):
        model.logits(prompt(3))
    assert model.stats().lost
    model.close()


def test_a_loss_is_noticed_while_nothing_is_computed(
    load: Load, pair: tuple[Worker, Worker]
) -> None:
    model = load("e2b", device=[w.device for w in pair], threads=1)
    pair[1].process.kill()
    until(lambda: model.stats().lost)
    with pytest.raises(EngineError, match="was lost"):
        model.save_state()


def test_what_was_read_of_a_lost_worker_is_no_result(
    load: Load, pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """State is read from cells: of a worker that dies meanwhile they are all zeros."""
    model = load("e2b", device=[w.device for w in pair], threads=1)
    model.generate(prompt(5), max_tokens=3)
    read = parts_of(model).store.export

    def dying(*args: Any) -> Any:
        pair[1].process.kill()
        pair[1].process.wait()
        return read(*args)

    monkeypatch.setattr(parts_of(model).store, "export", dying)
    with pytest.raises((LostError, EngineError), match="was lost"):
        model.save_state()


def test_a_worker_lost_while_loading(
    load: Load, pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build.KVStore

    def dying(*args: Any) -> Any:
        pair[1].process.kill()
        pair[1].process.wait()
        return made(*args)

    monkeypatch.setattr(build, "KVStore", dying)
    with nothing_left(), pytest.raises(LostError, match=f"worker {pair[1].device[4:]} was lost"):
        load("e2b", device=[w.device for w in pair], threads=1)


@contextmanager
def nothing_left() -> Iterator[None]:
    """Every connection to a worker that is made inside ends: its thread, and what it has open."""
    before, files = set(threading.enumerate()), open_files()
    yield
    until(lambda: not [t for t in set(threading.enumerate()) - before if "gemloom" in t.name])
    until(lambda: open_files() <= files)


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def test_an_adapter_loaded_while_a_worker_is_lost_goes_with_the_model(
    load: Load, pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its buffers hold ggml's connection."""
    made = registry.Loaded

    def dying(*args: Any) -> Any:
        loaded = made(*args)
        pair[1].process.kill()
        pair[1].process.wait()
        until(lambda: any(worker._relay.lost for worker in parts_of(model).device._workers))
        return loaded

    monkeypatch.setattr(registry, "Loaded", dying)
    with nothing_left():
        model = load("e2b", device=[w.device for w in pair], threads=1)
        with pytest.raises(LostError, match="was lost"):
            model.adapters.load("style", random_lora(model, 3))
        model.close()


@pytest.mark.parametrize("part", ["Engine", "Adapters"])
def test_a_model_that_cannot_start_lets_its_workers_go(
    load: Load, survivor: Worker, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(build, part, fail)
    with nothing_left(), pytest.raises(RuntimeError, match="new thread"):
        load("e2b", device=survivor.device, threads=1)


@pytest.mark.parametrize("busy", [False, True])
def test_closing_waits_for_no_worker(load: Load, pair: tuple[Worker, Worker], busy: bool) -> None:
    with nothing_left():
        model = load("e2b", device=[w.device for w in pair], threads=1)
        run = model.stream(prompt(5), **FOREVER, **endless(model))
        next(run)
        if not busy:
            run.cancel()
            until(lambda: not model.stats().slots_busy)
        stop(pair[1].process)
        time.sleep(0.1)
        asked = time.monotonic()
        model.close()
        assert time.monotonic() - asked < 2
        if busy:
            with pytest.raises(ClosedError):
                list(run)


def test_a_slow_worker_gets_more_time_when_it_is_loaded_again(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a step that takes longer than any answer may would be tried for ever."""
    monkeypatch.setattr(relay, "PATIENCE", 0.25)

    def slow(asked: Command, right: bytes) -> bytes:
        time.sleep(0.4 * (asked == Command.GET_TENSOR))
        return right

    with closing(FakeWorker(slow)) as fake:
        device = f"rpc:127.0.0.1:{fake.port}"
        with load("e2b", device=device) as model:
            with pytest.raises(
                EngineError, match=r"not answer in 0\.25 seconds; loaded again, it gets 0\.5"
            ):
                model.generate(prompt(5), max_tokens=2)
            assert model.stats().lost
        with load("e2b", device=device) as model:
            assert len(model.logits(prompt(5))) == 5


def test_a_worker_without_memory_ends_the_request_that_needs_it(load: Load) -> None:
    full = False

    def twist(asked: Command, right: bytes) -> bytes:
        return struct.pack("<3Q", 16, 0, 0) if full and asked == Command.ALLOC_BUFFER else right

    with closing(FakeWorker(twist)) as fake:
        model = load("e2b", device=f"rpc:127.0.0.1:{fake.port}", slots=1)
        taps = [name for name in model.tap_names() if "attn" in name]
        full = True
        with pytest.raises(OutOfMemoryError, match=rf"no memory on rpc:127.0.0.1:{fake.port}"):
            model.trace(prompt(90), taps)
        full = False
        assert len(model.generate(prompt(5), **FOREVER, **endless(model)).tokens) == 200
        assert model.stats().error is None
        model.close()


def test_whatever_a_device_is_not_well_of_ends_all_requests(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss or not: it is the reason that everybody is told."""
    model = load("e2b", slots=2)
    runs = [model.stream(prompt(5, seed=i), **FOREVER, **endless(model)) for i in range(3)]
    next(runs[0])

    def unwell() -> None:
        raise DeviceError("it is not well")

    monkeypatch.setattr(parts_of(model).device, "check", unwell)
    for run in runs:
        with pytest.raises(EngineError, match="the engine stopped: it is not well"):
            list(run)
    assert "it is not well" in str(model.stats().error)
    assert not model.stats().lost
    with pytest.raises(EngineError, match="the model must be loaded again"):
        model.generate(prompt(5))


# -- the server ------------------------------------------------------------------------------------

ASKED = {"prompt": prompt(5), "max_tokens": 8, "temperature": 0}


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_PAUSES", (0.1,))
    monkeypatch.setattr(recovery, "_LOOK", 0.05)


@pytest.mark.usefixtures("quickly")
def test_the_server_goes_on_when_the_worker_is_back(
    pair: tuple[Worker, Worker], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    devices = [w.device for w in pair]
    load = partial(gemloom.load, data, kv_type="f32", context=256, device=devices, threads=1)
    model = load()
    write_gguf(random_lora(model, 1), "gemma4", tmp_path / "law.gguf")
    adapters = {name: AdapterFile(tmp_path / "law.gguf") for name in ("law", "gone")}
    with serving(model, load=load, adapters=adapters) as url, http(url) as client:
        client.delete("/v1/adapters/gone")
        before = [said(client, adapter) for adapter in ("tiny", "tiny:law")]
        assert before[0] != before[1]
        told = killed_in_the_middle(client, pair[1])
        assert "was lost" in told["error"]["message"]
        assert told["error"]["code"] == "engine_failed"
        refused(client)
        with worker(pair[1].port):
            until(lambda: client.get("/health").status_code == 200, 20)
            assert [said(client, adapter) for adapter in ("tiny", "tiny:law")] == before
            assert client.post("/v1/completions", json=ASKED | {"model": "tiny:gone"}).is_error
            assert "gemloom_engine_failed 0.0" in client.get("/metrics").text
    assert "cannot be loaded again yet: no worker at" in caplog.text
    assert caplog.text.count("the model was loaded again") == 1
    assert model.closed


def said(client: httpx.Client, name: str) -> str:
    answer = client.post("/v1/completions", json=ASKED | {"model": name})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def killed_in_the_middle(client: httpx.Client, victim: Worker) -> Any:
    """The last event of a stream whose worker is killed after the first."""
    body = ASKED | {"stream": True, "max_tokens": 200, "regex": "[a-z]{3000}"}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = events(answer.iter_lines())
        next(lines)
        victim.kill()
        return list(lines)[-1]


def refused(client: httpx.Client) -> None:
    """Health is bad, requests are told why at once, and the metrics are still there."""
    until(lambda: client.get("/health").status_code == 503)
    time.sleep(0.3)  # it tries, and fails
    health = client.get("/health").json()
    assert health["status"] == "error"
    answer = client.post("/v1/completions", json=ASKED)
    assert answer.status_code == 503
    for error in (health["error"], answer.json()["error"]):
        assert "was lost" in error["message"]
        assert error["message"].endswith("; the model is loaded again as soon as it can be")
    assert "gemloom_engine_failed 1.0" in client.get("/metrics").text


@pytest.mark.usefixtures("quickly")
def test_a_server_that_ends_stops_trying(load: Load, pair: tuple[Worker, Worker]) -> None:
    model = load("e2b", device=[w.device for w in pair], threads=1)
    tried = threading.Event()

    def again() -> gemloom.Model:
        tried.set()
        raise LostError("still gone")

    with serving(model, load=again):
        pair[1].kill()
        assert tried.wait(10)
    assert "gemloom-recovery" not in {thread.name for thread in threading.enumerate()}


def test_a_model_from_a_pipe_is_not_loaded_again(
    pair: tuple[Worker, Worker], tmp_path: Path
) -> None:
    """There is nothing more to read: health says what to do, and the log once."""
    options = ("--device", ",".join(w.device for w in pair), "--context", "256", "--port", "0")
    with write(tmp_path).open("rb") as file:
        cat = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
        server = subprocess.Popen(
            command("serve", "/dev/stdin", *options),
            stdin=cat.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=ENVIRONMENT,
        )  # fmt: skip
    try:
        assert server.stdout
        with http(server.stdout.readline().split()[-1]) as client:
            pair[1].kill()
            until(lambda: client.get("/health").status_code == 503)
            message = client.get("/health").json()["error"]["message"]
            time.sleep(2.5)  # more than one pause before a try
    finally:
        server.kill()
        told = server.communicate()[1]
        cat.communicate()
    assert message.endswith("; the model must be loaded again: restart the server")
    assert told.count("the model must be loaded again") == 1
    assert "cannot be loaded again yet" not in told


@pytest.mark.usefixtures("quickly")
def test_other_failures_are_not_cured_by_loading_again(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("e2b", threads=1)
    tried = threading.Event()

    def again() -> gemloom.Model:
        tried.set()
        raise AssertionError

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom")

    with serving(model, load=again) as url, http(url) as client:
        monkeypatch.setattr(parts_of(model).program, "run", fail)
        assert client.post("/v1/completions", json=ASKED).status_code == 503
        assert not tried.wait(0.3)
        message = client.get("/health").json()["error"]["message"]
        assert message.endswith("boom; the model must be loaded again: restart the server")
