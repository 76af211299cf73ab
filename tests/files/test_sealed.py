"""Sealed files: opened only with their key, whole, unaltered and in their order; or not at all."""

from __future__ import annotations

import base64
import io
import itertools
import json
import logging
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gemloom
import tiny
from command_line import call, fine
from conftest import prompt, until
from gemloom.cli import progress
from gemloom.errors import FormatError, GemloomError, OptionError, OutputError, SourceError
from gemloom.files import gguf, sealed, source
from gemloom.files.blob import Blob, Stream
from gemloom.ggml.device import Tensor
from quantized_files import in_type
from small_gguf import SMALL, blob, cut, part, places, plain

KEY = bytes(range(32))
TEXT = base64.b64encode(KEY).decode()
OTHER = base64.b64encode(bytes(32)).decode()
CHUNK = 300
IDS = prompt(20)
MODEL = tiny.gguf_bytes(tiny.VARIANTS["gemma3_scaled"])

Seal = Callable[..., bytes]


def sealed_bytes(data: bytes, path: Path, chunk: int = CHUNK, key: bytes = KEY) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed, "CHUNK", chunk)
        sealed.seal(blob(data), path, sealed.Key(key), lambda done: None)
    return path.read_bytes()


@pytest.fixture(scope="module")
def small_sealed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return sealed_bytes(SMALL, tmp_path_factory.mktemp("small") / "small.sealed")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.gguf.sealed"
    sealed_bytes(MODEL, path, chunk=1 << 16)
    return path


def chunks(data: bytes, chunk: int = CHUNK) -> tuple[bytes, list[bytes]]:
    """What precedes the sealed chunks, and each of them."""
    step = chunk + sealed.TAG
    starts = range(sealed.DATA, len(data), step)
    return data[: sealed.DATA], [data[start : start + step] for start in starts]


def refusal(given: Any, key: Any = KEY) -> tuple[type[GemloomError], str]:
    """Of reading every byte; ``given`` is made anew for each of the two ways to."""
    told = []
    for make in (lambda: given, lambda: iter([given])):
        with pytest.raises(GemloomError) as caught:
            everything(make(), key)
        told.append((type(caught.value), str(caught.value)))
        assert "\n" not in told[-1][1]
    assert told[0][0] is told[1][0]
    return told[0]


def everything(given: Any, key: Any = KEY) -> dict[str, bytes]:
    file = gguf.read(source.resolve(given, key=key, forward=True))
    order = sorted(file.tensors.values(), key=lambda info: info.offset)
    data = {info.name: b"".join(map(bytes, info.pieces())) for info in order}
    file.finish()
    return data


def load(given: Any, **options: Any) -> gemloom.Model:
    return gemloom.load(given, threads=2, context=64, **options)


# -- sealed and opened is the same ----------------------------------------------------


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=700), st.integers(1, 300), places)
def test_any_bytes_come_back(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, chunk: int, places: list[int]
) -> None:
    assume(not data.startswith(sealed.MAGIC))  # such a one is refused
    folder = tmp_path_factory.mktemp("any")
    whole = sealed_bytes(data, folder / "a", chunk)
    key = sealed.Key(KEY)
    opened = sealed.opened(blob(*cut(whole, places)), key)
    assert bytes(opened.view(0, opened.size)) == data
    for start, end in itertools.pairwise(sorted(place % (len(data) + 1) for place in places)):
        assert bytes(opened.view(start, end - start)) == data[start:end]
    arriving = Stream("a", map(memoryview, cut(whole, places)))
    assert bytes(sealed.opened(arriving, key).view(0, len(data))) == data
    sealed.unseal(blob(whole), folder / "b", key, lambda done: None)
    assert (folder / "b").read_bytes() == data


def test_the_format_is_that_of_the_documentation(small_sealed: bytes) -> None:
    """Opened by hand, as docs/sealed.md draws it."""
    magic, version, chunk, size, salt, prefix = struct.unpack("<15sBIQ32s7s", small_sealed[:67])
    assert (magic, version, chunk, size) == (b"GEMLOOM-SEALED\n", 1, CHUNK, len(SMALL))
    derived = HKDF(hashes.SHA256(), 32, salt, b"gemloom sealed file").derive(KEY)
    cipher = ChaCha20Poly1305(derived)
    header, position, data = small_sealed[:67], 83, b""
    assert cipher.encrypt(prefix + bytes(4) + b"\x02", b"", header) == small_sealed[67:83]
    count = -(-size // chunk)
    for index in range(count):
        nonce = prefix + index.to_bytes(4, "big") + bytes([index == count - 1])
        length = min(chunk, size - index * chunk) + 16
        data += cipher.decrypt(nonce, small_sealed[position : position + length], header)
        position += length
    assert data == SMALL
    assert position == len(small_sealed)


def test_the_same_file_twice_has_nothing_in_common(tmp_path: Path) -> None:
    first, second = (chunks(sealed_bytes(SMALL, tmp_path / name)) for name in "ab")
    assert first[0][28:] != second[0][28:]
    assert not set(first[1]) & set(second[1])
    assert SMALL[:100] not in first[0] + b"".join(first[1])


@pytest.mark.parametrize("types", [None, "Q4_0", "Q4_K"])
def test_a_sealed_model_is_the_model(types: str | None, tmp_path: Path) -> None:
    data = tiny.gguf_bytes(tiny.VARIANTS["gemma3_scaled"].wide())
    data = in_type(data, types) if types else data
    path = tmp_path / "m.gguf.sealed"
    whole = sealed_bytes(data, path, chunk=100_000)
    with load(data) as loaded:
        expected = loaded.logits(IDS)
    sources = [path, str(path), whole, [whole[:50], whole[50:]], path.open("rb"), io.BytesIO(whole)]
    sources += [iter([whole[:333_333], whole[333_333:]])]
    for item in sources:
        with load(item, key=KEY) as loaded:
            assert loaded.memory()["mapped"] == 0
            assert np.array_equal(loaded.logits(IDS), expected)
    sources[4].close()


def test_files_of_a_split_model_sealed_each(tmp_path: Path) -> None:
    paths = []
    for number in range(2):
        file = part(number, 2, f"t{number}", 2)
        paths.append(tmp_path / f"m-{number + 1:05}-of-00002.gguf.sealed")
        sealed_bytes(bytes(file.view(0, file.size)), paths[-1])
    for files in (paths[0], paths):
        assert list(gguf.read(source.resolve(files, key=KEY)).tensors) == ["t0", "t1"]
    with pytest.raises(FormatError, match="one part of 2"):
        gguf.read(source.resolve([paths[0]], key=KEY))


# -- altered, by whoever --------------------------------------------------------------


def test_every_flipped_bit_is_noticed(small_sealed: bytes) -> None:
    data = bytearray(small_sealed)
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(GemloomError):
            everything(data)
        data[bit // 8] ^= 1 << bit % 8
    assert everything(data) == everything(small_sealed)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 26), st.integers(0, 1 << 16), st.integers(0, 7))
def test_a_flipped_bit_anywhere_in_a_model(
    model_file: Path, chunk: int, place: int, bit: int
) -> None:
    """Nothing is written into a tensor that is not as it was sealed."""
    whole = bytearray(model_file.read_bytes())
    whole[min(chunk * (1 << 16) + place, len(whole) - 1)] ^= 1 << bit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "write", _only_what_was_sealed)
        for item in (whole, iter([whole])):
            with pytest.raises(GemloomError) as caught:
                load(item, key=KEY)
            assert isinstance(caught.value, FormatError | SourceError | OptionError)


def _only_what_was_sealed(self: Tensor, data: Any, offset: int = 0) -> None:
    assert bytes(data) in MODEL


def test_cut_off_at_every_chunk(small_sealed: bytes) -> None:
    head, parts = chunks(small_sealed)
    for count in range(len(parts)):
        kind, message = refusal(head + b"".join(parts[:count]))
        assert kind is FormatError
        assert "truncated" in message
    for length in range(len(sealed.MAGIC), sealed.DATA):
        assert refusal(small_sealed[:length])[0] is FormatError
    assert refusal(small_sealed[:-1])[0] is FormatError


def test_cut_off_where_its_header_says_so_too(small_sealed: bytes) -> None:
    """The size in the header is sealed as well."""
    head, parts = chunks(small_sealed)
    shorter = head[:20] + (CHUNK * (len(parts) - 1)).to_bytes(8, "little") + head[28:]
    assert refusal(shorter + b"".join(parts[:-1]))[0] is SourceError


def test_chunks_moved_repeated_or_of_another_file(small_sealed: bytes, tmp_path: Path) -> None:
    head, parts = chunks(small_sealed)
    other = chunks(sealed_bytes(SMALL, tmp_path / "other"))[1]
    assert len(parts) > 4
    for first, second in itertools.combinations(range(len(parts) - 1), 2):
        swapped = list(parts)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        repeated = list(parts)
        repeated[second] = repeated[first]
        for wrong in (swapped, repeated):
            kind, message = refusal(head + b"".join(wrong))
            assert kind is FormatError
            assert "is not what was sealed" in message
    for index in range(len(parts)):
        foreign = [*parts[:index], other[index], *parts[index + 1 :]]
        assert "is not what was sealed" in refusal(head + b"".join(foreign))[1]
        dropped = parts[:index] + parts[index + 1 :]
        assert refusal(head + b"".join(dropped))[0] is FormatError


def test_something_appended(small_sealed: bytes) -> None:
    for more in (b"\0", small_sealed[-CHUNK:], small_sealed):
        assert refusal(small_sealed + more)[0] is FormatError


def test_another_version(small_sealed: bytes) -> None:
    newer = small_sealed[:15] + b"\x02" + small_sealed[16:]
    assert "sealed in version 2, not 1" in refusal(newer)[1]


# -- keys -----------------------------------------------------------------------------


def test_another_key_is_told_at_once(model_file: Path) -> None:
    asked = []

    class Watched(Blob):
        def view(self, offset: int, length: int) -> memoryview:
            asked.append(offset + length)
            return super().view(offset, length)

    with pytest.raises(SourceError, match="sealed with another key"):
        sealed.opened(Watched("m", [memoryview(model_file.read_bytes())]), sealed.Key(bytes(32)))
    assert max(asked) <= sealed.DATA


def test_keys_of_every_form(
    small_sealed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text(TEXT + "\n")
    wanted = plain(gguf.read([blob(SMALL)]))[1]
    for key in (KEY, TEXT, f" {TEXT}\n", file, sealed.Key(KEY)):
        assert plain(gguf.read(source.resolve(small_sealed, key=key)))[1] == wanted
    monkeypatch.setenv("GEMLOOM_KEY", TEXT)
    assert plain(gguf.read(source.resolve(small_sealed)))[1] == wanted
    assert refusal(small_sealed, key=OTHER)[0] is SourceError  # before that of the environment
    assert plain(gguf.read(source.resolve(SMALL)))[1] == wanted  # which is for sealed files alone


@pytest.mark.parametrize(
    "wrong", ["", "secretsecret", TEXT[:-4], TEXT[:-1] + "!", "ä" * 44, b"short", 5, bytearray(32)]
)
def test_what_is_no_key(wrong: Any, small_sealed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, message = refusal(small_sealed, key=wrong)
    assert kind is OptionError
    assert not isinstance(wrong, str) or not wrong or wrong not in message
    if isinstance(wrong, str) and wrong:
        monkeypatch.setenv("GEMLOOM_KEY", wrong)
        assert refusal(small_sealed, key=None)[0] is OptionError
        assert source.resolve(SMALL)  # a plain file needs none


def test_no_key(small_sealed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMLOOM_KEY", raising=False)
    kind, message = refusal(small_sealed, key=None)
    assert kind is SourceError
    assert message.endswith("sealed; give its key, or set GEMLOOM_KEY to it")
    assert refusal(small_sealed, key=tmp_path / "none") == (
        SourceError,
        f"{tmp_path / 'none'}: No such file or directory",
    )


def test_a_plain_file_does_not_pass_where_a_key_is_given(small_sealed: bytes) -> None:
    """Whoever puts one in the place of the sealed file is noticed."""
    for item in (SMALL, [SMALL, small_sealed], io.BytesIO(SMALL)):
        with pytest.raises(OptionError, match="not sealed"):
            source.resolve(item, key=KEY)


def test_no_key_is_ever_shown(
    model_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    broken = bytearray(model_file.read_bytes())
    broken[-1] ^= 1
    shown = [repr(sealed.Key(KEY)), str(sealed.Key(KEY))]
    monkeypatch.setenv("GEMLOOM_KEY", TEXT[:-3] + "!!!")
    for key in (KEY, OTHER, TEXT[:-2], None):
        try:
            load(broken, key=key)
        except GemloomError as error:
            shown += traceback.format_exception(error)
    assert len(shown) > 20
    for text in (*shown, caplog.text):
        assert TEXT[:20] not in text
        assert repr(KEY)[2:20] not in text
        assert KEY.hex()[:20] not in text


# -- the command line -----------------------------------------------------------------


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path, Path]]:
    """A plain model, where it is to be sealed, and a key file that is there."""
    monkeypatch.delenv("GEMLOOM_KEY", raising=False)
    (tmp_path / "m.gguf").write_bytes(MODEL)
    (tmp_path / "key").write_text(TEXT)
    yield tmp_path / "m.gguf", tmp_path / "m.gguf.sealed", tmp_path / "key"
    assert not list(tmp_path.glob("*.part*"))


def test_seal_use_and_unseal(
    paths: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, out, _ = paths
    key, back = tmp_path / "new.key", tmp_path / "back.gguf"
    assert "keep it apart" in fine("seal", given, out, "--new-key", key).stderr
    assert key.stat().st_mode & 0o777 == 0o600
    prompts = ("the", "-n", "4", "--temperature", "0", "--threads", "1")
    expected = fine("run", given, *prompts).stdout
    assert fine("run", out, *prompts, "--key-file", key).stdout == expected
    report = fine("unseal", out, back, "--key-file", key, "--json").stdout
    assert json.loads(report) == {"file": str(back), "bytes": len(MODEL)}
    assert back.read_bytes() == MODEL
    monkeypatch.setenv("GEMLOOM_KEY", key.read_text().strip())
    assert fine("run", out, *prompts).stdout == expected
    assert fine("chat", out, *prompts[1:], input="the\n").stdout
    assert json.loads(fine("inspect", out, "--json").stdout)
    assert fine("bench", out, "-p", "8", "-n", "2", "-r", "1", "--threads", "1", "--json").stdout
    back.unlink()
    fine("unseal", out, back)
    assert back.read_bytes() == MODEL


def test_a_key_alone_and_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "key"
    fine("seal", "--new-key", path)
    text = path.read_text()
    assert sealed.read_key(path) is not None
    result = call("seal", "--new-key", path)
    assert result.exit_code == 1
    assert "File exists; no key was written" in result.stderr
    assert path.read_text() == text
    assert "--key-file" in fine("serve", "--help").stdout


def test_wrong_usage(paths: tuple[Path, Path, Path], tmp_path: Path) -> None:
    given, out, key = paths
    for args in (
        ("seal",),
        ("seal", given),
        ("seal", given, out),
        ("seal", given, out, "--key-file", key, "--new-key", tmp_path / "k"),
        ("seal", given, given, "--key-file", key),
        ("unseal", given, out),
        ("run", given, "the", "--key-file", key),
    ):
        result = call(*args)
        assert (result.exit_code, result.stdout) == (2, ""), args
        assert not out.exists()
    assert given.read_bytes() == MODEL


def test_failures_leave_nothing_behind(paths: tuple[Path, Path, Path], tmp_path: Path) -> None:
    given, out, key = paths
    fine("seal", given, out, "--key-file", key)
    other, back, broken = tmp_path / "other", tmp_path / "back", tmp_path / "broken"
    other.write_text(OTHER)
    data = bytearray(out.read_bytes())
    data[-5] ^= 1
    broken.write_bytes(data)
    for args, reason in (
        (("unseal", out, back, "--key-file", other), "sealed with another key"),
        (("unseal", broken, back, "--key-file", key), "damaged: chunk 2 of 2"),
        (("unseal", given, back, "--key-file", key), "not a sealed file"),
        (("seal", out, back, "--key-file", key), "sealed already"),
        (("seal", given, tmp_path / "no" / "b", "--key-file", key), "there is no folder"),
        (("seal", tmp_path / "none", back, "--key-file", key), "no such file"),
    ):
        result = call(*args)
        assert result.exit_code == 1, args
        assert result.stderr.startswith("gemloom: ")
        assert reason in result.stderr
        assert result.stderr.count("\n") == 1
        assert not back.exists()


def test_a_full_disk(paths: tuple[Path, Path, Path]) -> None:
    given, out, _ = paths

    def full(done: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device; nothing is left there"):
        sealed.seal(source.resolve(given)[0], out, sealed.Key(KEY), full)
    assert not out.exists()


def test_a_bar_shows_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_LOOK_EVERY", 0.01)
    for after, total in ((0.0, 200), (0.0, None), (60.0, 200)):
        monkeypatch.setattr(progress, "_BAR_AFTER", after)
        monkeypatch.setattr("sys.stderr", terminal := Terminal())
        with progress.bar("sealing\nit", total, lambda: 50):
            if not after:
                until(lambda shown=terminal: "sealing it" in shown.getvalue())
        assert ("sealing it" in terminal.getvalue()) is (after == 0)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with progress.bar("sealing", 200, lambda: 50):
        time.sleep(0.02)
    assert sys.stderr.getvalue() == ""
