"""Models over several backends: the same logits wherever the layers are."""

from __future__ import annotations

import ggml
import numpy as np
import pytest

import cpu_devices
import gemloom
import tiny
from conftest import Load, prompt
from gemloom.errors import DeviceError, OptionError
from gemloom.ggml import backends

PLAIN = {"kernels": "plain", "threads": 1}
MEAN, MOST = 0.0004, 0.004  # in deviations of the logits; one graph or several round alike


@pytest.fixture(autouse=True)
def _cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_devices.add(monkeypatch)


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    error = np.abs(got - wanted) / wanted.std()
    assert error.mean() < MEAN and error.max() < MOST, (error.mean(), error.max())


@pytest.mark.parametrize("variant", sorted(tiny.VARIANTS))
def test_layers_on_devices(load: Load, variant: str) -> None:
    ids = prompt(40)
    wanted = load(variant, device="cpu", **PLAIN).logits(ids)
    n = tiny.VARIANTS[variant].n_layer
    for count in (1, n // 2, None):
        model = load(variant, device="cpu0", gpu_layers=count, **PLAIN)
        assert model.backends == ["CPU", "CPU"] and not model.fallbacks
        assert model.placement.layers == (1,) * (n - (count or n)) + (0,) * (count or n)
        close(model.logits(ids), wanted)
        assert model.memory()["on_devices"] > 0
        model.close()


@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_two_devices(load: Load, variant: str) -> None:
    ids = prompt(40)
    wanted = load(variant, device="cpu", **PLAIN).logits(ids)
    n = tiny.VARIANTS[variant].n_layer
    options = {"device": ["cpu0", "cpu1"], "gpu_layers": n - 1, "tensor_split": [1, 1]}
    model = load(variant, **options, **PLAIN)
    assert set(model.placement.layers) == {0, 1, 2} and model.placement.head == 1
    close(model.logits(ids), wanted)
    for step in (1, 7):
        rows = [model.logits(ids[: i + step], "last") for i in range(0, 40 - step, 13)]
        close(np.concatenate(rows), wanted[step - 1 : 39 : 13])


@pytest.mark.parametrize(
    "lacking",
    ["GGML_OP_RMS_NORM", "GGML_OP_FLASH_ATTN_EXT", "GGML_OP_SET_ROWS", "GGML_OP_MUL_MAT"],
)
def test_what_a_device_lacks_runs_on_the_cpu_and_is_told(
    load: Load, monkeypatch: pytest.MonkeyPatch, lacking: str, caplog: pytest.LogCaptureFixture
) -> None:
    ids = prompt(40)
    wanted = load("e2b", device="cpu", **PLAIN).logits(ids)
    cpu_devices.lack(monkeypatch, [getattr(ggml, lacking)])
    model = load("e2b", device="cpu0", **PLAIN)
    close(model.logits(ids), wanted)
    names = {"GGML_OP_FLASH_ATTN_EXT": "attention", "GGML_OP_SET_ROWS": "attention"}
    name = names.get(lacking, lacking.removeprefix("GGML_OP_").lower())
    assert list(model.fallbacks) == [name] and model.fallbacks[name] >= model.config.n_layer
    assert [name in message for message in caplog.messages] == [True]


def test_state_and_snapshots(load: Load) -> None:
    ids = prompt(60)
    options = {"device": "cpu0", "gpu_layers": 5, "chunk": 16, **PLAIN}
    first, second = load("e2b", **options), load("e2b", **options)
    alone = first.generate(ids, max_tokens=8, temperature=0)
    saved = first.save_state()
    assert second.load_state(saved) == len(ids) + 7
    resumed = second.generate([*ids, *alone.tokens], max_tokens=8, temperature=0)
    cold = first.generate([*ids, *alone.tokens], max_tokens=8, temperature=0)
    assert resumed.tokens == cold.tokens and resumed.usage.cached_tokens >= len(ids)


def test_unknown_devices() -> None:
    data = tiny.gguf_bytes(tiny.VARIANTS["gemma3"])
    with pytest.raises(
        DeviceError, match=r"no device 'cuda9'; here: cpu, cpu0, cpu1; .*devices.md"
    ):
        gemloom.load(data, device="cuda9")
    with pytest.raises(OptionError, match="2 devices"):
        gemloom.load(data, device=["cpu0", "cpu1"], tensor_split=[1.0])


def test_a_driver_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.gguf_bytes(tiny.VARIANTS["gemma3"])
    monkeypatch.setattr(backends.ggml, "ggml_backend_dev_init", lambda device, options: None)
    with pytest.raises(DeviceError, match="device cpu0 did not start"):
        gemloom.load(data, device="cpu0")
