"""Models at URLs: read by ranges, several at once, again where that fails; nothing secret shown."""

from __future__ import annotations

import asyncio
import socket
import time
import traceback
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.config import conf
from hypothesis import given
from hypothesis import strategies as st

import gemloom
import tiny
from command_line import call, fine
from conftest import prompt
from gemloom.cli.load import names_model
from gemloom.errors import FormatError, GemloomError, SourceError
from gemloom.files import gguf, sealed, source, urls
from gemloom.files.blob import Blocks, Stream
from gemloom.files.names import model_id
from quantized_files import in_type
from shelf import Shelf
from small_gguf import SMALL, blob, cut, part, plain

IDS = prompt(20)
BLOCK = 50_000
VARIANT = tiny.VARIANTS["gemma3_scaled"]
MODEL = tiny.gguf_bytes(VARIANT)


@cache
def expected() -> np.ndarray:
    with load(MODEL) as loaded:
        return loaded.logits(IDS)


def load(given: Any, **options: Any) -> gemloom.Model:
    return gemloom.load(given, threads=1, context=64, **options)


def gives_the_model(given: Any, **options: Any) -> None:
    with load(given, **options) as loaded:
        assert loaded.memory()["mapped"] == 0
        assert np.array_equal(loaded.logits(IDS), expected())


@pytest.fixture
def shelf(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """Two models, which are read in blocks so small that each has many."""
    monkeypatch.setattr(urls, "BLOCK", BLOCK)
    shelf.files = {"/m.gguf": MODEL, "/small.gguf": SMALL}
    return shelf


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def refusal(given: Any, **options: Any) -> str:
    with pytest.raises(GemloomError) as caught:
        load(given, **options)
    message = str(caught.value)
    assert isinstance(caught.value, SourceError)
    assert "\n" not in message
    return message


# -- the same model -------------------------------------------------------------------


def test_ranges_and_nothing_twice(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "READERS", 1)  # with more, one may lag behind what is kept
    gives_the_model(f"{shelf.url}/m.gguf")
    starts = [start for start in shelf.gets() if start != 1]  # 1: whether there are ranges
    assert sorted(starts) == list(range(0, len(MODEL), BLOCK))
    assert shelf.sent == len(MODEL) + 1
    assert all(headers["Accept-Encoding"] == "identity" for headers in shelf.headers)


@pytest.mark.parametrize("types", ["Q4_0", "Q4_K"])
@pytest.mark.parametrize("ranges", [True, False])
def test_quantized_models_packed_or_not(shelf: Shelf, types: str, ranges: bool) -> None:
    shelf.ranges = ranges
    data = shelf.files["/q.gguf"] = in_type(tiny.gguf_bytes(VARIANT.wide()), types)
    for kernels in ("auto", "plain"):
        with load(data, kernels=kernels) as there:
            wanted, packed = there.logits(IDS), there.memory()["packed"]
        with load(f"{shelf.url}/q.gguf", kernels=kernels) as loaded:
            assert loaded.memory()["mapped"] == 0
            assert loaded.memory()["packed"] == packed
            assert np.array_equal(loaded.logits(IDS), wanted)


def test_several_reads_at_once_but_not_any_number(shelf: Shelf) -> None:
    shelf.delay = 0.02
    gives_the_model(f"{shelf.url}/m.gguf")
    assert 2 <= shelf.most_busy <= urls.READERS


def test_the_header_alone_where_no_more_is_wanted(shelf: Shelf) -> None:
    file = gguf.read(source.resolve(f"{shelf.url}/m.gguf"))
    assert len(file.tensors) == len(gguf.read([blob(MODEL)]).tensors)
    assert shelf.sent == BLOCK + 1
    name = "blk.3.attn_q.weight"
    assert bytes(file.tensors[name].data()) == bytes(gguf.read([blob(MODEL)]).tensors[name].data())
    assert shelf.sent <= 4 * BLOCK


@given(st.integers(1, 700), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 2000))))
def test_any_view_over_any_block(block: int, views: list[tuple[int, int]]) -> None:
    fetched = []

    def fetch(index: int) -> bytes:
        fetched.append(index)
        return SMALL[index * block : (index + 1) * block]

    blocks = Blocks("small", len(SMALL), block, fetch)
    for start, length in views:
        if start + length <= len(SMALL):
            assert bytes(blocks.view(start, length)) == SMALL[start : start + length]
        else:
            with pytest.raises(FormatError, match="truncated"):
                blocks.view(start, length)
    assert blocks.fetched == sum(len(SMALL[i * block : (i + 1) * block]) for i in fetched)


def test_a_block_that_failed_is_an_error_to_all_who_want_it() -> None:
    asked = []

    def fetch(index: int) -> bytes:
        asked.append(index)
        time.sleep(0.02)
        raise OSError("no")

    blocks = Blocks("x", 3, 3, fetch)
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(blocks.view, 0, 3) for _ in range(8)]
    assert {str(read.exception()) for read in reads} == {"no"}
    assert asked == [0]


def test_other_schemes(
    memory: Any, tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/folder/m.gguf", MODEL)
    gives_the_model("memory://folder/m.gguf")
    with zipfile.ZipFile(tmp_path / "m.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("in/m.gguf", MODEL)
    gives_the_model(f"zip://in/m.gguf::file://{tmp_path}/m.zip")
    shelf.files["/m.zip"] = (tmp_path / "m.zip").read_bytes()
    gives_the_model(f"zip://in/m.gguf::{shelf.url}/m.zip")
    (tmp_path / "m.gguf").write_bytes(MODEL)
    with load(f"file://{tmp_path}/m.gguf") as loaded:
        assert loaded.memory()["mapped"] > 0


def test_split_models_and_parts_at_urls(shelf: Shelf, memory: Any) -> None:
    for number in range(2):
        file = part(number, 2, f"t{number}", 2)
        shelf.files[f"/s-{number + 1:05}-of-00002.gguf"] = bytes(file.view(0, file.size))
    names = [f"{shelf.url}/s-{number:05}-of-00002.gguf" for number in (1, 2)]
    for item in (names[0], names):
        assert list(gguf.read(source.resolve(item)).tensors) == ["t0", "t1"]
    later = names[1].replace("http://", "http://user:word@")
    message = refusal(later)
    assert "a later part of a split file; name its first part" in message
    assert "word" not in message
    for number, piece in enumerate(cut(MODEL, [1000, 70_000])):
        memory.pipe(f"/part{number}", piece)
    gives_the_model([f"memory://part{number}" for number in range(3)])
    with pytest.raises(FormatError, match="truncated"):
        load(["memory://part0"])


@pytest.mark.parametrize("ranges", [True, False])
def test_a_split_model_at_a_url(shelf: Shelf, ranges: bool) -> None:
    """Without ranges these are two streams, whose tensors come in turn."""
    weights = list(tiny.tensors(VARIANT).items())
    for number, part_of_it in enumerate((weights[::2], weights[1::2])):
        keys = tiny.metadata(VARIANT) if number == 0 else {}
        keys |= {"split.no": number, "split.count": 2, "split.tensors.count": len(weights)}
        name = f"/tiny-{number + 1:05}-of-00002.gguf"
        shelf.files[name] = tiny.write(keys, dict(part_of_it))
    shelf.ranges = ranges
    gives_the_model(f"{shelf.url}/tiny-00001-of-00002.gguf")


def test_a_sealed_model_at_a_url(shelf: Shelf, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf.sealed"
    sealed.seal(blob(MODEL), path, sealed.Key(bytes(32)), lambda done: None)
    shelf.files["/m.gguf.sealed"] = path.read_bytes()
    gives_the_model(f"{shelf.url}/m.gguf.sealed", key=bytes(32))
    asked = len(shelf.log)
    assert "sealed with another key" in refusal(f"{shelf.url}/m.gguf.sealed", key=bytes(31) + b"x")
    assert len(shelf.log) - asked <= 4
    shelf.ranges = False
    gives_the_model(f"{shelf.url}/m.gguf.sealed", key=bytes(32))


def test_from_a_coroutine(shelf: Shelf) -> None:
    async def loaded() -> np.ndarray:
        url = f"{shelf.url}/m.gguf"
        with await gemloom.load_async(url, threads=1, context=64) as model:
            return model.logits(IDS)

    assert np.array_equal(asyncio.run(loaded()), expected())


def test_on_the_command_line(shelf: Shelf) -> None:
    url = f"{shelf.url}/m.gguf?signature=secret"
    assert names_model(url)
    assert not names_model("What is http://example.org?")
    options = ("the", "-n", "3", "--temperature", "0", "--threads", "1")
    assert fine("run", url, *options).stdout.startswith("\n") is False
    assert fine("inspect", url, "--json").stdout.count("secret") == 0
    failed = call("run", url.replace("m.gguf", "none.gguf"), *options)
    assert failed.exit_code == 1
    assert failed.stderr == f"gemloom: {shelf.url}/none.gguf: no such file\n"


# -- servers without ranges -----------------------------------------------------------


@pytest.mark.parametrize("told_size", [True, False])
def test_a_server_that_knows_no_ranges_is_read_in_order(shelf: Shelf, told_size: bool) -> None:
    shelf.ranges, shelf.told_size = False, told_size
    url = f"{shelf.url}/m.gguf"
    (blob,) = source.resolve(url, forward=True)
    assert isinstance(blob, Stream)
    del blob
    gives_the_model(url)
    assert plain(gguf.read(source.resolve(f"{shelf.url}/small.gguf"))) == plain(
        gguf.read(source.resolve(SMALL))
    )


def test_no_ranges_and_the_connection_is_lost(shelf: Shelf) -> None:
    shelf.ranges = False
    shelf.spoil = lambda start: MODEL[:200_000]
    message = refusal(f"{shelf.url}/m.gguf")
    assert message.startswith(f"{shelf.url}/m.gguf: ")


# -- what goes wrong on the way -------------------------------------------------------


@pytest.mark.parametrize("sent", [0, 1, BLOCK // 2])
def test_reads_that_are_interrupted_go_on(shelf: Shelf, sent: int) -> None:
    """Each block's first two answers break off."""
    answers: dict[int, int] = {}

    def spoil(start: int) -> bytes | None:
        if start == 1:  # whether there are ranges
            return None
        answers[start // BLOCK] = answers.get(start // BLOCK, 0) + 1
        return MODEL[start : start + sent] if answers[start // BLOCK] <= 2 else None

    shelf.spoil = spoil
    gives_the_model(f"{shelf.url}/m.gguf")
    last = len(MODEL) // BLOCK  # which is so short that nothing of it breaks off
    assert min(count for block, count in answers.items() if block != last) >= 3


def test_a_server_that_is_in_trouble_for_a_while(shelf: Shelf) -> None:
    class Trouble(dict[str, int]):
        left = 3

        def get(self, method: str, default: Any = None) -> Any:
            if method == "HEAD" or len(shelf.gets()) < 3 or not self.left:
                return None
            self.left -= 1
            return 503

    shelf.status = Trouble()
    gives_the_model(f"{shelf.url}/m.gguf")
    assert shelf.status.left == 0


def test_tries_are_counted_and_the_last_is_told(shelf: Shelf) -> None:
    shelf.spoil = lambda start: b"" if start >= 10 * BLOCK else None
    message = refusal(f"{shelf.url}/m.gguf")
    assert f"{shelf.url}/m.gguf: at byte {10 * BLOCK:,}" in message
    assert shelf.gets().count(10 * BLOCK) == len(urls.PAUSES) + 1


def test_answers_that_are_short_or_long(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "BLOCK", BLOCK)
    monkeypatch.setattr(urls, "PAUSES", (0.0,) * 4)
    memory.pipe("/m.gguf", MODEL)
    whole = type(memory).cat_file

    def answer(extra: int) -> Any:
        def cat_file(self: Any, path: str, start: int, end: int) -> bytes:
            return bytes(whole(self, path, start, min(end, start + BLOCK // 2) + extra))

        return cat_file

    monkeypatch.setattr(type(memory), "cat_file", answer(0))
    gives_the_model("memory://m.gguf")
    monkeypatch.setattr(type(memory), "cat_file", answer(BLOCK))
    assert f"{3 * BLOCK // 2:,} bytes came of {BLOCK:,}" in refusal("memory://m.gguf")


def test_a_file_that_shrinks_while_it_is_read(shelf: Shelf) -> None:
    (only,) = source.resolve(f"{shelf.url}/m.gguf")
    shelf.files["/m.gguf"] = MODEL[: 7 * BLOCK]
    assert bytes(only.view(0, 100)) == MODEL[:100]
    with pytest.raises(SourceError, match=r"at byte 450,000"):
        only.view(9 * BLOCK, 100)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "the server wants credentials (HTTP status 401)"),
        (403, "the server refuses it to these credentials (HTTP status 403)"),
        (404, "no such file"),
        (500, "the server answered with HTTP status 500"),
    ],
)
def test_what_a_server_says_is_told(shelf: Shelf, status: int, reason: str) -> None:
    shelf.status = {"HEAD": status, "GET": status}
    assert refusal(f"{shelf.url}/m.gguf") == f"{shelf.url}/m.gguf: {reason}"
    assert len(shelf.log) <= 2
    shelf.status = {}
    (only,) = source.resolve(f"{shelf.url}/m.gguf")
    shelf.status = {"GET": status}
    asked = len(shelf.log)
    with pytest.raises(SourceError) as caught:
        only.view(BLOCK, 100)
    assert str(caught.value) == f"{shelf.url}/m.gguf: at byte {BLOCK:,}: {reason}"
    assert len(shelf.log) - asked == (len(urls.PAUSES) + 1 if status == 500 else 1)


def test_a_server_that_refuses_head_alone(shelf: Shelf) -> None:
    """As addresses do that were signed for GET."""
    shelf.status = {"HEAD": 403}
    gives_the_model(f"{shelf.url}/m.gguf")


def test_a_server_that_does_not_answer(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "PATIENCE", (0.2, 0.2))
    monkeypatch.setattr(urls, "PAUSES", ())
    shelf.delay = 1.0
    begin = time.monotonic()
    assert refusal(f"{shelf.url}/m.gguf") == f"{shelf.url}/m.gguf: no answer in time"
    assert time.monotonic() - begin < 25  # its own patience would be 30


def test_nobody_there(memory: Any) -> None:
    assert refusal("http://127.0.0.1:1/m.gguf").endswith("m.gguf: Connection refused")
    unknown = socket.gaierror(-2, "Name or service not known")
    assert urls._reason(unknown) == "no server is known by that name"
    assert refusal("memory://none.gguf") == "memory://none.gguf: no such file"
    assert refusal("nonsense://x") == "nonsense://x: Protocol not known: nonsense"
    memory.mkdir("/folder")
    assert refusal("memory://folder") == "memory://folder: a folder; name a .gguf file in it"
    memory.pipe("/empty", b"")
    with pytest.raises(FormatError, match="memory://empty: empty"):
        load("memory://empty")


# -- secrets --------------------------------------------------------------------------


def test_nothing_secret_is_shown(shelf: Shelf) -> None:
    host = shelf.url.removeprefix("http://")
    secret = f"http://me:PASSWORD@{host}/%s.gguf?sig=SIGNATURE#FRAGMENT"
    with load(secret % "m") as loaded:
        assert loaded.name == f"http://{host}/m.gguf"
    shown = ""
    for url in (secret % "none", f"zip://x::{secret % 'm'}", (secret % "m").replace(host, "[")):
        with pytest.raises(SourceError) as caught:
            load(url)
        shown += "".join(traceback.format_exception(caught.value))
    (only,) = source.resolve(secret % "m")
    shelf.status = {"GET": 403}
    with pytest.raises(SourceError) as caught:
        only.view(BLOCK, 100)
    shown += "".join(traceback.format_exception(caught.value))
    assert model_id("https://me:PASSWORD@host/a/m.gguf.sealed?sig=SIGNATURE") == "m"
    for word in ("PASSWORD", "SIGNATURE", "FRAGMENT"):
        assert word not in shown


def test_credentials_of_the_configuration_are_used(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Authorization": "Bearer of good news"}
    monkeypatch.setitem(conf, "http", {"client_kwargs": {"headers": headers}})
    gives_the_model(f"{shelf.url}/m.gguf")
    assert {seen["Authorization"] for seen in shelf.headers} == {"Bearer of good news"}
    assert {seen["Accept-Encoding"] for seen in shelf.headers} == {"identity"}
