"""Every tensor of every released structure gets the type that llama.cpp's quantizer gives it."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES

from gemloom.errors import OptionError
from gemloom.files.gguf import GGUF
from gemloom.ggml.quants import WRITABLE
from gemloom.tools.quantization import quantize
from gemloom.tools.quantization.imatrix_file import Importance, ImportanceMatrix
from gemloom.tools.quantization.quantize import QuantizationPlan, Wanted
from gemloom.tools.quantization.recipes import FALLBACKS, NEEDS_IMATRIX, RECIPES, fitting, recipe
from structures import RELEASED, brief, header

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "llama-types.json").read_text())


def full_imatrix(file: GGUF) -> ImportanceMatrix:
    entries = {}
    for info in file.tensors.values():
        n = info.shape[2] if len(info.shape) > 2 else 1
        entries[info.name] = Importance(np.ones((n, info.shape[0]), np.float32), np.ones(n, int))
    return ImportanceMatrix(entries)


def types(plan: QuantizationPlan) -> str:
    return brief({c.info.name: c.type.name for c in plan.choices})


def needs_imatrix(kind: str, expected: str) -> bool:
    """Whether any matrix has such a type; the embeddings, which need none, never have one."""
    needed = {kind.name for kind in NEEDS_IMATRIX} | ({"Q2_K"} if kind == "Q2_K_S" else set())
    return any(f"{name}*" in expected for name in needed)


@pytest.mark.parametrize("name", RELEASED)
def test_types_are_llama_cpps(name: str) -> None:
    """With an importance matrix and without, tied and not; and in its order."""
    checked = 0
    for untied in (False, True):
        file = header(RELEASED[name], untied)
        whole = full_imatrix(file)
        for kind in RECIPES:
            key = " ".join([name, kind, *["untied"] * untied])
            if key not in GOLDEN:
                continue
            plan = quantize.plan(file, Wanted(recipe(kind)))
            assert types(plan) == GOLDEN[key], key
            assert ("needs an importance" in plan.lacking) == needs_imatrix(kind, GOLDEN[key]), key
            plan = quantize.plan(file, Wanted(recipe(kind), imatrix=whole))
            assert types(plan) == GOLDEN.get(f"{key} imatrix", GOLDEN[key]), key
            assert not plan.lacking
            checked += 1
    assert checked > 30


def test_the_mix_of_quantization_aware_training() -> None:
    """Q4_0 with both embedding tables Q6_K, whatever else there is."""
    file = header(RELEASED["gemma4-e2b"])
    for imatrix in (None, full_imatrix(file)):
        plan = quantize.plan(file, Wanted(recipe("QAT_Q4_0"), imatrix=imatrix))
        types = {c.info.name: c.type.name for c in plan.choices}
        assert types["token_embd.weight"] == types["per_layer_token_embd.weight"] == "Q6_K"
        assert {types[n] for n in types if "attn_q.w" in n or "ffn_down" in n} == {"Q4_0"}


def test_there_is_a_recipe_for_every_type() -> None:
    assert {kind for kind in WRITABLE if not any(r.type == kind for r in RECIPES.values())} == set()


@pytest.mark.parametrize("row", [1, 31, 32, 64, 96, 128, 256, 640, 704, 1152])
@pytest.mark.parametrize("kind", sorted(WRITABLE))
def test_what_stands_in_fits(kind: GGMLQuantizationType, row: int) -> None:
    found = fitting(kind, row)
    assert row % GGML_QUANT_SIZES[found][0] == 0
    if row % GGML_QUANT_SIZES[kind][0] == 0:
        assert found == kind
    else:
        assert found in (FALLBACKS.get(kind), GGMLQuantizationType.F16)
        bits = [8 * size / block for block, size in (GGML_QUANT_SIZES[t] for t in (found, kind))]
        assert bits[0] >= bits[1]  # never fewer than were asked for


def test_names_in_any_case_and_aliases() -> None:
    assert recipe("q4_k_m") is RECIPES["Q4_K_M"] is recipe("Q4_K")
    with pytest.raises(OptionError, match=r"Q4_K_M, .*TQ2_0"):
        recipe("Q4_K_XXL")
