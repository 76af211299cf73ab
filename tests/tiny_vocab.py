"""Vocabularies and chat templates of the tiny models, built like the real ones.

Gemma 4's is BPE over codepoints with a list of merges; Gemma 3's is SentencePiece,
whose scores rank the merges. Both have byte tokens, runs of newlines, tabs and spaces,
and markup. They hold a few dozen pieces where the real ones hold a quarter million.
"""

import functools
from typing import Any

from gguf import TokenType

NORMAL, CONTROL, USER, BYTE = (
    TokenType.NORMAL,
    TokenType.CONTROL,
    TokenType.USER_DEFINED,
    TokenType.BYTE,
)
Entry = tuple[str, float, TokenType]

UNRANKED = -1000.0  # the score of a token that no merge makes
SPACE = "▁"
MAX_RUN = 4  # 31 in the real vocabularies

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
GEMMA4_CONTROL = (
    "<|tool>", "<tool|>", "<|think|>", "<|turn>", "<turn|>",
    "<|image>", "<image|>", "<|audio>", "<audio|>", "<|image|>", "<|audio|>", "<|video|>",
)  # fmt: skip
GEMMA4_USER = (
    "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
    "<|channel>", "<channel|>",
)  # fmt: skip
GEMMA3_CONTROL = ("<start_of_turn>", "<end_of_turn>")
GEMMA3_USER = ("[multimodal]", "<start_of_image>", "<end_of_image>")
HTML = ("<table>", "</table>")

# In the order in which they merge. Each is made of two others or of single characters.
PIECES = (
    "▁t", "he", "in", "▁a", "th", "er", "on", "▁h", "or", "el",
    "ld", "is", "▁w", "ll", "an", "us", "od", "▁s", "st", "ou",
    "em", "gh", "ht", "ing", "and", "▁the", "the", "▁is", "▁in", "user",
    "mod", "model", "sy", "syst", "system", "orld", "world", "▁world", "hell", "hello",
    "▁hello", "▁an", "▁and", "ough", "though", "thought", "äh",
)  # fmt: skip
CHARACTERS = (SPACE, *map(chr, range(0x21, 0x7F)), "é", "ä", "世", "界")

GEMMA4_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
<|turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<turn|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|turn>model
{% endif -%}
"""

GEMMA3_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{%- if message.role not in ('user', 'assistant') -%}
{{ raise_exception('Only the roles user and assistant are supported') }}
{%- endif -%}
<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}
{{ message.content | trim }}<end_of_turn>
{% endfor -%}
{%- if add_generation_prompt -%}
<start_of_turn>model
{% endif -%}
"""


@functools.cache
def entries(arch: str) -> tuple[Entry, ...]:
    """Text, score and type of every token, in the order of their ids."""
    return tuple(_gemma4() if arch == "gemma4" else _gemma3())


def token_id(arch: str, text: str) -> int:
    """The id of a token. ValueError if there is none."""
    return [entry[0] for entry in entries(arch)].index(text)


def metadata(arch: str, suppress: tuple[str, ...] = ()) -> dict[str, Any]:
    """The ``tokenizer.*`` keys; ``suppress`` names tokens that may not be sampled."""
    texts, scores, kinds = (list(column) for column in zip(*entries(arch), strict=True))
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gemma4" if arch == "gemma4" else "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
    }
    if arch == "gemma4":
        keys["tokenizer.ggml.merges"] = merges()
        keys["tokenizer.ggml.mask_token_id"] = 4
        keys["tokenizer.chat_template"] = GEMMA4_TEMPLATE
    else:
        keys["tokenizer.ggml.pre"] = "default"
        keys["tokenizer.ggml.add_eos_token"] = False
        keys["tokenizer.chat_template"] = GEMMA3_TEMPLATE
    if suppress:
        keys["tokenizer.ggml.suppress_tokens"] = [token_id(arch, text) for text in suppress]
    return keys


@functools.cache
def _merge_list() -> tuple[str, ...]:
    made = [
        character * length for length in range(MAX_RUN, 1, -1) for character in ("\n", SPACE, "\t")
    ] + list(PIECES)
    known = {text for text, _, kind in entries("gemma4") if kind == NORMAL}
    return tuple(
        f"{text[:cut]} {text[cut:]}"
        for text in made
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in known and text[cut:] in known
    )


def merges() -> list[str]:
    """Gemma 4's merges, "left right", the first to be applied first: every way to each piece."""
    return list(_merge_list())


def _runs(character: str, shortest: int = 1) -> list[str]:
    return [character * length for length in range(shortest, MAX_RUN + 1)]


def _bytes(score: float) -> list[Entry]:
    return [(f"<0x{value:02X}>", score, BYTE) for value in range(256)]


def _gemma4() -> list[Entry]:
    normal = [*_runs("\n"), *_runs(SPACE, 2), *HTML]
    return [
        *((text, UNRANKED, CONTROL) for text in (*SPECIAL, *GEMMA4_CONTROL)),
        *((text, UNRANKED, USER) for text in GEMMA4_USER),
        *((text, UNRANKED, NORMAL) for text in normal),
        *_bytes(UNRANKED),
        *((text, UNRANKED, NORMAL) for text in (*PIECES, *CHARACTERS, *_runs("\t"))),
    ]


def _gemma3() -> list[Entry]:
    user = [*_runs("\n"), *_runs(" ", 2), *HTML]  # runs of real spaces, unlike Gemma 4's
    ranked = (*PIECES, *CHARACTERS)
    return [
        *((text, UNRANKED, CONTROL) for text in (*SPECIAL, *GEMMA3_CONTROL)),
        *((text, UNRANKED, USER) for text in (*GEMMA3_USER, *user)),
        *_bytes(0.0),
        *((text, -float(rank), NORMAL) for rank, text in enumerate(ranked)),
        *((text, UNRANKED, USER) for text in _runs("\t")),
    ]
