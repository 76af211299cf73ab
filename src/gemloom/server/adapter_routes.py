"""The routes that list, load, upload and unload adapters. Included by ``create_app``."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from gemloom.errors import OptionError
from gemloom.server import bodies
from gemloom.server.guard import read_body, read_buffer
from gemloom.server.parsing import parse, parse_scales
from gemloom.server.protocol import AdapterRequest
from gemloom.server.service import Service, in_thread


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _admit_change(request: Request) -> None:
    _service(request).admit_change(request)


async def _admit_upload(request: Request) -> None:
    _service(request).admit_upload(request)


routes = APIRouter()
_CHANGES = [Depends(_admit_change)]


@routes.get("/v1/adapters")
async def adapters(request: Request) -> Response:
    """The adapters that requests can name."""
    data = [bodies.adapter_body(info) for info in _service(request).adapters.there()]
    return JSONResponse({"object": "list", "data": data})


@routes.post("/v1/adapters", dependencies=_CHANGES)
async def load(request: Request) -> Response:
    """Load, or load again, the file that the operator registered under a name."""
    service = _service(request)
    deadline = service.deadline()
    data = await read_body(request, service.settings.max_body)
    asked = await in_thread(partial(parse, AdapterRequest, data), deadline)  # strict: no "path"
    work = partial(service.adapters.load, asked.name, asked.scale)
    return JSONResponse(bodies.adapter_body(await in_thread(work, deadline)))


@routes.put(
    "/v1/adapters/{name}",
    dependencies=[Depends(_admit_upload)],
    openapi_extra={"requestBody": {"content": {"application/octet-stream": {}}}},
)
async def upload(request: Request, name: str, scale: float | None = None) -> Response:
    """Load an adapter from the body: a GGUF file, or an archive of a PEFT folder."""
    service = _service(request)
    deadline = service.deadline()
    data = await read_buffer(request, service.settings.max_adapter)
    if not data:
        raise OptionError("the body is empty: it must be an adapter's bytes")
    work = partial(service.adapters.upload, name, data, scale)
    return JSONResponse(bodies.adapter_body(await in_thread(work, deadline)))


@routes.delete("/v1/adapters/{name}", dependencies=_CHANGES)
async def unload(request: Request, name: str) -> Response:
    """Take a name away; requests under way keep what they have."""
    await in_thread(partial(_service(request).adapters.unload, name), None)
    return JSONResponse({"name": name, "object": "adapter", "deleted": True})


@routes.get("/lora-adapters")
async def lora_adapters(request: Request) -> Response:
    """The adapters as llama.cpp's clients know them: id and default scale."""
    return JSONResponse(_service(request).adapters.by_id())


@routes.post("/lora-adapters", dependencies=_CHANGES)
async def set_defaults(request: Request) -> Response:
    """The scales of requests that say nothing of adapters: [{"id": 0, "scale": 0.5}]."""
    service = _service(request)
    data = await read_body(request, service.settings.max_body)
    scales = await service.parsed(parse_scales, data, request, service.deadline())
    service.adapters.set_defaults(scales)
    return JSONResponse({"success": True})
