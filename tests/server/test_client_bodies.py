"""Bodies as clients send them: each is taken, and only what nobody can do is named as ignored."""

import json
import re
from typing import Any

import pytest

from gemloom.server.dialects.openai_chat import ChatRequest
from gemloom.server.dialects.openai_responses import ResponsesRequest
from gemloom.server.ignored import Ignored
from gemloom.server.parsing import parse
from gemloom.server.protocol import Body

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}

CODEX = {
    "model": "tiny",
    "instructions": "You are a coding agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "b"}]},
    ],
    "tools": [
        {"type": "function", "name": "shell", "description": "Runs", "strict": False,
         "parameters": {"type": "object", "properties": {}}},
        {"type": "web_search", "external_web_access": False},
        {"type": "namespace", "name": "mcp__x", "description": "", "tools": []},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "xhigh", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "a-b",
    "text": {"verbosity": "low"},
    "client_metadata": {"installation": "x"},
}  # fmt: skip
LLAMA = {
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True, "cache_prompt": True, "reasoning_format": "auto",
    "samplers": "edkypmxt", "temperature": 0.8, "dynatemp_range": 0, "dynatemp_exponent": 1,
    "top_k": 40, "top_p": 0.95, "min_p": 0.05, "typical_p": 1, "xtc_probability": 0,
    "xtc_threshold": 0.1, "repeat_last_n": 64, "repeat_penalty": 1, "presence_penalty": 0,
    "frequency_penalty": 0, "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2,
    "dry_penalty_last_n": -1, "max_tokens": -1, "timings_per_token": True, "id_slot": -1,
    "n_probs": 0, "min_keep": 0, "grammar": "",
}  # fmt: skip
VLLM = {
    "messages": [{"role": "user", "content": "hi"}],
    "max_completion_tokens": 9, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
    "length_penalty": 1.0, "stop_token_ids": [], "include_stop_str_in_output": False,
    "ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True, "priority": 0,
    "spaces_between_special_tokens": True, "use_beam_search": False, "seed": -1,
    "structured_outputs": {"regex": "[0-9]+", "disable_any_whitespace": False},
}  # fmt: skip
INSTRUCTOR = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Jason is 25"}],
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "User", "schema": SCHEMA, "strict": True},
    },
}
AGENTS = {
    "model": "tiny",
    "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
    "tools": [{"type": "function", "function": {
        "name": "f", "description": "d", "parameters": SCHEMA, "strict": True}}],
    "tool_choice": "auto", "parallel_tool_calls": True, "store": True, "stream": False,
    "reasoning_effort": None, "verbosity": "low", "metadata": None, "top_logprobs": None,
    "prompt_cache_retention": None, "stream_options": None, "response_format": None,
}  # fmt: skip
LITELLM = {
    "model": "tiny",
    "messages": [{"role": "system", "content": [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": "b"}],
    "max_tokens": 5, "user": "u", "extra_body": {}, "drop_params": True,
    "thinking": {"type": "enabled", "budget_tokens": 1024},
}  # fmt: skip
ZED = {
    "messages": [{"role": "user", "content": "hi"}], "stream": True, "prompt_cache_key": "x",
    "reasoning_effort": "max", "stop": [], "tools": [], "parallel_tool_calls": False,
    "stream_options": {"include_usage": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "body", "named"),
    [
        (ResponsesRequest, CODEX, "tools:web_search, tools:namespace"),
        (ChatRequest, LLAMA, "reasoning_format, samplers, repeat_last_n, timings_per_token"),
        (ChatRequest, VLLM, "structured_outputs.disable_any_whitespace"),
        (ChatRequest, INSTRUCTOR, ""),
        (ChatRequest, AGENTS, ""),
        (ChatRequest, LITELLM, "extra_body, drop_params, messages.content.cache_control"),
        (ChatRequest, ZED, ""),
    ],
    ids=["codex", "llama.cpp", "vllm", "instructor", "agents", "litellm", "zed"],
)  # fmt: skip
def test_bodies_of_clients_are_taken(kind: type[Body], body: dict[str, Any], named: str) -> None:
    ignored = Ignored()
    asked = parse(kind, json.dumps(body).encode(), ignored)
    chat = asked.chat() if isinstance(asked, ResponsesRequest) else asked
    assert isinstance(chat, ChatRequest)
    chat.sampling()
    assert re.sub(r";near=\w+", "", str(ignored)) == named
