"""Gemma 4's markup for thoughts and tool calls: its markers, and how a call's keys are written.

The grammar (``tool_grammar.py``), the parser (``router.py``) and prompts (``chat.py``) share it.
"""

from __future__ import annotations

import re

THOUGHT, THOUGHT_END = "<|channel>", "<channel|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
RESULT, RESULT_END = "<|tool_response>", "<tool_response|>"
QUOTE = '<|"|>'  # around strings in calls
# A key that needs no quotes, for Python's regexes and llguidance's alike.
_EDGE = r'[^\s{}\[\],:"<\x00-\x1f\x7f]'
_INSIDE = r'[^{}\[\],:"<\x00-\x1f\x7f]'
BARE_KEY = f"{_EDGE}({_INSIDE}*{_EDGE})?"
_BARE = re.compile(BARE_KEY)


def is_bare(key: str) -> bool:
    """Whether a call's key is written as it is; any other stands in quotes."""
    return _BARE.fullmatch(key) is not None


def written_key(key: str) -> str:
    """A key as it stands in a call. It must not contain QUOTE."""
    return key if is_bare(key) else f"{QUOTE}{key}{QUOTE}"
