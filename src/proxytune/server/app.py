"""The HTTP application: routes, keys, limits, and streams that end when their client has gone.

    app = make_app(model, ServerSettings(name="my-recipe"))

An answer never shows a stack trace, a path or a key. The log shows prompts only if `log_prompts` is set.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
from proxytune.server.answer import Json, error_body
from proxytune.server.schema import ChatRequest, CompletionRequest, Generation
from proxytune.server.service import Answer, Service, TimeIsUp, UnknownModel
from proxytune.server.settings import ServerSettings

logger = logging.getLogger("proxytune.server")

BEARER = HTTPBearer(auto_error=False)

DRAIN_FACTOR = 16
"""Of a body that is too large, up to this many times the limit is read: clients that are still sending do not
see an answer."""

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A field cannot be honoured; the message names it"},
    401: {"description": "The API key is missing or wrong"},
    404: {"description": "No such model or page"},
    413: {"description": "The request body is too large"},
    429: {"description": "Too many requests are waiting; Retry-After says when to try again"},
    500: {"description": "The models failed; the server's log says why"},
    503: {"description": "The server is shutting down"},
    504: {"description": "The text was not finished within the time limit of a request"},
}


def make_app(model: ProxyTuned, settings: ServerSettings) -> FastAPI:
    """Return the application, which starts and stops an engine of its own."""
    service = Service(model, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        # Clients that are still connected had time to finish (`run.py`): what is left is cancelled.
        await asyncio.to_thread(service.engine.close, 0)

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
    key_check = [Depends(_key_check(settings.api_keys))]
    _add_generation_routes(app, service, key_check)
    _add_model_routes(app, service, key_check)
    _add_status_routes(app, service)
    _add_playground(app)
    # The middleware added last sees a request first.
    app.add_middleware(
        _BodyLimit, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(_RequestLog, settings=settings, on_answer=service.metrics.count_request)
    return app


# Routes -----------------------------------------------------------------------------------------------------


def _add_generation_routes(app: FastAPI, service: Service, key_check: list[Any]) -> None:
    async def respond(request: Request, wanted: Generation) -> Response:
        if service.settings.log_prompts:
            logger.info("request %s", wanted.model_dump_json(exclude_defaults=True))
        jobs = await asyncio.to_thread(service.jobs, wanted)
        host = request.client.host if request.client is not None else ""
        client = json.dumps([getattr(request.state, "key", None), host, wanted.user])
        answer = service.begin(wanted, jobs, client)
        if wanted.stream:
            return _EventStream(service, answer)
        return JSONResponse(await _whole(service, answer, request.receive))

    @app.post("/v1/completions", responses=ERRORS, dependencies=key_check, response_model=None)
    async def completions(request: Request, wanted: CompletionRequest) -> Response:
        """Continue a prompt."""
        return await respond(request, wanted)

    @app.post("/v1/chat/completions", responses=ERRORS, dependencies=key_check, response_model=None)
    async def chat_completions(request: Request, wanted: ChatRequest) -> Response:
        """Answer a conversation."""
        return await respond(request, wanted)


def _add_model_routes(app: FastAPI, service: Service, key_check: list[Any]) -> None:
    started = int(time.time())

    def model_entry(name: str) -> Json:
        return {"id": name, "object": "model", "created": started, "owned_by": "proxytune"}

    @app.get("/v1/models", responses={401: ERRORS[401]}, dependencies=key_check)
    async def models() -> Json:
        """List the recipe, and each of its experts as `recipe:expert`."""
        return {"object": "list", "data": [model_entry(name) for name in service.model_names]}

    @app.get(
        "/v1/models/{name}", responses={401: ERRORS[401], 404: ERRORS[404]}, dependencies=key_check
    )
    async def model_by_name(name: str) -> Json:
        """Describe one model."""
        if name not in service.model_names:
            raise HTTPException(404, f"there is no model {name!r} here")
        return model_entry(name)

    @app.get("/v1/proxytune", responses={401: ERRORS[401]}, dependencies=key_check)
    async def about() -> Json:
        """Describe the recipe: its experts, their default strengths, and the server's limits."""
        return service.about()


def _add_status_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> Json:
        """Report whether the server accepts requests."""
        if not service.engine.is_alive:
            raise HTTPException(503, "the server is shutting down")
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


async def _whole(service: Service, answer: Answer, receive: Receive) -> Json:
    """Return the JSON of an answer once all its texts have ended; cancel them if the client goes away."""

    async def gather() -> Json:
        return service.whole(answer, [part async for part in service.parts(answer)])

    work = asyncio.create_task(gather())
    watch = asyncio.create_task(_client_gone(receive))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            answer.cancel()
        return await work
    finally:
        answer.cancel()
        watch.cancel()
        work.cancel()


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
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service = service
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._send_all(send))
        watch = asyncio.create_task(_client_gone(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            self._answer.cancel()
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

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


def _error(
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(message, kind=kind, param=param, code=code), status, headers)


def _refusal(error: Exception) -> JSONResponse:
    """Return the response for an error, without revealing anything about the machine."""
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(error.retry_after_s)}
        return _error(429, str(error), kind="rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, Unavailable):
        code = "shutting_down" if isinstance(error, ShuttingDown) else None
        headers = {"Retry-After": "5"}
        return _error(503, str(error), kind="server_error", code=code, headers=headers)
    if isinstance(error, TimeIsUp):
        message = (
            "the text was not finished within this server's time limit for a request.\n"
            "hint: ask for fewer tokens, or stream the answer"
        )
        return _error(504, message, kind="server_error", code="timeout")
    if isinstance(error, UnknownModel):
        return _error(404, str(error), param="model", code="model_not_found")
    if isinstance(error, PromptTooLong):
        return _error(400, str(error), code="context_length_exceeded")
    if isinstance(error, UnknownExpert):
        return _error(400, str(error), param="proxytune", code="unknown_expert")
    if isinstance(error, UserError):
        return _error(400, str(error))
    # Messages of backends may name files and servers, so they go to the log only.
    if isinstance(error, BackendError):
        logger.error("a model failed: %s", error)
    else:
        logger.error("a request failed", exc_info=error)
    message = "the models failed on this request; the server's log says why"
    return _error(500, message, kind="server_error")


def _add_error_handlers(app: FastAPI) -> None:
    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _invalid(error)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        headers = dict(error.headers or {})
        return _error(error.status_code, str(error.detail), kind=kind, headers=headers)

    async def refused(request: Request, error: Exception) -> Response:
        return _refusal(error)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (UserError, Unavailable, BackendError, TimeIsUp):
        app.add_exception_handler(kind, refused)


def _invalid(error: RequestValidationError) -> Response:
    """Return the response for an invalid request, naming the first bad field as the client knows it."""
    errors = error.errors()
    field = errors[0]["loc"][:2]
    # A field with several allowed types has an error for each. The deepest one belongs to the intended type.
    first = max((e for e in errors if e["loc"][:2] == field), key=lambda e: len(e["loc"]))
    path = [str(part) for part in first["loc"][1:]]
    # The names of the types that were tried are not part of the field's name.
    name = ".".join(p for p in path if re.fullmatch(r"[a-z_]+|\d+", p) and p != "str")
    if first["type"] == "json_invalid":
        return _error(400, f"the body is not JSON: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        message = f"{name or path[-1][:100]!r} is not a field that can be honoured here"
    else:
        text = str(first["msg"]).removeprefix("Value error, ")
        message = f"{name}: {text}" if name else text
        if not path and first["type"] != "value_error":
            message = "the body must be a JSON object, sent as `Content-Type: application/json`"
    return _error(400, message, param=name or None)


# Guards -----------------------------------------------------------------------------------------------------


def _key_check(keys: tuple[str, ...]) -> Callable[..., Awaitable[None]]:
    """Return a check of a request's API key, which stores the key's index in the request's state."""
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def check(
        request: Request, bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]
    ) -> None:
        if not digests:
            return
        own = hashlib.sha256((bearer.credentials if bearer is not None else "").encode()).digest()
        # Compare all keys, each in constant time, so that the time taken reveals nothing.
        matches = [hmac.compare_digest(own, digest) for digest in digests]
        if not any(matches):
            message = "this server asks for a key; send it as `Authorization: Bearer KEY`"
            raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})
        request.state.key = matches.index(True)

    return check


class _BodyLimit:
    """Refuses bodies that are too large, or that take too long to arrive.

    starlette's `RequestBodyLimitMiddleware` has no time limit and does not read the rest of a body that is
    too large: a client that is still sending would see a reset connection instead of the answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), self._timeout_s)
        except asyncio.TimeoutError:
            await _close(408, "the body did not arrive in time", scope, receive, send)
            return
        if body is None:
            return
        if len(body) > self._max_bytes:
            message = f"the body is larger than this server's limit of {self._max_bytes:,} bytes"
            await _close(413, message, scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body, or its beginning if it is too large; None if the client has gone."""
        body = bytearray()
        num_bytes = 0
        while num_bytes <= DRAIN_FACTOR * self._max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            piece = message.get("body", b"")
            num_bytes += len(piece)
            if len(body) <= self._max_bytes:
                body += piece
            if not message.get("more_body"):
                break
        return bytes(body)


async def _close(status: int, message: str, scope: Scope, receive: Receive, send: Send) -> None:
    response = _error(status, message, headers={"Connection": "close"})
    await response(scope, receive, send)


class _RequestLog:
    """Counts and logs requests, adds security headers, and refuses requests to an unknown host name.

    starlette's `TrustedHostMiddleware` answers 400 in plain text and redirects to names with `www.`. Here the
    answer is 421 with an error object, as in every other refusal.
    """

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, on_answer: Callable[[str, int], None]
    ) -> None:
        self._app = app
        self._hosts = settings.hosts
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY")]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        try:
            host = re.sub(r":\d*$", "", Headers(scope=scope).get("host", "")).strip("[]").lower()
            if self._hosts is not None and host not in self._hosts:
                # A page of another site may resolve its own host name to this machine (DNS rebinding).
                message = "this server does not serve that host name"
                await _close(421, message, scope, receive, record_status)
            else:
                await self._app(scope, receive, record_status)
        except Exception as error:
            # An unforeseen error gets the same JSON body as any other.
            if status:
                raise
            await _refusal(error)(scope, receive, record_status)
        finally:
            # One label for all unknown paths: otherwise a scanner could create any number of counters.
            path = getattr(scope.get("route"), "path", "other")
            self._on_answer(path, status)
            latency_ms = (time.perf_counter() - started) * 1000
            logger.info("%s %s %d %.0f ms", scope["method"], path, status, latency_ms)
