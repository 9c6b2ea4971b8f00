"""What a caller asks for: `Request`, `Steering` and `SamplingParams`, frozen and checked when built.

A request says what to generate and how, never on which device or in which batch. Whether the recipe has
the experts it names is checked where a recipe resolves them (`Recipe.strengths`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from proxytune.errors import InvalidRequest

Experts = str | tuple[str, ...] | Mapping[str, float]
"""Which experts steer: one name, several, or names with a strength for each."""


class Message(TypedDict):
    """One turn of a conversation, in the chat format of the OpenAI API."""

    role: str
    content: str


Prompt = str | Sequence[Message] | Sequence[int]
"""Text, a conversation, or token ids of the base's vocabulary."""


MAX_ALPHA = 1e4
"""Beyond it, offsets of ordinary size would leave float32 no digits of the base."""


def check_alpha(alpha: float, name: str = "alpha") -> float:
    """Return `alpha` as a float.

    Raises:
        InvalidRequest: It is not a finite number, or larger than `MAX_ALPHA` either way.
    """
    if not _is_number(alpha) or abs(alpha) > MAX_ALPHA:
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


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # A whole number beyond every float.
        return False


MIN_TEMPERATURE = 1e-4
"""Below it, logits divided by the temperature would leave float32; the draw has long become greedy."""
MAX_TEMPERATURE = 1e4
"""All tokens are about equally likely long before; infinity in float32 would make logits of -inf NaN."""
MAX_EXPLAIN_TOP = 1000
"""Each token of an explained text would carry as many for each model."""
MAX_PENALTY = 1e4
"""Beyond it, penalised logits would lose their digits in float32 and then leave it."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop. The default is greedy decoding.

    Args:
        max_new_tokens: Most tokens to generate, at least 1.
        min_new_tokens: Tokens before an end-of-sequence token or a stop string may end the text.
        temperature: 0 takes the most likely token; from 1e-4 to 1e4 it samples, with logits divided by it.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        min_p: Keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repetition_penalty: Divide positive and multiply negative logits of tokens already in prompt or
            output (Keskar et al. 2019, arXiv:1909.05858, section 4.1); 1 is off.
        presence_penalty: Subtracted from the logits of tokens already in the output.
        frequency_penalty: Subtracted once per occurrence in the output.
        logit_bias: Token ids of the base's vocabulary, and what is added to their logits.
        first_logit_bias: The same for the first new token alone, added to the other.
        seed: Makes a sampled result repeatable, whatever else is in the batch. None draws one.
        stop: Strings that end the text; the text is cut before them.
        stop_token_ids: Token ids of the base's vocabulary that end the text, beside the models' own.
        ignore_eos: Go on after end-of-sequence tokens until `max_new_tokens`.
        logprobs: How many most likely tokens each step lists, 0 to 100; None lists none.
        require_certified: End the text before a token that is not proved to be what the base's full logits
            would give. Only a base behind an API hides any.

    Raises:
        InvalidRequest: A value is out of range, or two of them contradict each other.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    first_logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    require_certified: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "min_new_tokens", "top_k"):
            value = getattr(self, name)
            _require(_is_count(value), f"{name} is {value!r}, and must be a whole number")
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            value = getattr(self, name)
            _require(_is_number(value), f"{name} is {value!r}, and must be a finite number")
        _require(
            self.max_new_tokens >= 1,
            f"max_new_tokens is {self.max_new_tokens}, and must be at least 1",
        )
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens is {self.min_new_tokens}, and must lie between 0 and "
            f"max_new_tokens ({self.max_new_tokens})",
        )
        _require(
            self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
            f"temperature is {self.temperature}, and must be 0 (greedy) or lie between {MIN_TEMPERATURE} "
            f"and {MAX_TEMPERATURE:g}",
        )
        _require(
            self.top_k >= 0, f"top_k is {self.top_k}, and must be at least 0 (0 keeps all tokens)"
        )
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}, and must lie in (0, 1]")
        _require(0 <= self.min_p <= 1, f"min_p is {self.min_p}, and must lie in [0, 1]")
        _require(
            1 / MAX_PENALTY <= self.repetition_penalty <= MAX_PENALTY,
            f"repetition_penalty is {self.repetition_penalty}, and must be above 0 (1 is off), from "
            f"{1 / MAX_PENALTY} to {MAX_PENALTY:g}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(
                abs(value) <= MAX_PENALTY,
                f"{name} is {value}, and must lie between {-MAX_PENALTY:g} and {MAX_PENALTY:g}",
            )
        _require(
            self.logprobs is None or (_is_count(self.logprobs) and 0 <= self.logprobs <= 100),
            f"logprobs is {self.logprobs!r}, and must be a whole number from 0 to 100, or None",
        )
        _require(
            self.seed is None or (_is_count(self.seed) and 0 <= self.seed < 2**63),
            f"seed is {self.seed!r}, and must be a whole number from 0 to 2**63 - 1, or None",
        )
        _require(
            isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
            f"stop is {self.stop!r}, and must be a tuple of strings that are not empty",
        )
        _require(
            isinstance(self.stop_token_ids, tuple)
            and all(_is_count(i) and i >= 0 for i in self.stop_token_ids),
            f"stop_token_ids is {self.stop_token_ids!r}, and must be a tuple of token ids",
        )
        for name in ("logit_bias", "first_logit_bias"):
            bias = getattr(self, name)
            _require(
                isinstance(bias, tuple)
                and all(
                    isinstance(pair, tuple)
                    and len(pair) == 2
                    and _is_count(pair[0])
                    and pair[0] >= 0
                    and _is_number(pair[1])
                    and abs(pair[1]) <= MAX_PENALTY
                    for pair in bias
                ),
                f"{name} is {bias!r}, and must be a tuple of token ids and numbers from "
                f"-{MAX_PENALTY:g} to {MAX_PENALTY:g}",
            )
            _require(
                len({token_id for token_id, _ in bias}) == len(bias),
                f"{name} names a token id twice",
            )
        if self.temperature == 0:
            for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
                value = getattr(self, name)
                _require(
                    value == off,
                    f"{name} is {value} and temperature is 0: greedy decoding always takes the most likely "
                    f"token, so {name} would do nothing.\nhint: set temperature above 0 to sample, or leave "
                    f"{name} out",
                )

    @property
    def has_filters(self) -> bool:
        """Whether a draw is from some of the tokens only."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

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
    """Which experts steer and how strongly, as a caller asks for it. `Recipe.strengths` resolves it.

    Args:
        alpha: Strength of every expert; None takes each expert's own from the recipe.
        experts: A name, names, or names with strengths; None takes the recipe's default.

    Raises:
        InvalidRequest: A strength is not a finite number or is given twice, or `experts` is empty or
            names an expert twice.
    """

    alpha: float | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_alpha(self.alpha)
        if isinstance(self.experts, Mapping):
            for name, alpha in self.experts.items():
                check_alpha(alpha, f"alpha of expert {name!r}")
            _require(
                bool(self.experts),
                "experts is an empty mapping; leave it out for the recipe's default",
            )
            _require(
                self.alpha is None,
                "alpha and experts with their own alphas were both given, so the strength is given twice.\n"
                "hint: leave alpha out, or name the experts without alphas",
            )
        elif isinstance(self.experts, tuple):
            _require(
                bool(self.experts),
                "experts is an empty tuple; leave it out for the recipe's default",
            )
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
        return Steering(alpha, experts)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with everything that decides its result.

    Args:
        prompt: Text, a conversation (`[{"role": …, "content": …}]`), or token ids. Text and conversations
            are rendered for each model in its own format; token ids go to every model as they are.
        sampling: How tokens are chosen.
        alpha: Strength of steering for this request; None takes each expert's own from the recipe.
            With several experts it is given to each that does not bring its own.
        experts: None for the recipe's default, a name, or names with their own alphas.
        explain: Record in each step what base, expert, anti-expert and steered model gave.
        explain_top: How many of each one's likeliest tokens to record, 0 to 1,000.

    Raises:
        InvalidRequest: The prompt is empty or of no known kind, or an alpha is not finite.
    """

    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    alpha: float | None = None
    experts: Experts | None = None
    explain: bool = False
    explain_top: int = 5

    def __post_init__(self) -> None:
        Steering(self.alpha, self.experts)  # checks them
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
        """Which experts steer, and how strongly."""
        return Steering(self.alpha, self.experts)

    @property
    def is_token_ids(self) -> bool:
        """Whether the prompt is given as token ids."""
        return not isinstance(self.prompt, str) and isinstance(self.prompt[0], int)
