"""The GGUF reader: against the format's own reader, over any cut, and on every kind of damage."""

from __future__ import annotations

import lzma
import math
import struct
from pathlib import Path
from typing import Any

import ggml
import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType
from hypothesis import given
from hypothesis import strategies as st

from gemloom.errors import ConfigError, FormatError
from gemloom.files import gguf
from gemloom.files.blob import Blob
from small_gguf import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Key,
    blob,
    cut,
    part,
    places,
    plain,
    small,
    string,
    tensor,
    write,
)

VOCABULARY = Path(__file__).parents[1] / "data" / "gemma4-vocab.gguf.xz"


def read(data: bytes) -> gguf.GGUF:
    return gguf.read([blob(data)])


# -- any cut is the same file ---------------------------------------------------------


@given(st.binary(max_size=200), places, st.integers(0, 220), st.integers(0, 220))
def test_a_view_over_any_cut_is_the_view_of_the_whole(
    data: bytes, places: list[int], offset: int, length: int
) -> None:
    pieces = blob(*cut(data, places))
    assert pieces.size == len(data)
    if offset + length > len(data):
        with pytest.raises(FormatError, match=r"small.gguf: truncated"):
            pieces.view(offset, length)
    else:
        assert bytes(pieces.view(offset, length)) == data[offset : offset + length]


def test_a_view_inside_one_part_is_no_copy() -> None:
    first, second = bytearray(b"abcd"), bytearray(b"efgh")
    pieces = Blob("b", [memoryview(first), memoryview(second)])
    inside, across = pieces.view(4, 4), pieces.view(3, 2)
    second[0] = ord("X")
    assert (bytes(inside), bytes(across)) == (b"Xfgh", b"de")
    assert inside.readonly


@given(places)
def test_any_cut_reads_as_the_whole(places: list[int]) -> None:
    whole = small()
    assert plain(gguf.read([blob(*cut(whole, places))])) == plain(read(whole))


def test_a_header_longer_than_the_first_read(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small()
    monkeypatch.setattr(Blob, "first_look", 16)
    assert plain(gguf.read([blob(*cut(whole, [7, 19]))])) == plain(read(whole))


@pytest.mark.parametrize("length", [*range(0, 1200, 13)])
def test_every_truncation_is_refused(length: int) -> None:
    with pytest.raises(FormatError, match=r"small.gguf: (truncated|not a GGUF)"):
        read(small()[:-4][:length])


# -- against the format's own reader --------------------------------------------------


def field_value(field: Any) -> Any:
    if field.types[-1] is GGUFValueType.STRING:
        texts = [field.parts[index].tobytes() for index in field.data]
        return texts if field.types[0] is GGUFValueType.ARRAY else texts[0].decode()
    values = [field.parts[index][0].item() for index in field.data]
    return values if field.types[0] is GGUFValueType.ARRAY else values[0]


def test_small_file_equals_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(small())
    reader = GGUFReader(path)
    metadata, tensors = plain(read(small()))
    theirs = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    # of an empty array that reader keeps no item type
    assert metadata == {
        key: field_value(field) if field.data else [] for key, field in theirs.items()
    }
    assert tensors == {
        tensor.name: (tensor.tensor_type, tuple(tensor.shape.tolist()), tensor.data.tobytes())
        for tensor in reader.tensors
    }


def ggml_value(context: Any, key: int) -> Any:
    """One value of a file as ggml's C reader sees it; of an array of numbers its length."""
    kind = ggml.gguf_get_kv_type(context, key)
    if kind == STRING:
        return ggml.gguf_get_val_str(context, key).decode()
    if kind == ARRAY:
        count = ggml.gguf_get_arr_n(context, key)
        if ggml.gguf_get_arr_type(context, key) != STRING:
            return count
        return [ggml.gguf_get_arr_str(context, key, place) for place in range(count)]
    getters = {U32: ggml.gguf_get_val_u32, F32: ggml.gguf_get_val_f32, BOOL: ggml.gguf_get_val_bool}
    return getters[kind](context, key)


def test_real_vocabulary_equals_ggml(tmp_path: Path) -> None:
    """All 776,000 strings; by ggml's reader, as the gguf package takes 18 seconds for them."""
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(lzma.decompress(VOCABULARY.read_bytes()))
    ours = read(path.read_bytes()).metadata
    context = ggml.gguf_init_from_file(str(path).encode(), ggml.gguf_init_params(no_alloc=True))
    try:
        count = ggml.gguf_get_n_kv(context)
        theirs = {
            ggml.gguf_get_key(context, key).decode(): ggml_value(context, key)
            for key in range(count)
        }
    finally:
        ggml.gguf_free(context)
    assert theirs == {
        key: value.raw()
        if isinstance(value, gguf.StringArray)
        else len(value)
        if isinstance(value, np.ndarray)
        else value
        for key, value in ours.items()
    }
    assert len(ours.strings("tokenizer.ggml.tokens")) == 262_144


# -- metadata -------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=5), max_size=9), st.data())
def test_string_array_is_the_list_of_its_strings(raw: list[bytes], data: st.DataObject) -> None:
    strings = read(write([("k", (ARRAY, STRING), raw)])).metadata.strings("k")
    texts = [text.decode("utf-8", "replace") for text in raw]
    assert (strings.raw(), list(strings), len(strings)) == (raw, texts, len(raw))
    index = data.draw(st.integers(-12, 12))
    if -len(raw) <= index < len(raw):
        assert strings[index] == texts[index]
    else:
        with pytest.raises(IndexError):
            strings[index]
    chosen = data.draw(st.slices(12))
    assert strings[chosen] == texts[chosen]


@pytest.mark.parametrize(
    ("getter", "good"),
    [
        ("integer", "scalar.0"),
        ("number", "scalar.6"),
        ("boolean", "scalar.7"),
        ("string", "general.architecture"),
        ("strings", "array.strings"),
        ("array", "array.4"),
    ],
)
def test_getters_take_their_type_alone_and_name_file_and_key(getter: str, good: str) -> None:
    keys: list[Key] = [
        ("text", STRING, "long " * 1000),
        ("negative", I32, -1),
        ("nan", F32, np.nan),
    ]
    metadata = gguf.Metadata(
        "f.gguf", dict(read(small()).metadata) | dict(read(write(keys)).metadata)
    )
    get = getattr(metadata, getter)
    assert get(good) is not None
    with pytest.raises(ConfigError, match=r"^f\.gguf: the key some\.key is missing$"):
        get("some.key")
    wrong = {"text", "negative", "nan", "scalar.0", "scalar.7", "array.strings", "array.4", good}
    lenient = {
        "integer": {"array.4"},  # all its elements are equal
        "number": {"negative", "scalar.0", "array.4"},
        "string": {"text"},
    }
    wrong -= {good} | lenient.get(getter, set())
    for key in wrong:
        with pytest.raises(ConfigError) as caught:
            get(key)
        message = str(caught.value)
        assert message.startswith(f"f.gguf: {key} must be ")
        assert len(message) < 200
        assert "\n" not in message


@pytest.mark.parametrize(
    ("getter", "value", "expected"),
    [
        ("integer", 7.0, 7),
        ("integer", np.array([7, 7], np.int8), 7),
        ("integer", np.array([7.0]), 7),
        ("integer", np.array([2**64 - 1], np.uint64), 2**64 - 1),
        ("number", np.array([0.5, 0.5], np.float32), 0.5),
        ("number", 7, 7.0),
        ("boolean", 1, True),
        ("boolean", 0.0, False),
        ("boolean", np.array([True, True]), True),
        ("integers", 7, [7]),
        ("integers", True, [1]),
        ("integers", np.array([]), []),
        ("integers", np.array([-1.0, 2.0]), [-1, 2]),
        ("integers", np.array([2**64 - 1], np.uint64), [2**64 - 1]),
    ],
)
def test_one_value_in_many_forms(getter: str, value: Any, expected: Any) -> None:
    got = getattr(gguf.Metadata("f.gguf", {"k": value}), getter)("k")
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("getter", "value"),
    [
        ("integer", 7.5),
        ("integer", math.nan),
        ("integer", math.inf),
        ("integer", True),
        ("integer", np.array([1, 2])),
        ("integer", np.array([])),
        ("integer", np.array([math.nan, math.nan])),
        ("number", np.array([math.nan])),
        ("number", np.array([1.0, 2.0])),
        ("boolean", 2),
        ("boolean", "true"),
        ("boolean", np.array([True, False])),
        ("integers", "7"),
        ("integers", np.array([1.5])),
        ("integers", np.array([math.nan])),
        ("integers", math.inf),
    ],
)
def test_no_form_of_another_value(getter: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^f\.gguf: k must be "):
        getattr(gguf.Metadata("f.gguf", {"k": value}), getter)("k")


def test_getters_return_the_value_and_the_default() -> None:
    metadata = read(small()).metadata
    assert metadata.integer("scalar.10") == 2**64 - 1
    assert metadata.number("scalar.12") == 1e300
    assert metadata.number("scalar.0") == 255.0
    assert metadata.boolean("scalar.7") is True
    assert metadata.string("general.architecture") == "gemma3"
    assert metadata.integer("absent", 7) == 7
    assert metadata.boolean("absent", False) is False
    assert metadata.string("absent", "") == ""


def test_bytes_that_are_not_utf8_are_replaced() -> None:
    keys: list[Key] = [(b"k\xff", STRING, b"\xc3("), ("a", (ARRAY, STRING), [b"\xff\xfe", "b"])]
    metadata = read(write(keys)).metadata
    assert metadata["k\ufffd"] == "\ufffd("
    strings = metadata.strings("a")
    assert list(strings) == [strings[0], strings[1]] == ["\ufffd\ufffd", "b"]
    assert "".join(strings).encode()  # no lone surrogate, which no output could take
    assert strings.raw() == [b"\xff\xfe", b"b"]


def test_any_byte_but_zero_is_true() -> None:
    data = write([("flag", BOOL, True), ("flags", (ARRAY, BOOL), [True, False, True])])
    metadata = read(data.replace(b"\x01\x00\x01", b"\x02\x00\xff")).metadata
    assert metadata.array("flags").tolist() == [True, False, True]


# -- damage ---------------------------------------------------------------------------


def at_offset(data: bytes, offset: int) -> bytes:
    """The file of one tensor ``t`` with another offset."""
    place = data.index(string("t")) + 9 + 4 + 8 + 4
    return data[:place] + struct.pack("<Q", offset) + data[place + 8 :]


def with_counts(tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + bytes(64)


ONE = write([], [tensor()])
BIG_ENDIAN = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", r"not a GGUF file: it is empty"),
    "three bytes": (b"GGU", r"not a GGUF file: its first bytes are b'GGU'"),
    "zip": (b"PK\3\4" + bytes(99), r"not a GGUF file: its first bytes are b'PK"),
    "magic alone": (b"GGUF", r"truncated: the file ends in its header"),
    "big endian": (BIG_ENDIAN, r"a big-endian GGUF; convert it"),
    "version 1": (write(version=1), r"GGUF version 1 is not one of \(2, 3\); convert the model"),
    "version 4": (write(version=4), r"GGUF version 4 is not one of"),
    "version 0": (write(version=0), r"GGUF version 0 is not one of"),
    "2^63 tensors": (with_counts(2**63, 0), r"9,223,372,036,854,775,808 tensors are too many"),
    "2^63 keys": (with_counts(0, 2**63), r"9,223,372,036,854,775,808 keys are too many"),
    "more tensors": (with_counts(60_000, 0), r"tensor name '' is empty|truncated"),
    "key twice": (write([("k", U8, 1), ("k", U8, 2)]), r"metadata key k is there twice"),
    "empty key": (write([("", U8, 1)]), r"metadata key '' is empty"),
    "key of control characters": (
        write([("a\nb", U8, 1)]),
        r"key 'a\\nb' is empty, too long or un",
    ),
    "key too long": (write([("k" * 65_536, U8, 1)]), r"metadata key 'k{80}' is empty, too long"),
    "value type 13": (
        write([("k", U32, 5)]).replace(struct.pack("<II", U32, 5), struct.pack("<II", 13, 5)),
        r"k: 13 is not a GGUF value type",
    ),
    "array of arrays": (
        write([("k", (ARRAY, U32), [5])]).replace(
            struct.pack("<II", ARRAY, U32), struct.pack("<II", ARRAY, ARRAY)
        ),
        r"k: an array of type 9 is not supported",
    ),
    "string of 2^63": (
        write([("k", STRING, "abc")]).replace(string("abc"), struct.pack("<Q", 2**63) + b"abc"),
        r"truncated: the file ends in its metadata",
    ),
    "last string cut": (
        write([("k", (ARRAY, STRING), ["abc" * 20])])[:80],
        r"truncated: the file ends in its metadata",
    ),
    "2^63 strings": (
        write([("k", (ARRAY, STRING), ["abc"])]).replace(
            struct.pack("<IQ", STRING, 1), struct.pack("<IQ", STRING, 2**63)
        ),
        r"truncated: the file ends in its metadata",
    ),
    "2^64-1 numbers": (
        write([("k", (ARRAY, F64), [1.0])]).replace(
            struct.pack("<IQ", F64, 1), struct.pack("<IQ", F64, 2**64 - 1)
        ),
        r"truncated: the file ends in its metadata",
    ),
    "tensor twice": (write([], [tensor(), tensor()]), r"tensor t is there twice"),
    "tensor without a name": (write([], [tensor("")]), r"tensor name '' is empty"),
    "tensor name of 64 bytes": (write([], [tensor("ä" * 32)]), r"is empty, too long"),
    "escape in tensor name": (write([], [tensor("\x1b[2J")]), r"tensor name '\\x1b\[2J' is"),
    "no dimension": (write([], [tensor(shape=())]), r"tensor t has 0 dimensions"),
    "five dimensions": (write([], [tensor(shape=(1,) * 5)]), r"tensor t has 5 dimensions"),
    "dimension of 0": (write([], [tensor(shape=(8, 0))]), r"impossible shape \(8, 0\)"),
    "dimension of 2^63": (write([], [tensor(shape=(2**63,))]), r"t has the impossible shape"),
    "product of 2^64": (write([], [tensor(shape=(2**32, 2**32))]), r"t has the impossible shape"),
    "part of a block": (write([], [tensor(shape=(33,), kind=8)]), r"impossible shape \(33,\)"),
    "type 4": (write([], [tensor(kind=4)]), r"tensor t is of the unknown type 4"),
    "type 2^31": (write([], [tensor(kind=2**31)]), r"tensor t is of the unknown type 2147483648"),
    "past the end": (write([], [tensor(shape=(9,))]), r"truncated: tensor t ends at byte"),
    "offset past the end": (at_offset(ONE, 32), r"truncated: tensor t ends at byte"),
    "offset overflow": (at_offset(ONE, 2**64 - 32), r"truncated: tensor t ends at byte"),
    "unaligned offset": (at_offset(ONE, 8), r"tensor t starts at no multiple of 32"),
    "alignment 0": (write([("general.alignment", U32, 0)]), r"alignment is 0, no power of two"),
    "alignment 12": (
        write([("general.alignment", U32, 12)]),
        r"alignment is 12, no power of two",
    ),
    "alignment as text": (write([("general.alignment", STRING, "32")]), r"is '32', no power"),
    "alignment as flag": (write([("general.alignment", BOOL, True)]), r"is True, no power"),
    "alignment as list": (
        write([("general.alignment", (ARRAY, U32), [32, 32])]),
        r"general.alignment is an array of 2, no power",
    ),
    "alignment of 2^63": (
        write([("general.alignment", U64, 2**63)], [tensor()]),
        r"truncated: tensor t ends at byte",
    ),
    "one file of a split": (
        write([("split.count", U16, 3)]),
        r"one part of 3; name the first part",
    ),
    "split count as list": (
        write([("split.count", (ARRAY, U16), [1, 1])]),
        r"one part of an array",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case: str) -> None:
    data, message = DAMAGED[case]
    with pytest.raises(FormatError, match=message) as caught:
        read(data)
    assert str(caught.value).startswith("small.gguf: ")
    assert "\n" not in str(caught.value)


def test_version_2_and_another_alignment_are_read() -> None:
    keys: list[Key] = [("general.alignment", U32, 8)]
    raw = np.arange(3, dtype="<f4").tobytes()
    file = read(write(keys, [tensor("a", (3,), raw=raw), tensor("b")], version=2, alignment=8))
    assert bytes(file.tensors["a"].data()) == raw
    assert file.tensors["b"].offset - file.tensors["a"].offset == 16


def test_parts_in_the_wrong_order() -> None:
    first, second = cut(small(), [100])
    with pytest.raises(FormatError, match="are its parts in order"):
        gguf.read([blob(second, first)])


# -- split files ----------------------------------------------------------------------


def test_split_file_is_the_sum_of_its_parts() -> None:
    file = gguf.read([part(0, 2, "a"), part(1, 2, "b")])
    assert {name: bytes(info.data()) for name, info in file.tensors.items()} == {
        "a": b"a" * 32,
        "b": b"b" * 32,
    }
    assert file.name == "a.gguf"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [part(1, 2, "b"), part(0, 2, "a")],
            r"b.gguf: expected part 1 of 2, but its split.no is 1",
        ),
        ([part(0, 3, "a"), part(1, 3, "b")], r"a.gguf: expected part 1 of 2, but its split.count"),
        ([part(0, 2, "a"), part(1, 2, "a")], r"a.gguf: tensor a is in two parts"),
        ([part(0, 2, "a", 5), part(1, 2, "b", 5)], r"a.gguf: 2 tensors in all parts, not 5"),
        ([part(0, 2, "a", "x"), part(1, 2, "b")], r"a.gguf: 2 tensors in all parts, not 'x'"),
        ([blob(ONE), blob(ONE)], r"expected part 1 of 2, but its split.no is missing"),
        ([part([0, 0], [2, 2], "a", kind=(ARRAY, U16)), part(1, 2, "b")], r"split.no is an array"),
    ],
)
def test_parts_that_do_not_fit(parts: list[Blob], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        gguf.read(parts)
