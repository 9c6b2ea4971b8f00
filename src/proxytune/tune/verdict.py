"""The last word of a run: whether steering helps, on rows that nothing was chosen on.

Two questions are asked, and each has a 95 % interval:

- *Wording*: is the perplexity of the answers, or of texts, lower than the base's?
- *Answers*: are greedy answers to the rows' prompts closer to the given ones (chrF)? With preference pairs:
  is the chosen answer likelier than the rejected one more often? Texts have no answers: what they teach is
  wording.

Steering *helps* if the answers are better, or for texts the wording. It *helps wording only* if the wording
is better and the answers are not: the model would write the given answers more readily, and still answers no
better when it writes by itself. Otherwise it *does not help*. A difference counts only if its interval
leaves out zero. Where there are too few rows for an interval, its sign counts, and the reason says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from proxytune.data.rows import Rows, answers_of
from proxytune.errors import InvalidRequest, PromptTooLong
from proxytune.measure.likelihood import likelihoods
from proxytune.measure.metrics import chrf
from proxytune.measure.score import NUM_RESAMPLES, Interval, ScoreRow
from proxytune.request import Prompt, Request, SamplingParams
from proxytune.tune.settings import TuneResult

if TYPE_CHECKING:
    from proxytune.decode.batch import Event
    from proxytune.model import ProxyTuned

Word = Literal["helps", "helps wording only", "does not help"]

MOST_ANSWERS = 24
"""Maximum number of prompts that are answered, each by the base and by the steered base."""
ANSWER_TOKENS = 64
"""Maximum number of new tokens of an answer; longer given answers are compared up to there."""
NUM_EXAMPLES = 2
PROMPT_CHARACTERS = 200
"""Length of the beginning of a held-out text that is continued as an example."""


class Change(NamedTuple):
    """A perplexity divided by the base's, minus 1, and its interval."""

    change: float
    change_interval: Interval | None


Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Compared:
    """How good answers are, of the base and of the steered base.

    Args:
        measure: What is measured: `chrf`, from 0 to 1; `preferred`, the share of pairs whose chosen answer
            is likelier than the rejected one; or `reward` (`reward_scores.py`).
        num_answers: Number of prompts.
        base: The base's mean.
        steered: The steered base's mean.
        change: `steered - base`.
        change_interval: Its interval, resampled in pairs; None for a single prompt.
    """

    measure: Literal["chrf", "preferred", "reward"]
    num_answers: int
    base: float
    steered: float
    change: float
    change_interval: Interval | None


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out prompt, answered by base and steered base, each greedily.

    Args:
        prompt: What people type.
        given: The answer that the row gives, or the text that follows.
        base: The base's answer.
        steered: The steered base's answer.
    """

    prompt: str
    given: str
    base: str
    steered: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The last word.

    Args:
        word: `helps`, `helps wording only` or `does not help`.
        reason: What it rests on, in a sentence.
        rows: The part that was measured: `test`, or `valid` if no rows were held back.
        num_rows: Number of rows of this part.
        alpha: The strength that was measured: the recipe's, or the best of those tried if that is 0.
        answers: How good the answers are; None for texts.
        samples: Prompts with both answers.
    """

    word: Word
    reason: str
    rows: Literal["test", "valid"]
    num_rows: int
    alpha: float
    answers: Compared | None
    samples: tuple[Sample, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict for JSON."""
        return asdict(self)


# Answers -------------------------------------------------------------------------------------------


def compare_answers(
    model: ProxyTuned,
    rows: Rows,
    alpha: float,
    *,
    num_tokens: int,
    seed: int,
    on_progress: Advance | None = None,
) -> tuple[Compared | None, tuple[Sample, ...]]:
    """Return how good the answers of base and steered base are, and a few of them side by side.

    Args:
        model: The recipe, loaded.
        rows: Rows that nothing was chosen on.
        alpha: Strength of steering.
        num_tokens: About how many tokens may be generated.
        seed: Random seed of the bootstrap.
        on_progress: Called with the number of answers done and the total.

    Raises:
        UserError: The models cannot answer.
        BackendError: A model failed.
    """
    num_prompts = max(NUM_EXAMPLES, min(MOST_ANSWERS, num_tokens // (2 * ANSWER_TOKENS)))
    if rows.kind in ("text", "preference"):
        num_prompts = NUM_EXAMPLES
    asked = _asked(model, rows, num_prompts)
    if not asked:
        return None, ()
    requests = [
        Request(prompt, SamplingParams(max_new_tokens=ANSWER_TOKENS), alpha=strength)
        for prompt, _ in asked
        for strength in (0.0, alpha)
    ]
    num_done = 0

    def advance(index: int, event: Event) -> None:
        nonlocal num_done
        if event.finish_reason is not None:
            num_done += 1
            if on_progress is not None:
                on_progress(num_done, len(requests))

    texts = [trace.text for trace in model.generate_batch(requests, on_event=advance)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    samples = tuple(
        Sample(typed(prompt), given, *pair)
        for (prompt, given), pair in zip(asked[:NUM_EXAMPLES], pairs, strict=False)
    )
    if rows.kind == "text":
        return None, samples
    if rows.kind == "preference":
        return _preferred(model, rows, alpha, num_tokens, seed), samples
    scores = [
        [chrf(text, given) for text in pair] for (_, given), pair in zip(asked, pairs, strict=True)
    ]
    return _compared("chrf", np.array(scores), seed), samples


def _asked(model: ProxyTuned, rows: Rows, limit: int) -> list[tuple[Prompt, str]]:
    """Return prompts that fit into the models' contexts, each with what the row gives after it."""
    found: list[tuple[Prompt, str]] = []
    for row in rows.rows:
        pairs = [_continued(row["text"])] if rows.kind == "text" else answers_of(row)
        for prompt, given in pairs:
            with suppress(PromptTooLong, InvalidRequest):
                model.job(Request(prompt, SamplingParams(max_new_tokens=ANSWER_TOKENS)))
                found.append((prompt, _first_tokens(model, given)))
        if len(found) >= limit:
            break
    return found[:limit]


def _continued(text: str) -> tuple[str, str]:
    """Cut a text behind its first words, at a space."""
    text = text.strip()
    cut = text.rfind(" ", 0, min(PROMPT_CHARACTERS, len(text) // 2))
    return text[: max(cut, 1)], text[max(cut, 1) :]


def _first_tokens(model: ProxyTuned, text: str) -> str:
    token_ids = model.tokenizer.encode(text, add_special_tokens=False)[:ANSWER_TOKENS]
    return str(model.tokenizer.decode(token_ids, skip_special_tokens=True))


def typed(prompt: Prompt) -> str:
    """Return what a person typed: a text, or the last message."""
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1]
    return last["content"] if isinstance(last, Mapping) else ""


def _preferred(
    model: ProxyTuned, rows: Rows, alpha: float, num_tokens: int, seed: int
) -> Compared | None:
    """Return how often the chosen answer is likelier than the rejected one."""
    texts: list[tuple[Prompt, str]] = []
    for row in rows.rows:
        answers = [_single(row[key]) for key in ("chosen", "rejected")]
        if None not in answers:
            texts += [(row["prompt"], answer) for answer in answers if answer is not None]
    texts = texts[: 2 * max(NUM_EXAMPLES, num_tokens // (2 * ANSWER_TOKENS))]
    passages = model.completion_passages(texts)
    if not texts or len(passages) < len(texts):
        return None
    columns = []
    for strength in (0.0, alpha):
        alphas = (strength,) * len(model.ensemble.pairs)
        found = dict(likelihoods(model.ensemble, passages, alphas))
        logprobs = np.array([found[i].logprob for i in range(len(texts))]).reshape(-1, 2)
        columns.append((logprobs[:, 0] > logprobs[:, 1]).astype(float))
    return _compared("preferred", np.stack(columns, axis=1), seed)


def _single(answer: Any) -> str | None:
    """Return an answer of one message as text; None for a longer one."""
    if isinstance(answer, str):
        return answer
    return answer[0]["content"] if len(answer) == 1 else None


def _compared(measure: Literal["chrf", "preferred"], scores: Any, seed: int) -> Compared:
    """Return the comparison of scores `[prompts, 2]`, the base's and the steered base's."""
    differences = scores[:, 1] - scores[:, 0]
    interval = None
    if len(scores) > 1:
        picks = np.random.default_rng(seed).integers(
            0, len(scores), size=(NUM_RESAMPLES, len(scores))
        )
        bounds = np.percentile(differences[picks].mean(1), [2.5, 97.5])
        interval = Interval(*bounds.tolist())
    base, steered = scores.mean(0).tolist()
    return Compared(measure, len(scores), base, steered, float(differences.mean()), interval)


# The verdict ---------------------------------------------------------------------------------------


def judge(
    model: ProxyTuned,
    rows: Rows,
    scores: Mapping[str, Any],
    alpha: float,
    *,
    is_test: bool,
    num_tokens: int,
    seed: int,
    on_progress: Advance | None = None,
) -> Verdict:
    """Return whether steering helps.

    Args:
        model: The recipe, loaded.
        rows: The rows to judge on.
        scores: How well the models predict them, a `ScoreReport` for JSON.
        alpha: Strength of steering.
        is_test: Whether nothing was chosen on these rows.
        num_tokens: About how many tokens may be generated.
        seed: Random seed of the bootstrap.
        on_progress: Called with the number of answers done and the total.

    Raises:
        UserError: The models cannot answer.
        BackendError: A model failed.
    """
    (steered,) = (
        row for row in scores["rows"] if (row["name"], row["alpha"]) == ("steered", alpha)
    )
    interval = steered["change_interval"]
    change = Change(steered["change"], None if interval is None else Interval(**interval))
    answers, samples = compare_answers(
        model, rows, alpha, num_tokens=num_tokens, seed=seed, on_progress=on_progress
    )
    return Verdict(
        word=word_of(change, answers),
        reason=_reason(change, answers, is_test=is_test),
        rows="test" if is_test else "valid",
        num_rows=len(rows),
        alpha=alpha,
        answers=answers,
        samples=samples,
    )


def is_lower(change: Change | ScoreRow) -> bool:
    """Whether a perplexity lies below the base's, with its whole interval if there is one."""
    interval = change.change_interval
    return change.change < 0 and (interval is None or interval.high < 0)


def word_of(change: Change, answers: Compared | None) -> Word:
    """Return the verdict that this file defines.

    Args:
        change: The steered base's perplexity against the base's.
        answers: How good the answers are; None for texts.
    """
    if answers is None:
        return "helps" if is_lower(change) else "does not help"
    interval = answers.change_interval
    if answers.change > 0 and (interval is None or interval.low > 0):
        return "helps"
    return "helps wording only" if is_lower(change) else "does not help"


def _reason(change: Change, answers: Compared | None, *, is_test: bool) -> str:
    where = "rows that nothing was chosen on" if is_test else "the validation rows"
    interval = interval_words(change.change_interval, "+.1%")
    text = f"on {where}, the perplexity changes by {change.change:+.1%}{interval}"
    if answers is not None:
        name = {
            "chrf": "the likeness of greedy answers to the given ones (chrF)",
            "preferred": "the share of pairs whose chosen answer is likelier",
        }[answers.measure]
        text += (
            f", and {name} goes from {answers.base:.2f} to {answers.steered:.2f}, by {answers.change:+.2f}"
            f"{interval_words(answers.change_interval, '+.2f')}"
        )
    if change.change_interval is None:
        text += "; the rows are too few for an interval of the perplexity"
    if not is_test:
        text += "; the strength was chosen on them, so new rows may look worse"
    return text


def hints_for(
    word: Word, result: TuneResult, *, could_be_cpt: bool, is_still_falling: bool
) -> tuple[str, ...]:
    """Return what to try next, a sentence each.

    Args:
        word: The verdict.
        result: The run's result.
        could_be_cpt: Whether the expert was trained by itself and could be trained through the base.
        is_still_falling: Whether the last evaluation had the lowest validation loss.
    """
    hints = []
    if could_be_cpt and (word != "helps" or result.edge == "lowest"):
        how = "through the base, with --method cpt"
        if result.is_calibrated:
            how = "on through the base, with --then-cpt"
        hints.append(f"train the expert {how}")
    if is_still_falling:
        hints.append("train longer, with more --epochs: the validation loss was still falling")
    if result.edge == "highest":
        best = result.best_alpha or 1.0
        beyond = ",".join(f"{best * factor:g}" for factor in (1, 1.2, 1.5, 2))
        hints.append(
            "try higher strengths, since the best one is the highest that was tried: "
            f"proxytune sweep {result.directory} --data ROWS --alphas {beyond}"
        )
    if word == "helps wording only":
        hints.append(
            "compare the two answers to each prompt: if the base's are right already, wording is all there "
            "is to gain; otherwise give more rows, or a larger small model"
        )
    elif word == "does not help":
        hints.append(
            "give more rows or a larger small model, and check that --template fits the rows"
        )
    return tuple(hints)


# In words ------------------------------------------------------------------------------------------


def interval_words(interval: Interval | Mapping[str, float] | None, form: str) -> str:
    """Return an interval in brackets, to follow a number; nothing if there is none."""
    if interval is None:
        return ""
    low, high = (
        (interval.low, interval.high)
        if isinstance(interval, Interval)
        else (interval["low"], interval["high"])
    )
    return f" ({low:{form}} to {high:{form}})"
