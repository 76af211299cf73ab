"""Models over several backends: the same logits wherever the layers are."""

from __future__ import annotations

import ctypes
from typing import Any

import ggml
import numpy as np
import pytest

import cpu_devices
import gemloom
import tiny
from conftest import Load, prompt
from device_checks import BOUND, Checks, copied, run
from gemloom.cli.bench import tables
from gemloom.compute.batch import Chunk
from gemloom.compute.placement import Placement
from gemloom.compute.survey import survey
from gemloom.errors import DeviceError, OptionError
from gemloom.files import gguf
from gemloom.files.source import resolve
from gemloom.ggml import backends
from gemloom.ggml import multi_device as spreading
from gemloom.ggml import node_devices as pinning
from gemloom.ggml.backends import DeviceInfo, Found
from gemloom.loading.build import build_model
from gemloom.options import Options
from gemloom.testing import parts_of
from gemloom.tools import bench
from random_lora import random_lora

PLAIN = {"kernels": "plain", "threads": 1}
PART = {"gpu_layers": 5}


@pytest.fixture(autouse=True)
def _cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_devices.add(monkeypatch)


@pytest.fixture
def checks(load: Load) -> Checks:
    return Checks(load, "cpu0", BOUND, "plain")


@pytest.mark.parametrize("variant", sorted(tiny.VARIANTS))
def test_layers(checks: Checks, variant: str) -> None:
    checks.layers(variant)


@pytest.mark.parametrize("variant", ["e2b", "26b", "gemma3"])
def test_a_device_with_memory_of_its_own(
    load: Load, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """What ggml copies there and back."""
    cpu_devices.own(monkeypatch)
    checks = Checks(load, "own0", BOUND, "plain")
    checks.layers(variant)
    checks.ragged(variant, **PART)
    checks.adapters(variant, **PART)
    checks.state(variant, **PART)
    checks.snapshots(variant)


@pytest.mark.parametrize("variant", ["e2b", "26b", "gemma3_scaled"])
def test_pieces(checks: Checks, variant: str) -> None:
    checks.pieces(variant)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_cells_of_other_types(checks: Checks, kv_type: str) -> None:
    checks.cells("e2b", kv_type, BOUND)


@pytest.mark.parametrize("variant", ["e2b", "26b", "gemma3"])
def test_part_of_the_layers(checks: Checks, variant: str) -> None:
    checks.ragged(variant, **PART)
    checks.adapters(variant, **PART)
    checks.state(variant, **PART)
    checks.shift(variant, **PART)


@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_requests_at_once(checks: Checks, variant: str) -> None:
    checks.together(variant, **PART)


def test_going_back_and_on(checks: Checks) -> None:
    checks.snapshots("e2b", **PART)
    checks.goes_on("e2b", **PART)


@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_two_devices(load: Load, variant: str) -> None:
    ids = prompt(40)
    wanted = load(variant, device="cpu", **PLAIN).logits(ids)
    n = tiny.VARIANTS[variant].n_layer
    options = {"device": ["cpu0", "cpu1"], "gpu_layers": n - 1, "tensor_split": [1, 1]}
    model = load(variant, **options, **PLAIN)
    assert set(model.placement.layers) == {0, 1, 2} and model.placement.head == 1
    BOUND.close(model.logits(ids), wanted)
    for step in (1, 7):
        rows = [model.logits(ids[: i + step], "last") for i in range(0, 40 - step, 13)]
        BOUND.close(np.concatenate(rows), wanted[step - 1 : 39 : 13])


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
    BOUND.close(model.logits(ids), wanted)
    names = {"GGML_OP_FLASH_ATTN_EXT": "attention", "GGML_OP_SET_ROWS": "attention"}
    name = names.get(lacking, lacking.removeprefix("GGML_OP_").lower())
    assert list(model.fallbacks) == [name] and model.fallbacks[name] >= model.config.n_layer
    assert [name in message for message in caplog.messages] == [True]


def hidden(graph: Any) -> list[str]:
    """What reads a tensor after a node wrote into it, with nothing that makes it come later."""
    nodes = [ggml.ggml_graph_node(graph, i).contents for i in range(ggml.ggml_graph_n_nodes(graph))]
    made = {ctypes.addressof(node): i for i, node in enumerate(nodes)}
    roots = [ctypes.addressof(n.view_src.contents) if n.view_src else 0 for n in nodes]
    found = []
    for i, root in enumerate(roots):
        if not root or nodes[i].op in pinning._VIEWS:
            continue
        old = {root, *(a for a, j in made.items() if j < i and roots[j] == root)}
        for j in range(i + 1, len(nodes)):
            sources = {ctypes.addressof(s.contents) for s in nodes[j].src if s}
            if roots[j] != root and sources & old:
                found.append(nodes[j].name.decode())
    return found


@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_backends_may_reorder_what_does_not_depend_on_each_other(
    load: Load, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """As Vulkan's does, for which a tensor and a view of it are two: deltas were added too late."""
    seen: list[str] = []
    pins = spreading.pins
    monkeypatch.setattr(
        spreading, "pins", lambda d, g, m: seen.append(",".join(hidden(g))) or pins(d, g, m)
    )
    model = load(variant, device="cpu0", slots=2, **PLAIN)
    model.adapters.load("a", random_lora(model))
    model.generate(prompt(9), max_tokens=2, adapters={"a": None})
    one, two = (model.stream(prompt(30), max_tokens=9, adapters=a) for a in ({"a": None}, {}))
    assert one.completion().tokens and two.completion().tokens
    assert len(seen) > 3 and not "".join(seen)


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


def test_what_a_device_would_lack_is_told_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    file = gguf.read(resolve(tiny.gguf_bytes(tiny.VARIANTS["e2b"])))
    told = survey(file, Options())
    assert list(told) == ["cpu0", "cpu1"]
    assert not told["cpu0"].lacking and told["cpu0"].nodes > 10 * 20
    cpu_devices.lack(monkeypatch, [ggml.GGML_OP_RMS_NORM, ggml.GGML_OP_SET_ROWS])
    lacking = survey(file, Options())["cpu0"].lacking
    assert set(lacking) == {"rms_norm", "set_rows"}
    assert lacking["set_rows"] == 2 * 5  # K and V of each layer that has its own


def test_the_plan_comes_before_the_model(load: Load) -> None:
    """And what it says is what is taken then; compute memory is not said to be less."""
    plans: list[Placement] = []
    file = gguf.read(resolve(tiny.gguf_bytes(tiny.VARIANTS["e2b"])))
    options = Options(device="cpu0", gpu_layers=4, context=512, threads=1, slots=2)
    with build_model(file, options, planned=plans.append) as model:
        memory, (plan,) = model.memory(), plans
        device, host = plan.table
        assert (device.layers, host.layers) == (4, 6)
        assert device.kv + host.kv == memory["kv_full"] + memory["kv_sliding"]
        assert 0 <= memory["on_devices"] - device.weights < 8192  # aligned
        assert device.compute >= max(parts_of(model).device.compute_sizes())


@pytest.mark.parametrize("variant", sorted(tiny.VARIANTS))
def test_intermediate_results_take_what_was_planned(
    load: Load, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Never more, and at least half of it: on a device with memory of its own, and on the host."""
    cpu_devices.own(monkeypatch)
    n = tiny.VARIANTS[variant].n_layer
    for chunk, slots, context in ((32, 1, 256), (512, 1, 512), (200, 3, 2048), (512, 1, 1024)):
        for layers in (n, n // 2):
            options = {"chunk": chunk, "slots": slots, "context": context, "gpu_layers": layers}
            model = load(variant, device="own0", **options)
            planned = [use.compute for use in model.placement.table]
            taken = parts_of(model).device.compute_sizes()
            taken[0] += parts_of(model).device.rooms[0].nbytes
            assert all(t <= p for t, p in zip(taken, planned, strict=True)), options
            assert planned[1] <= 2 * taken[1], options
            assert layers < n or planned[0] <= 2 * taken[0], options  # half may have few rows
            model.close()


def test_a_device_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    full = DeviceInfo("cpu0", "full", "gpu", 130 << 20, 130 << 20)
    monkeypatch.setattr(Found, "info", full)
    with pytest.raises(DeviceError, match=r"cpu0 needs \d+ MiB .* 2 can be used"):
        gemloom.load(data, device="cpu0")
    # Layers give way where nobody insists, and all of them where there is no room at all.
    with gemloom.load(data, device="auto") as model:
        assert model.placement.on_host and model.backends[-1] == "CPU"


def test_a_benchmark_tells_what_a_device_lacks(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_devices.lack(monkeypatch, [ggml.GGML_OP_GLU])
    model = load("gemma3", device="cpu0", context=64, **PLAIN)
    report = bench.bench(model, prompts=(8,), generate=(), depths=(0,), repetitions=1)
    assert report.machine.fallbacks == {"geglu": model.config.n_layer}
    (about, *_) = tables(report)
    assert list(about.columns[1].cells)[-1] == "geglu (12)"


@pytest.mark.parametrize("variant", ["e2b", "gemma3"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_inputs_of_a_step_go_to_a_device_at_once(
    load: Load, monkeypatch: pytest.MonkeyPatch, variant: str, count: int
) -> None:
    """However many requests decode."""
    model = load(variant, device="cpu0", slots=count, chunk=32, **PLAIN)
    sent: list[int] = []
    real = ggml.ggml_backend_tensor_set

    def send(tensor: object, data: int, offset: int, size: int) -> None:
        sent.append(size)
        real(tensor, data, offset, size)

    monkeypatch.setattr(ggml, "ggml_backend_tensor_set", send)
    for step in range(3):
        run(model, *(Chunk(slot=slot, start=step, tokens=[5], wanted=[0]) for slot in range(count)))
    assert len(sent) == 3
    inputs, _ = copied(model)
    masks = [f"{kind}_mask.{i}" for kind in ("full", "sliding") for i in range(count)]
    assert set(inputs) == {"positions", "full_cells", "sliding_cells", *masks}
    assert len(inputs) == len(set(inputs))
