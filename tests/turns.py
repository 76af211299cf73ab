"""A model's turn in pieces, and the parts that a router makes of them."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from gemloom.text.router import Part, Router, ToolCall

QUOTE = '<|"|>'
STRAY = ("<tool_call|>", "<|tool_response>", "<tool_response|>", QUOTE)
MARKERS = ("<|channel>", "<|channel>thought", "<|channel>thought\n", "<channel|>", "\n<channel|>")
CALL = '<|tool_call>call:look_up{word:<|"|>lip<|"|>,exact:true}<tool_call|>'
LOOK_UP = ToolCall("look_up", '{"word":"lip","exact":true}')


def merged(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of one type as one, as if the text had come at once."""
    whole: list[Part] = []
    for kind, group in groupby(parts, key=type):
        run = list(group)
        whole += run if kind is ToolCall else [kind("".join(part.text for part in run))]
    return whole


def routed(pieces: str | Sequence[str], reasoning: bool = False) -> list[Part]:
    router = Router(reasoning)
    pieces = [pieces] if isinstance(pieces, str) else pieces
    parts = [part for piece in pieces for part in router.push(piece)]
    return merged(parts + router.flush())


PIECES = (
    *MARKERS, "<|tool_call>", "<tool_call|>", "<|tool_call>call:f{", "}<tool_call|>", "call:", "a:",
    QUOTE, '"', "{", "}", "[", "]", ",", ":", "1", "true", "-1.5e3", " ", "\n", "<", "|>", "<|",
    "thought", CALL, "\\", "é", "<turn|>",
)  # fmt: skip
