"""Stop strings end visible text alone, whatever thoughts and calls say and however text is cut."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemloom.text.router import Content, Part, Reasoning, Router
from gemloom.text.visible import Visible, VisibleStops
from turns import CALL, LOOK_UP, PIECES, merged, routed

soups = st.lists(st.sampled_from((*PIECES, "ab", "b", "\n\n")), max_size=14)
stop_lists = st.lists(
    st.sampled_from(["\n\n", "ab", "b", "<", "true", "channel", "x", " b:", "<turn|>"]),
    min_size=1, max_size=3, unique=True,
)  # fmt: skip


def shown(pieces: list[str], stops: list[str]) -> tuple[list[Part], str | None]:
    """What a reader sees of an answer; the engine, which sees it too, stops at the same place."""
    reader, engine = Visible(Router(), stops), VisibleStops(Visible(Router(), stops))
    parts: list[Part] = []
    for piece in pieces:
        parts += reader.push(piece)
        assert engine.push(piece) == (piece, reader.matched is not None)
    parts += reader.flush()
    assert engine.flush() == ""
    assert engine.matched == reader.matched
    return merged(parts), reader.matched


def expected(text: str, stops: list[str]) -> list[Part]:
    parts: list[Part] = []
    for part in routed(text):
        found = []
        if isinstance(part, Content):
            found = [part.text.find(stop) + len(stop) for stop in stops if stop in part.text]
        if found:
            end = min(found)
            assert isinstance(part, Content)
            start = min(
                end - len(stop)
                for stop in stops
                if part.text.find(stop) + len(stop) == end and stop in part.text
            )
            return [*parts, Content(part.text[:start])] if start else parts
        parts.append(part)
    return parts


@settings(deadline=None, max_examples=300)
@given(soups, stop_lists, st.data())
def test_content_ends_before_the_first_stop(
    soup: list[str], stops: list[str], data: st.DataObject
) -> None:
    text = "".join(soup)
    wanted = expected(text, stops)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    for cut in (pieces, soup, list(text), [text]):
        parts, matched = shown(cut, stops)
        assert parts == merged(wanted)
        assert (matched is None) == (wanted == routed(text))


THOUGHT = "<|channel>thought\na\n\nb\n<channel|>"


@pytest.mark.parametrize(
    ("text", "stop", "parts"),
    [
        (f"{THOUGHT}Hi\n\nthere", "\n\n", [Reasoning("a\n\nb"), Content("Hi")]),
        (f"{THOUGHT}\nHi", "b\nH", [Reasoning("a\n\nb"), Content("\nHi")]),
        (f"{CALL}a word", "word", [LOOK_UP, Content("a ")]),
        (f"wo{CALL}rd", "word", [Content("wo"), LOOK_UP, Content("rd")]),
        (f"a{CALL}bc{CALL}", "c", [Content("a"), LOOK_UP, Content("b")]),
        ("a<channel|>b", "ab", []),
        ("a<", "<", [Content("a")]),
        ("a<", "<b", [Content("a<")]),
    ],
)
def test_stops_at_the_seams(text: str, stop: str, parts: list[Part]) -> None:
    for at in range(len(text) + 1):
        assert shown([text[:at], text[at:]], [stop])[0] == parts
