"""Quantizing files: what becomes of tensors and keys; wrong wishes, a full disk, a kill."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st

import gemloom
import tiny
from command_line import ENVIRONMENT, call, fine
from conftest import prompt
from gemloom.errors import GemloomError, OutputError
from gemloom.files import gguf, source
from gemloom.ggml import quants
from gemloom.tools.quantization import imatrix_file, quantize
from gemloom.tools.quantization.imatrix_file import Importance, ImportanceMatrix
from gemloom.tools.quantization.quantize import Wanted
from gemloom.tools.quantization.recipes import RECIPES, recipe
from quantized_files import opened, small, uniform
from tiny import VARIANTS

# -- whole files -----------------------------------------------------------------------------


def write(folder: Path, variant: tiny.Variant, **forms: Any) -> Path:
    path = folder / "in.gguf"
    path.write_bytes(tiny.gguf_bytes(variant, **forms))
    return path


def cli(folder: Path, *args: str | Path) -> dict[str, Any]:
    return dict(json.loads(fine("quantize", folder / "in.gguf", *args, "--json").stdout))


@pytest.mark.parametrize("variant", ["e2b", "12b", "gemma3"])
@pytest.mark.parametrize("kind", ["Q8_0", "F16", "BF16"])
def test_a_quantized_model_says_nearly_the_same(tmp_path: Path, variant: str, kind: str) -> None:
    path, out = write(tmp_path, VARIANTS[variant]), tmp_path / "out.gguf"
    told = cli(tmp_path, out, "--type", kind)
    made = gguf.read(source.resolve(out))
    assert told["bytes"] == sum(info.nbytes for info in made.tensors.values())
    assert made.tensors.keys() == gguf.read(source.resolve(path)).tensors.keys()
    logits = []
    for file in (path, out):
        with gemloom.load(file, threads=1, context=64, kv_type="f32") as model:
            logits.append(model.logits(prompt(30)))
    assert np.abs(logits[0] - logits[1]).mean() < 0.08 * logits[0].std()


@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_do_not_depend_on_threads_and_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Each tensor whole, by one call, is what many pieces make; experts too, each by its own."""
    file = opened(tiny.gguf_bytes(replace(VARIANTS["26b"].wide(), pattern="sf")))
    rng = np.random.default_rng(5)
    entries = {
        name: Importance(rng.random((info.shape[2], info.shape[0]), np.float32), np.ones(8, int))
        for name, info in file.tensors.items()
        if len(info.shape) > 2
    }
    assert entries
    plan = quantize.plan(file, Wanted(recipe("Q4_K_M"), imatrix=ImportanceMatrix(entries)))
    monkeypatch.setattr(quantize, "_PIECE", 1000)
    quantize.write(plan, tmp_path / "out.gguf", threads)
    made = gguf.read(source.resolve(tmp_path / "out.gguf"))
    for choice in plan.choices:
        info = choice.info
        rows = info.shape[1] if len(info.shape) > 1 else 1
        values = quants.dequantize(info.data(), info.type).reshape(-1, rows, info.shape[0])
        means = entries[info.name].means if info.name in entries else [None] * len(values)
        whole = b"".join(
            quants.quantize(matrix, choice.type, weights)
            for matrix, weights in zip(values, means, strict=True)
        )
        assert bytes(made.tensors[info.name].data()) == whole, info.name


def test_metadata_is_kept(tmp_path: Path) -> None:
    """Byte for byte, but for what says how the file is quantized."""
    path = write(tmp_path, VARIANTS["e2b"])
    imatrix = ImportanceMatrix(
        {"blk.0.attn_q.weight": Importance(np.ones((1, 96), np.float32), np.ones(1, int))},
        ("calibration.txt",),
        7,
    )
    imatrix_file.write(tmp_path / "i.dat", imatrix)
    cli(tmp_path, tmp_path / "out.gguf", "--type", "Q4_0", "--imatrix", tmp_path / "i.dat")
    old, new = (gguf.read(source.resolve(p)).metadata for p in (path, tmp_path / "out.gguf"))
    changed = {key for key in old | new if old.encoded.get(key) != new.encoded.get(key)}
    assert changed == {"general.file_type"} | {k for k in new if k.startswith("quantize.")}
    assert new["general.file_type"] == 2
    assert new["quantize.imatrix.dataset"] == "calibration.txt"
    assert new["quantize.imatrix.chunks_count"] == 7


def test_rules_come_first_and_in_order(tmp_path: Path) -> None:
    write(tmp_path, small())
    told = cli(
        tmp_path, "--dry-run", "--type", "Q4_K_M",
        "--tensor-type", r"blk\.0\.ffn_down=q8_0", "--tensor-type", "ffn_=F16",
    )  # fmt: skip
    types = {tensor["name"]: tensor["to"] for tensor in told["tensors"]}
    assert types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["blk.1.ffn_down.weight"] == types["blk.0.ffn_up.weight"] == "F16"
    assert types["blk.0.attn_q.weight"] == "Q4_K"
    assert types["blk.0.ffn_norm.weight"] == "F32"
    assert os.listdir(tmp_path) == ["in.gguf"]


def test_a_dry_run_says_what_is_made(tmp_path: Path) -> None:
    write(tmp_path, small())
    dry = cli(tmp_path, "--dry-run", "--type", "Q4_K_M")
    told = cli(tmp_path, tmp_path / "out.gguf", "--type", "Q4_K_M")
    assert {key: told[key] for key in dry} == dry
    assert sum(part["bytes"] for part in dry["parts"]) == dry["bytes"]
    text = fine("quantize", tmp_path / "in.gguf", "--dry-run", "--type", "Q4_K_M").stdout
    assert "attention" in text
    assert max(map(len, text.splitlines())) <= 80


def test_rows_that_blocks_do_not_divide_are_told(tmp_path: Path) -> None:
    variant = replace(VARIANTS["gemma3"], n_ff=80)  # ffn_down's rows: no whole blocks of 32 either
    write(tmp_path, variant)
    told = cli(tmp_path, "--dry-run", "--type", "Q4_K_S")
    types = {tensor["name"]: tensor["to"] for tensor in told["tensors"]}
    assert types["blk.3.attn_q.weight"] == "Q5_0"
    assert types["blk.3.ffn_down.weight"] == "F16"
    shown = " ".join(told["warnings"])
    assert "Q5_0, not Q4_K: rows of 96 are not whole blocks of 256" in shown
    assert "F16, not Q4_K: rows of 80 are not whole blocks of 256" in shown


def test_ternary_types_are_warned_of(tmp_path: Path) -> None:
    write(tmp_path, small())
    assert any(
        "was not trained for" in w for w in cli(tmp_path, "--dry-run", "-t", "TQ2_0")["warnings"]
    )
    assert not cli(tmp_path, "--dry-run", "-t", "Q8_0")["warnings"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name[:3] in ("IQ1", "IQ2") else ())
        for name in sorted(RECIPES.keys() - {"IQ3_XXS"})  # which has IQ2_S in it
    ],
)
def test_no_recipe_makes_a_file_that_does_not_load(tmp_path: Path, name: str) -> None:
    """Whatever a recipe makes of a model whose rows fit, it loads and its logits are finite."""
    file = opened(tiny.gguf_bytes(small()))
    plan = quantize.plan(file, replace(uniform("F32"), recipe=recipe(name), rules=[]))
    quantize.write(plan, tmp_path / "out.gguf", 1)
    with gemloom.load(tmp_path / "out.gguf", threads=1, context=64) as model:
        assert np.isfinite(model.logits(prompt(5))).all()


def test_quantized_again_only_where_asked(tmp_path: Path) -> None:
    write(tmp_path, small(), types="q8_0")
    result = call("quantize", tmp_path / "in.gguf", tmp_path / "out.gguf", "--type", "Q4_K_M")
    assert result.exit_code == 2
    assert "quantized already" in result.stderr
    assert os.listdir(tmp_path) == ["in.gguf"]
    told = cli(tmp_path, tmp_path / "out.gguf", "--type", "Q4_K_M", "--requantize")
    assert told["bytes"] < told["source_bytes"]
    same = cli(tmp_path, tmp_path / "same.gguf", "--type", "Q8_0")  # nothing changes its type
    assert same["bytes"] == same["source_bytes"]


# -- what cannot be --------------------------------------------------------------------------

WRONG = {
    "no such type": (["--type", "Q9"], "no quantization is called 'Q9'"),
    "no such rule type": (["--type", "Q8_0", "--tensor-type", "attn=Q9"], "no type is called 'Q9'"),
    "not a rule": (["--type", "Q8_0", "--tensor-type", "attn"], "is not regex=type"),
    "no regex": (["--type", "Q8_0", "--tensor-type", "(=Q8_0"], "no regular expression"),
    "rule for nothing": (["--type", "Q8_0", "--tensor-type", "atn=Q8_0"], "no matrix"),
    "a type for activations": (["--type", "F16", "--tensor-type", "attn=Q8_K"], "no type"),
    "no imatrix": (["--type", "IQ2_XXS"], "needs an importance matrix"),
    "no imatrix for Q2_K_S": (["--type", "Q2_K_S"], "Q2_K needs an importance matrix"),
    "ruled without imatrix": (
        ["--type", "Q8_0", "--tensor-type", "token_embd=IQ1_S"], "needs an importance matrix",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_wishes(tmp_path: Path, name: str) -> None:
    args, message = WRONG[name]
    write(tmp_path, small())
    result = call("quantize", tmp_path / "in.gguf", tmp_path / "out.gguf", *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert os.listdir(tmp_path) == ["in.gguf"]


def test_no_file_to_make(tmp_path: Path) -> None:
    result = call("quantize", write(tmp_path, small()), "--type", "Q8_0")
    assert result.exit_code == 2
    assert "OUT is missing" in result.stderr


def test_imatrix_of_another_model(tmp_path: Path) -> None:
    write(tmp_path, small())
    entry = Importance(np.ones((1, 77), np.float32), np.ones(1, int))
    imatrix_file.write(tmp_path / "i.gguf", ImportanceMatrix({"blk.0.attn_q.weight": entry}))
    args = ("--type", "Q4_K_M", "--imatrix", tmp_path / "i.gguf", "--dry-run")
    result = call("quantize", tmp_path / "in.gguf", *args)
    assert result.exit_code == 2
    assert "of another model" in result.stderr


def test_imatrix_that_has_not_all(tmp_path: Path) -> None:
    write(tmp_path, small())
    entry = Importance(np.ones((1, 256), np.float32), np.ones(1, int))
    imatrix_file.write(tmp_path / "i.gguf", ImportanceMatrix({"blk.0.attn_q.weight": entry}))
    args = ("--type", "IQ1_S", "--imatrix", tmp_path / "i.gguf")
    dry = cli(tmp_path, *args, "--dry-run")  # sizes can be seen before a matrix is made
    assert "has nothing on it" in dry["lacking"]
    assert dry["bytes"] < dry["source_bytes"]
    result = call("quantize", tmp_path / "in.gguf", tmp_path / "out.gguf", *args)
    assert result.exit_code == 2
    assert "has nothing on it" in result.stderr


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, small())
    before = path.read_bytes()
    os.link(path, tmp_path / "link.gguf")
    for target in (path, tmp_path / "link.gguf"):
        result = call("quantize", path, target, "--type", "Q8_0")
        assert result.exit_code == 2
        assert "the source itself" in result.stderr
    assert path.read_bytes() == before


def test_no_model(tmp_path: Path) -> None:
    def adapter(keys: dict[str, Any], weights: object) -> None:
        keys["general.type"] = "adapter"

    path = write(tmp_path, small(), edit=adapter)
    result = call("quantize", path, tmp_path / "out.gguf", "--type", "Q8_0")
    assert result.exit_code == 1
    assert "general.type is 'adapter', no model" in result.stderr


def test_a_value_that_is_not_finite_names_its_tensor(tmp_path: Path) -> None:
    def spoil(keys: object, weights: dict[str, np.ndarray]) -> None:
        weights["blk.1.ffn_up.weight"] = weights["blk.1.ffn_up.weight"] * np.float32(np.nan)

    path = write(tmp_path, small(), edit=spoil)
    result = call("quantize", path, tmp_path / "out.gguf", "--type", "Q4_0")
    assert result.exit_code == 1
    assert f"{path}: blk.1.ffn_up.weight: Q4_0: a value to quantize is not finite" in result.stderr
    assert os.listdir(tmp_path) == ["in.gguf"]


MODEL = tiny.gguf_bytes(small())
HEAD = MODEL.index(b"tokenizer.ggml.tokens"), MODEL.index(b"token_embd.weight")


@given(data=st.data())
def test_a_damaged_header_is_an_error_or_another_plan(data: st.DataObject) -> None:
    """Whatever the keys and the tensor table say, before ggml sees any of it."""
    damaged = bytearray(MODEL)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(24, HEAD[0]) | st.integers(HEAD[1], HEAD[1] + 2000))
        damaged[place] = data.draw(st.integers(0, 255))
    kind = data.draw(st.sampled_from(sorted(RECIPES)))
    try:
        plan = quantize.plan(opened(bytes(damaged)), Wanted(recipe(kind), requantize=True))
    except GemloomError:
        return
    for choice in plan.choices:
        for span in quantize._spans(choice):
            assert span[1] + span[2] <= max(choice.info.shape[1:2], default=1)
        assert choice.type == choice.info.type or choice.type in quants.WRITABLE
    assert plan.bytes == sum(choice.nbytes for choice in plan.choices)


# -- memory, a full disk, a kill -------------------------------------------------------------


def large(folder: Path, rows: int) -> Path:
    """A model with embeddings of ``rows`` kilobytes."""

    def edit(keys: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        weights["token_embd.weight"] = np.zeros((rows, 256), np.float32)

    return write(folder, small(), edit=edit)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """64 MiB of one tensor go through in pieces of 1 MiB, of which there are a few at a time."""
    file = gguf.read(source.resolve(large(tmp_path, 1 << 16)))
    plan = quantize.plan(file, Wanted(recipe("Q8_0")))
    tracemalloc.start()
    try:
        quantize.write(plan, tmp_path / "out.gguf", 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.source_bytes > 64 << 20
    assert peak < 12 << 20


def test_disk_full(tmp_path: Path) -> None:
    import resource

    path = large(tmp_path, 1 << 13)
    plan = quantize.plan(gguf.read(source.resolve(path)), Wanted(recipe("Q8_0")))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, old[1]))
    try:
        with pytest.raises(OutputError, match="File too large"):
            quantize.write(plan, tmp_path / "out.gguf", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert os.listdir(tmp_path) == ["in.gguf"]


HALF_WAY = """
import sys, time
from gemloom.files import writing
from gemloom.cli import main
write = writing.GGUFWriter.write
def stop(*args):
    write(*args)
    print("half", flush=True)
    time.sleep(300)
writing.GGUFWriter.write = stop
main()
"""


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """The old file is there until the new one is whole, and a second run makes it."""
    path, out = large(tmp_path, 1 << 13), tmp_path / "out.gguf"
    out.write_bytes(b"old")
    args = ["quantize", path, out, "--type", "Q8_0", "--tensor-type", "token_embd=Q4_K", "--force"]
    with subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, *args], env=ENVIRONMENT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "out.gguf.partial").exists()
    assert out.read_bytes() == b"old"
    fine(*args)
    assert gguf.read(source.resolve(out)).tensors["token_embd.weight"].type == Type.Q4_K
    assert sorted(os.listdir(tmp_path)) == ["in.gguf", "out.gguf"]
