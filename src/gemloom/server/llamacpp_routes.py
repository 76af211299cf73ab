"""The routes that llama.cpp's clients know: tokens, templates, slots, and adapters by id."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from gemloom.server.dialects import llamacpp
from gemloom.server.dialects.llamacpp import DetokenizeRequest, TokenizeRequest
from gemloom.server.guard import read_body
from gemloom.server.parsing import parse_scales
from gemloom.server.protocol import Conversation
from gemloom.server.routing import ADMITTED, BYTES, CHANGES, service_of, told
from gemloom.server.service import in_thread, json_answer

_STATE_SLACK = 1 << 20  # bytes of saved state that are no K/V


async def _admit_state(request: Request) -> None:
    service_of(request).admit_state(request)


routes = APIRouter(dependencies=ADMITTED)
adapter_routes = APIRouter(dependencies=ADMITTED)  # after those of ``adapter_routes.py``


@routes.post("/tokenize", openapi_extra=told(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Text to ids."""
    service = service_of(request)
    asked = await service.read(TokenizeRequest, request, service.deadline())
    lists = llamacpp.tokenized(asked, service.backend.tokenizer)
    first = await in_thread(partial(next, lists, []), None)  # where it cannot be, this raises
    parts = llamacpp.tokens_body(chain([first], lists))
    return StreamingResponse(parts, media_type="application/json")


@routes.post("/detokenize", openapi_extra=told(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """Ids to text, special tokens shown."""
    service = service_of(request)
    asked = await service.read(DetokenizeRequest, request, service.deadline())
    decode = partial(llamacpp.text_body, asked, service.backend.tokenizer)
    return await json_answer(await in_thread(decode, None))


@routes.post("/apply-template", openapi_extra=told(Conversation))
async def apply_template(request: Request) -> Response:
    """The prompt that the model's template makes of a conversation: to look at, and as ids."""
    service = service_of(request)
    asked = await service.read(Conversation, request, service.deadline())
    render = partial(llamacpp.template_body, asked, service.backend)
    return await json_answer(await in_thread(render, None))


@routes.get("/slots")
async def slots(request: Request) -> Response:
    """How many requests fit, and how many there are."""
    return JSONResponse(llamacpp.slots_body(service_of(request).backend))


@routes.post("/slots", dependencies=[Depends(_admit_state)], openapi_extra=BYTES)
async def slot_state(request: Request, action: Literal["save", "restore"]) -> Response:
    """Save the state of the request that ended last as bytes, or restore what was saved."""
    backend = service_of(request).backend
    if action == "save":
        data = await in_thread(backend.save_state, None)
        return Response(data, media_type="application/octet-stream")
    memory = backend.memory()
    limit = memory["kv_full"] + memory["kv_sliding"] + _STATE_SLACK
    state = await read_body(request, limit)
    count = await in_thread(partial(backend.load_state, state), None)
    return JSONResponse({"restored": count})


@adapter_routes.get("/lora-adapters")
async def lora_adapters(request: Request) -> Response:
    """The adapters as llama.cpp's clients know them: id and default scale."""
    return JSONResponse(service_of(request).adapters.by_id())


@adapter_routes.post("/lora-adapters", dependencies=CHANGES)
async def set_defaults(request: Request) -> Response:
    """The scales of requests that say nothing of adapters: [{"id": 0, "scale": 0.5}]."""
    service = service_of(request)
    data = await read_body(request, service.settings.max_body)
    scales = await service.parsed(parse_scales, data, request, service.deadline())
    service.adapters.set_defaults(scales)
    return JSONResponse({"success": True})
