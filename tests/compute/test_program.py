"""Graphs that are kept: built once for each shape, the same bits whatever was computed between."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import cpu_devices
import gemloom
from conftest import Load, prompt
from gemloom import testing
from gemloom.compute.batch import Chunk
from gemloom.compute.want import Want
from gemloom.errors import OptionError
from gemloom.testing import parts_of
from random_lora import random_lora

IDS = prompt(40)
STEPS = [  # slot, first, stop: shapes that come back, a larger one between them
    (0, 0, 8), (1, 0, 3), (0, 8, 9), (1, 3, 30), (0, 9, 10), (1, 30, 31), (2, 0, 40), (0, 10, 11),
    (1, 31, 32), (2, 0, 8),
]  # fmt: skip


def built(model: gemloom.Model, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The keys of the graphs that are built from now on."""
    keys: list[Any] = []
    program = parts_of(model).program
    build = program._build
    monkeypatch.setattr(program, "_build", lambda key: keys.append(key) or build(key))
    return keys


def logits(model: gemloom.Model, steps: Sequence[tuple[int, int, int]] = STEPS) -> list[np.ndarray]:
    chunks = [
        Chunk(slot=slot, start=a, tokens=IDS[a:b], wanted=[b - a - 1]) for slot, a, b in steps
    ]
    return [testing.run(model, [chunk]).logits for chunk in chunks]


@pytest.mark.parametrize("device", ["cpu", "cpu0", "own0"])
@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_the_same_bits_as_with_one_graph(
    load: Load, variant: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        (cpu_devices.own if device == "own0" else cpu_devices.add)(monkeypatch)
    options = {"slots": 3, "chunk": 64, "device": device, "kernels": "plain"}
    several, one = load(variant, **options), load(variant, **options)
    with monkeypatch.context() as patch:
        patch.setattr("gemloom.compute.program.GRAPH_BYTES", 0)
        wanted = logits(one)
    assert len(parts_of(one).program._plans) == 1
    for ours, reference in zip(logits(several), wanted, strict=True):
        assert np.array_equal(ours, reference)
    assert len(parts_of(several).program._plans) > 2


def test_a_shape_is_built_once(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("e2b", slots=3, chunk=64)
    keys = built(model, monkeypatch)
    logits(model)
    assert len(keys) == len(set(keys)) < len(STEPS)
    logits(model)
    assert len(keys) == len(set(keys))


def test_they_are_bounded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("e2b", slots=3, chunk=64)
    logits(model, [(0, 0, 8)])
    most = 3 * parts_of(model).program.graph_bytes
    monkeypatch.setattr("gemloom.compute.program.GRAPH_BYTES", most)
    for rows in range(1, 12):
        logits(model, [(0, 0, rows)])
        assert parts_of(model).program.graph_bytes <= most
    assert 1 < len(parts_of(model).program._plans) < 11


def test_an_unloaded_adapter_takes_its_graphs_along(load: Load) -> None:
    model = load("e2b")
    model.adapters.load("a", random_lora(model))
    model.generate(IDS, max_tokens=2, adapters=["a"])
    with_adapter = len(parts_of(model).program._plans)
    model.generate(IDS, max_tokens=2)
    model.adapters.unload("a")
    model.generate(IDS, max_tokens=2)
    assert all(not key.adapters for key in parts_of(model).program._plans)
    assert 0 < len(parts_of(model).program._plans) < 2 * with_adapter + 1


@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_a_graph_gets_room_for_its_nodes(
    load: Load, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few were tried first: the same logits, and no step fails for the next size."""
    wanted = logits(load(variant, slots=3, chunk=64))
    monkeypatch.setattr("gemloom.compute.program.FEW_NODES", 16)
    model = load(variant, slots=3, chunk=64)
    assert parts_of(model).program._nodes > 16
    for ours, reference in zip(logits(model), wanted, strict=True):
        assert np.array_equal(ours, reference)
    names = model.tap_names()
    assert set(model.trace(IDS, names)) == set(names)  # many more nodes than any step before


def test_a_graph_of_too_many_nodes_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemloom.compute.program.FEW_NODES", 16)
    monkeypatch.setattr("gemloom.compute.program.MOST_NODES", 64)
    with pytest.raises(OptionError, match="a step of 1 slots takes over 64 operations"):
        load("e2b")


def test_hidden_states_are_what_goes_into_the_head(load: Load) -> None:
    """They are the tap's values, and with the head's matrix give the logits."""
    model = load("31b")
    chunk = [Chunk(slot=0, start=0, tokens=IDS, wanted=range(len(IDS)))]
    output = testing.run(model, chunk, Want(hidden=True))
    tapped = testing.run(model, chunk, Want("none", taps=frozenset({"output_norm"}))).tapped
    assert output.hidden is not None
    assert np.array_equal(output.hidden, tapped["output_norm"])
    assert output.logits.shape == (len(IDS), model.config.n_vocab)
    without = testing.run(model, chunk, Want("none", hidden=True))
    assert len(without.rows) == 0
    assert without.hidden is not None and without.hidden.shape == (len(IDS), model.config.n_embd)
