"""Config from metadata alone: the released sizes, every form of a key, every contradiction."""

import functools
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from gemloom.errors import ConfigError, TensorError
from gemloom.files import gguf
from gemloom.files.blob import Blob
from gemloom.models.config import Config, Rope
from gemloom.models.facts import from_gguf
from tiny import VARIANTS

variants = pytest.mark.parametrize("variant", VARIANTS)


def config(variant: str, edit: dict[str, Any] | None = None, **forms: Any) -> Config:
    """The config of a tiny model with keys replaced, or removed where the value is None."""

    def change(metadata: dict[str, Any], tensors: object) -> None:
        for key, value in (edit or {}).items():
            metadata.pop(key, None)
            if value is not None:
                metadata[key] = value

    data = tiny.gguf_bytes(VARIANTS[variant], edit=change, **forms)
    return from_gguf(gguf.read([Blob("test.gguf", [memoryview(data)])]))


@variants
def test_layers_are_as_the_model_was_made(variant: str) -> None:
    made, got = VARIANTS[variant], config(variant)
    assert got.n_layer == made.n_layer
    for spec in got.layers:
        i = spec.index
        assert (spec.sliding, spec.head_dim) == (made.sliding(i), made.dim(i))
        assert (spec.n_kv, spec.n_ff) == (made.kv(i), made.ff(i))
        assert (spec.owns_kv, spec.has_v) == (made.owns_kv(i), made.has_v(i) or not spec.owns_kv)


@variants
def test_a_sharing_layer_reads_the_last_owner_of_its_kind(variant: str) -> None:
    got = config(variant)
    for spec in got.layers:
        before = [s for s in got.layers if s.owns_kv and s.sliding == spec.sliding]
        assert spec.kv_owner == (spec.index if spec.owns_kv else before[-1].index)
    assert got.last_owner == max(spec.index for spec in got.layers if spec.owns_kv)


@variants
def test_scalar_or_array(variant: str) -> None:
    assert config(variant) == config(variant, arrays=True)


LEFT_OUT = {  # keys that a file need not have, as llama.cpp's loader or Ollama's files have it
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.shared_kv_layers", "expert_count",
    "final_logit_softcapping", "rope.dimension_count", "rope.dimension_count_swa",
    "rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor", "rope.scaling.type",
}  # fmt: skip
LEFT_OUT_SWA = {"attention.key_length_swa", "attention.value_length_swa"}  # one of the two


@variants
def test_no_other_key_may_be_missing(variant: str) -> None:
    made = VARIANTS[variant]
    optional = LEFT_OUT | LEFT_OUT_SWA
    optional |= {"attention.sliding_window"} if made.arch == "gemma3" else set()
    for key in tiny.metadata(made):
        if key.startswith(made.arch) and key.split(".", 1)[1] not in optional:
            with pytest.raises((ConfigError, TensorError), match=key.rsplit(".", maxsplit=1)[-1]):
                config(variant, {key: None})


@variants
def test_what_is_left_out_is_what_released_files_say(variant: str) -> None:
    """But for those that tell one size of model from another."""
    arch = VARIANTS[variant].arch
    same = [
        "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.dimension_count_swa",
        "rope.freq_base", "rope.freq_base_swa", "final_logit_softcapping",
    ]  # fmt: skip
    for name in (*same, "attention.key_length_swa", "attention.value_length_swa",
                 "attention.value_length"):  # fmt: skip
        assert config(variant, {f"{arch}.{name}": None}) == config(variant), name
    without = {f"{arch}.{name}": None for name in same}
    if variant != "gemma3_scaled":  # which has other keys of rope still
        assert config(variant, without) == config(variant)


@pytest.mark.parametrize(("variant", "expected"), [("e2b", 30.0), ("gemma3", None)])
def test_softcap_left_out_or_zero(variant: str, expected: float | None) -> None:
    """Silent if wrong: without the key Gemma 4 still has one, and Gemma 3 has none."""
    key = f"{VARIANTS[variant].arch}.final_logit_softcapping"
    assert config(variant, {key: None}).softcap == expected
    assert config(variant, {key: 0.0}).softcap is None
    assert config(variant, {key: 25}).softcap == 25.0


def test_heads_left_out_are_as_many_as_queries_and_share_the_width() -> None:
    got = config("gemma3", {"gemma3.attention.head_count_kv": None})
    assert {spec.n_kv for spec in got.layers} == {VARIANTS["gemma3"].n_head}
    lengths = {f"gemma3.attention.{name}_length": None for name in ("key", "value")}
    got = config("gemma3", {**lengths, "gemma3.embedding_length": 128})
    assert {spec.head_dim for spec in got.layers} == {128 // VARIANTS["gemma3"].n_head}


def test_a_file_without_window_has_no_sliding_layers() -> None:
    for value in (None, 0):
        got = config("gemma3", {"gemma3.attention.sliding_window": value})
        assert not any(spec.sliding for spec in got.layers)
        assert {spec.rope.base for spec in got.layers} == {1e6}


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 1 / 4),
        ({"rope.scaling.type": None, "rope.scaling.factor": 4.0}, 1 / 4),
        ({"rope.scaling.type": None, "rope.scaling.factor": None, "rope.scale_linear": 4}, 1 / 4),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": None}, 1.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1.0),
        ({"rope.scaling.type": "default", "rope.scaling.factor": 4.0}, 1.0),
        ({"rope.scaling.type": "", "rope.scaling.factor": 4.0}, 1.0),
        ({"rope.scaling.type": None, "rope.scaling.factor": None}, 1.0),
    ],
)
@pytest.mark.parametrize("variant", ["gemma3_scaled", "e2b"])
def test_rope_scaling(variant: str, keys: dict[str, Any], scale: float) -> None:
    """On full layers alone, in both architectures."""
    arch = VARIANTS[variant].arch
    got = config(variant, {f"{arch}.{key}": value for key, value in keys.items()})
    for spec in got.layers:
        assert spec.rope.scale == (1.0 if spec.sliding else scale)


def test_ollama_leaves_rope_to_the_reader_or_has_other_names() -> None:
    """Its Gemma 3 from 4B up has no such key; the models have a factor of 8, the 1B has none."""
    names = ("rope.freq_base", "rope.scaling.type", "rope.scaling.factor")
    none = {f"gemma3.{name}": None for name in names}
    eps = {"gemma3.attention.layer_norm_rms_epsilon": None}
    for context, scale in ((32_768, 1.0), (131_072, 1 / 8)):
        got = config("gemma3_scaled", {**none, **eps, "gemma3.context_length": context})
        assert {s.rope for s in got.layers if s.sliding} == {Rope(32, 1e4)}
        assert {s.rope for s in got.layers if not s.sliding} == {Rope(32, 1e6, scale)}
        assert got.eps == config("gemma3").eps
    named = {"gemma3.rope.global.freq_base": 2e6, "gemma3.rope.local.freq_base": 3e4}
    got = config("gemma3", {**none, **named, "gemma3.context_length": 131_072})
    assert {s.rope for s in got.layers} == {Rope(32, 3e4), Rope(32, 2e6)}


# -- one fact in many forms ------------------------------------------------------------------

_INTEGERS = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64)
_TYPES = (*_INTEGERS, np.float32, np.float64)


def resolved(metadata: dict[str, Any]) -> Config:
    """As ``from_gguf`` of a file of these keys, without a file."""
    return from_gguf(gguf.GGUF("test.gguf", gguf.Metadata("test.gguf", metadata), {}))


def plain(variant: str) -> dict[str, Any]:
    return dict(_plain(variant))


@functools.cache
def _plain(variant: str) -> dict[str, Any]:
    """The keys of a tiny model as a reader of files gives them; in place of a vocabulary its size.

    The sizes are small enough for every type of integer.
    """
    made = VARIANTS[variant]
    prefix = f"{made.arch}."
    found = {key: value for key, value in tiny.metadata(made).items() if key.startswith(prefix)}
    sizes = {"context_length": 96, "embedding_length": 96, "vocab_size": 100}
    found |= {f"{prefix}{key}": value for key, value in sizes.items()}
    for key, value in found.items():
        if isinstance(value, list):
            found[key] = np.array(value)
        if key.endswith("feed_forward_length"):
            found[key] = np.minimum(found[key], 96) if isinstance(value, list) else 96
    return {"general.architecture": made.arch} | found


def integer_keys(variant: str) -> list[str]:
    return [k for k, v in plain(variant).items() if isinstance(v, int) and not isinstance(v, bool)]


seeds = given(chance=st.randoms(use_true_random=False))


@variants
@seeds
def test_every_integer_in_every_type(variant: str, chance: random.Random) -> None:
    """One type for each key, single or in an array of equal ones: the config stays the same."""
    keys = plain(variant)
    expected = resolved(keys)
    n_layer = keys[f"{VARIANTS[variant].arch}.block_count"]
    for key in integer_keys(variant):
        kind, count = chance.choice(_TYPES), chance.choice((0, 1, n_layer))
        value = np.full(max(count, 1), keys[key]).astype(kind)
        keys[key] = value if count else value[0].item()
    assert resolved(keys) == expected


@variants
@seeds
def test_every_array_in_every_type(variant: str, chance: random.Random) -> None:
    keys = plain(variant)
    expected = resolved(keys)
    for key, value in list(keys.items()):
        if isinstance(value, np.ndarray):
            kinds = (*_TYPES, np.bool_) if value.dtype == np.bool_ else _TYPES
            keys[key] = value.astype(chance.choice(kinds))
    assert resolved(keys) == expected


@variants
@seeds
def test_every_number_in_every_type(variant: str, chance: random.Random) -> None:
    keys = plain(variant)
    numbers = [key for key, value in keys.items() if isinstance(value, float)]
    expected = resolved(keys)
    for key in numbers:
        value = np.array([keys[key]], np.float64)
        whole = value[0].is_integer()
        value = value.astype(
            chance.choice((np.float64, np.int64, np.uint32) if whole else (float,))
        )
        keys[key] = chance.choice((value, value[0].item()))
    assert resolved(keys) == expected


WRONG = (
    math.nan, math.inf, -math.inf, -1, -1.0, 1e30, 2**63, 0.5, "many",
    np.array([]), np.array([1, 2, 3]), np.array([math.nan]), np.array([-1, -1]),
)  # fmt: skip


@variants
@seeds
def test_a_value_that_cannot_be_right_is_named(variant: str, chance: random.Random) -> None:
    keys = plain(variant)
    arch = VARIANTS[variant].arch
    numbers = (int, float, np.ndarray)
    chosen = [k for k, v in keys.items() if k.startswith(arch) and isinstance(v, numbers)]
    key = chance.choice(chosen)
    wrong = [
        w for w in WRONG if not (isinstance(keys[key], float) and type(w) is float and w == 0.5)
    ]
    value = chance.choice(wrong)
    with pytest.raises(ConfigError, match=r"^test\.gguf: ") as caught:
        resolved({**keys, key: value})
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", ["e2b", "gemma3"])
@pytest.mark.parametrize("period", [0, 1, 3, 6])
def test_a_pattern_as_one_number(variant: str, period: int) -> None:
    """Every nth layer is full; llama.cpp and transformers count so. 0: none is."""
    keys, arch, n_layer = plain(variant), VARIANTS[variant].arch, VARIANTS[variant].n_layer
    keys |= {f"{arch}.attention.shared_kv_layers": 0}
    expected = [period == 0 or (i + 1) % period != 0 for i in range(n_layer)]
    flags = [np.array(expected, kind) for kind in (bool, np.int32, np.uint8, np.float32)]
    for value in (period, float(period), np.array([period]), *flags):
        got = resolved({**keys, f"{arch}.attention.sliding_window_pattern": value})
        assert [spec.sliding for spec in got.layers] == expected


def test_heads_may_differ_from_layer_to_layer() -> None:
    heads = [2, 4] * (VARIANTS["gemma3"].n_layer // 2)
    got = config("gemma3", {"gemma3.attention.head_count": heads})
    assert [spec.n_head for spec in got.layers] == heads


def test_rows_of_the_table_count_and_not_tokens() -> None:
    """Some files have more tokens than embeddings, some fewer, some none at all."""
    n_vocab = VARIANTS["e2b"].n_vocab
    tokens = tiny.metadata(VARIANTS["e2b"])["tokenizer.ggml.tokens"]
    for edited in (None, tokens[:-3], [*tokens, "another"]):
        assert config("e2b", {"tokenizer.ggml.tokens": edited}).n_vocab == n_vocab


@pytest.mark.parametrize(
    ("variant", "key", "value"),
    [
        ("e2b", "general.architecture", "gemma5"),
        ("e2b", "general.architecture", 4),
        ("e2b", "gemma4.block_count", 0),
        ("e2b", "gemma4.block_count", 2**31),
        ("e2b", "gemma4.block_count", 7),
        ("e2b", "gemma4.block_count", "ten"),
        ("e2b", "gemma4.embedding_length", -1),
        ("e2b", "gemma4.attention.head_count_kv", 3),
        ("e2b", "gemma4.attention.head_count_kv", [1, 1]),
        ("e2b", "gemma4.attention.shared_kv_layers", 99),
        ("e2b", "gemma4.attention.shared_kv_layers", 9),
        ("e2b", "gemma4.attention.sliding_window_pattern", [True]),
        ("e2b", "gemma4.attention.value_length", 32),
        ("e2b", "gemma4.attention.layer_norm_rms_epsilon", float("nan")),
        ("e2b", "gemma4.attention.sliding_window", 0),
        ("e2b", "gemma4.rope.freq_base", 0.0),
        ("e2b", "gemma4.rope.scaling.type", "yarn"),
        ("e2b", "gemma4.attention.key_length_swa", 64),
        ("e2b", "gemma4.attention.sliding_window_pattern", [2] * 10),
        ("gemma3", "gemma3.rope.dimension_count", 64),
        ("e2b", "gemma4.rope.dimension_count", 63),
        ("e2b", "gemma4.rope.dimension_count", 128),
        ("e2b", "gemma4.final_logit_softcapping", -30.0),
        ("26b", "gemma4.expert_used_count", 1000),
        ("26b", "gemma4.expert_feed_forward_length", 0),
        ("gemma3_scaled", "gemma3.rope.scaling.type", "yarn"),
        ("gemma3_scaled", "gemma3.rope.scaling.factor", 0.0),
    ],
)
def test_contradictions_are_named(variant: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=r"^test\.gguf: ") as caught:
        config(variant, {key: value})
    assert "\n" not in str(caught.value)


def test_k_is_v_is_all_or_none() -> None:
    made = VARIANTS["31b"]
    full = [i for i in range(made.n_layer) if not made.sliding(i)]
    assert not any(config("31b").layers[i].has_v for i in full)
    k = tiny.tensors(made)[f"blk.{full[0]}.attn_k.weight"]
    with pytest.raises(TensorError, match=rf"blk\.{full[1]}\.attn_v\.weight is missing"):
        config("31b", extra={f"blk.{full[0]}.attn_v.weight": k})


def spread(**keys: Any) -> dict[str, Any]:
    return {"general.architecture": "gemma4"} | {
        f"gemma4.{name.replace('__', '.')}": value for name, value in keys.items()
    }


RELEASED = {  # layers, d, heads, kv sliding/full, ff, window, full layers, shared, owners
    "E2B": (35, 1536, 8, 1, 1, 512, range(4, 35, 5), 20, (13, 14)),
    "E4B": (42, 2560, 8, 2, 2, 512, range(5, 42, 6), 18, (22, 23)),
    "12B": (48, 3840, 16, 8, 1, 1024, range(5, 48, 6), 0, None),
    "31B": (60, 5376, 32, 16, 4, 1024, range(5, 60, 6), 0, None),
}


@pytest.mark.parametrize("size", RELEASED)
def test_released_sizes(size: str) -> None:
    """Keys of the released files; with no tensors here, full layers make V from K."""
    n, d, heads, kv_swa, kv_full, window, full, shared, owners = RELEASED[size]
    sliding = np.array([i not in full for i in range(n)])
    ff = np.where(np.arange(n) < n - shared, 6144, 12288).astype(np.int32)
    keys = spread(
        block_count=n, embedding_length=d, context_length=131072, feed_forward_length=ff,
        attention__head_count=heads, attention__key_length=512, attention__value_length=512,
        attention__key_length_swa=256, attention__value_length_swa=256,
        attention__head_count_kv=np.where(sliding, kv_swa, kv_full).astype(np.int32),
        attention__layer_norm_rms_epsilon=1e-6, attention__sliding_window=window,
        attention__sliding_window_pattern=sliding, attention__shared_kv_layers=shared,
        embedding_length_per_layer_input=256 if shared else 0, rope__freq_base=1e6,
        rope__freq_base_swa=1e4, rope__dimension_count=512, rope__dimension_count_swa=256,
        final_logit_softcapping=30.0,
    )  # fmt: skip
    tokens = gguf.StringArray(memoryview(bytes(80)), 10)
    metadata = gguf.Metadata(size, keys | {"tokenizer.ggml.tokens": tokens})
    got = from_gguf(gguf.GGUF(size, metadata, {}))
    assert [s.index for s in got.layers if not s.sliding] == list(full)
    assert got.last_owner == n - shared - 1
    if owners:
        assert {s.kv_owner for s in got.layers[n - shared :]} == set(owners)
    # f16 bytes of K and V a token on full layers, as computed from the published table
    full_bytes = sum(2 * 2 * s.n_kv * s.head_dim for s in got.layers if s.owns_kv and not s.sliding)
    assert full_bytes == {"E2B": 6144, "E4B": 16384, "12B": 16384, "31B": 81920}[size]
