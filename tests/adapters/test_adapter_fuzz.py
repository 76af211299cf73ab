"""Damaged adapter files: a GemloomError or a sound adapter, whatever the bytes."""

from pathlib import Path

import numpy as np

import tiny_lora
from gemloom.adapters.checking import check
from gemloom.adapters.reading import read
from gemloom.errors import AdapterError
from surviving import assert_survives, linux_only

BASE = tiny_lora.base("e2b")
ADAPTER = tiny_lora.lora("e2b", 2, only=r"blk\.[06]\.|token_embd")


def read_and_check(data: bytes) -> None:
    """What is accepted fits, is finite and has a finite norm."""
    report = check(read(data), BASE.config, BASE.shapes)
    for name, pair in report.lora.pairs.items():
        delta = tiny_lora.delta(pair)
        shape = BASE.shapes.get(name) or BASE.shapes["token_embd.weight"]
        assert delta.shape == shape[::-1], name
        assert np.isfinite(delta).all(), name
    assert np.isfinite(report.norm)


def read_pair(data: bytes) -> None:
    """A PEFT adapter whose two files lie in one, the config first; the seam is a zero byte."""
    config, seam, weights = data.partition(b"\0")
    if not seam or not config or not weights:
        raise AdapterError("no seam")
    read_and_check_pair(config, weights)


def read_and_check_pair(config: bytes, weights: bytes) -> None:
    report = check(read((config, weights)), BASE.config, BASE.shapes)
    assert np.isfinite(report.norm)


@linux_only
def test_gguf(tmp_path: Path) -> None:
    data = tiny_lora.gguf_bytes(ADAPTER)
    refused = assert_survives("test_adapter_fuzz:read_and_check", data, tmp_path, megabytes=512)
    assert 300 < refused <= 1000


@linux_only
def test_quantized_gguf(tmp_path: Path) -> None:
    wide = tiny_lora.lora("e2b", 32, only=r"blk\.[06]\.(ffn_up|attn_q)", dtype=np.float16)
    kinds = tiny_lora.GGMLQuantizationType
    data = tiny_lora.gguf_bytes(wide, type_of=lambda name: kinds.Q8_0)
    refused = assert_survives(
        "test_adapter_fuzz:read_and_check", data, tmp_path, cases=300, megabytes=512
    )
    assert 90 < refused <= 300


@linux_only
def test_peft(tmp_path: Path) -> None:
    data = b"\0".join(tiny_lora.peft_files(ADAPTER))
    refused = assert_survives("test_adapter_fuzz:read_pair", data, tmp_path, megabytes=512)
    assert 300 < refused <= 1000


@linux_only
def test_archives(tmp_path: Path) -> None:
    for kind in ("zip", "tar", "tar.gz"):
        data = tiny_lora.archive(tiny_lora.peft_files(ADAPTER), kind)
        refused = assert_survives(
            "test_adapter_fuzz:read_and_check", data, tmp_path, cases=300, megabytes=512
        )
        assert refused > 30, kind
