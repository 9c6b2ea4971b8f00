"""What each policy gains on the smol family: one row per policy, for one expert and for five at once.

    python benchmarks/policies.py            about ten minutes; writes docs/performance/policies.json
    python benchmarks/policies.py --table    prints the tables of docs/concepts/policies.md from it

The models read windows of held-out text of five domains once, and every policy is applied to the same logits
at every second token. "One expert" is the domain's own; "five experts" are those of all five domains, and
nothing says which of them is right. Each policy's strength is picked on validation windows of all domains
together, and its results are from test windows. Intervals are 95 % bootstraps over test windows, paired with
what is compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Python puts this script's folder first, from which siblings can be imported but not their package.
sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.smol_texts import OWN_EXPERTS, RECIPE, ROOT, WINDOW, passages, write  # noqa: E402
from proxytune.decode.ensemble import Pair  # noqa: E402
from proxytune.logits.rules import apply_policy, has_conflict  # noqa: E402
from proxytune.logits.steer import Contribution, combine  # noqa: E402
from proxytune.measure.score import needed_members, passage_logits, token_losses  # noqa: E402
from proxytune.model import ProxyTuned  # noqa: E402
from proxytune.policy import Policy  # noqa: E402

OUTPUT = ROOT / "docs" / "performance" / "policies.json"
STRIDE = 2
SLICE = 8
NUM_RESAMPLES = 2000
ONE_ALPHAS = (0.5, 0.9, 1.3)
FIVE_ALPHAS = (0.2, 0.6, 1.2)

ONE = {
    "constant": Policy(),
    "kl_match": Policy(name="kl_match"),
    "gate_sure, threshold 0.4": Policy(name="gate_sure"),
    "gate_sure, threshold 0.9": Policy(name="gate_sure", threshold=0.9),
    "gate_agree": Policy(name="gate_agree"),
    "nudge, threshold 0.4": Policy(name="nudge"),
    "clip 1": Policy(clip=1.0),
    "clip 3": Policy(clip=3.0),
    "plausibility 0.1, left": Policy(plausibility=0.1, implausible="leave"),
    "plausibility 0.001, left": Policy(plausibility=0.001, implausible="leave"),
    "plausibility 0.1, excluded": Policy(plausibility=0.1),
    "schedule, warm-up over 64": Policy(schedule=((0, 0.0), (64, 1.0))),
    "schedule, fade-out over 64": Policy(schedule=((0, 1.0), (64, 0.0))),
}
FIVE = {
    "sum": Policy(),
    "inverse_entropy": Policy("inverse_entropy"),
    "sign_agreement": Policy("sign_agreement"),
    "majority": Policy("majority"),
    "route_entropy": Policy("route_entropy"),
    "route_base": Policy("route_base"),
    "union": Policy("union"),
    "intersection": Policy("intersection"),
    "kl_match": Policy(name="kl_match"),
}
Key = tuple[str, str, float]
"""Group (`one` or `five`), policy, strength."""


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(
    model: ProxyTuned, domain: str, split: str, count: int, seconds: dict[str, list[float]]
) -> tuple[dict[Key, list[float]], list[float], list[float]]:
    """Return each window's summed losses, of every policy and of the base, and its number of conflicts."""
    ensemble = model.ensemble
    pairs = {pair.name: pair for pair in ensemble.pairs}
    five = [pairs[name] for name in OWN_EXPERTS.values()]
    own = pairs[OWN_EXPERTS[domain]]
    needed = needed_members(five)
    padding = ensemble.vocabulary.padding_ids
    sums: dict[Key, list[float]] = defaultdict(list)
    base_sums, conflicts = [], []
    for passage in passages(model, domain, split, count):
        targets = torch.tensor(passage.token_ids)
        totals: dict[Key, float] = defaultdict(float)
        base_total = conflict_total = 0.0
        for first, logits in passage_logits(ensemble, passage, needed):
            places = [p for p in range(len(logits[0])) if (first + p) % STRIDE == 0]
            for start in range(0, len(places), SLICE):
                part = places[start : start + SLICE]
                positions = torch.tensor([first + p for p in part])
                wanted = targets[positions]
                base = logits[0][part].float()
                base_total += float(token_losses(base, wanted, padding).sum())

                def contributions(
                    chosen: list[Pair],
                    alpha: float,
                    logits: dict[int, torch.Tensor] = logits,
                    part: list[int] = part,
                ) -> list[Contribution]:
                    return [
                        Contribution(logits[p.expert][part], logits[p.anti_expert][part], alpha)
                        for p in chosen
                    ]

                for group, policies, chosen, alphas in (
                    ("one", ONE, [own], ONE_ALPHAS),
                    ("five", FIVE, five, FIVE_ALPHAS),
                ):
                    for name, policy in policies.items():
                        weights = None
                        if policy.name == "kl_match":
                            # Its weights do not depend on the strength, which only multiplies them.
                            begun = time.perf_counter()
                            weights = apply_policy(
                                policy, base, contributions(chosen, 1.0), padding_ids=padding
                            ).weights
                            seconds[f"{group}.{name}"].append(
                                (time.perf_counter() - begun) / len(part)
                            )
                        for alpha in alphas:
                            if weights is not None:
                                given = contributions(chosen, alpha)
                                steered = combine(
                                    base,
                                    [
                                        each._replace(alpha=alpha * weight)
                                        for each, weight in zip(given, weights, strict=True)
                                    ],
                                )
                                losses = token_losses(steered, wanted, padding)
                                totals[group, name, alpha] += float(losses.sum())
                                continue
                            begun = time.perf_counter()
                            steered = apply_policy(
                                policy,
                                base,
                                contributions(chosen, alpha),
                                positions=positions,
                                padding_ids=padding,
                            ).logits
                            seconds[f"{group}.{name}"].append(
                                (time.perf_counter() - begun) / len(part)
                            )
                            losses = token_losses(steered, wanted, padding)
                            totals[group, name, alpha] += float(losses.sum())
                conflict_total += float(has_conflict(base, contributions(five, 0.9)).sum())
        for key, total in totals.items():
            sums[key].append(total)
        base_sums.append(base_total)
        conflicts.append(conflict_total)
    return sums, base_sums, conflicts


def compared(
    losses: np.ndarray, others: np.ndarray, tokens: int
) -> dict[str, float | list[float] | None]:
    """Return the relative change of perplexity with its interval; arguments are sums by window."""
    if not np.isfinite(losses).all():
        return {"change": None, "interval": None}
    differences = (losses - others) / tokens
    picks = np.random.default_rng(0).integers(0, len(losses), (NUM_RESAMPLES, len(losses)))
    low, high = np.expm1(np.percentile(differences[picks].mean(1), [2.5, 97.5]))
    return {"change": float(np.expm1(differences.mean())), "interval": [float(low), float(high)]}


def rows_of(
    group: str,
    names: list[str],
    alphas: tuple[float, ...],
    valid: dict[str, dict[Key, list[float]]],
    test: dict[str, dict[Key, list[float]]],
    base: dict[str, list[float]],
    published: np.ndarray | None,
    tokens: int,
    seconds: dict[str, list[float]],
) -> list[dict[str, Any]]:
    """Return a group's rows: the picked strength, the change against the base and against another row."""
    domains = list(test)
    base_sums = np.concatenate([base[domain] for domain in domains])
    found = []
    for name in names:
        totals = [sum(sum(valid[d][group, name, alpha]) for d in domains) for alpha in alphas]
        best = alphas[int(np.argmin(totals))]
        losses = np.concatenate([test[d][group, name, best] for d in domains])
        excluded = None
        if not np.isfinite(losses).all():
            excluded = int((~np.isfinite(losses)).sum())
        if published is None:
            published = losses  # The first row is the published method.
        found.append(
            {
                "policy": name,
                "alpha": best if excluded is None else None,
                "against_base": compared(losses, base_sums, tokens),
                "against_constant": compared(losses, published, tokens),
                "by_domain": {
                    d: compared(np.array(test[d][group, name, best]), np.array(base[d]), tokens)[
                        "change"
                    ]
                    for d in domains
                },
                "windows_with_excluded_text": excluded,
                "arithmetic_ms_per_token": 1000 * float(np.median(seconds[f"{group}.{name}"])),
            }
        )
    return found


def table(content: dict[str, Any], group: str) -> str:
    """Return a Markdown table of a group."""
    other = "the constant policy" if group == "one" else "the right expert alone"
    lines = [
        f"| policy | alpha | perplexity against the base | against {other} | arithmetic, ms/token |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]

    def text(found: dict[str, Any]) -> str:
        if found["change"] is None:
            return "infinite"
        low, high = found["interval"]
        return f"{found['change']:+.1%} ({low:+.1%} to {high:+.1%})"

    for row in content[group]:
        alpha = "" if row["alpha"] is None else f"{row['alpha']:g}"
        compared_with = "" if row["policy"] == "constant" else text(row["against_constant"])
        lines.append(
            f"| {row['policy']} | {alpha} | {text(row['against_base'])} | "
            f"{compared_with} | {row['arithmetic_ms_per_token']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each policy gives on the smol family.")
    parser.add_argument(
        "--valid-windows", type=int, default=2, help=f"a domain, of {WINDOW} tokens"
    )
    parser.add_argument("--test-windows", type=int, default=4, help=f"a domain, of {WINDOW} tokens")
    parser.add_argument("--domains", nargs="*", default=list(OWN_EXPERTS), choices=OWN_EXPERTS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--table", action="store_true", help="print the tables of a finished run")
    options = parser.parse_args()
    if options.table:
        content = json.loads(options.output.read_text())
        print(table(content, "one"), table(content, "five"), sep="\n\n")
        return
    started = time.perf_counter()
    model = ProxyTuned.load(RECIPE, experts=tuple(OWN_EXPERTS.values()))
    seconds: dict[str, list[float]] = defaultdict(list)
    valid, test, base, conflicts = {}, {}, {}, {}
    for domain in options.domains:
        valid[domain], _, _ = measure(model, domain, "valid", options.valid_windows, seconds)
        test[domain], base[domain], conflicts[domain] = measure(
            model, domain, "test", options.test_windows, seconds
        )
        tell(f"{domain}: {time.perf_counter() - started:.0f} s")
    tokens = len(range(0, WINDOW - 1, STRIDE))
    one = rows_of("one", list(ONE), ONE_ALPHAS, valid, test, base, None, tokens, seconds)
    right = np.concatenate([test[d]["one", "constant", one[0]["alpha"]] for d in options.domains])
    five = rows_of("five", list(FIVE), FIVE_ALPHAS, valid, test, base, right, tokens, seconds)
    write(
        options.output,
        "python benchmarks/policies.py",
        {
            "domains": options.domains,
            "test_windows": options.test_windows,
            "tokens_per_window": tokens,
            "valid_windows": options.valid_windows,
            "seconds": round(time.perf_counter() - started),
            "conflict_rate": {
                domain: sum(found) / (tokens * options.test_windows)
                for domain, found in conflicts.items()
            },
            "one": one,
            "five": five,
        },
    )


if __name__ == "__main__":
    main()
