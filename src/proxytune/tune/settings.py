"""What a tuning run is asked for, and what it returns."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from proxytune.checkpoints.references import is_url
from proxytune.errors import InvalidRequest, ProxytuneError
from proxytune.settings import check, declared, option
from proxytune.tune.rewards import parse_reward

LOSS_LOG = "log.jsonl"
"""Name of the file with a run's losses, in `TuneSettings.training`; of the only or the main training."""


class Interrupted(ProxytuneError):
    """The user stopped the run; its state is in the last checkpoint."""


class Display:
    """Shows a run's progress; this one shows nothing."""

    def say(self, text: str) -> None:
        """Show a message."""

    def stage(self, name: str, done: float, total: float, **numbers: float | None) -> None:
        """Show how far a stage has progressed, with numbers such as the loss."""

    def close(self) -> None:
        """Remove the display."""


def expert_path(settings: TuneSettings) -> str:
    """Return the path of the tuned expert, relative to the output directory."""
    return "expert" if settings.full else f"adapters/{settings.expert_name}"


def stage_path(name: str, stage: str) -> str:
    """Return the name of a file or directory of one of a run's trainings: of `log.jsonl`, `log-cpt.jsonl`."""
    path = Path(name)
    return f"{path.stem}-{stage}{path.suffix}" if stage else name


def anti_expert_path(settings: TuneSettings) -> str:
    """Return the path of a calibrated anti-expert's adapter, relative to the output directory."""
    return f"adapters/{settings.expert_name}-anti-expert"


STAGES = ("", "cpt", "anti-expert")
"""The trainings that a run may have; the main one has no name."""

Method = Literal["sft", "dpo", "cpt", "grpo"]
ALPHAS = tuple(round(0.1 * i, 1) for i in range(1, 16))
"""Strengths tried on validation rows."""

Form = Literal["steered", "paper"]
Fit = Literal["none", "weights", "bias"]


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What a run is asked for; what each field does and may hold stands beside it.

    Raises:
        InvalidRequest: A setting cannot be used, or two contradict each other.
    """

    data: str = field(
        metadata=declared(
            "Training rows: JSON lines, JSON or text, also as .gz; a data set saved by `datasets`; "
            "or a Hub id",
            metavar="FILE",
        )
    )
    output: str = field(metadata=declared("Directory to write the recipe to", metavar="DIR"))
    anti_expert: str | None = option(
        None, "The small model to start from; without it, the base itself is tuned", metavar="MODEL"
    )
    base: str | None = option(
        None,
        "The large model that the expert is to steer; without it, the recipe holds the small model alone",
        metavar="MODEL",
    )
    base_name: str | None = option(
        None,
        "Name of the base on an API, if --base is its address",
        metavar="NAME",
        none_means="the only model it lists",
    )
    key_env: str | None = option(
        None,
        "Environment variable whose key is sent to the API of the base",
        metavar="VARIABLE",
        none_means="the one bound to that host",
    )
    max_calls: int | None = option(
        None,
        "Maximum number of calls to the API of the base about the rows, and again for measuring",
        at_least=1,
        none_means="no limit",
    )
    method: Method | None = option(
        None,
        "sft trains the small model by itself, cpt through the frozen base and anti-expert, dpo on "
        "preference pairs, grpo by a reward for the model's own answers",
        metavar="NAME",
        none_means="grpo with --reward; dpo for preference pairs; sft with --calibrate, --calibrated or "
        "--then-cpt; cpt with --anti-expert and a --base that runs here and reads the same tokens; otherwise "
        "sft",
    )
    calibrate: bool | None = option(
        None,
        "For sft and dpo: train the anti-expert, too, on what the base would have said at the same "
        "positions, so that steering adds what the base lacks",
        flag="--calibrate/--no-calibrate",
        none_means="for sft with --base and --anti-expert that read the same tokens, unless --full",
    )
    calibrated: str | None = option(
        None,
        "For sft and dpo: use this calibrated anti-expert, an adapter or the recipe that it belongs to, "
        "instead of training one",
        metavar="DIR",
    )
    then_cpt: bool = option(
        False,
        "After a calibrated pair: train its expert on through the frozen base and anti-expert, as cpt "
        "does, for half the steps at half the learning rate, with a dropout of at least 0.1",
    )
    name: str | None = option(
        None,
        "Name of the expert in requests",
        metavar="NAME",
        none_means="the last part of --output",
    )
    valid_data: str | None = option(
        None, "Validation rows", metavar="FILE", none_means="--valid-share of the training rows"
    )
    valid_share: float = option(
        0.05,
        "Share of the rows that is held out for validation, at most 500 of them; 0 for none",
        at_least=0,
        below=1,
    )
    test_data: str | None = option(
        None,
        "Rows for the last word: measured once, at the strength chosen on the validation rows",
        metavar="FILE",
        none_means="--test-share of the training rows",
    )
    test_share: float = option(
        0.1,
        "Share of the rows that is held out for the last word, at most 500 of them; 0 for none",
        at_least=0,
        below=1,
    )
    split: str = option("train", "Split to train on, if the data set has several", metavar="NAME")
    template: str | None = option(
        None,
        "What stands around a question, for every model: plain, chat, or a Jinja template such as "
        "'Question: {{ prompt }}\\nAnswer:'; `generate`, `chat` and `serve` then put it there, too",
        metavar="FORMAT",
        none_means="chosen by the rows and the small model, and reported",
    )
    base_template: str | None = option(
        None,
        "The same for the base",
        metavar="FORMAT",
        none_means="--template",
    )
    start_from: str | None = option(
        None,
        "Adapter of an expert to train on from, instead of a new adapter; its rank and layers are kept",
        metavar="ADAPTER",
    )
    full: bool = option(False, "Train all weights instead of a LoRA adapter")
    lora_rank: int = option(32, "Rank of the LoRA adapter", at_least=1, metavar="R")
    lora_targets: tuple[str, ...] = option(
        (),
        "Names of the linear layers that get an adapter",
        separator=",",
        metavar="A,B,...",
        none_means="all but the head",
    )
    lora_layers: str | None = option(
        None,
        "Layers that get an adapter, by their numbers from 0, such as 4-6; or all",
        choices=("all",),
        pattern=r"^\d{1,4}(-\d{1,4})?$",
        metavar="A-B",
        none_means="all",
    )
    lora_dropout: float = option(
        0.05, "Dropout of the adapter during training; grpo has none", at_least=0, below=1
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate",
        above=0,
        none_means="2e-4 for wide models up to 2e-3 for narrow ones; a tenth of that with --full, and for "
        "dpo; a quarter for grpo",
    )
    epochs: float | None = option(
        None,
        "Passes over the rows",
        above=0,
        metavar="N",
        none_means="3; for fewer than 800 answers as many as make 300 steps, at most 10",
    )
    max_tokens: int | None = option(
        None,
        "Maximum number of tokens to train on, in rows drawn by the seed",
        at_least=1,
        none_means="all",
    )
    max_valid_tokens: int = option(
        32_768, "Maximum number of tokens to evaluate on, in rows drawn by the seed", at_least=1
    )
    max_steps: int | None = option(
        None, "Number of optimizer steps, instead of --epochs", at_least=1
    )
    batch_size: int = option(
        8,
        "Rows per forward pass; for grpo also prompts per step, each with --group-size answers",
        at_least=1,
    )
    accumulate: int = option(1, "Forward passes per optimizer step", at_least=1)
    max_length: int | None = option(
        None,
        "Tokens per row: longer rows are cut, and text is packed to this length",
        at_least=2,
        none_means="1024, or the context if that is shorter",
    )
    eval_every: int | None = option(
        None,
        "Steps between evaluations, each with a checkpoint",
        at_least=1,
        none_means="a tenth of the run, at most 100",
    )
    patience: int | None = option(
        None,
        "Stop after this many evaluations without a lower loss, or for grpo a higher reward; 0 never stops",
        at_least=0,
        metavar="N",
        none_means="3; 0 for a calibrated pair, whose loss falls most as the learning rate falls",
    )
    beta: float | None = option(
        None,
        "How strongly training is kept close to the model that it starts from; for grpo a factor of the "
        "KL divergence, and 0 leaves it out",
        at_least=0,
        none_means="0.1 for dpo; 0.02 for grpo",
    )
    reward: str | None = option(
        None,
        "For grpo: exact (the answer equals the row's), regex:PATTERN (found in the answer; {name} stands "
        "for the row's field), or FILE.py:FUNCTION (of prompt, answer and row, runs the file)",
        metavar="REWARD",
    )
    group_size: int = option(
        8, "For grpo: answers per prompt, whose rewards are compared", at_least=2, metavar="N"
    )
    max_new_tokens: int = option(64, "For grpo: maximum number of tokens of an answer", at_least=1)
    temperature: float = option(1.0, "For grpo: temperature that answers are sampled at", above=0)
    reward_limit_s: float = option(
        10.0, "For grpo: seconds that a call of the reward may take", above=0, metavar="SECONDS"
    )
    alpha: float | None = option(
        None,
        "Strength of the recipe, and the strength that cpt trains at and a calibrated pair is evaluated at",
        above=0,
        none_means="chosen on the validation rows; training takes 1",
    )
    cpt_form: Form = option(
        "steered",
        "For cpt at an alpha other than 1: steered is base + alpha * (expert - anti-expert), as in "
        "decoding; paper is expert + alpha * (base - anti-expert)",
        metavar="NAME",
    )
    offsets_dir: str | None = option(
        None,
        "For cpt and calibration: directory to keep the frozen models' outputs in, for other runs on the "
        "same rows",
        metavar="DIR",
    )
    fit: Fit = option(
        "weights",
        "What is fitted beside the strength, and kept if it wins clearly: weights of base, expert and "
        "anti-expert; bias for these and an output bias; or none. With --alpha, nothing is fitted",
        metavar="NAME",
    )
    measure_tokens: int = option(
        15_000,
        "Measure base, expert and steered base on about this many held-out tokens; 0 measures nothing "
        "and chooses no strength",
        at_least=0,
    )
    gradient_checkpointing: bool = option(
        False, "Save memory and spend time: recompute activations in the backward pass"
    )
    seed: int = option(0, "Random seed", at_least=0)
    device: str | None = option(
        None,
        "Device to train on: cpu, cuda, cuda:1",
        metavar="NAME",
        none_means="CUDA if available",
    )
    dtype: Literal["float32", "bfloat16"] | None = option(
        None,
        "Dtype to train in: float32 or bfloat16",
        metavar="NAME",
        none_means="bfloat16 on a GPU, float32 on the CPU",
    )

    def __post_init__(self) -> None:
        check(self)
        if self.anti_expert is None and self.base is None:
            raise InvalidRequest(
                "neither a small model nor a base is given, so there is nothing to tune.\n"
                "hint: --anti-expert names the small model; --base alone tunes the base itself"
            )
        asked = [n for n in ("calibrate", "calibrated", "then_cpt") if getattr(self, n)]
        if asked and not self.is_pair:
            raise InvalidRequest(
                f"{asked[0]} concerns an anti-expert that is compared with a base, and one of them is "
                "missing.\nhint: give --anti-expert and --base"
            )
        if asked and self.calibrate is False:
            raise InvalidRequest(
                f"{asked[0]} needs a calibrated anti-expert, and calibrate is False.\n"
                "hint: leave --no-calibrate out"
            )
        if self.then_cpt and self.cpt_form != "steered":
            raise InvalidRequest(
                f"cpt_form is {self.cpt_form!r}, and then_cpt keeps the better of two experts by the steered "
                "loss, which the other form does not have.\nhint: leave cpt_form or then_cpt out"
            )
        if self.method == "cpt" and not self.is_pair:
            raise InvalidRequest(
                "method cpt trains the expert through base and anti-expert, and one of them is missing.\n"
                "hint: give --anti-expert and --base"
            )
        if self.is_remote and (self.method == "cpt" or self.then_cpt):
            what = "then_cpt" if self.then_cpt else "method cpt"
            raise InvalidRequest(
                f"the base is {self.base}, and {what} needs the logits of all its tokens, which an API "
                "does not show.\n"
                "hint: --method sft calibrates the anti-expert to what it shows"
            )
        if self.is_remote and self.anti_expert is None:
            raise InvalidRequest(
                f"the base is {self.base}, and an API does not let it be tuned.\n"
                "hint: --anti-expert names a small model to tune"
            )
        if not self.is_remote and (self.base_name or self.max_calls or self.key_env):
            raise InvalidRequest(
                "base_name, key_env and max_calls are about a base behind an API, and base is none.\n"
                "hint: leave them out, or give --base http://..."
            )
        if self.method == "cpt" and self.base_template not in (None, self.template):
            raise InvalidRequest(
                "method cpt adds logits over one sequence of tokens, and base and expert have different "
                "templates.\nhint: leave --base-template out, or use --method sft"
            )

        self._check_reward()
        self._check_fit()

    def _check_reward(self) -> None:
        if self.reward is not None:
            parse_reward(self.reward)
            if self.method not in (None, "grpo"):
                raise InvalidRequest(
                    f"method {self.method} trains on given answers, so it has no use for the reward "
                    f"{self.reward!r}.\nhint: --method grpo trains by reward"
                )
        asked = [n for n in ("calibrate", "calibrated", "then_cpt") if getattr(self, n)]
        if self.is_by_reward and asked:
            raise InvalidRequest(
                f"{asked[0]} concerns an anti-expert that is trained on given answers, and method grpo has "
                f"none.\nhint: leave {asked[0]} out"
            )
        if self.method == "dpo" and self.beta == 0:
            raise InvalidRequest("beta is 0, and must be above 0 for method dpo")
        if self.full and self.is_by_reward:
            raise InvalidRequest(
                "method grpo trains an adapter, and --full trains all weights.\nhint: leave --full out"
            )
        if self.start_from is not None:
            self.check_keeps_adapter("start_from")

    def check_keeps_adapter(self, name: str) -> None:
        """Refuse another shape than that of the adapter that training goes on from.

        Args:
            name: The setting that names the adapter.

        Raises:
            InvalidRequest: A setting asks for one.
        """
        own = ("full", "lora_rank", "lora_targets", "lora_layers")
        # A dataclass has its defaults as attributes.
        given = [each for each in own if getattr(self, each) != getattr(TuneSettings, each)]
        if given:
            raise InvalidRequest(
                f"{given[0]} is {getattr(self, given[0])!r}, and training from {getattr(self, name)} keeps "
                f"that adapter's rank and layers.\nhint: leave {given[0]} or {name} out"
            )

    @property
    def asks_to_calibrate(self) -> bool:
        """Whether a setting asks for a calibrated anti-expert by name."""
        return bool(self.calibrate or self.calibrated or self.then_cpt)

    @property
    def is_by_reward(self) -> bool:
        """Whether the expert is trained by a reward for its own answers."""
        return self.method == "grpo" or self.reward is not None

    def _check_fit(self) -> None:
        """Refuse a bias that would silently not be fitted; the default, weights, goes without saying."""
        why = None
        if not self.is_pair:
            why = "there is no pair of a base and a small model"
        elif self.alpha is not None:
            why = f"alpha is {self.alpha:g}, and a fit replaces the strength"
        elif self.method == "dpo" or self.is_by_reward:
            method = "grpo" if self.is_by_reward else "dpo"
            why = f"method {method} is not judged by the likelihood of rows, which a fit raises"
        elif self.measure_tokens == 0:
            why = "measure_tokens is 0, so nothing would show whether it wins"
        elif self.valid_data is None and self.valid_share == 0:
            why = "valid_share is 0, so nothing would show whether it wins"
        elif self.is_remote:
            why = f"the base {self.base} is behind an API, which does not show the logits of all tokens"
        if self.fit == "bias" and why is not None:
            raise InvalidRequest(f"fit is bias, but {why}.\nhint: leave out one of the two")

    @property
    def directory(self) -> Path:
        """The output directory, absolute."""
        return Path(os.path.abspath(os.path.expanduser(self.output)))

    @property
    def training(self) -> Path:
        """Where the run keeps its own files."""
        return self.directory / "training"

    @property
    def is_pair(self) -> bool:
        """Whether there are a base to steer and a small model to steer it with."""
        return self.anti_expert is not None and self.base is not None

    @property
    def is_remote(self) -> bool:
        """Whether the base is behind an API."""
        return is_url(self.base or "")

    @property
    def small(self) -> str:
        """The model that is tuned."""
        model = self.anti_expert or self.base
        assert model is not None
        return model

    @property
    def expert_name(self) -> str:
        """What requests call the expert."""
        name = self.name or "".join(
            c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in self.directory.name
        ).lstrip("._-")
        return name or "expert"


USED_BY: dict[str, tuple[Method, ...]] = {
    "beta": ("dpo", "grpo"),
    "group_size": ("grpo",),
    "max_new_tokens": ("grpo",),
    "temperature": ("grpo",),
    "reward_limit_s": ("grpo",),
    "cpt_form": ("cpt",),
    "fit": ("sft", "cpt"),
}
"""Settings that only some methods use."""


def check_used(settings: TuneSettings, method: Method) -> None:
    """Refuse settings that the run's method, perhaps chosen by its rows, has no use for.

    Raises:
        InvalidRequest: One of them has another value than its default.
    """
    for name, users in USED_BY.items():
        value = getattr(settings, name)
        # `fit` may be switched off for any method; a dataclass has its defaults as attributes.
        if method not in users and value not in (getattr(TuneSettings, name), "none"):
            raise InvalidRequest(
                f"{name} is {value!r}, and method {method} has no use for it.\n"
                f"hint: leave {name} out, or choose the method: {' or '.join(users)}"
            )


def default_patience(*, is_calibrated: bool) -> int:
    """Return how many evaluations without a lower loss end a training by default; 0 never ends it.

    While the learning rate is high, the steered loss of a pair goes up and down, and most of the gain comes
    as the rate falls: a pair that was stopped halfway through its schedule closed 3 % of the gap to direct
    tuning, and one that was trained to the end 11.5 % (docs/design/0009).
    """
    return 0 if is_calibrated else 3


def default_epochs(examples_per_step: int, num_examples: int, *, are_answers: bool) -> float:
    """Return the default number of passes over the rows.

    Few answers need more than 3 passes: 255 rows of a support desk brought the validation loss of the
    steered base from 3.8 to 1.3 nats in 96 steps, and to 0.3 in 200. Training ends by itself when the loss no
    longer falls; a calibrated pair is trained to the end, and its best state is kept.
    """
    per_epoch = -(-num_examples // examples_per_step)
    return min(10.0, max(3.0, 300 / per_epoch)) if are_answers else 3.0


def default_learning_rate(method: Method, *, full: bool, width: int) -> float:
    """Return the default peak learning rate for a model of this hidden size.

    LoRA commonly uses 2e-4 for models of 7 billion parameters. Narrower models tolerate and need more (2e-3
    worked well at a width of 128). Full weights take a tenth of an adapter's rate, preference pairs a tenth
    of the rate for text, and rewards a quarter.
    """
    rate = min(2e-3, 2e-4 * max(1.0, 2048 / width))
    return rate * (0.1 if full else 1.0) * {"dpo": 0.1, "grpo": 0.25}.get(method, 1.0)


@dataclass(frozen=True)
class TuneResult:
    """The result of a run.

    Args:
        directory: The recipe's directory.
        expert: The expert's name in the recipe.
        alpha: The recipe's strength; 0 if none of those tried helped on the validation rows.
        method: How the expert was trained: sft, cpt, dpo or grpo.
        template: How expert and anti-expert read prompts: plain, chat or a Jinja template.
        base_template: How the base reads them.
        num_steps: Number of optimizer steps.
        num_parameters: Number of trainable parameters.
        train_s: Seconds of training, evaluations included, over all parts of a resumed run.
        offsets_s: Seconds spent on the frozen models beforehand, for `cpt` and calibration.
        peak_memory_bytes: Peak memory of the process until training ended; on CUDA, of its tensors.
        valid_loss: Lowest validation loss, nats per trained token; None without validation, and for `grpo`.
            For `cpt` and a calibrated pair it is the steered base's; with a base behind an API the expert's
            loss plus the anti-expert's divergence.
        first_valid_loss: The same before training.
        data: Counts and digests of rows and tokens, by part. `rows` is what a part has, and the others count
            what was read of it.
        learning_rate: Peak learning rate.
        is_calibrated: Whether the anti-expert is calibrated.
        valid: Scores of base, expert, anti-expert and steered base on validation rows; see `ScoreReport`.
        test: The same on rows that nothing was chosen on, at the best strength.
        tried: The strengths tried on the validation rows; empty if none was chosen.
        best_alpha: The best of them, also where it does not help and `alpha` is 0.
        edge: Whether the best is the lowest or the highest of them, so that a better one may lie beyond.
        fit: Weights and bias that were fitted, what they gain, and whether they are kept; see
            `tune.fit.Fitted`. None if none were.
        verdict: Whether steering helps, why, two prompts answered by base and steered base, and what to try
            next; see `tune.verdict.Verdict`. None if nothing was measured.
        rewards: For `grpo`: the reward's name, and `valid` and `test`, how good the answers of base, expert
            and steered base are on these rows; see `tune.reward_scores.RewardReport`. Also `first_valid` and
            `best_valid`, the mean rewards of the expert before training and at the state that was kept.
        environment: Versions of libraries, and the number of threads.
    """

    directory: str
    expert: str
    alpha: float
    method: Method
    template: str
    base_template: str
    num_steps: int
    num_parameters: int
    train_s: float
    offsets_s: float
    peak_memory_bytes: int
    valid_loss: float | None
    first_valid_loss: float | None
    data: dict[str, Any]
    learning_rate: float
    is_calibrated: bool = False
    valid: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    tried: tuple[float, ...] = ()
    best_alpha: float | None = None
    edge: Literal["lowest", "highest"] | None = None
    fit: dict[str, Any] | None = None
    verdict: dict[str, Any] | None = None
    rewards: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return asdict(self)
