"""A file's tensors: strict both ways, and used in place wherever that is possible."""

import dataclasses
import mmap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

import gemloom
import tiny
from conftest import Load, prompt
from gemloom.errors import FormatError, TensorError
from gemloom.files import gguf
from gemloom.files.blob import Blob
from gemloom.loading.build import build_model
from gemloom.options import Options
from tiny import VARIANTS

variants = pytest.mark.parametrize("variant", VARIANTS)


def aligned(data: bytes, shift: int) -> memoryview:
    """The bytes at an address that is ``shift`` past a multiple of 64."""
    room = np.zeros(len(data) + 128, np.uint8)
    start = -room.ctypes.data % 64 + shift
    room[start : start + len(data)] = np.frombuffer(data, np.uint8)
    return memoryview(room)[start : start + len(data)]


def telling(made: tiny.Variant) -> list[str]:
    """All tensors but those of a layer between the first and the last of its kind."""
    layers: dict[object, list[int]] = {}
    for i in range(made.n_layer):
        layers.setdefault((made.sliding(i), made.owns_kv(i)), []).append(i)
    between = {i for kind in layers.values() for i in kind[1:-1]}
    return [
        name
        for name in tiny.tensors(made)
        if not (name.startswith("blk.") and int(name.split(".")[1]) in between)
    ]


@variants
def test_every_tensor_is_required(variant: str) -> None:
    """Dropped one at a time: each is missed by its name, before anything is computed."""
    made = VARIANTS[variant]
    optional = {"rope_freqs.weight"} if variant.startswith("gemma3") else set()
    for name in telling(made):
        if name in optional or name.endswith("layer_output_scale.weight"):
            continue
        if name.endswith("attn_v.weight") and not made.sliding(int(name.split(".")[1])):
            continue  # its absence says that V is made from K
        with pytest.raises(TensorError, match=name.replace(".", r"\.")):
            gemloom.load(tiny.gguf_bytes(made, drop=(name,)))


@variants
def test_every_shape_is_checked(variant: str) -> None:
    made = VARIANTS[variant]
    for name in list(tiny.tensors(made))[:30]:

        def shorten(metadata: object, tensors: dict[str, np.ndarray], name: str = name) -> None:
            tensors[name] = np.concatenate([tensors[name], tensors[name]], axis=0)

        with pytest.raises(TensorError, match=name.replace(".", r"\.")):
            gemloom.load(tiny.gguf_bytes(made, edit=shorten))


@pytest.mark.parametrize("name", ["blk.0.attn_gate.weight", "blk.99.attn_q.weight", "nonsense"])
def test_an_extra_tensor_is_refused(name: str) -> None:
    extra = {name: np.zeros((4, 32), np.float32)}
    with pytest.raises(TensorError, match=f"{name} does not belong"):
        gemloom.load(tiny.gguf_bytes(VARIANTS["e2b"], extra=extra))


def test_parts_of_other_modalities_are_left_alone(load: Load) -> None:
    extra = {"v.patch_embd.weight": np.zeros((4, 32), np.float32)}
    model = load("e2b", forms={"extra": extra})
    assert np.array_equal(model.logits(prompt(5)), load("e2b").logits(prompt(5)))


@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "blk.0.attn_q.weight"])
def test_types_that_cannot_be_used(name: str) -> None:
    """The type in the tensor table set to I32, which is as large as F32."""
    data = bytearray(tiny.gguf_bytes(VARIANTS["e2b"]))
    after_name = data.index(name.encode()) + len(name)
    n_dims = int.from_bytes(data[after_name : after_name + 4], "little")
    data[after_name + 4 + 8 * n_dims] = GGMLQuantizationType.I32
    with pytest.raises(TensorError, match=f"{name} is of type I32"):
        gemloom.load(data)


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "I8", "F64", "I64"])
@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.attn_q.weight"])
def test_types_that_no_kernel_reads(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types that the format knows and ggml would abort on."""
    data = tiny.gguf_bytes(VARIANTS["e2b"].wide())
    file = gguf.read([Blob("test.gguf", [memoryview(data)])])
    tensors = dict(file.tensors)
    tensors[name] = replace(tensors[name], type=GGMLQuantizationType[kind])
    broken = replace(file, tensors=tensors)
    with pytest.raises(TensorError, match=f"{name} is of type {kind}"):
        build_model(broken, Options())


@pytest.mark.parametrize(
    "name", ["blk.0.attn_norm.weight", "blk.0.attn_q_norm.weight", "rope_freqs.weight"]
)
@pytest.mark.parametrize("half", [False, True])
def test_vectors_may_come_as_columns(load: Load, name: str, half: bool) -> None:
    """[n, 1] for [n], in f32 or f16: files have been seen with either."""

    def as_column(metadata: object, tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name][None, :]

    kind = GGMLQuantizationType.F16 if half else GGMLQuantizationType.F32
    forms = {
        "edit": as_column,
        "types": lambda n: kind if n == name else GGMLQuantizationType.F32,
    }
    if half and name == "rope_freqs.weight":
        return  # 1e30 is more than a half float holds
    got = load("e2b", forms=forms).logits(prompt(9))
    expected = load("e2b").logits(prompt(9))
    assert np.abs(got - expected).mean() < (0.01 if half else 1e-9) * expected.std()


def test_per_layer_rows_that_blocks_do_not_divide(load: Load) -> None:
    variant = dataclasses.replace(VARIANTS["e2b"], n_ple=16)
    types = {"per_layer_token_embd.weight": GGMLQuantizationType.Q8_0}
    data = tiny.gguf_bytes(variant, types=lambda n: types.get(n, GGMLQuantizationType.F32))
    with pytest.raises(TensorError, match="per_layer_token_embd"):
        gemloom.load(data)


@variants
@pytest.mark.parametrize("types", [None, "q8_0"])
def test_same_logits_from_anywhere(variant: str, types: str | None, tmp_path: Path) -> None:
    """In place, misaligned, cut in parts, copied, from a file: not a bit differs."""
    data = tiny.gguf_bytes(VARIANTS[variant], types=types)
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    cuts = [data[:1000], data[1000:20_001], data[20_001:20_001], data[20_001:]]
    mapped = mmap.mmap(-1, len(data))
    mapped.write(data)
    sources = [data, aligned(data, 0), aligned(data, 7), cuts, path, str(path), mapped]
    results = []
    for source in sources:
        with gemloom.load(source, context=64, threads=1) as model:
            results.append(model.logits(prompt(20)))
    with gemloom.load(path, context=64, mmap=False, threads=1) as model:
        assert model.memory()["mapped"] == 0
        results.append(model.logits(prompt(20)))
    assert all(np.array_equal(result, results[0]) for result in results)


def test_a_file_is_mapped_and_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny.gguf_bytes(VARIANTS["e2b"]))
    with gemloom.load(path, context=64, threads=1) as model:
        memory = model.memory()
    assert memory["copied"] == 0
    assert memory["mapped"] == memory["weights"] + memory["per_layer_table"]


@pytest.mark.parametrize(("shift", "copied"), [(0, False), (32, False), (16, True)])
def test_buffers_are_copied_only_where_not_aligned(shift: int, copied: bool) -> None:
    """The per-layer table, which is only read by rows, stays where it is either way."""
    data = aligned(tiny.gguf_bytes(VARIANTS["e2b"]), shift)
    with gemloom.load(data, context=64, threads=1) as model:
        memory = model.memory()
        assert memory["mapped"] >= memory["per_layer_table"]
        assert (memory["copied"] > 0) == copied


def test_memory_is_what_the_parts_say(load: Load) -> None:
    """K/V of E2B's structure by hand: cells x (K and V) x heads x head size x bytes."""
    model = load("e2b", kv_type="f16", context=500, chunk=16)
    owners = [spec for spec in model.config.layers if spec.owns_kv]
    full = sum(512 * 2 * s.n_kv * s.head_dim * 2 for s in owners if not s.sliding)
    sliding = sum(32 * 2 * s.n_kv * s.head_dim * 2 for s in owners if s.sliding)
    memory = model.memory()
    assert (memory["kv_full"], memory["kv_sliding"]) == (full, sliding)
    model.generate(prompt(300), max_tokens=3)
    assert model.memory() == memory  # nothing grows by itself


def test_truncated_files(tmp_path: Path) -> None:
    data = tiny.gguf_bytes(VARIANTS["gemma3"])
    for length in (0, 3, 4, 20, 1000, len(data) // 2, len(data) - 33):
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"cut\.gguf: "):
            gemloom.load(path)


def test_parts_in_a_wrong_order() -> None:
    data = tiny.gguf_bytes(VARIANTS["gemma3"])
    with pytest.raises(FormatError, match="order"):
        gemloom.load([data[5000:], data[:5000]])
