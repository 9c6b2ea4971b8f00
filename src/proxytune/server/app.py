"""The HTTP application: routes, answers, and streams that end when their client has gone.

    app = make_app(model, ServerSettings(name="my-recipe"))

An answer never shows a stack trace, a path or a key. The log shows prompts only if `log_prompts` is set.
What a request passes before it gets here is in `guards.py`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from proxytune.errors import (
    BackendError,
    PromptTooLong,
    QueueFull,
    ShuttingDown,
    Unavailable,
    UnknownExpert,
    UserError,
)
from proxytune.model import ProxyTuned
from proxytune.pages.policy import assemble, page_policy
from proxytune.server.answer import Json
from proxytune.server.body import BODIES_HELD, InFlight
from proxytune.server.guards import (
    Arrival,
    BodyGuard,
    KeyGuard,
    RequestLog,
    error_response,
)
from proxytune.server.schema import (
    ChatRequest,
    CompletionRequest,
    Generation,
    InvalidField,
    not_an_object,
)
from proxytune.server.service import Answer, Service, TimeIsUp
from proxytune.server.settings import ServerSettings
from proxytune.server.steering import UnknownModel

logger = logging.getLogger("proxytune.server")

BEARER = Depends(HTTPBearer(auto_error=False))
"""Documents that a route may need a key; `guards.py` checks it."""
CLIENT_GONE = 499
"""The status in the log of a request whose client did not wait for its answer, as in nginx's."""

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A field cannot be honoured; the message names it"},
    401: {"description": "The API key is missing or wrong"},
    404: {"description": "No such model or page"},
    408: {"description": "The request body did not arrive in time"},
    413: {"description": "The request body is too large"},
    429: {"description": "Too many requests are waiting; Retry-After says when to try again"},
    500: {"description": "The models failed; the server's log says why"},
    503: {"description": "The server is shutting down, or too many large requests are arriving"},
    504: {"description": "The text was not finished within the time limit of a request"},
}

Result = TypeVar("Result")


def make_app(model: ProxyTuned, settings: ServerSettings) -> FastAPI:
    """Return the application, which starts and stops an engine of its own."""
    service = Service(model, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        # Clients that are still connected had time to finish (`run.py`): what is left is cancelled.
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="proxytune",
        version=version("proxytune"),
        description="A large language model, steered by small ones; an OpenAI-compatible API.",
        docs_url=None,  # FastAPI's pages load scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    _add_error_handlers(app)
    _add_generation_routes(app, service)
    _add_model_routes(app, service)
    _add_status_routes(app, service)
    _add_playground(app)
    # The middleware added last sees a request first.
    in_flight = InFlight(BODIES_HELD * settings.max_body_bytes)
    app.state.in_flight = in_flight
    app.add_middleware(BodyGuard, settings=settings, in_flight=in_flight)
    app.add_middleware(KeyGuard, keys=settings.api_keys, max_bytes=settings.max_body_bytes)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(
        RequestLog,
        settings=settings,
        on_answer=service.metrics.count_request,
        refusal=_refusal,
    )
    return app


# Routes -----------------------------------------------------------------------------------------------------


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    async def respond(request: Request, kind: type[Generation]) -> Response:
        arrival: Arrival = request.state.arrival
        # A page of another site may send other types without asking first.
        if not re.match(
            r"application/([\w.+-]+\+)?json\s*(;|$)",
            request.headers.get("content-type", ""),
            re.IGNORECASE,
        ):
            raise not_an_object()
        assert arrival.body is not None
        deadline = arrival.at + service.settings.request_timeout_s
        reading = service.read(kind, arrival.body.take(), client=arrival.client, deadline=deadline)
        found = await _unless_gone(request.receive, reading)
        if found is None:
            return Response(status_code=CLIENT_GONE)
        wanted, orders = found
        arrival.body.close()
        answer = service.begin(
            wanted, orders, client=arrival.client, host=arrival.host, deadline=deadline
        )
        if wanted.stream:
            return _EventStream(service, answer)
        whole = await _whole(service, answer, request.receive)
        if whole is None:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(whole, headers=answer.headers)

    def body_of(kind: type[Generation]) -> dict[str, Any]:
        schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
        content = {"application/json": {"schema": schema}}
        return {"requestBody": {"required": True, "content": content}}

    options: dict[str, Any] = {"responses": ERRORS, "dependencies": [BEARER]}

    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest), **options)
    async def completions(request: Request) -> Response:
        """Continue a prompt."""
        return await respond(request, CompletionRequest)

    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest), **options)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await respond(request, ChatRequest)

    fastapi_document = app.openapi

    def document() -> dict[str, Any]:
        # FastAPI keeps what it makes, and knows only the bodies that it reads itself, in the event loop.
        is_new = app.openapi_schema is None
        whole = fastapi_document()
        if is_new:
            _, schemas = models_json_schema(
                [(CompletionRequest, "validation"), (ChatRequest, "validation")],
                ref_template="#/components/schemas/{model}",
            )
            whole.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return whole

    app.openapi = document  # type: ignore[method-assign]


def _add_model_routes(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    def model_entry(name: str) -> Json:
        return {"id": name, "object": "model", "created": started, "owned_by": "proxytune"}

    @app.get("/v1/models", responses={401: ERRORS[401]}, dependencies=[BEARER])
    async def models() -> Json:
        """List the recipe, and each of its experts as `recipe:expert`."""
        return {"object": "list", "data": [model_entry(name) for name in service.model_names]}

    @app.get(
        "/v1/models/{name}", responses={401: ERRORS[401], 404: ERRORS[404]}, dependencies=[BEARER]
    )
    async def model_by_name(name: str) -> Json:
        """Describe one model."""
        if name not in service.model_names:
            raise HTTPException(404, f"there is no model {name[:200]!r} here")
        return model_entry(name)

    @app.get("/v1/proxytune", responses={401: ERRORS[401]}, dependencies=[BEARER])
    async def about() -> Json:
        """Describe the recipe: its experts, their default strengths, and the server's limits."""
        return service.about()


def _add_status_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> Json:
        """Report whether the server accepts requests."""
        if not service.engine.is_alive:
            raise HTTPException(503, "the server is shutting down", {"Retry-After": "5"})
        return {"status": "ok"}

    @app.get("/version")
    async def versions() -> Json:
        """Return the server's version."""
        return {"version": version("proxytune")}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)


def _add_playground(app: FastAPI) -> None:
    page = assemble("playground")
    policy = page_policy(page, "connect-src 'self'", "frame-ancestors 'none'")
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
    }

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(page, headers=headers)


# Answers ----------------------------------------------------------------------------------------------------


async def _whole(service: Service, answer: Answer, receive: Receive) -> Json | None:
    """Return the JSON of an answer once all its texts have ended; None if the client goes away."""

    async def gather() -> Json:
        return service.whole(answer, [part async for part in service.parts(answer)])

    try:
        return await _unless_gone(receive, gather())
    finally:
        answer.cancel()


async def _unless_gone(receive: Receive, coroutine: Coroutine[Any, Any, Result]) -> Result | None:
    """Return what a coroutine returns; cancel it and return None if the client goes away before."""
    work = asyncio.create_task(coroutine)
    watch = asyncio.create_task(_client_gone(receive))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else None
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def _client_gone(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _EventStream(Response):
    """Server-sent events of an answer; if the client goes away, they stop and the rows are freed."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, answer: Answer) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        self.init_headers(headers | answer.headers)
        del self.headers["content-length"]
        self._service = service
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._send_all(send))
        finally:
            self._answer.cancel()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for line in self._lines():
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self) -> AsyncIterator[bytes]:
        service, answer = self._service, self._answer
        for chunk in service.first_chunks(answer):
            yield _event(chunk)
        try:
            async for part in service.parts(answer):
                found = service.chunk(answer, part)
                if found is not None:
                    yield _event(found)
        except Exception as error:
            refused = _refusal(error)
            yield _event(json.loads(bytes(refused.body)))
            yield b"data: [DONE]\n\n"
            return
        options = answer.wanted.stream_options
        if options is not None and options.include_usage:
            yield _event(service.usage_chunk(answer))
        yield b"data: [DONE]\n\n"


def _event(content: Json) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


# Errors -----------------------------------------------------------------------------------------------------


def _refusal(error: Exception) -> JSONResponse:
    """Return the response for an error, without revealing anything about the machine."""
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(error.retry_after_s)}
        return error_response(
            429, str(error), kind="rate_limit_error", code="queue_full", headers=headers
        )
    if isinstance(error, Unavailable):
        code = "shutting_down" if isinstance(error, ShuttingDown) else None
        headers = {"Retry-After": "5"}
        return error_response(503, str(error), kind="server_error", code=code, headers=headers)
    if isinstance(error, TimeIsUp):
        message = (
            "the text was not finished within this server's time limit for a request.\n"
            "hint: send a shorter prompt or ask for fewer tokens; a stream shows the text so far"
        )
        return error_response(504, message, kind="server_error", code="timeout")
    if isinstance(error, UnknownModel):
        return error_response(404, str(error), param="model", code="model_not_found")
    if isinstance(error, PromptTooLong):
        return error_response(400, str(error), code="context_length_exceeded")
    if isinstance(error, UnknownExpert):
        return error_response(400, str(error), param="proxytune", code="unknown_expert")
    if isinstance(error, InvalidField):
        return error_response(400, str(error), param=error.field)
    if isinstance(error, UserError):
        return error_response(400, str(error))
    # Messages of backends may name files and servers, so they go to the log only.
    if isinstance(error, BackendError):
        logger.error("a model failed: %s", error)
    else:
        logger.error("a request failed", exc_info=error)
    message = "the models failed on this request; the server's log says why"
    return error_response(500, message, kind="server_error")


def _add_error_handlers(app: FastAPI) -> None:
    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        headers = dict(error.headers or {})
        return error_response(error.status_code, str(error.detail), kind=kind, headers=headers)

    async def refused(request: Request, error: Exception) -> Response:
        return _refusal(error)

    app.add_exception_handler(HTTPException, http)
    for kind in (UserError, Unavailable, BackendError, TimeIsUp):
        app.add_exception_handler(kind, refused)
