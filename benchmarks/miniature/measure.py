"""Every predictor's losses on test text and right answers to test questions, block by block.

A *predictor* is a way to predict: the base, an expert by itself, the base steered in one of three ways, the
base tuned directly. A *block* is what the bootstrap draws: consecutive tokens, or questions about one
disease. `summary.py` sums the numbers up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.miniature.data import AREAS, read_rows
from benchmarks.miniature.plan import ANTI_EXPERT, BASE, KINDS, TASK, Plan
from proxytune.backends.transformers.weights import quietly
from proxytune.decode.ensemble import Ensemble
from proxytune.logits.steer import steer
from proxytune.measure import given
from proxytune.measure.score import (
    BLOCK_TOKENS,
    SLICE_TOKENS,
    passage_logits,
    passage_of,
    token_losses,
)
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.tune.settings import ALPHAS

WINDOW = 512
"""Tokens per window of test text."""


def load(plan: Plan, name: str) -> ProxyTuned:
    """Return base, both experts and the directly tuned base as one ensemble with three pairs.

    The directly tuned base is the expert of a pair whose anti-expert is the base, so one forward per window
    serves every predictor.
    """

    experts = []
    for kind in KINDS:
        adapter = str(plan.run_path(f"{name}.{kind}") / "adapters" / kind)
        model = BASE if kind == "direct" else ANTI_EXPERT
        untuned = ModelSpec(same_as="base") if kind == "direct" else ModelSpec(model=ANTI_EXPERT)
        experts.append(ExpertSpec(kind, ModelSpec(model=model, adapter=adapter), untuned))
    return ProxyTuned.load(Recipe(base=ModelSpec(model=BASE), experts=tuple(experts)))


def predictions(
    ensemble: Ensemble, logits: Mapping[int, Tensor], alphas: Mapping[str, tuple[str, float]]
) -> dict[str, Tensor]:
    """Return every predictor's logits.

    Args:
        ensemble: An ensemble with the pairs `sft`, `cpt` and `direct`.
        logits: Each member's logits, `[rows, vocab]`.
        alphas: For each steered predictor, the pair that steers and its strength.
    """

    pairs = {pair.name: pair for pair in ensemble.pairs}
    base = logits[0].float()
    return {
        "base": base,
        "anti_expert": logits[pairs["sft"].anti_expert].float(),
        "expert": logits[pairs["sft"].expert].float(),
        "direct": logits[pairs["direct"].expert].float(),
        **{
            name: steer(
                base,
                expert_logits=logits[pairs[pair].expert],
                anti_expert_logits=logits[pairs[pair].anti_expert],
                alpha=alpha,
            )
            for name, (pair, alpha) in alphas.items()
        },
    }


def text_losses(
    ensemble: Ensemble, token_ids: Sequence[int], alphas: Mapping[str, tuple[str, float]]
) -> dict[str, np.ndarray]:
    """Return each predictor's negative log-likelihoods, `[len(token_ids) - 1]` nats.

    `measure/score.py` compares one predictor with the base. A gap needs the paired losses of three, so this
    uses its parts.
    """

    targets = torch.tensor(token_ids[1:])
    padding_ids = ensemble.vocabulary.padding_ids.cpu()
    losses: dict[str, list[np.ndarray]] = defaultdict(list)
    passage = passage_of(ensemble, token_ids[:1], token_ids[1:])
    for start, chunk in passage_logits(ensemble, passage, range(len(ensemble.members))):
        for first in range(0, len(chunk[0]), SLICE_TOKENS):
            part = {i: rows[first : first + SLICE_TOKENS].cpu() for i, rows in chunk.items()}
            wanted = targets[start + first :][: len(part[0])]
            for name, rows in predictions(ensemble, part, alphas).items():
                losses[name].append(token_losses(rows, wanted, padding_ids))
    return {name: np.concatenate(parts) for name, parts in losses.items()}


def in_blocks(losses: np.ndarray) -> tuple[list[float], list[int]]:
    """Return sums and sizes of blocks of consecutive tokens, cut as `score.py` cuts them."""

    num_blocks = max(1, len(losses) // BLOCK_TOKENS)
    starts = np.linspace(0, len(losses), num_blocks + 1).astype(int)[:-1]
    sizes = np.diff([*starts, len(losses)])
    return np.add.reduceat(losses, starts).tolist(), sizes.tolist()


def windows_of(token_ids: Sequence[int], num_windows: int) -> list[list[int]]:
    """Return windows evenly spaced over a text, without overlap."""
    count = min(num_windows, len(token_ids) // WINDOW)
    starts = np.linspace(0, len(token_ids) - WINDOW, count).astype(int)
    return [list(token_ids[s : s + WINDOW]) for s in starts]


def measure_text(
    model: ProxyTuned,
    token_ids: Sequence[int],
    alphas: Mapping[str, float],
    num_windows: int,
    *,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure every predictor on windows of a text, with the strengths chosen for `sft` and `cpt`."""
    chosen = _strengths(alphas)
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    windows = windows_of(token_ids, num_windows)
    for count, window in enumerate(windows, 1):
        for name, losses in text_losses(model.ensemble, window, chosen).items():
            parts[name].append(losses)
        if count % max(1, len(windows) // 4) == 0:
            say(f"test windows: {count} of {len(windows)}")
    blocks = {name: in_blocks(np.concatenate(losses)) for name, losses in parts.items()}
    return {
        "measure": "perplexity",
        "alphas": {name: alpha for name, (_, alpha) in chosen.items()},
        "num_windows": len(windows),
        "sizes": blocks["base"][1],
        "sums": {name: sums for name, (sums, _) in blocks.items()},
    }


def _strengths(alphas: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    return {
        "steered_1": ("sft", 1.0),
        "steered": ("sft", alphas["sft"]),
        "cpt": ("cpt", alphas["cpt"]),
    }


def option_ids(tokenizer: Any) -> dict[str, int]:
    """Return the first token of each area's label; they are all different."""
    ids = {label: tokenizer.encode(label, add_special_tokens=False)[0] for label in AREAS.values()}
    assert len(set(ids.values())) == len(ids), f"labels begin alike: {ids}"
    return ids


def option_logits(model: ProxyTuned, items: Sequence[Mapping[str, str]]) -> dict[int, Tensor]:
    """Return every member's logits of the options at the end of each prompt, `[items, options]`."""
    passages = model.completion_passages([(item["prompt"], item["completion"]) for item in items])
    return given.option_logits(model.ensemble, passages, list(option_ids(model.tokenizer).values()))


def choose_alpha(
    ensemble: Ensemble, logits: Mapping[int, Tensor], right: Tensor, pair: str
) -> float:
    """Return the strength with the most right answers on validation items; ties go to likelier answers."""

    def quality(alpha: float) -> tuple[int, float]:
        rows = predictions(ensemble, logits, {"steered": (pair, alpha)})["steered"]
        likelihood = rows.log_softmax(-1).gather(-1, right[:, None]).mean()
        return int((rows.argmax(-1) == right).sum()), float(likelihood)

    return max(ALPHAS, key=quality)


def measure_task(
    model: ProxyTuned, valid: Sequence[Mapping[str, str]], test: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Measure every predictor's accuracy on test items; the strengths are chosen on validation items.

    Blocks are diseases: several questions about one are not independent.
    """

    labels = list(option_ids(model.tokenizer))
    right = [
        torch.tensor([labels.index(item["completion"]) for item in items])
        for items in (valid, test)
    ]
    seen = option_logits(model, valid)
    chosen = _strengths(
        {kind: choose_alpha(model.ensemble, seen, right[0], kind) for kind in ("sft", "cpt")}
    )
    answers = predictions(model.ensemble, option_logits(model, test), chosen)
    places: dict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(test):
        places[item["focus"]].append(place)
    hits = {name: (rows.argmax(-1) == right[1]).tolist() for name, rows in answers.items()}
    return {
        "measure": "accuracy",
        "alphas": {name: alpha for name, (_, alpha) in chosen.items()},
        "num_valid_items": len(valid),
        "num_questions": len({item["prompt"] for item in test}),
        "sizes": [len(where) for where in places.values()],
        "sums": {
            name: [sum(row[i] for i in where) for where in places.values()]
            for name, row in hits.items()
        },
    }


def measure(plan: Plan, name: str, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure one data set after all of its trainings are done."""
    with quietly():
        model = load(plan, name)
        if name == TASK:
            valid, test = (read_rows(plan, name, split) for split in ("valid", "test"))
            return measure_task(model, valid, test)
        text = read_rows(plan, name, "test")[0]["text"]
        token_ids = model.tokenizer.encode(text, add_special_tokens=False)
        tuned = {kind: plan.read_stage(f"{name}.{kind}")["result"] for kind in KINDS}
        # The best strength is measured also where it does not help and the recipe's is 0.
        alphas = {
            kind: result.get("best_alpha") or result["alpha"] for kind, result in tuned.items()
        }
        return measure_text(model, token_ids, alphas, plan.num_windows, say=say)
