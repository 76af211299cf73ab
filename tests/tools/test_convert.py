"""Checkpoints to GGUF: what comes out, to the bit. What must not go in: test_convert_faults.py."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

import checkpoints
import gemloom
import tiny
import vocabularies
from command_line import fine
from gemloom.files import gguf, source
from gemloom.files.gguf import GGUF
from gemloom.text.tokenizer import Tokenizer
from gemloom.tools import convert
from gemloom.tools.convert import checkpoint as reading
from gemloom.tools.convert.names import to_gguf, to_hf
from golden import assert_close, golden
from tiny import VARIANTS, Variant

variants = pytest.mark.parametrize("variant", VARIANTS)


def converted(folder: Path, kind: Type | None = None) -> tuple[GGUF, convert.Conversion]:
    path = folder.parent / "out.gguf"
    made = convert.write(convert.plan(folder, kind), path, force=True)
    assert sorted(p.name for p in folder.parent.iterdir()) == sorted([folder.name, "out.gguf"])
    assert made.bytes == path.stat().st_size
    return gguf.read(source.resolve(path)), made


def values(file: GGUF, name: str) -> np.ndarray:
    info = file.tensors[name]
    flat = dequantize(np.frombuffer(info.data(), np.uint8), info.type)
    return flat.reshape(info.shape[::-1])


def with_norms_rounded(variant: Variant, name: str, value: np.ndarray) -> np.ndarray:
    """A norm of Gemma 3 loses a bit where its checkpoint has it without the 1."""
    one = np.float32(1)
    return (value - one) + one if variant.arch == "gemma3" and "norm" in name else value


@variants
def test_the_very_tensors(tmp_path: Path, variant: str) -> None:
    file, made = converted(checkpoints.checkpoint(tmp_path / "in", variant))
    expected = tiny.tensors(VARIANTS[variant])
    assert file.tensors.keys() == expected.keys()
    for name, value in expected.items():
        wanted = with_norms_rounded(VARIANTS[variant], name, value)
        assert file.tensors[name].type == Type.F32
        assert np.array_equal(values(file, name), wanted), name
    assert made.types == {"F32": len(expected)}
    assert made.notes == ()


@variants
def test_the_very_bits_of_bfloat16(tmp_path: Path, variant: str) -> None:
    """Matrices keep their bytes, vectors widen; what was left out is left out once."""
    folder = checkpoints.checkpoint(tmp_path / "in", variant, dtype="bfloat16", shards=3)
    file, _ = converted(folder)
    for name, value in tiny.tensors(VARIANTS[variant]).items():
        if name == "rope_freqs.weight":
            assert np.array_equal(values(file, name), value)
            continue
        info, kept = file.tensors[name], checkpoints.stored(VARIANTS[variant], name, value)
        kept = (kept.view(np.uint32) & 0xFFFF0000).view(np.float32)
        if value.ndim == 1 or "ffn_gate_inp" in name:
            shift = variant.startswith("gemma3") and "norm" in name
            assert info.type == Type.F32
            assert np.array_equal(values(file, name), kept + np.float32(shift)), name
        else:
            assert info.type == Type.BF16
            assert bytes(info.data()) == (kept.view(np.uint32) >> 16).astype("<u2").tobytes()
    assert file.metadata["general.file_type"] == 32


@variants
def test_metadata_is_what_such_files_have(tmp_path: Path, variant: str) -> None:
    file, _ = converted(checkpoints.checkpoint(tmp_path / "in", variant))
    expected = vocabularies.metadata(tiny.metadata(VARIANTS[variant]))
    expected["general.name"] = "in"
    if VARIANTS[variant].arch == "gemma3":
        expected["gemma3.rope.freq_base_swa"] = 1e4
    assert file.metadata.keys() == expected.keys()
    for key, value in expected.items():
        found: Any = file.metadata[key]
        if hasattr(value, "__len__") and not isinstance(value, str):
            assert list(found) == list(value), key  # type: ignore[arg-type]
        else:
            assert found == pytest.approx(value, rel=1e-6), key


@variants
def test_both_forms_of_a_config(tmp_path: Path, variant: str) -> None:
    made = []
    for form in ("original", "per_layer"):
        folder = checkpoints.checkpoint(tmp_path / form / "in", variant, form)
        converted(folder)
        made.append((folder.parent / "out.gguf").read_bytes())
    assert made[0] == made[1]


@variants
def test_logits_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    ids, reference = golden(variant)
    converted(checkpoints.checkpoint(tmp_path / "in", variant, shards=2))
    path = tmp_path / "out.gguf"
    with gemloom.load(path, kv_type="f32", context=64, threads=1) as model:
        assert_close(model.logits(ids), reference)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0], ids=lambda kind: kind.name)
def test_types_are_those_of_another_quantizer(tmp_path: Path, kind: Type, dtype: str) -> None:
    folder = checkpoints.checkpoint(tmp_path / "in", "26b", dtype=dtype)
    file, made = converted(folder, kind)
    plain, _ = converted(folder, Type.F32)
    for name, info in file.tensors.items():
        wanted = values(plain, name)
        if wanted.ndim == 1 or "ffn_gate_inp" in name:
            assert info.type == Type.F32
        else:
            assert info.type == kind
            assert bytes(info.data()) == quantize(wanted, kind).tobytes(), name
    assert made.notes == ()


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    """They become F16, and the user is told."""
    odd = replace(VARIANTS["e2b"], n_embd=80)
    folder = checkpoints.write(tmp_path / "in", checkpoints.tensors(odd), checkpoints.files(odd))
    file, made = converted(folder, Type.Q8_0)
    assert file.tensors["blk.0.attn_q.weight"].type == Type.F16
    assert file.tensors["blk.0.attn_output.weight"].type == Type.Q8_0
    count = made.types["F16"]
    told = f"tensors that become F16, as their rows are not whole blocks of 32: {count}"
    assert made.notes == (told,)
    with gemloom.load(tmp_path / "out.gguf", context=64, threads=1) as model:
        assert np.isfinite(model.logits([2, 5, 6])).all()


# -- other forms of a checkpoint -------------------------------------------------------------

OTHER_PARTS = {
    "gemma4": ("model.language_model.", ["model.vision_tower.encoder.layers.0.input_max",
                                         "model.embed_vision.embedding_projection.weight",
                                         "model.audio_tower.layers.0.norm.weight"]),
    "gemma3": ("language_model.model.", ["vision_tower.vision_model.embeddings.weight",
                                         "multi_modal_projector.mm_input_projection_weight"]),
}  # fmt: skip


@pytest.mark.parametrize("variant", ["e2b", "gemma3"])
def test_one_that_also_sees(tmp_path: Path, variant: str) -> None:
    """Its text part only, and the rest is told of."""
    tiny_one = VARIANTS[variant]
    prefix, others = OTHER_PARTS[tiny_one.arch]
    arrays = checkpoints.tensors(tiny_one, prefix)
    files = checkpoints.files(tiny_one)
    text = files["config.json"]
    files["config.json"] = {
        "model_type": tiny_one.arch, "text_config": text, "vision_config": {"hidden_size": 8},
        "tie_word_embeddings": True,
    }  # fmt: skip
    arrays |= {name: np.ones(8, np.float32) for name in others}
    file, made = converted(checkpoints.write(tmp_path / "in", arrays, files))
    alone, _ = converted(checkpoints.checkpoint(tmp_path / "alone" / "in", variant))
    assert file.metadata.keys() == alone.metadata.keys()
    assert {n: bytes(t.data()) for n, t in file.tensors.items()} == {
        n: bytes(t.data()) for n, t in alone.tensors.items()
    }
    vision = sum("vision" in name or "multi_modal" in name for name in others)
    assert f"vision tensors left out: {vision}" in made.notes


def test_unused_kv_of_sharing_layers(tmp_path: Path) -> None:
    """As the original checkpoints have them."""
    variant = VARIANTS["e2b"]
    arrays = checkpoints.tensors(variant)
    for i in range(variant.n_layer - variant.n_shared, variant.n_layer):
        for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
            arrays[f"model.layers.{i}.self_attn.{name}"] = np.zeros(4, np.float32)
    folder = checkpoints.write(tmp_path / "in", arrays, checkpoints.files(variant))
    file, made = converted(folder)
    assert file.tensors.keys() == tiny.tensors(variant).keys()
    assert made.notes == ("unused K/V tensors of sharing layers left out: 15",)


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_matrix(tmp_path: Path, tied: bool) -> None:
    variant = VARIANTS["gemma3"]
    arrays, files = checkpoints.tensors(variant), checkpoints.files(variant)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"][::-1].copy()
    files["config.json"]["tie_word_embeddings"] = tied
    file, made = converted(checkpoints.write(tmp_path / "in", arrays, files))
    assert ("output.weight" in file.tensors) != tied
    assert len(made.notes) == tied
    if not tied:
        assert np.array_equal(values(file, "output.weight"), arrays["lm_head.weight"])


def test_layers_that_slide_otherwise(tmp_path: Path) -> None:
    """A pattern that readers would not guess is in the file."""
    variant = replace(VARIANTS["gemma3"], pattern="sfsfss")
    folder = checkpoints.write(
        tmp_path / "in", checkpoints.tensors(variant), checkpoints.files(variant, "per_layer")
    )
    file, _ = converted(folder)
    pattern = file.metadata["gemma3.attention.sliding_window_pattern"]
    assert list(pattern) == [True, False, True, False, True, True]  # type: ignore[call-overload]


def test_layers_of_other_widths(tmp_path: Path) -> None:
    variant = VARIANTS["12b"]
    arrays, files = checkpoints.tensors(variant), checkpoints.files(variant, "per_layer")
    files["config.json"]["per_layer_config"]["1"] = {"intermediate_size": 96}
    for name, cut in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        full = f"model.layers.1.mlp.{name}.weight"
        arrays[full] = np.ascontiguousarray(np.take(arrays[full], range(96), axis=cut))
    file, _ = converted(checkpoints.write(tmp_path / "in", arrays, files))
    widths = file.metadata["gemma4.feed_forward_length"]
    assert list(widths) == [160, 96, 160, 160, 160, 160]  # type: ignore[call-overload]


def assistant(folder: Path, ordered: bool) -> Path:
    """A drafter for a model of 96: four layers of queries between two projections."""
    variant = replace(VARIANTS["12b"], pattern="sssf", n_embd=64, k_eq_v=False)
    arrays = {
        name: value
        for name, value in checkpoints.tensors(variant).items()
        if not any(part in name for part in ("k_proj", "v_proj", "k_norm"))
    }
    arrays["pre_projection.weight"] = np.ones((64, 192), np.float32)
    arrays["post_projection.weight"] = np.ones((96, 64), np.float32)
    if ordered:
        arrays["masked_embedding.centroids.weight"] = np.ones((8, 64), np.float32)
        arrays["masked_embedding.token_ordering"] = np.arange(variant.n_vocab)
    files = checkpoints.files(variant)
    files["config.json"] = {
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": 96,
        "use_ordered_embeddings": ordered,
        "text_config": files["config.json"],
    }
    return checkpoints.write(folder, arrays, files)


@pytest.mark.parametrize("ordered", [False, True])
def test_assistant(tmp_path: Path, ordered: bool) -> None:
    file, made = converted(assistant(tmp_path / "in", ordered))
    keys = file.metadata
    assert keys["general.architecture"] == "gemma4-assistant"
    for key, wanted in {
        "block_count": 4, "embedding_length": 64, "embedding_length_out": 96,
        "nextn_predict_layers": 4, "attention.shared_kv_layers": 4,
    }.items():  # fmt: skip
        assert keys[f"gemma4-assistant.{key}"] == wanted
    assert file.tensors["nextn.pre_projection.weight"].shape == (192, 64)
    assert file.tensors["nextn.post_projection.weight"].shape == (64, 96)
    assert not [name for name in file.tensors if "attn_k" in name or "masked" in name]
    assert len(file.tensors) == 3 + 2 + 4 * 11
    assert made.notes == (("ordered-embedding tensors left out: 2",) if ordered else ())


# -- the tokenizer ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["e2b", "gemma3"])
def test_tokens_of_texts(tmp_path: Path, variant: str) -> None:
    file, _ = converted(checkpoints.checkpoint(tmp_path / "in", variant))
    ours, wanted = Tokenizer(file.metadata), vocabularies.small(VARIANTS[variant].arch)
    for text in vocabularies.SPOTS:
        assert ours.encode(text) == wanted.encode(text)
        assert ours.encode(text, special=True) == wanted.encode(text, special=True)
    assert (ours.bos, ours.eos, ours.eog) == (wanted.bos, wanted.eos, wanted.eog)
    assert ours.chat_template == wanted.chat_template


def test_rows_beyond_the_vocabulary(tmp_path: Path) -> None:
    """Tables are rounded up; an added token beyond the table has no row."""
    variant = VARIANTS["gemma3"]
    arrays, files = checkpoints.tensors(variant), checkpoints.files(variant)
    n = variant.n_vocab
    table = arrays["model.embed_tokens.weight"]
    arrays["model.embed_tokens.weight"] = np.concatenate([table, table[:3]])
    files["config.json"]["vocab_size"] = n + 3
    image = {"id": n + 3, "content": "<image_soft_token>", "special": True}
    files["tokenizer.json"]["added_tokens"].append(image)
    file, made = converted(checkpoints.write(tmp_path / "in", arrays, files))
    assert file.metadata.strings("tokenizer.ggml.tokens")[n:] == [f"[PAD{n + i}]" for i in range(3)]
    assert file.metadata.array("tokenizer.ggml.token_type")[n:].tolist() == [5, 5, 5]
    assert made.notes == ("added tokens without an embedding left out: 1",)


def test_several_ends(tmp_path: Path) -> None:
    variant = VARIANTS["e2b"]
    files = checkpoints.files(variant)
    files["generation_config.json"] = {"eos_token_id": [1, 9, 20], "suppress_tokens": [7]}
    file, _ = converted(checkpoints.write(tmp_path / "in", checkpoints.tensors(variant), files))
    tokenizer = Tokenizer(file.metadata)
    assert tokenizer.eog >= {1, 9, 20}
    assert tokenizer.suppress == {7}


TEMPLATES: dict[str, tuple[dict[str, Any], str | None]] = {
    "jinja": ({"chat_template.jinja": "J", "tokenizer_config.json": {"chat_template": "C"}}, "J"),
    "config": ({"tokenizer_config.json": {"chat_template": "C"}}, "C"),
    "processor": ({"chat_template.json": {"chat_template": "P"}}, "P"),
    "named": (
        {"tokenizer_config.json": {"chat_template": [
            {"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}}, "D",
    ),
    "named, none of them the default": (
        {"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "T"}]}}, None,
    ),
    "base model": ({}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_template(tmp_path: Path, case: str) -> None:
    variant = VARIANTS["gemma3"]
    changed, wanted = TEMPLATES[case]
    files = checkpoints.files(variant)
    del files["chat_template.jinja"]
    folder = checkpoints.write(tmp_path / "in", checkpoints.tensors(variant), files | changed)
    file, made = converted(folder)
    assert file.metadata.get("tokenizer.chat_template") == wanted
    assert file.metadata.get("tokenizer.chat_template.tool_use") == (
        "T" if case.startswith("named") else None
    )
    assert not made.notes


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gemma4", "gemma3"])
def test_a_real_vocabulary(tmp_path: Path, arch: str) -> None:
    """Written as a tokenizer.json and read again: what a token is, and what merges, stays."""
    original = (
        vocabularies.gemma4_metadata() if arch == "gemma4" else vocabularies.gemma3_metadata()
    )
    texts = [t.replace(" ", "▁") for t in original.strings("tokenizer.ggml.tokens")]
    types = original.array("tokenizer.ggml.token_type").tolist()
    pairs = vocabularies.gemma4_metadata().strings("tokenizer.ggml.merges")  # Gemma 3's too
    ids = dict(zip(texts, range(len(texts)), strict=True))
    merges = [pair.split(" ") for pair in pairs]
    if arch == "gemma3":
        merges = [m for m in merges if m[0] in ids and m[1] in ids and m[0] + m[1] in ids]
    added = [
        {"id": i, "content": texts[i], "special": arch == "gemma4" or kind == 3}
        for i, kind in enumerate(types) if kind in (3, 4)
    ]  # fmt: skip
    model = {"type": "BPE", "byte_fallback": True, "vocab": ids, "merges": merges}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    (tmp_path / "config.json").write_text("{}")
    checkpoints.save(tmp_path / "model.safetensors", {"x": np.ones(1, np.float32)}, "float32")
    kind = "gemma4" if arch == "gemma4" else "llama"
    keys, ends, notes = convert.vocabulary.read(reading.Checkpoint(tmp_path), kind, len(texts))
    assert (ends, notes) == ([], [])
    made = gguf.Metadata("made", keys)
    assert (
        made.strings("tokenizer.ggml.tokens").raw()
        == original.strings("tokenizer.ggml.tokens").raw()
    )
    assert made.array("tokenizer.ggml.token_type").tolist() == types
    if arch == "gemma4":
        raw = made.strings("tokenizer.ggml.merges").raw()
        assert raw == original.strings("tokenizer.ggml.merges").raw()
        return
    normal = np.flatnonzero(np.array(types) == 1)  # their order is all that merging looks at
    orders = [np.argsort(-m.array("tokenizer.ggml.scores")[normal]) for m in (made, original)]
    assert np.array_equal(*orders)


# -- memory, names, the command line ---------------------------------------------------------


def test_memory_does_not_grow_with_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of 2.2 MB goes through in pieces of 128 kB."""
    monkeypatch.setattr(reading, "PIECE", 1 << 17)
    variant = VARIANTS["e2b"].wide()
    folder = checkpoints.write(
        tmp_path / "in", checkpoints.tensors(variant), checkpoints.files(variant), dtype="bfloat16"
    )
    plan = convert.plan(folder, Type.Q8_0)
    largest = max(item.planned.nbytes for item in plan.items)
    tracemalloc.start()
    try:
        convert.write(plan, tmp_path / "out.gguf")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < largest < 1_300_000 < plan.source_bytes


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    plan = convert.plan(checkpoints.checkpoint(tmp_path / "in"))
    seen: list[int] = []
    convert.write(plan, tmp_path / "out.gguf", progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == plan.source_bytes


@variants
def test_names_go_both_ways(variant: str) -> None:
    for name in tiny.tensors(VARIANTS[variant]):
        if name != "rope_freqs.weight":
            assert to_gguf(f"model.{to_hf(name)}") == name


def test_command_line(tmp_path: Path) -> None:
    folder = checkpoints.checkpoint(tmp_path / "in", dtype="bfloat16")
    first = fine("convert", folder, tmp_path / "a.gguf")
    assert "gemma4, 83 BF16, 78 F32" in first.output
    facts = json.loads(
        fine("convert", folder, tmp_path / "b.gguf", "--type", "q8_0", "--json").stdout
    )
    assert facts["types"] == {"Q8_0": 83, "F32": 78}
    assert facts["bytes"] == (tmp_path / "b.gguf").stat().st_size
    shown = json.loads(fine("inspect", tmp_path / "a.gguf", "--json").stdout)
    assert shown["config"]["architecture"] == "gemma4"
