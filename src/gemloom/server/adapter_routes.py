"""The routes that list, load, upload and unload adapters. Included by ``create_app``."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from gemloom.errors import OptionError
from gemloom.server import bodies
from gemloom.server.guard import read_body, read_buffer
from gemloom.server.parsing import parse
from gemloom.server.protocol import AdapterRequest
from gemloom.server.routing import ADMITTED, BYTES, CHANGES, service_of
from gemloom.server.service import in_thread


async def _admit_upload(request: Request) -> None:
    service_of(request).admit_upload(request)


routes = APIRouter(dependencies=ADMITTED)


@routes.get("/v1/adapters")
async def adapters(request: Request) -> Response:
    """The adapters that requests can name."""
    data = [bodies.adapter_body(info) for info in service_of(request).adapters.there()]
    return JSONResponse({"object": "list", "data": data})


@routes.post("/v1/adapters", dependencies=CHANGES)
async def load(request: Request) -> Response:
    """Load, or load again, the file that the operator registered under a name."""
    service = service_of(request)
    deadline = service.deadline()
    data = await read_body(request, service.settings.max_body)
    asked = await in_thread(partial(parse, AdapterRequest, data), deadline)  # strict: no "path"
    work = partial(service.adapters.load, asked.name, asked.scale)
    return JSONResponse(bodies.adapter_body(await in_thread(work, deadline)))


@routes.put(
    "/v1/adapters/{name}",
    dependencies=[Depends(_admit_upload)],
    openapi_extra=BYTES,
)
async def upload(request: Request, name: str, scale: float | None = None) -> Response:
    """Load an adapter from the body: a GGUF file, or an archive of a PEFT folder."""
    service = service_of(request)
    deadline = service.deadline()
    data = await read_buffer(request, service.settings.max_adapter)
    if not data:
        raise OptionError("the body is empty: it must be an adapter's bytes")
    work = partial(service.adapters.upload, name, data, scale)
    return JSONResponse(bodies.adapter_body(await in_thread(work, deadline)))


@routes.delete("/v1/adapters/{name}", dependencies=CHANGES)
async def unload(request: Request, name: str) -> Response:
    """Take a name away; requests under way keep what they have."""
    await in_thread(partial(service_of(request).adapters.unload, name), None)
    return JSONResponse({"name": name, "object": "adapter", "deleted": True})
