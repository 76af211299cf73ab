"""Checkpoints that transformers itself saves, converted: its logits, its ids; and tokenizer.model.

Models are random, in bfloat16, in several files. The GGUF is in F32, which holds bfloat16 exactly:
ggml rounds activations to bfloat16 where weights are.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

import checkpoints
import gemloom
import tiny_vocab
from gemloom.files import gguf, source
from gemloom.files.gguf import GGUF
from gemloom.text.tokenizer import Tokenizer
from gemloom.tools import convert
from tiny import VARIANTS, Variant
from vocabularies import SPOTS

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf
import torch
import transformers
from same_model import PROMPT_SEED, SEED, assert_same_model
from sentencepiece import sentencepiece_model_pb2 as sp
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer

pytestmark = pytest.mark.reference

variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def save_tokenizer(folder: Path, arch: str) -> None:
    entries = checkpoints.tokenizer(arch)
    model = entries["model"]
    saved = GemmaTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    saved.add_tokens([
        transformers.AddedToken(t["content"], special=t["special"], normalized=False)
        for t in entries["added_tokens"]
    ])  # fmt: skip
    saved.chat_template = tiny_vocab.metadata(arch)["tokenizer.chat_template"]
    saved.save_pretrained(folder)


def prompt(n_vocab: int, n: int = 40) -> list[int]:
    ids = np.random.RandomState(PROMPT_SEED).randint(n_vocab, size=n)
    return [2, *ids[1:].tolist()]


def reference_logits(net: Any, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        out = net.float().eval()(input_ids=torch.tensor([ids]), use_cache=False)
    return out.logits[0].numpy()


def converted(folder: Path) -> Path:
    path = folder.parent / "out.gguf"
    convert.write(convert.plan(folder, Type.F32), path)
    return path


def our_logits(path: Path, ids: list[int]) -> np.ndarray:
    with closing(gemloom.load(path, kv_type="f32", context=64, threads=1)) as model:
        return model.logits(ids, rows="all")


@variants
def test_saved_by_transformers(tmp_path: Path, variant: Variant) -> None:
    folder, ids = tmp_path / "in", prompt(variant.n_vocab)
    net = hf.model.__wrapped__(variant, SEED).to(torch.bfloat16)
    net.save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    save_tokenizer(folder, variant.arch)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same_model(our_logits(converted(folder), ids), reference_logits(again, ids))


@variants
@pytest.mark.parametrize("form", ["original", "per_layer"])
def test_read_by_transformers(tmp_path: Path, variant: Variant, form: str) -> None:
    """What the tests without torch take for a checkpoint is one."""
    folder, ids = tmp_path / "in", prompt(variant.n_vocab)
    checkpoints.write(folder, checkpoints.tensors(variant), checkpoints.files(variant, form))
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same_model(our_logits(converted(folder), ids), reference_logits(net, ids))


def randomized(net: Any) -> Any:
    """Weights such that everything matters: norms that are not all alike, no scalar of 1."""
    torch.manual_seed(7)
    with torch.no_grad():
        scalars = [(n, value) for n, value in net.named_buffers() if n.endswith("layer_scalar")]
        for name, value in [*net.named_parameters(), *scalars]:
            if value.dtype.is_floating_point and value.dim() == 1 and "language_model" in name:
                value += 0.2 * torch.randn_like(value)
            elif value.dim() > 1 and "language_model" in name:
                value.normal_(0, value.shape[-1] ** -0.5)
    return net


def text_config(kind: str, **more: Any) -> dict[str, Any]:
    variant = VARIANTS["gemma3" if kind == "gemma3" else "e2b"]
    return {
        "vocab_size": variant.n_vocab, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "sliding_window": 16, **more,
    }  # fmt: skip


VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
WHOLE: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": text_config("gemma3", query_pre_attn_scalar=32),
        "vision_config": VISION | {"image_size": 28, "patch_size": 14},
    },
    "gemma4": {
        "text_config": text_config(
            "gemma4", global_head_dim=64, hidden_size_per_layer_input=32,
            vocab_size_per_layer_input=VARIANTS["e2b"].n_vocab, final_logit_softcapping=30.0,
        ),
        "vision_config": VISION | {"num_key_value_heads": 2, "head_dim": 16,
                                   "position_embedding_size": 64},
        "audio_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "output_proj_dims": 64, "subsampling_conv_channels": [8, 4]},
    },
    "gemma4_unified": {
        "text_config": text_config(
            "gemma4", global_head_dim=64, num_global_key_value_heads=1, attention_k_eq_v=True,
            final_logit_softcapping=30.0,
        ),
        "vision_config": {"mm_embed_dim": 64, "mm_posemb_size": 32, "output_proj_dims": 64},
        "audio_config": {"audio_embed_dim": 64},
    },
}  # fmt: skip
CLASSES = {
    "gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration"),
    "gemma4": ("Gemma4Config", "Gemma4ForConditionalGeneration"),
    "gemma4_unified": ("Gemma4UnifiedConfig", "Gemma4UnifiedForConditionalGeneration"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_text_part_of_a_whole(tmp_path: Path, kind: str) -> None:
    """Models that see and hear: the text part alone is converted, the rest is told of."""
    config, model = (getattr(transformers, name) for name in CLASSES[kind])
    net, folder = randomized(model(config(**WHOLE[kind]))), tmp_path / "in"
    net.save_pretrained(folder)
    arch = "gemma3" if kind == "gemma3" else "gemma4"
    save_tokenizer(folder, arch)
    assert "vision tensors left out" in " ".join(convert.plan(folder).notes)
    ids = prompt(300)
    assert_same_model(our_logits(converted(folder), ids), reference_logits(net, ids))


@pytest.mark.parametrize("kind", ["Gemma4Assistant", "Gemma4UnifiedAssistant"])
@pytest.mark.parametrize("ordered", [False, True])
def test_assistant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, ordered: bool
) -> None:
    """Every tensor of a drafter, bit by bit; nothing here runs it."""
    for name in ("Gemma4TextConfig", "Gemma4UnifiedTextConfig"):
        # transformers 5.23 refuses to build a model none of whose layers has K/V of its own
        modes = property(lambda self: ["reuse"] * self.num_hidden_layers)
        monkeypatch.setattr(getattr(transformers, name), "kv_sharing_modes", modes)
    text = text_config("gemma4", num_hidden_layers=4, global_head_dim=64)
    text["layer_types"] = ["sliding_attention"] * 3 + ["full_attention"]
    if kind == "Gemma4Assistant":
        text |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        text |= {"model_type": "gemma4_text"}
    else:
        text |= {"model_type": "gemma4_unified_text"}
    text["vocab_size"] = VARIANTS["e2b"].n_vocab
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, backbone_hidden_size=96, use_ordered_embeddings=ordered, num_centroids=8
    )
    net, folder = getattr(transformers, f"{kind}ForCausalLM")(config), tmp_path / "in"
    net.save_pretrained(folder)
    save_tokenizer(folder, "gemma4")
    file = gguf.read(source.resolve(converted(folder)))
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    for name, info in file.tensors.items():
        ours = np.frombuffer(info.data(), np.float32).reshape(info.shape[::-1])
        if name == "rope_freqs.weight":
            assert ours.tolist() == [1.0] * 8 + [np.float32(1e30)] * 24
        elif name.startswith("nextn."):
            assert np.array_equal(ours, state[name.removeprefix("nextn.")])
        else:
            assert np.array_equal(ours, state[checkpoints.hf_name(name)])
    unused = {
        "lm_head.weight",
        "masked_embedding.centroids.weight",
        "masked_embedding.token_ordering",
    }
    assert len(file.tensors) - 1 == len(state.keys() - unused)


@pytest.mark.parametrize("arch", ["gemma4", "gemma3"])
def test_ids_equal_transformers(tmp_path: Path, arch: str) -> None:
    variant = VARIANTS["e2b" if arch == "gemma4" else "gemma3"]
    folder = checkpoints.write(
        tmp_path / "in", checkpoints.tensors(variant), {"config.json": checkpoints.config(variant)}
    )
    save_tokenizer(folder, arch)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer(gguf.read(source.resolve(converted(folder))).metadata)
    for text in SPOTS:
        if tiny_vocab.SPACE not in text:  # whose runs they look for before spaces become U+2581
            assert (
                ours.encode(text, special=True)
                == theirs(text, add_special_tokens=False)["input_ids"]
            )
    messages = [{"role": "user", "content": "hello world"}]
    assert ours.chat_template == theirs.chat_template
    assert theirs.apply_chat_template(messages, tokenize=False)


def sentencepiece_model(folder: Path) -> None:
    """Gemma 3's tiny vocabulary as a SentencePiece file, and what was added to it."""
    model = sp.ModelProto()
    model.trainer_spec.model_type = sp.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.pad_id, model.trainer_spec.eos_id = 0, 1
    model.trainer_spec.bos_id, model.trainer_spec.unk_id = 2, 3
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    added = {}
    for i, (text, score, kind) in enumerate(tiny_vocab.entries("gemma3")):
        text = text.replace(" ", tiny_vocab.SPACE)
        type_ = 2 if text == "<unk>" else int(kind)
        model.pieces.add(piece=text, score=0.0 if kind == 4 else score, type=type_)
        if kind in (3, 4):
            added[str(i)] = {"content": text, "special": kind == 3}
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    config = {
        "added_tokens_decoder": added,
        "bos_token": "<bos>",
        "eos_token": {"content": "<eos>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_vocabulary_of_sentencepiece(tmp_path: Path) -> None:
    folder = checkpoints.checkpoint(tmp_path / "1" / "in", "gemma3")
    other = tmp_path / "2" / "in"
    shutil.copytree(folder, other)
    (other / "tokenizer.json").unlink()
    sentencepiece_model(other)

    def tokenizer_keys(folder: Path) -> dict[str, Any]:
        file: GGUF = gguf.read(source.resolve(converted(folder)))
        return {
            key: list(value) if hasattr(value, "__len__") else value
            for key, value in file.metadata.items() if key.startswith("tokenizer.")
        }  # fmt: skip

    assert tokenizer_keys(other) == tokenizer_keys(folder)


def test_a_broken_sentencepiece_file(tmp_path: Path) -> None:
    folder = checkpoints.checkpoint(tmp_path, "gemma3")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"no")
    with pytest.raises(gemloom.errors.TokenizerError, match=r"tokenizer\.model: no SentencePiece"):
        convert.plan(folder)
