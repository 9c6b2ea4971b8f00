"""What clients may send: the OpenAI API's fields with their meaning, and `proxytune` for steering.

A field that cannot be honoured is refused by name, also where ignoring it would look like success; values
that change nothing (`"store": false`) pass. Names and defaults are the API's own.

Validation stops at the first item of a list that is wrong, or one too many.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    ValidationError,
    create_model,
    model_validator,
)

from proxytune.errors import InvalidRequest
from proxytune.request import FILTERS, MAX_ALPHA, MIN_TEMPERATURE, SamplingParams
from proxytune.server.body import check_shape
from proxytune.settings import options_of

MAX_CHOICES = 8
"""Maximum number of answers to one prompt, each of which takes a row."""
MAX_PROMPTS = 64
"""Maximum number of prompts in one request."""
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_EXPLAIN_TOP = 20
MAX_BIASED_TOKENS = 1024
MAX_MESSAGES = 1000
MAX_PARTS = 1000
"""Maximum number of pieces of one message."""
MAX_METADATA = 16
"""Maximum number of entries of `metadata`, as in the API."""
MAX_SHOWN = 100
"""Maximum number of characters of a field's name in an error."""

Asked = TypeVar("Asked", bound="_Fields")


class InvalidField(InvalidRequest):
    """A request's body is not what it has to be; `field` names where, as the client knows it."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can write one alone, and tokenizers cannot read it.
        raise ValueError("holds one half of a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_check_text)]
# Strict: "1" and true are no numbers, as in the API.
Alpha = Annotated[float, Field(strict=True, ge=-MAX_ALPHA, le=MAX_ALPHA, allow_inf_nan=False)]
Bias = Annotated[float, Field(strict=True, ge=-100, le=100, allow_inf_nan=False)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
TokenKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
SAMPLING = options_of(SamplingParams)
"""The library's options, which are fields of requests too."""
API_OPTIONS = (
    "max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "presence_penalty",
    "frequency_penalty", "logit_bias", "first_logit_bias", "seed", "stop", "stop_token_ids", "logprobs",
)  # fmt: skip
"""Those whose name, limits or form in the API are others: `Generation` and the requests declare them."""


def _option(name: str, **own: Any) -> Any:
    """Return a field with an option's default, limits and help, but for what the API has of its own."""
    declared = SAMPLING[name]
    option = declared.option
    limits = {"ge": option.at_least, "gt": option.above, "le": option.at_most, "lt": option.below}
    default = own.pop("default", declared.default)
    given: dict[str, Any] = {"description": option.help, **limits, **own}
    if declared.type is float:
        given["allow_inf_nan"] = False
    if declared.type in (int, float):
        given["strict"] = True
    return Field(default, **{key: value for key, value in given.items() if value is not None})


class _Fields(BaseModel):
    # Names such as `model` are the API's, not pydantic's.
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class SteeringFields(_Fields):
    """How this request is steered.

    `expert` names one expert, `experts` several with their own strengths, which are summed. Without either
    the recipe's default steers, or the one that `model` names.
    """

    alpha: Alpha | None = Field(None, description="0 is the base alone, 1 the published method")
    expert: Name | None = None
    experts: dict[Name, Alpha] | None = Field(None, min_length=1, max_length=64)
    explain: StrictBool = Field(False, description="Report what each model gave each token")
    explain_top: int = Field(
        5,
        strict=True,
        ge=0,
        le=MAX_EXPLAIN_TOP,
        description="Number of likeliest tokens to report of each model",
    )

    @model_validator(mode="after")
    def _check(self) -> SteeringFields:
        if self.experts is not None and (self.expert is not None or self.alpha is not None):
            raise ValueError(
                "experts have strengths of their own, so neither expert nor alpha may be given beside them"
            )
        return self


class StreamOptions(_Fields):
    """What a stream holds beside the text."""

    include_usage: StrictBool = False
    include_obfuscation: Literal[False] | None = None


class TextFormat(_Fields):
    """The only format that can be promised: text as the model writes it."""

    type: Literal["text"]


def _extension(name: str) -> tuple[Any, Any]:
    """Return the type and the field of an option that requests take under the library's own name."""
    declared = SAMPLING[name]
    kind: Any = {bool: StrictBool, int: int, float: float}[declared.type]
    return (kind | None if declared.is_optional else kind), _option(name)


_EXTENSIONS: dict[str, Any] = {
    name: _extension(name) for name in SAMPLING if name not in API_OPTIONS
}
_Extensions: Any = create_model("_Extensions", __base__=_Fields, **_EXTENSIONS)


class Generation(_Extensions):
    """What completions and chats have in common."""

    model: Name
    n: int = Field(1, strict=True, ge=1, le=MAX_CHOICES)
    temperature: float | None = _option("temperature", default=None, ge=0, le=2)
    top_p: float | None = _option("top_p", default=None)
    presence_penalty: float | None = _option("presence_penalty", default=None, ge=-2, le=2)
    frequency_penalty: float | None = _option("frequency_penalty", default=None, ge=-2, le=2)
    seed: int | None = _option("seed", ge=-(2**63), le=None, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = (
        _option("stop", default=None)
    )
    logit_bias: dict[TokenKey, Bias] | None = _option(
        "logit_bias", default=None, max_length=MAX_BIASED_TOKENS
    )
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=200)] | None = Field(
        None, description="Within a key or an address, requests with different values take turns"
    )
    proxytune: SteeringFields | None = None
    # Extensions that other servers have under the same names.
    top_k: int = _option(
        "top_k",
        ge=-1,
        le=2**31,
        description="Sample from this many most likely tokens; 0 or -1 keeps all",
    )
    min_tokens: int = _option("min_new_tokens", le=2**31)
    stop_token_ids: list[TokenId] | None = _option(
        "stop_token_ids", default=None, max_length=MAX_STOPS, fail_fast=True
    )
    first_logit_bias: dict[TokenKey, Bias] | None = _option(
        "first_logit_bias", default=None, max_length=MAX_BIASED_TOKENS
    )

    @model_validator(mode="after")
    def _check_stream(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream to true or leave it out")
        return self

    @property
    def steering(self) -> SteeringFields:
        """How the request is steered, with defaults where it says nothing."""
        return self.proxytune or SteeringFields()

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(
        self, max_new_tokens: int, *, stops: tuple[str, ...], logprobs: int | None
    ) -> SamplingParams:
        """Return the library's options for the API's fields; the defaults are the API's."""
        values: dict[str, Any] = {}
        for name, declared in SAMPLING.items():
            value = getattr(self, name, None)
            if isinstance(value, dict):  # Of "1" and "01", which are one token, the last counts.
                value = {int(key): bias for key, bias in value.items()}
            values[name] = declared.default if value is None else declared.from_json(value)
        temperature = 1.0 if self.temperature is None else self.temperature
        values |= {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min(self.min_tokens, max_new_tokens),
            "temperature": temperature,
            "top_k": max(0, self.top_k),
            "seed": None if self.seed is None else self.seed % 2**63,
            "stop": stops,
            "logprobs": logprobs,
        }
        if temperature < MIN_TEMPERATURE:
            # Greedy: the API takes filters beside it, and they change nothing.
            values |= {"temperature": 0.0} | {name: SAMPLING[name].default for name in FILTERS}
        return SamplingParams(**values)


class CompletionRequest(Generation):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
        ]
    )
    max_tokens: int | None = _option("max_new_tokens", default=16, le=2**31)
    logprobs: int | None = _option("logprobs", le=MAX_LOGPROBS)
    echo: StrictBool = Field(False, description="Begin the text with the prompt")
    best_of: int | None = Field(None, strict=True, ge=1, le=MAX_CHOICES)
    suffix: Literal[""] | None = Field(
        None, description="Cannot be honoured: there is no infilling"
    )

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of other than n cannot be honoured")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs cannot be honoured: prompts are not scored")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        items: list[Any] = list(self.prompt)
        return [items] if isinstance(items[0], int) else items


class TextPart(_Fields):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Fields):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    )
    name: None = None
    refusal: None = None

    def as_message(self) -> dict[str, str]:
        """Return it as templates take it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = _option("max_new_tokens", default=None, le=2**31)
    max_completion_tokens: int | None = _option("max_new_tokens", default=None, le=2**31)
    logprobs: StrictBool | None = None
    top_logprobs: int | None = _option("logprobs", le=MAX_LOGPROBS)
    response_format: TextFormat | None = None
    # What clients send by habit, with the values that change nothing.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: StrictBool | None = None
    store: Literal[False] | None = None
    metadata: Annotated[dict[Text, Text], Field(max_length=MAX_METADATA)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=8, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens and max_completion_tokens contradict each other")
        return self


# Reading ------------------------------------------------------------------------------------------------


def read_request(kind: type[Asked], body: bytes | bytearray) -> Asked:
    """Return the request that a body holds.

    Raises:
        InvalidRequest: It holds none; an `InvalidField` names the field.
    """
    check_shape(body)
    try:
        found = json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not JSON: it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error.msg}") from None
    except ValueError:  # Python's own limit: reading n digits takes time in the order of n * n.
        raise InvalidRequest("the body holds a number of too many digits") from None
    if not isinstance(found, dict):
        raise not_an_object()
    # Before the others are looked at, as each of them would have an error of its own.
    unknown = next((name for name in found if name not in kind.model_fields), None)
    if unknown is not None:
        raise InvalidField(_not_honoured(unknown), _field_name([unknown]))
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise _first(error) from None


def not_an_object() -> InvalidRequest:
    """Return the error for a body that is not a JSON object, or was not declared as one."""
    return InvalidRequest(
        "the body must be a JSON object, sent as `Content-Type: application/json`"
    )


def _first(error: ValidationError) -> InvalidField:
    """Return the first bad field, named as the client knows it."""
    errors = error.errors(include_url=False, include_input=False)
    field = errors[0]["loc"][:1]
    # A field with several allowed types has an error for each. The one that came furthest belongs to the
    # intended type: past the last item that a list may have, else deepest, then latest.
    first = max(
        (each for each in errors if each["loc"][:1] == field),
        key=lambda each: (
            each["type"] == "too_long",
            len(each["loc"]),
            [part for part in each["loc"] if isinstance(part, int)],
        ),
    )
    path = [str(part) for part in first["loc"]]
    name = _field_name(path)
    if first["type"] == "extra_forbidden":
        return InvalidField(_not_honoured(name or path[-1]), name)
    text = str(first["msg"]).removeprefix("Value error, ")
    return InvalidField(f"{name}: {text}" if name else text, name)


def _field_name(path: list[str]) -> str | None:
    # The names of the types that were tried are not part of the field's name.
    named = [p for p in path if re.fullmatch(r"[a-z_]+|\d+", p) and p != "str"]
    return ".".join(named)[:MAX_SHOWN] or None


def _not_honoured(name: str) -> str:
    return f"{name[:MAX_SHOWN]!r} is not a field that can be honoured here"
