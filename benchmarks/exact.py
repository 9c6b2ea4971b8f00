"""How often a greedy text depends on its company in each dtype, with and without exact, and what exact costs.

    python benchmarks/exact.py            about an hour; writes docs/performance/exact.json
    python benchmarks/exact.py --only costs    measures a part again: counts or costs
    python benchmarks/exact.py --table    prints the tables of docs/concepts/exactness.md from it

100 prompts of 8 to 64 tokens, 20 from the test text of each of five domains, are continued by the smol
family's base, each steered by its domain's expert. Each text is generated alone, with one thread, and again
in a batch of 8 and with two threads. It counts as parted if one of its tokens differs, and as rounded
otherwise if a logprob does up to there. The cost is the time of the same work with exact and without, which
take turns in every round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

# Python puts this script's folder first, from which siblings can be imported but not their package.
sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.smol_texts import OWN_EXPERTS, RECIPE, ROOT, token_windows, write  # noqa: E402
from proxytune.model import ProxyTuned  # noqa: E402
from proxytune.request import Request, SamplingParams  # noqa: E402
from proxytune.trace import Trace  # noqa: E402

OUTPUT = ROOT / "docs" / "performance" / "exact.json"
DTYPES = ("float32", "bfloat16", "float16")
COST_DTYPES = ("float32", "bfloat16")
RUNS = {"in a batch of 8": (8, 1), "with 2 threads": (1, 2)}
"""Rows and threads of what is compared with a text alone and one thread."""
COSTS: dict[str, tuple[int, int, int, bool]] = {
    # prompt tokens, new tokens, rows, with drafts
    "1 text": (64, 24, 1, False),
    "1 text, with drafts": (64, 24, 1, True),
    "8 texts": (64, 24, 8, False),
    "a prompt of 512 tokens": (512, 1, 1, False),
}


def tell(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def requests(model: ProxyTuned, count: int, num_new: int) -> list[Request]:
    """Return prompts of 8 to 64 tokens, each for the expert of its domain; neighbours differ in both."""
    sampling = SamplingParams(max_new_tokens=num_new, ignore_eos=True, logprobs=2)
    per_domain = count // len(OWN_EXPERTS)
    by_domain = {d: token_windows(model, d, "test", per_domain) for d in OWN_EXPERTS}
    found = []
    for number in range(per_domain):
        for place, (domain, expert) in enumerate(OWN_EXPERTS.items()):
            length = 8 + 7 * ((number * len(OWN_EXPERTS) + place) % 9)
            prompt = by_domain[domain][number][:length]
            found.append(Request(prompt, sampling, experts=expert))
    return found


def compared(traces: list[Trace], alone: list[Trace]) -> dict[str, Any]:
    """Count the texts that parted, and how far apart the two likeliest tokens were there at most."""
    parted, rounded, gaps = 0, 0, []
    for trace, own in zip(traces, alone, strict=True):
        steps = list(zip(trace.steps, own.steps, strict=True))
        place = next((i for i, (a, b) in enumerate(steps) if a.token_id != b.token_id), None)
        before = steps if place is None else steps[: place + 1]
        rounded += any(a.logprob != b.logprob for a, b in before)
        if place is not None:
            parted += 1
            (_, first), (_, second) = steps[place][1].top[:2]
            gaps.append(first - second)
    return {"parted": parted, "rounded_otherwise": rounded, "largest_gap": max(gaps, default=None)}


def counts(dtype: str, exact: bool, count: int, num_new: int) -> dict[str, Any]:
    """Return the counts of one dtype, with exact or without."""
    model = ProxyTuned.load(RECIPE, dtype=dtype, exact=exact)
    asked = requests(model, count, num_new)
    torch.set_num_threads(1)
    alone = model.generate_batch(asked, batch_size=1)
    found = {}
    for name, (rows, threads) in RUNS.items():
        torch.set_num_threads(threads)
        found[name] = compared(model.generate_batch(asked, batch_size=rows), alone)
        tell(f"{dtype}, {mode_of(exact)}, {name}: {found[name]}")
    return found


def mode_of(exact: bool) -> str:
    return "exact" if exact else "default"


def costs(dtype: str, rounds: int) -> dict[str, Any]:
    """Return how many times as long exact takes, per kind of work."""
    torch.set_num_threads(1)
    models = {exact: ProxyTuned.load(RECIPE, dtype=dtype, exact=exact) for exact in (False, True)}
    text = [i for d in OWN_EXPERTS for w in token_windows(models[False], d, "test", 4) for i in w]
    found = {}
    for name, (num_prompt, num_new, rows, drafts) in COSTS.items():
        sampling = SamplingParams(max_new_tokens=num_new, ignore_eos=True)
        asked = [
            Request(text[97 * row : 97 * row + num_prompt], sampling, experts=expert)
            for row, expert in enumerate((list(OWN_EXPERTS.values()) * 2)[:rows])
        ]
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(rounds + 1):
            for exact in (False, True) if turn % 2 else (True, False):
                begun = time.perf_counter()
                models[exact].generate_batch(asked, batch_size=rows, speculative=drafts)
                seconds[exact].append(time.perf_counter() - begun)
        ratios = [b / a for a, b in zip(seconds[False][1:], seconds[True][1:], strict=True)]
        found[name] = {
            "ratio": statistics.median(ratios),
            "from": min(ratios),
            "to": max(ratios),
            "default_s": statistics.median(seconds[False][1:]),
            "exact_s": statistics.median(seconds[True][1:]),
        }
        tell(f"{dtype}, {name}: {found[name]}")
    return found


def tables(result: dict[str, Any]) -> str:
    """Return the counts and the costs as Markdown."""
    lines = [f"| dtype | | {' | '.join(RUNS)} |", "| --- | --- |" + " ---: |" * len(RUNS)]
    for dtype, found in result["counts"].items():
        for mode, runs in found.items():
            cells = [
                f"{runs[name]['parted']} ({runs[name]['rounded_otherwise']})"
                if name in runs
                else "not measured"
                for name in RUNS
            ]
            lines.append(f"| {dtype} | {mode} | {' | '.join(cells)} |")
    lines += ["", f"| work | {' | '.join(result['costs'])} |"]
    lines += ["| --- |" + " ---: |" * len(result["costs"])]
    for name in COSTS:
        cells = [
            f"{one[name]['ratio']:.2f} ({one[name]['from']:.2f} to {one[name]['to']:.2f})"
            for one in result["costs"].values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the tables of the last run")
    parser.add_argument("--only", choices=("counts", "costs"), help="measure a part again")
    parser.add_argument("--prompts", type=int, default=100, help="a multiple of 5")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--modes", default="default,exact", help="what to count")
    parser.add_argument("--note", default="nothing else ran", help="what else the machine did")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    if set(args.modes.split(",")) - {"default", "exact"}:
        parser.error("--modes holds default, exact, or both with a comma between")
    result: dict[str, Any] = {"counts": {}, "costs": {}}
    if args.table or args.only:
        result = json.loads(args.output.read_text("utf-8"))
    if args.table:
        print(tables(result))
        return
    result |= {"torch": torch.__version__, "note": args.note}
    command = "python benchmarks/exact.py"
    if args.only != "counts":
        result |= {"rounds": args.rounds, "costs": {}}
        for dtype in COST_DTYPES:
            result["costs"][dtype] = costs(dtype, args.rounds)
            write(args.output, command, result)
    if args.only != "costs":
        result |= {"prompts": args.prompts, "new_tokens": args.new_tokens}
        for dtype in args.dtypes.split(","):
            for mode in args.modes.split(","):
                found = result["counts"].setdefault(dtype, {})
                found[mode] = counts(dtype, mode == "exact", args.prompts, args.new_tokens)
                write(args.output, command, result)
    print(tables(result))


if __name__ == "__main__":
    main()
