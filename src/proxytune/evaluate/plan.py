"""The plan of an evaluation: what is compared, on which samples, with which settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from proxytune.errors import InvalidRequest
from proxytune.request import (
    BATCH_SIZES,
    DEFAULT_BATCH_SIZE,
    NO_DRAFTS,
    SPECULATIVE,
    Alpha,
    EngineName,
    SamplingParams,
)
from proxytune.settings import Option, check, declared, option
from proxytune.tasks.task import Item, Rule, Task

if TYPE_CHECKING:  # It brings the client of an API, which the command line's help does not need.
    from proxytune.evaluate.judges import JudgeSettings


DATA_DIR = Option(
    "Directory with the benchmarks' files, a folder for each",
    metavar="DIR",
    none_means="from the Hugging Face Hub",
)
EXPERTS = Option(
    "Steer with this expert; repeat to combine several",
    flag="--expert",
    metavar="NAME",
    none_means="the recipe's",
)
RUN_CODE = Option(
    "Run the programs that models write, each in a process with limited time, memory, files and network; "
    "without it they stay unscored"
)
ALLOW_WEAKER_SANDBOX = Option(
    "Run programs even where this system cannot keep everything that the sandbox promises; without it the "
    "command names what is missing and stops"
)
NO_PROGRAMS = "--allow-weaker-sandbox is for --run-code, which is not given.\nhint: leave it out"


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What is compared, and how; what each option does and may hold stands beside it.

    Args:
        judge: Whom to ask about open answers; None leaves them unscored.
        dtype: The models' dtype, where it is not the recipe's.
        device: The models' device, where it is not the recipe's.
        exact: Whether the models are loaded with `exact`.
        engine: What runs the models. A run is continued only in the same one.

    Raises:
        InvalidRequest: A value cannot be used, two exclude each other, or the engine cannot honour one.
    """

    tasks: tuple[str, ...] = field(
        metadata=declared(
            "Benchmarks: gsm8k, truthfulqa_mc, truthfulqa_open, toxigen, alpaca_eval, humaneval, ds1000, "
            "triviaqa, realtimeqa; or any task of lm-eval",
            separator=",",
            metavar="A,B,...",
        )
    )
    data_dir: Path | None = option(None, DATA_DIR)
    limit: int | None = option(
        None, "Maximum number of items of each benchmark", at_least=1, none_means="all"
    )
    alphas: tuple[Alpha, ...] = option(
        (1.0,), "Strengths of the steered base", separator=",", metavar="A,B,..."
    )
    experts: tuple[str, ...] | None = option(None, EXPERTS)
    rule: Rule = option(
        "paper",
        "Scoring rule: paper scores exactly as published, numeric by what is right; samples record both",
        metavar="NAME",
    )
    tuned: str | None = option(
        None, "Compare with this directly tuned model, and show the gap closed", metavar="MODEL"
    )
    tuned_adapter: str | None = option(
        None, "Compare with this LoRA adapter on the base", metavar="ADAPTER"
    )
    tuned_prompt: str | None = option(
        None,
        "Prompt format of the tuned model: plain, chat, or a Jinja template",
        metavar="FORMAT",
        none_means="the expert's",
    )
    nudge_below: float | None = option(
        None,
        "Compare with nudging: the expert chooses the token wherever the base's most likely token has "
        "less than this probability; its authors used 0.4",
        above=0,
        at_most=1,
        metavar="P",
    )
    batch_size: int | None = option(
        None,
        "Number of answers that are generated together",
        at_least=1,
        none_means=DEFAULT_BATCH_SIZE,
    )
    num_samples: int | None = option(
        None,
        "Number of answers to each item of a benchmark that samples several",
        at_least=1,
        none_means="as published",
    )
    max_new_tokens: int | None = option(
        None,
        "Cut answers here where the published limit is higher; the report says so",
        at_least=1,
        none_means="as published",
    )
    seed: int = option(0, "Random seed of sampled answers")
    run_code: bool = option(False, RUN_CODE)
    allow_weaker_sandbox: bool = option(False, ALLOW_WEAKER_SANDBOX)
    judge: JudgeSettings | None = None
    toxicity_model: str | None = option(
        None,
        "Classifier of toxic text, such as tomh/toxigen_roberta; without it, ToxiGen stays unscored",
        metavar="MODEL",
    )
    dtype: str | None = None
    device: str | None = None
    exact: bool = False
    speculative: bool = option(False, SPECULATIVE)
    engine: EngineName = "local"

    def __post_init__(self) -> None:
        check(self)
        if self.engine == "vllm":
            self._check_vllm()
        if not self.tasks:
            from proxytune.tasks.registry import TASKS

            raise InvalidRequest(f"no benchmark is named.\nhint: some of {', '.join(TASKS)}")
        if len(set(self.tasks)) < len(self.tasks):
            raise InvalidRequest("a benchmark is named twice.\nhint: name each once")
        if self.tuned is not None and self.tuned_adapter is not None:
            raise InvalidRequest(
                "a tuned model and an adapter on the base are both given, and only one can be compared.\n"
                "hint: leave one of them out"
            )
        if self.allow_weaker_sandbox and not self.run_code:
            raise InvalidRequest(NO_PROGRAMS)
        if self.tuned_prompt is not None and self.tuned is None and self.tuned_adapter is None:
            raise InvalidRequest("tuned_prompt is given without a tuned model.\nhint: leave it out")

    def _check_vllm(self) -> None:
        """Refuse what an evaluation in vLLM cannot do, before anything is read."""
        from proxytune.tasks.registry import TASKS

        if self.speculative:
            raise InvalidRequest(NO_DRAFTS)
        if self.nudge_below is not None:
            raise InvalidRequest(
                "--nudge-below leaves out the anti-expert, and --engine vllm runs the recipe as it is.\n"
                "hint: leave one of them out"
            )
        if self.tuned_adapter is not None:
            raise InvalidRequest(
                "--tuned-adapter is for models that run here: in vLLM the base would be loaded twice.\n"
                "hint: merge the adapter into a copy of the base, and name that with --tuned"
            )
        for name in self.tasks:
            if name not in TASKS:
                raise InvalidRequest(
                    f"{name} is not a benchmark of this package, and tasks of lm-eval do not go through "
                    "--engine vllm.\n"
                    "hint: lm-eval's own engine runs the recipe: lm_eval --model vllm --model_args "
                    f"pretrained=RECIPE --tasks {name}; the benchmarks here are {', '.join(TASKS)}"
                )
            if TASKS[name].banned_first:
                raise InvalidRequest(
                    f"answers to {name} must not begin with {TASKS[name].banned_first[0]!r}, and vLLM has no "
                    "bias for the first token alone.\nhint: leave --engine vllm out for this benchmark"
                )

    @property
    def num_together(self) -> int:
        """Number of answers that are generated and written together."""
        return self.batch_size or BATCH_SIZES[self.engine]

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
        from proxytune.tasks.registry import TASKS

        task = TASKS[name]
        items = task.items(options.data_dir)[: options.limit]
        sampling = task.sampling
        if options.max_new_tokens is not None and options.max_new_tokens < sampling.max_new_tokens:
            sampling = replace(sampling, max_new_tokens=options.max_new_tokens)
        num_samples = 1 if sampling.is_greedy else options.num_samples or task.num_samples
        return cls(task, items, sampling, num_samples)

    def samples(self, seed: int) -> Iterator[tuple[Item, int, SamplingParams]]:
        """Yield every sample's item, number and settings; each sampled answer has a seed of its own."""
        from proxytune.data.lines import line_seed

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
