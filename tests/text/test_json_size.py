"""Values of a JSON text are counted without parsing it: exactly, however it is cut."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemloom.errors import TooManyValuesError
from gemloom.text import json_size

texts = st.one_of(st.text(max_size=8), st.text('"\\,:[]{}1', max_size=12))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=30,
)


def counted(value: Any) -> int:
    """What stands in the text for the values: commas, colons and brackets that open."""
    if isinstance(value, dict):
        inner = sum(1 + counted(item) for item in value.values())
    elif isinstance(value, list):
        inner = sum(map(counted, value))
    else:
        return 0
    return 1 + inner + max(len(value) - 1, 0)


def passes(data: bytes, most: int, size: int = 1 << 18) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_size, "MAX_VALUES", most)
        patch.setattr(json_size, "_SLICE", size)
        try:
            json_size.check_values(data)
        except TooManyValuesError:
            return False
    return True


@given(values, st.integers(1, 9), st.booleans())
def test_what_stands_in_strings_does_not_count(value: Any, size: int, plain: bool) -> None:
    data = json.dumps(value, ensure_ascii=plain).encode("utf-8", "surrogatepass")
    count = counted(value)
    assert passes(data, count, size)
    assert not count or not passes(data, count - 1, size)


@given(st.binary(max_size=60), st.integers(1, 9))
def test_any_bytes_are_counted(data: bytes, size: int) -> None:
    assert passes(data, 60, size)


def test_digits_of_numbers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_size, "MAX_DIGITS", 10)
    json_size.check_values(b'{"123456789":1234567890,"a":"1234567890"}')
    with pytest.raises(TooManyValuesError, match="10 digits"):
        json_size.check_values(b"[12345, 678901]")


def test_a_prompt_of_ids_that_fills_the_longest_context_passes() -> None:
    json_size.check_values(b'{"prompt":[' + b"262143," * (262_144 - 1) + b"1]}")
