"""Adapters from clients that mean harm: time in proportion to size, little memory, others go on."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import threading
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import tiny
import tiny_lora
from gemloom.adapters.checking import check
from gemloom.adapters.factors import Lora, Pair
from gemloom.adapters.reading import read
from gemloom.errors import GemloomError

BASE = tiny_lora.base("e2b")
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
GOOD = tiny_lora.peft_files(tiny_lora.lora("e2b", only=r"blk\.0\.attn_q"))
Upload = Any  # bytes, or a PEFT adapter's two files
SIZE, LARGE = 1 << 18, 1 << 22

UPLOADS: dict[str, Callable[[int], Upload]] = {}  # of about so many bytes


def upload(make: Callable[[int], Upload]) -> Callable[[int], Upload]:
    UPLOADS[make.__name__] = make
    return make


def peft(header: dict[str, Any], body: int = 0, **fields: Any) -> tuple[bytes, bytes]:
    text = json.dumps(header).encode()
    config = json.dumps(CONFIG | fields).encode()
    return config, len(text).to_bytes(8, "little") + text + bytes(body)


def packed(files: tuple[bytes, bytes]) -> bytes:
    return tiny_lora.archive(files, "tar")


def entry(start: int = 0, size: int = 4) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [size // 4, 1], "data_offsets": [start, start + size]}


# -- what clients may send -------------------------------------------------------------------


@upload
def patterns_that_backtrack(n: int) -> Upload:
    count = min(n // 100, 2000)
    patterns = {f"{i}" + r"(.*.*)*(\w+)*.*layers(.*.*)*x": 4 for i in range(count)}
    return tiny_lora.peft_files(tiny_lora.lora("e2b"), rank_pattern=patterns)


@upload
def patterns_that_an_automaton_finds_hard(n: int) -> Upload:
    """Sixty-four, the most there may be, that note digits: new states for every module's name."""
    patterns = {f".*[1357{i}].{{20,40}}[02468].{{10,20}}x": 4 for i in range(64)}
    sides = [f"layers.{i}.mlp.up_proj.lora_{side}.weight" for i in range(500) for side in "AB"]
    names = {f"{'model.' * 60}{side}": entry(16 * i, 16) for i, side in enumerate(sides)}
    for name in names:
        names[name]["shape"] = [4, 1] if "lora_A" in name else [1, 4]
    return peft(names, 16 * len(names), rank_pattern=patterns)


@upload
def patterns_of_plain_names(n: int) -> Upload:
    patterns = {f"layers.{i}.q_proj": 4 for i in range(min(n, 1 << 19) // 30)}
    return tiny_lora.peft_files(tiny_lora.lora("e2b"), rank_pattern=patterns)


@upload
def a_config_of_many_objects(n: int) -> Upload:
    return b'{"a":[' + b"{}," * (n // 3) + b"{}]}", GOOD[1]


@upload
def a_config_of_many_brackets(n: int) -> Upload:
    return b'{"a":' + b"[" * n, GOOD[1]


@upload
def a_repeated_suffix(n: int) -> Upload:
    return peft({"x" + ".base_layer" * (n // 11) + ".lora_A.weight": entry()}, 4)


@upload
def a_repeated_prefix(n: int) -> Upload:
    return peft({"model." * (n // 6) + "lora_A.weight": entry()}, 4)


@upload
def many_repeated_suffixes(n: int) -> Upload:
    names = [f"{i}" + ".base_layer" * 40 + ".lora_A.x.weight" for i in range(n // 560)]
    return peft({name: entry(4 * i) for i, name in enumerate(names)}, 4 * len(names))


@upload
def many_tensors(n: int) -> Upload:
    count = n // 90
    layers = {f"model.layers.{i}.mlp.up_proj.lora_A.weight": i for i in range(count // 5)}
    names = {name: entry(360 * i, 360) for name, i in layers.items()}
    return peft(names, 360 * len(names))


@upload
def numbers_without_end(n: int) -> Upload:
    text = b'{"a":{"dtype":"F32","shape":[' + b"9" * n + b'],"data_offsets":[0,4]}}'
    return GOOD[0], len(text).to_bytes(8, "little") + text + bytes(4)


@upload
def more_rank_than_rows(n: int) -> Upload:
    rank = n // (4 * 192)
    pair = Pair(np.zeros((rank, 96), np.float32), np.zeros((96, rank), np.float32), 1.0)
    return tiny_lora.peft_files(Lora("any", "gemma4", {"blk.0.attn_output.weight": pair}), r=rank)


@upload
def zip_of_many_members(n: int) -> Upload:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for i in range(n // 100):
            archive.writestr(str(i), b"")
    return out.getvalue()


@upload
def zip_of_long_names(n: int) -> Upload:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for i in range(n // 120_000):
            archive.writestr(f"{i}" + "a/" * 30_000, b"")
    return out.getvalue()


def zip_of(method: int, n: int, size: int) -> bytes:
    """Its list says that there are ``size`` bytes; packed there are so many more."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("other", bytes(n), zipfile.ZIP_STORED)
        archive.writestr("adapter_config.json", GOOD[0])
        archive.writestr(
            "adapter_model.safetensors", bytes(n if method != zipfile.ZIP_DEFLATED else 30 * n)
        )
    data = bytearray(out.getvalue())
    at = data.rindex(b"PK\x01\x02") + 24
    data[at : at + 4] = size.to_bytes(4, "little")
    return bytes(data)


@upload
def zip_that_lies(n: int) -> Upload:
    return zip_of(zipfile.ZIP_DEFLATED, n, 1 << 20)


@upload
def zip_of_bzip2(n: int) -> Upload:
    return zip_of(zipfile.ZIP_BZIP2, n, 1 << 20)


@upload
def zip_of_lzma(n: int) -> Upload:
    return zip_of(zipfile.ZIP_LZMA, n, 1 << 20)


def header(name: bytes, size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name.decode())
    info.size, info.type = size, kind
    return info.tobuf()


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


@upload
def tar_of_a_long_name(n: int) -> Upload:
    return header(b"././@LongLink", n, b"L") + padded(b"a/" * (n // 2)) + packed(GOOD)


@upload
def tar_of_a_long_record(n: int) -> Upload:
    record = b"comment=" + b"1" * n + b"\n"
    record = b"%d %s" % (len(record) + 1 + len(str(n)), record)
    return header(b"x", len(record), b"x") + padded(record) + packed(GOOD)


@upload
def tar_of_many_members(n: int) -> Upload:
    return header(b"x", 0, b"0") * (n // 512) + packed(GOOD)


@upload
def tar_of_many_maps(n: int) -> Upload:
    records = b"".join(b"%d GNU.sparse.offset=1\n" % 24 for _ in range(n // 24))
    return header(b"x", len(records), b"x") + padded(records) + packed(GOOD)


def bomb(n: int) -> bytes:
    return header(b"adapter_model.safetensors", n, b"0") + bytes(n)


@upload
def tar_gz_bomb(n: int) -> Upload:
    return gzip.compress(bomb(30 * n), 1)


@upload
def tar_gz_of_nothing_but_headers(n: int) -> Upload:
    return gzip.compress(header(b"x", 0, b"0") * (n // 20), 1)


@upload
def tar_gz_that_unpacks_for_ever(n: int) -> Upload:
    return gzip.compress(header(b"other", 30 * n + (1 << 25), b"0") + bytes(30 * n + (1 << 25)), 1)


@upload
def tar_gz_of_a_long_file_name(n: int) -> Upload:
    data = gzip.compress(packed(GOOD))
    return data[:3] + b"\x08" + data[4:10] + b"a" * n + b"\0" + data[10:]


@upload
def tar_bz2_bomb(n: int) -> Upload:
    return bz2.compress(bomb(1 << 25))


@upload
def tar_xz_bomb(n: int) -> Upload:
    return lzma.compress(bomb(1 << 25), preset=0)


@upload
def tar_xz_that_wants_memory(n: int) -> Upload:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16}]
    plain = lzma.compress(packed(GOOD), filters=filters)
    block = bytearray(plain[12:24])  # behind the header of the stream: that of its one block
    assert block[4] == 8  # 64 KiB
    block[4] = 38  # 2 GiB
    block[8:12] = struct.pack("<I", zlib.crc32(bytes(block[:8])))
    return plain[:12] + bytes(block) + plain[24:]


def gguf(*entries: bytes, tensors: int = 0) -> bytes:
    keys = len(entries) - tensors
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(entries)


def string(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


@upload
def gguf_of_a_long_key(n: int) -> Upload:
    return gguf(string(b"\xff" * n) + struct.pack("<IB", 7, 1))


@upload
def gguf_of_a_long_value(n: int) -> Upload:
    return gguf(string(b"k") + struct.pack("<I", 8) + string(b"\xff" * n))


@upload
def gguf_of_a_long_tensor_name(n: int) -> Upload:
    return gguf(string(b"\xff" * n) + struct.pack("<IQIQ", 1, 32, 0, 0), tensors=1)


@upload
def gguf_of_many_strings(n: int) -> Upload:
    body = string(b"") * (n // 8)
    return gguf(string(b"k") + struct.pack("<IIQ", 9, 8, n // 8) + body)


@upload
def gguf_of_few_bits(n: int) -> Upload:
    """float32 would take twenty times as much."""
    k = 256 * (n // 50 // 64)
    a = np.zeros((64, k), np.float32)

    def kind(name: str) -> Type:
        return Type.TQ1_0 if name.endswith("lora_a") else Type.F32

    lora = Lora("any", "gemma4", {"blk.0.attn_q.weight": Pair(a, np.zeros((8, 64), np.float32), 1)})
    return tiny_lora.gguf_bytes(lora, type_of=kind)


# -- what they may cost ----------------------------------------------------------------------


def attempt(source: Upload) -> str:
    """What becomes of it, before memory of the model's is taken: why it is refused, or nothing."""
    try:
        check(read(source), BASE.config, BASE.shapes)
    except GemloomError as error:
        return str(error)
    return ""


def size_of(source: Upload) -> int:
    return sum(map(len, source)) if isinstance(source, tuple) else len(source)


def cpu_time(source: Upload) -> float:
    start = time.thread_time()
    attempt(source)
    return time.thread_time() - start


def longest_hold(source: Upload) -> float:
    """The most CPU time that the reader got between two turns of this thread.

    Time, not of a clock: other programs may have the processor, and are not to blame.
    """
    clocks: list[int] = []

    def work() -> None:
        clocks.append(time.pthread_getcpuclockid(threading.get_ident()))
        attempt(source)

    worker = threading.Thread(target=work)
    worker.start()
    longest = last = 0.0
    while worker.is_alive():
        time.sleep(0.001)
        try:
            now = time.clock_gettime(clocks[0]) if clocks else 0.0
        except OSError:  # it has ended
            break
        longest, last = max(longest, now - last), now
    worker.join()
    return longest


@pytest.mark.parametrize("name", UPLOADS)
def test_time_is_in_proportion_to_size(name: str) -> None:
    once, twice = (UPLOADS[name](size) for size in (SIZE, 2 * SIZE))
    base = min(cpu_time(once) for _ in range(2))
    assert base < 5
    assert min(cpu_time(twice) for _ in range(2)) < max(3 * base, base + 0.2)


@pytest.mark.parametrize("name", UPLOADS)
def test_memory_and_others(name: str) -> None:
    """It takes no more than four times its size, and others have their turns."""
    source = UPLOADS[name](LARGE)
    tracemalloc.start()
    try:
        attempt(source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * size_of(source) + (24 << 20)
    assert any(longest_hold(source) < 0.25 for _ in range(3))


def test_what_is_refused_says_why() -> None:
    told = {name: attempt(make(2 * SIZE)) for name, make in UPLOADS.items()}
    assert not any("\n" in text or len(text) > 400 for text in told.values())
    assert "write module names" in told["patterns_that_backtrack"]
    assert "cost too much" in told["patterns_that_an_automaton_finds_hard"]
    assert told["patterns_of_plain_names"] == ""
    assert "too large" in attempt(a_config_of_many_objects(LARGE))
    assert "too large" in attempt(a_repeated_suffix(LARGE))
    assert "has no lora_B" in told["many_repeated_suffixes"]
    assert "list of its files" in attempt(zip_of_many_members(LARGE))
    assert "another method than deflate" in told["zip_of_bzip2"]
    assert "names and headers" in told["tar_of_a_long_name"]
    assert "names and headers" in told["tar_gz_of_nothing_but_headers"]
    assert "would take" in attempt(tar_gz_bomb(LARGE))
    assert "pack just the adapter's files" in told["tar_gz_that_unpacks_for_ever"]
    assert "emory" in told["tar_xz_that_wants_memory"]
    assert "too long" in told["gguf_of_a_long_tensor_name"]
    assert "save it as F16" in attempt(gguf_of_few_bits(LARGE))


def test_ordinary_uploads_take_about_their_own_size() -> None:
    """Half floats stay where they lie, whatever they came in."""
    wanted = tiny_lora.lora("e2b", rank=64, dtype=np.float16)
    files = tiny_lora.peft_files(wanted)
    gguf_file = tiny_lora.gguf_bytes(wanted)
    sources: list[Any] = [
        gguf_file,
        bytearray(gguf_file),
        files,
        packed(files),
        tiny_lora.archive(files, "zip"),
    ]
    for source in sources:
        tracemalloc.start()
        try:
            tiny_lora.assert_same(read(source), wanted)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2 * size_of(source) + (8 << 20)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_every_kind_and_form(kind: str, form: int) -> None:
    out = io.BytesIO()
    long = (
        ("ä" if form == tarfile.PAX_FORMAT else "a") * 90 + "/" + "b" * 60 + "/"
    )  # a name of its own header, or in two parts
    with tarfile.open(fileobj=out, mode="w:" + kind[4:], format=form) as tar:  # type: ignore[call-overload]
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("adapter_model.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in zip(
            ("adapter_config.json", "adapter_model.safetensors"), GOOD, strict=True
        ):
            info = tarfile.TarInfo(long + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    tiny_lora.assert_same(read(out.getvalue()), tiny_lora.lora("e2b", only=r"blk\.0\.attn_q"))


def test_a_gzip_of_several_streams() -> None:
    data = tiny_lora.archive(GOOD, "tar")
    whole = gzip.compress(data[:700]) + gzip.compress(data[700:])
    tiny_lora.assert_same(read(whole), tiny_lora.lora("e2b", only=r"blk\.0\.attn_q"))


def test_a_model_is_no_adapter() -> None:
    assert "general.type" in attempt(tiny.gguf_bytes(tiny.VARIANTS["e2b"]))
