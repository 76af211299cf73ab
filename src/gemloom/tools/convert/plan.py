"""What goes into the GGUF of a checkpoint: each tensor, its type and where it comes from.

Shapes are those that the model's own files in ``models/`` declare, so what fits this plan loads.
Nothing is read here but headers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from gguf import LlamaFileType
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from gemloom.errors import FormatError, OptionError, TensorError
from gemloom.files.blob import Blob
from gemloom.files.gguf import GGUF, Metadata, TensorInfo, Value
from gemloom.files.writing import Planned
from gemloom.models.config import Config
from gemloom.models.layout import Shapes
from gemloom.models.network import Network
from gemloom.models.registry import ARCHITECTURES
from gemloom.models.tensor_names import HEAD, ROPE_FREQS, TABLE, unit
from gemloom.text.tokenizer import Tokenizer
from gemloom.tools.convert import names, settings, vocabulary
from gemloom.tools.convert.checkpoint import Checkpoint, Stored
from gemloom.tools.convert.settings import CheckpointSettings

FILE_TYPES = {
    Type.F32: LlamaFileType.ALL_F32,
    Type.F16: LlamaFileType.MOSTLY_F16,
    Type.BF16: LlamaFileType.MOSTLY_BF16,
    Type.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_FALLBACK = Type.F16  # for rows that are no whole blocks
_NEVER = 1e30  # an angle divided by this is none
_QUANTIZATION_VERSION = 2  # of ggml's block formats


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of the new file and what it is made of."""

    planned: Planned
    made_of: Stored | np.ndarray = field(repr=False)  # float32 where it is computed
    shift: float = 0.0  # what is added to every value


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """The new file, but for its tensors' bytes."""

    checkpoint: Checkpoint = field(repr=False)
    metadata: Mapping[str, Value] = field(repr=False)
    items: tuple[Item, ...]
    notes: tuple[str, ...]  # what the user should know

    @property
    def source_bytes(self) -> int:
        """What has to be read."""
        return sum(item.made_of.nbytes for item in self.items)


def plan(folder: str | os.PathLike[str], kind: Type | None = None) -> ConversionPlan:
    """Plan the GGUF of the checkpoint in ``folder``.

    Its matrices become ``kind`` (F32, F16, BF16, Q8_0) or, with None, stay what they are. Raises
    SourceError, FormatError, ConfigError, TensorError, TokenizerError for a checkpoint that is no
    whole Gemma, OptionError for another type.
    """
    checkpoint = Checkpoint(folder)
    if kind is not None and kind not in FILE_TYPES:
        raise OptionError(f"cannot convert to {kind.name}: {', '.join(t.name for t in FILE_TYPES)}")
    found = settings.read(checkpoint.config, f"{checkpoint.folder / 'config.json'}")
    stored, notes = _by_gguf_name(checkpoint, found.tied)
    # Before a token is made for each row that the config speaks of, however many.
    d = found.keys[f"{found.architecture}.embedding_length"]
    assert isinstance(d, int)
    _check_tensor(checkpoint, stored, TABLE, (d, found.n_vocab))
    tokens, ends, more = vocabulary.read(
        checkpoint, "llama" if found.architecture == "gemma3" else "gemma4", found.n_vocab
    )
    metadata = Metadata(f"{checkpoint.folder}", _general(checkpoint, found) | found.keys | tokens)
    end_keys, lost = vocabulary.end_keys(ends, Tokenizer(metadata).eog)
    metadata.update(end_keys)
    shapes, unused = _shapes(metadata, found, stored)
    _check(checkpoint, shapes, stored, unused)
    items = [_item(name, shape, stored, found, kind) for name, shape in shapes.items()]
    metadata["general.file_type"] = int(FILE_TYPES[_main_type(items)])
    if dropped := unused & stored.keys():
        notes.append(f"unused K/V tensors of sharing layers left out: {len(dropped)}")
    notes += [*more, *lost, *_fallbacks(items, kind)]
    return ConversionPlan(checkpoint, metadata, tuple(items), tuple(notes))


# -- tensors ---------------------------------------------------------------------------------


def _by_gguf_name(checkpoint: Checkpoint, tied: bool) -> tuple[dict[str, Stored], list[str]]:
    """The text model's tensors under their GGUF names, and what else there was."""
    stored: dict[str, Stored] = {}
    others, unlisted = Counter[str](), checkpoint.unlisted
    for tensor in checkpoint.tensors.values():
        name, part = names.to_gguf(tensor.name), names.left_out(tensor.name)
        if part is not None:
            others[part] += 1
        elif name is None and tensor.name in unlisted:
            others["unlisted (in no index)"] += 1
        elif tensor.name in unlisted:
            raise FormatError(f"{tensor.path}: the index does not say that it holds {tensor.name}")
        elif name is None:
            raise TensorError(f"{tensor.path}: the tensor {tensor.name[:120]} is unknown")
        elif name == HEAD and tied:
            others["output (tied to embeddings)"] += 1
        elif name in stored:
            raise TensorError(f"{tensor.path}: {tensor.name} and {stored[name].name} are the same")
        else:
            stored[name] = tensor
    return stored, [f"{part} tensors left out: {count}" for part, count in others.items()]


def _shapes(
    metadata: Metadata, found: CheckpointSettings, stored: Mapping[str, Stored]
) -> tuple[Shapes, frozenset[str]]:
    """Every tensor of the new file with its shape in ggml order, and names of no use."""
    if found.architecture not in ARCHITECTURES:
        return _assistant_shapes(metadata, found), frozenset()
    nothing = Blob(metadata.name, [])
    infos = {
        name: TensorInfo(name, tensor.type, tensor.shape[::-1], nothing, 0)
        for name, tensor in stored.items()
    }
    network = Network.of(GGUF(metadata.name, metadata, infos))
    config, layout = network.config, network.layout
    shapes = dict(layout.required)
    if not found.tied:
        shapes[HEAD] = (config.n_embd, config.n_vocab)
    if found.architecture == "gemma4":
        shapes |= {f"blk.{spec.index}.layer_output_scale.weight": (1,) for spec in config.layers}
        _check_values(metadata.name, config, found.k_is_v)
    return shapes, layout.ignored


def _check_values(name: str, config: Config, k_is_v: bool) -> None:
    """A GGUF shows by what it lacks that V is made from K; so it must lack just that."""
    for spec in config.layers:
        wanted = spec.sliding or not k_is_v
        if spec.owns_kv and spec.has_v != wanted:
            what = "is missing" if wanted else "is there despite attention_k_eq_v"
            tensor = names.to_hf(f"blk.{spec.index}.attn_v.weight")
            raise TensorError(f"{name}: the tensor {tensor} {what}")


def _assistant_shapes(metadata: Metadata, found: CheckpointSettings) -> Shapes:
    """Of a drafter for Gemma 4: layers of queries only, between two projections."""
    arch = found.architecture
    d, out, n_ff, n_head, full, swa = (
        metadata.integer(f"{arch}.{key}")
        for key in (
            "embedding_length", "embedding_length_out", "feed_forward_length",
            "attention.head_count", "attention.key_length", "attention.key_length_swa",
        )
    )  # fmt: skip
    shapes: Shapes = {
        TABLE: (d, found.n_vocab),
        "output_norm.weight": (d,),
        ROPE_FREQS: (full // 2,),
        "nextn.pre_projection.weight": (2 * out, d),
        "nextn.post_projection.weight": (d, out),
    }
    for i, sliding in enumerate(metadata.array(f"{arch}.attention.sliding_window_pattern")):
        hd = swa if sliding else full
        block = {
            "attn_norm": (d,), "attn_q": (d, n_head * hd), "attn_q_norm": (hd,),
            "attn_output": (n_head * hd, d), "post_attention_norm": (d,), "ffn_norm": (d,),
            "ffn_gate": (d, n_ff), "ffn_up": (d, n_ff), "ffn_down": (n_ff, d),
            "post_ffw_norm": (d,), "layer_output_scale": (1,),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def _check(
    checkpoint: Checkpoint, shapes: Shapes, stored: Mapping[str, Stored], unused: frozenset[str]
) -> None:
    """Hold the checkpoint against the tensors wanted, both ways."""
    for name, shape in shapes.items():
        if name != ROPE_FREQS:
            _check_tensor(checkpoint, stored, name, shape)
    if extra := stored.keys() - shapes.keys() - unused:
        tensor = stored[min(extra)]
        raise TensorError(f"{tensor.path}: {tensor.name} does not belong to this architecture")


def _check_tensor(
    checkpoint: Checkpoint, stored: Mapping[str, Stored], name: str, shape: tuple[int, ...]
) -> None:
    tensor = stored.get(name)
    if tensor is None:
        raise TensorError(f"{checkpoint.folder}: the tensor {names.to_hf(name)} is missing")
    if tensor.shape != shape[::-1]:
        raise TensorError(
            f"{tensor.path}: {tensor.name} has the shape {list(tensor.shape)}, "
            f"not {list(shape[::-1])}"
        )


def _item(
    name: str,
    shape: tuple[int, ...],
    stored: Mapping[str, Stored],
    found: CheckpointSettings,
    kind: Type | None,
) -> Item:
    if name == ROPE_FREQS:
        assert found.rotated is not None
        pairs = shape[0]
        turning = int(found.rotated * pairs)
        factors = np.repeat(np.array([1.0, _NEVER], np.float32), [turning, pairs - turning])
        return Item(Planned(name, Type.F32, shape), factors)
    tensor = stored[name]
    # A Gemma 3 norm computes 1 + w; readers of a GGUF multiply by what they find.
    shift = 1.0 if found.architecture == "gemma3" and name.endswith("norm.weight") else 0.0
    return Item(Planned(name, _type(name, shape, tensor, found, kind), shape), tensor, shift)


def _type(
    name: str, shape: tuple[int, ...], tensor: Stored, found: CheckpointSettings, kind: Type | None
) -> Type:
    """F32 for vectors and the router, which are small; else what is wanted, if its blocks fit."""
    own = tensor.type
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return Type.F32
    wanted = own if kind is None else kind
    per_layer = found.keys.get(f"{found.architecture}.embedding_length_per_layer_input", 0)
    assert isinstance(per_layer, int)
    return (
        wanted if unit(name, shape[0], per_layer) % GGML_QUANT_SIZES[wanted][0] == 0 else _FALLBACK
    )


def _main_type(items: list[Item]) -> Type:
    """The type of most of the bytes."""
    sizes = Counter[Type]()
    for item in items:
        sizes[item.planned.type] += item.planned.nbytes
    return sizes.most_common(1)[0][0]


def _fallbacks(items: list[Item], kind: Type | None) -> list[str]:
    """What is not of the type that was asked for, though it is a matrix."""
    count = sum(1 for item in items if kind == Type.Q8_0 and item.planned.type == _FALLBACK)
    block = GGML_QUANT_SIZES[Type.Q8_0][0]
    text = f"tensors that become F16, as their rows are not whole blocks of {block}: {count}"
    return [text] if count else []


# -- metadata --------------------------------------------------------------------------------


def _general(checkpoint: Checkpoint, found: CheckpointSettings) -> dict[str, Value]:
    name = os.fsencode(checkpoint.folder.resolve().name).decode("utf-8", "replace")
    return {
        "general.architecture": found.architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": 0,  # set when types are known; here for its place
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
