"""The HTTP application: routes, keys, limits, and streams that end when their reader has gone.

    app = make_app(model, ServerSettings(name="my-recipe"))

An answer never shows a stack trace, a path or a key, and the log shows no prompt unless that was asked for.
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
from proxytune.server import answer
from proxytune.server.answer import Json
from proxytune.server.schema import ChatRequest, CompletionRequest, Generation
from proxytune.server.service import Answer, ServerSettings, Service, TimeIsUp, UnknownModel

logger = logging.getLogger("proxytune.server")

BEARER = HTTPBearer(auto_error=False)

DRAINED = 16
"""How many times what is allowed is read of a body that is too large: who still sends sees no answer."""

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A field cannot be honoured; the message names it"},
    401: {"description": "The key is missing or wrong"},
    404: {"description": "There is no such model or page"},
    413: {"description": "The body is too large"},
    429: {"description": "Too many requests wait; Retry-After says when to try again"},
    500: {"description": "The models failed; the log says why"},
    503: {"description": "The server is shutting down"},
    504: {"description": "The text took longer than a request may"},
}


def make_app(model: ProxyTuned, settings: ServerSettings) -> FastAPI:
    """Return the application; its engine runs while the application does.

    Args:
        model: What answers.
        settings: What is allowed.
    """
    service = Service(model, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        # Whoever still has a connection has had its time (`run.py`): what is left is cancelled.
        await asyncio.to_thread(service.engine.close, 0)

    app = FastAPI(
        title="proxytune",
        version=version("proxytune"),
        description="A large language model, steered by small ones; an OpenAI-compatible API.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    _add_errors(app)
    check_key = _key_check(settings.api_keys)
    guarded = [Depends(check_key)]

    async def begin(request: Request, wanted: Generation) -> Answer:
        if settings.log_prompts:
            logger.info("request %s", wanted.model_dump_json(exclude_defaults=True))
        jobs = await asyncio.to_thread(service.jobs, wanted)
        host = request.client.host if request.client is not None else ""
        who = json.dumps([getattr(request.state, "key", None), host, wanted.user])
        return service.begin(wanted, jobs, who)

    async def respond(request: Request, wanted: Generation) -> Response:
        given = await begin(request, wanted)
        if wanted.stream:
            return _EventStream(service, given)
        return JSONResponse(await _whole(service, given, request.receive))

    @app.post("/v1/completions", responses=ERRORS, dependencies=guarded, response_model=None)
    async def completions(request: Request, wanted: CompletionRequest) -> Response:
        """Continue a prompt."""
        return await respond(request, wanted)

    @app.post("/v1/chat/completions", responses=ERRORS, dependencies=guarded, response_model=None)
    async def chat_completions(request: Request, wanted: ChatRequest) -> Response:
        """Answer a conversation."""
        return await respond(request, wanted)

    started = int(time.time())

    def described(name: str) -> Json:
        return {"id": name, "object": "model", "created": started, "owned_by": "proxytune"}

    @app.get("/v1/models", responses={401: ERRORS[401]}, dependencies=guarded)
    async def models() -> Json:
        """List the recipe, and each of its experts as `recipe:expert`."""
        return {"object": "list", "data": [described(name) for name in service.model_names]}

    @app.get(
        "/v1/models/{name}", responses={401: ERRORS[401], 404: ERRORS[404]}, dependencies=guarded
    )
    async def model_by_name(name: str) -> Json:
        """Describe one model."""
        if name not in service.model_names:
            raise HTTPException(404, f"there is no model {name!r} here")
        return described(name)

    @app.get("/v1/proxytune", responses={401: ERRORS[401]}, dependencies=guarded)
    async def about() -> Json:
        """Describe the recipe: experts, default strengths, limits."""
        return service.about()

    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> Json:
        """Say whether texts are being taken."""
        if not service.engine.is_alive:
            raise HTTPException(503, "the server is shutting down")
        return {"status": "ok"}

    @app.get("/version")
    async def versions() -> Json:
        """Say which version this is."""
        return {"version": version("proxytune")}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return counters for Prometheus."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    page, policy = _playground()

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(
            page,
            headers={
                "Content-Security-Policy": policy,
                "Cache-Control": "no-cache",
                "Referrer-Policy": "no-referrer",
            },
        )

    # The last one added is the first one asked.
    app.add_middleware(_BodyLimit, most=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(_Books, settings=settings, on_answer=service.metrics.answered)
    return app


# Answers ----------------------------------------------------------------------------------------------------


async def _whole(service: Service, given: Answer, receive: Receive) -> Json:
    """Return an answer when all its texts have ended; they end at once if the client goes away."""

    async def gather() -> Json:
        return service.whole(given, [part async for part in service.parts(given)])

    work = asyncio.create_task(gather())
    watch = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            given.cancel()
        return await work
    finally:
        given.cancel()
        watch.cancel()
        work.cancel()


async def _gone(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _EventStream(Response):
    """Server-sent events of an answer; it stops, and frees the rows, when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, given: Answer) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service = service
        self._given = given

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._send_all(send))
        watch = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            self._given.cancel()
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for line in self._lines():
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self) -> AsyncIterator[bytes]:
        service, given = self._service, self._given
        for chunk in service.first_chunks(given):
            yield _event(chunk)
        try:
            async for part in service.parts(given):
                found = service.chunk(given, part)
                if found is not None:
                    yield _event(found)
        except Exception as error:
            refused = _refusal(error)
            yield _event(json.loads(bytes(refused.body)))
            yield b"data: [DONE]\n\n"
            return
        options = given.wanted.stream_options
        if options is not None and options.include_usage:
            yield _event(service.usage_chunk(given))
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
    body = answer.error(message, kind=kind, param=param, code=code)
    return JSONResponse(body, status, headers)


def _refusal(error: Exception) -> JSONResponse:
    """Return what to answer for an error, in words that tell nothing of the machine."""
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(error.retry_after_s)}
        return _error(429, str(error), kind="rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, Unavailable):
        code = "shutting_down" if isinstance(error, ShuttingDown) else None
        headers = {"Retry-After": "5"}
        return _error(503, str(error), kind="server_error", code=code, headers=headers)
    if isinstance(error, TimeIsUp):
        return _error(
            504,
            "the text was not finished in the time that this server gives a request.\n"
            "hint: ask for fewer tokens, or stream",
            kind="server_error",
            code="timeout",
        )
    if isinstance(error, UnknownModel):
        return _error(404, str(error), param="model", code="model_not_found")
    if isinstance(error, PromptTooLong):
        return _error(400, str(error), code="context_length_exceeded")
    if isinstance(error, UnknownExpert):
        return _error(400, str(error), param="proxytune", code="unknown_expert")
    if isinstance(error, UserError):
        return _error(400, str(error))
    # Messages of models may name files and servers: they are for the log.
    if isinstance(error, BackendError):
        logger.error("a model failed: %s", error)
    else:
        logger.error("a request failed", exc_info=error)
    return _error(500, "the models failed on this request; the log says why", kind="server_error")


def _add_errors(app: FastAPI) -> None:
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
    """Name the first field that cannot be honoured, as its sender knows it."""
    errors = error.errors()
    field = errors[0]["loc"][:2]
    # A value that may have several shapes has an error for each: the deepest is of the shape that was meant.
    first = max((e for e in errors if e["loc"][:2] == field), key=lambda e: len(e["loc"]))
    path = [str(part) for part in first["loc"][1:]]
    # Which shape it was tried as is no name of a field.
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
    """Return the check of a request's key; which one it was is left in the request's state."""
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def check(
        request: Request,
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)],
    ) -> None:
        if not digests:
            return
        own = hashlib.sha256((given.credentials if given is not None else "").encode()).digest()
        # All are compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(own, digest) for digest in digests]
        if not any(matches):
            raise HTTPException(
                401,
                "this server asks for a key: send it as `Authorization: Bearer KEY`",
                {"WWW-Authenticate": "Bearer"},
            )
        request.state.key = matches.index(True)

    return check


class _BodyLimit:
    """Refuses bodies that are too large, or that take too long to arrive.

    starlette's `RequestBodyLimitMiddleware` has no time limit and does not drain a body that is too large, so
    that a client still sending would see a reset connection in place of the answer.
    """

    def __init__(self, app: ASGIApp, most: int, timeout_s: float) -> None:
        self._app = app
        self._most = most
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
        if len(body) > self._most:
            message = f"the body is larger than the {self._most:,} bytes that are allowed here"
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
        while num_bytes <= DRAINED * self._most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            piece = message.get("body", b"")
            num_bytes += len(piece)
            if len(body) <= self._most:
                body += piece
            if not message.get("more_body"):
                break
        return bytes(body)


async def _close(status: int, message: str, scope: Scope, receive: Receive, send: Send) -> None:
    response = _error(status, message, headers={"Connection": "close"})
    await response(scope, receive, send)


class _Books:
    """Counts and logs requests, and refuses those to a name that is not this server's.

    starlette's `TrustedHostMiddleware` would answer 400 in plain text, where this API's errors are JSON and
    421 is the status for it.
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

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-content-type-options", b"nosniff"),
                    (b"x-frame-options", b"DENY"),
                ]
            await send(message)

        try:
            if self._hosts is not None and _host(scope) not in self._hosts:
                # A page of another site may have had its name resolved to this machine.
                await _close(421, "this server does not go by that name", scope, receive, note)
            else:
                await self._app(scope, receive, note)
        except Exception as error:
            # Nobody foresaw it; it has the shape of an error all the same.
            if status:
                raise
            await _refusal(error)(scope, receive, note)
        finally:
            # Unknown paths would make as many counters as a scanner has ideas.
            path = getattr(scope.get("route"), "path", "other")
            self._on_answer(path, status)
            spent = (time.perf_counter() - started) * 1000
            logger.info("%s %s %d %.0f ms", scope["method"], path, status, spent)


def _host(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"host":
            text: str = value.decode("latin-1")
            return re.sub(r":\d*$", "", text).strip("[]").lower()
    return ""


# The page ---------------------------------------------------------------------------------------------------


def _playground() -> tuple[str, str]:
    """Return the page, and the policy under which nothing but its own script and style run."""
    page = assemble("playground")
    return page, page_policy(page, "connect-src 'self'", "frame-ancestors 'none'")
