"""Checkpoints that cannot be converted: each is an error of one line before anything is written."""

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints
from gemloom.errors import (
    ConfigError,
    FormatError,
    GemloomError,
    SourceError,
    TensorError,
    TokenizerError,
)
from gemloom.tools import convert
from tiny import VARIANTS

Edit = Callable[[dict[str, np.ndarray], dict[str, Any]], None]
Q = "model.layers.1.self_attn.q_proj.weight"


def made(folder: Path, variant: str, edit: Edit) -> Path:
    arrays = checkpoints.tensors(VARIANTS[variant])
    files = checkpoints.files(VARIANTS[variant])
    edit(arrays, files)
    return checkpoints.write(folder, arrays, files)


def refused(folder: Path, error: type[GemloomError], words: str) -> None:
    """A plan fails before anything is written, in one line that says what is wrong."""
    with pytest.raises(error, match=words) as caught:
        convert.plan(folder)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is error


# -- what the files say ----------------------------------------------------------------------


def config(**changes: Any) -> Edit:
    def edit(arrays: dict[str, np.ndarray], files: dict[str, Any]) -> None:
        files["config.json"] |= changes

    return edit


def without(key: str) -> Edit:
    def edit(arrays: dict[str, np.ndarray], files: dict[str, Any]) -> None:
        del files["config.json"][key]

    return edit


REQUIRED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "sliding_window", "layer_types",
    "hidden_size_per_layer_input", "max_position_embeddings", "vocab_size", "global_head_dim",
)  # fmt: skip
FULL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
SLIDING = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    refused(made(tmp_path, "e2b", without(key)), ConfigError, rf"config\.json: .*{key}")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "sliding_window"])
def test_a_missing_key_of_gemma3_is_named(tmp_path: Path, key: str) -> None:
    refused(made(tmp_path, "gemma3", without(key)), ConfigError, key)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "'llama' cannot be converted"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": ["gemma4"]}, "cannot be converted"),
        ({"hidden_size": "96"}, "hidden_size must be a non-negative integer"),
        ({"hidden_size": 0}, "hidden_size: 0 is not a size"),
        ({"hidden_size": 2**40}, "is not a size"),
        ({"num_hidden_layers": 2**30}, "1,073,741,824 are more than 512"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ({"hidden_activation": "silu"}, "silu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types: needs 10"),
        ({"layer_types": ["chunked_attention"] * 10}, "layer_types"),
        ({"layer_types": [["full_attention"]] * 10}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 10}, "last layer"),
        ({"num_kv_shared_layers": 10}, "shared_kv_layers"),
        ({"per_layer_config": {"99": {"head_dim": 64}}}, "'99' is not a layer"),
        ({"per_layer_config": {"4": {"bias": 1}}}, "'bias' of a layer is unknown"),
        ({"per_layer_config": {"4": {"head_dim": 64}}}, "heads of 32 and 64"),
        ({"per_layer_config": {"4": {"head_dim": "64"}}}, "head_dim"),
        ({"per_layer_config": [1]}, "per_layer_config: is not an object"),
        ({"rope_parameters": {"full_attention": FULL}}, "rope_theta is missing"),
        ({"rope_parameters": {"full_attention": SLIDING, "sliding_attention": SLIDING}}, "default"),
        ({"rope_parameters": {"full_attention": FULL | {"partial_rotary_factor": 2.0},
                              "sliding_attention": SLIDING}}, "partial_rotary_factor: 2"),
        ({"rope_parameters": {"full_attention": FULL | {"factor": 8.0},
                              "sliding_attention": SLIDING}}, "factor"),
        ({"quantization_config": {"quant_method": "gemma"}}, "a quantized checkpoint"),
        ({"text_config": 3}, "text_config"),
        ({"enable_moe_block": True}, "num_experts"),
    ],
)  # fmt: skip
def test_settings(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    refused(made(tmp_path, "e2b", config(**changes)), ConfigError, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 2**30}, "1,073,741,824 are more than 512"),  # not as many booleans
        ({"query_pre_attn_scalar": 168}, "168, but readers of a GGUF take 32"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    ],
)
def test_settings_of_gemma3(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    refused(made(tmp_path, "gemma3", config(**changes)), ConfigError, words)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    folder = checkpoints.checkpoint(tmp_path)
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, ConfigError, r"config\.json: ")


# -- tensors ---------------------------------------------------------------------------------


def change(name: str, value: Any) -> Edit:
    def edit(arrays: dict[str, np.ndarray], files: dict[str, Any]) -> None:
        if value is None:
            del arrays[name]
        else:
            arrays[name] = np.asarray(value)

    return edit


ONE = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("variant", "edit", "words"),
    [
        ("e2b", change(Q, None), r"layers\.1\.self_attn\.q_proj\.weight is missing"),
        ("e2b", change("model.layers.0.layer_scalar", None), "layer_scalar is missing"),
        ("e2b", change("model.norm.weight", None), r"norm\.weight is missing"),
        ("e2b", change("model.layers.4.self_attn.v_proj.weight", None), "v_proj.weight is missing"),
        ("31b", change("model.layers.5.self_attn.k_proj.weight", None), "k_proj.weight is missing"),
        ("31b", config(attention_k_eq_v=False, num_global_key_value_heads=None), "missing|shape"),
        ("e2b", config(attention_k_eq_v=True), "despite attention_k_eq_v"),
        ("e2b", change(Q, np.ones((3, 3), np.float32)), r"has the shape \[3, 3\], not \[128, 96\]"),
        ("e2b", change(Q, np.ones((128, 96), np.int8)), "dtype I8; F32, F16, BF16"),
        ("e2b", change(Q, np.ones((128, 96), np.float64)), "dtype F64"),
        ("e2b", change("model.layers.1.mystery", ONE), r"model\.layers\.1\.mystery is unknown"),
        ("e2b", change("mystery", ONE), "mystery is unknown"),
        ("e2b", change("model.layers.99.input_layernorm.weight", ONE), "does not belong"),
        ("e2b", change("model.layers.01.input_layernorm.weight", ONE), "is unknown"),
        ("e2b", change("model.language_model.norm.weight", ONE), "are the same"),
        ("gemma3", change("model.layers.0.layer_scalar", ONE), "does not belong"),
        ("e2b", change("model.layers.0.router.scale", ONE), "does not belong"),
        ("gemma3", config(tie_word_embeddings=False), "lm_head.weight is missing"),
        ("gemma3", config(vocab_size=2**30), "shape"),  # no such number of tokens is made
        ("e2b", config(vocab_size=2**30), "shape"),
        ("e2b", config(hidden_size=64), "shape"),
        ("e2b", config(intermediate_size=64), "shape"),
        ("gemma3", config(num_attention_heads=8), "shape"),
    ],
)
def test_tensors(tmp_path: Path, variant: str, edit: Edit, words: str) -> None:
    refused(made(tmp_path, variant, edit), TensorError, words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [None, Type.Q8_0], ids=str)
def test_a_value_that_is_not_finite(
    tmp_path: Path, value: float, dtype: str, kind: Type | None
) -> None:
    arrays = checkpoints.tensors(VARIANTS["e2b"])
    arrays[Q] = arrays[Q].copy()
    arrays[Q][7, 7] = value
    folder = checkpoints.write(
        tmp_path / "in", arrays, checkpoints.files(VARIANTS["e2b"]), dtype=dtype
    )
    plan = convert.plan(folder, kind)
    with pytest.raises(TensorError, match=rf"{Q}: .*not finite"):
        convert.write(plan, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_value_beyond_half_floats(tmp_path: Path) -> None:
    arrays = checkpoints.tensors(VARIANTS["e2b"])
    arrays[Q] = arrays[Q] * np.float32(1e6)
    folder = checkpoints.write(tmp_path / "in", arrays, checkpoints.files(VARIANTS["e2b"]))
    with pytest.raises(TensorError, match="65,504"):
        convert.write(convert.plan(folder, Type.F16), tmp_path / "out.gguf")
    convert.write(convert.plan(folder, Type.BF16), tmp_path / "out.gguf")


# -- files -----------------------------------------------------------------------------------


def test_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", SourceError, "is not a folder")
    refused(tmp_path, SourceError, r"config\.json is missing")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, SourceError, "pickles")


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = checkpoints.checkpoint(tmp_path, shards=4)
    (folder / "model-00002-of-00004.safetensors").unlink()
    (folder / "model-00003-of-00004.safetensors").unlink()
    refused(folder, SourceError, "2 of 4 parts are missing: model-00002-of-00004.safetensors, ")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1])
def test_a_truncated_shard(tmp_path: Path, keep: int) -> None:
    folder = checkpoints.checkpoint(tmp_path, shards=2)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, FormatError, "00002-of-00002.safetensors: truncated")


def header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    edit(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [128, 97]}, {"shape": [2**40, 2**40]}, {"shape": [-128, -96]}, {"shape": "x"},
        {"data_offsets": [0, 4]}, {"data_offsets": [2**60, 2**60 + 49152]}, {"data_offsets": [5]},
        {"dtype": "F16"}, {"dtype": "F7"}, {"dtype": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_lies(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = checkpoints.checkpoint(tmp_path)
    header(folder / "model.safetensors", lambda entries: entries[Q].update(change))
    with pytest.raises((FormatError, TensorError), match=r"model\.safetensors: "):
        convert.plan(folder)


def test_any_damaged_byte_of_a_header(tmp_path: Path) -> None:
    """Never anything but an error of ours, or a checkpoint that is sound all the same."""
    folder = checkpoints.checkpoint(tmp_path, "gemma3_scaled")
    path = folder / "model.safetensors"
    data, rng = path.read_bytes(), random.Random(4)
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(150):
        at = rng.randrange(end)
        path.write_bytes(data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :])
        with suppress(GemloomError):
            convert.plan(folder)


def test_an_index_that_lies(tmp_path: Path) -> None:
    folder = checkpoints.checkpoint(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(places.values()))
    for changed, words in (
        ({**places, "extra": first}, f"{first}: extra is missing in it"),
        ({n: p for n, p in places.items() if n != Q}, "does not say that it holds"),
        ({**places, Q: first if places[Q] == second else second}, f"{Q} is missing in it"),
        ({**places, Q: "../elsewhere.safetensors"}, "is not a name of a file beside it"),
        ({**places, Q: 3}, "is not a name of a file"),
        ({}, "weight_map is missing"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        refused(folder, FormatError, words)


def test_a_file_that_shrinks_on_the_way(tmp_path: Path) -> None:
    folder = checkpoints.checkpoint(tmp_path / "in")
    plan = convert.plan(folder)
    os.truncate(folder / "model.safetensors", 100_000)
    with pytest.raises(FormatError, match="truncated: it ends inside"):
        convert.write(plan, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


# -- the tokenizer ---------------------------------------------------------------------------


def tokenizer(edit: Callable[[dict[str, Any]], Any]) -> Edit:
    def change(arrays: dict[str, np.ndarray], files: dict[str, Any]) -> None:
        edit(files)

    return change


def template(found: Any) -> Edit:
    config = {"tokenizer_config.json": {"chat_template": found}}
    return tokenizer(lambda files: files.update({"chat_template.jinja": "", **config}))


def of_model(**changes: Any) -> Edit:
    return tokenizer(lambda files: files["tokenizer.json"]["model"].update(changes))


@pytest.mark.parametrize(
    ("variant", "edit", "words"),
    [
        ("e2b", tokenizer(lambda f: f.pop("tokenizer.json")), r"tokenizer\.json is missing; copy"),
        ("gemma3", tokenizer(lambda f: f.pop("tokenizer.json")), r"tokenizer\.json is missing"),
        ("e2b", of_model(type="Unigram"), "no Gemma vocabulary"),
        ("e2b", of_model(byte_fallback=False), "no Gemma vocabulary"),
        ("e2b", of_model(vocab={}), "no vocabulary"),
        ("e2b", of_model(vocab={"a": "b"}), "no token"),
        ("e2b", of_model(vocab={"a": -1}), "no token"),
        ("e2b", of_model(vocab={"a": 5000}), "439 embeddings"),
        ("e2b", of_model(vocab={"a": 0}), "missing"),
        ("e2b", of_model(merges=["a"]), "'a' is not a merge"),
        ("e2b", of_model(merges=[["a", " "]]), "is not a merge"),
        ("e2b", of_model(merges=[["nowhere", "x"]]), "merges do not fit"),
        ("e2b", of_model(vocab={"\ud800": 300}), "not Unicode text"),
        ("e2b", tokenizer(lambda f: f.update({"chat_template.jinja": "", "tokenizer_config.json":
         {"chat_template": "a\ud800"}})), "not Unicode text"),
        ("e2b", template("{% training %}"), "not valid Jinja: line 1"),
        ("e2b", template("{{ nowhere() }}"), "no chat can be made by its chat template"),
        ("e2b", template([{"name": "a b", "template": "x"}]), "'a b' is not a name of a chat"),
        ("e2b", template([{"name": "a", "template": 3}]), "the chat template is not text"),
        ("gemma3", of_model(merges=[["▁", "t"]]), "do not follow from the order"),
        ("e2b", tokenizer(lambda f: f["tokenizer.json"].update(added_tokens=[3])), "added_tokens"),
        ("e2b", tokenizer(lambda f: f["tokenizer.json"].update(added_tokens=[{}])), "no text"),
        ("e2b", tokenizer(lambda f: f["tokenizer_config.json"].update(bos_token="<x>")), "<x>"),
        ("e2b", tokenizer(lambda f: f["generation_config.json"].update(eos_token_id=[9999])),
         "9999, which is not a token"),
        ("e2b", tokenizer(lambda f: f["generation_config.json"].update(suppress_tokens="x")),
         "'x'"),
    ],
)  # fmt: skip
def test_tokenizer(tmp_path: Path, variant: str, edit: Edit, words: str) -> None:
    refused(made(tmp_path, variant, edit), TokenizerError, words)


SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats(allow_nan=False) | st.text()
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every object or list in a JSON value, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@pytest.mark.parametrize("variant", ["e2b", "26b", "gemma3"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_anything_in_the_json_files(tmp_path: Path, variant: str, data: st.DataObject) -> None:
    """Never anything but an error of ours, of one line; or it does no harm."""
    form = data.draw(st.sampled_from(["original", "per_layer"]))
    files = json.loads(json.dumps(checkpoints.files(VARIANTS[variant], form)))
    name = data.draw(st.sampled_from([name for name in sorted(files) if name.endswith(".json")]))
    found = list(places(files[name]))
    where, key = found[data.draw(st.integers(0, min(len(found), 120) - 1))]
    where[key] = data.draw(JSON)
    folder = tmp_path / "in"
    if not (folder / "model.safetensors").exists():
        checkpoints.checkpoint(folder, variant)
    for other, value in files.items():
        (folder / other).write_text(value if isinstance(value, str) else json.dumps(value))
    with suppress(GemloomError):
        convert.write(convert.plan(folder), tmp_path / "out.gguf", force=True)
