"""Adapters against PEFT itself: what it saves is read, what is converted it loads; same logits.

Merged weights stand for our side, so that this does not depend on how adapters are computed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from same_model import SEED, assert_same_model, prompt

import gemloom
import tiny
import tiny_lora
from gemloom.adapters.factors import Lora
from gemloom.adapters.reading import read
from gemloom.tools.adapters import merging
from gemloom.tools.adapters.peft_writing import write_peft

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

import hf  # noqa: E402  (needs torch)

pytestmark = [
    pytest.mark.reference,
    # That embeddings and head were one matrix: their adapters are apart here as there.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    # It looks for modules only: patterns of target_parameters are warned of, and applied.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
GEMMA4 = ["per_layer_input_gate", "per_layer_projection", "per_layer_model_projection", "proj"]
TABLES = ["embed_tokens", "embed_tokens_per_layer"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def config(variant: str, **more: Any) -> Any:
    """An adapter of every matrix the variant has."""
    v = tiny.VARIANTS[variant]
    modules = MODULES + (GEMMA4 if v.arch == "gemma4" else []) + TABLES
    fields = {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": modules,
        "target_parameters": EXPERTS if v.n_expert else None,
        "init_lora_weights": False,  # else B is 0
        **more,
    }
    return peft.LoraConfig(**fields)


def peft_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([ids]), use_cache=False)
    return np.asarray(out.logits[0].numpy())


def our_logits(variant: str, adapter: Lora, ids: list[int], path: Path) -> np.ndarray:
    merging.merge(tiny_lora.base(variant, seed=SEED), [(adapter, 1.0)], path)
    with gemloom.load(path, context=128, kv_type="f32", threads=1) as model:
        return model.logits(ids)


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        (
            "e2b",
            {"rank_pattern": {"q_proj": 2, "layers.3.mlp.*": 6}, "alpha_pattern": {"mlp.*": 5}},
        ),
        ("26b", {"rank_pattern": {"gate_up_proj": 3}, "alpha_pattern": {"experts.down_proj": 30}}),
        ("gemma3", {"use_rslora": True}),
        ("12b", {"layers_to_transform": [0, 5], "target_modules": MODULES[:7]}),
    ],
)
def test_what_peft_saves(variant: str, fields: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(7)
    net = copy.deepcopy(hf.model(tiny.VARIANTS[variant], SEED))
    model = peft.get_peft_model(net, config(variant, **fields))
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data *= 0.15
    model.save_pretrained(tmp_path / "peft")
    adapter = read(tmp_path / "peft")
    ids = prompt(tiny.VARIANTS[variant])
    wanted = peft_logits(model.eval(), ids)
    assert_same_model(our_logits(variant, adapter, ids, tmp_path / "merged.gguf"), wanted)
    before = hf.logits(tiny.VARIANTS[variant], SEED, ids)
    assert np.abs(before - wanted).mean() > 0.05 * wanted.std()  # 25 times what may differ


@pytest.mark.parametrize("variant", ["e2b", "26b", "gemma3"])
def test_what_peft_loads(variant: str, tmp_path: Path) -> None:
    # With this seed no two experts nearly tie, so rounding cannot swap them.
    rng, pairs = np.random.default_rng(2), {}
    for number, (name, shape) in enumerate(tiny_lora.matrices(variant).items()):
        rank = 4 if number % 3 else 6
        pairs[name] = tiny_lora.pair(rng, shape, rank, scale=(1 + number % 2) / rank, norm=1.0)
    adapter = Lora("x", tiny.VARIANTS[variant].arch, pairs)
    write_peft(adapter, tmp_path / "peft", multimodal=False)
    net = copy.deepcopy(hf.model(tiny.VARIANTS[variant], SEED))
    # A missing or unexpected key would be a warning, and that an error here.
    model = peft.PeftModel.from_pretrained(net, tmp_path / "peft")
    ids = prompt(tiny.VARIANTS[variant])
    ours = our_logits(variant, adapter, ids, tmp_path / "merged.gguf")
    assert_same_model(ours, peft_logits(model.eval(), ids))
