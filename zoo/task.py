"""The family's task: choosing its expert's alpha, measuring it, and the questions that the demo asks.

A question of MedQuAD is given, and the area of medicine it belongs to is the answer; `benchmarks/miniature`
defines the rows. A model's answer is the area whose first token has the highest logit.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from experts import SEEDS, Expert, rows_file
from torch import Tensor

from proxytune.logits.steer import steer
from proxytune.machine import summary
from proxytune.measure.given import first_tokens, option_logits
from proxytune.model import ProxyTuned
from proxytune.tasks.statistics import grouped_interval

ITEMS_PER_DISEASE = 3
"""The demo asks at most this many questions about one disease, since they are not independent."""
SEED = 0
LEAST_GAIN = 0.02
"""How much larger the share of right answers has to be at another strength than 1 to be chosen."""


def items_of(expert: Expert, split: str) -> list[dict[str, str]]:
    """Return a split's items."""
    lines = rows_file(expert.corpus, split).read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def demo_items(items: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return different questions in random order, at most `ITEMS_PER_DISEASE` about one disease."""
    asked: set[str] = set()
    counts: Counter[str] = Counter()
    kept = []
    for item in random.Random(SEED).sample(items, len(items)):
        if item["prompt"] in asked or counts[item["focus"]] == ITEMS_PER_DISEASE:
            continue
        asked.add(item["prompt"])
        counts[item["focus"]] += 1
        kept.append({key: item[key] for key in ("prompt", "completion", "focus")})
    return kept


def write_demo_items(expert: Expert, folder: Path) -> None:
    """Write the demo's questions, from the test split."""
    lines = [json.dumps(item, ensure_ascii=False) for item in demo_items(items_of(expert, "test"))]
    (folder / f"{expert.name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


class Answers:
    """What base, anti-expert, expert and steered base answer to the items of one split."""

    def __init__(self, model: ProxyTuned, expert: Expert, split: str, name: str = "") -> None:
        self.items = items_of(expert, split)
        options = sorted({item["completion"] for item in items_of(expert, "train")})
        self.right = torch.tensor([options.index(item["completion"]) for item in self.items])
        ensemble = model.steered_by(name or expert.name)
        passages = model.completion_passages([(i["prompt"], i["completion"]) for i in self.items])
        logits = option_logits(ensemble, passages, first_tokens(options, model.tokenizer))
        (pair,) = ensemble.pairs
        self.base, self.expert, self.anti_expert = (
            logits[member] for member in (0, pair.expert, pair.anti_expert)
        )

    def steered(self, alpha: float) -> Tensor:
        """Return the steered base's logits."""
        return steer(
            self.base,
            expert_logits=self.expert,
            anti_expert_logits=self.anti_expert,
            alpha=alpha,
        )

    def hits(self, logits: Tensor) -> list[float]:
        """Return 1 for each item that is answered rightly, otherwise 0."""
        return (logits.argmax(-1) == self.right).float().tolist()

    def quality(self, alpha: float) -> tuple[float, float]:
        """Return what a strength is chosen by: the right answers, then their likelihood."""
        logits = self.steered(alpha)
        likelihood = logits.log_softmax(-1).gather(-1, self.right[:, None]).mean()
        return sum(self.hits(logits)), float(likelihood)


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

    valid = Answers(model, expert, "valid")
    best = max(alphas, key=valid.quality)
    gain = (valid.quality(best)[0] - valid.quality(1.0)[0]) / len(valid.items)
    alpha = best if gain >= LEAST_GAIN else 1.0
    test = Answers(model, expert, "test")
    diseases = [item["focus"] for item in test.items]
    hits = {
        "base": test.hits(test.base),
        "anti_expert": test.hits(test.anti_expert),
        "expert": test.hits(test.expert),
        "steered": test.hits(test.steered(1.0)),
        "steered_at_best": test.hits(test.steered(best)),
    }
    gains = [ours - its for ours, its in zip(hits["steered"], hits["base"], strict=True)]
    seeds = [Answers(others, expert, "test", f"{expert.name}.{seed}") for seed in SEEDS[1:]]
    shares = [sum(hits["steered"]), *(sum(own.hits(own.steered(1.0))) for own in seeds)]
    areas = Counter(item["completion"] for item in test.items)
    return {
        "alpha": alpha,
        "best_alpha": best,
        "machine": summary(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "num_valid_items": len(valid.items),
        "validation": {str(a): valid.quality(a)[0] / len(valid.items) for a in alphas},
        "num_items": len(test.items),
        "num_diseases": len(set(diseases)),
        "most_frequent": max(areas.values()) / len(test.items),
        **{name: _shown(values, diseases) for name, values in hits.items()},
        "change": _points(gains, diseases),
        "seeds": [f"{share / len(test.items):.1%}" for share in shares],
    }


def card_lines(expert: Expert, measured: dict[str, Any]) -> list[str]:
    """Return the task's section of the model card."""
    strengths = list(measured["validation"])
    shares = " | ".join(f"{share:.1%}" for share in measured["validation"].values())
    return [
        "## The task",
        "",
        f"`{expert.name}` names the area of medicine that a question belongs to: one of six, that of the",
        "institute of the NIH or the CDC which answers it. The table shows the share of right answers to",
        f"{measured['num_items']} test questions about {measured['num_diseases']} diseases. No training row "
        "of this expert names one of",
        "them; the anti-expert's own training text included some. Brackets contain a 95 % bootstrap",
        "interval over diseases. Always answering with the most frequent area is right in "
        f"{measured['most_frequent']:.1%}.",
        f"The best alpha was chosen on {measured['num_valid_items']} validation questions about other "
        "diseases.",
        "",
        "| base | anti-expert | expert alone | steered, alpha 1 | against base | "
        f"steered, alpha {measured['best_alpha']:g} |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| {measured['base']} | {measured['anti_expert']} | {measured['expert']} | {measured['steered']} | "
        f"{measured['change']} | {measured['steered_at_best']} |",
        "",
        f"Steered at alpha 1 by the experts of seeds {', '.join(map(str, SEEDS))}: "
        f"{', '.join(measured['seeds'])}.",
        "",
        "Right answers on validation questions by alpha:",
        "",
        "| " + " | ".join(f"{float(alpha):g}" for alpha in strengths) + " |",
        "|" + " ---: |" * len(strengths),
        f"| {shares} |",
        "",
        f"Measured by `zoo/publish.py` on {measured['machine']}, float32, torch {measured['torch']},",
        f"transformers {measured['transformers']}.",
        "",
    ]
