"""A forward pass of one's own in place of the architecture's, and changes under a loaded model."""

from typing import Any

import ggml
import numpy as np
import pytest

import cpu_devices
from conftest import Load, prompt
from gemloom.compute.linear import linear
from gemloom.errors import OptionError, RequestError
from gemloom.models.gemma3 import Gemma3
from gemloom.models.gemma4 import Gemma4

IDS = prompt(40)  # more than a window
BASES = {"e2b": Gemma4, "26b": Gemma4, "gemma3": Gemma3}
variants = pytest.mark.parametrize("variant", BASES)
kernels = pytest.mark.parametrize("kernels", ["auto", "plain"])


def changed(base: Any, layer: int, name: str, change: Any) -> Any:
    """A class whose ``named`` lets ``change(g, spec, x)`` work on one intermediate."""

    class Own(base):
        def named(self, g: Any, spec: Any, called: str, x: Any) -> Any:
            if (spec.index, called) == (layer, name):
                x = change(g, spec, x)
            return super().named(g, spec, called, x)

    return Own


@variants
def test_a_subclass_that_changes_nothing_gives_the_same_bits(load: Load, variant: str) -> None:
    class Own(BASES[variant]):  # type: ignore[misc]
        pass

    own, usual = load(variant, architecture=Own), load(variant)
    assert np.array_equal(own.logits(IDS), usual.logits(IDS))
    assert own.tap_names() == usual.tap_names()
    how: dict[str, Any] = {"seed": 1, "max_tokens": 12}
    assert own.generate(IDS, **how).tokens == usual.generate(IDS, **how).tokens


@variants
@kernels
def test_a_vector_is_added_to_what_a_layer_makes(load: Load, variant: str, kernels: str) -> None:
    usual = load(variant, kernels=kernels)
    before = usual.trace(IDS, ["blk.2.out"])["blk.2.out"]
    push = np.random.RandomState(0).normal(size=usual.config.n_embd).astype(np.float32)
    steered = changed(
        BASES[variant], 2, "out", lambda g, spec, x: g.add(x, g.constant("push", push))
    )
    model = load(variant, kernels=kernels, architecture=steered)
    taps = model.trace(IDS, ["blk.1.out", "blk.2.out"])
    assert np.array_equal(taps["blk.1.out"], usual.trace(IDS, ["blk.1.out"])["blk.1.out"])
    np.testing.assert_allclose(taps["blk.2.out"], before + push, atol=1e-5)
    together = model.logits(IDS)
    assert not np.allclose(together, usual.logits(IDS), atol=0.1)
    alone = [model.logits(IDS[:n], rows="last")[0] for n in (1, 17, 40)]
    np.testing.assert_allclose(together[[0, 16, 39]], alone, atol=1e-3)


@variants
@kernels
def test_a_head_that_is_taken_out_is_out_of_its_matrix(
    load: Load, variant: str, kernels: str
) -> None:
    def drop(g: Any, spec: Any, x: Any) -> Any:
        keep = np.ones((spec.n_head, spec.head_dim), np.float32)
        keep[1] = 0
        return g.mul(x, g.constant("keep", keep.reshape(-1)))

    model = load(
        variant, kernels=kernels, architecture=changed(BASES[variant], 1, "attn_kqv", drop)
    )
    spec = model.config.layers[1]
    got = model.trace(IDS, ["blk.1.attn_kqv"])["blk.1.attn_kqv"]
    was = load(variant, kernels=kernels).trace(IDS, ["blk.1.attn_kqv"])["blk.1.attn_kqv"]
    heads, before = (a.reshape(len(IDS), spec.n_head, spec.head_dim) for a in (got, was))
    assert not heads[:, 1].any()
    others = [head for head in range(spec.n_head) if head != 1]
    assert np.array_equal(heads[:, others], before[:, others])


@kernels
def test_another_activation(load: Load, kernels: str) -> None:
    class Rectified(Gemma3):
        def mlp(self, g: Any, w: Any, rows: Any, x: Any) -> Any:
            m = self.norm(g, w["ffn_norm"], x)
            gate, up = (linear(g, w[name], m, rows.deltas) for name in ("ffn_gate", "ffn_up"))
            both = g.mul(g.apply(ggml.ggml_relu, gate), up)
            return linear(g, w["ffn_down"], g.name(both, f"{w['ffn_up'].name}.both"), rows.deltas)

    model = load("gemma3", kernels=kernels, architecture=Rectified)
    values = model.trace(IDS, ["blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_up.weight.both"])
    gate, up, both = values.values()
    np.testing.assert_allclose(both, np.maximum(gate, 0) * up, atol=1e-6)
    assert (gate < 0).any() and (gate > 0).any()
    assert not np.allclose(model.logits(IDS), load("gemma3", kernels=kernels).logits(IDS), atol=0.1)


def test_many_more_nodes_than_usual(load: Load) -> None:
    """Half as many again on every layer, which a graph of the usual size has no room for."""

    def busy(g: Any, x: Any) -> Any:
        for _ in range(150):
            x = g.scale(x, 1.0)
        return x

    class Busy(Gemma3):
        def named(self, g: Any, spec: Any, name: str, x: Any) -> Any:
            return super().named(g, spec, name, busy(g, x) if name == "out" else x)

    model = load("gemma3", architecture=Busy)
    assert np.array_equal(model.logits(IDS), load("gemma3").logits(IDS))


@pytest.mark.parametrize("given", [Gemma4, "Gemma3", object, 3])
def test_what_cannot_take_its_place(load: Load, given: Any) -> None:
    with pytest.raises(OptionError, match=r"a subclass of gemloom\.models\.gemma3\.Gemma3"):
        load("gemma3", architecture=given)


def test_a_change_under_a_loaded_model_counts_from_the_reset_on(load: Load) -> None:
    push = np.zeros(load("e2b").config.n_embd, np.float32)
    steered = changed(Gemma4, 2, "out", lambda g, spec, x: g.add(x, g.constant("push", push)))
    model, usual = load("e2b", architecture=steered), load("e2b")
    how: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
    plain = usual.generate(IDS, **how)
    assert model.generate(IDS, **how).tokens == plain.tokens
    push[:] = 3
    fresh = load("e2b", architecture=steered).generate(IDS, **how)
    assert fresh.tokens != plain.tokens
    model.reset()
    after = model.generate(IDS, **how)
    assert after.usage.cached_tokens == 0
    assert after.tokens == fresh.tokens


def test_a_method_that_is_patched_counts_from_the_reset_on(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("gemma3")
    before = model.logits(IDS, rows="last")
    attention = Gemma3.attention

    def silent(self: Any, g: Any, *more: Any) -> Any:
        return g.scale(attention(self, g, *more), 0.0)

    monkeypatch.setattr(Gemma3, "attention", silent)
    assert np.array_equal(model.logits(IDS, rows="last"), before)  # the graph is kept
    model.reset()
    assert not np.allclose(model.logits(IDS, rows="last"), before)


def test_no_reset_while_requests_run(load: Load) -> None:
    model = load("e2b")
    with model.stream("hello", max_tokens=200, logit_bias={1: -100}) as run:
        next(run)
        with pytest.raises(RequestError, match="requests are under way"):
            model.reset()


def test_numbers_of_ones_own_go_to_the_device_that_reads_them(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_devices.add(monkeypatch)
    push = np.random.RandomState(0).normal(size=load("e2b").config.n_embd).astype(np.float32)
    steered = changed(Gemma4, 8, "out", lambda g, spec, x: g.add(x, g.constant("push", push)))
    devices = load("e2b", architecture=steered, device=["cpu0", "cpu1"], kernels="ggml")
    here = load("e2b", architecture=steered, kernels="ggml")
    assert set(devices.placement.layers) == {0, 1}
    for factor in (1.0, -2.0):
        push *= factor
        np.testing.assert_allclose(devices.logits(IDS), here.logits(IDS), atol=2e-3)
