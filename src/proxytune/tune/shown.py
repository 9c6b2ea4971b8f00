"""What a base behind an API shows of its distribution on a data set: asked for once, kept on disk.

An API shows the logprobs of a few tokens at each position, where a base that runs here gives all of them.
`loss.py` compares the anti-expert with these tokens, and with all others as one.

A file `shown.jsonl` holds a data set: a line with its key, then a line for each example, in the order in
which the answers came. Calls cost time and money, so a run that was stopped asks only for what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from proxytune.backends.api.backend import ApiBackend
from proxytune.backends.api.client import Budget
from proxytune.backends.api.positions import ApiRow, ApiState
from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.errors import UnsupportedModel
from proxytune.files import append, write_whole
from proxytune.recipe.spec import ModelSpec
from proxytune.tune.encode import Encoded, Example
from proxytune.tune.heads import ShownPart
from proxytune.tune.offsets import HINT, kept_directory, kept_positions, offsets_key
from proxytune.tune.settings import Display, TuneSettings

FILE_NAME = "shown.jsonl"


@dataclass(frozen=True, slots=True)
class Shown:
    """What a base shows at the trained positions of each example.

    Args:
        positions: For each example a list with, for each position, token ids and their logprobs in nats.
    """

    positions: Sequence[Sequence[tuple[list[int], list[float]]]]

    def part(self, indices: Sequence[int], device: torch.device | str) -> ShownPart:
        """Return what `loss.divergence` needs at the trained positions of some examples, in order."""
        rows = [position for index in indices for position in self.positions[index]]
        width = max((len(token_ids) for token_ids, _ in rows), default=0)
        ids = torch.zeros(len(rows), max(width, 1), dtype=torch.long)
        logprobs = torch.full(ids.shape, -torch.inf)
        for row, (token_ids, values) in enumerate(rows):
            ids[row, : len(token_ids)] = torch.tensor(token_ids, dtype=torch.long)
            logprobs[row, : len(values)] = torch.tensor(values)
        return ShownPart(ids.to(device), logprobs.to(device))


@dataclass(frozen=True, slots=True)
class ShownBase:
    """What calibration to a base behind an API adds to the loss.

    Args:
        train: What it shows on the training examples.
        valid: The same on the validation examples.
    """

    train: Shown
    valid: Shown | None

    def part(
        self, indices: Sequence[int], device: torch.device | str, *, training: bool
    ) -> ShownPart:
        """Return what the base shows at the trained positions of some examples, in order."""
        shown = self.train if training else self.valid
        assert shown is not None
        return shown.part(indices, device)


def ask_base(
    settings: TuneSettings,
    spec: ModelSpec,
    small: Checkpoint,
    encoded: Mapping[str, Encoded],
    display: Display,
) -> ShownBase:
    """Ask a base behind an API about all examples, or reuse what an earlier run was answered.

    Args:
        settings: The run's settings.
        spec: The base.
        small: The model that is tuned, whose tokenizer stands for the base's.
        encoded: Examples by `train` and, with validation, `valid`.
        display: Shows progress.

    Raises:
        UnsupportedModel: The server does not score a given text in one call, or shows no logprobs.
        ApiError: The server cannot be reached, or gave no good answer.
        BudgetSpent: The calls that are allowed are spent; the answers are kept.
    """
    api = spec.api
    assert api is not None
    budget = Budget(settings.max_calls, None)
    with closing(ApiBackend.load(spec, small, budget=budget, key_env=settings.key_env)) as base:
        if not base.can_score:
            count = sum(part.num_trained for part in encoded.values())
            raise UnsupportedModel(
                f"{base.name} does not score a given text, and each of the {count:,} trained tokens would "
                "cost a call.\nhint: the servers of vLLM and llama-cpp-python score texts; --no-calibrate "
                "asks the base nothing"
            )
        shown = {}
        for name, part in encoded.items():
            examples = [e for e in part.examples if isinstance(e, Example)]
            # How much it shows belongs to what the answers are.
            who = json.dumps([spec.model, api.model, base.server.top_logprobs])
            key = offsets_key(examples, who, small.name, "")
            folder = settings.offsets_dir or settings.training / "offsets"
            shown[name] = _asked(
                kept_directory(folder, f"shown-{name}", key) / FILE_NAME,
                examples,
                base,
                key=key,
                num_threads=api.max_concurrency,
                advance=partial(display.stage, f"asking the base about {name} rows"),
            )
        usage = base.client.usage
        if usage.num_calls:
            display.say(
                f"the base was asked in {usage.num_calls:,} calls with {usage.num_prompt_tokens:,} tokens of "
                f"prompts; it shows {base.server.top_logprobs} tokens at each position"
            )
    return ShownBase(shown["train"], shown.get("valid"))


def _asked(
    path: Path,
    examples: Sequence[Example],
    base: ApiBackend,
    *,
    key: str,
    num_threads: int,
    advance: Callable[[int, int], None],
) -> Shown:
    found = _read(path, key)
    missing = [index for index in range(len(examples)) if index not in found]
    if missing:
        # Written anew, since the last line may have been cut off.
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"key": key}, *({"example": i, "positions": p} for i, p in found.items())]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    advance(len(found), len(examples))
    with ThreadPoolExecutor(num_threads) as pool:
        futures = {pool.submit(_positions, base, examples[index]): index for index in missing}
        try:
            for future in as_completed(futures):
                index = futures[future]
                found[index] = future.result()
                line = {"example": index, "positions": found[index]}
                append(path, json.dumps(line) + "\n", hint=HINT)
                advance(len(found), len(examples))
        except BaseException:
            for future in futures:
                future.cancel()
            base.client.give_up()
            raise
    return Shown([found[index] for index in range(len(examples))])


def _positions(base: ApiBackend, example: Example) -> list[tuple[list[int], list[float]]]:
    """Return what the base shows at the trained positions of an example, in one call.

    A server shows nothing before the second token, so that the first of a text teaches nothing.
    """
    kept = kept_positions(example)
    if not kept:
        return []
    first = max(kept[0], 1)
    row = ApiRow(example.token_ids[:first], example.token_ids[:first], is_scored=True)
    state = ApiState([row])
    rest = example.token_ids[first : kept[-1] + 1]
    if rest:
        base.extend(state, torch.tensor([rest]))
    found = []
    for place in kept:
        known = row.known(place + 1) if place >= first else None
        found.append(([], []) if known is None else (known.token_ids, known.logprobs))
    return found


def _read(path: Path, key: str) -> dict[int, Any]:
    """Return the answers that an earlier run of this key left, up to a line that was cut off."""
    found: dict[int, Any] = {}
    with suppress(OSError, ValueError, KeyError, TypeError), path.open(encoding="utf-8") as lines:
        if json.loads(next(lines, "{}"))["key"] != key:
            return {}
        for line in lines:
            row = json.loads(line)
            found[row["example"]] = row["positions"]
    return found
