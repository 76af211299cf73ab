"""The HTTP side: which path does what, and how errors look. Made by ``create_app``."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.resources import files
from itertools import chain
from threading import Event
from typing import Any, Literal, TypeVar

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic.json_schema import models_json_schema
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemloom import __version__
from gemloom.adapters.info import Scales
from gemloom.errors import GemloomError, RequestError
from gemloom.model import Model
from gemloom.server import adapter_routes, bodies, metrics, protocol
from gemloom.server.answers import ChatAnswer, ChatChoice, CompletionAnswer, CompletionChoice
from gemloom.server.errors import HungUpError, UnknownPathError
from gemloom.server.fields import Json
from gemloom.server.guard import read_body
from gemloom.server.ignored import HEADER
from gemloom.server.responses import ResponseAnswer, ResponsesRequest
from gemloom.server.service import Service, Settings, in_thread, json_answer
from gemloom.text.tokenizer import Tokenizer

_REF = "#/components/schemas/{model}"
_STATE_SLACK = 1 << 20  # bytes of saved state that are no K/V
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_PAGE_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _admit(request: Request) -> None:
    _service(request).admit(request)


async def _admit_state(request: Request) -> None:
    _service(request).admit_state(request)


def _body(kind: type[protocol.Body]) -> dict[str, Any]:
    """The part of the OpenAPI page that tells what a route reads."""
    schema = {"$ref": _REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_BODIES = (
    protocol.ChatRequest, protocol.CompletionRequest, ResponsesRequest, protocol.EmbeddingRequest,
    protocol.TokenizeRequest, protocol.DetokenizeRequest, protocol.Conversation,
)  # fmt: skip
open_to_all = APIRouter()
api = APIRouter(dependencies=[Depends(_admit)])
_hidden = APIRouter(dependencies=[Depends(_admit)], include_in_schema=False)  # other spellings
_Route = TypeVar("_Route", bound=Callable[..., Any])


def _post(path: str, kind: type[protocol.Body]) -> Callable[[_Route], _Route]:
    """A route that reads ``kind``, with and without /v1 before its path."""

    def add(route: _Route) -> _Route:
        api.post(f"/v1{path}", openapi_extra=_body(kind))(route)
        _hidden.post(path)(route)
        return route

    return add


@_post("/chat/completions", protocol.ChatRequest)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service = _service(request)
    deadline = service.deadline()
    asked = await service.read(protocol.ChatRequest, request, deadline)
    adapters = service.adapters_of(asked)
    jobs, splitters = await in_thread(partial(service.prepare.chat, asked, adapters), deadline)
    tokenizer = service.model.tokenizer
    choices = [ChatChoice(index, tokenizer, splitter) for index, splitter in enumerate(splitters)]
    answer = ChatAnswer(service.head("chatcmpl", asked), choices, asked.wants_usage)
    stream = bool(asked.stream)
    return await service.answer(request, answer, jobs, stream=stream, deadline=deadline)


@_post("/completions", protocol.CompletionRequest)
async def completions(request: Request) -> Response:
    """Continue one or several prompts."""
    service = _service(request)
    deadline = service.deadline()
    asked = await service.read(protocol.CompletionRequest, request, deadline)
    adapters = service.adapters_of(asked)
    jobs = await in_thread(partial(service.prepare.completion, asked, adapters), deadline)
    choices = [CompletionChoice(index, service.model.tokenizer) for index in range(len(jobs))]
    answer = CompletionAnswer(
        service.head("cmpl", asked), choices, asked.choices, asked.wants_usage
    )
    stream = bool(asked.stream)
    return await service.answer(request, answer, jobs, stream=stream, deadline=deadline)


@_post("/responses", ResponsesRequest)
async def responses(request: Request) -> Response:
    """Answer a conversation in the form of the responses API; nothing is stored."""
    service = _service(request)
    deadline = service.deadline()
    asked = await service.read(ResponsesRequest, request, deadline)
    adapters = service.adapters_of(asked)
    jobs, (splitter,) = await in_thread(
        lambda: service.prepare.chat(asked.chat(), adapters), deadline
    )
    answer = ResponseAnswer(service.head("resp", asked), asked, service.model.tokenizer, splitter)
    stream = bool(asked.stream)
    return await service.answer(request, answer, jobs, stream=stream, deadline=deadline)


@_post("/embeddings", protocol.EmbeddingRequest)
async def embeddings(request: Request) -> Response:
    """One vector of length 1 for each text."""
    service = _service(request)
    deadline = service.deadline()
    asked = await service.read(protocol.EmbeddingRequest, request, deadline)
    adapters = service.adapters_of(asked)
    work = partial(_embed, service, asked, adapters)
    vectors, count = await service.long(request, work, deadline)
    shown = [_encoded(vector, asked.encoding_format) for vector in vectors]
    return await json_answer(bodies.embeddings_body(shown, service.settings.name, count))


def _embed(
    service: Service, asked: protocol.EmbeddingRequest, adapters: Scales, given_up: Event
) -> tuple[list[np.ndarray], int]:
    """Vectors float32 [n_embd], and how many tokens they were made of."""
    asked.check_dimensions(service.model.config.n_embd)
    prompts = [service.prepare.ids(text, asked.parse_special) for text in asked.inputs()]
    vectors = []
    for ids in prompts:
        if given_up.is_set():
            break
        vectors.append(service.model.embed(ids, adapters))
    return vectors, sum(map(len, prompts))


def _encoded(vector: np.ndarray, form: str | None) -> Any:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


@_hidden.get("/models")
@_hidden.get("/models/")
@_hidden.get("/v1/models/")
@api.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model there is, its other names, and itself with each adapter."""
    service = _service(request)
    own = service.settings.name
    adapted = [f"{own}:{info.name}" for info in service.adapters.there()]
    names = (own, *service.settings.aliases, *adapted)
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in names]})


@_hidden.get("/models/{name:path}")
@api.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One model."""
    service = _service(request)
    service.check_name(name)
    return JSONResponse(_model(service, name))


def _model(service: Service, name: str) -> Json:
    served = service.model
    sizes = (served.context, served.config.n_vocab, served.config.n_embd)
    return bodies.model_body(name, service.created, *sizes)


@api.post("/tokenize", openapi_extra=_body(protocol.TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Text to ids."""
    service = _service(request)
    asked = await service.read(protocol.TokenizeRequest, request, service.deadline())
    lists = _tokenized(service.model.tokenizer, asked)
    first = await in_thread(partial(next, lists, []), None)  # where it cannot be, this raises
    return StreamingResponse(_token_parts(chain([first], lists)), media_type="application/json")


def _tokenized(tokenizer: Tokenizer, asked: protocol.TokenizeRequest) -> Iterator[list[Any]]:
    """What /tokenize tells of each token, in several lists: a long text has millions."""
    pieces = tokenizer.pieces(asked.content, asked.parse_special)
    for ids in tokenizer.started(pieces) if asked.add_special else pieces:
        if asked.with_pieces:
            yield [bodies.piece_body(token, tokenizer.token(token)) for token in ids]
        else:
            yield ids


def _token_parts(lists: Iterable[list[Any]]) -> Iterator[bytes]:
    comma = ""
    yield b'{"tokens":['
    for some in lists:
        if some:
            yield (comma + json.dumps(some, separators=(",", ":"))[1:-1]).encode()
            comma = ","
    yield b"]}"


@api.post("/detokenize", openapi_extra=_body(protocol.DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """Ids to text, special tokens shown."""
    service = _service(request)
    asked = await service.read(protocol.DetokenizeRequest, request, service.deadline())
    decode = partial(service.model.detokenize, asked.tokens, special=True)
    return await json_answer({"content": await in_thread(decode, None)})


@api.post("/apply-template", openapi_extra=_body(protocol.Conversation))
async def apply_template(request: Request) -> Response:
    """The prompt that the model's template makes of a conversation: to look at, and as ids."""
    service = _service(request)
    asked = await service.read(protocol.Conversation, request, service.deadline())
    ids = await in_thread(partial(service.prepare.prompt, asked), None)
    prompt = await in_thread(partial(service.model.detokenize, ids, special=True), None)
    return await json_answer({"prompt": prompt, "tokens": ids})


@api.get("/slots")
async def slots(request: Request) -> Response:
    """How many requests fit, and how many there are."""
    service = _service(request)
    stats = service.model.stats()
    names = ("slots", "slots_busy", "running", "waiting")
    counts = {name: getattr(stats, name) for name in names}
    return JSONResponse(counts | {"context": service.model.context})


@api.post(
    "/slots",
    dependencies=[Depends(_admit_state)],
    openapi_extra={"requestBody": {"content": {"application/octet-stream": {}}}},
)
async def slot_state(request: Request, action: Literal["save", "restore"]) -> Response:
    """Save the state of the request that ended last as bytes, or restore what was saved."""
    service = _service(request)
    if action == "save":
        data = await in_thread(service.model.save_state, None)
        return Response(data, media_type="application/octet-stream")
    memory = service.model.memory()
    limit = memory["kv_full"] + memory["kv_sliding"] + _STATE_SLACK
    state = await read_body(request, limit)
    count = await in_thread(partial(service.model.load_state, state), None)
    return JSONResponse({"restored": count})


@api.get("/metrics")
async def prometheus(request: Request) -> Response:
    """Counters, gauges and histograms for Prometheus."""
    text = await in_thread(_service(request).metrics.text, None)
    return Response(text, headers={"content-type": metrics.CONTENT_TYPE})


@open_to_all.get("/health")
async def health(request: Request) -> Response:
    """Whether requests are answered; 503, and why, where they are not."""
    if failure := _service(request).failure():
        body = {"status": "error", **bodies.error_body(failure)}
        return JSONResponse(body, failure.status)
    return JSONResponse({"status": "ok"})


class _App(FastAPI):
    """FastAPI, with the bodies that the routes read by themselves on its OpenAPI page."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            _, made = models_json_schema(
                [(kind, "validation") for kind in _BODIES], ref_template=_REF
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
    model: Model, settings: Settings, load: Callable[[], Model] | None = None
) -> FastAPI:
    """The application that serves ``model``; ``app.state.service.close()`` closes that after it.

    ``load`` gives the model anew, where it is to be loaded again when a device of it is back.
    """
    app = _App(title="Gemloom", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service = Service(model, settings, load)
    app.include_router(open_to_all)
    app.include_router(_hidden)  # first: a model may be called anything
    app.include_router(api)
    app.include_router(adapter_routes.routes, dependencies=[Depends(_admit)])
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


def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GemloomError)
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(error.status)
    return JSONResponse(bodies.error_body(error), error.status, headers)


def _on_http_error(request: Request, error: Exception) -> Response:
    """No such path, or not with this method; or what FastAPI itself refuses."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    kind = UnknownPathError if error.status_code == 404 else RequestError
    return JSONResponse(bodies.error_body(kind(message)), error.status_code, error.headers)


def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _on_error(request, RequestError(f"{first['loc'][-1]}: {first['msg']}"))


def _on_hung_up(request: Request, error: Exception) -> Response:
    return Response(status_code=HungUpError.status)


def _on_unforeseen(request: Request, error: Exception) -> Response:
    body = bodies.error_body(GemloomError("internal error; the server's log has more"))
    return JSONResponse(body, GemloomError.status)
