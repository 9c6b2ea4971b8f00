"""How far a reward changes how a small model writes, and how far the base steered by it follows.

    python -m benchmarks.reward --seeds 0 1 2 --output benchmarks/build/reward

The property is one that an instruction could ask for: words in lower case, without capitals or digits. The
expert starts as the untuned small model, which is also the anti-expert. It is shown no answer, but learns
from the reward of its own ones. The prompts are LLaMA-Factory's alpaca_en_demo, split by digest. Strength 1
throughout, greedy answers. Every printed line is a JSON object: a model, the share of its answers to the
test prompts that have the property, and the interval; then a few answers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.miniature.data import INSTRUCTION_PROMPT, alpaca_rows, instruction_of
from benchmarks.miniature.plan import ANTI_EXPERT, BASE
from proxytune import SamplingParams
from proxytune.data.rows import read_rows
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Prompt
from proxytune.tune import Display, TuneSettings, tune
from proxytune.tune.reward_scores import measure_rewards
from proxytune.tune.rewards import Reward

PROPERTY = r"regex:^[a-z][^A-Z0-9]+$"
NEW_TOKENS = 24
TEST_SHARE, NOT_TRAINED = 0.3, 0.35
"""Shares of the prompts: those of the test split, and those with the validation split's."""
NUM_SHOWN = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    write_prompts(options.output)
    for seed in options.seeds:
        adapter, seconds = trained(seed, options)
        measure(seed, adapter, options.output, seconds)


def worth(prompt: Prompt, answer: str, row: Mapping[str, Any]) -> float:
    """Return 1 for words in lower case, less for each other character, 0 if most are no letters at all.

    The untuned small model draws an answer with the property twice in a hundred times. A reward for that
    alone would mostly be 0 for all answers to a prompt, which teaches nothing.
    """
    others = sum(not (letter.islower() or letter in " .,;:'-") for letter in answer)
    letters = sum(letter.islower() for letter in answer)
    return 1 / (1 + others) if 2 * letters > len(answer) else 0.0


def write_prompts(output: Path) -> None:
    """Write the prompts of each split."""
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for row in alpaca_rows():
        instruction = instruction_of(row)
        place = hashlib.sha1(instruction.encode()).digest()[0] / 256
        split = "test" if place < TEST_SHARE else "valid" if place < NOT_TRAINED else "train"
        prompt = INSTRUCTION_PROMPT.format(instruction=instruction)
        splits[split].append(json.dumps({"prompt": prompt}))
    for name, lines in splits.items():
        (output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def trained(seed: int, options: argparse.Namespace) -> tuple[str, int | None]:
    """Train by reward or go on with a training, and return the adapter and the seconds of processor time.

    The seconds are None for a training that another process began.
    """
    output = options.output / f"seed-{seed}"
    adapter = str(output / "adapters" / output.name)
    if (output / "training" / "result.json").exists():
        return adapter, None
    is_begun = (output / "training" / "settings.json").exists()
    started = time.process_time()
    tune(
        TuneSettings(
            anti_expert=ANTI_EXPERT,
            data=str(options.output / "train.jsonl"),
            valid_data=str(options.output / "valid.jsonl"),
            test_share=0,
            template="plain",
            output=str(output),
            max_new_tokens=NEW_TOKENS,
            max_steps=options.steps,
            eval_every=20,
            patience=0,
            learning_rate=options.learning_rate,
            batch_size=8,
            group_size=8,
            max_valid_tokens=1500,
            measure_tokens=0,
            dtype="bfloat16",
            seed=seed,
        ),
        resume=is_begun,
        display=Display(),
        reward=worth,
    )
    return adapter, None if is_begun else round(time.process_time() - started)


def measure(seed: int, adapter: str, output: Path, seconds: int | None) -> None:
    """Print what the answers of base, expert and steered base are worth, and a few of them."""
    small = ModelSpec(model=ANTI_EXPERT, prompt="plain")
    expert = ModelSpec(model=ANTI_EXPERT, adapter=adapter, prompt="plain")
    model = ProxyTuned.load(
        Recipe(
            base=ModelSpec(model=BASE, prompt="plain"),
            experts=(ExpertSpec("lower-case", expert, small),),
            directory=Path.cwd(),
        )
    )
    reward = Reward(PROPERTY, limit_s=10)
    rows = read_rows(output / "test.jsonl", for_reward=True)
    found = measure_rewards(
        model, rows, reward, (1.0,), max_new_tokens=NEW_TOKENS, num_tokens=10**9, seed=0
    )
    reward.close()
    for score in found.report.rows:
        print(json.dumps({"seed": seed, "train_s": seconds, **asdict(score)}), flush=True)
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0)
    for row in rows.rows[:NUM_SHOWN]:
        for alpha in (0.0, 1.0):
            text = model.generate(row["prompt"], sampling, alpha=alpha).text
            print(json.dumps({"prompt": row["prompt"], "alpha": alpha, "text": text}), flush=True)


if __name__ == "__main__":
    main()
