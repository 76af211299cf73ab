"""Importance matrices come back from both formats; anything else is a clear error."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from gemloom.errors import GemloomError
from gemloom.tools.quantization import imatrix_file
from gemloom.tools.quantization.imatrix_file import Importance, ImportanceMatrix


def matrix(seed: int = 0) -> ImportanceMatrix:
    rng = np.random.default_rng(seed)
    dense = Importance(rng.random((1, 64), np.float32) * 900, np.array([900]))
    experts = Importance(rng.random((4, 32), np.float32), np.array([500, 0, 3, 700]))
    experts.sums[1] = 0
    entries = {"blk.0.ffn_up.weight": dense, "blk.0.ffn_down_exps.weight": experts}
    return ImportanceMatrix(entries, ("text.txt",), 2, 512)


def test_gguf_comes_back_whole(tmp_path: Path) -> None:
    given, path = matrix(), tmp_path / "x.gguf"
    imatrix_file.write(path, given)
    read = imatrix_file.read(path)
    assert (read.datasets, read.chunks, read.chunk_size) == (("text.txt",), 2, 512)
    assert read.entries.keys() == given.entries.keys()
    for name, entry in read.entries.items():
        np.testing.assert_array_equal(entry.sums, given.entries[name].sums)
        np.testing.assert_array_equal(entry.counts, given.entries[name].counts)
    shapes = {t.name: list(t.shape) for t in GGUFReader(path).tensors}
    assert shapes["blk.0.ffn_down_exps.weight.in_sum2"] == [32, 4]
    assert shapes["blk.0.ffn_down_exps.weight.counts"] == [1, 4]


def test_dat_keeps_the_means(tmp_path: Path) -> None:
    given = matrix()
    imatrix_file.write(tmp_path / "x.dat", given)
    read = imatrix_file.read(tmp_path / "x.dat")
    assert (read.datasets, read.chunks) == (("text.txt",), 2)
    for name, entry in read.entries.items():
        np.testing.assert_allclose(
            entry.means.ravel(), given.entries[name].means.ravel(), rtol=1e-6
        )


def test_an_expert_that_nothing_came_to() -> None:
    """All its columns matter the same, and no expert's counts change another's means."""
    entry = matrix().entries["blk.0.ffn_down_exps.weight"]
    np.testing.assert_array_equal(entry.means[1], np.ones(32))
    np.testing.assert_allclose(entry.means[2], entry.sums[2] / 3, rtol=1e-6)


def test_the_first_dat_files(tmp_path: Path) -> None:
    """Written by hand: without chunks and the text's name, values being 3 calls' means, summed."""
    data = struct.pack("<ii4sii2f", 1, 4, b"name", 3, 2, 6.0, 1.5)
    (tmp_path / "x.dat").write_bytes(data)
    read = imatrix_file.read(tmp_path / "x.dat")
    np.testing.assert_allclose(read.entries["name"].means, [[2.0, 0.5]])
    assert (read.datasets, read.chunks, read.chunk_size) == ((), 0, 0)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["x.dat", "x.gguf"])
def test_values_that_are_no_squares(tmp_path: Path, bad: float, name: str) -> None:
    given = matrix()
    given.entries["blk.0.ffn_up.weight"].sums[0, 5] = bad
    imatrix_file.write(tmp_path / name, given)
    with pytest.raises(GemloomError, match=r"blk\.0\.ffn_up\.weight"):
        imatrix_file.read(tmp_path / name)


@given(data=st.data())
def test_damage_is_an_error_or_another_matrix(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut or changed anywhere: never another exception, nor memory for sizes that are not true."""
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / data.draw(st.sampled_from(["x.dat", "x.gguf"]))
    imatrix_file.write(path, matrix())
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        read = imatrix_file.read(path)
    except GemloomError:
        return
    for entry in read.entries.values():
        assert np.isfinite(entry.means).all()


def test_no_imatrix_in_a_model(tmp_path: Path) -> None:
    import tiny

    path = tmp_path / "model.gguf"
    path.write_bytes(tiny.gguf_bytes(tiny.VARIANTS["gemma3"]))
    with pytest.raises(GemloomError, match="no importance matrix"):
        imatrix_file.read(path)
