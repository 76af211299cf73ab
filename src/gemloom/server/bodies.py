"""What answers share as JSON: errors, usage, timings, models, adapters. Pure, no HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemloom.adapters.info import AdapterInfo
from gemloom.engine.generation import Usage
from gemloom.errors import GemloomError
from gemloom.server.fields import Json

_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout_error",
                429: "rate_limit_error"}  # fmt: skip


def error_body(error: GemloomError) -> Json:
    """An error as OpenAI's API has it; one of ours that nobody foresaw keeps its details."""
    kind = _ERROR_TYPES.get(
        error.status, "invalid_request_error" if error.status < 500 else "server_error"
    )
    param = getattr(error, "param", None)
    return {"error": {"message": str(error), "type": kind, "param": param, "code": error.code}}


def event_text(event: Json) -> bytes:
    """One server-sent event; those with a type are named by it."""
    name = f"event: {event['type']}\n" if "type" in event else ""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"{name}data: {data}\n\n".encode()


def usage_body(prompts: Iterable[Usage], runs: Iterable[Usage], reasoning: int) -> Json:
    """Token counts: ``prompts`` has one usage a prompt, ``runs`` one an answer."""
    asked, made = list(prompts), sum(usage.completion_tokens for usage in runs)
    prompt = sum(usage.prompt_tokens for usage in asked)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in asked)},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def timings_body(usage: Usage) -> Json:
    """How fast one answer was, as llama.cpp's server tells it."""
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": usage.prompt_tokens - usage.cached_tokens,
        "prompt_ms": 1000 * usage.prompt_seconds,
        "prompt_per_second": usage.prompt_tokens_per_second,
        "predicted_n": usage.completion_tokens,
        "predicted_ms": 1000 * usage.decode_seconds,
        "predicted_per_second": usage.tokens_per_second,
    }


def model_body(name: str, created: int, context: int, n_vocab: int, n_embd: int) -> Json:
    """One entry of /v1/models; ``meta`` is an extra, as llama.cpp's server has it."""
    meta = {"n_ctx": context, "n_vocab": n_vocab, "n_embd": n_embd}
    return {"id": name, "object": "model", "created": created, "owned_by": "gemloom", "meta": meta}


def adapter_body(info: AdapterInfo) -> Json:
    """One entry of /v1/adapters."""
    return {
        "name": info.name,
        "object": "adapter",
        "version": info.version,
        "scale": info.scale,
        "rank": info.rank,
        "matrices": info.matrices,
        "norm": info.norm,
        "bytes": info.nbytes,
        "ignored": dict(info.ignored),
        "invocation_tokens": list(info.invocation),
        "running": info.users,
        "requests": info.requests,
    }


def embeddings_body(vectors: Sequence[Any], model: str, prompt_tokens: int) -> Json:
    """``vectors`` are lists of floats, or base64 of little-endian float32."""
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def piece_body(token: int, raw: bytes) -> Mapping[str, Any]:
    """A token as /tokenize tells it with pieces: its text, or its bytes where they are none."""
    try:
        return {"id": token, "piece": raw.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(raw)}
