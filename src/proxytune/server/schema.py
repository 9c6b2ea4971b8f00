"""What clients may send: the OpenAI API's fields with their meaning, and `proxytune` for steering.

A field that cannot be honoured is refused by name, also where ignoring it would look like success. Null is
absence, everywhere. Fields that change nothing here are in `habits.py`, what is said of a fault is in
`refusals.py`. Names and defaults are the API's own.

Validation stops at the first item of a list that is wrong, or one too many.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    create_model,
    model_validator,
)

from proxytune.errors import InvalidRequest
from proxytune.policy import COMBINATIONS, POLICIES, Policy
from proxytune.request import (
    FILTERS,
    MAX_ALPHA,
    MIN_TEMPERATURE,
    ChatOptions,
    SamplingParams,
    Steering,
)
from proxytune.server.body import check_shape
from proxytune.server.habits import HABITS, UNUSED, Habit, NotHonoured
from proxytune.server.refusals import MAX_SHOWN, explain, field_name, not_honoured
from proxytune.settings import options_of

MAX_CHOICES = 8
"""Maximum number of answers to one prompt, each of which takes a row."""
MAX_PROMPTS = 64
"""Maximum number of prompts in one request."""
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_EXPLAIN_TOP = 20
MAX_EXPERTS = 64
"""Maximum number of experts that steer one text."""
MAX_BIASED_TOKENS = 1024
MAX_MESSAGES = 1000
MAX_PARTS = 1000
"""Maximum number of pieces of one message."""
MAX_METADATA = 16
"""Maximum number of entries of `metadata`, as in the API."""
MAX_TEMPLATE_KWARGS = 32
"""Maximum number of variables for chat templates."""
NO_LIMIT = -1
"""As a number of new tokens: as many as fit. As a seed: a new one each time. Both are llama.cpp's."""

Asked = TypeVar("Asked", bound="Fields")


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


def _without_nulls(found: Any) -> Any:
    """Return a JSON object without the entries that are null, as if they were left out."""
    if not isinstance(found, dict):
        return found
    return {key: value for key, value in found.items() if value is not None}


Text = Annotated[str, AfterValidator(_check_text)]
# Strict: "1" and true are no numbers, as in the API.
Alpha = Annotated[float, Field(strict=True, ge=-MAX_ALPHA, le=MAX_ALPHA, allow_inf_nan=False)]
Bias = Annotated[float, Field(strict=True, ge=-100, le=100, allow_inf_nan=False)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
TOKEN_KEY = r"[0-9]{1,9}"
Stop = Annotated[str, StringConstraints(max_length=1000)]
SAMPLING = options_of(SamplingParams)
"""The library's options, which are fields of requests too."""
API_OPTIONS = (
    "max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "presence_penalty",
    "frequency_penalty", "logit_bias", "first_logit_bias", "seed", "stop", "stop_token_ids", "logprobs",
)  # fmt: skip
"""Those whose name, limits or form in the API are others: `Generation` and the requests declare them."""


def option_field(name: str, **own: Any) -> Any:
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


# Fields that take only what changes nothing, as those of `HABITS` do.
_PLAIN: Any = Habit("boolean", (False,), "the pieces of a stream are not padded here").type
_NO_SUFFIX: Any = Habit(
    "string", ("",), "there is no infilling here: texts go on at their end"
).type
_WITH_SPECIAL: Any = Habit(
    "boolean",
    (True,),
    "texts get the special tokens of each model here; token ids are sent as they are",
).type
_WITHOUT_SPECIAL: Any = Habit(
    "boolean", (False,), "chat templates write their special tokens themselves"
).type
_NO_CALLS: Any = Habit(
    "array", ([],), "tools cannot be called here, so calls of them are not read"
).type
_NO_AUDIO: Any = Habit("object", ({},), "the models here read text alone").type


class Fields(BaseModel):
    """A JSON object of a request: a field that is not known is refused, and null is absence."""

    # Names such as `model` are the API's, not pydantic's.
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, found: Any) -> Any:
        return _without_nulls(found)


def _check_policy(policy: Any) -> Any:
    try:
        Policy().changed(_without_nulls(policy), None)
    except InvalidRequest as error:
        raise ValueError(str(error)) from None
    return policy


def _check_combination(combine: Any) -> Any:
    try:
        Policy().changed(None, combine)
    except InvalidRequest as error:
        raise ValueError(str(error)) from None
    return combine


_POLICY_SCHEMA = {"anyOf": [{"type": "string", "enum": list(POLICIES)}, {"type": "object"}]}


class SteeringFields(Fields):
    """How this request is steered.

    `expert` names one expert, `experts` several with their own strengths, which are summed. Without either
    the recipe's default steers, or the one that `model` names.
    """

    alpha: Alpha | None = Field(None, description="0 is the base alone, 1 the published method")
    expert: Name | None = None
    experts: (
        Annotated[
            dict[Name, Alpha],
            BeforeValidator(_without_nulls),
            Field(min_length=1, max_length=MAX_EXPERTS),
        ]
        | None
    ) = None
    policy: Annotated[Any, AfterValidator(_check_policy), WithJsonSchema(_POLICY_SCHEMA)] = Field(
        None, description="A policy's name, or settings as in the recipe's steering, instead of its"
    )
    combine: Annotated[
        Any,
        AfterValidator(_check_combination),
        WithJsonSchema({"type": "string", "enum": list(COMBINATIONS)}),
    ] = Field(None, description="How several experts steer, instead of as the recipe says")
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

    def as_steering(self) -> Steering:
        """Return it as the library has it."""
        experts = self.expert if self.experts is None else self.experts
        return Steering(self.alpha, experts, _without_nulls(self.policy), self.combine)


class SteeringOnly(Fields):
    """The field of this project in a request whose other fields another server reads."""

    proxytune: SteeringFields | None = None


class StreamOptions(Fields):
    """What a stream holds beside the text."""

    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = Field(
        False, description="With include_usage: report the usage so far in every piece"
    )
    include_obfuscation: _PLAIN = None


def _extension(name: str) -> tuple[Any, Any]:
    """Return the type and the field of an option that requests take under the library's own name."""
    declared = SAMPLING[name]
    kind: Any = {bool: StrictBool, int: int, float: float}[declared.type]
    return (kind | None if declared.is_optional else kind), option_field(name)


_EXTENSIONS: dict[str, Any] = {
    name: _extension(name) for name in SAMPLING if name not in API_OPTIONS
}
_EXTENSIONS |= {name: habit.as_field() for name, habit in HABITS.items()}
_Extensions: Any = create_model("_Extensions", __base__=Fields, **_EXTENSIONS)


def _biases(found: Any) -> Any:
    """Return biases without nulls, after a look at all their keys: an error names each bad one."""
    found = _without_nulls(found)
    if isinstance(found, dict) and len(found) <= MAX_BIASED_TOKENS:
        bad = [key[:MAX_SHOWN] for key in found if not re.fullmatch(TOKEN_KEY, key)]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            names = ", ".join(map(json.dumps, bad[:3]))
            raise NotHonoured(f"its keys must be token ids, unlike {names}{more}")
    return found


Biases = Annotated[dict[str, Bias], BeforeValidator(_biases), Field(max_length=MAX_BIASED_TOKENS)]
NumNew = Annotated[int, Field(strict=True, ge=NO_LIMIT, le=2**31)]
"""A number of new tokens; what does not fit is cut off."""


class Generation(_Extensions):
    """What completions and chats have in common."""

    model: Name | None = Field(None, description="Default: the recipe that is served")
    n: int = Field(1, strict=True, ge=1, le=MAX_CHOICES)
    temperature: float | None = option_field("temperature", default=None, ge=0)
    top_p: float | None = option_field(
        "top_p", default=None, ge=0, gt=None, description="0 takes the most likely token alone"
    )
    presence_penalty: float | None = option_field("presence_penalty", default=None, ge=-2, le=2)
    frequency_penalty: float | None = option_field("frequency_penalty", default=None, ge=-2, le=2)
    seed: int | None = option_field(
        "seed", ge=-(2**63), le=None, lt=2**63, description="-1 takes a new one each time"
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = (
        option_field("stop", default=None)
    )
    logit_bias: Biases | None = option_field("logit_bias", default=None)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=200)] | None = Field(
        None, description="Within a key or an address, requests with different values take turns"
    )
    metadata: (
        Annotated[dict[Text, Text], BeforeValidator(_without_nulls), Field(max_length=MAX_METADATA)]
        | None
    ) = Field(None, description=UNUSED)
    proxytune: SteeringFields | None = None
    vllm_xargs: dict[str, Any] | None = Field(
        None,
        description="alpha, expert, policy and combine, as vLLM's plugin of this project reads them",
    )
    # Extensions that other servers have under the same names.
    n_predict: NumNew | None = Field(None, description="The same as max_tokens")
    top_k: int = option_field(
        "top_k",
        ge=-1,
        le=2**31,
        description="Sample from this many most likely tokens; 0 or -1 keeps all",
    )
    repeat_penalty: float | None = option_field(
        "repetition_penalty", default=None, description="The same as repetition_penalty"
    )
    repeat_last_n: int = Field(
        NO_LIMIT, strict=True, ge=NO_LIMIT, description="-1: penalties count the whole text"
    )
    min_tokens: int = option_field("min_new_tokens", le=2**31)
    stop_token_ids: list[TokenId] | None = option_field(
        "stop_token_ids", default=None, max_length=MAX_STOPS, fail_fast=True
    )
    first_logit_bias: Biases | None = option_field("first_logit_bias", default=None)
    return_token_ids: StrictBool = Field(
        False, description="List the token ids of the text, and of the prompt as the base reads it"
    )
    return_tokens_as_token_ids: StrictBool = Field(
        False, description="In logprobs, write tokens as token_id:NUMBER"
    )
    prompt_logprobs: int | None = Field(
        None,
        strict=True,
        ge=0,
        le=MAX_LOGPROBS,
        description="List each prompt token's logprob and rank, and the N most likely tokens there",
    )

    @model_validator(mode="after")
    def _check_each(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream to true or leave it out")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError(
                "prompt_logprobs are not part of streams; set stream to false, or use echo with logprobs"
            )
        self._check_same("n_predict", "max_tokens", "max_completion_tokens")
        self._check_same("repeat_penalty", "repetition_penalty")
        factors = [getattr(self, "repetition_penalty", 1.0), self.repeat_penalty or 1.0]
        has_penalties = (
            any(factor != 1 for factor in factors)
            or self.presence_penalty
            or self.frequency_penalty
        )
        if self.repeat_last_n != NO_LIMIT and has_penalties:
            raise ValueError(
                f"repeat_last_n is {self.repeat_last_n}, and penalties count the whole text here; "
                "set it to -1 or leave it out"
            )
        return self

    def _check_same(self, *names: str) -> None:
        """Refuse different values of fields that mean the same."""
        given = [name for name in names if name in self.model_fields_set]
        for first, other in itertools.pairwise(given):
            if getattr(self, first) != getattr(self, other):
                raise ValueError(f"{first} and {other} mean the same, and contradict each other")

    @property
    def num_scored(self) -> int | None:
        """How many likeliest tokens to list at each token of the prompt; None if it is not scored."""
        return self.prompt_logprobs

    @property
    def steering(self) -> SteeringFields:
        """How the request is steered, with defaults where it says nothing."""
        return self.proxytune or SteeringFields()

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; an empty one stops nothing."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in found if stop)

    @property
    def chat_options(self) -> ChatOptions:
        """How messages are rendered."""
        return ChatOptions()

    @property
    def num_new(self) -> int | None:
        """How many tokens to generate at most; None for as many as fit."""
        for name in ("max_completion_tokens", "n_predict", "max_tokens"):
            asked: int | None = getattr(self, name, None)
            if name in self.model_fields_set and asked is not None:
                return None if asked == NO_LIMIT else asked
        return self.default_num_new

    default_num_new: ClassVar[int | None] = None
    """How many tokens to generate at most if the request does not say."""

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
        if self.top_p == 0:  # Of the tokens, the most likely is left.
            temperature = 0.0
        if self.repeat_penalty is not None:
            values["repetition_penalty"] = self.repeat_penalty
        values |= {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min(self.min_tokens, max_new_tokens),
            "temperature": temperature,
            "top_k": max(0, self.top_k),
            "seed": None if self.seed in (None, NO_LIMIT) else self.seed % 2**63,
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
    max_tokens: NumNew | None = option_field("max_new_tokens", default=16, ge=NO_LIMIT, le=2**31)
    logprobs: int | None = option_field("logprobs", le=MAX_LOGPROBS)
    echo: StrictBool = Field(
        False, description="Begin the text with the prompt, and logprobs with those of its tokens"
    )
    best_of: int | None = Field(None, strict=True, ge=1, le=MAX_CHOICES)
    suffix: _NO_SUFFIX = None
    add_special_tokens: _WITH_SPECIAL = None

    default_num_new: ClassVar[int | None] = 16

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(
                f"best_of is {self.best_of} and n is {self.n}: all answers are returned here, not the best"
            )
        return self

    @property
    def num_scored(self) -> int | None:
        """How many likeliest tokens to list at each token of the prompt; None if it is not scored."""
        wanted = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((each for each in wanted if each is not None), default=None)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        items: list[Any] = list(self.prompt)
        return [items] if isinstance(items[0], int) else items


def _check_part(kind: Any) -> Any:
    if isinstance(kind, str) and kind != "text":
        raise NotHonoured('the models here read text alone, so its parts are of the type "text"')
    return kind


def _check_role(role: Any) -> Any:
    if role in ("tool", "function"):
        raise NotHonoured(
            "tools cannot be called here, so their results are not read; roles are system, developer, user "
            "and assistant"
        )
    return role


class TextPart(Fields):
    """A piece of a message."""

    type: Annotated[Literal["text"], BeforeValidator(_check_part)]
    text: Text
    cache_control: dict[str, Any] | None = Field(None, description=UNUSED)


class ChatMessage(Fields):
    """One turn."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant"], BeforeValidator(_check_role)
    ]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]
    name: Text | None = Field(None, description="Passed to chat templates")
    reasoning_content: Text | None = Field(
        None, description="What a reasoning model thought before this answer; for chat templates"
    )
    reasoning: Text | None = Field(None, description="The same as reasoning_content")
    refusal: Text | None = Field(None, description="Stands in for the content if there is none")
    tool_calls: _NO_CALLS = None
    function_call: _NO_CALLS = None
    # What clients send back of an answer, or add for other servers; it changes nothing.
    annotations: list[Any] | None = Field(None, description=UNUSED)
    audio: _NO_AUDIO = None
    cache_control: dict[str, Any] | None = Field(None, description=UNUSED)
    provider_specific_fields: dict[str, Any] | None = Field(None, description=UNUSED)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, found: Any) -> Any:
        found = _without_nulls(found)
        if isinstance(found, dict) and found.get("role") == "assistant":
            found.setdefault("content", "")  # which an assistant that called a tool has not
        return found

    def as_message(self) -> dict[str, str]:
        """Return it as templates take it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or self.refusal or "",
        }
        reasoning = self.reasoning_content or self.reasoning
        if self.name is not None:
            message["name"] = self.name
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        return message


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: NumNew | None = option_field("max_new_tokens", default=None, ge=NO_LIMIT, le=2**31)
    max_completion_tokens: NumNew | None = option_field(
        "max_new_tokens", default=None, ge=NO_LIMIT, le=2**31
    )
    logprobs: StrictBool | None = None
    top_logprobs: int | None = option_field("logprobs", le=MAX_LOGPROBS)
    echo: StrictBool = Field(
        False, description="Begin the answer with the last message if it is the assistant's"
    )
    add_generation_prompt: StrictBool = Field(
        True, description="Begin the assistant's turn after the messages"
    )
    continue_final_message: StrictBool = Field(
        False, description="Go on with the last message, with add_generation_prompt set to false"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=MAX_TEMPLATE_KWARGS, description="Variables for chat templates"
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        Field(None, description="A variable for chat templates")
    )
    include_reasoning: StrictBool = Field(
        True, description="Report the reasoning of a reasoning model, as reasoning_content"
    )
    separate_reasoning: StrictBool = Field(
        True, description="Keep reasoning apart from the content; otherwise the text stays as it is"
    )
    reasoning_format: Literal["auto", "deepseek", "none"] = Field(
        "auto", description="none is the same as setting separate_reasoning to false"
    )
    add_special_tokens: _WITHOUT_SPECIAL = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        begins = self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set
        if self.continue_final_message and begins:
            raise ValueError(
                "continue_final_message goes on with the last message, and add_generation_prompt begins a "
                "new one; set one of them to false"
            )
        return self

    @property
    def chat_options(self) -> ChatOptions:
        """How messages are rendered."""
        variables = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            # As in vLLM: some templates know the effort, others only whether to think.
            variables.setdefault("reasoning_effort", self.reasoning_effort)
            variables.setdefault("enable_thinking", self.reasoning_effort != "none")
        is_given = "add_generation_prompt" in self.model_fields_set
        begins_turn = self.add_generation_prompt if is_given else None
        return ChatOptions(begins_turn, self.continue_final_message, variables)

    @property
    def splits_reasoning(self) -> bool:
        """Whether the reasoning of a reasoning model is kept apart from its answer."""
        return self.separate_reasoning and self.reasoning_format != "none"


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
    unknown = next(
        (n for n, v in found.items() if v is not None and n not in kind.model_fields), None
    )
    if unknown is not None:
        raise InvalidField(not_honoured(unknown), field_name([unknown]))
    try:
        wanted = kind.model_validate(found)
    except ValidationError as error:
        raise InvalidField(*explain(error)) from None
    if re.search(rb"\\u[dD][89a-fA-F]", body):
        # Also in what is passed on as it is, to a template or to the log.
        try:
            _check_text(json.dumps(found, ensure_ascii=False))
        except ValueError as error:
            raise InvalidRequest(f"the body {error}") from None
    return wanted


def not_an_object() -> InvalidRequest:
    """Return the error for a body that is not a JSON object, or was not declared as one."""
    return InvalidRequest(
        "the body must be a JSON object, sent as `Content-Type: application/json`"
    )
