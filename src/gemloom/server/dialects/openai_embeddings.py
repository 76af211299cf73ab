"""/v1/embeddings: its requests, the vectors they ask for, its answers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from threading import Event
from typing import Any, Literal

import numpy as np

from gemloom.adapters.info import Scales
from gemloom.server.backend import Backend
from gemloom.server.dialects.openai import raw_ids
from gemloom.server.errors import FieldError
from gemloom.server.fields import Json
from gemloom.server.protocol import Adapted, Ids, Prompts, Raw, one_or_many

MAX_INPUTS = 2_048  # texts of one embeddings request


class EmbeddingRequest(Raw, Adapted):
    """POST /v1/embeddings."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None  # the model's own are the only ones there are

    def check_dimensions(self, own: int) -> None:
        """FieldError where vectors of another length are asked for."""
        if self.dimensions not in (None, own):
            raise FieldError("dimensions", f"dimensions: vectors have {own} here")

    def inputs(self) -> list[str | Ids]:
        """Each text by itself. FieldError where they are too many, or none."""
        found = one_or_many(self.input)
        if not 1 <= len(found) <= MAX_INPUTS:
            raise FieldError("input", f"input: from 1 to {MAX_INPUTS:,} texts, not {len(found):,}")
        return found


def vectors(
    asked: EmbeddingRequest, backend: Backend, adapters: Scales, given_up: Event
) -> tuple[list[np.ndarray], int]:
    """Vectors float32 [n_embd], and how many tokens they were made of."""
    asked.check_dimensions(backend.config.n_embd)
    prompts = [raw_ids(text, asked.parse_special, backend) for text in asked.inputs()]
    found = []
    for ids in prompts:
        if given_up.is_set():
            break
        found.append(backend.embed(ids, adapters))
    return found, sum(map(len, prompts))


def encoded(vector: np.ndarray, form: str | None) -> Any:
    """A vector as a list, or as base64 of little-endian float32."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


def embeddings_body(vectors: Sequence[Any], model: str, prompt_tokens: int) -> Json:
    """``vectors`` are lists of floats, or base64 of little-endian float32."""
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}
