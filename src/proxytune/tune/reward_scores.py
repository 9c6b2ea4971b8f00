"""The last word of a run by reward: how good greedy answers of base, expert and steered base are.

The strength is the one with the highest mean reward on the validation rows, if that is above the base's; of
several such strengths, the one closest to 1. Steering *helps* if its mean reward on rows that nothing was
chosen on is above the base's. A difference counts if its 95 % interval, resampled in pairs over prompts,
leaves out zero; with a single prompt its sign counts.

Rewards say nothing of wording, so no perplexity is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from proxytune.data.rows import Rows, answers_of
from proxytune.errors import InvalidRequest, PromptTooLong
from proxytune.measure.score import NUM_RESAMPLES, Interval
from proxytune.request import Request, SamplingParams
from proxytune.tune.rewards import Reward
from proxytune.tune.settings import Display, TuneResult, TuneSettings
from proxytune.tune.verdict import (
    NUM_EXAMPLES,
    Compared,
    Sample,
    Verdict,
    interval_words,
    typed,
)

if TYPE_CHECKING:
    from proxytune.decode.batch import Event
    from proxytune.model import ProxyTuned

ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Strengths tried on the validation rows; fewer than those of texts, since every one answers all prompts."""
IDLE_SHARE = 0.9
"""Share of prompts whose answers all have one reward, from which on there was little to learn from."""

Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class RewardScore:
    """How good the answers of one model are.

    Args:
        name: `base`, `expert` (by itself) or `steered`.
        alpha: Strength of steering; None for the others.
        reward: Mean reward.
        interval: Its 95 % interval; None for a single prompt.
        change: `reward` less the base's.
        change_interval: Its interval, resampled in pairs.
        length: Mean length of the answers in tokens.
    """

    name: str
    alpha: float | None
    reward: float
    interval: Interval | None
    change: float
    change_interval: Interval | None
    length: float


@dataclass(frozen=True, slots=True)
class RewardReport:
    """How good the answers of several models to the same prompts are.

    Args:
        num_answers: Number of prompts.
        rows: The models, the base first.
    """

    num_answers: int
    rows: tuple[RewardScore, ...]

    def steered(self, alpha: float) -> RewardScore:
        """Return the score of the steered base at a strength."""
        (found,) = (r for r in self.rows if (r.name, r.alpha) == ("steered", alpha))
        return found


class Answered(NamedTuple):
    """What was measured of several models.

    Args:
        report: Their rewards.
        prompts: What people type, of each prompt.
        given: The answer that its row gives, or nothing.
        texts: The answers, by model in the order of the report, then by prompt.
    """

    report: RewardReport
    prompts: list[str]
    given: list[str]
    texts: list[list[str]]


def measure_rewards(
    model: ProxyTuned,
    rows: Rows,
    reward: Reward,
    alphas: Sequence[float],
    *,
    max_new_tokens: int,
    num_tokens: int,
    seed: int,
    on_progress: Advance | None = None,
) -> Answered:
    """Answer the rows' prompts greedily with base, expert and steered base, and reward the answers.

    Args:
        model: The recipe, loaded.
        rows: Rows of the format `prompt`.
        reward: What answers are worth.
        alphas: Strengths of steering.
        max_new_tokens: Maximum number of tokens of an answer.
        num_tokens: About how many tokens each model may generate; at least two prompts are answered.
        seed: Random seed of the bootstrap.
        on_progress: Called with the number of answers done and the total.

    Raises:
        RewardError: The reward failed.
        UserError: The models cannot answer.
        BackendError: A model failed.
    """
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    indices = _asked(model, rows, sampling, max(NUM_EXAMPLES, num_tokens // max_new_tokens))
    if not indices:
        raise PromptTooLong("no prompt of the rows leaves room for an answer")
    expert = model.alone(model.ensemble.pairs[0].expert)
    runs: list[tuple[str, float | None, ProxyTuned]] = [
        ("base", None, model),
        ("expert", None, expert),
    ]
    runs += [("steered", alpha, model) for alpha in alphas]
    num_done = 0

    def advance(index: int, event: Event) -> None:
        nonlocal num_done
        if event.finish_reason is not None:
            num_done += 1
            if on_progress is not None:
                on_progress(num_done, len(indices) * len(runs))

    texts, values, lengths = [], [], []
    for name, alpha, each in runs:
        strength = None if name == "expert" else alpha or 0.0
        asked = [Request(rows.rows[i]["prompt"], sampling, alpha=strength) for i in indices]
        traces = each.generate_batch(asked, on_event=advance)
        texts.append([trace.text for trace in traces])
        lengths.append(sum(len(trace.steps) for trace in traces) / len(traces))
        values.append(
            [
                reward(rows.rows[i]["prompt"], trace.text, rows.rows[i]["row"], rows.where(i))
                for i, trace in zip(indices, traces, strict=True)
            ]
        )
    scores = [
        _score(name, alpha, np.array(own), np.array(values[0]), length, seed)
        for (name, alpha, _), own, length in zip(runs, values, lengths, strict=True)
    ]
    return Answered(
        RewardReport(len(indices), tuple(scores)),
        [typed(rows.rows[i]["prompt"]) for i in indices],
        [answers_of(rows.rows[i])[0][1] for i in indices],
        texts,
    )


def _asked(model: ProxyTuned, rows: Rows, sampling: SamplingParams, limit: int) -> list[int]:
    """Return the first rows whose prompts fit into the models' contexts."""
    found: list[int] = []
    for index, row in enumerate(rows.rows):
        if len(found) == limit:
            break
        with suppress(PromptTooLong, InvalidRequest):
            model.job(Request(row["prompt"], sampling))
            found.append(index)
    return found


def _score(
    name: str, alpha: float | None, own: Any, base: Any, length: float, seed: int
) -> RewardScore:
    difference = own - base
    return RewardScore(
        name,
        alpha,
        float(own.mean()),
        _interval(own, seed),
        float(difference.mean()),
        _interval(difference, seed),
        length,
    )


def _interval(values: Any, seed: int) -> Interval | None:
    """Return the 95 % interval of a mean of `[prompts]` values; None for a single one."""
    if len(values) < 2:
        return None
    shape = (NUM_RESAMPLES, len(values))
    picks = np.random.default_rng(seed).integers(0, len(values), size=shape)
    return Interval(*np.percentile(values[picks].mean(1), [2.5, 97.5]).tolist())


# The strength and the verdict ----------------------------------------------------------------------


def is_higher(score: RewardScore) -> bool:
    """Whether a mean reward lies above the base's, with its whole interval if there is one."""
    interval = score.change_interval
    return score.change > 0 and (interval is None or interval.low > 0)


def best_of(report: RewardReport) -> RewardScore:
    """Return the steered base with the highest reward; of equal ones, the one closest to alpha 1."""
    steered = [score for score in report.rows if score.name == "steered"]
    return max(steered, key=lambda score: (score.reward, -abs((score.alpha or 0.0) - 1.0)))


def measured_by_reward(
    model: ProxyTuned,
    result: TuneResult,
    settings: TuneSettings,
    reward: Reward,
    parts: tuple[Rows | None, Rows | None],
    display: Display,
) -> TuneResult:
    """Choose the strength if none was given, and say whether steering helps.

    Args:
        model: The recipe, loaded.
        result: The run's result so far.
        settings: The run's settings.
        reward: What answers are worth.
        parts: The validation and the test rows.
        display: Shows progress.

    Raises:
        RewardError: The reward failed.
        UserError: The models cannot answer.
        BackendError: A model failed.
    """

    def measure(rows: Rows, alphas: Sequence[float], stage: str) -> Answered:
        return measure_rewards(
            model,
            rows,
            reward,
            alphas,
            max_new_tokens=settings.max_new_tokens,
            # Every model writes the answers that it is measured on.
            num_tokens=settings.measure_tokens // 2,
            seed=settings.seed,
            on_progress=partial(display.stage, stage),
        )

    valid, test = parts
    rewards = dict(result.rewards or {})
    alpha = result.alpha
    answered: Answered | None = None
    if valid is not None:
        chooses = settings.is_pair and settings.alpha is None
        alphas = ALPHAS if chooses else (alpha,)
        answered = measure(valid, alphas, "answering validation prompts")
        rewards["valid"] = asdict(answered.report)
        if chooses:
            best = best_of(answered.report)
            assert best.alpha is not None
            edges: dict[float, Any] = {ALPHAS[0]: "lowest", ALPHAS[-1]: "highest"}
            alpha = best.alpha
            result = replace(
                result,
                alpha=alpha if is_higher(best) else 0.0,
                tried=ALPHAS,
                best_alpha=alpha,
                edge=edges.get(alpha),
            )
    if test is not None:
        answered = measure(test, sorted({alpha, 1.0}), "answering test prompts")
        rewards["test"] = asdict(answered.report)
    assert answered is not None
    verdict = _verdict(answered, alpha, is_test=test is not None)
    hints = _hints(verdict, result, rewards)
    return replace(result, rewards=rewards, verdict={**verdict.to_dict(), "hints": hints})


def _verdict(answered: Answered, alpha: float, *, is_test: bool) -> Verdict:
    report = answered.report
    steered, base = report.steered(alpha), report.rows[0]
    place = report.rows.index(steered)
    where = "rows that nothing was chosen on" if is_test else "the validation rows"
    reason = (
        f"on {where}, the mean reward of greedy answers goes from {base.reward:.3f} to {steered.reward:.3f}, "
        f"by {steered.change:+.3f}{interval_words(steered.change_interval, '+.3f')}"
    )
    if not is_test:
        reason += "; the strength was chosen on them, so new rows may look worse"
    samples = zip(
        answered.prompts, answered.given, answered.texts[0], answered.texts[place], strict=True
    )
    return Verdict(
        word="helps" if is_higher(steered) else "does not help",
        reason=reason,
        rows="test" if is_test else "valid",
        num_rows=report.num_answers,
        alpha=alpha,
        answers=Compared(
            "reward",
            report.num_answers,
            base.reward,
            steered.reward,
            steered.change,
            steered.change_interval,
        ),
        samples=tuple(Sample(*sample) for sample in samples)[:NUM_EXAMPLES],
    )


def _hints(verdict: Verdict, result: TuneResult, rewards: dict[str, Any]) -> tuple[str, ...]:
    hints = []
    alike = rewards.get("share_alike")
    if alike is not None and alike >= IDLE_SHARE and verdict.word != "helps":
        hints.append(
            f"give the expert a better start: for {alike:.0%} of the prompts all answers had one reward, "
            "which teaches nothing. Train on given answers first and go on with --start-from, or raise "
            "--group-size or --temperature"
        )
    if rewards.get("best_at_end"):
        hints.append("train longer, with more --epochs: the validation reward was still rising")
    if result.edge == "highest":
        hints.append(
            "try higher strengths with --alpha, since the best one is the highest that was tried"
        )
    if verdict.word != "helps" and not hints:
        hints.append("give more rows or a larger small model, and check that --template fits them")
    return tuple(hints)
