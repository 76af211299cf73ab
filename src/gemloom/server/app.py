"""The HTTP side: which path does what, and how errors look. Made by ``create_app``."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic.json_schema import models_json_schema
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemloom import __version__
from gemloom.errors import GemloomError, RequestError
from gemloom.server import (
    adapter_routes,
    bodies,
    dialect_routes,
    llamacpp_routes,
    metrics,
    openai_routes,
)
from gemloom.server.backend import Backend
from gemloom.server.dialects.llamacpp import DetokenizeRequest, TokenizeRequest
from gemloom.server.dialects.openai_chat import ChatRequest
from gemloom.server.dialects.openai_completions import CompletionRequest
from gemloom.server.dialects.openai_embeddings import EmbeddingRequest
from gemloom.server.dialects.openai_responses import ResponsesRequest
from gemloom.server.errors import HungUpError, UnknownPathError
from gemloom.server.fields import Json
from gemloom.server.ignored import HEADER
from gemloom.server.protocol import Conversation
from gemloom.server.routing import ADMITTED, REF, service_of
from gemloom.server.service import Service, Settings, in_thread

_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_PAGE_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


_BODIES = (
    ChatRequest, CompletionRequest, ResponsesRequest, EmbeddingRequest, TokenizeRequest,
    DetokenizeRequest, Conversation,
)  # fmt: skip
_open_to_all = APIRouter()
_admitted = APIRouter(dependencies=ADMITTED)


@_admitted.get("/metrics")
async def prometheus(request: Request) -> Response:
    """Counters, gauges and histograms for Prometheus."""
    text = await in_thread(service_of(request).metrics.text, None)
    return Response(text, headers={"content-type": metrics.CONTENT_TYPE})


@_open_to_all.get("/health")
async def health(request: Request) -> Response:
    """Whether requests are answered; 503, and why, where they are not."""
    if failure := service_of(request).failure():
        body = {"status": "error", **bodies.error_body(failure)}
        return JSONResponse(body, failure.status)
    return JSONResponse({"status": "ok"})


class _App(FastAPI):
    """FastAPI, with the bodies that the routes read by themselves on its OpenAPI page."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            _, made = models_json_schema(
                [(kind, "validation") for kind in _BODIES], ref_template=REF
            )
            schema = super().openapi()
            schema.setdefault("components", {}).setdefault("schemas", {}).update(made["$defs"])
            self.openapi_schema = schema
        return self.openapi_schema


class _Counted:
    """Counts requests and their durations, by route and status, and those under way.

    Every answer to a request with fields that nobody knows names them, streams and errors too.

    HEAD is asked of the app as GET: what runs the app leaves out the body.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        started, status = time.perf_counter(), 500
        counted = int(scope["path"] != "/health")
        state = scope.setdefault("state", {})

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            if message["type"] == "http.response.start" and "ignored" in state:
                MutableHeaders(scope=message)[HEADER] = state["ignored"]
            await send(message)

        self._service.under_way += counted
        try:
            await self._app(scope, receive, noted)
        finally:
            self._service.under_way -= counted
            path = getattr(scope.get("route"), "path", "other")
            self._service.metrics.answered(path, status, time.perf_counter() - started)


def create_app(
    backend: Backend, settings: Settings, load: Callable[[], Backend] | None = None
) -> FastAPI:
    """The application that serves ``backend``; ``app.state.service.close()`` closes that after it.

    ``load`` gives the model anew, where it is to be loaded again when a device of it is back.
    """
    app = _App(title="Gemloom", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service = Service(backend, settings, load)
    for routes in (  # in the order of the OpenAPI page
        _open_to_all, dialect_routes.dialect_routes(), openai_routes.routes,
        llamacpp_routes.routes, _admitted, adapter_routes.routes, llamacpp_routes.adapter_routes,
    ):  # fmt: skip
        app.include_router(routes)
    _add_page(app)
    app.add_exception_handler(GemloomError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    for gone in (HungUpError, ClientDisconnect):
        app.add_exception_handler(gone, _on_hung_up)
    app.add_exception_handler(Exception, _on_unforeseen)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"],
            expose_headers=[HEADER],
        )  # fmt: skip
    app.add_middleware(_Counted, service=service)
    return app


def _add_page(app: FastAPI) -> None:
    """The chat page: its few files are read once, and nothing else is ever served."""
    for file in (files("gemloom.server") / "page").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in _PAGE_TYPES:
            show = partial(_show, file.read_bytes(), _PAGE_TYPES[suffix])
            path = "/" if file.name == "index.html" else f"/{file.name}"
            app.add_route(path, show, include_in_schema=False)


async def _show(content: bytes, kind: str, request: Request) -> Response:
    return Response(content, media_type=kind, headers=_PAGE_HEADERS)


def _told(request: Request, error: GemloomError) -> Json:
    """The body of an error, in the dialect of the path that was asked."""
    return dialect_routes.error_at(request.scope["path"], error)


def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GemloomError)
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(error.status)
    return JSONResponse(_told(request, error), error.status, headers)


def _on_http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method; or what FastAPI itself refuses."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    kind = UnknownPathError if error.status_code == 404 else RequestError
    return JSONResponse(_told(request, kind(message)), error.status_code, error.headers)


def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _on_error(request, RequestError(f"{first['loc'][-1]}: {first['msg']}"))


def _on_hung_up(request: Request, error: Exception) -> Response:
    return Response(status_code=HungUpError.status)


def _on_unforeseen(request: Request, error: Exception) -> Response:
    told = GemloomError("internal error; the server's log has more")
    return JSONResponse(_told(request, told), told.status)
