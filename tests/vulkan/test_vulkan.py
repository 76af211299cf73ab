"""Models on Vulkan: a real second backend, on any machine with Mesa's software driver.

Run by ``make test-vulkan``; skipped where ggml has no Vulkan.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

import gemloom
import tiny
from conftest import Load, prompt
from device_checks import Bound, Checks
from gemloom.compute.survey import survey
from gemloom.files import gguf
from gemloom.files.source import resolve
from gemloom.ggml.backends import listed
from gemloom.options import Options

HERE = [name for name in listed() if name.startswith("vulkan")]
pytestmark = [
    pytest.mark.vulkan,
    pytest.mark.skipif(not HERE, reason="ggml has no Vulkan device here: make test-vulkan"),
]
# Without half floats in its products, those of the CPU against transformers (test_forward.py).
EXACT = "GGML_VK_DISABLE_F16" in os.environ
BOUND = Bound(0.002, 0.02) if EXACT else Bound(0.008, 0.1)
variants = pytest.mark.parametrize("variant", sorted(tiny.VARIANTS))
some = pytest.mark.parametrize("variant", ["e2b", "12b", "26b", "gemma3_scaled"])


@pytest.fixture
def checks(load: Load) -> Checks:
    return Checks(load, HERE[0] if HERE else "", BOUND)


@variants
def test_layers(checks: Checks, variant: str) -> None:
    checks.layers(variant)


@some
def test_pieces(checks: Checks, variant: str) -> None:
    checks.pieces(variant)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("variant", ["e2b", "gemma3"])
def test_cells_of_other_types(checks: Checks, variant: str, kv_type: str) -> None:
    """Rounding K and V to 8 bits turns small differences into steps."""
    checks.cells(variant, kv_type, Bound(0.02, 0.3) if kv_type == "q8_0" else checks.bound)


@some
def test_a_ragged_batch(checks: Checks, variant: str) -> None:
    checks.ragged(variant)


@some
def test_adapters(checks: Checks, variant: str) -> None:
    checks.adapters(variant)


@some
def test_requests_at_once(checks: Checks, variant: str) -> None:
    checks.together(variant)


@pytest.mark.parametrize("variant", ["e2b", "gemma3"])
def test_state_and_snapshots(checks: Checks, variant: str) -> None:
    checks.state(variant)
    checks.snapshots(variant)


@pytest.mark.parametrize("variant", ["e2b", "12b"])
def test_context_shift(checks: Checks, variant: str) -> None:
    checks.shift(variant)
    checks.goes_on(variant)


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_part_of_the_layers(checks: Checks, variant: str) -> None:
    """The other checks, with a boundary in the middle."""
    part = {"gpu_layers": tiny.VARIANTS[variant].n_layer // 2}
    checks.ragged(variant, **part)
    checks.adapters(variant, **part)
    checks.state(variant, **part)
    checks.shift(variant, **part)


@pytest.mark.skipif(len(HERE) < 2, reason="one Vulkan device; GGML_VK_VISIBLE_DEVICES=0,0 is two")
@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_two_devices(load: Load, variant: str) -> None:
    """With nothing between them but the scheduler's copies, and some layers on the CPU."""
    ids, n = prompt(40), tiny.VARIANTS[variant].n_layer
    both = Checks(load, HERE[:2], BOUND)
    model = both.model(variant, gpu_layers=n - 1, tensor_split=[1, 1])
    assert set(model.placement.layers) == {0, 1, 2} and model.placement.head == 1
    BOUND.close(model.logits(ids), both.host(variant).logits(ids))
    both.adapters(variant)
    both.state(variant)


@pytest.mark.parametrize("types", ["q8_0", "q4_k", "q6_k", "bf16"])
def test_quantized_weights(load: Load, types: str) -> None:
    """The same products to within what activations in 8 bits cost the CPU."""
    forms, ids = {"types": types}, prompt(40)
    with load("e2b_wide", forms=forms, device="cpu", threads=1) as host:
        wanted = host.logits(ids)
    with load("e2b_wide", forms=forms, device=HERE[0], threads=1) as model:
        Bound(0.05, 0.5).close(model.logits(ids), wanted)
        assert not model.fallbacks


def test_weights_that_vulkan_cannot_multiply_with_stay_on_the_host(load: Load) -> None:
    forms, ids = {"types": "tq2_0"}, prompt(40)
    wanted = load("e2b_wide", forms=forms, device="cpu").logits(ids)
    model = load("e2b_wide", forms=forms, device=HERE[0])
    assert model.placement.kept
    Bound(0.05, 0.5).close(model.logits(ids), wanted)
    assert list(model.fallbacks) == ["mul_mat"]


def test_a_stream_goes_to_the_device(load: Load) -> None:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    parts = (data[i : i + 10_007] for i in range(0, len(data), 10_007))
    with gemloom.load(parts, device=HERE[0], kv_type="f32", context=256) as model:
        wanted = load("e2b", device=HERE[0]).logits(prompt(20))
        assert np.array_equal(model.logits(prompt(20)), wanted)


def test_nothing_is_lacking() -> None:
    for variant in tiny.VARIANTS.values():
        file = gguf.read(resolve(tiny.gguf_bytes(variant)))
        assert not survey(file, Options())[HERE[0]].lacking
