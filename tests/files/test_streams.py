"""Parts that arrive while a model is loaded: the same model, little memory, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import subprocess
import sys
import threading
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gemloom
import tiny
from conftest import prompt
from gemloom.errors import FormatError, GemloomError, OptionError, SourceError
from gemloom.files import gguf, source
from gemloom.files.blob import Blob, Stream
from gemloom.ggml.arena import Arena
from gemloom.ggml.device import Device
from gemloom.kernels import packing
from gemloom.kernels.library import supported
from quantized_files import in_type
from small_gguf import SMALL, blob, cut, part, plain, small

IDS = prompt(20)
KINDS = (None, "Q4_0", "Q4_K")  # where the processor has such kernels, the last two are packed


@cache
def model(types: str | None = None) -> bytes:
    plain = tiny.gguf_bytes(tiny.VARIANTS["gemma3_scaled"].wide())
    return in_type(plain, types) if types else plain


def load(given: Any, **options: Any) -> gemloom.Model:
    return gemloom.load(given, threads=1, context=64, **options)


@cache
def expected(types: str | None) -> np.ndarray:
    with load(model(types)) as loaded:
        return loaded.logits(IDS)


def in_parts(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def taken(parts: Iterable[bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that is in a stream, its tensors in the order of the file."""
    file = gguf.read([Stream("small.gguf", (memoryview(item) for item in parts))])
    order = sorted(file.tensors.values(), key=lambda info: info.offset)
    tensors = {
        info.name: (info.type, info.shape, b"".join(map(bytes, info.pieces()))) for info in order
    }
    file.finish()
    return plain(gguf.GGUF(file.name, file.metadata, {}))[0], tensors


# -- any cut is the same model --------------------------------------------------------


def test_every_cut_in_two_is_the_same_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "first_look", 64)  # so that the header is looked at many times
    whole = plain(gguf.read([blob(SMALL)]))
    for place in range(len(SMALL) + 1):
        assert taken(cut(SMALL, [place])) == whole
    assert taken(in_parts(SMALL, 1)) == whole


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.integers(0, 1 << 22), max_size=60))
@example(None, [])
@example("Q4_0", [0, 0, 3, 4, 5])
@example("Q4_K", [1 << 14, 1 << 15])
def test_any_cut_gives_the_same_logits(types: str | None, places: list[int]) -> None:
    with load(iter(cut(model(types), places))) as loaded:
        assert loaded.memory()["mapped"] == 0
        assert np.array_equal(loaded.logits(IDS), expected(types))


@pytest.mark.parametrize("types", KINDS)
@pytest.mark.parametrize("kernels", ["auto", "ggml", "plain"])
def test_parts_of_every_kind_and_size(types: str | None, kernels: str) -> None:
    data = model(types)
    with load(data, kernels=kernels) as loaded:
        wanted = loaded.logits(IDS)
    for size in (4093, 1 << 17, len(data)):
        for kind in (bytes, bytearray, lambda item: np.frombuffer(item, np.uint8)):
            with load(map(kind, in_parts(data, size)), kernels=kernels) as loaded:
                assert np.array_equal(loaded.logits(IDS), wanted)


@pytest.mark.parametrize("types", KINDS[1:])
def test_a_matrix_is_packed_piece_by_piece_by_all_threads(
    types: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not supported():
        pytest.skip("this CPU has no kernels of our own")
    monkeypatch.setattr(packing, "_PIECE", 1)  # bytes: so many rows as are packed together
    for mmap in (True, False):
        with gemloom.load(
            in_parts(model(types), 50_000), threads=3, context=64, mmap=mmap
        ) as loaded:
            assert loaded.memory()["packed"] > len(model(types)) // 2
            assert np.array_equal(loaded.logits(IDS), expected(types))


def test_tensors_in_any_order_and_some_not_used() -> None:
    def backwards(metadata: object, tensors: dict[str, np.ndarray]) -> None:
        items = list(tensors.items())[::-1]
        tensors.clear()
        tensors["v.of_another_part"] = np.ones((64, 64), np.float32)
        tensors.update(items)
        tensors["a.of_another_part"] = np.ones((64, 64), np.float32)

    variant = tiny.VARIANTS["gemma3_scaled"]
    with load(tiny.gguf_bytes(variant)) as loaded:
        wanted = loaded.logits(IDS)
    with load(in_parts(tiny.gguf_bytes(variant, edit=backwards), 10_000)) as loaded:
        assert np.array_equal(loaded.logits(IDS), wanted)


def test_state_goes_from_a_mapped_model_to_a_streamed_one() -> None:
    with load(model()) as first, load(in_parts(model(), 999)) as second:
        first.generate(IDS, max_tokens=4, temperature=0)
        assert second.load_state(first.save_state()) > len(IDS)


@contextmanager
def writing(pipe: Any) -> Iterator[None]:
    """Put the model into a pipe, meanwhile."""

    def write() -> None:
        with open(pipe, "wb") if isinstance(pipe, Path) else pipe as file:
            file.write(model())

    writer = threading.Thread(target=write)
    writer.start()
    yield
    writer.join()


def test_pipes_and_decompressors_are_streamed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_PIECE", 5000)
    code = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
    command = [sys.executable, "-c", code]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child, writing(child.stdin), load(child.stdout) as loaded:
        assert loaded.memory()["mapped"] == 0
        assert np.array_equal(loaded.logits(IDS), expected(None))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with writing(pipe), load(pipe) as loaded:
        assert loaded.memory()["mapped"] == 0
        assert np.array_equal(loaded.logits(IDS), expected(None))
    with load(io.BytesIO(model())) as loaded:
        assert loaded.memory()["mapped"] == 0
        assert np.array_equal(loaded.logits(IDS), expected(None))


def test_where_bytes_are_wanted_in_any_order_parts_are_collected() -> None:
    file = gguf.read(source.resolve(in_parts(SMALL, 50)))
    assert plain(file) == plain(gguf.read([blob(SMALL)]))
    assert plain(file) == plain(file)  # again, and backwards


# -- memory ---------------------------------------------------------------------------


class Parts:
    """Parts of a model, and how many of them are still held whenever the next is asked for."""

    def __init__(self, types: str | None) -> None:
        self.types = types
        self.made: list[weakref.ref[np.ndarray]] = []
        self.counts: list[int] = []

    def alive(self) -> int:
        return sum(part() is not None for part in self.made)

    def __iter__(self) -> Iterator[np.ndarray]:
        for item in in_parts(model(self.types), 8192):
            self.counts.append(self.alive())
            part = np.frombuffer(item, np.uint8).copy()
            self.made.append(weakref.ref(part))
            yield part
            del part

    async def __aiter__(self) -> AsyncIterator[np.ndarray]:
        for item in self:
            yield item
            del item


@pytest.mark.parametrize("types", KINDS)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_part_is_let_go_of_before_the_next_is_asked_for(
    types: str | None, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream, "first_look", 4096)
    parts = Parts(types)
    with load_async(parts) if asynchronous else load(iter(parts)):
        assert len(parts.counts) > 50
        header = 8  # parts that the header takes; they wait until it has been read
        assert max(parts.counts[header:]) == 0
        assert parts.alive() == 0


@pytest.mark.parametrize("size", [1 << 14, 1 << 18])
def test_peak_memory_is_a_part_and_the_largest_tensor(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what Python allocates: ggml's own memory, where the weights go, is not in it."""
    monkeypatch.setattr(Stream, "first_look", 1 << 15)
    data = tiny.gguf_bytes(tiny.VARIANTS["31b"])
    file = gguf.read([blob(data)])
    largest = max(info.nbytes for info in file.tensors.values())
    header = min(info.offset for info in file.tensors.values())
    usual = _peak(lambda: load(Blob("x", [memoryview(data)]).view(0, len(data))))
    streamed = _peak(lambda: load(in_parts(data, size)))
    assert len(data) > 8 * (size + largest)  # or the next line says little
    assert streamed < usual + size + largest + 4 * header + 100_000


def _peak(make: Callable[[], gemloom.Model]) -> int:
    make().close()  # whatever is imported or kept for good
    tracemalloc.start()
    try:
        make().close()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- what is wrong --------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every Device and Arena that the test makes; none may be left open, nor a thread be left."""
    monkeypatch.setattr(Stream, "first_look", 1 << 15)  # so that weights are under way soon
    made: list[Any] = []
    threads = threading.active_count()
    for kind in (Device, Arena):
        init = kind.__init__

        def record(self: Any, *args: Any, _init: Any = init, **named: Any) -> None:
            _init(self, *args, **named)
            made.append(self)

        monkeypatch.setattr(kind, "__init__", record)
    yield made
    gc.collect()
    assert made
    assert not any(item._closers for item in made)
    assert threading.active_count() <= threads


def refusal(given: Any) -> tuple[type[GemloomError], str]:
    with pytest.raises(GemloomError) as caught:
        load(given)
    message = str(caught.value)
    assert "\n" not in message
    return type(caught.value), message


def test_a_stream_that_ends_early(opened: list[Any]) -> None:
    data = model()
    file = gguf.read([blob(data)])
    for info in file.tensors.values():
        for end in (info.offset, info.offset + info.nbytes - 1):
            kind, message = refusal(in_parts(data[:end], 10_007))
            assert kind is FormatError
            assert f"the stream ended after {end:,}: a part is missing" in message


def test_a_stream_that_ends_in_its_header() -> None:
    for end in (4, 20, 5000):
        assert "truncated: the file ends in its" in refusal(in_parts(model()[:end], 999))[1]
    for nothing in ([], [b"", b""]):
        assert refusal(iter(nothing)) == (
            FormatError,
            "<list_iterator of parts>: not a GGUF file: it is empty; are its parts in order?",
        )


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_part_that_is_missing_or_there_twice(data: st.DataObject) -> None:
    parts = list(in_parts(model(), 100_000))
    index = data.draw(st.integers(1, len(parts) - 2))
    assert "a part is missing" in refusal(iter(parts[:index] + parts[index + 1 :]))[1]
    assert "a part too many" in refusal(iter(parts[:index] + parts[index - 1 :]))[1]


def test_too_much_data(opened: list[Any]) -> None:
    for more in (b"\0" * 32, b"GGUF", model()):
        kind, message = refusal(iter([model(), more]))
        assert kind is FormatError
        assert "goes on after its last tensor" in message
    assert "a part too many" in refusal(iter([model() + b"\0"]))[1]


def test_padding_at_the_end_may_be_there_or_not() -> None:
    whole = small()
    bare = whole[: max(i.offset + i.nbytes for i in gguf.read([blob(whole)]).tensors.values())]
    assert len(whole) - len(bare) == 4
    for end in range(len(bare), len(whole) + 1):
        assert taken([whole[:end]]) == taken([bare])


def test_parts_in_the_wrong_order() -> None:
    parts = list(in_parts(model(), 100_000))
    kind, message = refusal(iter([*parts[1:], parts[0]]))
    assert kind is FormatError
    assert message.endswith("are its parts in order?")


def test_one_file_of_a_split_model() -> None:
    for number in (0, 1):
        file = part(number, 2, f"t{number}", 2)
        kind, message = refusal(iter([bytes(file.view(0, file.size))]))
        assert kind is FormatError
        assert "one part of 2" in message


def test_tensors_that_overlap() -> None:
    data = bytearray(SMALL)
    file = gguf.read([blob(SMALL)])
    start = min(info.offset for info in file.tensors.values())
    at = data.index(b"four") + 4 + 4 + 4 * 8 + 4  # name, dimensions, shape, type: its offset
    relative = file.tensors["four"].offset - start
    assert int.from_bytes(data[at : at + 8], "little") == relative
    data[at : at + 8] = (0).to_bytes(8, "little")
    with pytest.raises(FormatError, match="overlap"):
        taken([bytes(data)])


@pytest.mark.parametrize("wrong", ["text", 5, None, ["a"]])
def test_parts_that_are_no_bytes(wrong: Any, opened: list[Any]) -> None:
    kind, message = refusal(iter([model()[:100_000], wrong]))
    assert kind is OptionError
    assert f"part 2 is of {type(wrong).__name__}" in message


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_iterator_that_fails(after: int, opened: list[Any]) -> None:
    def parts() -> Iterator[bytes]:
        yield from list(in_parts(model(), 100_000))[:after]
        raise ConnectionResetError("gone")

    if not after:
        with load(model()):
            pass  # so that the fixture has something to look at
    kind, message = refusal(parts())
    assert kind is SourceError
    assert message.startswith(f"<generator of parts>: part {after + 1} did not come")
    assert message.endswith(f"after {after * 100_000:,} bytes: ConnectionResetError: gone")


def test_an_iterator_that_was_closed(opened: list[Any]) -> None:
    parts = in_parts(model(), 100_000)
    with load(model()):
        next(parts)
        parts.close()
    assert "it is empty" in refusal(parts)[1]


def test_ctrl_c_while_a_part_is_awaited(opened: list[Any]) -> None:
    def parts() -> Iterator[bytes]:
        yield model()[:100_000]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(parts())


# -- asynchronous ---------------------------------------------------------------------


async def awaited(data: bytes, size: int, pause: float = 0) -> AsyncIterator[bytes]:
    for item in in_parts(data, size):
        await asyncio.sleep(pause)
        yield item


def load_async(given: Any) -> gemloom.Model:
    return asyncio.run(gemloom.load_async(given, threads=1, context=64))


@settings(max_examples=10, deadline=None)
@given(st.integers(20_000, 1 << 21))
def test_an_asynchronous_iterator(size: int) -> None:
    with load_async(awaited(model(), size)) as loaded:
        assert np.array_equal(loaded.logits(IDS), expected(None))


def test_any_other_source_without_holding_up_the_loop() -> None:
    with load_async(model()) as loaded:
        assert np.array_equal(loaded.logits(IDS), expected(None))
    with load_async(in_parts(model(), 99_999)) as loaded:
        assert np.array_equal(loaded.logits(IDS), expected(None))


def test_the_loop_goes_on_while_parts_are_loaded() -> None:
    async def both() -> int:
        ticks, given = 0, awaited(model(), 100_000, pause=0.002)
        loading = asyncio.ensure_future(gemloom.load_async(given, threads=1, context=64))
        while not loading.done():
            await asyncio.sleep(0.001)
            ticks += 1
        (await loading).close()
        return ticks

    assert asyncio.run(both()) >= 10


def test_an_asynchronous_iterator_that_fails(opened: list[Any]) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield model()[:100_000]
        raise OSError("gone")

    with pytest.raises(SourceError, match=r"part 2 did not come, after 100,000 bytes: OSError"):
        load_async(parts())
    with pytest.raises(FormatError, match="a part is missing"):
        load_async(awaited(model()[:300_000], 100_000))


def test_an_asynchronous_iterator_is_not_for_load() -> None:
    with pytest.raises(OptionError, match=r"gemloom\.load_async"):
        load(awaited(b"", 1))


def test_cancelled_while_a_part_is_awaited(opened: list[Any]) -> None:
    ended = []

    async def parts() -> AsyncIterator[bytes]:
        try:
            yield model()[:100_000]
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def cancelled() -> None:
        loading = asyncio.ensure_future(gemloom.load_async(parts(), threads=1, context=64))
        while not opened:
            await asyncio.sleep(0.001)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading

    asyncio.run(cancelled())
    assert ended


def test_cancelled_when_it_was_too_late_to_stop(opened: list[Any]) -> None:
    """A model that nobody waits for is closed."""

    async def cancelled() -> None:
        loading = asyncio.ensure_future(gemloom.load_async(model(), threads=1, context=64))
        await asyncio.sleep(0)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading

    asyncio.run(cancelled())
