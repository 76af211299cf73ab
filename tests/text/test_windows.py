"""Text tokenized a window at a time gives the ids of the whole, in bounded memory."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemloom.errors import OptionError
from gemloom.text import windows
from gemloom.text.tokenizer import Tokenizer, _ids
from vocabularies import TEXTS, gemma3, gemma4, small

EVERY = [
    pytest.param(lambda: small("gemma4"), id="small-gemma4"),
    pytest.param(lambda: small("gemma3"), id="small-gemma3"),
    pytest.param(gemma4, id="gemma4"),
    pytest.param(gemma3, id="gemma3", marks=pytest.mark.real),
]
every = pytest.mark.parametrize("load", EVERY)
Load = Callable[[], Tokenizer]

bits = st.sampled_from(
    ["a", "aaaa", "<", "<|turn>", "<bos>", "<unk", " ", "   ", "\n", "\n\n\n", "\t\t", "the ", "hi",
     "é", "界", "🦙", "\x00", "▁", "<table>", "def f(x):\n    return x\n"]
)  # fmt: skip
repeated = st.builds(lambda bit, times: bit * times, bits, st.integers(1, 40))
long_texts = st.lists(st.one_of(repeated, st.text(max_size=30)), max_size=60).map("".join)


def whole(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    return _ids(tokenizer._parsing if special else tokenizer._plain, text)


@every
@settings(max_examples=60)
@given(text=long_texts, size=st.integers(256, 600), special=st.booleans())
def test_windows_give_the_ids_of_the_whole(load: Load, text: str, size: int, special: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "WINDOW", size)
        pieces = list(load().pieces(text, special))
    assert [token for piece in pieces for token in piece] == whole(load(), text, special)


@pytest.mark.parametrize("load", EVERY[::2])
@settings(max_examples=60)
@given(text=long_texts, size=st.integers(8, 100))
def test_plain_text_may_be_cut_into_tiny_windows(load: Load, text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "WINDOW", size)
        assert load().encode(text) == whole(load(), text, False)


@every
def test_hard_texts_in_windows(load: Load) -> None:
    text = "".join(TEXTS) * 30
    assert len(text) > windows.WINDOW
    for special in (False, True):
        assert load().encode(text, special) == whole(load(), text, special)


def test_a_border_that_does_not_hold_is_not_used() -> None:
    """A made-up encoder whose first token of a window differs: it needs the whole text."""
    asked = []

    def encode(text: str) -> list[int]:
        asked.append(len(text))
        return [1 if i else 0 for i in range(len(text))]

    text = "x" * (5 * windows.WINDOW)
    ids = [token for piece in windows.in_windows(encode, text, [b"x", b"x"]) for token in piece]
    assert ids == [0] + [1] * (len(text) - 1)
    assert max(asked) == len(text)


def test_a_lone_surrogate_is_named_by_its_place_in_the_whole() -> None:
    place = windows.WINDOW * 2 + 5
    with pytest.raises(OptionError, match=f"lone surrogate at character {place:,}"):
        small("gemma4").encode("a" * place + "\ud800" + "b" * windows.WINDOW)


@pytest.mark.parametrize("unit", ["a ", "a", "<", "<|turn", "\n", "\U0001f999"])
def test_pieces_are_small(unit: str) -> None:
    """Nobody needs all ids at once: what one piece holds does not grow with the text."""
    text = (unit * 300_000)[:300_000]
    pieces = [len(piece) for piece in gemma4().pieces(text, special=True)]
    assert max(pieces) <= 4 * windows.WINDOW
    assert len(pieces) >= len(text) // windows.WINDOW


@pytest.mark.parametrize("guard", ["\ufdd0"])
def test_guarded_text_takes_linear_time(guard: str) -> None:
    """A quadratic way would take minutes."""
    text = "<|turn>user\n" + ("<" + guard) * 500_000 + "<turn|>"
    ids = gemma4().encode(text, special=True, guard=guard)
    assert (ids[0], ids[-1]) == (105, 106)
    assert gemma4().decode(ids[1:-1]) == "user\n" + "<" * 500_000
