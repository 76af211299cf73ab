"""What a request's names mean, besides the fields of its model: tables, and no code.

A name that is in none of them, and is no other name of a field (``other_names.py``), is unknown.
It is ignored, and the answer names it (``ignored.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]

# Whoever sends these gets the same answer without them.
IGNORED = frozenset(
    {
        "cache_prompt",  # prefixes are always reused
        "client_metadata",
        "dry_allowed_length",  # nothing without dry_multiplier, which is refused
        "dry_base",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",  # nothing without dynatemp_range
        "guided_decoding_backend",
        "id_slot",
        "include",  # what it could add is always there, or is not ours to make
        "max_tool_calls",  # of tools that run on the server, of which there are none
        "metadata",
        "mirostat_eta",  # nothing without mirostat
        "mirostat_tau",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "spaces_between_special_tokens",
        "store",  # nothing ever is
        "user",
        "verbosity",  # advice to other models
        "xtc_threshold",  # nothing without xtc_probability
    }
)

_NO_SAMPLER = "this sampler is not there: leave it out"

# Fields that mean something that is not done here: the values that ask for nothing, and a hint.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_special_tokens": ((True,), "send the ids of the prompt"),
    "allowed_token_ids": (([],), "use grammar or logit_bias"),
    "audio": ((), "only text is made"),
    "background": ((False,), "requests are answered at once"),
    "bad_words": (([],), "use logit_bias"),
    "best_of": ((1,), "use n"),
    "chat_template": (("",), "the model's own template is used"),
    "context_management": (([],), "send a shorter conversation"),
    "conversation": ((), "nothing is stored: send the whole conversation"),
    "documents": (([],), "put them into a message"),
    "dry_multiplier": ((0,), _NO_SAMPLER),
    "dynatemp_range": ((0,), _NO_SAMPLER),
    "echo": ((False,), "the prompt is not repeated"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "functions": (([],), "use tools"),
    "ignore_eos": ((False,), "bar the tokens that end an answer with logit_bias"),
    "include_stop_str_in_output": ((False,), "the answer ends before the stop string"),
    "min_tokens": ((0,), "use regex or grammar"),
    "mirostat": ((0,), _NO_SAMPLER),
    "modalities": ((["text"],), "only text is made"),
    "moderation": ((), "nothing is moderated"),
    "prediction": ((), "leave it out"),
    "previous_response_id": ((), "nothing is stored: send the earlier items as input"),
    "prompt": ((), "there are no stored prompts"),
    "prompt_logprobs": ((False, 0), "only tokens of the answer have logprobs"),
    "stop_token_ids": (([],), "use stop"),
    "structured_outputs.structural_tag": ((), "use grammar"),
    "suffix": (("",), "there is no fill-in-the-middle"),
    "tfs_z": ((1,), _NO_SAMPLER),
    "top_a": ((0,), _NO_SAMPLER),
    "top_n_sigma": ((-1, 0), _NO_SAMPLER),
    "truncation": (("disabled", "auto"), "send a shorter conversation"),
    "typ_p": ((1,), _NO_SAMPLER),
    "typical_p": ((1,), _NO_SAMPLER),
    "use_beam_search": ((False,), _NO_SAMPLER),
    "web_search_options": ((), "there is no web search"),
    "xtc_probability": ((0,), _NO_SAMPLER),
}

# Fields that ask for nothing at these values; at any other they are ignored and named.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "min_keep": (0,),
    "n_discard": (0,),
    "n_indent": (0,),
    "n_keep": (0,),
    "penalize_nl": (False,),
    "post_sampling_probs": (False,),
    "priority": (0,),
    "repeat_last_n": (-1,),  # penalties are over the whole prompt and answer
    "return_progress": (False,),
    "return_token_ids": (False,),
    "return_tokens": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "t_max_predict_ms": (0, -1),
    "timings_per_token": (False,),
    "truncate_prompt_tokens": (-1,),
}

# Values of our own fields that other servers read as "not given".
NO_VALUE: dict[str, tuple[Any, ...]] = {
    "grammar": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": ("",),
    "guided_regex": ("",),
    "logit_bias": (False, {}, []),
    "logprobs": (False,),
    "max_completion_tokens": (-1, 0),
    "max_output_tokens": (-1, 0),
    "max_tokens": (-1, 0),
    "model": ("",),
    "n_predict": (-2,),
    "reasoning_effort": ("",),
    "regex": ("",),
    "seed": (-1,),
    "stop": ("", []),
    "structured_outputs.choice": ([],),
    "structured_outputs.json": ("",),
    "thinking_budget": (-1,),
    "tools": ([],),
}

# What is known of the objects that pydantic does not read: their keys, and what lies below them.
Shape = Mapping[str, Any]


def _leaves(*names: str) -> dict[str, Shape]:
    return {name: {} for name in names}


# Parts of another kind than text are known, so that they are refused as such.
_PART = _leaves(
    "type", "text", "annotations", "logprobs", "refusal", "image_url", "input_audio", "file",
    "file_id", "file_data", "filename", "detail", "video_url",
)  # fmt: skip
_FUNCTION = _leaves("name", "description", "parameters", "strict")
MESSAGE: Shape = {
    **_leaves("role", "name", "tool_call_id", "reasoning", "reasoning_content"),
    "content": _PART,
    "tool_calls": {**_leaves("id", "type", "index"), "function": _leaves("name", "arguments")},
}
TOOL: Shape = {"type": {}, "function": _FUNCTION}
RESPONSE_TOOL: Shape = {"type": {}, **_FUNCTION}
ITEM: Shape = {
    **_leaves(
        "type", "id", "status", "role", "phase", "call_id", "name", "arguments", "summary",
        "encrypted_content",
    ),
    "content": _PART,
    "output": _PART,
}  # fmt: skip


def among(given: Any, values: tuple[Any, ...]) -> bool:
    """Whether ``given`` is one of ``values``; true and false are no numbers."""
    return any(
        given == value and isinstance(given, bool) == isinstance(value, bool) for value in values
    )
