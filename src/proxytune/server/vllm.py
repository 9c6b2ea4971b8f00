"""vLLM's server in this project's request language: a middleware that turns requests into vLLM's own.

    vllm serve my-recipe --middleware proxytune.server.vllm.RequestLanguage

`proxytune serve --engine vllm` starts vLLM with it. Of a request's fields it reads `model`, `proxytune` and
`vllm_xargs`, and leaves to vLLM what says how to steer in `vllm_xargs`. Where vLLM would read a text or end a
chat otherwise than the library, it makes the difference good. All other fields, and every answer, are vLLM's.

vLLM puts a middleware outside the one that checks its key. So a body is changed where the route reads it,
which is behind that check, and `/v1/proxytune` is a route among vLLM's.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxytune.errors import InvalidRequest, UnknownExpert, UserError
from proxytune.integrations.vllm import request as plugin
from proxytune.integrations.vllm.request import Menu
from proxytune.loading.formats import base_format
from proxytune.recipe.fields import KEYS, write_steering
from proxytune.recipe.files import RecipeFiles
from proxytune.request import Steering
from proxytune.server.answer import error_body
from proxytune.server.schema import InvalidField, SteeringOnly, read_request
from proxytune.server.steering import UnknownModel, about_recipe, expert_named, steering_of
from proxytune.text.prompts import PLAIN_USER_TURN, PromptFormat

Json = dict[str, Any]

MAX_BODY_BYTES = 16 * 2**20
"""Maximum size of a body; vLLM sets none."""
MAX_SHOWN = 2000
"""Maximum number of characters of an error's message, which may quote the request."""

TEXTS = ("/v1/completions", "/v1/completions/render")
"""Routes that take texts."""
CHATS = {
    "/v1/chat/completions": "stop",
    "/v1/chat/completions/batch": "stop",
    "/v1/chat/completions/render": "stop",
    "/v1/responses": "stop",
    "/v1/responses/render": "stop",
    "/v1/messages": "stop_sequences",
    "/v1/messages/render": "stop_sequences",
}
"""Routes that take messages, and what their stop strings are called."""
UNSTEERED = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
"""Routes whose answers do not depend on how a text is steered."""


class RequestLanguage:
    """Lets requests to vLLM's server be steered as those to the local one. Without a recipe it does nothing.

    Args:
        app: What answers: vLLM's routes, behind its other middleware.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._reader = TextReader()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, with its body changed where it is read."""
        if scope["type"] == "lifespan":
            _add_route(scope["app"], self._reader)
        if scope["type"] != "http" or scope["method"] != "POST" or plugin.MENU is None:
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        body = _Body(
            receive, send, path, Translator(plugin.MENU, _name(scope["app"]), self._reader)
        )
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if not body.is_refused:
                raise
        if body.is_refused:
            await body.refuse()


class TextReader:
    """Turns texts into the tokens that the recipe's models read, in a thread of its own.

    vLLM has one tokenizer, and sends a text as it is. The recipe may put a template around it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="proxytune-rendering")
        self._lock = threading.Lock()
        self._format: PromptFormat | None = None

    def base_format(self, menu: Menu) -> PromptFormat:
        """Return how the base, like every other model, reads prompts."""
        with self._lock:
            if self._format is None:
                self._format = base_format(RecipeFiles(menu.recipe, menu.grants))
            return self._format

    async def format_of(self, menu: Menu) -> PromptFormat:
        """Return the same without holding up other requests."""
        if self._format is not None:
            return self._format
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.base_format, menu)

    async def token_ids(self, own: PromptFormat, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts.

        Raises:
            UserError: A text cannot be rendered.
        """

        def render() -> list[list[int]]:
            return [own.render(text, "the base") for text in texts]

        return await asyncio.get_running_loop().run_in_executor(self._thread, render)


class Translator:
    """Turns the fields of requests into vLLM's.

    Args:
        menu: What requests may choose from.
        name: What the recipe is called.
        reader: Reads texts.
    """

    def __init__(self, menu: Menu, name: str, reader: TextReader) -> None:
        self._menu = menu
        self._name = name
        self._reader = reader

    async def translated(self, path: str, body: bytes) -> bytes:
        """Return a body as vLLM takes it; what is no JSON object is left for vLLM to refuse.

        Args:
            path: The route.
            body: What the client sent.

        Raises:
            UserError: A field cannot be honoured.
        """
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            return body
        if not isinstance(found, dict):
            return body
        if path == "/invocations":
            path = next(iter(CHATS)) if "messages" in found else TEXTS[0]
        is_changed = self._steer(found, path)
        if path in TEXTS:
            is_changed |= await self._read_texts(found)
        elif path in CHATS:
            is_changed |= await self._stop_chat(found, CHATS[path])
        return json.dumps(found).encode() if is_changed else body

    def _steer(self, found: Json, path: str) -> bool:
        """Say in `vllm_xargs` how a request is steered; return whether it is changed."""
        given, xargs = found.get("proxytune"), found.get("vllm_xargs")
        model, expert = found.get("model"), None
        if isinstance(model, str) and model.startswith(f"{self._name}:"):
            expert = expert_named(self._menu.recipe, self._name, model)
        if path not in TEXTS and path not in CHATS:
            if path not in UNSTEERED and (given is not None or expert is not None):
                raise InvalidField(
                    f"{path[:100]} cannot be steered by proxytune or the name of an expert's model.\n"
                    "hint: those that can be are /v1/completions, /v1/chat/completions, /v1/responses and "
                    "/v1/messages",
                    "model" if given is None else "proxytune",
                )
            return False
        fields = read_request(SteeringOnly, json.dumps({"proxytune": given}).encode()).proxytune
        if fields is not None and fields.explain:
            raise InvalidField(
                "proxytune.explain cannot be honoured by vLLM, whose answers do not hold what each model "
                "gave.\n"
                "hint: use `proxytune serve` without --engine vllm",
                "proxytune.explain",
            )
        if xargs is not None and not isinstance(xargs, dict):
            if fields is None and expert is None:
                return False  # vLLM says what is wrong
            raise InvalidField("vllm_xargs must be an object", "vllm_xargs")
        others = {k: v for k, v in (xargs or {}).items() if k not in KEYS}
        wanted = steering_of(self._menu.recipe, expert=expert, fields=fields, xargs=xargs)
        own = write_steering(wanted)
        try:
            self._menu.asked(others | own)
        except InvalidRequest as error:
            raise InvalidField(
                str(error), "vllm_xargs" if fields is None else "proxytune"
            ) from error
        if wanted != Steering() and found.get("use_beam_search"):
            raise InvalidField(
                "use_beam_search is true, and vLLM does not say to a model whose beam a row is, so it cannot "
                "be steered otherwise than by the recipe.\nhint: leave one of them out",
                "use_beam_search",
            )
        is_changed = "proxytune" in found or expert is not None or (xargs or {}) != others | own
        found.pop("proxytune", None)
        if expert is not None:
            found["model"] = self._name
        if is_changed:
            found["vllm_xargs"] = others | own or None
        return is_changed

    async def _read_texts(self, found: Json) -> bool:
        """Put tokens in the place of texts that vLLM would read otherwise; return whether it did."""
        prompt = found.get("prompt")
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            return False
        own = await self._reader.format_of(self._menu)
        if own.text == "plain" and (
            found.get("add_special_tokens") is False or not _ends_texts(own)
        ):
            return False
        if own.text != "plain" and found.get("echo"):
            raise InvalidField(
                "echo shows the prompt, and vLLM would show the recipe's template around it as well.\n"
                "hint: leave echo out, or use `proxytune serve` without --engine vllm",
                "echo",
            )
        token_ids = await self._reader.token_ids(own, texts)
        found["prompt"] = token_ids[0] if isinstance(prompt, str) else token_ids
        return True

    async def _stop_chat(self, found: Json, key: str) -> bool:
        """Stop a base without a chat format before the user's next turn; return whether it needs that."""
        stops = found.get(key)
        stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
        own = await self._reader.format_of(self._menu)
        if not own.joins_messages or not isinstance(stops, list):
            return False
        found[key] = [*stops, PLAIN_USER_TURN]
        return True


def _ends_texts(own: PromptFormat) -> bool:
    """Whether the tokenizer puts tokens after a text, which the library leaves out."""
    whole = list(own.tokenizer.encode("a", add_special_tokens=True))
    return own.render("a", "the base") != whole


class _Body:
    """A request's body, read and changed when the route asks for it.

    For the route, a refused body is a client that has gone away; what it then says gives way to the refusal.
    """

    def __init__(self, receive: Receive, send: Send, path: str, translator: Translator) -> None:
        self._receive = receive
        self._send = send
        self._path = path
        self._translator = translator
        self._is_read = False
        self._refusal: JSONResponse | None = None
        self._is_answered = False

    @property
    def is_refused(self) -> bool:
        """Whether the body cannot be honoured."""
        return self._refusal is not None

    async def receive(self) -> Message:
        """Return the whole body at once, and then what the server says of the connection."""
        if self.is_refused:
            return {"type": "http.disconnect"}
        if self._is_read:
            return await self._receive()
        self._is_read = True
        body = bytearray()
        is_whole = False
        while not is_whole:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            body += message.get("body", b"")
            is_whole = not message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                text = f"the body has more than {MAX_BODY_BYTES:,} bytes, which is all that is read"
                self._refusal = self._answer(413, text, None)
                return {"type": "http.disconnect"}
        try:
            changed = await self._translator.translated(self._path, bytes(body))
        except UserError as error:
            self._refusal = self._answer(*_status(error))
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": changed, "more_body": False}

    async def send(self, message: Message) -> None:
        """Pass an answer on, or the refusal in its place."""
        if self._refusal is None:
            await self._send(message)
        else:
            await self.refuse()

    async def refuse(self) -> None:
        """Send the refusal, once."""
        assert self._refusal is not None
        if not self._is_answered:
            self._is_answered = True
            for message in (
                {
                    "type": "http.response.start",
                    "status": self._refusal.status_code,
                    "headers": self._refusal.raw_headers,
                },
                {"type": "http.response.body", "body": self._refusal.body},
            ):
                await self._send(message)

    def _answer(self, status: int, message: str, param: str | None) -> JSONResponse:
        message = message if len(message) <= MAX_SHOWN else f"{message[:MAX_SHOWN]}…"
        if self._path.startswith("/v1/messages"):
            kind = "not_found_error" if status == 404 else "invalid_request_error"
            content: Json = {"type": "error", "error": {"type": kind, "message": message}}
        else:
            content = error_body(message, kind="invalid_request_error", param=param, code=None)
        return JSONResponse(content, status)


def _status(error: UserError) -> tuple[int, str, str | None]:
    """Return the status of a refusal, its message, and the field's name."""
    if isinstance(error, UnknownModel):
        return 404, str(error), "model"
    if isinstance(error, UnknownExpert):
        return 400, str(error), "proxytune"
    return 400, str(error), getattr(error, "field", None)


def _name(app: Any) -> str:
    """Return what the recipe is called: vLLM's first name of its model."""
    args = app.state.args
    return str((args.served_model_name or [args.model])[0])


def _add_route(app: Any, reader: TextReader) -> None:
    """Add `/v1/proxytune` to vLLM's routes."""

    async def about() -> Json:
        """Describe the recipe: its experts, their default strengths, and the server's limits."""
        menu = plugin.MENU
        assert menu is not None
        config = app.state.vllm_config.model_config
        own = await reader.format_of(menu)
        limits = {
            "max_tokens": config.max_model_len - 1,
            "max_prompt_tokens": config.max_model_len - 1,
            "max_context": config.max_model_len,
            "max_logprobs": config.max_logprobs,
            "max_explain_top": 0,
        }
        found = about_recipe(menu.recipe, _name(app), base=own, limits=limits)
        return found | ({"fixed": menu.is_fixed} if menu.is_fixed else {})

    if plugin.MENU is not None:
        app.add_api_route("/v1/proxytune", about, methods=["GET"])
