"""Write GGUF files with the shapes and types of released models and random weights.

    python benchmarks/synthetic.py e2b-q4_k_m OUT.gguf

What such a file computes costs what the real one costs; what it says is noise. Not a converter.

Weights. Each type and scale has a pool of about a million normal values, quantized once. A
tensor is blocks drawn from its pool: gigabytes in seconds, and yet no two rows alike. Scales are
such that activations stay near 1 and the logits within their cap; q and k norms shrink with the
head, as Gemma 4 has no attention scale, which spreads attention as in a trained model.

Types of ``q4_k_m``: what llama-quantize makes of a bf16 file. Norms and vectors f32, the router
f32, per_layer_model_proj as in the source, both embedding tables Q6_K (the head is tied to them),
attn_v and ffn_down Q6_K in "more bits" layers (the first eighth, the last eighth, and every third
between), all else Q4_K. Rows that are no multiple of 256 get Q5_0 for Q4_K and Q8_0 for Q6_K.
``qat``: Q4_0, with both embedding tables Q6_K.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from gemloom.errors import GemloomError, RequestError
from gemloom.files import gguf
from gemloom.files.blob import Blob
from gemloom.ggml.quants import quantize

VOCABULARY = Path(__file__).parent.parent / "tests" / "data" / "gemma4-vocab.gguf.xz"
VERSION = 1  # of what is written; another one makes compare.py write its files again
POOL = 1 << 20  # values of a pool
CHUNK = 1 << 18  # blocks drawn at once
MARGIN = 64 << 20  # bytes of disk to leave free


@dataclass(frozen=True, slots=True)
class Shape:
    """One size of Gemma 4; the counts are those of GGUF's keys."""

    pattern: str  # a letter a layer: s sliding, f full
    n_embd: int
    n_head: int
    n_kv: int  # on sliding layers
    n_kv_full: int
    n_ff: int
    n_ff_shared: int = 0  # on layers without K/V of their own; 0: as the others
    n_shared: int = 0  # the last so many layers read the K/V of an earlier one
    n_ple: int = 0  # width of the per-layer embeddings; 0: none
    n_expert: int = 0
    n_expert_used: int = 0
    n_ff_exp: int = 0
    head_dim: int = 256  # on sliding layers
    head_dim_full: int = 512
    window: int = 512
    context: int = 131_072
    k_is_v: bool = False  # full layers have no V of their own

    @property
    def n_layer(self) -> int:
        return len(self.pattern)

    def owns_kv(self, layer: int) -> bool:
        return layer < self.n_layer - self.n_shared

    def has_v(self, layer: int) -> bool:
        return self.owns_kv(layer) and not (self.k_is_v and self.pattern[layer] == "f")

    def dim(self, layer: int) -> int:
        return self.head_dim if self.pattern[layer] == "s" else self.head_dim_full

    def kv(self, layer: int) -> int:
        return self.n_kv if self.pattern[layer] == "s" else self.n_kv_full

    def ff(self, layer: int) -> int:
        return self.n_ff if self.owns_kv(layer) else self.n_ff_shared or self.n_ff


E2B = Shape("ssssf" * 7, 1536, 8, 1, 1, 6144, n_ff_shared=12288, n_shared=20, n_ple=256)
E4B = Shape("sssssf" * 7, 2560, 8, 2, 2, 10240, n_shared=18, n_ple=256)
A4B = Shape(  # 26B-A4B: one period of its five
    "sssssf", 2816, 16, 8, 2, 2112, n_expert=128, n_expert_used=8, n_ff_exp=704,
    window=1024, context=262_144, k_is_v=True,
)  # fmt: skip

Shapes = dict[str, tuple[int, ...]]  # ggml order, fastest first
Mix = Callable[[str, Shape, Shapes], Type]


def _more_bits(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def q4_k_m(name: str, shape: Shape, shapes: Shapes) -> Type:
    """The type llama-quantize gives a matrix in Q4_K_M."""
    kind, layer = Type.Q4_K, _layer(name)
    if "token_embd" in name:
        kind = Type.Q6_K
    elif "attn_v" in name:  # counted among the layers that have one
        counted = [i for i in range(shape.n_layer) if shape.has_v(i)]
        kind = Type.Q6_K if _more_bits(counted.index(layer), len(counted)) else kind
    elif "ffn_down" in name:
        kind = Type.Q6_K if _more_bits(layer, shape.n_layer) else kind
    if shapes[name][0] % 256:
        kind = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}[kind]
    return kind


def qat(name: str, shape: Shape, shapes: Shapes) -> Type:
    """The type of a matrix in the released files of quantization-aware training."""
    return Type.Q6_K if "token_embd" in name else Type.Q4_0


FILE_TYPES = {q4_k_m: 15, qat: 2}
MODELS: dict[str, tuple[Shape, Mix]] = {
    "e2b-q4_k_m": (E2B, q4_k_m),
    "e4b-q4_k_m": (E4B, q4_k_m),
    "e2b-qat": (E2B, qat),
    "e4b-qat": (E4B, qat),
    "26b-cut": (A4B, q4_k_m),
}


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


# --- what the file says of itself ---------------------------------------------


@cache
def vocabulary() -> gguf.Metadata:
    """The keys of the real tokenizer."""
    data = lzma.decompress(VOCABULARY.read_bytes())
    keys = gguf.parse(Blob(VOCABULARY.name, [memoryview(data)])).metadata
    return gguf.Metadata(keys.name, {k: v for k, v in keys.items() if k.startswith("tokenizer.")})


def metadata(name: str, shape: Shape, mix: Mix) -> dict[str, Any]:
    """Every key but the tokenizer's."""
    layers = range(shape.n_layer)
    keys: dict[str, Any] = {
        "block_count": shape.n_layer,
        "context_length": shape.context,
        "embedding_length": shape.n_embd,
        "feed_forward_length": [shape.ff(i) for i in layers],
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": [shape.kv(i) for i in layers],
        "attention.key_length": shape.head_dim_full,
        "attention.value_length": shape.head_dim_full,
        "attention.key_length_swa": shape.head_dim,
        "attention.value_length_swa": shape.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": shape.window,
        "attention.sliding_window_pattern": [letter == "s" for letter in shape.pattern],
        "attention.shared_kv_layers": shape.n_shared,
        "embedding_length_per_layer_input": shape.n_ple,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.dimension_count": shape.head_dim_full,
        "rope.dimension_count_swa": shape.head_dim,
        "final_logit_softcapping": 30.0,
    }
    if shape.n_expert:
        keys["expert_count"] = shape.n_expert
        keys["expert_used_count"] = shape.n_expert_used
        keys["expert_feed_forward_length"] = shape.n_ff_exp
    return {
        "general.architecture": "gemma4",
        "general.type": "model",
        "general.name": f"synthetic {name}",
        "general.file_type": FILE_TYPES[mix],
        "general.quantization_version": 2,
        **{f"gemma4.{key}": value for key, value in keys.items()},
    }


def tensors(shape: Shape, n_vocab: int) -> Shapes:
    """Every tensor of the file, by its name."""
    d, p = shape.n_embd, shape.n_ple
    shapes: Shapes = {"token_embd.weight": (d, n_vocab), "output_norm.weight": (d,)}
    shapes["rope_freqs.weight"] = (shape.head_dim_full // 2,)
    if p:
        shapes["per_layer_token_embd.weight"] = (p * shape.n_layer, n_vocab)
        shapes["per_layer_model_proj.weight"] = (d, p * shape.n_layer)
        shapes["per_layer_proj_norm.weight"] = (p,)
    for i in range(shape.n_layer):
        parts = _attention(shape, i) | _feed_forward(shape, i)
        shapes |= {f"blk.{i}.{name}": size for name, size in parts.items()}
    return shapes


def _attention(shape: Shape, layer: int) -> Shapes:
    d, dim = shape.n_embd, shape.dim(layer)
    q, kv = shape.n_head * dim, shape.kv(layer) * dim
    parts: Shapes = {"attn_norm.weight": (d,), "attn_q.weight": (d, q)}
    if shape.owns_kv(layer):
        parts |= {"attn_k.weight": (d, kv), "attn_k_norm.weight": (dim,)}
    if shape.has_v(layer):
        parts["attn_v.weight"] = (d, kv)
    parts |= {"attn_q_norm.weight": (dim,), "attn_output.weight": (q, d)}
    return parts | {"post_attention_norm.weight": (d,)}


def _feed_forward(shape: Shape, layer: int) -> Shapes:
    d, ff, p = shape.n_embd, shape.ff(layer), shape.n_ple
    parts: Shapes = {
        "ffn_norm.weight": (d,), "ffn_gate.weight": (d, ff), "ffn_up.weight": (d, ff),
        "ffn_down.weight": (ff, d), "post_ffw_norm.weight": (d,), "layer_output_scale.weight": (1,),
    }  # fmt: skip
    if p:
        parts |= {"inp_gate.weight": (d, p), "proj.weight": (p, d), "post_norm.weight": (d,)}
    if n := shape.n_expert:
        parts |= {
            "ffn_gate_inp.weight": (d, n), "ffn_gate_inp.scale": (d,),
            "pre_ffw_norm_2.weight": (d,), "post_ffw_norm_1.weight": (d,),
            "post_ffw_norm_2.weight": (d,), "ffn_gate_up_exps.weight": (d, 2 * shape.n_ff_exp, n),
            "ffn_down_exps.weight": (shape.n_ff_exp, d, n), "ffn_down_exps.scale": (n,),
        }  # fmt: skip
    return parts


# --- weights ------------------------------------------------------------------


def types(shape: Shape, mix: Mix, shapes: Shapes) -> dict[str, Type]:
    """The type of every tensor."""
    kinds = {}
    for name, size in shapes.items():
        if len(size) == 1 or "ffn_gate_inp" in name:
            kinds[name] = Type.F32
        elif name == "per_layer_model_proj.weight":
            kinds[name] = Type.BF16
        else:
            kinds[name] = mix(name, shape, shapes)
    return kinds


def data(name: str, size: tuple[int, ...], kind: Type, shape: Shape, seed: int) -> Iterator[Any]:
    """The bytes of one tensor, piece by piece; they depend on its name and the seed alone."""
    rng = np.random.RandomState(crc32(f"{seed} {name}".encode()))
    if kind == Type.F32:
        yield _vector(name, size, rng).astype(np.float32)
        return
    piece = 256 if size[0] % 256 == 0 else GGML_QUANT_SIZES[kind][0]
    pool = _pool(kind, piece, _level(name, size, shape), seed)
    count = prod(size) // piece
    for start in range(0, count, CHUNK):
        yield pool.take(rng.randint(len(pool), size=min(CHUNK, count - start)))


@cache
def _pool(kind: Type, piece: int, level: float, seed: int) -> np.ndarray:
    """Normal values of deviation ``level`` as blocks of ``piece`` values each."""
    values = np.random.RandomState(seed).standard_normal((POOL // piece, piece)) * level
    blocks = quantize(values.astype(np.float32), kind)
    return np.frombuffer(blocks, np.dtype(f"V{len(blocks) // len(values)}"))


def _level(name: str, size: tuple[int, ...], shape: Shape) -> float:
    """Deviation of a matrix such that what it makes has one of about 1."""
    if name == "token_embd.weight":  # small beside what the layers add, or every token repeats
        return 0.5 * size[0] ** -0.5
    return float((shape.n_ple if "per_layer_token_embd" in name else size[0]) ** -0.5)


def _vector(name: str, size: tuple[int, ...], rng: np.random.RandomState) -> np.ndarray:
    if name == "rope_freqs.weight":  # a quarter of the pairs turn
        return np.repeat([1.0, 1e30], [size[0] // 4, size[0] - size[0] // 4])
    if name.endswith(("layer_output_scale.weight", "ffn_down_exps.scale")):
        return rng.uniform(0.5, 1.2, size)
    noise = rng.standard_normal(prod(size)).reshape(size)
    if name.endswith("ffn_gate_inp.weight"):
        return 2 * noise  # its input has a length of 1; experts should not nearly tie
    level = 12.0 if name == "output_norm.weight" else 1.0  # logits so large that the cap matters
    if name.endswith(("attn_q_norm.weight", "attn_k_norm.weight")):
        level = size[0] ** -0.25
    return level * (1 + 0.2 * noise)


# --- the file -----------------------------------------------------------------


def write(
    path: Path, name: str, shape: Shape, mix: Mix, words: gguf.Metadata, seed: int = 0
) -> None:
    """Write a model with the tokenizer keys ``words``; whole or not at all.

    RequestError where the disk has no room for it; OSError.
    """
    shapes = tensors(shape, len(words.strings("tokenizer.ggml.tokens")))
    kinds = types(shape, mix, shapes)
    sizes = {name: gguf.nbytes(kinds[name], size) for name, size in shapes.items()}
    check_disk(path, sum(sizes.values()))
    part = path.with_name(path.name + ".part")
    writer = GGUFWriter(None, arch="")  # the architecture is among the keys
    for key, value in (metadata(name, shape, mix) | words).items():
        _add_key(writer, key, value)
    for tensor, size in shapes.items():
        writer.add_tensor_info(
            tensor, size[::-1], np.dtype(np.float32), sizes[tensor], kinds[tensor]
        )
    try:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer, shapes, kinds, shape, seed)
        writer.close()
        part.replace(path)
    finally:
        writer.close()
        part.unlink(missing_ok=True)


def check_disk(path: Path, needed: int) -> None:
    """RequestError unless the folder of ``path`` is there and has room."""
    if not path.parent.is_dir():
        raise RequestError(f"{path.parent}: no such folder")
    free = shutil.disk_usage(path.parent).free
    if free < needed + MARGIN:
        raise RequestError(
            f"{path}: needs {(needed + MARGIN) / 1e6:,.0f} MB of disk, {free / 1e6:,.0f} are free"
        )


def _add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, gguf.StringArray):
        value = list(value)
    elif isinstance(value, np.ndarray):
        value = value.tolist()
    unsigned = isinstance(value, int) and not isinstance(value, bool)
    writer.add_key_value(
        key, value, GGUFValueType.UINT32 if unsigned else GGUFValueType.get_type(value)
    )


def _write_tensors(
    writer: GGUFWriter, shapes: Shapes, kinds: dict[str, Type], shape: Shape, seed: int
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("writing", total=sum(prod(size) for size in shapes.values()))
        for name, size in shapes.items():
            for piece in data(name, size, kinds[name], shape, seed):
                file.write(piece)
            writer.write_padding(file, file.tell())
            progress.update(task, advance=prod(size))


def make(model: str, path: Path, seed: int = 0) -> None:
    """Write one of MODELS."""
    shape, mix = MODELS[model]
    write(path, model, shape, mix, vocabulary(), seed)


def make_tiny(model: str, path: Path) -> None:
    """The structure of one of MODELS in a few megabytes, with the tokenizer of the tests."""
    sys.path.insert(0, str(VOCABULARY.parent.parent))
    import tiny

    data = memoryview(tiny.gguf_bytes(tiny.VARIANTS["e2b"]))
    keys = gguf.parse(Blob("tiny", [data])).metadata
    words = {k: v for k, v in keys.items() if k.startswith("tokenizer.")}
    shape, mix = MODELS[model]
    small = replace(
        shape, n_embd=256, n_head=4, n_ff=256, n_ff_shared=512 if shape.n_ff_shared else 0,
        n_expert=min(shape.n_expert, 16), n_ff_exp=256 if shape.n_ff_exp else 0,
        n_kv=min(shape.n_kv, 2), n_kv_full=min(shape.n_kv_full, 2),
        head_dim=32, head_dim_full=64, window=16,
    )  # fmt: skip
    write(path, model, small, mix, gguf.Metadata("tiny", words))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a synthetic Gemma 4 of real shapes.")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        make(options.model, options.out, options.seed)
    except (GemloomError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
