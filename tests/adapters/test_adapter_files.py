"""Adapters from files: every format and source gives the same Lora; what is wrong is named."""

from __future__ import annotations

import gzip
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.tensor_mapping import get_tensor_name_map
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

import tiny
import tiny_lora
from gemloom.adapters import peft_names
from gemloom.adapters.factors import Lora, Pair
from gemloom.adapters.reading import read
from gemloom.errors import AdapterError, ConfigError, FormatError, GemloomError, SourceError

ADAPTER = tiny_lora.lora("e2b", only=r"blk\.(0|5)\.|token_embd|per_layer_model")
FILE = tiny_lora.gguf_bytes(ADAPTER)
PEFT = tiny_lora.peft_files(ADAPTER)


def refusal(source: Any, kind: type[GemloomError] = AdapterError) -> str:
    with pytest.raises(kind) as caught:
        read(source)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- formats and sources -----------------------------------------------------------------


@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize("form", ["gguf", "peft"])
def test_every_matrix_of_every_variant(variant: str, form: str) -> None:
    wanted = tiny_lora.lora(variant, dtype=np.float16)
    write = tiny_lora.gguf_bytes if form == "gguf" else tiny_lora.peft_files
    found = read(write(wanted))
    tiny_lora.assert_same(found, wanted)
    assert all(p.a.dtype == p.b.dtype == np.float16 for p in found.pairs.values())
    assert not found.ignored


def test_sources(tmp_path: Path) -> None:
    path = tmp_path / "style"  # what it is is told by the bytes, not by a name
    path.write_bytes(FILE)
    folder = tiny_lora.peft_folder(tmp_path / "peft", PEFT)
    parts = [FILE[:1000], memoryview(FILE)[1000:5000], FILE[5000:]]
    pair_of_paths = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    sources = [path, str(path), FILE, bytearray(FILE), io.BytesIO(FILE), path.open("rb"), parts]
    sources += [folder, str(folder), PEFT, list(PEFT), pair_of_paths]
    for kind in ("zip", "tar", "tar.gz"):
        packed = tmp_path / f"packed-{kind}"
        packed.write_bytes(tiny_lora.archive(PEFT, kind, "checkpoint-7/"))
        sources += [packed, packed.read_bytes(), io.BytesIO(tiny_lora.archive(PEFT, kind))]
    for source in sources:
        tiny_lora.assert_same(read(source), ADAPTER)
    sources[5].close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "packed-tar", "packed-tar.gz", "packed-zip", "peft", "style",
    ]  # fmt: skip


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_lora.peft_folder(tmp_path / "peft", PEFT)
    (tmp_path / "peft" / "style.gguf").write_bytes(FILE)
    files = {"o/peft": ["README.md", *(p.name for p in folder.iterdir())], "o/gguf": ["style.gguf"]}
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: files[repo])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(folder / file))
    for source in ("hf:o/peft", "hf:o/gguf", "hf:o/peft:style.gguf"):
        tiny_lora.assert_same(read(source), ADAPTER)
    assert "no adapter_model.safetensors" in _without(files["o/peft"], "adapter_model.safetensors")


def _without(files: list[str], name: str) -> str:
    files.remove(name)
    return refusal("hf:o/peft")


def test_a_file_s_floats_stay_where_they_lie(tmp_path: Path) -> None:
    data = np.frombuffer(tiny_lora.gguf_bytes(tiny_lora.lora(dtype=np.float16)), np.uint8)
    for one in read(data).pairs.values():
        assert np.shares_memory(one.a, data)
        assert np.shares_memory(one.b, data)


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0", "Q5_1", "TQ2_0"])
def test_other_types_become_float32(kind: str) -> None:
    wanted = tiny_lora.lora("e2b", 32, only=r"blk\.0\.ffn_up")
    kinds = {"lora_a": GGMLQuantizationType[kind], "lora_b": GGMLQuantizationType[kind]}
    if kind == "TQ2_0":  # blocks of 256
        wanted = replace(wanted, pairs={"blk.0.ffn_up.weight": _pair((256, 256), 256)})
    data = tiny_lora.gguf_bytes(wanted, type_of=lambda name: kinds[name.rpartition(".")[2]])
    (found,) = read(data).pairs.values()
    (one,) = wanted.pairs.values()
    for values, exact in ((found.a, one.a), (found.b, one.b)):
        expected = gguf.quants.dequantize(
            gguf.quants.quantize(exact, kinds["lora_a"]), kinds["lora_a"]
        )
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected)


def _pair(shape: tuple[int, ...], rank: int, seed: int = 0, **options: Any) -> Pair:
    return tiny_lora.pair(np.random.default_rng(seed), shape, rank, **options)


@pytest.mark.parametrize(("alpha", "scale"), [(8.0, 2.0), (0.0, 1.0), (-4.0, -1.0), (3.0, 0.75)])
def test_gguf_alpha(alpha: float, scale: float) -> None:
    assert {p.scale for p in read(tiny_lora.gguf_bytes(ADAPTER, alpha=alpha)).pairs.values()} == {
        scale
    }


def test_invocation_tokens() -> None:
    wanted = replace(ADAPTER, invocation=(5, 106, 7))
    assert read(tiny_lora.gguf_bytes(wanted)).invocation == (5, 106, 7)
    assert read(tiny_lora.peft_files(ADAPTER, alora_invocation_tokens=[5, 106, 7])).invocation == (
        5, 106, 7,
    )  # fmt: skip
    for bad in ([-1], [2**31], [1.5], "no", {"a": 1}, [True]):
        message = refusal(tiny_lora.peft_files(ADAPTER, alora_invocation_tokens=bad))
        assert "alora_invocation_tokens" in message


# -- PEFT's names and patterns -----------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.model.",
        "base_model.model.model.language_model.",
        "base_model.model.language_model.model.",
        "base_model.model.",
        "model.",
        "base_model.model.model.language_model._orig_mod.",
        "",
    ],
)
def test_prefixes(prefix: str) -> None:
    tiny_lora.assert_same(read(tiny_lora.peft_files(ADAPTER, prefix)), ADAPTER)


@pytest.mark.parametrize("arch", ["gemma3", "gemma4"])
def test_names_are_those_of_the_gguf_package(arch: str) -> None:
    names = get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], 40)
    top = ["embed_tokens", "lm_head"]
    if arch == "gemma4":
        top += ["embed_tokens_per_layer", "per_layer_model_projection"]
    layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layer += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    if arch == "gemma4":
        layer += ["per_layer_input_gate", "per_layer_projection", "router.proj"]
        layer += ["experts.gate_up_proj", "experts.down_proj"]
    for module in [*top, *(f"layers.{n}.{name}" for n in (0, 39) for name in layer)]:
        full = module if module == "lm_head" else f"model.{module}"
        tensor = f"{names.get_name(full)}.weight"
        assert peft_names.gguf_name(full) == tensor
        assert peft_names.module_name(tensor, multimodal=False) == full
        multimodal = peft_names.module_name(tensor, multimodal=True)
        assert multimodal == full.replace("model.", "model.language_model.")


@pytest.mark.parametrize(
    ("rank_pattern", "alpha_pattern", "rslora"),
    [
        ({"q_proj": 2}, {}, False),
        ({}, {"layers.5.*": 3}, True),
        ({"model.layers.0.mlp.up_proj": 7, "layers.0.mlp": 9}, {"up_proj|q_proj": 1.5}, False),
        ({r"layers\.\d+\.self_attn\.[qo]_proj": 3}, {"0.self_attn.q_proj": 64}, True),
    ],
)
def test_patterns(
    rank_pattern: dict[str, int], alpha_pattern: dict[str, float], rslora: bool
) -> None:
    """Each module's rank and scale are those that PEFT's rule gives, written here once more."""

    def first(patterns: dict[str, Any], name: str, default: Any) -> Any:
        found = [v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)]
        return found[0] if found else default

    pairs = {}
    for name, one in ADAPTER.pairs.items():
        module = f"model.{tiny_lora.module(name)}"
        rank, alpha = first(rank_pattern, module, 4), first(alpha_pattern, module, 16)
        m, k = one.b.shape[0], one.a.shape[1]
        pairs[name] = _pair((m, k), rank, scale=alpha / (rank**0.5 if rslora else rank))
    wanted = replace(ADAPTER, pairs=pairs)
    fields = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "use_rslora": rslora}
    found = read(tiny_lora.peft_files(wanted, r=4, lora_alpha=16, **fields))
    tiny_lora.assert_same(found, wanted)
    for name, one in pairs.items():
        assert found.pairs[name].scale == pytest.approx(one.scale, rel=1e-12)


def test_other_modalities_and_copies_are_told() -> None:
    values = np.ones((4, 8), np.float32)
    extra = {
        f"{tiny_lora.PREFIX}vision_tower.layers.0.self_attn.q_proj.linear.lora_A.weight": values,
        "base_model.model.model.audio_tower.layers.0.attention.lora_B.weight": values,
        "base_model.model.model.embed_vision.embedding_projection.lora_A.weight": values,
        "base_model.model.model.embed_tokens.base_layer.weight": values,
        "base_model.model.model.layers.0.input_layernorm.weight": values[0],
    }
    found = read(tiny_lora.peft_files(ADAPTER, extra=extra))
    tiny_lora.assert_same(found, ADAPTER)
    assert set(found.ignored) == set(extra)
    more = {"v.blk.0.attn_q.weight.lora_a": values, "blk.0.attn_norm.weight": values[0]}
    assert set(read(tiny_lora.gguf_bytes(ADAPTER, extra=more)).ignored) == set(more)


def test_bf16_and_f64() -> None:
    wanted = tiny_lora.lora("gemma3", only=r"blk\.0\.attn_q")
    (one,) = wanted.pairs.values()
    wide = replace(wanted, pairs={"blk.0.attn_q.weight": replace(one, a=one.a.astype(np.float64))})
    tiny_lora.assert_same(read(tiny_lora.peft_files(wide)), wanted)
    config, weights = tiny_lora.peft_files(wanted)
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    key = next(key for key in header if "lora_A" in key)
    begin, end = header[key]["data_offsets"]
    start = len(weights) - max(h["data_offsets"][1] for h in header.values())
    bits = np.frombuffer(weights[start + begin : start + end], np.uint32)
    # the upper halves, and a second tensor that takes the room of the lower ones
    short = (bits >> 16).astype(np.uint16)
    other = next(k for k in header if k != key)
    b = np.frombuffer(weights, np.uint8)[start:][slice(*header[other]["data_offsets"])]
    header[key] = {
        "dtype": "BF16",
        "shape": header[key]["shape"],
        "data_offsets": [0, short.nbytes],
    }
    header[other]["data_offsets"] = [short.nbytes, short.nbytes + b.nbytes]
    text = json.dumps(header).encode()
    made = len(text).to_bytes(8, "little") + text + short.tobytes() + b.tobytes()
    (found,) = read((config, made)).pairs.values()
    np.testing.assert_array_equal(
        found.a, (bits & 0xFFFF0000).view(np.float32).reshape(one.a.shape)
    )
    np.testing.assert_array_equal(found.b, one.b)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    rank=st.integers(1, 9),
    experts=st.sampled_from([0, 1, 3]),
    alpha=st.floats(0.1, 100).map(np.float32),
    form=st.sampled_from(["gguf", "peft"]),
    half=st.booleans(),
)
def test_any_shape_and_rank(
    shape: tuple[int, int], rank: int, experts: int, alpha: float, form: str, half: bool
) -> None:
    options = {
        "dtype": np.float16 if half else np.float32,
        "scale": float(alpha) / rank,
        "norm": 1e3,
    }
    names = ["blk.3.ffn_gate_up_exps.weight", "blk.3.ffn_down_exps.weight"] if experts else []
    pairs = {name: _pair((experts, *shape), rank, **options) for name in names}
    for name in [] if experts else ["token_embd.weight", "blk.3.attn_q.weight", "output.weight"]:
        pairs[name] = _pair(shape, rank, **options)
    wanted = Lora("any", "gemma4", pairs)
    write = tiny_lora.gguf_bytes if form == "gguf" else tiny_lora.peft_files
    found = read(write(wanted))
    assert set(found.pairs) == set(pairs)
    for name, one in pairs.items():
        np.testing.assert_array_equal(found.pairs[name].a, one.a)
        np.testing.assert_array_equal(found.pairs[name].b, one.b)
        assert found.pairs[name].scale == pytest.approx(one.scale, rel=1e-6)


# -- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"r": 0}, "r must be a rank"),
        ({"r": True}, "r must be a rank"),
        ({"r": 5}, "has the rank 4, not 5"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": "8"}}, r"rank_pattern\['q_proj'\] must be a rank"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object"),
        ({"alpha_pattern": {"(": 8}}, r"alpha_pattern has '\(', a regular expression that"),
        ({"alpha_pattern": {r"(a)\1": 8}}, "alpha_pattern has .* is not supported"),
        ({"alpha_pattern": {"(?=a)b": 8}}, "alpha_pattern has .* is not supported"),
        ({"target_parameters": "experts"}, "target_parameters must be a list"),
    ],
)
def test_config_is_refused_by_field(fields: dict[str, Any], named: str) -> None:
    assert re.search(named, refusal(tiny_lora.peft_files(ADAPTER, **fields)))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ("model.embed_tokens.weight", "embed_tokens.weight is not a lora_A"),
        (
            "model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            "lora_magnitude_vector is not a lora_A",
        ),
        ("model.layers.0.self_attn.q_proj.lora_B.bias", "lora_B.bias is not a lora_A"),
        ("model.layers.0.self_attn.qkv_proj.lora_A.weight", "qkv_proj has no lora_B"),
        (
            "model.layers.7.self_attn.q_proj.lora_A.weight",
            "layers.7.self_attn.q_proj has no lora_B",
        ),
        ("model.layers.0.self_attn.q_proj.lora_A.two.weight", "is there twice"),
        ("model.layers.0.experts.lora_A.weight", "has no lora_B"),
    ],
)
def test_tensors_are_refused_by_name(extra: str, named: str) -> None:
    more = {f"base_model.model.{extra}": np.ones((4, 96), np.float32)}
    assert re.search(named, refusal(tiny_lora.peft_files(ADAPTER, extra=more)))


def test_unknown_modules_and_pairs_that_are_none() -> None:
    a, b = np.ones((4, 8), np.float32), np.ones((6, 4), np.float32)

    def message(module: str, a: np.ndarray = a, b: np.ndarray = b, **fields: Any) -> str:
        at = f"base_model.model.model.layers.0.{module}"
        extra = {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
        return refusal(tiny_lora.peft_files(ADAPTER, extra=extra, **fields))

    assert "layers.0.mixer.in_proj is not a matrix" in message("mixer.in_proj")
    assert "wrapped 2 times" in message("self_attn.k_proj.base_layer")
    assert "target_parameters names 0" in message("experts")
    named = {"target_parameters": ["experts.down_proj"]}
    assert "not experts of rank 4" in message("experts", np.ones((6, 8), np.float32), **named)
    assert "A has the rank 3, B 4" in message("router.proj", a[:3])
    assert "is not a matrix" in message("router.proj", a[0])


def test_two_names_of_one_module() -> None:
    one = next(iter(tiny_lora.lora("e2b", only=r"blk\.0\.attn_q").pairs.values()))
    at = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    extra = {f"{at}.lora_A.weight": one.a, f"{at}.lora_B.weight": one.b}
    assert "under two names" in refusal(tiny_lora.peft_files(ADAPTER, extra=extra))


@pytest.mark.parametrize(
    ("options", "kind", "named"),
    [
        ({"keys": {"general.type": "model"}}, AdapterError, "general.type is 'model'"),
        ({"keys": {"adapter.type": "control"}}, AdapterError, "adapter.type is 'control'"),
        ({"keys": {"adapter.lora.alpha": "8"}}, ConfigError, "adapter.lora.alpha"),
        ({"keys": {"adapter.lora.alpha": float("nan")}}, ConfigError, "adapter.lora.alpha"),
        (
            {"drop": ["blk.5.attn_q.weight.lora_b"]},
            AdapterError,
            "blk.5.attn_q.weight.lora_b is missing",
        ),
        (
            {"extra": {"blk.0.attn_q.weight": np.ones((4, 4))}},
            AdapterError,
            "attn_q.weight is not a lora_a",
        ),
        ({"extra": {"blk.0.attn_q.weight.lora_a": np.ones((3, 96))}}, AdapterError, "rank 3, B 4"),
    ],
)
def test_gguf_is_refused_by_name(options: Any, kind: type[GemloomError], named: str) -> None:
    assert named in refusal(tiny_lora.gguf_bytes(ADAPTER, **options), kind)


def test_files_that_are_no_adapter(tmp_path: Path) -> None:
    assert "general.type is 'model'" in refusal(tiny.gguf_bytes(tiny.VARIANTS["e2b"]))
    assert "half a PEFT adapter" in refusal(PEFT[0])
    assert "half a PEFT adapter" in refusal(PEFT[1])
    assert "pickle" in refusal(b"\x80\x02}q\x00.")
    assert "not a GGUF file" in refusal(b"something else", FormatError)
    assert "no such file" in refusal(tmp_path / "nothing", SourceError)
    folder = tmp_path / "peft"
    folder.mkdir()
    assert "no adapter_config.json" in refusal(folder)
    (folder / "adapter_config.json").write_bytes(PEFT[0])
    assert refusal(folder).endswith("no adapter_model.safetensors in it")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02}q\x00.")
    assert "adapter_model.bin is a pickle" in refusal(folder)
    assert "is not JSON" in refusal((b"{", PEFT[1]))
    assert "is not JSON" in refusal((b'{"a":' * 100_000, PEFT[1]))
    assert "is damaged" in refusal((PEFT[0], PEFT[1][:-1]))
    assert "a is not a lora_A" in refusal((PEFT[0], save({"a": np.ones(3)})))
    assert "unprintable" in refusal((PEFT[0], save({"a\n": np.ones(3)})))


# -- archives ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_paths_in_archives_lead_nowhere(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for inside in ("../", "a/../../", "/", "..\\"):
        message = refusal(tiny_lora.archive(PEFT, kind, inside))
        assert "no adapter_config.json" in message
    tiny_lora.assert_same(read(tiny_lora.archive(PEFT, kind, "..a/ b../")), ADAPTER)
    assert not list(tmp_path.iterdir())
    assert not (tmp_path.parent / "adapter_config.json").exists()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_archives_cut_short(kind: str) -> None:
    whole = tiny_lora.archive(PEFT, kind)
    for cut in range(600, len(whole) - 2000, len(whole) // 9):
        refusal(whole[:cut])


def test_archives_that_would_fill_the_memory() -> None:
    huge = PEFT[0], bytes(200 << 20)
    for kind in ("zip", "tar.gz"):
        assert "would take 209,715,200 bytes" in refusal(tiny_lora.archive(huge, kind))
    assert "a damaged archive" in refusal(gzip.compress(b"no tar in it" * 100))
