"""An architecture that is only registered loads, is quantized, adapted, merged and served."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cpu_devices
import gemloom
import oracle
import tiny
import tiny_lora
import tiny_vocab
from conftest import prompt
from gemloom.adapters import peft_names
from gemloom.adapters.factors import Lora
from gemloom.compute.linear import linear, table_rows
from gemloom.files.gguf import GGUF
from gemloom.models.config import Config, Kind, LayerSpec, Rope
from gemloom.models.facts import FACTS
from gemloom.models.keys import ArchitectureKeys, make_config
from gemloom.models.layout import Layout, Role
from gemloom.models.module_names import ModuleNames
from gemloom.models.registry import ARCHITECTURES
from gemloom.tools.adapters import merging
from gemloom.tools.quantization import quantize
from gemloom.tools.quantization.quantize import Wanted
from gemloom.tools.quantization.recipes import recipe
from http_serving import NAME, http, serving

IDS = prompt(40)
D, HEADS, DIM, LAYERS = 64, 2, 32, 3
TABLE, GATE = "token_embd.weight", "toy_gate.weight"  # every layer reads the gate
NORM, HEAD = "output_norm.weight", "output.weight"
NAMES = ModuleNames(
    outside={"words": "token_embd", "answer": "output"},
    modules={f"mixer.{short}": f"attn_{short}" for short in ("q", "k", "v", "output")},
    stacked={},
    others_outside={},
    others={},
)


def toy_config(file: GGUF, keys: ArchitectureKeys) -> Config:
    """Full attention in every layer, and nothing else."""
    n_head = keys.count("attention.head_count")
    spec: dict[str, Any] = {"kind": Kind.FULL, "head_dim": keys.head_dim(), "rope": Rope(DIM, 1e4)}
    spec |= {"n_head": n_head, "n_kv": n_head, "n_ff": 1}
    layers = tuple(LayerSpec(index=i, kv_owner=i, **spec) for i in range(keys.n_layer))
    return make_config(file, keys, layers, window=1, attn_scale=DIM**-0.5, softcap=None)


class Toy:
    """x = (x + attention(norm(x))) * gate in each layer; no class of ours above it."""

    def __init__(self, config: Config, weights: Any) -> None:
        self.config, self.weights, self.placement = config, weights, weights.placement

    @staticmethod
    def layout(config: Config, there: Collection[str]) -> Layout:
        shapes = {TABLE: (D, config.n_vocab), GATE: (D,), NORM: (D,), HEAD: (D, config.n_vocab)}
        roles = {TABLE: Role.TABLE, GATE: Role.SHARED, NORM: Role.FINAL, HEAD: Role.HEAD}
        for i in range(config.n_layer):
            shapes[f"blk.{i}.attn_norm.weight"] = (D,)
            shapes |= {f"blk.{i}.{name}.weight": (D, D) for name in NAMES.modules.values()}
        return Layout(required=shapes, roles=roles, sliced=frozenset({TABLE}))

    def forward(self, g: Any, rows: Any, wanted: Any, kv: Any) -> Any:
        with g.on(self.placement.host):
            x = table_rows(g, self.weights[TABLE], rows.tokens, rows.deltas)
            g.expand(x)
        for spec in self.config.layers:
            g.at(self.placement.layers[spec.index])
            x = g.mul(g.add(x, self._attention(g, spec, rows, x, kv)), self._on(g, GATE))
        if wanted is None:
            return None
        if wanted is not rows:
            x = g.get_rows(x, wanted.of_step)
        g.at(self.placement.head)
        h = g.name(g.rms_norm(x, self.config.eps, self._on(g, NORM)), "output_norm")
        return g.name(linear(g, self._on(g, HEAD), h, wanted.deltas), "logits")

    def _on(self, g: Any, name: str) -> Any:
        return self.weights.on(name, g.place)

    def _attention(self, g: Any, spec: Any, rows: Any, x: Any, kv: Any) -> Any:
        w = self.weights.block(spec.index)
        h = g.rms_norm(x, self.config.eps, w["attn_norm"])
        parts = (linear(g, w[f"attn_{which}"], h, rows.deltas) for which in "qkv")
        q, k, v = (g.reshape(part, DIM, HEADS, rows.count) for part in parts)
        kv.write(g, spec, rows, self.rope(g, spec, rows.positions, k), v)
        o = kv.attend(g, spec, rows, self.rope(g, spec, rows.positions, q), DIM**-0.5)
        return linear(g, w["attn_output"], o, rows.deltas)

    def rope(self, g: Any, spec: Any, positions: Any, x: Any) -> Any:
        return g.rope(x, positions, DIM, 1e4, 1.0, None)

    def finish(self, logits: np.ndarray) -> np.ndarray:
        logits *= 3
        return logits


def weights() -> dict[str, np.ndarray]:
    rng = np.random.RandomState(4)
    n_vocab = len(tiny_vocab.metadata("gemma3", ())["tokenizer.ggml.tokens"])
    shapes: dict[str, tuple[int, ...]] = {TABLE: (n_vocab, D), HEAD: (n_vocab, D)}
    shapes |= {f"blk.{i}.{n}.weight": (D, D) for i in range(LAYERS) for n in NAMES.modules.values()}
    made = {name: rng.standard_normal(shape) * D**-0.5 for name, shape in shapes.items()}
    vectors = [GATE, NORM, *(f"blk.{i}.attn_norm.weight" for i in range(LAYERS))]
    made |= {name: rng.uniform(0.5, 1.5, D) for name in vectors}
    return {name: value.astype(np.float32) for name, value in made.items()}


def file() -> bytes:
    keys = {
        "block_count": LAYERS, "context_length": 512, "embedding_length": D,
        "attention.head_count": HEADS, "attention.head_count_kv": HEADS,
        "attention.key_length": DIM, "attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    vocabulary = tiny_vocab.metadata("gemma3", ())
    named = {f"toy.{key}": value for key, value in keys.items()}
    return tiny.write({"general.architecture": "toy", **named, **vocabulary}, weights())


def expected(tensors: dict[str, np.ndarray]) -> np.ndarray:
    """The logits of IDS in float64."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    x, turn = w[TABLE][IDS], 1e4 ** (-2.0 * np.arange(DIM // 2) / DIM)
    for i in range(LAYERS):
        layer = oracle.Layer(oracle._block(w, i), DIM, None, turn, DIM**-0.5)
        h = oracle.rms(x, layer.w["attn_norm"])
        q, k, v = (oracle.heads(h @ layer.w[f"attn_{which}"].T, layer) for which in "qkv")
        a = oracle.attend(oracle.rope(q, layer), oracle.rope(k, layer), v, layer)
        x = (x + a @ layer.w["attn_output"].T) * w[GATE]
    return np.asarray(3 * oracle.rms(x, w[NORM]) @ w[HEAD].T)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a new architecture takes."""
    monkeypatch.setitem(FACTS, "toy", SimpleNamespace(config=toy_config, NAMES=NAMES))
    monkeypatch.setitem(ARCHITECTURES, "toy", Toy)


@contextmanager
def loaded(source: Any, **options: Any) -> Iterator[gemloom.Model]:
    options = {"kv_type": "f32", "context": 128, "threads": 1} | options
    with gemloom.load(source, **options) as model:
        yield model


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_it_computes_what_its_forward_pass_says(kernels: str) -> None:
    with loaded(file(), kernels=kernels) as model:
        np.testing.assert_allclose(model.logits(IDS), expected(weights()), atol=5e-3)
        told = model.generate(IDS, temperature=0, max_tokens=5, logit_bias={1: -100, 106: -100})
        assert len(told.tokens) == 5


def test_each_device_has_what_its_layers_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared tensor is one that no other architecture has."""
    cpu_devices.add(monkeypatch)
    with loaded(file(), device=["cpu0", "cpu1"], kernels="ggml") as model:
        assert model.placement.places(GATE) == (0, 1)
        assert model.placement.places(TABLE) == (2,)
        assert model.placement.places(HEAD) == model.placement.products(HEAD) == (1,)
        np.testing.assert_allclose(model.logits(IDS), expected(weights()), atol=5e-3)


def test_it_is_quantized(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    plan = quantize.plan(tiny_lora.base_of(file()).file, Wanted(recipe("Q8_0")))
    quantize.write(plan, path, 1)
    with loaded(path) as model:
        got, wanted = model.logits(IDS), expected(weights())
    assert path.stat().st_size < len(file())
    assert 0 < np.abs(got - wanted).mean() < 0.05 * wanted.std()


def adapter() -> tuple[Lora, dict[str, np.ndarray]]:
    """One that changes a layer and the head, and the weights with it."""
    rng, changed = np.random.default_rng(2), weights()
    names = ["blk.1.attn_v.weight", HEAD]
    pairs = {name: tiny_lora.pair(rng, changed[name].shape, 4, norm=2.0) for name in names}
    for name, pair in pairs.items():
        changed[name] = (changed[name] + tiny_lora.delta(pair)).astype(np.float32)
    return Lora("one", "toy", pairs), changed


def test_it_is_adapted_and_merged(tmp_path: Path) -> None:
    lora, changed = adapter()
    with loaded(file()) as model:
        model.adapters.load("one", tiny_lora.gguf_bytes(lora))
        got = model.logits(IDS, adapters={"one": 1.0})
    np.testing.assert_allclose(got, expected(changed), atol=5e-3)
    merging.merge(tiny_lora.base_of(file()), [(lora, 1.0)], tmp_path / "merged.gguf", None)
    with loaded(tmp_path / "merged.gguf") as model:
        np.testing.assert_allclose(model.logits(IDS), expected(changed), atol=5e-3)


def test_its_modules_have_names_in_adapters() -> None:
    above = "base_model.model.model."
    assert peft_names.gguf_name(f"{above}layers.1.mixer.v") == "blk.1.attn_v.weight"
    assert peft_names.gguf_name(f"{above}words") == TABLE


def test_it_is_served() -> None:
    with loaded(file()) as model, serving(model) as url, http(url) as client:
        body = {"model": NAME, "prompt": IDS, "max_tokens": 4, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == len(IDS)
