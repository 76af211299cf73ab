"""OpenAI's routes beside those that make text: embeddings and models."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gemloom.server import bodies
from gemloom.server.dialects import openai_embeddings
from gemloom.server.dialects.openai_embeddings import EmbeddingRequest
from gemloom.server.fields import Json
from gemloom.server.routing import ADMITTED, service_of, told
from gemloom.server.service import Service, json_answer

routes = APIRouter(dependencies=ADMITTED)


@routes.post("/embeddings", include_in_schema=False)
@routes.post("/v1/embeddings", openapi_extra=told(EmbeddingRequest))
async def embeddings(request: Request) -> Response:
    """One vector of length 1 for each text."""
    service = service_of(request)
    deadline = service.deadline()
    asked = await service.read(EmbeddingRequest, request, deadline)
    adapters = service.adapters_of(asked)
    work = partial(openai_embeddings.vectors, asked, service.backend, adapters)
    vectors, count = await service.long(request, work, deadline)
    shown = [openai_embeddings.encoded(vector, asked.encoding_format) for vector in vectors]
    return await json_answer(openai_embeddings.embeddings_body(shown, service.settings.name, count))


@routes.get("/models", include_in_schema=False)
@routes.get("/models/", include_in_schema=False)
@routes.get("/v1/models")
@routes.get("/v1/models/", include_in_schema=False)  # before: a model may be called anything
async def models(request: Request) -> Response:
    """The one model there is, its other names, and itself with each adapter."""
    service = service_of(request)
    own = service.settings.name
    adapted = [f"{own}:{info.name}" for info in service.adapters.there()]
    names = (own, *service.settings.aliases, *adapted)
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in names]})


@routes.get("/models/{name:path}", include_in_schema=False)
@routes.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One model."""
    service = service_of(request)
    service.check_name(name)
    return JSONResponse(_model(service, name))


def _model(service: Service, name: str) -> Json:
    served = service.backend
    sizes = (served.context, served.config.n_vocab, served.config.n_embd)
    return bodies.model_body(name, service.created, *sizes)
