"""Predictors: the ways to answer a benchmark, and the models that each needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from proxytune.errors import InvalidRequest
from proxytune.evaluate.plan import EvalOptions
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import MAX_PENALTY, Request, SamplingParams
from proxytune.tasks.task import Item, Task
from proxytune.text.prompts import continuation_ids

if TYPE_CHECKING:
    from proxytune.model import ProxyTuned

Role = Literal["base", "expert", "steered", "tuned", "nudged"]


class Output(NamedTuple):
    """A model's answer."""

    text: str
    num_new_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Predictor:
    """A way to answer.

    Args:
        name: Its name in tables and files.
        role: The kind of predictor.
        alpha: Strength, for a steered base.
        expert: The expert that answers alone, or that nudges.
    """

    name: str
    role: Role
    alpha: float | None = None
    expert: str | None = None


def predictors_of(recipe: Recipe, options: EvalOptions) -> list[Predictor]:
    """Return the predictors to compare, the base first.

    Raises:
        UnknownExpert: The recipe does not have a named expert.
        InvalidRequest: Nudging is asked for with several experts.
    """
    names = recipe.named(options.experts)
    found = [Predictor("base", "base", alpha=0.0)]
    for name in names:
        label = "expert" if len(names) == 1 else f"expert {name}"
        found.append(Predictor(label, "expert", expert=name))
    for alpha in dict.fromkeys(options.alphas):
        if alpha != 0:
            found.append(Predictor(f"steered {alpha:g}", "steered", alpha=alpha))
    if options.has_tuned:
        found.append(Predictor("tuned", "tuned"))
    if options.nudge_below is not None:
        if len(names) > 1:
            raise InvalidRequest(
                f"only one expert can nudge, and {len(names)} are chosen.\nhint: name one with --expert"
            )
        found.append(Predictor(f"nudged {options.nudge_below:g}", "nudged", expert=names[0]))
    return found


def tuned_recipe(recipe: Recipe, options: EvalOptions) -> Recipe:
    """Return a recipe whose only expert is the directly tuned model; `Speaker` runs that one alone."""
    first = recipe.experts[0]
    if options.experts:
        first = next(e for e in recipe.experts if e.name == options.experts[0])
    prompt = options.tuned_prompt or first.expert.prompt
    same = ModelSpec(same_as="base")
    if options.tuned_adapter is not None:
        base = recipe.base
        spec = replace(base, adapter=options.tuned_adapter, prompt=prompt, chat=first.expert.chat)
    else:
        spec = ModelSpec(model=options.tuned, dtype=recipe.base.dtype, device=recipe.base.device)
        # It is both base and expert of this recipe: one model, loaded once.
        base = spec = replace(spec, prompt=prompt, chat=first.expert.chat)
    experts = (ExpertSpec("tuned", spec, same),)
    return replace(recipe, base=base, experts=experts, default_expert=None)


def nudged(model: ProxyTuned, expert: str, threshold: float) -> ProxyTuned:
    """Return the base nudged by an expert, whatever the recipe's policy; the anti-expert does not run.

    `threshold` is the base's top probability below which the expert nudges it; see `policy.py`.

    Raises:
        InvalidRequest: The threshold is out of range.
    """
    from proxytune.model import ProxyTuned
    from proxytune.policy import Policy

    found = next(pair for pair in model.ensemble.pairs if pair.name == expert)
    ensemble = replace(
        model.ensemble,
        pairs=(replace(found, anti_expert=0),),
        policy=Policy(name="nudge", threshold=threshold),
    )
    return ProxyTuned(ensemble, model.formats, model.recipe)


class Speaker:
    """A predictor with its models loaded."""

    def __init__(self, predictor: Predictor, model: ProxyTuned, options: EvalOptions) -> None:
        self._options = options
        self.alpha = 0.0
        self.experts = options.experts
        if predictor.role == "tuned":
            self.experts = None
            (pair,) = model.ensemble.pairs
            model = model.alone(pair.expert)
        elif predictor.role == "expert":
            pair = next(p for p in model.ensemble.pairs if p.name == predictor.expert)
            model = model.alone(pair.expert)
        elif predictor.role == "steered":
            assert predictor.alpha is not None
            self.alpha = predictor.alpha
        elif predictor.role == "nudged":
            assert predictor.expert is not None and options.nudge_below is not None
            model = nudged(model, predictor.expert, options.nudge_below)
            self.alpha, self.experts = 1.0, (predictor.expert,)
        self.model = model

    def bias(self, banned: Sequence[str]) -> tuple[tuple[int, float], ...]:
        """Return a logit bias that bans those texts that are a single token, with or without a space."""
        tokenizer = self.model.tokenizer
        found: dict[int, float] = {}
        for text in banned:
            for form in (text, f" {text}"):
                token_ids = tokenizer.encode(form, add_special_tokens=False)
                if len(token_ids) == 1:
                    found[token_ids[0]] = -MAX_PENALTY
        return tuple(sorted(found.items()))

    def requests(
        self, task: Task, samples: Sequence[tuple[Item, int, SamplingParams]]
    ) -> list[Request]:
        """Return a request for each sample, with the texts banned that the task bans."""
        bias, first = self.bias(task.banned), self.bias(task.banned_first)
        requests = []
        for item, _, sampling in samples:
            sampling = replace(sampling, logit_bias=bias, first_logit_bias=first)
            requests.append(Request(item.prompt, sampling, self.alpha, self.experts))
        return requests

    def check(self, requests: Sequence[Request]) -> None:
        """Check that every prompt fits the models.

        Raises:
            UserError: A prompt does not fit.
        """
        for request in requests:
            self.model.job(request)

    def answer(self, items: Sequence[Item], requests: Sequence[Request]) -> list[Output]:
        """Answer items in one batch.

        Raises:
            BackendError: A model failed.
        """
        if items[0].options:
            return [self._likeliest(item) for item in items]
        traces = self.model.generate_batch(
            requests, batch_size=len(requests), speculative=self._options.speculative
        )
        return [Output(t.text, t.num_new_tokens, t.finish_reason) for t in traces]

    def _likeliest(self, item: Item) -> Output:
        options = item.options
        first = {tuple(continuation_ids(option, self.model.tokenizer)[:1]) for option in options}
        if len(first) < len(options):
            # If the space is a token of its own, only the letters after it differ.
            options = tuple(option.strip() for option in options)
        index = self.model.choose(
            item.prompt, options, alpha=self.alpha, experts=self.experts
        ).index
        return Output(item.options[index], 1, "length")


def file_name(predictor: str) -> str:
    """Return a predictor's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", predictor)
