"""An adapter held against a model: what fits, what is left out and why, and what is refused."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
import tiny_lora
from command_line import call, fine
from gemloom.adapters import fusing
from gemloom.adapters.checking import Report, check, measure
from gemloom.adapters.factors import Lora, Pair
from gemloom.adapters.reading import read
from gemloom.errors import AdapterError
from gemloom.tools.adapters.base_shapes import open_base


def checked(adapter: Lora, variant: str = "e2b", **forms: Any) -> Report:
    base = tiny_lora.base(variant, **forms)
    return check(adapter, base.config, base.shapes)


def refusal(adapter: Lora, variant: str = "e2b", **forms: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        checked(adapter, variant, **forms)
    return str(caught.value)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_report(variant: str) -> None:
    adapter = tiny_lora.lora(variant, dtype=np.float16)
    report = checked(adapter, variant)
    assert {match.name for match in report.matched} == set(tiny_lora.matrices(variant))
    assert not report.ignored
    assert report.lora.pairs == adapter.pairs
    for match in report.matched:
        exact = tiny_lora.delta(adapter.pairs[match.name])
        assert match.tensor == match.name
        assert match.shape[:2] == exact.shape[-2:][::-1]
        assert (match.rank, match.scale) == (4, 2.0)
        assert match.norm == pytest.approx(np.linalg.norm(exact), rel=1e-4)
    assert report.norm == pytest.approx(np.sqrt(sum(match.norm**2 for match in report.matched)))


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    rank=st.integers(1, 40),
    experts=st.sampled_from([0, 1, 4]),
    scale=st.floats(-10, 10),
    level=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_norms_are_those_of_the_products(
    shape: tuple[int, int], rank: int, experts: int, scale: float, level: float
) -> None:
    rng = np.random.default_rng(rank)
    deep = (experts,) if experts else ()
    one = tiny_lora.pair(rng, (*deep, *shape), rank, norm=level)
    (match,) = measure(Lora("one", None, {"x": replace(one, scale=scale)})).matched
    exact = np.linalg.norm(tiny_lora.delta(replace(one, scale=scale)))
    assert match.norm == pytest.approx(exact, rel=1e-3, abs=1e-5 * level)


def test_what_sharing_layers_have_no_use_for_is_told() -> None:
    e2b = tiny.VARIANTS["e2b"]
    wanted = tiny_lora.lora("e2b", only="attn_q")
    rng = np.random.default_rng(0)
    unused = {
        f"blk.{i}.attn_{x}.weight": tiny_lora.pair(rng, (e2b.kv(i) * e2b.dim(i), e2b.n_embd), 4)
        for i in range(5, 10)
        for x in "kv"
    }
    report = checked(replace(wanted, pairs=wanted.pairs | unused))
    assert set(report.ignored) == set(unused)
    assert set(report.lora.pairs) == set(wanted.pairs)
    assert "layer 9 has no K/V of its own, it reads those of layer 4" in report.ignored.values()
    assert checked(replace(wanted, pairs=wanted.pairs | unused), redundant_kv=True).ignored
    assert "would change the model; blk.5.attn_k" in refusal(replace(wanted, pairs=unused))


def test_v_where_it_is_made_from_k_is_told() -> None:
    wanted = tiny_lora.lora("12b", only="attn_[qv]")
    extra = {"blk.5.attn_v.weight": wanted.pairs["blk.5.attn_q.weight"]}
    report = checked(replace(wanted, pairs=wanted.pairs | extra), "12b")
    assert report.ignored == {"blk.5.attn_v.weight": "layer 5 makes V from K"}
    assert "blk.4.attn_v.weight" in report.lora.pairs


def test_the_head_of_a_tied_model() -> None:
    (table,) = tiny_lora.lora("gemma3", only="token_embd").pairs.values()
    adapter = Lora("head", "gemma3", {"output.weight": table})
    for forms in ({}, {"untied": True}):
        assert set(checked(adapter, "gemma3", **forms).lora.pairs) == {"output.weight"}


def test_rows_that_pad_the_vocabulary_of_gemma_3() -> None:
    (table,) = tiny_lora.lora("gemma3", only="token_embd").pairs.values()
    for surplus, fits in ((64, True), (63, False), (-1, False)):
        b = np.resize(table.b, (len(table.b) + surplus, table.rank))
        adapter = Lora("padded", "gemma3", {"token_embd.weight": replace(table, b=b)})
        if fits:
            found = checked(adapter, "gemma3").lora.pairs["token_embd.weight"]
            np.testing.assert_array_equal(found.b, table.b)
        else:
            assert "token_embd.weight: made for a matrix of shape" in refusal(adapter, "gemma3")


# -- fused matrices ----------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(2.0, 2.0, 2.0), (2.0, 0.5, -1.0)])
@pytest.mark.parametrize("which", ["qkv", "q", "kv"])
def test_q_k_v_in_one_matrix(scales: tuple[float, ...], which: str) -> None:
    adapter = tiny_lora.lora("e4b", only=rf"attn_[{which}]\.|ffn_up")
    for letter, scale in zip("qkv", scales, strict=True):
        for name in filter(re.compile(f"attn_{letter}").search, adapter.pairs):
            adapter.pairs[name] = replace(adapter.pairs[name], scale=scale)
    report = checked(adapter, "e4b", fused_qkv=True)
    for match in report.matched:
        assert match.norm == pytest.approx(
            np.linalg.norm(tiny_lora.delta(adapter.pairs[match.name]))
        )
    for i in range(12):
        if not tiny.VARIANTS["e4b"].has_v(i):
            continue
        shapes = [tiny_lora.matrices("e4b")[f"blk.{i}.attn_{x}.weight"] for x in "qkv"]
        parts = [
            tiny_lora.delta(adapter.pairs[f"blk.{i}.attn_{x}.weight"])
            if x in which
            else np.zeros(s)
            for x, s in zip("qkv", shapes, strict=True)
        ]
        found = tiny_lora.delta(report.lora.pairs[f"blk.{i}.attn_qkv.weight"])
        np.testing.assert_allclose(found, np.concatenate(parts), rtol=1e-5, atol=1e-9)


def test_a_fused_adapter_for_a_model_in_parts() -> None:
    e4b = tiny.VARIANTS["e4b"]
    rng = np.random.default_rng(0)
    rows = {i: (e4b.n_head + 2 * e4b.kv(i)) * e4b.dim(i) for i in range(12)}
    pairs = {
        f"blk.{i}.attn_qkv.weight": tiny_lora.pair(rng, (m, e4b.n_embd), 3) for i, m in rows.items()
    }
    report = checked(Lora("fused", "gemma4", pairs), "e4b")
    for i in range(12):
        letters = "qkv" if e4b.owns_kv(i) else "q"
        parts = [tiny_lora.delta(report.lora.pairs[f"blk.{i}.attn_{x}.weight"]) for x in letters]
        whole = tiny_lora.delta(pairs[f"blk.{i}.attn_qkv.weight"])
        joined = np.concatenate(parts)
        np.testing.assert_array_equal(joined, whole[: len(joined)])
    assert len(report.ignored) == 2 * e4b.n_shared
    wrong = {"blk.0.attn_qkv.weight": tiny_lora.pair(rng, (rows[0] + 1, e4b.n_embd), 3)}
    assert "blk.0.attn_qkv.weight has 257 rows" in refusal(Lora("x", None, wrong), "e4b")


@pytest.mark.parametrize("fused", [True, False])
def test_gate_and_up_of_experts(fused: bool) -> None:
    whole = tiny_lora.lora("26b", only="gate_up_exps")
    halves: dict[str, Pair] = {}
    for name, one in whole.pairs.items():
        for part, b in zip(("gate", "up"), np.split(one.b, 2, axis=1), strict=True):
            halves[name.replace("gate_up", part)] = replace(one, b=b)
    adapter = whole if fused else replace(whole, pairs=halves)
    report = checked(adapter, "26b", split_experts=fused)
    wanted = halves if fused else whole.pairs
    assert set(report.lora.pairs) == set(wanted)
    for name, one in wanted.items():
        np.testing.assert_allclose(
            tiny_lora.delta(report.lora.pairs[name]), tiny_lora.delta(one), atol=1e-9
        )
    same = fusing.fuse_experts(adapter.pairs)
    for name, one in whole.pairs.items():
        np.testing.assert_allclose(tiny_lora.delta(same[name]), tiny_lora.delta(one), atol=1e-9)


def test_a_part_and_the_whole_at_once() -> None:
    whole = tiny_lora.lora("26b", only="0.ffn_gate_up_exps")
    ((name, one),) = whole.pairs.items()
    part = tiny_lora.pair(np.random.default_rng(1), (8, 32, 64), 2)
    both = replace(whole, pairs=whole.pairs | {name.replace("gate_up", "up"): part})
    found = tiny_lora.delta(checked(both, "26b").lora.pairs[name])
    exact = tiny_lora.delta(one)
    exact[:, 32:] += tiny_lora.delta(part)
    np.testing.assert_allclose(found, exact, atol=1e-8)
    assert "is changed twice" in refusal(both, "26b", split_experts=True)


# -- refusals ----------------------------------------------------------------------------


def with_pair(name: str, one: Pair) -> Lora:
    return Lora("bad", "gemma4", {name: one})


def test_wrong_bases() -> None:
    adapter = tiny_lora.lora("e2b")
    assert "made for the architecture 'gemma4', the model is 'gemma3'" in refusal(adapter, "gemma3")
    unknown = replace(adapter, architecture=None)
    assert re.search(r"\S+\.weight: .*another base\?$", refusal(unknown, "gemma3"))
    for other in ("e4b", "12b", "26b", "31b"):
        assert re.search(r"\S+\.weight: .*another base\?$", refusal(adapter, other))
    assert "nothing in it" in refusal(Lora("empty", None, {}))


def test_wrong_tensors() -> None:
    one = next(iter(tiny_lora.lora("e2b", only="0.attn_q").pairs.values()))
    assert "the model has 10 layers" in refusal(with_pair("blk.10.attn_q.weight", one))
    assert "the model has 10 layers" in refusal(with_pair("blk.99.attn_k.weight", one))
    for name in ("blk.0.attn_x.weight", "blk.0.attn_norm.weight", "blk..attn_q.weight", "x", ""):
        assert "has no such matrix" in refusal(with_pair(name, one))
    message = refusal(with_pair("blk.0.ffn_up.weight", replace(one, b=one.b[:-1])))
    assert "blk.0.ffn_up.weight: made for a matrix of shape [96, 127], the model's is" in message
    deep = Pair(one.a[None], one.b[None], 1.0)
    assert "shape [96, 128, 1]" in refusal(with_pair("blk.0.attn_q.weight", deep))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    ("value", "told"),
    [(np.nan, "not a number"), (np.inf, "infinite values"), (-np.inf, "infinite values")],
)
@pytest.mark.parametrize("side", ["a", "b"])
def test_values_that_are_not_finite(side: str, value: float, told: str, dtype: Any) -> None:
    adapter = tiny_lora.lora("e2b", dtype=dtype)
    getattr(adapter.pairs["blk.7.ffn_down.weight"], side)[1, 1] = value
    assert f"{side.upper()} of blk.7.ffn_down.weight has" in refusal(adapter)
    assert told in refusal(adapter)


def test_values_whose_squares_are_not_finite() -> None:
    adapter = tiny_lora.lora("e2b", only="0.attn_q")
    adapter.pairs["blk.0.attn_q.weight"].a[0, 0] = 1e30
    assert "A of blk.0.attn_q.weight has values beyond" in refusal(adapter)


# -- speed -------------------------------------------------------------------------------


def test_a_large_adapter_is_read_and_checked_without_waiting() -> None:
    """25 million values, as rank 16 on all of E2B; wide bounds, for machines that do other work."""
    rng = np.random.default_rng(0)
    a = (0.01 * rng.standard_normal((16, 1536))).astype(np.float16)
    b = (0.01 * rng.standard_normal((6144, 16))).astype(np.float16)
    pairs = {f"blk.{i}.ffn_up.weight": Pair(a, b, 1.0) for i in range(200)}
    data = tiny_lora.gguf_bytes(Lora("large", "gemma4", pairs))
    started = time.process_time()
    report = measure(read(data))
    assert time.process_time() - started < 2
    assert report.parameters == 200 * (a.size + b.size)


# -- the command -------------------------------------------------------------------------


def test_inspect(tmp_path: Any) -> None:
    model, file = tmp_path / "m.gguf", tmp_path / "style.gguf"
    model.write_bytes(tiny.gguf_bytes(tiny.VARIANTS["e2b"], fused_qkv=True))
    adapter = replace(tiny_lora.lora("e2b", only="attn_|ffn_up"), invocation=(5, 6))
    file.write_bytes(tiny_lora.gguf_bytes(adapter))
    facts = json.loads(fine("adapter", "inspect", file, "--model", model, "--json").stdout)
    report = check(read(file), *_config_and_shapes(model))
    assert facts["norm"] == report.norm
    assert facts["invocation_tokens"] == [5, 6]
    assert [m["name"] for m in facts["matched"]] == [m.name for m in report.matched]
    shown = fine("adapter", "inspect", file, "-m", model)
    assert "blk.4.attn_k.weight (in blk.4.attn_qkv.weight)" in shown.stdout.replace("\n", "")
    assert f"fits {model}" in shown.stderr
    alone = json.loads(fine("adapter", "inspect", file, "--json").stdout)
    assert [m["norm"] for m in alone["matched"]] == [m["norm"] for m in facts["matched"]]
    other = tmp_path / "o.gguf"
    other.write_bytes(tiny.gguf_bytes(tiny.VARIANTS["e4b"]))
    for wrong, status in ((("inspect", file, "-m", other), 1), (("inspect",), 2)):
        result = call("adapter", *wrong)
        assert result.exit_code == status
        assert "Traceback" not in result.stderr
    assert "an adapter, not a model" in call("adapter", "inspect", file, "-m", file).stderr


def _config_and_shapes(model: Any) -> tuple[Any, Any]:
    from gemloom.files import gguf, source

    base = open_base(gguf.read(source.resolve(model)))
    return base.config, base.shapes
