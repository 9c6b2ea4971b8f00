"""The plan of an evaluation: what is compared, on which samples, with which settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from proxytune.data.lines import line_seed
from proxytune.errors import InvalidRequest
from proxytune.evaluate.judges import JudgeSettings
from proxytune.request import SamplingParams, check_alpha
from proxytune.tasks.registry import TASKS
from proxytune.tasks.task import RULES, Item, Rule, Task


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What is compared, and how.

    Args:
        tasks: Names of benchmarks, or of tasks of lm-eval.
        data_dir: Where their files are; None for the Hub.
        limit: Most items of each; None for all.
        alphas: Strengths of the steered base.
        experts: Which experts steer; None for the recipe's default.
        rule: By which the tables score; samples carry both scores.
        tuned: A directly tuned model, by reference; None for none.
        tuned_adapter: An adapter on the base, in its place; None for none.
        tuned_prompt: The prompt format of the tuned model; None for the expert's.
        nudge_below: The threshold of nudging (the policy `nudge` of `logits/policy.py`); None leaves it out.
        batch_size: Answers generated together.
        num_samples: Answers to each item of a benchmark that draws them; None for the published number.
        max_new_tokens: Most tokens of an answer, where the published number is larger; None for that.
        seed: Of drawn answers.
        run_code: Run generated programs.
        judge: Whom to ask about open answers; None leaves them unscored.
        toxicity_model: A classifier of toxic text; None leaves ToxiGen unscored.
        dtype: Of the models, where it is not the recipe's.
        device: Likewise.
        speculative: Draft tokens.

    Raises:
        InvalidRequest: A value cannot be used, or two exclude each other.
    """

    tasks: tuple[str, ...]
    data_dir: Path | None = None
    limit: int | None = None
    alphas: tuple[float, ...] = (1.0,)
    experts: tuple[str, ...] | None = None
    rule: Rule = "paper"
    tuned: str | None = None
    tuned_adapter: str | None = None
    tuned_prompt: str | None = None
    nudge_below: float | None = None
    batch_size: int = 8
    num_samples: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    run_code: bool = False
    judge: JudgeSettings | None = None
    toxicity_model: str | None = None
    dtype: str | None = None
    device: str | None = None
    speculative: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InvalidRequest(f"no benchmark is named.\nhint: some of {', '.join(TASKS)}")
        if len(set(self.tasks)) < len(self.tasks):
            raise InvalidRequest("a benchmark is named twice.\nhint: name each once")
        for name in ("limit", "batch_size", "num_samples", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"{name} is {value}, and must be at least 1")
        for alpha in self.alphas:
            check_alpha(alpha)
        if self.rule not in RULES:
            raise InvalidRequest(f"rule is {self.rule!r}, and must be one of {', '.join(RULES)}")
        if self.tuned is not None and self.tuned_adapter is not None:
            raise InvalidRequest(
                "a tuned model and an adapter on the base are both given, and only one can be compared.\n"
                "hint: leave one of them out"
            )
        if self.tuned_prompt is not None and self.tuned is None and self.tuned_adapter is None:
            raise InvalidRequest("tuned_prompt is given and no tuned model.\nhint: leave it out")
        if self.nudge_below is not None and not 0 < self.nudge_below <= 1:
            raise InvalidRequest(
                f"nudge_below is {self.nudge_below:g}, and must be a probability above 0"
            )

    @property
    def has_tuned(self) -> bool:
        """Whether a directly tuned model is compared."""
        return self.tuned is not None or self.tuned_adapter is not None


@dataclass(frozen=True, slots=True)
class Work:
    """One benchmark with its items and settings."""

    task: Task
    items: list[Item]
    sampling: SamplingParams
    num_samples: int

    @classmethod
    def prepare(cls, name: str, options: EvalOptions) -> Work:
        """Read a benchmark.

        Raises:
            InputFileError: Its data is missing or malformed.
        """
        task = TASKS[name]
        items = task.items(options.data_dir)[: options.limit]
        sampling = task.sampling
        if options.max_new_tokens is not None and options.max_new_tokens < sampling.max_new_tokens:
            sampling = replace(sampling, max_new_tokens=options.max_new_tokens)
        num_samples = 1 if sampling.is_greedy else options.num_samples or task.num_samples
        return cls(task, items, sampling, num_samples)

    def samples(self, seed: int) -> Iterator[tuple[Item, int, SamplingParams]]:
        """Yield every sample's item, number and settings; each sampled answer has a seed of its own."""
        number = 0
        for item in self.items:
            for which in range(self.num_samples):
                number += 1
                sampling = self.sampling
                if not sampling.is_greedy:
                    sampling = replace(sampling, seed=line_seed(seed, number))
                yield item, which, sampling

    def deviations(self) -> list[str]:
        """Return where the settings differ from the published ones, one note each."""
        found = []
        if self.sampling.max_new_tokens != self.task.sampling.max_new_tokens:
            found.append(
                f"at most {self.sampling.max_new_tokens} new tokens, published "
                f"{self.task.sampling.max_new_tokens}"
            )
        if self.num_samples != self.task.num_samples:
            found.append(f"{self.num_samples} samples per item, published {self.task.num_samples}")
        return found
