"""How well `proxytune rank-experts` predicts: the smol family's experts on eight domains.

    python benchmarks/rank_experts.py      about ten minutes; writes docs/performance/rank_experts.json
    python benchmarks/rank_experts.py --table  prints its table

A sample of each domain's validation text gives every expert an expected benefit. It is compared with two
measurements on text that the ranking has not seen: (1) the expert's benefit on the test split, in nats per
token; (2) how much closer, in chrF, its greedy continuations of test texts come to the true ones, at the
strength that the ranking recommends. Spearman's rank correlation is taken over the experts of each domain and
averaged over domains, and also over all pairs of expert and domain.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# Python puts this script's folder first, from which siblings can be imported but not their package.
sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.rank_correlation import rank_correlation  # noqa: E402
from benchmarks.smol_texts import (  # noqa: E402
    DOMAINS,
    RECIPE,
    ROOT,
    WINDOW,
    passages,
    token_windows,
    write,
)
from proxytune.measure.branch import branch  # noqa: E402
from proxytune.measure.metrics import chrf  # noqa: E402
from proxytune.measure.rank import (  # noqa: E402
    ALPHAS,
    Ranking,
    Sums,
    candidate_sums,
    summarise,
)
from proxytune.model import ProxyTuned  # noqa: E402
from proxytune.request import SamplingParams  # noqa: E402

OUTPUT = ROOT / "docs" / "performance" / "rank_experts.json"
PROMPT_TOKENS = 32
NEW_TOKENS = 24


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def by_name(ranking: Ranking, names: list[str], key: str) -> list[float]:
    """Return one number per candidate, in the order of the names."""
    found = {candidate.name: float(getattr(candidate, key)) for candidate in ranking.candidates}
    return [found[name] for name in names]


def benefit_at(sums: Sums, alphas: list[float]) -> list[float]:
    """Return the nats per token that each candidate saves, each at its own strength."""
    tried = [0.0, *ALPHAS]
    saved = []
    for which, alpha in enumerate(alphas):
        place = tried.index(alpha)
        losses = sums.base if place == 0 else sums.steered[which, place]
        saved.append(float((sums.base - losses).sum() / sums.lengths.sum()))
    return saved


def chrf_gains(model: ProxyTuned, domain: str, count: int, alphas: list[float]) -> list[float]:
    """Return how much closer each candidate's greedy continuations come to the true ones than the base's."""
    ensemble = model.ensemble
    num_pairs = len(ensemble.pairs)
    points = [(0.0,) * num_pairs] + [
        tuple(alpha if pair == which else 0.0 for pair in range(num_pairs))
        for which, alpha in enumerate(alphas)
    ]
    texts = token_windows(model, domain, "test", count)
    prompts = [[ids[:PROMPT_TOKENS]] * len(ensemble.members) for ids in texts]
    # All models of the smol family share the base's tokens.
    assert all(member.alignment.small_ids is None for member in ensemble.members)
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    written = branch(ensemble, prompts, points, sampling, batch_size=count)
    scores = np.zeros(len(points))
    for ids, found in zip(texts, written.texts, strict=True):
        wanted = model.tokenizer.decode(ids[PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS])
        scores += [chrf(text, wanted) for text in found]
    scores /= len(texts)
    return [float(score - scores[0]) for score in scores[1:]]


def correlations(
    rows: list[dict[str, Any]], predictor: str, outcome: str
) -> dict[str, float | None]:
    """Return the mean over domains, the lowest and highest domain, and the correlation of all pairs."""
    found = [rank_correlation(row[predictor], row[outcome]) for row in rows]
    known = [value for value in found if not math.isnan(value)]
    pooled = rank_correlation(
        [value for row in rows for value in row[predictor]],
        [value for row in rows for value in row[outcome]],
    )
    return {
        "mean": sum(known) / len(known) if known else None,
        "lowest": min(known, default=None),
        "highest": max(known, default=None),
        "pooled": pooled,
        "num_domains": len(known),
    }


def table(content: dict[str, Any]) -> str:
    """Return the Markdown table of a measurement."""

    def text(found: dict[str, Any]) -> str:
        return f"{found['mean']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})"

    count = len(content["domains"])
    lines = [
        "| sample, tokens | by benefit | by gain | by slope | all pairs, by benefit | first is the best "
        "| nats lost by taking the first |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for tokens, found in content["by_sample_tokens"].items():
        lines.append(
            f"| {int(tokens):,} | {text(found['benefit'])} | {text(found['gain'])} | "
            f"{text(found['slope'])} | {found['benefit']['pooled']:.2f} | "
            f"{found['first_is_best']} of {count} | {found['mean_regret']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="How well rank-experts predicts.")
    parser.add_argument("--table", action="store_true", help="print the table of a finished run")
    parser.add_argument("--sample-windows", type=int, default=8, help=f"of {WINDOW} tokens")
    parser.add_argument("--test-windows", type=int, default=8, help=f"of {WINDOW} tokens")
    parser.add_argument("--prompts", type=int, default=6, help="continued; 0 leaves that out")
    parser.add_argument("--domains", nargs="*", default=list(DOMAINS), choices=DOMAINS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.output.read_text())))
        return
    started = time.perf_counter()
    model = ProxyTuned.load(RECIPE)
    names = [pair.name for pair in model.ensemble.pairs]
    sizes = sorted({2, 4, options.sample_windows})
    samples: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    rows = []
    for domain in options.domains:
        windows = passages(model, domain, "valid", options.sample_windows)
        sample = candidate_sums(model.ensemble, windows, ALPHAS)
        test = candidate_sums(
            model.ensemble, passages(model, domain, "test", options.test_windows), ALPHAS
        )
        truth = by_name(summarise(names, test, ALPHAS), names, "benefit")
        best = max(0.0, *(max(benefit_at(test, [a] * len(names))) for a in ALPHAS))
        for size in sizes:
            step = options.sample_windows // size
            part = summarise(
                names, sample.take(range(0, options.sample_windows, step)[:size]), ALPHAS
            )
            predicted = by_name(part, names, "benefit")
            recommended = by_name(part, names, "alpha")
            samples[size].append(
                {
                    "benefit": predicted,
                    "gain": by_name(part, names, "gain"),
                    "slope": by_name(part, names, "slope"),
                    "alpha": recommended,
                    "truth": truth,
                    # Against the best expert at its best strength, known only from the test text.
                    "regret": best - benefit_at(test, recommended)[int(np.argmax(predicted))],
                    "first_is_best": int(np.argmax(predicted)) == int(np.argmax(truth)),
                }
            )
        row: dict[str, Any] = {"domain": domain, **samples[sizes[-1]][-1]}
        row["realised"] = benefit_at(test, row["alpha"])
        if options.prompts:
            row["chrf"] = chrf_gains(model, domain, options.prompts, row["alpha"])
        rows.append(row)
        tell(f"{domain}: {time.perf_counter() - started:.0f} s")
        tell("   " + ", ".join(f"{n} {p:+.3f}/{t:+.3f}" for n, p, t in
                               zip(names, row["benefit"], row["truth"], strict=True)))  # fmt: skip
    by_sample = {
        str(size * (WINDOW - 1)): {
            **{key: correlations(found, key, "truth") for key in ("benefit", "gain", "slope")},
            "first_is_best": sum(each["first_is_best"] for each in found),
            "mean_regret": sum(each["regret"] for each in found) / len(found),
        }
        for size, found in samples.items()
    }
    content: dict[str, Any] = {
        "experts": names,
        "window": WINDOW,
        "sample_tokens": options.sample_windows * (WINDOW - 1),
        "test_tokens": options.test_windows * (WINDOW - 1),
        "prompts": options.prompts,
        "seconds": round(time.perf_counter() - started),
        "by_sample_tokens": by_sample,
        "domains": rows,
    }
    if options.prompts:
        content["chrf"] = {
            key: correlations(rows, key, "chrf") for key in ("benefit", "gain", "slope", "truth")
        }
    write(options.output, "python benchmarks/rank_experts.py", content)


if __name__ == "__main__":
    main()
