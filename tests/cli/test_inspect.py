"""``gemloom inspect``: what it says of types, parts, tokens and bytes, and how two files differ."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

import tiny
from command_line import call, fine, write
from gemloom.tools.quantization.parts import PARTS, part


def facts(*args: str | Path) -> dict[str, Any]:
    return dict(json.loads(fine("inspect", *args, "--json").stdout))


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_types_and_parts_add_up(tmp_path: Path, variant: str) -> None:
    """Against gguf's own reader: every group's tensors, weights and bytes, and all of them once."""
    path = write(tmp_path, variant, types="q8_0")
    told = facts(path)["tensors"]
    tensors = GGUFReader(path).tensors
    for label, name_of in (
        ("type", lambda t: t.tensor_type.name),
        ("part", lambda t: part(t.name)),
    ):
        groups = {group[label]: group for group in told[f"{label}s"]}
        assert set(groups) == {name_of(t) for t in tensors}
        for name, group in groups.items():
            own = [t for t in tensors if name_of(t) == name]
            weights = sum(int(t.n_elements) for t in own)
            size = sum(int(t.n_bytes) for t in own)
            assert (group["count"], group["weights"], group["bytes"]) == (len(own), weights, size)
            assert group["bits"] == pytest.approx(8 * size / weights, abs=1e-3)
        assert sum(group["bytes"] for group in groups.values()) == told["bytes"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "embeddings"),
        ("per_layer_token_embd.weight", "per-layer table"),
        ("per_layer_model_proj.weight", "per-layer inputs"),
        ("blk.3.inp_gate.weight", "per-layer inputs"),
        ("blk.3.proj.weight", "per-layer inputs"),
        ("output.weight", "head"),
        ("output_norm.weight", "norms and scales"),
        ("blk.3.attn_q_norm.weight", "norms and scales"),
        ("blk.3.attn_output.weight", "attention"),
        ("blk.3.ffn_down.weight", "feed-forward"),
        ("blk.3.ffn_down_exps.weight", "experts"),
        ("blk.3.ffn_gate_inp.weight", "experts"),
        ("v.blk.3.attn_q.weight", "other modalities"),
        ("something.else", "other"),
    ],
)
def test_parts(name: str, expected: str) -> None:
    assert part(name) == expected
    assert expected in PARTS


def test_every_tensor_of_a_model_has_a_part() -> None:
    for variant in tiny.VARIANTS.values():
        assert "other" not in {part(name) for name in tiny.tensors(variant)}


def test_tokenizer_facts(tmp_path: Path) -> None:
    path = write(tmp_path)
    keys = tiny.metadata(tiny.VARIANTS["e2b"])
    told = facts(path)["tokenizer"]
    texts = keys["tokenizer.ggml.tokens"]
    assert told["size"] == len(texts) == sum(told["types"].values())
    assert told["types"]["byte"] == 256
    assert told["merges"] == len(keys["tokenizer.ggml.merges"])
    for name, token in told["special"].items():
        assert token["id"] == keys[f"tokenizer.ggml.{name}_token_id"]
        assert token["text"] == texts[token["id"]]
    assert told["special"]["bos"]["text"] == "<bos>"


def test_a_special_token_that_is_none(tmp_path: Path) -> None:
    def beyond(keys: dict[str, Any], _: Any) -> None:
        keys["tokenizer.ggml.mask_token_id"] = 10**6

    told = facts(write(tmp_path, edit=beyond))["tokenizer"]["special"]["mask"]
    assert told == {"id": 10**6, "text": None}


def test_checksum(tmp_path: Path) -> None:
    path = write(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts(path, "--checksum")["sha256"] == {str(path): digest}
    assert f"\n{digest}  {path}\n" in fine("inspect", path, "--checksum").stdout
    assert "sha256" not in facts(path)


def test_template_is_printed_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path)
    template = tiny.metadata(tiny.VARIANTS["e2b"])["tokenizer.chat_template"]
    assert fine("inspect", path, "--template").stdout.rstrip("\n") == template.rstrip("\n")
    assert facts(path, "--template") == {"chat_template": template}


def test_no_template(tmp_path: Path) -> None:
    def without(keys: dict[str, Any], _: Any) -> None:
        del keys["tokenizer.chat_template"]

    result = call("inspect", write(tmp_path, edit=without), "--template")
    assert result.exit_code == 1
    assert "tokenizer.chat_template is missing" in result.stderr


# -- differences -----------------------------------------------------------------------------

Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def difference(folder: Path, edit: Edit, **forms: Any) -> dict[str, Any]:
    (folder / "other").mkdir()
    one = write(folder)
    other = write(folder / "other", edit=edit, **forms)
    return facts(one, "--diff", other)


def unchanged(keys: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    pass


def test_the_same_file(tmp_path: Path) -> None:
    told = difference(tmp_path, unchanged)
    assert told["same"] is True
    text = fine("inspect", tmp_path / "e2b.gguf", "--diff", tmp_path / "e2b.gguf").stdout
    assert "byte for byte" in text


def test_metadata_that_differs(tmp_path: Path) -> None:
    def edit(keys: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        keys["general.name"] = "another"
        keys["new.key"] = 1
        del keys["general.file_type"]
        keys["tokenizer.ggml.scores"] = [0.5] * len(keys["tokenizer.ggml.scores"])

    told = difference(tmp_path, edit)
    assert told["same"] is False
    assert told["metadata"]["added"] == ["new.key"]
    assert told["metadata"]["removed"] == ["general.file_type"]
    changed = {
        change["key"]: (change["from"], change["to"]) for change in told["metadata"]["changed"]
    }
    assert changed["general.name"] == ("tiny e2b", "another")
    assert changed.keys() == {"general.name", "tokenizer.ggml.scores"}
    assert not any(told["tensors"].values())


def test_tensors_that_differ(tmp_path: Path) -> None:
    def edit(keys: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        del weights["blk.1.attn_norm.weight"]
        weights["blk.0.extra.weight"] = np.ones(3, np.float32)
        weights["blk.0.attn_norm.weight"] = np.ones(5, np.float32)
        last = weights["blk.9.ffn_down.weight"].copy()
        last[-1, -1] += 1
        weights["blk.9.ffn_down.weight"] = last

    told = difference(tmp_path, edit)["tensors"]
    assert told["removed"] == ["blk.1.attn_norm.weight"]
    assert told["added"] == ["blk.0.extra.weight"]
    assert told["changed"] == [{"name": "blk.0.attn_norm.weight", "from": "F32 96", "to": "F32 5"}]
    assert told["bytes"] == ["blk.9.ffn_down.weight"]


def test_types_that_differ(tmp_path: Path) -> None:
    told = difference(tmp_path, unchanged, types="q8_0")["tensors"]
    assert {change["to"].split()[0] for change in told["changed"]} == {"Q8_0"}
    assert not told["removed"]
    assert not told["added"]
    assert not told["bytes"]


@pytest.mark.parametrize("more", [["--template", "--diff", "x"], ["--template", "--tensors"]])
def test_what_goes_not_together(tmp_path: Path, more: list[str]) -> None:
    assert call("inspect", write(tmp_path), *more).exit_code == 2
