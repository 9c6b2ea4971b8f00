"""Measure plain (not speculative) steered decoding against the base alone.

    python benchmarks/plain_decoding.py package:proxytune/smol

Three things are timed in turn, round after round in one run, so that a machine's moods fall on all of them:
the base alone (strength 0, where the experts do not run), the steered base, and the forwards of expert and
anti-expert alone over the same tokens. The steered base cannot beat

    limit = t_base / (t_base + t_pair)

of the base's speed; "of limit" says how much of that it reaches. Times are of decoding only, per new token,
after the first one has come.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from proxytune.errors import UserError
from proxytune.model import ProxyTuned
from proxytune.request import Request, SamplingParams

PROMPT = "The captain looked out over the grey water and said that before the week was over they would all"


def time_generation(model: ProxyTuned, request: Request) -> tuple[float, list[int]]:
    """Return seconds per new token, prefill left out, and the token ids."""
    steps = model.stream(request)
    token_ids = [next(steps).token_id]
    started = time.perf_counter()
    token_ids += [step.token_id for step in steps]
    return (time.perf_counter() - started) / (len(token_ids) - 1), token_ids


def time_pair(model: ProxyTuned, request: Request, token_ids: Sequence[int]) -> float:
    """Return seconds per token of the experts' forwards alone; rows that share weights run together."""
    ensemble, job = model.ensemble, model.job(request)
    used = [pair for pair, alpha in zip(ensemble.pairs, job.alphas, strict=True) if alpha != 0]
    indices = sorted({index for pair in used for index in (pair.expert, pair.anti_expert)} - {0})
    runs = []
    for backend in {
        id(ensemble.members[i].backend): ensemble.members[i].backend for i in indices
    }.values():
        rows = [i for i in indices if ensemble.members[i].backend is backend]
        prompts = [job.prompts[i] for i in rows]
        adapters = [ensemble.members[i].adapter for i in rows]
        state = backend.prefill(prompts, adapters=adapters).state
        tokens = torch.tensor(token_ids)
        inputs = torch.stack(
            [ensemble.members[i].alignment.ids_to_small(tokens) for i in rows], dim=1
        )
        runs.append((backend, state, inputs))
    logits = None
    started = time.perf_counter()
    for position in range(len(token_ids) - 1):
        for backend, state, inputs in runs:
            logits = backend.decode(state, inputs[position])
    if logits is not None:
        logits.sum().item()  # waits for an accelerator to end
    return (time.perf_counter() - started) / (len(token_ids) - 1)


def measure(
    model: ProxyTuned, *, rounds: int, new_tokens: int, expert: str | None
) -> dict[str, Any]:
    """Time base, steered base and experts in alternation; the first round warms up and is not counted."""
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    steered = Request(PROMPT, sampling, experts=expert)
    base = Request(PROMPT, sampling, experts=expert, alpha=0.0)
    times: dict[str, list[float]] = {"base": [], "steered": [], "pair": []}
    for round_ in range(rounds + 1):
        seconds_steered, token_ids = time_generation(model, steered)
        seconds_pair = time_pair(model, steered, token_ids)
        seconds_base, _ = time_generation(model, base)
        print(f"round {round_}/{rounds}" + (" (warm-up)" if round_ == 0 else ""), file=sys.stderr)
        if round_ > 0:
            times["base"].append(seconds_base)
            times["steered"].append(seconds_steered)
            times["pair"].append(seconds_pair)
    ratios = [base / steered for base, steered in zip(times["base"], times["steered"], strict=True)]
    limits = [base / (base + pair) for base, pair in zip(times["base"], times["pair"], strict=True)]
    shares = [ratio / limit for ratio, limit in zip(ratios, limits, strict=True)]
    return {
        **{f"{name}_s_per_token": statistics.median(values) for name, values in times.items()},
        "ratio": statistics.median(ratios),
        "limit": statistics.median(limits),
        "of_limit": statistics.median(shares),
        "of_limit_range": [min(shares), max(shares)],
        "rounds": rounds,
        "new_tokens": new_tokens,
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Steered decoding against the base alone.")
    parser.add_argument("recipe", nargs="?", default="package:proxytune/smol")
    parser.add_argument("--expert", help="which expert steers [default: the recipe's]")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds [default: 5]")
    parser.add_argument("--new-tokens", type=int, default=64, help="per generation [default: 64]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.new_tokens < 2:
        parser.error("--rounds must be at least 1 and --new-tokens at least 2")
    try:
        model = ProxyTuned.load(arguments.recipe)
        result = measure(
            model, rounds=arguments.rounds, new_tokens=arguments.new_tokens, expert=arguments.expert
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps({"recipe": arguments.recipe, **result}))
        return 0
    print(f"{'base alone':24}{result['base_s_per_token'] * 1e3:9.2f} ms per token")
    print(f"{'expert and anti-expert':24}{result['pair_s_per_token'] * 1e3:9.2f} ms per token")
    print(f"{'steered':24}{result['steered_s_per_token'] * 1e3:9.2f} ms per token")
    print(f"{'speed, base = 1':24}{result['ratio']:9.3f}")
    print(f"{'limit':24}{result['limit']:9.3f}")
    low, high = result["of_limit_range"]
    print(f"{'of limit':24}{result['of_limit']:9.3f} (rounds: {low:.3f} to {high:.3f})")
    print(
        f"medians of {result['rounds']} rounds of {result['new_tokens']} tokens, "
        f"{result['num_threads']} threads, torch {result['torch']}, "
        f"transformers {result['transformers']}, {result['machine']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
