"""What callers give as a prompt or as rows: text or any sequence of integers, checked."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

from gemloom.errors import ContextError, OptionError, RequestError
from gemloom.text.tokenizer import Tokenizer

_COUNTED = 50_000  # tokens over the context, before counting them is given up


def prompt_ids(
    prompt: str | Sequence[int], tokenizer: Tokenizer, n_vocab: int, context: int
) -> list[int]:
    """A prompt as ids: text gets one BOS, ids are used as they are.

    RequestError for an empty one, OptionError for what is no id or several prompts, ContextError.
    """
    if isinstance(prompt, str):
        ids = text_ids(prompt, tokenizer, context)
    else:
        _refuse_several(prompt)
        ids = integers("the prompt", prompt)
    if not ids:
        raise RequestError("the prompt is empty")
    for token in ids:
        if not 0 <= token < n_vocab:
            raise OptionError(f"{token} is not a token id of this model")
    if len(ids) > context:
        raise ContextError(f"the prompt has {len(ids):,} tokens, the context {context:,}")
    return ids


def text_ids(text: str, tokenizer: Tokenizer, context: int, special: bool = False) -> list[int]:
    """The ids of a text with one BOS; none for no text. ContextError as ``within``."""
    return tokenizer.with_bos(within(tokenizer.pieces(text, special), context)) if text else []


def within(pieces: Iterable[list[int]], context: int) -> list[int]:
    """The ids of all pieces. ContextError where the context does not hold them.

    It tells how many there are; those of a text that is far too long are not all made.
    """
    ids: list[int] = []
    most = context + 1  # one more for a BOS that the text has itself
    for piece in pieces:
        if len(ids) > most + _COUNTED:
            raise ContextError(f"the prompt has over {len(ids):,} tokens, the context {context:,}")
        ids += piece
    if len(ids) > most:
        raise ContextError(f"the prompt has {len(ids):,} tokens, the context {context:,}")
    return ids


def _refuse_several(prompt: Any) -> None:
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str | list | tuple):
        raise OptionError(
            "the prompt must be integers or one text: for several at once load with slots=N, "
            "start stream() for each, then take completion() of each"
        )


def integers(what: str, values: Any) -> list[int]:
    """Any sequence of integers as a list. OptionError for anything else, bytes among it."""
    try:
        if not isinstance(values, str | bytes | bytearray | memoryview):
            return [index(value) for value in values]
        raise TypeError  # noqa: TRY301  (a string of bytes is no list of ids)
    except TypeError:
        raise OptionError(f"{what} must be integers, not {reprlib.repr(values)}") from None
