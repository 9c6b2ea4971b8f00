"""What a caller asks for: `Request`, `Steering` and `SamplingParams`, frozen and checked when built.

A request says what to generate and how, never on which device or in which batch. Whether the recipe has
the experts it names is checked where a recipe resolves them (`Recipe.strengths`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, TypedDict

from proxytune.errors import InvalidRequest
from proxytune.policy import Policy, PolicySettings
from proxytune.settings import Option, check, is_number, option, options_of

Experts = str | tuple[str, ...] | Mapping[str, float]
"""Which experts steer: one name, several, or names with a strength for each."""


class Message(TypedDict):
    """One turn of a conversation, in the chat format of the OpenAI API.

    A message may have further keys, such as `name` or `reasoning_content`: chat templates see them.
    """

    role: str
    content: str


Prompt = str | Sequence[Message] | Sequence[int]
"""Text, a conversation, or token ids of the base's vocabulary."""

TEMPLATE_NAMES = frozenset(
    {"messages", "prompt", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)
"""What a chat template gets besides `ChatOptions.template_kwargs`, which cannot replace it."""


MAX_ALPHA = 1e4
"""Beyond it, offsets of ordinary size would leave float32 no digits of the base."""


def check_alpha(alpha: float, name: str = "alpha") -> float:
    """Return `alpha` as a float.

    Raises:
        InvalidRequest: It is not a finite number, or larger than `MAX_ALPHA` either way.
    """
    if not is_number(alpha) or abs(alpha) > MAX_ALPHA:
        raise InvalidRequest(
            f"{name} is {alpha!r}, and the strength of steering must be a finite number between "
            f"-{MAX_ALPHA:g} and {MAX_ALPHA:g}.\n"
            "hint: 0 is the base alone, 1 the published method"
        )
    return float(alpha)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequest(message)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


MIN_TEMPERATURE = 1e-4
"""Below it, logits divided by the temperature would leave float32; the draw has long become greedy."""
MAX_TEMPERATURE = 1e4
"""All tokens are about equally likely long before; infinity in float32 would make logits of -inf NaN."""
MAX_EXPLAIN_TOP = 1000
"""Each token of an explained text would carry as many for each model."""
MAX_PENALTY = 1e4
"""Beyond it, penalised logits would lose their digits in float32 and then leave it."""

SPECULATIVE = Option(
    "Draft tokens ahead where that is faster; the text stays the same",
    flag="--speculative/--no-speculative",
)
EngineName = Literal["local", "vllm"]
"""What runs the models: this process, or vLLM."""
BATCH_SIZES: Mapping[str, int] = {"local": 8, "vllm": 1024}
"""Number of requests of a file that each engine gets together; vLLM decides how many of them run."""
NO_DRAFTS = (
    "--speculative is for models that run here: while an expert drafts, vLLM does not say which row of a "
    "batch is whose, so rows could not have a strength of their own.\nhint: leave --speculative out"
)
DEFAULT_BATCH_SIZE = f"{BATCH_SIZES['local']}; {BATCH_SIZES['vllm']:,} with --engine vllm"
Alpha = Annotated[float, Option(at_least=-MAX_ALPHA, at_most=MAX_ALPHA)]
TokenId = Annotated[int, Option(at_least=0)]
Bias = Annotated[float, Option(at_least=-MAX_PENALTY, at_most=MAX_PENALTY)]
StopString = Annotated[str, Option(at_least=1)]
FILTERS = ("top_k", "top_p", "min_p")
"""Options that leave some of the tokens to draw from; greedy decoding takes none of them."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop. The default is greedy decoding.

    What each field does and may hold stands beside it; token ids are those of the base's vocabulary.

    Raises:
        InvalidRequest: A value is out of range, or two of them contradict each other.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1 (`repetition_penalty`); the OpenAI API's
    reference (`presence_penalty`, `frequency_penalty`, `logit_bias`).
    """

    max_new_tokens: int = option(128, "Maximum number of new tokens", at_least=1)
    min_new_tokens: int = option(
        0, "Minimum number of new tokens before anything may end the text", at_least=0
    )
    temperature: float = option(
        0.0,
        "Sampling temperature: 0 always takes the most likely token; higher values spread the choice",
        at_least=MIN_TEMPERATURE,
        at_most=MAX_TEMPERATURE,
        or_zero=True,
    )
    top_k: int = option(
        0, "Sample from the K most likely tokens; 0 keeps all", at_least=0, metavar="K"
    )
    top_p: float = option(
        1.0,
        "Sample from the smallest set of tokens whose probabilities add up to this; 1 keeps all",
        above=0,
        at_most=1,
    )
    min_p: float = option(
        0.0,
        "Sample from tokens at least this fraction as likely as the most likely one; 0 keeps all",
        at_least=0,
        at_most=1,
    )
    repetition_penalty: float = option(
        1.0,
        "Above 1, makes tokens that are already in the prompt or the text less likely; 1 is off",
        at_least=1 / MAX_PENALTY,
        at_most=MAX_PENALTY,
    )
    presence_penalty: float = option(
        0.0,
        "Subtract this from the logits of tokens that are already in the new text; 0 is off",
        at_least=-MAX_PENALTY,
        at_most=MAX_PENALTY,
    )
    frequency_penalty: float = option(
        0.0,
        "Subtract this from a token's logit for each time it is in the new text; 0 is off",
        at_least=-MAX_PENALTY,
        at_most=MAX_PENALTY,
    )
    logit_bias: tuple[tuple[TokenId, Bias], ...] = option(
        (), "Add this bias to a token's logit", metavar="TOKEN_ID=BIAS"
    )
    first_logit_bias: tuple[tuple[TokenId, Bias], ...] = option(
        (),
        "Add this bias to a token's logit for the first new token only, on top of any other bias",
        metavar="TOKEN_ID=BIAS",
    )
    seed: int | None = option(
        None,
        "Random seed: makes sampled text repeatable, whatever else is in the batch",
        at_least=0,
        at_most=2**63 - 1,
        none_means="a new one each time",
    )
    stop: tuple[StopString, ...] = option((), "End the text before this string")
    stop_token_ids: tuple[TokenId, ...] = option(
        (), "End the text at this token", flag="--stop-token-id", metavar="TOKEN_ID"
    )
    ignore_eos: bool = option(False, "Continue after end-of-sequence tokens")
    logprobs: int | None = option(
        None, "List each token's logprob and the N most likely tokens", at_least=0, at_most=100
    )
    require_certified: bool = option(
        False,
        "End the text before a token that is not proven to be what the base's full logits would give; "
        "matters only for a base behind an API",
    )

    def __post_init__(self) -> None:
        check(self)
        _require(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens is {self.min_new_tokens}, and must be at most max_new_tokens "
            f"({self.max_new_tokens})",
        )
        for name in ("logit_bias", "first_logit_bias"):
            bias = getattr(self, name)
            _require(len(dict(bias)) == len(bias), f"{name} names a token id twice")
        if self.temperature == 0:
            for name in FILTERS:
                value, off = getattr(self, name), options_of(SamplingParams)[name].default
                _require(
                    value == off,
                    f"{name} is {value} and temperature is 0: greedy decoding always takes the most likely "
                    f"token, so {name} would do nothing.\nhint: set temperature above 0 to sample, or leave "
                    f"{name} out",
                )

    @property
    def has_filters(self) -> bool:
        """Whether a draw is from some of the tokens only."""
        off = options_of(SamplingParams)
        return any(getattr(self, name) != off[name].default for name in FILTERS)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


@dataclass(frozen=True, slots=True)
class Steering:
    """Which experts steer, how strongly and by which rule, as a caller asks for it.

    `Recipe.strengths` and `Recipe.policy_for` resolve it.

    Args:
        alpha: Strength of every expert; None takes each expert's own from the recipe.
        experts: A name, names, or names with strengths; None takes the recipe's default.
        policy: How strongly to steer at each token: a policy's name, or an object as the `steering` of a
            recipe. It replaces the recipe's `steering` as a whole; None takes that.
        combine: How several experts steer: one of `policy.COMBINATIONS`; None takes the recipe's.

    Raises:
        InvalidRequest: A strength is not a finite number or is given twice, `experts` is empty or names an
            expert twice, or a policy cannot be used.
    """

    alpha: float | None = None
    experts: Experts | None = None
    policy: PolicySettings | None = None
    combine: str | None = None

    def __post_init__(self) -> None:
        self.policy_over(Policy())  # checks it
        if self.alpha is not None:
            check_alpha(self.alpha)
        if isinstance(self.experts, Mapping | tuple):
            kind = "tuple" if isinstance(self.experts, tuple) else "mapping"
            why = f"experts is an empty {kind}; leave it out for the recipe's default"
            _require(bool(self.experts), why)
        if isinstance(self.experts, Mapping):
            for name, alpha in self.experts.items():
                check_alpha(alpha, f"alpha of expert {name!r}")
            _require(
                self.alpha is None,
                "alpha and experts with their own alphas were both given, so the strength is given twice.\n"
                "hint: leave alpha out, or name the experts without alphas",
            )
        elif isinstance(self.experts, tuple):
            _require(
                len(set(self.experts)) == len(self.experts),
                f"experts names one expert twice: {', '.join(self.experts)}",
            )

    def over(self, default: Steering) -> Steering:
        """Return this steering, with what it leaves open taken from `default`.

        Strengths of experts that `self` names replace the default's alpha, and an alpha of `self` replaces
        the strengths of experts that only `default` names.
        """
        alpha, experts = self.alpha, self.experts
        if experts is None:
            experts = default.experts
            if alpha is not None and isinstance(experts, Mapping):
                experts = tuple(experts)
        if alpha is None and not isinstance(experts, Mapping):
            alpha = default.alpha
        policy = default.policy if self.policy is None else self.policy
        combine = default.combine if self.combine is None else self.combine
        return Steering(alpha, experts, policy, combine)

    def policy_over(self, own: Policy) -> Policy:
        """Return the policy that is asked for, with what is left open taken from `own`.

        Raises:
            InvalidRequest: What is asked for does not go together with what is left open.
        """
        return own.changed(self.policy, self.combine)

    def as_options(self) -> dict[str, Any]:
        """Return it as the keywords that `Request`, and the methods that take a prompt, have for it."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation is rendered; the names are those of `apply_chat_template` in transformers.

    Args:
        add_generation_prompt: Begin the assistant's turn after the last message; None does so unless the
            last message is continued.
        continue_final_message: Continue the last message instead of beginning a turn after it.
        template_kwargs: Further variables of chat templates, such as `{"enable_thinking": False}`. A template
            that does not know a variable ignores it.

    Raises:
        InvalidRequest: Two options exclude each other, or a variable has a name that templates use already.
    """

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("add_generation_prompt", "continue_final_message"):
            value = getattr(self, name)
            _require(
                isinstance(value, bool) or (value is None and name == "add_generation_prompt"),
                f"{name} is {value!r}, and must be true or false",
            )
        _require(
            not (self.add_generation_prompt and self.continue_final_message),
            "add_generation_prompt begins a turn and continue_final_message continues one, so only one of "
            "them can be true",
        )
        _require(
            isinstance(self.template_kwargs, Mapping)
            and all(isinstance(name, str) for name in self.template_kwargs),
            "template_kwargs must be an object of variables by name",
        )
        for name in TEMPLATE_NAMES & set(self.template_kwargs):
            _require(False, f"template_kwargs has {name!r}, which templates get from the request")

    @property
    def begins_turn(self) -> bool:
        """Whether the assistant's turn begins after the last message."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with everything that decides its result.

    Args:
        prompt: Text, a conversation (`[{"role": …, "content": …}]`), or token ids. Text and conversations
            are rendered for each model as the recipe says; token ids go to every model as they are.
        sampling: How tokens are chosen.
        alpha: Strength of every expert; None takes each expert's own from the recipe.
        experts: A name, names, or names with strengths; None takes the recipe's default.
        explain: Record in each step what base, expert, anti-expert and steered model gave.
        explain_top: Number of likeliest tokens of each model to record, 0 to 1,000.
        chat: How a conversation is rendered.
        policy: How strongly to steer at each token, as in `Steering`; None takes the recipe's.
        combine: How several experts steer, as in `Steering`; None takes the recipe's.

    Raises:
        InvalidRequest: The prompt is empty or of no known kind, options of a conversation are given for
            another prompt, a strength is not a finite number or is given twice, or a policy cannot be used.
    """

    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    alpha: float | None = None
    experts: Experts | None = None
    explain: bool = False
    explain_top: int = 5
    chat: ChatOptions = field(default_factory=ChatOptions)
    policy: PolicySettings | None = None
    combine: str | None = None

    def __post_init__(self) -> None:
        _ = self.steering  # checks it
        _require(
            _is_count(self.explain_top) and 0 <= self.explain_top <= MAX_EXPLAIN_TOP,
            f"explain_top is {self.explain_top!r}, and must be a whole number from 0 to {MAX_EXPLAIN_TOP}",
        )
        _require(
            isinstance(self.prompt, Sequence) and not isinstance(self.prompt, bytes),
            f"prompt is {type(self.prompt).__name__}, and must be text, a list of messages, or token ids",
        )
        _require(
            len(self.prompt) > 0,
            "the prompt is empty, so there is nothing to continue.\nhint: give at least one token of text",
        )
        _require(
            self.is_chat or self.chat == ChatOptions(),
            "the prompt is not a conversation, and options of a conversation are given.\n"
            "hint: give messages, or leave the options out",
        )
        if isinstance(self.prompt, str):
            return
        if all(_is_count(item) for item in self.prompt):
            _require(
                all(isinstance(item, int) and item >= 0 for item in self.prompt),
                "the prompt has a negative token id",
            )
            return
        for position, message in enumerate(self.prompt):
            _require(
                isinstance(message, Mapping)
                and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str),
                f'message {position} is {message!r}, and must be {{"role": text, "content": text}}',
            )
        _require(
            any(isinstance(m, Mapping) and m["content"] for m in self.prompt),
            "every message of the prompt is empty, so there is nothing to answer",
        )

    @property
    def steering(self) -> Steering:
        """Which experts steer, how strongly and by which rule."""
        return Steering(self.alpha, self.experts, self.policy, self.combine)

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a conversation."""
        return not isinstance(self.prompt, str) and isinstance(self.prompt[0], Mapping)

    @property
    def is_token_ids(self) -> bool:
        """Whether the prompt is given as token ids."""
        return not isinstance(self.prompt, str) and isinstance(self.prompt[0], int)
