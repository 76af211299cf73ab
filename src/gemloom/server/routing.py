"""What the routes share: the service of a request, who is let in, what a page tells of bodies."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, Request

from gemloom.server.protocol import Strict
from gemloom.server.service import Service

REF = "#/components/schemas/{model}"
# On the OpenAPI page, of a route that reads bytes.
BYTES: dict[str, Any] = {"requestBody": {"content": {"application/octet-stream": {}}}}


def service_of(request: Request) -> Service:
    """The service that a request has come to."""
    service: Service = request.app.state.service
    return service


async def _admit(request: Request) -> None:
    service_of(request).admit(request)


async def _admit_change(request: Request) -> None:
    service_of(request).admit_change(request)


ADMITTED = [Depends(_admit)]  # of every route but /health and the page
CHANGES = [Depends(_admit_change)]  # and of those that load or unload adapters


def told(kind: type[Strict]) -> dict[str, Any]:
    """The part of the OpenAPI page that tells what a route reads."""
    schema = {"$ref": REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
