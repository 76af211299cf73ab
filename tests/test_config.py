"""Config from metadata alone: the released sizes, every form of a key, every contradiction."""

from typing import Any

import numpy as np
import pytest

import tiny
from gemloom.config import Config, from_gguf
from gemloom.errors import ConfigError, TensorError
from gemloom.files import gguf
from gemloom.files.blob import Blob
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


@variants
def test_no_key_may_be_missing(variant: str) -> None:
    """Every architecture key is needed, but those that the format itself leaves out."""
    optional = {
        "rope.freq_base_swa", "final_logit_softcapping", "attention.shared_kv_layers",
        "rope.scaling.type", "rope.scaling.factor", "expert_count",
    }  # fmt: skip
    made = VARIANTS[variant]
    for key in tiny.metadata(made):
        if key.startswith(made.arch) and key.split(".", 1)[1] not in optional:
            with pytest.raises((ConfigError, TensorError), match=key.rsplit(".", maxsplit=1)[-1]):
                config(variant, {key: None})


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
