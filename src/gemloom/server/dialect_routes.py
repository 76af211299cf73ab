"""The routes that make text: a table of dialects, and the one way to serve them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from gemloom.errors import GemloomError
from gemloom.server.bodies import error_body
from gemloom.server.dialects import openai_chat, openai_completions, openai_responses
from gemloom.server.dialects.dialect import Asked, Dialect
from gemloom.server.fields import Json
from gemloom.server.routing import ADMITTED, service_of, told
from gemloom.server.service import in_thread

DIALECTS: dict[str, Dialect[Any]] = {
    "/chat/completions": openai_chat.DIALECT,
    "/completions": openai_completions.DIALECT,
    "/responses": openai_responses.DIALECT,
}


async def serve(dialect: Dialect[Asked], request: Request) -> Response:
    """Answer a request of a dialect: read it, compose and start its runs, tell what they say."""
    service = service_of(request)
    deadline = service.deadline()
    asked = await service.read(dialect.body, request, deadline)
    adapters = service.adapters_of(asked)
    composed = await in_thread(partial(dialect.compose, asked, service.backend), deadline)
    name = service.answering(asked)
    answer = dialect.answer(asked, composed, name, service.backend.tokenizer)
    runs = await service.start(composed, adapters, deadline)
    stream = bool(asked.stream)
    return await service.answer(request, answer, runs, stream=stream, deadline=deadline)


def error_at(path: str, error: GemloomError) -> Json:
    """The body of an error, as the dialect of a path has it; where there is none, as OpenAI's."""
    dialect = DIALECTS.get(path.removeprefix("/v1"))
    return dialect.error(error) if dialect else error_body(error)


def _speaking(dialect: Dialect[Any]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return await serve(dialect, request)

    return answer


def dialect_routes() -> APIRouter:
    """A route for each dialect, with and without /v1 before its path."""
    made = APIRouter(dependencies=ADMITTED)
    for path, dialect in DIALECTS.items():
        answer, shown = _speaking(dialect), told(dialect.body)
        made.post(f"/v1{path}", name=dialect.name, description=dialect.about, openapi_extra=shown)(
            answer
        )
        made.post(path, include_in_schema=False)(answer)
    return made
