"""Whatever ``quantize`` writes, ``load`` takes: any widths, types, recipes and files of others."""

import functools
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

import gemloom
import tiny
from conftest import prompt
from gemloom.errors import TensorError
from gemloom.files.gguf import GGUF
from gemloom.ggml import quants
from gemloom.tools.adapters.base_shapes import open_base
from gemloom.tools.adapters.merging import merge
from gemloom.tools.quantization import quantize
from gemloom.tools.quantization.imatrix_file import Importance, ImportanceMatrix
from gemloom.tools.quantization.parts import part
from gemloom.tools.quantization.quantize import TensorRule, Wanted
from gemloom.tools.quantization.recipes import RECIPES, recipe
from quantized_files import opened
from tiny import VARIANTS

TABLE = "per_layer_token_embd.weight"
UNREAD = [f"blk.{i}.{name}.weight" for i in (2, 3) for name in ("attn_k", "attn_v")]
SEEING = {
    "v.blk.0.attn_q.weight": (256, 256),
    "mm.0.weight": (64, 256),
    "a.blk.0.ffn_up.weight": (512, 256),
    "model.vision_tower.encoder.layers.0.mlp.fc1.weight": (256, 256),
}


@functools.cache
def model(width: int = 256) -> bytes:
    """Four layers, of which two read the K/V of others but have tensors of their own for it."""
    variant = replace(VARIANTS["e2b"].wide(), pattern="sfsf", n_shared=2, n_ple=width)
    rng = np.random.default_rng(0)
    shapes = {name: (32 if name.startswith("blk.2") else 64, 256) for name in UNREAD} | SEEING
    extra = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return tiny.gguf_bytes(variant, extra=extra)


def imatrix(file: GGUF) -> ImportanceMatrix:
    """What a run of the model itself gives: nothing on what it does not read."""
    return ImportanceMatrix(
        {
            name: Importance(np.ones((1, info.shape[0]), np.float32), np.ones(1, int))
            for name, info in file.tensors.items()
            if len(info.shape) > 1 and name not in UNREAD and name not in SEEING
        }
    )


def made(file: GGUF, wanted: Wanted) -> bytes:
    with TemporaryDirectory() as folder:
        quantize.write(quantize.plan(file, wanted), Path(folder, "m.gguf"), 1)
        return Path(folder, "m.gguf").read_bytes()


@settings(max_examples=12, deadline=None)
@given(
    width=st.sampled_from([32, 48, 64, 96, 160, 192, 256]),
    name=st.sampled_from(sorted(RECIPES)),
    rule=st.sampled_from([None, *sorted(quants.WRITABLE)]),
)
def test_every_plan_is_one_that_loads(width: int, name: str, rule: Type | None) -> None:
    """``rule`` makes every matrix one type, the tables among them."""
    file = opened(model(width))
    rules = [TensorRule.parse(f".={rule.name}")] if rule is not None else []
    cheap = rules or not name.startswith(("IQ1", "IQ2", "IQ3"))
    plan = quantize.plan(file, Wanted(recipe(name), rules, imatrix(file)))
    assert not plan.lacking
    types = {choice.info.name: choice.type for choice in plan.choices}
    assert width % GGML_QUANT_SIZES[types[TABLE]][0] == 0
    if cheap and not (rule is not None and rule.name.startswith(("IQ1", "IQ2", "IQ3"))):
        open_base(opened(made(file, Wanted(recipe(name), rules, imatrix(file)))))


@pytest.mark.parametrize("width", [64, 192])
def test_a_per_layer_table_in_parts_that_blocks_do_not_divide(width: int) -> None:
    """Its rows, four parts long, are whole blocks; what a layer reads of them is not."""
    file = opened(model(width))
    plan = quantize.plan(file, Wanted(recipe("Q6_K")))
    assert f"Q8_0, not Q6_K: rows of {width} are not whole blocks of 256" in " ".join(plan.warnings)
    data = made(file, Wanted(recipe("Q6_K")))
    assert opened(data).tensors[TABLE].type == Type.Q8_0
    with gemloom.load(data, threads=1, context=64) as loaded:
        assert np.isfinite(loaded.logits(prompt(5))).all()


def test_what_load_refuses_is_refused_before_anything_is_read() -> None:
    def misfit(name: str) -> Type:
        return Type.Q6_K if name == TABLE else Type.F32

    variant = replace(VARIANTS["e2b"].wide(), pattern="sfsf", n_shared=2, n_ple=64)
    file = opened(tiny.gguf_bytes(variant, types=misfit))
    with pytest.raises(TensorError, match="Q6_K blocks do not divide into the 64 values"):
        open_base(file)
    data = made(file, Wanted(recipe("Q6_K"), requantize=True))
    assert open_base(opened(data)).file.tensors[TABLE].type == Type.Q8_0


def test_merge_knows_it_too(tmp_path: Path) -> None:
    merge(open_base(opened(model(64))), [], tmp_path / "m.gguf", kind=Type.Q6_K)
    data = (tmp_path / "m.gguf").read_bytes()
    assert open_base(opened(data)).file.tensors[TABLE].type == Type.F16


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_XXS", "Q2_K_S"])
def test_what_nothing_reads_needs_no_importances(name: str) -> None:
    """The types are the recipe's, as if there were importances of all tensors."""
    file = opened(model())
    whole = imatrix(file)
    entry = next(iter(whole.entries.values()))
    whole = replace(whole, entries={**whole.entries, **dict.fromkeys(UNREAD, entry)})
    plans = [quantize.plan(file, Wanted(recipe(name), imatrix=i)) for i in (imatrix(file), whole)]
    assert not plans[0].lacking
    assert [c.type for c in plans[0].choices] == [c.type for c in plans[1].choices]
    few = ImportanceMatrix(dict(list(imatrix(file).entries.items())[:3]))
    lacking = quantize.plan(file, Wanted(recipe(name), imatrix=few)).lacking
    assert "has nothing on it" in lacking
    assert not any(unread in lacking for unread in UNREAD)


def test_what_nothing_reads_is_made(tmp_path: Path) -> None:
    file = opened(model())
    rules = [TensorRule.parse(r"blk\.[23]\.attn_[kv]=IQ2_XXS")]
    data = made(file, Wanted(recipe("Q8_0"), rules, imatrix(file)))
    assert {opened(data).tensors[name].type for name in UNREAD} == {Type.IQ2_XXS}
    assert set(UNREAD) < set(opened(data).tensors)
    open_base(opened(data))


def test_other_modalities_are_copied_as_they_are() -> None:
    file = opened(model())
    wanted = Wanted(recipe("Q4_K_M"), [TensorRule.parse("weight=Q8_0")])
    found = opened(made(file, wanted))
    for name in SEEING:
        assert found.tensors[name].type == Type.F32
        assert bytes(found.tensors[name].data()) == bytes(file.tensors[name].data())
        assert part(name) == "other modalities"
    assert found.tensors["blk.0.attn_q.weight"].type == Type.Q8_0
    open_base(found)
