"""Devices without memory, and those that fail: typed errors for all who wait, never a hang."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import ggml
import pytest

import cpu_devices
import gemloom
import tiny
from conftest import Load, endless, prompt
from cpu_devices import Faults
from gemloom.adapters.gguf_lora import write_gguf
from gemloom.errors import EngineError, OutOfMemoryError
from gemloom.ggml import device
from gemloom.server import recovery
from gemloom.server.adapters import AdapterFile
from gemloom.testing import parts_of
from http_serving import events, http, serving, until
from random_lora import random_lora

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
ASKED = {"prompt": prompt(30), "max_tokens": 6, "temperature": 0}


@pytest.fixture
def own0(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return cpu_devices.own(monkeypatch)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_PAUSES", (0.1,))
    monkeypatch.setattr(recovery, "_LOOK", 0.05)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu_layers", [7, 10])
def test_memory_that_is_refused_while_loading(load: Load, own0: Faults, gpu_layers: int) -> None:
    """Weights, cells, inputs, intermediate results: whichever is refused is named."""
    options = {"device": "own0", "gpu_layers": gpu_layers}
    wanted = load("e2b", **options).logits(prompt(20))
    told = []
    for buffers in range(10):
        own0.buffers = buffers
        try:
            model = load("e2b", **options)
        except OutOfMemoryError as error:
            told.append(str(error))
        else:
            own0.buffers = 100
            assert (model.logits(prompt(20)) == wanted).all()
            break
    assert re.match(r"no memory for the weights on own0: \d+ MiB could not be allocated", told[0])
    assert told[-3].startswith("no memory for the K/V cells of 1 x 256 positions on own0: ")
    assert told[-2].startswith("no memory on own0 for the inputs of a step; take a smaller chunk")
    assert told[-1].startswith("no memory on own0 for intermediate results; take a smaller chunk")


def test_a_step_without_memory_ends_its_requests_and_no_others(load: Load, own0: Faults) -> None:
    """An adapter on every matrix takes more than was reserved for plain steps at load."""
    model = load("e2b", device="own0", slots=2, chunk=32)
    model.adapters.load("all", random_lora(model))
    wanted = model.generate(prompt(30), **GREEDY).tokens
    own0.most = parts_of(model).device.compute_sizes()[0]
    for _ in range(2):
        with pytest.raises(OutOfMemoryError, match="on own0 for intermediate results") as told:
            model.generate(prompt(30), **GREEDY, adapters={"all": None})
        assert told.value.status == 507
        assert model.generate(prompt(30), **GREEDY).tokens == wanted
    with pytest.raises(OutOfMemoryError):
        model.trace(prompt(200), model.tap_names())
    assert model.generate(prompt(30), **GREEDY).tokens == wanted
    own0.buffers = 0
    with pytest.raises(OutOfMemoryError, match="on own0"):
        model.adapters.load("more", random_lora(model))
    stats = model.stats()
    assert not stats.error and not stats.running and not stats.slots_busy
    own0.buffers = 100
    own0.most *= 100
    assert model.generate(prompt(30), **GREEDY, adapters={"all": None}).tokens


@pytest.mark.usefixtures("own0")
def test_plain_steps_take_no_more_than_was_reserved(load: Load) -> None:
    model = load("26b", device="own0", slots=3, chunk=32)
    reserved = parts_of(model).device.compute_sizes()
    runs = [model.stream(prompt(n), **GREEDY) for n in (200, 31, 5, 90)]
    assert all(run.completion().tokens for run in runs)
    assert parts_of(model).device.compute_sizes() == reserved


def test_no_memory_for_a_context_shift_ends_that_request(
    load: Load, own0: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("e2b", device="own0", slots=2, context=64, keep=4, chunk=8)
    shift = parts_of(model).program.shift

    def refused(slot: int, *args: Any) -> None:
        own0.most = 0 if slot == 0 else 1 << 60
        parts_of(model).device._empty()
        shift(slot, *args)

    monkeypatch.setattr(parts_of(model).program, "shift", refused)
    runs = [model.stream(prompt(40), max_tokens=60, **endless(model)) for _ in range(2)]
    with pytest.raises(OutOfMemoryError):
        list(runs[0])
    own0.most = 1 << 60
    assert runs[1].completion().usage.completion_tokens == 60


def test_the_hosts_memory_is_looked_at_before_it_is_used(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system gives what it has not, and ends the process that writes there."""
    model = load("e2b", device="cpu", chunk=32)
    model.adapters.load("all", random_lora(model))
    wanted = model.generate(prompt(30), **GREEDY).tokens
    monkeypatch.setattr(device, "free_memory", lambda: 0)
    with pytest.raises(OutOfMemoryError, match="no memory on cpu for intermediate results"):
        model.trace(prompt(200), model.tap_names())
    with pytest.raises(OutOfMemoryError):
        model.generate(prompt(30), **GREEDY)  # nothing is held any more
    monkeypatch.undo()
    assert model.generate(prompt(30), **GREEDY).tokens == wanted


def test_over_http(load: Load, own0: Faults, tmp_path: Path) -> None:
    model = load("e2b", device="own0", slots=2, chunk=32)
    write_gguf(random_lora(model), "gemma4", tmp_path / "all.gguf")
    adapters = {"all": AdapterFile(tmp_path / "all.gguf")}
    with serving(model, adapters=adapters) as url, http(url) as client:
        own0.most = parts_of(model).device.compute_sizes()[0]
        told = client.post("/v1/completions", json=ASKED | {"model": "tiny:all"})
        assert told.status_code == 507, told.text
        assert told.json()["error"]["code"] == "out_of_memory"
        assert client.post("/v1/completions", json=ASKED).status_code == 200
        assert client.get("/health").status_code == 200


# -- a device that fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("gpu_layers", [4, 10])
@pytest.mark.parametrize("status", [ggml.GGML_STATUS_FAILED, ggml.GGML_STATUS_ALLOC_FAILED])
def test_a_device_that_fails_in_the_middle_ends_all_requests(
    load: Load, own0: Faults, status: int, gpu_layers: int
) -> None:
    own0.status = status
    model = load("e2b", device="own0", gpu_layers=gpu_layers, slots=2)
    own0.computes = 20
    runs = [model.stream(prompt(5, seed=i), max_tokens=200, **endless(model)) for i in range(4)]
    for run in runs:  # two run, two wait
        with pytest.raises(EngineError, match=r"a step failed on own0: .*be loaded again") as told:
            list(run)
        assert told.value.status == 503
    assert model.stats().lost
    for use in (model.save_state, lambda: model.logits(prompt(3)), lambda: model.generate("a")):
        with pytest.raises(EngineError, match="a step failed on own0"):
            use()


def test_the_cpu_that_fails_is_not_a_device_to_come_back(load: Load) -> None:
    faults = Faults()
    model = load("e2b", device="cpu")
    faults.fail(parts_of(model).device.backends[-1])
    faults.computes = 3
    with pytest.raises(EngineError, match=r"the CPU failed to compute: .*be loaded again"):
        model.generate(prompt(5), max_tokens=9, **endless(model))
    assert not model.stats().lost


@pytest.mark.usefixtures("quickly")
def test_the_server_goes_on_when_the_device_does(
    own0: Faults, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It fails in a stream; then its driver does not start; then it does."""
    again = partial(
        gemloom.load, tiny.gguf_bytes(tiny.VARIANTS["e2b"]), device="own0", context=256, threads=1
    )
    with serving(again(), load=again) as url, http(url) as client:
        before = client.post("/v1/completions", json=ASKED).json()["choices"][0]["text"]
        with monkeypatch.context() as dead:
            dead.setattr(ggml, "ggml_backend_dev_init", lambda device, options: None)
            own0.computes = 2
            with client.stream("POST", "/v1/completions", json=ASKED | {"stream": True}) as answer:
                told = list(events(answer.iter_lines()))[-1]["error"]
            assert told["code"] == "engine_failed" and "a step failed on own0" in told["message"]
            assert client.get("/health").status_code == 503
            assert client.post("/v1/completions", json=ASKED).status_code == 503
            until(
                lambda: "cannot be loaded again yet: the device own0 did not start" in caplog.text
            )
            own0.computes = 1 << 60
        until(lambda: client.get("/health").status_code == 200)
        assert client.post("/v1/completions", json=ASKED).json()["choices"][0]["text"] == before
    assert caplog.text.count("the model was loaded again") == 1
