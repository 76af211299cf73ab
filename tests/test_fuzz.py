"""Damaged files: whatever the bytes, a GemloomError or success; no crash, hang or memory blow-up.

How files are damaged and read is in ``surviving.py``.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import gemloom
import tiny
from gemloom.files import gguf
from gemloom.files.blob import Blob
from small_gguf import small
from surviving import assert_survives, damaged, linux_only

# -- targets --------------------------------------------------------------------------


def read_all(data: bytes) -> None:
    """Read a file of one part and in two, and look at everything that is in it."""
    files = [[memoryview(data)], [memoryview(data[:100]), memoryview(data[100:])]]
    for parts in files:
        file = gguf.read([Blob("fuzzed.gguf", parts)])
        for value in file.metadata.values():
            if isinstance(value, gguf.StringArray):
                assert len(list(value)) == len(value)
        for info in file.tensors.values():
            assert info.data().nbytes == info.nbytes


def load_and_run(data: bytes) -> None:
    """Everything up to logits: config, tokenizer, weights, cells, a forward pass."""
    with gemloom.load(data, context=64, chunk=8, threads=1) as model:
        model.generate([2, 5, 7], max_tokens=2, temperature=0)


def _not_ours(data: bytes) -> None:
    if damaged(small(), 7) == data:
        raise KeyError("case 7")


def _crash(data: bytes) -> None:
    if damaged(small(), 7) == data:
        os.abort()


def _hang(data: bytes) -> None:
    while damaged(small(), 7) == data:
        pass


def _hog(data: bytes) -> None:
    if damaged(small(), 7) == data:
        bytearray(1 << 40)


# -- tests ----------------------------------------------------------------------------


@linux_only
@pytest.mark.parametrize("variant", ["e2b", "26b", "gemma3"])
@pytest.mark.parametrize("cases", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_load_survives_damage(variant: str, cases: int, tmp_path: Path) -> None:
    data = tiny.gguf_bytes(tiny.VARIANTS[variant])
    large = 4096  # megabytes of address space: every thread reserves some
    refused = assert_survives(
        "test_fuzz:load_and_run", data, tmp_path, cases=cases, megabytes=large
    )
    assert refused > cases // 20


def test_reader_survives_damage(tmp_path: Path) -> None:
    refused = assert_survives("test_fuzz:read_all", small(), tmp_path)
    assert 300 < refused < 1000  # damage that is mostly noticed, but not all by the first bytes


@linux_only
@pytest.mark.parametrize(
    ("target", "sign"),
    [
        ("_not_ours", r"case 7: ended with 1\n(.|\n)*KeyError: 'case 7'"),
        ("_crash", rf"case 7: ended with -{signal.SIGABRT.value}\n"),
        ("_hang", rf"case 7: ended with -{signal.SIGPROF.value}\n"),
        ("_hog", r"case 7: ended with 1\n(.|\n)*MemoryError"),
    ],
)
def test_the_fuzzer_sees_what_it_looks_for(target: str, sign: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=sign):
        assert_survives(f"test_fuzz:{target}", small(), tmp_path, cases=9, seconds=1)
