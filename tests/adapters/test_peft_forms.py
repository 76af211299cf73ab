"""PEFT adapters as other people's trainers write them: nothing is lost, nothing guessed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

import tiny_lora
from gemloom.adapters.checking import check
from gemloom.adapters.factors import Lora, Pair
from gemloom.adapters.patterns import PatternError, Patterns
from gemloom.adapters.reading import read
from gemloom.errors import AdapterError
from gemloom.models.tensor_names import modality

ADAPTER = tiny_lora.lora("e2b", only=r"blk\.(0|5)\.|token_embd")
WRAPPERS = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


def refusal(source: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        read(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def renamed(files: tuple[bytes, bytes], rename: Any) -> tuple[bytes, bytes]:
    return files[0], save({rename(name): value for name, value in load(files[1]).items()})


# -- names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(
    "place", ["model.layers", r"layers\.\d+", "self_attn", "q_proj", "mlp", "^base_model", "lora_A"]
)
def test_wrappers_at_any_depth(wrapper: str, place: str) -> None:
    def wrap(name: str) -> str:
        return re.sub(rf"({place})\.", rf"\1.{wrapper}.", name)

    tiny_lora.assert_same(read(renamed(tiny_lora.peft_files(ADAPTER), wrap)), ADAPTER)


def test_wrapped_modules_have_the_ranks_of_their_names() -> None:
    one = tiny_lora.lora("e2b", rank=3, only=r"blk\.0\.attn_q")
    fields = {"r": 4, "lora_alpha": 8, "rank_pattern": {"layers.0.self_attn.q_proj": 3}}
    files = tiny_lora.peft_files(one, **fields)
    found = read(renamed(files, lambda name: name.replace("self_attn.", "self_attn._orig_mod.")))
    assert [(p.rank, p.scale) for p in found.pairs.values()] == [(3, 8 / 3)]


def test_other_modalities_behind_wrappers_are_told() -> None:
    values = np.ones((4, 8), np.float32)
    names = [
        "base_model.model.model._orig_mod.vision_tower.q_proj.lora_A.weight",
        "base_model.model.module.model.audio_embedder.proj.lora_B.weight",
        "base_model.model.model.multimodal_embedder.proj.weight",
    ]
    found = read(tiny_lora.peft_files(ADAPTER, extra=dict.fromkeys(names, values)))
    assert set(found.ignored) == set(names)
    assert all("vision or audio" in why for why in found.ignored.values())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("v.blk.0.attn_q.weight", "vision"),
        ("mm.0.weight", "vision"),
        ("a.conv1d.0.weight", "audio"),
        ("model.vision_tower.encoder.layers.0.q.weight", "vision"),
        ("model.audio_embedder.weight", "audio"),
        ("vision_model.post_layernorm.weight", "vision"),
        ("language_model.model.embed_audio.weight", "audio"),
        ("base_model.model.model.module.multi_modal_projector.weight", "vision"),
        ("blk.0.attn_v.weight", None),
        ("model.layers.0.self_attn.v_proj.weight", None),
        ("vision", None),
        ("", None),
    ],
)
def test_one_list_tells_modalities(name: str, part: str | None) -> None:
    assert modality(name) == part


def test_a_config_with_a_byte_order_mark() -> None:
    config, weights = tiny_lora.peft_files(ADAPTER)
    tiny_lora.assert_same(read((b"\xef\xbb\xbf" + config, weights)), ADAPTER)


# -- a pair for each expert ------------------------------------------------------------------


def by_expert(adapter: Lora, place: str = "experts", **fields: Any) -> tuple[bytes, bytes]:
    """Experts as modules of their own: gate and up apart, each with A and B."""
    tensors: dict[str, np.ndarray] = {}
    for name, pair in adapter.pairs.items():
        layer = name.split(".")[1]
        rows = pair.b.shape[1]
        parts = {"down_proj": slice(0, rows)}
        if "gate_up" in name:
            parts = {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, rows)}
        for expert in range(len(pair.a)):
            for which, part in parts.items():
                at = f"base_model.model.model.layers.{layer}.{place}.{expert}.{which}.lora_"
                tensors[f"{at}A.weight"] = pair.a[expert]
                tensors[f"{at}B.weight"] = np.ascontiguousarray(pair.b[expert][part])
    first = next(iter(adapter.pairs.values()))
    config = {"peft_type": "LORA", "r": first.rank, "lora_alpha": first.scale * first.rank}
    return json.dumps(config | fields).encode(), save(tensors)


@pytest.mark.parametrize("place", ["experts", "mlp.experts"])
def test_a_pair_for_each_expert(place: str) -> None:
    wanted = tiny_lora.lora("26b", only=r"blk\.[03]\.ffn_.*_exps")
    base = tiny_lora.base("26b")
    report = check(read(by_expert(wanted, place)), base.config, base.shapes)
    assert set(report.lora.pairs) == set(wanted.pairs)
    for name, pair in wanted.pairs.items():
        found = tiny_lora.delta(report.lora.pairs[name])
        np.testing.assert_allclose(found, tiny_lora.delta(pair), rtol=1e-4, atol=1e-7)


def test_experts_with_scales_of_their_own() -> None:
    wanted = tiny_lora.lora("26b", only=r"blk\.0\.ffn_down_exps")
    ((name, pair),) = wanted.pairs.items()
    found = read(by_expert(wanted, alpha_pattern={"experts.2.down_proj": 80}))
    deltas = tiny_lora.delta(pair)
    deltas[2] *= 80 / (pair.scale * pair.rank)
    np.testing.assert_allclose(tiny_lora.delta(found.pairs[name]), deltas, rtol=1e-5, atol=1e-8)


def test_experts_that_are_not_all_alike_are_refused() -> None:
    wanted = tiny_lora.lora("26b", only=r"blk\.0\.ffn_down_exps")
    config, weights = by_expert(wanted)
    tensors = load(weights)
    few = {name: value for name, value in tensors.items() if ".experts.3." not in name}
    assert "expert 3 has no pair" in refusal((config, save(few)))
    other = wanted.pairs["blk.0.ffn_down_exps.weight"]
    small = {
        name: np.ascontiguousarray(value[:2] if "lora_A" in name else value[:, :2])
        for name, value in tensors.items()
        if ".experts.3." in name
    }
    files = by_expert(wanted, rank_pattern={"experts.3.down_proj": 2})
    assert "differ in rank" in refusal((files[0], save(tensors | small)))
    whole = tiny_lora.peft_files(replace(wanted, pairs={"blk.0.ffn_down_exps.weight": other}))
    both = json.loads(whole[0]) | {"target_parameters": ["experts.down_proj"]}
    both_tensors = save(tensors | load(whole[1]))
    assert "whole and by expert" in refusal((json.dumps(both).encode(), both_tensors))


# -- fields that say nothing where the file has none of their tensors -------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"modules_to_save": []},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"trainable_token_indices": [5]},
    ],
)
def test_what_a_file_does_not_have_is_not_lost(fields: dict[str, Any]) -> None:
    tiny_lora.assert_same(read(tiny_lora.peft_files(ADAPTER, **fields)), ADAPTER)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("lm_head.weight", "lm_head.weight is a whole module (modules_to_save)"),
        ("model.layers.0.input_layernorm.weight", "is a whole module (modules_to_save)"),
        ("model.layers.0.self_attn.q_proj.lora_B.bias", "merge it into the model"),
    ],
)
def test_what_a_file_does_have_is_refused(name: str, named: str) -> None:
    extra = {f"base_model.model.{name}": np.ones(8, np.float32)}
    files = tiny_lora.peft_files(ADAPTER, extra=extra, modules_to_save=["lm_head"])
    assert named in refusal(files)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_B.bias",
        "model.layers.0.self_attn.q_proj.bias",
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
    ],
)
def test_tensors_beside_pairs_are_refused_whatever_the_config_says(name: str) -> None:
    extra = {f"base_model.model.{name}": np.ones(8, np.float32)}
    assert "is not a lora_A or lora_B" in refusal(tiny_lora.peft_files(ADAPTER, extra=extra))


# -- patterns --------------------------------------------------------------------------------

MODULES = [
    f"model.{inner}layers.{n}.{name}"
    for inner in ("", "language_model.")
    for n in (0, 1, 11, 20)
    for name in ("self_attn.q_proj", "mlp.up_proj", "experts.3.down_proj")
] + ["lm_head", "model.embed_tokens"]

atoms = st.sampled_from(
    ["q", "_proj", "layers", "1", ".", r"\.", r"\d", r"\w", "[0-9]", "[^.]", "[a-z_]", "mlp"]
)
regexes = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{0,2}", "{1,}"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
    ),
    max_leaves=6,
)


SHORT = [*MODULES, "q_proj", "mlp.up_proj", "0.self_attn.q_proj", "_proj"]
UNSUPPORTED = [
    "(", ")", "a(", "*", "a**", "[", "[]", "[z-a]", "a{", "{2}", "a{3,2}", r"\b", r"(a)\1", "(?=a)",
    "(?i)a", "^a|b", "a^b", "a$b", "\\", "[[a]]", "((a{30}){30}){30}", "x*" * 101,
]  # fmt: skip


def pefts(patterns: dict[str, float], name: str, default: float) -> float:
    """PEFT's own rule."""
    found = [v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)]
    return found[0] if found else default


@given(patterns=st.lists(regexes, max_size=3, unique=True), anchors=st.sampled_from(["", "^", "$"]))
def test_patterns_match_as_pefts(patterns: list[str], anchors: str) -> None:
    if anchors:
        patterns = [p for p in patterns if "|" not in p]
    whole = [f"^{p}" if anchors == "^" else f"{p}$" if anchors == "$" else p for p in patterns]
    values = {pattern: float(i) for i, pattern in enumerate(dict.fromkeys(whole))}
    try:
        found = Patterns(values)
    except PatternError:
        assert max(map(len, values)) > 200
        return
    for name in MODULES:
        assert found.of(name, -1.0) == pefts(values, name, -1.0), name


@given(
    st.lists(st.sampled_from([*MODULES, "q_proj", "mlp.up_proj", "0.self_attn.q_proj", "_proj"]))
)
def test_plain_names_match_as_pefts(names: list[str]) -> None:
    values = {name: float(i) for i, name in enumerate(dict.fromkeys(names))}
    for name in MODULES:
        assert Patterns(values).of(name, -1.0) == pefts(values, name, -1.0)


@pytest.mark.parametrize("pattern", UNSUPPORTED)
def test_patterns_that_are_not_supported(pattern: str) -> None:
    with pytest.raises(PatternError):
        Patterns({pattern: 1.0})


def test_the_norm_of_any_rank() -> None:
    """With less rank than rows, and with more, where another product is the smaller one."""
    rng = np.random.default_rng(1)
    base = tiny_lora.base("e2b")
    for rank in (3, 32, 200):
        m, k = tiny_lora.matrices("e2b")["blk.0.attn_k.weight"]
        pair = Pair(rng.standard_normal((rank, k)), rng.standard_normal((m, rank)), 0.5)
        pair = Pair(pair.a.astype(np.float16), pair.b.astype(np.float32), 0.5)
        report = check(
            Lora("any", "gemma4", {"blk.0.attn_k.weight": pair}), base.config, base.shapes
        )
        assert report.norm == pytest.approx(np.linalg.norm(tiny_lora.delta(pair)), rel=1e-5)
