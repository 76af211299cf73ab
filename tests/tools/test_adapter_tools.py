"""Tools for adapters: convert there and back, merge into a model, extract from two models."""

from __future__ import annotations

import json
import re
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

import gemloom
import tiny
import tiny_lora
from command_line import call, fine
from gemloom.adapters.factors import Lora
from gemloom.adapters.gguf_lora import write_gguf
from gemloom.adapters.reading import read
from gemloom.errors import AdapterError, OptionError, OutputError, TensorError
from gemloom.files import gguf, source
from gemloom.tools.adapters import extracting, merging
from gemloom.tools.adapters.peft_writing import write_peft

FILE = GGMLQuantizationType


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as float32, by the gguf package's own decoders."""
    found = gguf.read(source.resolve(path)).tensors
    return {name: values(info) for name, info in found.items()}


def values(info: gguf.TensorInfo) -> np.ndarray:
    flat = gguf_package.quants.dequantize(np.frombuffer(info.data(), np.uint8), info.type)
    return np.asarray(flat.reshape(info.shape[::-1]))


def merge(path: Path, *adapters: tuple[Lora, float], kind: Any = None, **model: Any) -> Any:
    model = {"variant": "e2b", **model}
    return merging.merge(tiny_lora.base(**model), adapters, path, kind)


# -- convert -----------------------------------------------------------------------------


def mixed(variant: str) -> Lora:
    """Every matrix, with ranks and alphas of several kinds."""
    rng = np.random.default_rng(3)
    pairs = {}
    for number, (name, shape) in enumerate(tiny_lora.matrices(variant).items()):
        rank = 4 if number % 5 else 7
        alpha = 16.0 if number % 3 else 10 * 2**0.5
        pairs[name] = tiny_lora.pair(rng, shape, rank, scale=alpha / rank)
    return Lora("mixed", tiny.VARIANTS[variant].arch, pairs, invocation=(7, 8))


@pytest.mark.parametrize("multimodal", [True, False])
@pytest.mark.parametrize("variant", ["e2b", "26b", "gemma3"])
def test_there_and_back(variant: str, multimodal: bool, tmp_path: Path) -> None:
    wanted = mixed(variant)
    write_gguf(wanted, wanted.architecture or "", tmp_path / "one.gguf")
    first = read(tmp_path / "one.gguf")
    write_peft(first, tmp_path / "peft", multimodal=multimodal)
    second = read(tmp_path / "peft")
    for found in (first, second):
        tiny_lora.assert_same(found, wanted)
        assert found.invocation == wanted.invocation
    with_mode = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "peft").iterdir()}
    assert len(set(with_mode.values())) == 1
    assert sorted(with_mode) == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_one_alpha_can_say_keeps_its_values(tmp_path: Path) -> None:
    wanted = tiny_lora.lora("e2b", dtype=np.float16, scale=1 / 3)
    write_gguf(wanted, "gemma4", tmp_path / "one.gguf")
    for name, one in read(tmp_path / "one.gguf").pairs.items():
        np.testing.assert_array_equal(one.a, wanted.pairs[name].a)
        np.testing.assert_array_equal(one.b, wanted.pairs[name].b)
        assert one.a.dtype == one.b.dtype == np.float16


def test_convert_command(tmp_path: Path) -> None:
    adapter = tiny_lora.lora("e2b", only="attn_q")
    folder = tiny_lora.peft_folder(tmp_path / "in", tiny_lora.peft_files(adapter))
    model, out = tmp_path / "m.gguf", tmp_path / "out.gguf"
    model.write_bytes(tiny.gguf_bytes(tiny.VARIANTS["e2b"]))
    result = call("adapter", "convert", folder, out)
    assert (result.exit_code, out.exists()) == (1, False)
    assert "name it with --model" in result.stderr
    fine("adapter", "convert", folder, out, "--model", model)
    tiny_lora.assert_same(read(out), adapter)
    assert read(out).architecture == "gemma4"
    for flags, inner in ((("--text",), "model.layers"), ((), "model.language_model.layers")):
        back = tmp_path / f"back{len(flags)}"
        fine("adapter", "convert", out, back, *flags)
        tiny_lora.assert_same(read(back), adapter)
        config = json.loads((back / "adapter_config.json").read_text())
        assert all(name.startswith(inner) for name in config["target_modules"])
    assert "there is no folder" in call("adapter", "convert", out, tmp_path / "no" / "x").stderr
    fused = {"blk.0.attn_qkv.weight": next(iter(adapter.pairs.values()))}
    (tmp_path / "f.gguf").write_bytes(tiny_lora.gguf_bytes(replace(adapter, pairs=fused)))
    result = call("adapter", "convert", tmp_path / "f.gguf", tmp_path / "f")
    assert "blk.0.attn_qkv.weight: transformers has no such matrix" in result.stderr


# -- merge -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_merged_is_base_and_adapters(variant: str, tmp_path: Path) -> None:
    one = tiny_lora.lora(variant, only=r"blk\.[025]\.|per_layer")
    two = tiny_lora.lora(variant, 3, only=r"blk\.2\.|attn_q", seed=1, scale=0.25)
    path = tmp_path / "merged.gguf"
    merged = merge(path, (one, 0.5), (two, -2.0), variant=variant)
    before, after = tiny.tensors(tiny.VARIANTS[variant]), tensors(path)
    assert list(after) == list(before)
    assert set(merged.changed) == {*one.pairs, *two.pairs}
    for name, weight in before.items():
        wanted = weight.astype(np.float64)
        for adapter, scale in ((one, 0.5), (two, -2.0)):
            if name in adapter.pairs:
                wanted = wanted + scale * tiny_lora.delta(adapter.pairs[name])
        if name in merged.changed:
            np.testing.assert_allclose(after[name], wanted, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(after[name], weight)


def test_metadata_stays(tmp_path: Path) -> None:
    path, base = tmp_path / "merged.gguf", tiny_lora.base("e2b")
    for kind, gone in ((None, set()), (FILE.F16, {"general.file_type"})):
        merging.merge(base, [(tiny_lora.lora("e2b"), 1.0)], path, kind)
        found = gguf.read(source.resolve(path)).metadata
        assert set(base.file.metadata) - set(found) == gone
        for key, value in found.encoded.items():
            assert bytes(value) == bytes(base.file.metadata.encoded[key])


@pytest.mark.parametrize("only", ["token_embd", "ffn_up"])
def test_embeddings_and_head_that_were_one(only: str, tmp_path: Path) -> None:
    """The adapter of one of them leaves the other as it was."""
    adapter = tiny_lora.lora("gemma3", only=only)
    head = tiny_lora.lora("gemma3", only="token_embd", seed=5).pairs["token_embd.weight"]
    path = tmp_path / "merged.gguf"
    table = tiny.tensors(tiny.VARIANTS["gemma3"])["token_embd.weight"]
    merge(path, (adapter, 1.0), variant="gemma3")
    assert ("output.weight" in tensors(path)) == (only == "token_embd")
    if only == "token_embd":
        np.testing.assert_array_equal(tensors(path)["output.weight"], table)
    both = Lora("both", "gemma3", adapter.pairs | {"output.weight": head})
    merge(path, (both, 1.0), variant="gemma3")
    after = tensors(path)
    np.testing.assert_allclose(
        after["output.weight"], table + tiny_lora.delta(head), rtol=1e-5, atol=1e-6
    )
    changed = tiny_lora.delta(adapter.pairs["token_embd.weight"]) if only == "token_embd" else 0
    np.testing.assert_allclose(after["token_embd.weight"], table + changed, rtol=1e-5, atol=1e-6)
    same = {"token_embd.weight": head, "output.weight": head}
    merge(path, (Lora("same", "gemma3", same), 1.0), variant="gemma3")
    assert "output.weight" not in tensors(path)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "TQ2_0", "IQ4_XS"])
def test_types(kind: str, tmp_path: Path) -> None:
    """Merged weights are as near to base + adapter as that type can be."""
    wide = tiny.VARIANTS["e2b"].wide()
    rng = np.random.default_rng(0)
    names = ["blk.0.ffn_up.weight", "blk.9.attn_q.weight", "per_layer_model_proj.weight"]
    weights = tiny.tensors(wide)
    adapter = Lora("x", None, {n: tiny_lora.pair(rng, weights[n].shape, 4, norm=3) for n in names})
    model = tiny.gguf_bytes(wide, types="q8_0")
    path = tmp_path / "merged.gguf"
    merged = merging.merge(tiny_lora.base_of(model), [(adapter, 1.0)], path, FILE[kind])
    before = tiny_lora.base_of(model).file.tensors
    after = gguf.read(source.resolve(path)).tensors
    error = {"TQ2_0": 0.9, "Q4_0": 0.12, "IQ4_XS": 0.12, "Q4_K": 0.12}.get(kind, 0.03)
    for name, info in after.items():
        matrix = len(info.shape) > 1
        assert merged.kinds[name] == info.type == (FILE[kind] if matrix else before[name].type)
        wanted = values(before[name]).astype(np.float64)
        if name in names:
            wanted += tiny_lora.delta(adapter.pairs[name])
        distance = np.linalg.norm(values(info) - wanted)
        assert distance <= (error if matrix else 0) * np.linalg.norm(wanted), name
        if name not in names and info.type == before[name].type:
            assert info.data() == before[name].data()
    with gemloom.load(path, threads=1, context=64) as opened:
        assert np.isfinite(opened.logits([2, 5, 7])).all()


def test_type_as_it_is(tmp_path: Path) -> None:
    """With no --type a quantized matrix that is changed gets its own type again."""
    adapter = tiny_lora.lora("31b", only="ffn_down", norm=3)
    merge(tmp_path / "m.gguf", (adapter, 1.0), variant="31b", types="q8_0")
    before = tiny_lora.base("31b", types="q8_0").file.tensors
    for name, info in gguf.read(source.resolve(tmp_path / "m.gguf")).tensors.items():
        assert info.type == before[name].type
        if name not in adapter.pairs:
            assert info.data() == before[name].data()
            continue
        wanted = values(before[name]) + tiny_lora.delta(adapter.pairs[name])
        exact = gguf_package.quants.quantize(wanted.astype(np.float32), info.type)
        same = np.frombuffer(info.data(), np.uint8) == exact.reshape(-1)
        assert same.mean() > 0.99, name  # the sum is rounded elsewhere, so a few differ by one


def test_rows_that_are_no_whole_blocks_become_f16(tmp_path: Path) -> None:
    merged = merge(tmp_path / "m.gguf", (tiny_lora.lora("26b"), 1.0), variant="26b", kind=FILE.Q4_K)
    router = "blk.0.ffn_gate_inp.weight"
    assert merged.kinds["blk.0.ffn_up.weight"] == FILE.F16
    assert merged.kinds[router] == FILE.F32
    assert router in merged.changed


def test_merge_in_the_model(tmp_path: Path, load: Any) -> None:
    """The merged file's logits are those of the weights merged by hand; fused matrices too."""
    adapter = tiny_lora.lora("e4b", norm=1.0)
    path = tmp_path / "merged.gguf"
    merge(path, (adapter, 1.0), variant="e4b", fused_qkv=True)

    def by_hand(keys: Any, weights: Any) -> None:
        weights["output.weight"] = weights["token_embd.weight"]
        for name, one in adapter.pairs.items():
            weights[name] = (weights[name] + tiny_lora.delta(one)).astype(np.float32)

    ids = [2, 5, 7, 11]
    wanted = load("e4b", forms={"edit": by_hand}, threads=1).logits(ids)
    with gemloom.load(path, threads=1, kv_type="f32", context=256) as opened:
        error = np.abs(opened.logits(ids) - wanted) / wanted.std()
    assert (error.mean() < 0.002, error.max() < 0.02) == (True, True)
    change = np.abs(load("e4b", threads=1).logits(ids) - wanted) / wanted.std()
    assert change.mean() > 0.2


def test_merge_refuses(tmp_path: Path) -> None:
    out, adapter = tmp_path / "m.gguf", tiny_lora.lora("e2b", only="attn_q")
    cases: list[tuple[type[Exception], str, Any, Any]] = [
        (AdapterError, "another base", (tiny_lora.lora("e4b"), 1.0), {}),
        (AdapterError, "aLoRA", (replace(adapter, invocation=(5,)), 1.0), {}),
        (OptionError, "not finite", (adapter, float("nan")), {}),
        (OptionError, "cannot write the type IQ2_XXS", (adapter, 1.0), {"kind": FILE.IQ2_XXS}),
        (OptionError, "cannot write the type I32", (adapter, 1.0), {"kind": FILE.I32}),
        (TensorError, r"blk.0.attn_q.weight: F16: .*beyond", (adapter, 1e9), {"kind": FILE.F16}),
    ]
    for kind, message, one, options in cases:
        with pytest.raises(kind, match=message):
            merge(out, one, **options)
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE to be soft")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    base, limits = tiny_lora.base("e2b"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"m\.gguf: "):
            merging.merge(base, [(tiny_lora.lora("e2b"), 1.0)], tmp_path / "m.gguf")
        with pytest.raises(OutputError, match="peft: "):
            write_peft(tiny_lora.lora("e2b", 16), tmp_path / "peft", multimodal=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_merge_command(tmp_path: Path) -> None:
    model, one, two = (tmp_path / name for name in ("m.gguf", "a@2.gguf", "b.gguf"))
    model.write_bytes(tiny.gguf_bytes(tiny.VARIANTS["e2b"]))
    adapters = [tiny_lora.lora("e2b", only="ffn_up", seed=seed) for seed in (1, 2)]
    for path, adapter in zip((one, two), adapters, strict=True):
        path.write_bytes(tiny_lora.gguf_bytes(adapter))
    data, out = model.read_bytes(), tmp_path / "out.gguf"
    facts = json.loads(fine("adapter", "merge", model, one, f"{two}@-0.5", out, "--json").stdout)
    assert set(facts["changed"]) == set(adapters[0].pairs)
    assert facts["bytes"] == out.stat().st_size
    name = "blk.3.ffn_up.weight"
    wanted = tensors(model)[name] + tiny_lora.delta(adapters[0].pairs[name])
    wanted -= 0.5 * tiny_lora.delta(adapters[1].pairs[name])
    np.testing.assert_allclose(tensors(out)[name], wanted, atol=1e-6)
    fine("adapter", "merge", model, one, out, "--type", "q8_0", "--force")
    assert gguf.read(source.resolve(out)).tensors[name].type == FILE.Q8_0
    for wrong, message in (
        ((model, one, model, "--force"), "is the source itself"),
        ((model, one), "takes a model"),
        ((model, one, out, "--type", "Q9"), "--type Q9 is not a type"),
        ((model, f"{one}@nan", out, "--force"), "not finite"),
    ):
        result = call("adapter", "merge", *wrong)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert message in result.stderr
    assert model.read_bytes() == data
    assert call("adapter", "merge", model, tmp_path / "no.gguf", out).exit_code == 1


# -- extract -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["e2b", "26b"])
def test_what_was_merged_is_extracted(variant: str, tmp_path: Path) -> None:
    adapter = tiny_lora.lora(variant, 4, only=r"blk\.[05]\.|token_embd", norm=2.0)
    path = tmp_path / "tuned.gguf"
    merge(path, (adapter, 1.0), variant=variant)
    found = extracting.extract(tiny_lora.base(variant), tiny_lora.base_of(path), 4)
    assert set(found.lora.pairs) == set(adapter.pairs)
    assert not found.left
    assert found.share > 0.9999
    for name, one in adapter.pairs.items():
        distance = tiny_lora.delta(found.lora.pairs[name]) - tiny_lora.delta(one)
        assert np.linalg.norm(distance) < 1e-3 * np.linalg.norm(tiny_lora.delta(one)), name
    again = tmp_path / "again.gguf"
    merge(again, (found.lora, 1.0), variant=variant)
    for name, weight in tensors(path).items():
        np.testing.assert_allclose(tensors(again)[name], weight, atol=1e-4)


def test_a_tied_table_changes_the_head_too(tmp_path: Path) -> None:
    table = tiny_lora.lora("gemma3", 4, only="token_embd", norm=2.0).pairs["token_embd.weight"]
    both = Lora("x", None, {"token_embd.weight": table, "output.weight": table})
    tuned, again = tmp_path / "tuned.gguf", tmp_path / "again.gguf"
    merge(tuned, (both, 1.0), variant="gemma3")
    found = extracting.extract(tiny_lora.base("gemma3"), tiny_lora.base_of(tuned), 4).lora
    assert set(found.pairs) == set(both.pairs)
    merge(again, (found, 1.0), variant="gemma3")
    assert list(tensors(again)) == list(tensors(tuned))


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 60),
    k=st.integers(1, 60),
    rank=st.integers(1, 20),
    decay=st.sampled_from([0.0, 0.1, 2.0]),
    block=st.sampled_from([64, 1 << 20]),
)
def test_the_decomposition_is_the_best(m: int, k: int, rank: int, decay: float, block: int) -> None:
    """As numpy's: what is kept of the norm, and no direction more than asked for."""
    rng = np.random.default_rng(m * 61 + k)
    u, _, vt = np.linalg.svd(rng.standard_normal((m, k)), full_matrices=False)
    s = np.exp(-decay * np.arange(min(m, k)))
    matrix = ((u * s) @ vt).astype(np.float32)
    difference = _difference(matrix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extracting, "_BLOCK", block)  # several blocks of rows, or one
        b, a = extracting.truncated_svd(difference, 0, rank)
    r = min(m, k, rank)
    assert (b.shape, a.shape) == ((m, r), (r, k))
    best = np.sqrt((s[r:] ** 2).sum())
    left = np.linalg.norm(matrix.astype(np.float64) - b.astype(np.float64) @ a)
    assert left <= 1.02 * best + 1e-5 * np.linalg.norm(s)


def _difference(matrix: np.ndarray) -> extracting.Difference:
    data = [tiny.write({"x": 1}, {"d": values}) for values in (np.zeros_like(matrix), matrix)]
    infos = [gguf.read(source.resolve(one)).tensors["d"] for one in data]
    return extracting.Difference(*infos)


def test_what_no_adapter_can_change_is_told() -> None:
    def edit(keys: Any, weights: Any) -> None:
        for name in ("blk.1.attn_norm.weight", "blk.0.attn_q.weight"):
            weights[name] = weights[name] + 1

    tuned = tiny_lora.base("e2b", edit=edit)
    found = extracting.extract(tiny_lora.base("e2b"), tuned, 1)
    assert found.left == ("blk.1.attn_norm.weight",)
    assert set(found.lora.pairs) == {"blk.0.attn_q.weight"}


def test_extract_refuses() -> None:
    base = tiny_lora.base("e2b")
    with pytest.raises(AdapterError, match="no matrix differs"):
        extracting.extract(base, tiny_lora.base("e2b"), 4)
    with pytest.raises(AdapterError, match=r"is a gemma3, .* a gemma4"):
        extracting.extract(base, tiny_lora.base("gemma3"), 4)
    with pytest.raises(AdapterError, match=r"token_embd\.weight: of shape"):
        extracting.extract(base, tiny_lora.base("e4b"), 4)
    with pytest.raises(OptionError, match="rank must be"):
        extracting.extract(base, base, 0)
    broken = {"blk.0.attn_q.weight": np.full((128, 96), np.nan, np.float32)}
    with pytest.raises(AdapterError, match=r"blk\.0\.attn_q\.weight: a value"):
        extracting.extract(base, tiny_lora.base("e2b", extra=broken), 4)


def test_extract_command(tmp_path: Path) -> None:
    base, tuned, out = (tmp_path / name for name in ("b.gguf", "t.gguf", "a.gguf"))
    base.write_bytes(tiny.gguf_bytes(tiny.VARIANTS["e2b"], types="q8_0"))
    adapter = tiny_lora.lora("e2b", 2, only="ffn_gate", norm=2.0)
    merge(tuned, (adapter, 1.0))
    facts = json.loads(fine("adapter", "extract", base, tuned, out, "--rank", "3", "--json").stdout)
    by_name = {entry["tensor"]: entry for entry in facts["matrices"]}
    assert all(by_name[name]["share"] > 0.9 for name in adapter.pairs)
    assert facts["share"] < 1  # what q8_0 lost is a difference too
    assert set(adapter.pairs) < set(read(out).pairs)
    shown = fine("adapter", "extract", base, tuned, out, "-r", "3", "--force").stdout
    assert re.search(r"all\s+[\d.]+\s+[\d.]+%", shown)
    assert call("adapter", "extract", base, tuned, out).exit_code == 2
