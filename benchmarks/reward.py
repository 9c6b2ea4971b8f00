"""How far a reward improves an expert that was tuned on given answers, by itself and through the base.

    python -m benchmarks.reward --seeds 0 1 2 --output benchmarks/build/reward

The task is the miniature's: the area of medicine that a question belongs to. The expert is the shipped
`medical-area`, tuned on part of the rows. Training by the reward `exact` goes on from it, on all training
rows; test questions are about other diseases. Strength 1 throughout, so that nothing is chosen. Every printed
line is a JSON object: a model, its share of right answers on the test rows, and the interval.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.miniature.data import corpus_rows, task_items
from benchmarks.miniature.plan import ANTI_EXPERT, BASE
from proxytune.data.rows import read_rows
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.tune import Display, TuneSettings, tune
from proxytune.tune.reward_scores import measure_rewards
from proxytune.tune.rewards import Reward

START = "package:proxytune/smol/adapters/medical-area"
CORPUS = "medical_medquad"
NEW_TOKENS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    # The small model's experts write the right area greedily and hardly ever sampled at temperature 1.
    parser.add_argument("--temperature", type=float, default=0.15)
    parser.add_argument("--most-test", type=int, default=None)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    items = task_items(corpus_rows(CORPUS, "train"), corpus_rows(CORPUS, "test"))
    items["test"] = items["test"][: options.most_test]
    for name, rows in items.items():
        text = "".join(
            json.dumps({"prompt": row["prompt"], "answer": row["completion"]}) + "\n"
            for row in rows
        )
        (options.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    measure("before", START, options.output)
    for seed in options.seeds:
        adapter, seconds = trained(seed, options)
        measure(f"seed {seed}", adapter, options.output, train_s=round(seconds))


def trained(seed: int, options: argparse.Namespace) -> tuple[str, float]:
    """Train by reward, and return the adapter and the seconds of processor time."""
    output = options.output / f"seed-{seed}"
    started = time.process_time()
    tune(
        TuneSettings(
            anti_expert=ANTI_EXPERT,
            start_from=START,
            data=str(options.output / "train.jsonl"),
            valid_data=str(options.output / "valid.jsonl"),
            test_share=0,
            reward="exact",
            template="plain",
            output=str(output),
            max_new_tokens=NEW_TOKENS,
            max_steps=options.steps,
            patience=0,
            learning_rate=options.learning_rate,
            temperature=options.temperature,
            max_valid_tokens=3000,
            measure_tokens=0,
            seed=seed,
        ),
        display=Display(),
    )
    return str(output / "adapters" / output.name), time.process_time() - started


def measure(name: str, adapter: str, output: Path, **more: int) -> None:
    """Print how many test questions base, expert and steered base answer right."""
    small = ModelSpec(model=ANTI_EXPERT, prompt="plain")
    expert = ModelSpec(model=ANTI_EXPERT, adapter=adapter, prompt="plain")
    recipe = Recipe(
        base=ModelSpec(model=BASE, prompt="plain"),
        experts=(ExpertSpec("medical-area", expert, small),),
        directory=Path.cwd(),
    )
    reward = Reward("exact", limit_s=10)
    found = measure_rewards(
        ProxyTuned.load(recipe),
        read_rows(output / "test.jsonl", for_reward=True),
        reward,
        (1.0,),
        max_new_tokens=NEW_TOKENS,
        num_tokens=10**9,
        seed=0,
    )
    reward.close()
    for score in found.report.rows:
        print(json.dumps({"run": name, **asdict(score), **more}), flush=True)


if __name__ == "__main__":
    main()
