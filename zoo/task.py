"""The family's tasks: choosing their experts' alpha, measuring them, and the questions that the demo asks.

`benchmarks/miniature` defines the items. An answer is the option whose first token has the highest logit, or
for tasks without options what greedy decoding writes: it is right if it is exactly the item's.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any, NamedTuple

import torch
from experts import SEEDS, Expert, rows_file
from torch import Tensor

from benchmarks.miniature.plan import TASK
from benchmarks.miniature.tasks import TASKS
from proxytune.logits.steer import steer
from proxytune.machine import summary
from proxytune.measure.given import are_written, first_tokens, option_logits
from proxytune.model import ProxyTuned
from proxytune.tasks.statistics import grouped_interval

NUM_DEMO_ITEMS = 100
"""The demo asks this many questions."""
ITEMS_PER_FOCUS = 3
"""At most this many of them are about one thing, since they are not independent."""
SEED = 0
LEAST_GAIN = 0.02
"""How much larger the share of right answers has to be at another strength than 1 to be chosen."""
DESCRIPTIONS = {task.name: task.description for task in TASKS} | {
    TASK: "The area of medicine that a question belongs to: one of six, that of the institute of the NIH or "
    "the CDC which answers it. The anti-expert's own training text included some of the test items' diseases."
}


def items_of(expert: Expert, split: str) -> list[dict[str, str]]:
    """Return a split's items."""
    lines = rows_file(expert.corpus, split).read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def demo_items(items: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return different questions in random order, at most `ITEMS_PER_FOCUS` about one thing."""
    asked: set[str] = set()
    counts: Counter[str] = Counter()
    kept = []
    for item in random.Random(SEED).sample(items, len(items)):
        if item["prompt"] in asked or counts[item["focus"]] == ITEMS_PER_FOCUS:
            continue
        asked.add(item["prompt"])
        counts[item["focus"]] += 1
        kept.append({key: item[key] for key in ("prompt", "completion", "focus")})
    return kept[:NUM_DEMO_ITEMS]


def write_demo_items(expert: Expert, folder: Any) -> None:
    """Write the demo's questions, from the test split."""
    lines = [json.dumps(item, ensure_ascii=False) for item in demo_items(items_of(expert, "test"))]
    (folder / f"{expert.name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


class Hits(NamedTuple):
    """Which items each predictor answers rightly: 1 for each, otherwise 0."""

    models: dict[str, list[float]]  # base, anti_expert and expert
    steered: dict[float, list[float]]  # by strength


def hits_of(
    model: ProxyTuned, expert: Expert, split: str, alphas: list[float], name: str = ""
) -> Hits:
    """Ask the items of a split.

    Args:
        model: Has the expert.
        expert: The task's expert.
        split: The items.
        alphas: Strengths to steer at.
        name: What the model calls the expert; empty for its own name.
    """
    items = items_of(expert, split)
    ensemble = model.steered_by(name or expert.name)
    (pair,) = ensemble.pairs
    members = {"base": 0, "anti_expert": pair.anti_expert, "expert": pair.expert}
    passages = model.completion_passages([(i["prompt"], i["completion"]) for i in items])
    if not expert.has_options:
        found = are_written(ensemble, passages, [(alpha,) for alpha in alphas])
        return Hits(
            {key: [float(hit) for hit in found.models[index]] for key, index in members.items()},
            {a: [float(hit) for hit in row] for a, row in zip(alphas, found.steered, strict=True)},
        )
    options = sorted({item["completion"] for item in items_of(expert, "train")})
    right = torch.tensor([options.index(item["completion"]) for item in items])
    logits = option_logits(ensemble, passages, first_tokens(options, model.tokenizer))

    def hits(rows: Tensor) -> list[float]:
        return (rows.argmax(-1) == right).float().tolist()

    steered = {
        alpha: hits(
            steer(
                logits[0],
                expert_logits=logits[pair.expert],
                anti_expert_logits=logits[pair.anti_expert],
                alpha=alpha,
            )
        )
        for alpha in alphas
    }
    return Hits({key: hits(logits[index]) for key, index in members.items()}, steered)


def _shown(values: list[float], groups: list[str], form: str = "{:.1%}") -> str:
    low, high = grouped_interval(values, groups) or (float("nan"),) * 2
    return f"{form} ({form} to {form})".format(sum(values) / len(values), low, high)


def _points(values: list[float], groups: list[str]) -> str:
    points = [100 * value for value in values]
    return _shown(points, groups, "{:+.1f}").replace(" (", " points (")


def measure(
    model: ProxyTuned, others: ProxyTuned, expert: Expert, alphas: list[float]
) -> dict[str, Any]:
    """Choose the strength on validation items, then measure the test items once.

    Args:
        model: The family.
        others: Has the same expert with other seeds.
        expert: The task's expert.
        alphas: The strengths that are tried, 1 among them. Another one is chosen only if it answers at least
            `LEAST_GAIN` more of the items rightly.
    """
    import transformers

    valid = hits_of(model, expert, "valid", alphas)
    shares = {alpha: sum(row) / len(row) for alpha, row in valid.steered.items()}
    best = max(alphas, key=lambda alpha: (shares[alpha], -abs(alpha - 1)))
    alpha = best if shares[best] - shares[1.0] >= LEAST_GAIN else 1.0
    items = items_of(expert, "test")
    focuses = [item["focus"] for item in items]
    test = hits_of(model, expert, "test", sorted({1.0, best}))
    steered = test.steered[1.0]
    gains = [ours - its for ours, its in zip(steered, test.models["base"], strict=True)]
    seeds = [
        hits_of(others, expert, "test", [1.0], f"{expert.name}.{seed}").steered[1.0]
        for seed in SEEDS[1:]
    ]
    answers = Counter(item["completion"] for item in items)
    return {
        "alpha": alpha,
        "best_alpha": best,
        "machine": summary(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "num_valid_items": len(items_of(expert, "valid")),
        "validation": {str(a): share for a, share in shares.items()},
        "num_items": len(items),
        "num_focuses": len(set(focuses)),
        "most_frequent": max(answers.values()) / len(items),
        **{name: _shown(values, focuses) for name, values in test.models.items()},
        "steered": _shown(steered, focuses),
        "steered_at_best": _shown(test.steered[best], focuses),
        "change": _points(gains, focuses),
        "seeds": [f"{sum(row) / len(row):.1%}" for row in (steered, *seeds)],
    }


def card_lines(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Return the tasks' section of the model card.

    Args:
        measured: What `measure` returned, by the expert's name.
    """
    lines = [
        "## The tasks",
        "",
        "The tables show the share of right answers to test items. Brackets contain a 95 % bootstrap",
        "interval over what the items are about; nothing that a test item is about is in a training row of",
        "these experts.",
        "",
        "| expert | test items | base | anti-expert | expert alone | steered, alpha 1 | against base |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in measured.items():
        lines.append(
            f"| {name} | {row['num_items']} | {row['base']} | {row['anti_expert']} | {row['expert']} | "
            f"{row['steered']} | {row['change']} |"
        )
    seeds = ", ".join(map(str, SEEDS))
    lines += [
        "",
        f"| expert | alpha 1, experts of seeds {seeds} | best alpha on validation items | steered at it |",
        "| --- | --- | ---: | ---: |",
    ]
    for name, row in measured.items():
        lines.append(
            f"| {name} | {', '.join(row['seeds'])} | {row['best_alpha']:g} | {row['steered_at_best']} |"
        )
    strengths = list(next(iter(measured.values()))["validation"])
    lines += [
        "",
        "Right answers to validation items by alpha:",
        "",
        "| expert | " + " | ".join(f"{float(alpha):g}" for alpha in strengths) + " |",
        "| --- |" + " ---: |" * len(strengths),
    ]
    for name, row in measured.items():
        shares = " | ".join(f"{share:.0%}" for share in row["validation"].values())
        lines.append(f"| {name} | {shares} |")
    lines.append("")
    for name, row in measured.items():
        description = DESCRIPTIONS[name.replace("-", "_")]
        lines += [
            f"- `{name}`: {description} The most frequent answer is right in {row['most_frequent']:.1%}.",
        ]
    return [*lines, ""]
