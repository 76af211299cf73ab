"""Parts of a cut file used in place, and pages let go of: the bytes stay the same, and nobody
else's memory is touched."""

import mmap
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gemloom
import tiny
from gemloom.files.blob import Blob, Blocks, Stream
from gemloom.files.source import resolve
from gemloom.ggml.joining import can_join, join

PAGE = mmap.PAGESIZE
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mremap")
quick = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)


def parts(folder: Path, data: bytes, cuts: list[int]) -> list[Path]:
    """The data in files, cut at these places."""
    paths = []
    for number, (first, last) in enumerate(pairwise([0, *sorted(cuts), len(data)])):
        paths.append(folder / f"part{number}")
        paths[-1].write_bytes(data[first:last])
    return paths


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


@linux
@given(
    pages=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    tail=st.integers(1, 3 * PAGE),
    span=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@quick
def test_what_is_cut_between_pages_is_joined(
    tmp_path_factory: pytest.TempPathFactory,
    pages: list[int],
    tail: int,
    span: tuple[float, float],
) -> None:
    cuts = [sum(pages[: i + 1]) * PAGE for i in range(len(pages))]
    data = noise(cuts[-1] + tail)
    paths = parts(tmp_path_factory.mktemp("parts"), data, cuts)
    [blob] = resolve([str(path) for path in paths])
    first, last = sorted(int(x * (len(data) - 1)) for x in span)
    found = join(blob, first, last - first + 1)
    assert found is not None
    view, start = found
    assert view[start : start + last - first + 1] == data[first : last + 1]
    blob.drop(0, blob.size)
    assert view[start : start + last - first + 1] == data[first : last + 1]
    assert blob.view(0, blob.size) == data


def test_what_cannot_be_joined(tmp_path: Path) -> None:
    data = noise(3 * PAGE)
    [odd] = resolve([str(path) for path in parts(tmp_path, data, [PAGE + 8])])
    buffers = Blob("buffers", [memoryview(data)[:PAGE], memoryview(data)[PAGE:]])
    blocks = Blocks("blocks", len(data), PAGE, lambda i: data[i * PAGE : (i + 1) * PAGE])
    stream = Stream("stream", iter([memoryview(data)]))
    for blob in (odd, buffers, blocks, stream):
        assert not can_join(blob, 0, 2 * PAGE) and join(blob, 0, 2 * PAGE) is None
        blob.drop(0, 2 * PAGE)
    assert blocks.fetched == 0
    for blob in (odd, buffers, blocks, stream):
        assert blob.view(0, len(data)) == data


@given(first=st.integers(0, 5 * PAGE), length=st.integers(0, 5 * PAGE))
@quick
def test_dropped_pages_come_again(
    tmp_path_factory: pytest.TempPathFactory, first: int, length: int
) -> None:
    data = noise(5 * PAGE + 77)
    path = tmp_path_factory.mktemp("file") / "model"
    path.write_bytes(data)
    with path.open("rb") as file:
        file.seek(first % 100)  # mapped from a position on
        [blob] = resolve(file)
    assert blob.view(0, blob.size) == data[first % 100 :]
    length = min(length, max(0, blob.size - first))
    blob.drop(first, length)
    assert blob.view(0, blob.size) == data[first % 100 :]


def test_what_others_mapped_is_not_dropped() -> None:
    theirs = mmap.mmap(-1, 2 * PAGE)
    theirs[:4] = b"mine"
    [blob] = resolve(theirs)
    blob.drop(0, blob.size)
    assert theirs[:4] == b"mine"


@linux
def test_a_model_cut_between_pages_is_used_in_place(tmp_path: Path) -> None:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    ids = [2, *range(10, 40)]
    cuts = [place for place in range(PAGE, len(data), 16 * PAGE)]
    paths = [str(path) for path in parts(tmp_path, data, cuts)]
    whole = tmp_path / "whole.gguf"
    whole.write_bytes(data)
    options = {"threads": 1, "kernels": "plain", "context": 64}
    with gemloom.load(str(whole), **options) as one, gemloom.load(paths, **options) as cut:
        assert one.memory()["mapped"] == cut.memory()["mapped"] > 0
        np.testing.assert_array_equal(one.logits(ids), cut.logits(ids))
