"""The HTTP application: routes, answers, and streams that end when their client has gone.

    app = make_app(model, ServerSettings(name="my-recipe"))

An answer never shows a stack trace, a path or a key. The log shows prompts only if `log_prompts` is set.
What a request passes before it gets here is in `guards.py`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from proxytune.errors import (
    BackendError,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    ShuttingDown,
    Unavailable,
    UnknownExpert,
    UserError,
)
from proxytune.measure.score import smallest_context
from proxytune.model import ProxyTuned
from proxytune.pages.policy import assemble, page_policy
from proxytune.server.answer import Json
from proxytune.server.body import BODIES_HELD, InFlight
from proxytune.server.doors import ChatDoor, CompletionDoor, Door, Writer
from proxytune.server.guards import (
    Arrival,
    BodyGuard,
    KeyGuard,
    Refusal,
    RequestLog,
)
from proxytune.server.messages import (
    CountTokensRequest,
    MessagesDoor,
    MessagesRequest,
    count_tokens,
)
from proxytune.server.responses import ResponsesDoor, ResponsesRequest, UnknownResponse
from proxytune.server.schema import ChatRequest, CompletionRequest, InvalidField, not_an_object
from proxytune.server.service import Answer, Service, TimeIsUp
from proxytune.server.settings import ServerSettings
from proxytune.server.steering import UnknownModel
from proxytune.server.stored import KeptAnswers
from proxytune.server.tokens import DetokenizeRequest, TokenizeRequest, detokenize, tokenize

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

BODIES = (
    CompletionRequest,
    ChatRequest,
    ResponsesRequest,
    MessagesRequest,
    CountTokensRequest,
    TokenizeRequest,
    DetokenizeRequest,
)
"""What the routes read, for the documentation."""

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
    _add_token_routes(app, service)
    _document_bodies(app)
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
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=[
                "Authorization",
                "Content-Type",
                "x-api-key",
                "anthropic-version",
                "x-request-id",
            ],
            expose_headers=["x-request-id", "x-proxytune-max-tokens"],
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
    kept = KeptAnswers()
    app.state.kept = kept

    async def respond(request: Request, door: Door) -> Response:
        arrival: Arrival = request.state.arrival
        body, deadline = _json_body(request), arrival.at + service.settings.request_timeout_s
        reading = service.render(
            lambda desk: door.read(body, desk, arrival.client),
            client=arrival.client,
            num_bytes=len(body),
            deadline=deadline,
        )
        found = await _unless_gone(request.receive, reading)
        if found is None:
            return Response(status_code=CLIENT_GONE)
        writer, wanted, orders = found
        assert arrival.body is not None
        arrival.body.close()
        answer = service.begin(
            wanted, orders, client=arrival.client, host=arrival.host, deadline=deadline
        )
        if wanted.stream:
            return _EventStream(service, answer, writer, arrival.request_id)
        whole = await _whole(service, answer, writer, request.receive)
        if whole is None:
            return Response(status_code=CLIENT_GONE)
        # Elsewhere, because thousands of logprobs would hold up all other requests.
        return await asyncio.to_thread(JSONResponse, whole, headers=answer.headers)

    def add(path: str, door: Door, name: str, description: str) -> None:
        async def answer(request: Request) -> Response:
            return await respond(request, door)

        _add_post(app, path, answer, door.kind, name, description)

    add("/v1/completions", CompletionDoor(service), "completions", "Continue a prompt.")
    add("/v1/chat/completions", ChatDoor(service), "chat_completions", "Answer a conversation.")
    responses = ResponsesDoor(service, kept)
    add("/v1/responses", responses, "responses", "Answer a conversation, as a response.")
    add("/v1/messages", MessagesDoor(service), "messages", "Answer a conversation, as a message.")

    options: dict[str, Any] = {
        "responses": {code: ERRORS[code] for code in (400, 401, 404)},
        "dependencies": [BEARER],
    }

    async def response_by_id(request: Request, response_id: str) -> Response:
        """Return a response that is kept."""
        for name, value in request.query_params.items():
            if (name, value) not in (("stream", "false"), ("include_obfuscation", "false")):
                raise InvalidField(f"{name[:100]!r} cannot be honoured here", name[:100])
        found = kept.get(request.state.arrival.client, response_id)
        if found is None:
            raise UnknownResponse(response_id)
        return Response(found.answer, media_type="application/json")

    async def delete_response(request: Request, response_id: str) -> Json:
        """Forget a response."""
        if not kept.remove(request.state.arrival.client, response_id):
            raise UnknownResponse(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def cancel_response(request: Request, response_id: str) -> Json:
        """Refuse to cancel a response: each is whole before it is kept."""
        if kept.get(request.state.arrival.client, response_id) is None:
            raise UnknownResponse(response_id)
        raise InvalidRequest(
            "Cannot cancel a synchronous response.\nhint: close its connection while it is written"
        )

    for path, is_shown in (
        ("/v1/responses/{response_id}", True),
        ("/responses/{response_id}", False),
    ):
        app.get(path, include_in_schema=is_shown, **options)(response_by_id)
        app.delete(path, include_in_schema=is_shown, **options)(delete_response)
        app.post(f"{path}/cancel", include_in_schema=is_shown, **options)(cancel_response)


def _add_token_routes(app: FastAPI, service: Service) -> None:
    def add(path: str, work: ReadWork, kind: type[BaseModel], name: str, description: str) -> None:
        async def answer(request: Request) -> Response:
            arrival: Arrival = request.state.arrival
            body = _json_body(request)
            reading = service.render(
                lambda desk: work(service, body, desk),
                client=arrival.client,
                num_bytes=len(body),
                deadline=arrival.at + service.settings.request_timeout_s,
            )
            found = await _unless_gone(request.receive, reading)
            if found is None:
                return Response(status_code=CLIENT_GONE)
            return Response(found, media_type="application/json")

        _add_post(app, path, answer, kind, name, description)

    counted = "Count the tokens that the base reads of a conversation."
    add("/v1/messages/count_tokens", count_tokens, CountTokensRequest, "count_tokens", counted)
    shown = "Return the base's tokens of a text or of a conversation."
    add("/v1/tokenize", tokenize, TokenizeRequest, "tokenize", shown)
    joined = "Return the text of the base's tokens."
    add("/v1/detokenize", detokenize, DetokenizeRequest, "detokenize", joined)


ReadWork = Callable[[Service, bytearray, ProxyTuned], bytes]


def _add_post(
    app: FastAPI,
    path: str,
    answer: Callable[[Request], Coroutine[Any, Any, Response]],
    kind: type[BaseModel],
    name: str,
    description: str,
) -> None:
    """Add a route for a kind of body, with and without `/v1`."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    app.post(
        path,
        name=name,
        description=description,
        openapi_extra={"requestBody": body},
        responses=ERRORS,
        dependencies=[BEARER],
    )(answer)
    app.post(path.removeprefix("/v1"), name=name, include_in_schema=False)(answer)


def _json_body(request: Request) -> bytearray:
    """Take a request's body.

    Raises:
        InvalidRequest: It was not declared as JSON.
    """
    # A page of another site may send other types without asking first.
    if not re.match(
        r"application/([\w.+-]+\+)?json\s*(;|$)",
        request.headers.get("content-type", ""),
        re.IGNORECASE,
    ):
        raise not_an_object()
    arrival: Arrival = request.state.arrival
    assert arrival.body is not None
    return arrival.body.take()


def _document_bodies(app: FastAPI) -> None:
    fastapi_document = app.openapi

    def document() -> dict[str, Any]:
        # FastAPI keeps what it makes, and knows only the bodies that it reads itself, in the event loop.
        is_new = app.openapi_schema is None
        whole = fastapi_document()
        if is_new:
            _, schemas = models_json_schema(
                [(kind, "validation") for kind in BODIES],
                ref_template="#/components/schemas/{model}",
            )
            components = whole.setdefault("components", {})
            components.setdefault("schemas", {}).update(schemas["$defs"])
            if not app.state.service.settings.api_keys:
                # Where nobody is asked for a key, generated clients and tests are not to expect it.
                components.pop("securitySchemes", None)
                for path in whole["paths"].values():
                    for operation in path.values():
                        operation.pop("security", None)
        return whole

    app.openapi = document  # type: ignore[method-assign]


def _add_model_routes(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    max_context = smallest_context(service.model.ensemble.members)

    def model_entry(name: str) -> Json:
        own: Json = {"id": name, "object": "model", "created": started, "owned_by": "proxytune"}
        # As vLLM has it for adapters and the model that they are for.
        parent = None if name == service.settings.name else service.settings.name
        root = name if parent is None else service.model_names[name]
        return own | {"root": root, "parent": parent, "max_model_len": max_context}

    @app.get("/models", include_in_schema=False)
    @app.get("/v1/models", responses={401: ERRORS[401]}, dependencies=[BEARER])
    async def models() -> Json:
        """List the recipe, and each of its experts as `recipe:expert`."""
        return {"object": "list", "data": [model_entry(name) for name in service.model_names]}

    @app.get("/models/{name:path}", include_in_schema=False)
    @app.get(
        "/v1/models/{name:path}",
        responses={401: ERRORS[401], 404: ERRORS[404]},
        dependencies=[BEARER],
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

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}

    @app.get("/metrics", response_class=Response, responses={200: text})
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


async def _whole(service: Service, answer: Answer, writer: Writer, receive: Receive) -> Json | None:
    """Return the JSON of an answer once all its texts have ended; None if the client goes away."""

    async def gather() -> Json:
        parts = [part async for part in service.parts(answer)]
        return await asyncio.to_thread(writer.whole, answer, parts)

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

    def __init__(self, service: Service, answer: Answer, writer: Writer, request_id: str) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        self.init_headers(headers | answer.headers)
        del self.headers["content-length"]
        self._service = service
        self._answer = answer
        self._writer = writer
        self._request_id = request_id

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
        answer, writer = self._answer, self._writer
        for line in writer.begin(answer):
            yield line
        try:
            async for part in self._service.parts(answer):
                lines = writer.add(answer, part)
                if part.offset is None and part.owner.ticket.scores is not None:
                    lines = await asyncio.to_thread(list, lines)
                for line in lines:
                    yield line
        except Exception as error:
            for line in writer.fail(answer, _refusal(error), self._request_id):
                yield line
            return
        for line in writer.end(answer):
            yield line


# Errors -----------------------------------------------------------------------------------------------------


def _refusal(error: Exception) -> Refusal:
    """Return the response for an error, without revealing anything about the machine."""
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(error.retry_after_s)}
        return Refusal(429, str(error), kind="rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, Unavailable):
        code = "shutting_down" if isinstance(error, ShuttingDown) else None
        headers = {"Retry-After": "5"}
        return Refusal(503, str(error), kind="server_error", code=code, headers=headers)
    if isinstance(error, TimeIsUp):
        message = (
            "the text was not finished within this server's time limit for a request.\n"
            "hint: send a shorter prompt or ask for fewer tokens; a stream shows the text so far"
        )
        return Refusal(504, message, kind="server_error", code="timeout")
    if isinstance(error, UnknownModel):
        return Refusal(404, str(error), param="model", code="model_not_found")
    if isinstance(error, UnknownResponse):
        return Refusal(404, str(error), param=error.field, code="response_not_found")
    if isinstance(error, PromptTooLong):
        return Refusal(400, str(error), code="context_length_exceeded")
    if isinstance(error, UnknownExpert):
        return Refusal(400, str(error), param="proxytune", code="unknown_expert")
    if isinstance(error, InvalidField):
        return Refusal(400, str(error), param=error.field)
    if isinstance(error, UserError):
        return Refusal(400, str(error))
    # Messages of backends may name files and servers, so they go to the log only.
    if isinstance(error, BackendError):
        logger.error("a model failed: %s", error)
    else:
        logger.error("a request failed", exc_info=error)
    message = "the models failed on this request; the server's log says why"
    return Refusal(500, message, kind="server_error")


def _add_error_handlers(app: FastAPI) -> None:
    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        headers = dict(error.headers or {})
        return Refusal(error.status_code, str(error.detail), kind=kind, headers=headers)

    async def refused(request: Request, error: Exception) -> Response:
        return _refusal(error)

    app.add_exception_handler(HTTPException, http)
    for kind in (UserError, Unavailable, BackendError, TimeIsUp):
        app.add_exception_handler(kind, refused)
