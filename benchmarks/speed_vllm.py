"""How fast a recipe is inside vLLM, compared with the base alone and with the cost of its models.

    make bench-vllm                       about twenty minutes on an idle machine
    make bench-vllm ARGS="--smoke"        one short round, into benchmarks/build: shows that it runs

Three engines run in separate processes: the base alone, the pair alone (a recipe whose base is the
anti-expert, so that only expert and anti-expert run), and the recipe. In each round they take turns, in a
changing order, on the same prompts at one concurrency; the others sleep. Medians of ratios within rounds are
reported, with the smallest and the largest ratio.

    floor = t_base / (t_base + t_pair)     the share of the base's throughput that is left

The pair's time includes an engine's fixed cost per step. A recipe pays that only once, so steering can beat
the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.machine import summary
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "benchmarks" / "build" / "vllm"
RESULTS = ROOT / "docs" / "performance" / "vllm.json"
CONCURRENCIES = (1, 8, 32)
EXPERT = "tinyshakespeare"
NEW_TOKENS = 64
TEXTS_PER_ROUND = {1: 2, 8: 8, 32: 32}
GOAL = 0.85


class Engine:
    """A vLLM engine in a separate process group, which can be put to sleep.

    Args:
        model: Directory of the model.
    """

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--engine", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={
                **os.environ,
                "VLLM_CPU_KVCACHE_SPACE": "2",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_LOGGING_LEVEL": "ERROR",
                "HF_HUB_OFFLINE": "1",
            },
        )
        self._read()
        self.sleep()

    def _read(self) -> float:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return float(line.split()[1])
        raise RuntimeError("an engine ended; its output is above")

    def sleep(self) -> None:
        """Stop all of its processes: an idle engine polls and takes time from the others."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def seconds(self, prompts: list[str]) -> float:
        """Return the seconds that these prompts take together, with `NEW_TOKENS` new tokens each."""
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.write(json.dumps(prompts) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        self.sleep()
        return answer

    def close(self) -> None:
        """End all of its processes."""
        os.killpg(self._process.pid, signal.SIGCONT)
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def run_engine(model: str) -> None:
    """Answer each line of prompts with the seconds that it took."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=max(CONCURRENCIES),
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    llm.generate(["warm up"] * 4, params, use_tqdm=False)
    print("ANSWER 0", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        llm.generate(json.loads(line), params, use_tqdm=False)
        print("ANSWER", time.perf_counter() - start, flush=True)


def parts() -> dict[str, Path]:
    """Return the directories of base, pair and recipe, the last two written on first use."""
    smol = Recipe.read("package:proxytune/smol")
    expert = next(e for e in smol.experts if e.name == EXPERT)
    steered = replace(smol, experts=(expert,), default_expert=None)
    small = replace(expert.anti_expert, model="package:proxytune/smol/anti-expert")
    tuned = replace(
        expert.expert, model=small.model, adapter=f"package:proxytune/smol/{expert.expert.adapter}"
    )
    # Its anti-expert is its base, whose logits are reused: only two models run.
    pair = Recipe(small, (ExpertSpec(EXPERT, tuned, ModelSpec(same_as="base")),))
    for name, recipe in (("steered", steered), ("pair", pair)):
        recipe.write(BUILD / name, overwrite=True)
    base = find_checkpoint(smol.base.model or "", root=smol.directory).weights_path()
    return {"base": base, "pair": BUILD / "pair", "steered": BUILD / "steered"}


def prompts(count: int, offset: int) -> list[str]:
    """Return different prompts of about sixteen words."""
    texts = sorted((Recipe.read("package:proxytune/smol").directory / "heldout").glob("*.txt"))
    words = [path.read_text(encoding="utf-8").split() for path in texts]
    found = []
    for index in range(offset, offset + count):
        source = words[index % len(words)]
        start = 7 * index % (len(source) - 16)
        found.append(" ".join(source[start : start + 16]))
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Return the median with the smallest and the largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure(engines: dict[str, Engine], concurrency: int, rounds: int) -> dict[str, Any]:
    """Return ratios of throughputs at one concurrency."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    count = TEXTS_PER_ROUND[concurrency]
    for turn in range(rounds + 1):
        asked = prompts(count, offset=turn * count)
        for name in names[turn % 3 :] + names[: turn % 3]:
            batches = [asked[i : i + concurrency] for i in range(0, count, concurrency)]
            seconds = sum(engines[name].seconds(batch) for batch in batches)
            if turn:  # The first round warms up.
                times[name].append(seconds)
        if turn:
            last = ", ".join(f"{name} {times[name][-1]:.2f} s" for name in names)
            print(f"concurrency {concurrency}, round {turn} of {rounds}: {last}", file=sys.stderr)
    rows = list(zip(times["base"], times["pair"], times["steered"], strict=True))
    tokens = count * NEW_TOKENS
    return {
        "concurrency": concurrency,
        "rounds": rounds,
        "tokens_per_s": {name: tokens / statistics.median(own) for name, own in times.items()},
        "steered_over_base": spread([base / steered for base, _, steered in rows]),
        "floor": spread([base / (base + pair) for base, pair, _ in rows]),
        "steered_over_floor": spread([(base + pair) / steered for base, pair, steered in rows]),
    }


def table(report: dict[str, Any]) -> str:
    """Return the measurement as the table of docs/performance.md."""
    lines = [
        "| texts at once | base, tokens/s | steered, tokens/s | of the base | floor | of the floor |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in report["results"]:
        speeds = result["tokens_per_s"]
        ratios = (
            f"{result[key]['median']:.2f} ({result[key]['low']:.2f} to {result[key]['high']:.2f})"
            for key in ("steered_over_base", "floor", "steered_over_floor")
        )
        lines.append(
            f"| {result['concurrency']} | {speeds['base']:.1f} | {speeds['steered']:.1f} | "
            f"{' | '.join(ratios)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="one round, not into docs/performance")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", action="store_true", help="print the table of what was measured")
    parser.add_argument("--engine", metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        run_engine(options.engine)
        return
    if options.table:
        print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))
        return
    import vllm

    rounds = 1 if options.smoke else options.rounds
    engines: dict[str, Engine] = {}
    try:
        for name, model in parts().items():
            engines[name] = Engine(model)
        results = [measure(engines, concurrency, rounds) for concurrency in CONCURRENCIES]
    finally:
        for engine in engines.values():
            engine.close()
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    report = {
        "command": "python benchmarks/speed_vllm.py" + (" --smoke" if options.smoke else ""),
        "commit": commit,
        "vllm": vllm.__version__,
        "machine": summary(),
        "new_tokens": NEW_TOKENS,
        "expert": EXPERT,
        "results": results,
    }
    output = options.output or (BUILD / "smoke.json" if options.smoke else RESULTS)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for result in results:
        ratio = result["steered_over_floor"]
        print(
            f"concurrency {result['concurrency']:2d}: "
            f"steered {result['tokens_per_s']['steered']:.1f} tokens/s, "
            f"base {result['tokens_per_s']['base']:.1f}; {ratio['median']:.2f} of the floor "
            f"({ratio['low']:.2f} to {ratio['high']:.2f}), goal {GOAL}"
        )


if __name__ == "__main__":
    main()
