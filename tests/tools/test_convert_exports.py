"""Checkpoints as other people export them become the very file that a release becomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import checkpoints
import tiny
from gemloom.files import gguf, source
from gemloom.files.gguf import GGUF
from gemloom.text.tokenizer import Tokenizer
from gemloom.tools import convert
from tiny import VARIANTS

Files = dict[str, Any]
Arrays = dict[str, np.ndarray]


def converted(folder: Path) -> tuple[GGUF, convert.Conversion]:
    path = folder.parent / "out.gguf"
    made = convert.write(convert.plan(folder), path, force=True)
    return gguf.read(source.resolve(path)), made


def same(folder: Path, variant: str = "e2b") -> convert.Conversion:
    """Whether it becomes what the release becomes, but for what is told of."""
    file, made = converted(folder)
    expected = tiny.tensors(VARIANTS[variant])
    assert file.tensors.keys() == expected.keys()
    if variant == "e2b":  # norms of Gemma 3 lose a bit
        for name, value in expected.items():
            assert bytes(file.tensors[name].data()) == value.tobytes(), name
    Tokenizer(file.metadata)
    return made


# -- tensors ---------------------------------------------------------------------------------

EXTRA = {
    "model.audio_embedder.post_proj.weight": "audio",
    "model.vision_embedder.patch_embed.weight": "vision",
    "vision_tower.encoder.layers.0.q_proj.input_max": "vision",
    "model.multimodal_embedder.embedding.weight": "vision",
    "model.rotary_emb.inv_freq": "buffer",
    "model.language_model.rotary_emb_local.inv_freq": "buffer",
    "model.rotary_emb.full_attention_inv_freq": "buffer",
    "model.rotary_emb.sliding_attention_original_inv_freq": "buffer",
    "model.layers.3.self_attn.rotary_emb.inv_freq": "buffer",
    "model.embed_tokens.embed_scale": "buffer",
    "model.embed_tokens_per_layer.embed_scale": "buffer",
    "model.per_layer_input_scale": "buffer",
    "model.layers.0.router.scalar_root_size": "buffer",
    "model.position_ids": "buffer",
}


def test_towers_and_buffers_are_left_out_and_told(tmp_path: Path) -> None:
    variant = VARIANTS["e2b"]
    arrays = checkpoints.tensors(variant) | {n: np.ones(4, np.float32) for n in EXTRA}
    made = same(checkpoints.write(tmp_path / "in", arrays, checkpoints.files(variant)))
    kinds = list(EXTRA.values())
    for kind in set(kinds):
        (note,) = (note for note in made.notes if kind in note)
        assert note.endswith(f"left out: {kinds.count(kind)}")


@pytest.mark.parametrize(
    "prefix",
    [
        "model.", "model.language_model.", "language_model.model.", "language_model.",
        "model.model.", "_orig_mod.model.", "module.model.language_model._orig_mod.", "",
    ],
)  # fmt: skip
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    variant = VARIANTS["e2b"]
    arrays = checkpoints.tensors(variant, prefix)
    assert same(checkpoints.write(tmp_path / "in", arrays, checkpoints.files(variant))).notes == ()


def test_wrappers_within_layers(tmp_path: Path) -> None:
    variant = VARIANTS["e2b"]
    arrays = {
        name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."): value
        for name, value in checkpoints.tensors(variant).items()
    }
    same(checkpoints.write(tmp_path / "in", arrays, checkpoints.files(variant)))


@pytest.mark.parametrize("heads", [["lm_head.weight"], ["lm_head.weight", "model.lm_head.weight"]])
def test_a_head_that_is_tied_may_be_there_as_often_as_it_likes(
    tmp_path: Path, heads: list[str]
) -> None:
    variant = VARIANTS["e2b"]
    arrays = checkpoints.tensors(variant)
    arrays |= dict.fromkeys(heads, arrays["model.embed_tokens.weight"])
    made = same(checkpoints.write(tmp_path / "in", arrays, checkpoints.files(variant)))
    assert made.notes == (f"output (tied to embeddings) tensors left out: {len(heads)}",)


# -- parts and their index -------------------------------------------------------------------


def add_tensors(path: Path, extra: Arrays) -> None:
    from safetensors.numpy import load

    checkpoints.save(path, load(path.read_bytes()) | extra, "float32")


def test_tensors_that_are_in_no_index(tmp_path: Path) -> None:
    folder = checkpoints.checkpoint(tmp_path / "in", shards=2)
    first, second = sorted(folder.glob("model-*.safetensors"))
    add_tensors(first, {"ema.decay": np.ones(1, np.float32)})
    moved = next(
        name
        for name, part in json.loads((folder / "model.safetensors.index.json").read_text())[
            "weight_map"
        ].items()
        if part == second.name
    )
    add_tensors(first, {moved: np.zeros(3, np.float32)})  # a leftover: the index has the other
    assert same(folder).notes == ("unlisted (in no index) tensors left out: 1",)


# -- JSON files ------------------------------------------------------------------------------


def edited(tmp_path: Path, edit: Callable[[Files], Any], variant: str = "e2b") -> Path:
    files = checkpoints.files(VARIANTS[variant])
    edit(files)
    return checkpoints.write(tmp_path / "in", checkpoints.tensors(VARIANTS[variant]), files)


def test_byte_order_marks(tmp_path: Path) -> None:
    folder = checkpoints.checkpoint(tmp_path / "in", shards=2)
    marked = [*folder.glob("*.json"), *folder.glob("*.jinja")]
    assert len(marked) > 4
    for path in marked:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    same(folder)
    file, _ = converted(folder)
    template = file.metadata.string("tokenizer.chat_template")
    assert not template.startswith("\ufeff")


EDITS: dict[str, Callable[[Files], Any]] = {
    "no generation config": lambda f: f.pop("generation_config.json"),
    "no tokenizer config": lambda f: f.pop("tokenizer_config.json"),
    "torch_dtype": lambda f: f["config.json"].update(torch_dtype="bfloat16"),
    "dtype": lambda f: f["config.json"].update(dtype="float32"),
    "text_config is null": lambda f: f["config.json"].update(text_config=None),
    "all in text_config": lambda f: f.update(
        {"config.json": {"model_type": "gemma4", "text_config": f["config.json"]}}
    ),
    "a text_config without a model_type": lambda f: f.update(
        {
            "config.json": {
                "model_type": "gemma4",
                "text_config": {k: v for k, v in f["config.json"].items() if k != "model_type"},
            }
        }
    ),
    "special tokens as objects": lambda f: f["tokenizer_config.json"].update(
        bos_token={"content": "<bos>", "special": True}, eos_token={"content": "<eos>"},
        extra_special_tokens={"image_token": "<image|>"},
        additional_special_tokens=[{"content": "<image|>"}, "<audio|>"],
        added_tokens_decoder={"1": {"content": "<eos>", "special": True}},
    ),
    "special tokens that are null": lambda f: f["tokenizer_config.json"].update(
        bos_token=None, sep_token=None, pad_token=None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_configs(tmp_path: Path, name: str) -> None:
    same(edited(tmp_path, EDITS[name]))


# -- what ends an answer -----------------------------------------------------------------------


def test_ends_are_those_of_the_config_where_nothing_else_tells(tmp_path: Path) -> None:
    def edit(files: Files) -> None:
        del files["generation_config.json"]
        files["config.json"] |= {"eos_token_id": [1, 9]}

    file, made = converted(edited(tmp_path, edit))
    assert 9 in Tokenizer(file.metadata).eog
    assert made.notes == ()


def test_more_ends_than_a_gguf_has_places_for(tmp_path: Path) -> None:
    """First those that readers do not know by their text; of what is left over it is told."""
    variant = VARIANTS["e2b"]
    plain = Tokenizer(converted(edited(tmp_path / "plain", lambda f: None))[0].metadata)
    known = min(plain.eog - {plain.eos})

    def ends(*ids: int) -> tuple[frozenset[int], tuple[str, ...]]:
        ids_of = {"eos_token_id": [plain.eos, *ids]}
        folder = edited(tmp_path, lambda f: f.update({"generation_config.json": ids_of}))
        file, made = converted(folder)
        return Tokenizer(file.metadata).eog, made.notes

    assert variant.n_vocab > 30
    eog, notes = ends(known, 20, 21)
    assert eog >= {plain.eos, known, 20, 21}
    assert notes == ()
    eog, notes = ends(20, 21, known, 22, 22)
    assert eog >= {plain.eos, known, 20, 21}
    assert "no place for, which will not end an answer: 22" in " ".join(notes)
