"""Our own kernels on the CPU's layers of a model of which a device has the rest."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import ggml
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

import cpu_devices
import gemloom
import tiny
from conftest import Load, prompt
from device_checks import Bound, Checks, call, run
from gemloom import testing
from gemloom.cli.device_options import plan_facts, plan_table
from gemloom.compute.batch import Chunk
from gemloom.compute.fitting import propose
from gemloom.compute.want import Want
from gemloom.files import gguf
from gemloom.files.source import resolve
from gemloom.kernels.library import supported
from gemloom.options import Options
from gemloom.testing import parts_of
from random_lora import random_lora
from worker_processes import needs_rpc, worker

pytestmark = pytest.mark.skipif(not supported(), reason="no kernels for this processor")

# ggml's attention, on the device, rounds queries to half floats, and so errs by as much itself.
BOUND = Bound(0.002, 0.02)
# Where a rounding of activations to 8 bits tips: what test_fast_paths.py finds either way to err.
ROUNDED = Bound(0.05, 0.7)
PART = {"gpu_layers": 5}
QUANTIZED = {"types": "q4_0"}
some = pytest.mark.parametrize("variant", ["e2b", "26b", "gemma3"])


@pytest.fixture(autouse=True)
def _cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_devices.add(monkeypatch)


@pytest.fixture
def checks(load: Load) -> Checks:
    return Checks(load, "cpu0", BOUND)


@pytest.mark.parametrize("variant", sorted(tiny.VARIANTS))
def test_layers(checks: Checks, variant: str) -> None:
    checks.layers(variant)


@some
def test_part_of_the_layers(checks: Checks, variant: str) -> None:
    checks.pieces(variant, **PART)
    checks.ragged(variant, **PART)
    checks.adapters(variant, **PART)
    checks.state(variant, **PART)
    checks.shift(variant, **PART)


def test_going_back_and_on(checks: Checks) -> None:
    checks.snapshots("e2b", **PART)
    checks.goes_on("e2b", **PART)


@some
@pytest.mark.parametrize("types", ["f32", "q4_0", "bf16"])
@pytest.mark.parametrize("cells", ["f16", "f32"])
def test_the_layers_of_the_cpu_have_the_bits_they_have_there_alone(
    load: Load, variant: str, types: str, cells: str
) -> None:
    """However the prompt is cut: what enters the device's first layer is what enters it there."""
    ids, options = prompt(60), {"forms": {"types": types}, "kv_type": cells, "chunk": 40}
    part = load(variant, device="cpu0", **PART, **options)
    count = part.placement.layers.count(part.placement.host)
    assert count == part.config.n_layer - 5
    names = [f"blk.{i}.out" for i in range(count)]
    wanted = load(variant, device="cpu", **options).trace(ids, names)
    for cuts in ([0, 40, 60], [0, 1, 4, 20, 21, 59, 60]):
        chunks = [
            Chunk(slot=0, start=a, tokens=ids[a:b], wanted=range(b - a)) for a, b in pairwise(cuts)
        ]
        parts = [tapped(part, names, chunk) for chunk in chunks]
        for name in names:
            got = np.concatenate([values[name] for values in parts])
            np.testing.assert_array_equal(got, wanted[name])


def tapped(model: gemloom.Model, names: list[str], chunk: Chunk) -> dict[str, np.ndarray]:
    """What a step gives under these names."""
    return dict(testing.run(model, [chunk], Want(taps=frozenset(names))).tapped)


@some
def test_quantized_weights(load: Load, variant: str) -> None:
    ids, options = prompt(40), {"forms": QUANTIZED}
    wanted = load(variant, device="cpu", **options).logits(ids)
    model = load(variant, device="cpu0", **PART, **options)
    assert 0 < model.memory()["packed"] < load(variant, device="cpu", **options).memory()["packed"]
    assert not model.fallbacks
    ROUNDED.close(model.logits(ids), wanted)


@some
def test_ggmls_repacked_weights_stay_with_their_layers(load: Load, variant: str) -> None:
    ids, options = prompt(40), {"forms": QUANTIZED, "kernels": "ggml"}
    alone = load(variant, device="cpu", **options)
    model = load(variant, device="cpu0", **PART, **options)
    assert (model.memory()["repacked"] > 0) == (alone.memory()["repacked"] > 0)
    assert not model.memory()["packed"]
    ROUNDED.close(model.logits(ids), alone.logits(ids))


# -- which nodes these are ---------------------------------------------------------------------


def nodes(model: gemloom.Model) -> Iterator[tuple[str, int, str]]:
    """Of the graph that is kept: name, operation and backend of what computes each named node."""
    graph, device = parts_of(model).program._last.graph, parts_of(model).device
    for i in range(ggml.ggml_graph_n_nodes(graph._graph)):
        node = ggml.ggml_graph_node(graph._graph, i)
        name = node.contents.name.decode()
        while node.contents.op in (ggml.GGML_OP_RESHAPE, ggml.GGML_OP_VIEW):
            node = node.contents.src[0]
        backend = ggml.ggml_backend_sched_get_tensor_backend(device.scheduler, node)
        assert backend, name
        # ggml-python gives the lower half of the pointer.
        lower = [int(each) & 0xFFFFFFFF for each in device.backends]
        yield name, node.contents.op, lower.index(int(backend) & 0xFFFFFFFF)


def computed(model: gemloom.Model, *chunks: Chunk) -> dict[str, list[int]]:
    """Operation and device of each named node of a step, noted before its memory goes."""
    run(model, *chunks)
    return {name: rest for name, *rest in call(model, lambda: list(nodes(model)))}


PRODUCTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
            "inp_gate", "proj", "ffn_down_exps", "ffn_gate_up_exps")  # fmt: skip
NORMS = ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm")


@some
@pytest.mark.parametrize("wanted", [[], [39]])
def test_the_layers_of_the_cpu_are_our_operations(
    load: Load, variant: str, wanted: list[int]
) -> None:
    model = load(variant, device="cpu0", **PART, forms=QUANTIZED, chunk=64, kv_type="f16")
    there, host, custom = model.placement, model.placement.host, ggml.GGML_OP_CUSTOM
    seen = set()
    for name, (operation, where) in computed(
        model, Chunk(slot=0, start=0, tokens=prompt(40), wanted=wanted)
    ).items():
        if not (parts := re.fullmatch(r"blk\.(\d+)\.(\w+)", name)):
            continue
        layer, what = int(parts[1]), parts[2]
        if what in (*PRODUCTS, *NORMS):
            place = there.layers[layer]
        elif what == "attn_kqv":  # where the cells are that it reads
            place = there.cells[model.config.layers[layer].kv_owner]
        else:
            continue
        assert where == place, name
        assert (operation == custom) == (place == host), name
        seen.add((what, place))
    assert {(what, host) for what in ("attn_q", "attn_kqv", "ffn_down", "ffn_norm")} <= seen
    if wanted:
        assert {("ffn_down", 0), ("attn_kqv", host)} <= seen


def test_attention_to_the_cpus_cells_is_ours_wherever_the_layer_is(load: Load) -> None:
    """On E2B layers that share K/V run on the device, and their owner on the CPU."""
    model = load("e2b", device="cpu0", **PART)
    there, owners = model.placement, [spec.kv_owner for spec in model.config.layers]
    apart = [i for i, at in enumerate(there.layers) if at == 0 and there.cells[owners[i]] == 1]
    assert apart
    found = computed(model, Chunk(slot=0, start=0, tokens=prompt(40), wanted=[39]))
    for i in apart:
        assert found[f"blk.{i}.attn_kqv"] == [ggml.GGML_OP_CUSTOM, there.host]
        assert found[f"blk.{i}.attn_q"][1] == 0


# -- matrices that a device cannot multiply with -----------------------------------------------


def lack_types(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    """Let the devices have no products with such weights."""
    numbers = {int(GGMLQuantizationType[kind.upper()]) for kind in kinds}
    cpu_devices.lack_where(
        monkeypatch,
        lambda node: (
            node.op in (ggml.GGML_OP_MUL_MAT, ggml.GGML_OP_MUL_MAT_ID)
            and node.src[0].contents.type in numbers
        ),
    )


@some
@pytest.mark.parametrize(("kind", "ours"), [("q4_0", True), ("q5_0", False)])
def test_a_type_that_a_device_lacks(
    load: Load, monkeypatch: pytest.MonkeyPatch, variant: str, kind: str, ours: bool
) -> None:
    """Its matrices stay on the CPU, whose kernels multiply; all else of the layer moves."""
    forms, ids = {"types": kind}, prompt(40)
    alone = load(variant, device="cpu", forms=forms, kernels="auto" if ours else "plain")
    wanted = alone.logits(ids)
    lack_types(monkeypatch, kind)
    model = load(variant, device="cpu0", forms=forms)
    assert set(model.placement.layers) == {0}
    ROUNDED.close(model.logits(ids), wanted)
    lora = random_lora(alone)
    for opened in (model, alone):
        opened.adapters.load("a", lora, 0.7)
    with_adapter = alone.logits(ids, adapters={"a": None})
    assert np.abs(with_adapter - wanted).mean() > 0.05 * wanted.std()
    ROUNDED.close(model.logits(ids, adapters={"a": None}), with_adapter)

    stranded, found = (
        model.placement.stranded,
        computed(model, Chunk(slot=0, start=0, tokens=ids, wanted=[39])),
    )
    assert len(stranded) > 5 * model.config.n_layer
    products = [name.removesuffix(".weight") for name in stranded if name.startswith("blk.")]
    for name in set(products) & set(found):
        operation, where = found[name]
        assert where == model.placement.host
        assert (operation == ggml.GGML_OP_CUSTOM) == ours
    assert found["blk.0.attn_norm"] == [ggml.GGML_OP_MUL, 0]
    assert bool(model.memory()["packed"]) == ours
    assert set(model.fallbacks) <= {"mul_mat", "mul_mat_id"}
    assert not parts_of(model).program.ranks  # the logits are on the CPU


def test_the_plan_tells_which_these_are(monkeypatch: pytest.MonkeyPatch) -> None:
    lack_types(monkeypatch, "q4_0")
    file = gguf.read(resolve(tiny.gguf_bytes(tiny.VARIANTS["gemma3"], **QUANTIZED)))
    placement = propose(file, Options(device="cpu0", gpu_layers=2, context=128))
    kept, n = plan_facts(placement)["kept_on_host"], placement.host
    assert len(kept) == 2 * 7 + 1  # of two layers, and the head
    layers = {int(name.split(".")[1]) for name in kept if name.startswith("blk.")}
    assert {placement.layers[i] for i in layers} == {0} and placement.layers[0] == n
    assert f"{len(kept)} matrices" in str(plan_table(placement).caption)


# -- packed weights in a file, and workers ------------------------------------------------------


def test_the_file_of_packed_weights_is_that_of_all_layers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever made it, and wherever the layers run."""
    path, ids = tmp_path / "model.gguf", prompt(20)
    path.write_bytes(tiny.gguf_bytes(tiny.VARIANTS["e2b"], **QUANTIZED))

    def logits(**options: Any) -> tuple[np.ndarray, dict[str, int]]:
        with gemloom.load(path, context=64, threads=1, kv_type="f32", **options) as model:
            return model.logits(ids), model.memory()

    caplog.set_level(logging.WARNING, "gemloom.kernels")
    without, memory = logits(device="cpu0", **PART)
    made, kept = logits(device="cpu0", packed="keep", **PART)
    beside = path.with_name("model.gguf.packed")
    content = beside.read_bytes()
    alone, _ = logits(device="cpu", packed="off")
    found, whole = logits(device="cpu", packed="keep")
    np.testing.assert_array_equal(made, without)
    np.testing.assert_array_equal(found, alone)
    assert memory["packed"] == kept["packed"] < whole["packed"] < len(content)
    assert memory["copied"] > kept["copied"] and kept["mapped"] >= kept["packed"]
    assert beside.read_bytes() == content and not caplog.messages


@needs_rpc
@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_half_on_a_worker(load: Load, variant: str) -> None:
    """Whose memory is not the host's: what one of them needs of the other must travel."""
    ids, options = prompt(40), {"forms": QUANTIZED}
    alone = load(variant, device="cpu", **options)
    with worker() as other:
        model = load(variant, device=[other.device, "cpu"], **PART, **options)
        assert model.memory()["packed"]
        ROUNDED.close(model.logits(ids), alone.logits(ids))
        for opened in (model, alone):
            opened.adapters.load("style", random_lora(alone, 3))
        wanted = alone.logits(ids, adapters={"style": 0.7})
        ROUNDED.close(model.logits(ids, adapters={"style": 0.7}), wanted)
        model.close()
