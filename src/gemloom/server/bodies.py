"""What answers share as JSON: errors, models, adapters. Pure, no HTTP."""

from __future__ import annotations

from gemloom.adapters.info import AdapterInfo
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
