"""Every predictor's losses on test text and right answers to test questions, block by block.

A *block* is what the bootstrap draws: consecutive tokens, or questions about one thing. `predict.py` has the
predictors, `summary.py` sums the numbers up.

An answer is right if greedy decoding writes exactly it and then ends the line. That needs no decoding: each
of its tokens has to be the likeliest after the tokens before it, which one forward shows for all of them.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.miniature.bias import fit_no_proxy
from benchmarks.miniature.data import AREAS, read_rows
from benchmarks.miniature.plan import ANTI_EXPERT, BASE, TASK, Plan
from benchmarks.miniature.predict import (
    ALPHAS,
    STEERED,
    NoProxy,
    best_switch,
    is_written,
    predictions,
    steered,
)
from proxytune.backends.transformers.weights import quietly
from proxytune.decode.ensemble import Ensemble
from proxytune.measure.score import (
    BLOCK_TOKENS,
    SLICE_TOKENS,
    batch_logits,
    passage_logits,
    passage_of,
    token_losses,
)
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec

WINDOW = 512
"""Tokens per window of test text."""
BATCH = 16
NUM_SHOTS = 6
VALID_TOKENS = 3_000
"""Tokens of validation text that strengths are chosen on; as many steps of 0.1 or 0.2 differ by less."""


# Models ------------------------------------------------------------------------------------------------


def load(plan: Plan, name: str) -> tuple[ProxyTuned, dict[str, int]]:
    """Return all models of a data set as one ensemble, and the members by the names of `predict.py`.

    A directly tuned base is the expert of a pair whose anti-expert is the base, so one forward per window
    serves every predictor.
    """
    experts = []
    untuned = ModelSpec(same_as="base")
    for kind in plan.kinds(name):
        run = plan.run_path(f"{name}.{kind}")
        model = kind.partition(".")[0].removesuffix("_short")
        if model == "direct":
            adapter = ModelSpec(model=BASE, adapter=str(run / "adapters" / model))
            experts.append(ExpertSpec(kind, adapter, untuned))
            continue
        small = plan.small(kind)
        if model == "cpt":
            expert = ModelSpec(model=small, adapter=str(run / "adapters" / model))
            experts.append(ExpertSpec(kind, expert, ModelSpec(model=small)))
            continue
        anti = ModelSpec(model=small, adapter=str(run / "adapters" / f"{model}-anti-expert"))
        for label, place in pair_experts(run, model).items():
            expert = ModelSpec(model=small, adapter=str(place))
            experts.append(ExpertSpec(f"{kind}{label}".replace(".", "-"), expert, anti))
    first = next(e for e in experts if e.name == "smol")
    plain = ModelSpec(model=ANTI_EXPERT)
    experts.append(ExpertSpec("untuned", first.expert, plain))
    model = ProxyTuned.load(Recipe(base=ModelSpec(model=BASE), experts=tuple(experts)))
    return model, _members(model.ensemble)


def pair_experts(run: Any, model: str) -> dict[str, Any]:
    """Return the experts of a finished pair, by what their names end with.

    A pair that was trained on through the ensemble keeps the expert it had before.
    """
    final = run / "adapters" / model
    before = run / "training" / "pair"
    return {"": before, "_cpt": final} if before.is_dir() else {"": final}


def _members(ensemble: Ensemble) -> dict[str, int]:
    members = {"base": 0}
    for pair in ensemble.pairs:
        name = pair.name.replace("-", ".")
        if name.startswith("direct"):
            members[name] = pair.expert
        elif name == "untuned":
            members["smol.untuned"] = pair.anti_expert
        elif name == "cpt":
            members |= {"cpt.expert": pair.expert, "cpt.untuned": pair.anti_expert}
        else:
            members |= {f"{name}.expert": pair.expert, f"{name}.calibrated": pair.anti_expert}
    return members


def _named(members: Mapping[str, int], logits: Mapping[int, Tensor]) -> dict[str, Tensor]:
    return {name: logits[index] for name, index in members.items()}


# Texts -------------------------------------------------------------------------------------------------


def text_logits(
    ensemble: Ensemble, members: Mapping[str, int], token_ids: Sequence[int]
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield every member's logits for some tokens of a window, and the tokens; the first is not predicted."""
    targets = torch.tensor(token_ids[1:])
    passage = passage_of(ensemble, token_ids[:1], token_ids[1:])
    needed = sorted(set(members.values()))
    for start, chunk in passage_logits(ensemble, passage, needed):
        for first in range(0, len(chunk[0]), SLICE_TOKENS):
            part = {i: rows[first : first + SLICE_TOKENS].cpu() for i, rows in chunk.items()}
            yield _named(members, part), targets[start + first :][: len(part[0])]


def text_losses(
    ensemble: Ensemble,
    members: Mapping[str, int],
    token_ids: Sequence[int],
    alphas: Mapping[str, float],
    no_proxy: NoProxy,
) -> dict[str, np.ndarray]:
    """Return each predictor's negative log-likelihoods, `[len(token_ids) - 1]` nats."""
    padding_ids = ensemble.vocabulary.padding_ids.cpu()
    losses: dict[str, list[np.ndarray]] = defaultdict(list)
    for logits, targets in text_logits(ensemble, members, token_ids):
        for name, rows in predictions(logits, alphas, no_proxy):
            losses[name].append(token_losses(rows, targets, padding_ids))
    return {name: np.concatenate(parts) for name, parts in losses.items()}


def choose_by_text(
    ensemble: Ensemble, members: Mapping[str, int], windows: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Return the strength of each steered predictor with the lowest loss on validation windows."""
    padding_ids = ensemble.vocabulary.padding_ids.cpu()
    sums: dict[tuple[str, float], float] = defaultdict(float)
    for window in windows:
        for logits, targets in text_logits(ensemble, members, window):
            for name in STEERED:
                for alpha in ALPHAS:
                    rows = steered(logits, name, alpha)
                    sums[name, alpha] += float(token_losses(rows, targets, padding_ids).sum())
    return {name: min(ALPHAS, key=lambda alpha: sums[name, alpha]) for name in STEERED}


def in_blocks(losses: np.ndarray) -> tuple[list[float], list[int]]:
    """Return sums and sizes of blocks of consecutive tokens, cut as `score.py` cuts them."""

    num_blocks = max(1, len(losses) // BLOCK_TOKENS)
    starts = np.linspace(0, len(losses), num_blocks + 1).astype(int)[:-1]
    sizes = np.diff([*starts, len(losses)])
    return np.add.reduceat(losses, starts).tolist(), sizes.tolist()


def windows_of(token_ids: Sequence[int], num_windows: int) -> list[list[int]]:
    """Return windows evenly spaced over a text, without overlap."""
    count = min(num_windows, len(token_ids) // WINDOW)
    starts = np.linspace(0, len(token_ids) - WINDOW, count).astype(int)
    return [list(token_ids[s : s + WINDOW]) for s in starts]


def measure_text(
    model: ProxyTuned,
    members: Mapping[str, int],
    texts: Mapping[str, Sequence[int]],
    no_proxy: NoProxy,
    num_windows: int,
    *,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure every predictor on windows of a text, with the strengths chosen on another.

    Args:
        model: All models of the data set.
        members: Their names.
        texts: Token ids of `valid` and `test`.
        no_proxy: Fitted on the training rows.
        num_windows: Maximum number of test windows.
        say: Shows progress.
    """
    ensemble = model.ensemble
    valid = windows_of(texts["valid"], max(1, VALID_TOKENS // WINDOW))
    chosen = choose_by_text(ensemble, members, valid)
    say(f"strengths: {chosen}")
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    windows = windows_of(texts["test"], num_windows)
    for count, window in enumerate(windows, 1):
        for name, losses in text_losses(ensemble, members, window, chosen, no_proxy).items():
            parts[name].append(losses)
        if count % max(1, len(windows) // 4) == 0:
            say(f"test windows: {count} of {len(windows)}")
    blocks = {name: in_blocks(np.concatenate(losses)) for name, losses in parts.items()}
    return {
        "measure": "perplexity",
        "alphas": _shown_alphas(chosen),
        "no_proxy": _shown(no_proxy),
        "num_windows": len(windows),
        "sizes": blocks["base"][1],
        "sums": {name: sums for name, (sums, _) in blocks.items()},
    }


def _shown_alphas(chosen: Mapping[str, float]) -> dict[str, float]:
    return {name: 1.0 for name in chosen} | {f"{n}_best": alpha for n, alpha in chosen.items()}


def _shown(no_proxy: NoProxy) -> dict[str, Any]:
    bias = no_proxy.bias
    return {
        "temperature": 1 / no_proxy.weight,
        "num_bias_ids": 0 if bias is None else int((bias != 0).sum()),
    }


# Tasks -------------------------------------------------------------------------------------------------


def option_ids(tokenizer: Any) -> dict[str, int]:
    """Return the first token of each area's label; they are all different."""
    ids = {label: tokenizer.encode(label, add_special_tokens=False)[0] for label in AREAS.values()}
    assert len(set(ids.values())) == len(ids), f"labels begin alike: {ids}"
    return ids


def ending_ids(tokenizer: Any, ending: Sequence[int], vocab_size: int) -> Tensor:
    """Return `[vocab]` bool: the tokens that end a line, or the text."""
    ends = torch.zeros(vocab_size, dtype=torch.bool)
    ends[list(ending)] = True
    for token_id in range(min(vocab_size, len(tokenizer))):
        if tokenizer.decode([token_id]).startswith("\n"):
            ends[token_id] = True
    return ends


class Judge:
    """Judges answers to a task's items.

    Args:
        options: Token ids that an answer is chosen from, by its first token alone; None for answers that are
            written token by token.
        ends: `[vocab]` bool, tokens that end an answer.
    """

    def __init__(self, options: Sequence[int] | None, ends: Tensor) -> None:
        self._columns = None if options is None else torch.tensor(list(options))
        self._ends = ends

    @property
    def num_positions(self) -> int | None:
        """How many tokens of an answer are judged; None for all."""
        return None if self._columns is None else 1

    def are_right(self, rows: Tensor, targets: Tensor) -> Tensor:
        """Return `[tokens]` bool: whether the likeliest token is the right one.

        In the place of an answer's last token, which ends its line, any that does so is right.
        """
        if self._columns is not None:
            return self._columns[rows[:, self._columns].argmax(-1)] == targets
        best = rows.argmax(-1)
        are_right = best == targets
        are_right[-1] |= self._ends[best[-1]] & self._ends[targets[-1]]
        return are_right

    def logprobs(self, rows: Tensor, targets: Tensor) -> Tensor:
        """Return `[tokens]` log-probabilities of the right tokens, among the options if there are any."""
        if self._columns is not None:
            places = (self._columns[None] == targets[:, None]).int().argmax(-1)
            rows, targets = rows[:, self._columns], places
        return rows.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


Answer = tuple[dict[str, Tensor], Tensor]
"""Every member's logits at the tokens of an answer, `[tokens, vocab]`, and the tokens."""
Written = tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]
"""What `predict.is_written` takes of an answer."""


def answers(
    model: ProxyTuned,
    members: Mapping[str, int],
    items: Sequence[Mapping[str, str]],
    num_positions: int | None,
) -> Iterator[Answer]:
    """Yield the answers of items, in order.

    The token that ends a text is judged only where no line's end stands before it.

    Args:
        model: The models.
        members: Those to run, by name.
        items: Prompts with their completions.
        num_positions: Maximum number of tokens of an answer; None takes all.
    """
    pairs = [(item["prompt"], item["completion"]) for item in items]
    passages = [
        replace(passage, token_ids=judged(passage.token_ids, model.tokenizer)[:num_positions])
        for passage in model.completion_passages(pairs)
    ]
    needed = sorted(set(members.values()))
    for first in range(0, len(passages), BATCH):
        batch = passages[first : first + BATCH]
        longest = max(len(passage.token_ids) for passage in batch)
        chunks = batch_logits(model.ensemble, batch, needed, chunk_tokens=longest)
        parts = [{i: part.cpu() for i, part in logits.items()} for _, logits in chunks]
        whole = {i: torch.cat([part[i] for part in parts], 1) for i in needed}
        for row, passage in enumerate(batch):
            size = len(passage.token_ids)
            logits = {i: part[row, :size] for i, part in whole.items()}
            yield _named(members, logits), torch.tensor(passage.token_ids)


def judged(token_ids: Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """Return an answer's tokens without the one that ends the text, if a line's end stands before it."""
    is_closed = len(token_ids) > 1 and tokenizer.decode([token_ids[-2]]).startswith("\n")
    return tuple(token_ids[:-1] if is_closed else token_ids)


def few_shot_answers(
    model: ProxyTuned,
    items: Sequence[Mapping[str, str]],
    shots: Sequence[Mapping[str, str]],
    num_positions: int | None,
) -> Iterator[Answer]:
    """Yield the base's answers after some examples, which are read once for all items."""
    tokenizer, base = model.tokenizer, model.ensemble.members[0].backend
    eos_id = tokenizer.eos_token_id
    text = "".join(f"{shot['prompt']}{shot['completion'].rstrip()}\n\n" for shot in shots)
    kept, _ = base.prefill([tokenizer.encode(text, add_special_tokens=False)])
    for first in range(0, len(items), BATCH):
        batch = items[first : first + BATCH]
        prompts = [tokenizer.encode(item["prompt"], add_special_tokens=False) for item in batch]
        ends = [
            [*tokenizer.encode(item["completion"], add_special_tokens=False), eos_id][
                :num_positions
            ]
            for item in batch
        ]
        rows = [prompt + end for prompt, end in zip(prompts, ends, strict=True)]
        longest = max(map(len, rows))
        # Padding on the right, which no earlier position sees.
        ids = torch.tensor([row + [eos_id] * (longest - len(row)) for row in rows])
        logits = base.extend(base.copy(kept, [0] * len(rows)), ids[:, :-1]).cpu()
        for row, prompt, end in zip(logits, prompts, ends, strict=True):
            here = slice(len(prompt) - 1, len(prompt) - 1 + len(end))
            yield {"base": row[here]}, torch.tensor(end)


def _written(judge: Judge, answer: Answer) -> Written:
    logits, targets = answer
    base, expert = logits["base"].float(), logits["smol.expert"].float()
    return (
        judge.are_right(expert, targets).numpy(),
        judge.are_right(base, targets).numpy(),
        judge.logprobs(base, targets).double().numpy(),
    )


def choose_by_answers(
    judge: Judge, seen: Iterable[Answer]
) -> tuple[dict[str, float], list[Written]]:
    """Return the best strength of each steered predictor, and what weak-to-strong decoding is judged by.

    The best has the most right answers; ties go to likelier ones.
    """
    quality: dict[tuple[str, float], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    written = []
    for logits, targets in seen:
        for name in STEERED:
            for alpha in ALPHAS:
                rows = steered(logits, name, alpha)
                right, likelihood = quality[name, alpha]
                right += bool(judge.are_right(rows, targets).all())
                likelihood += float(judge.logprobs(rows, targets).sum())
                quality[name, alpha] = right, likelihood
        written.append(_written(judge, (logits, targets)))
    best = {name: max(ALPHAS, key=lambda alpha, n=name: quality[n, alpha]) for name in STEERED}
    return best, written


def measure_task(
    model: ProxyTuned,
    members: Mapping[str, int],
    items: Mapping[str, Sequence[Mapping[str, str]]],
    no_proxy: NoProxy,
    options: Sequence[int] | None,
    *,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure every predictor's accuracy on test items; strengths are chosen on validation items.

    Args:
        model: All models of the data set.
        members: Their names.
        items: Items by split; a few of `train` are the examples of few-shot.
        no_proxy: Fitted on the training rows.
        options: Token ids to choose from; None for answers that are written.
        say: Shows progress.
    """
    ends = ending_ids(
        model.tokenizer, model.ensemble.eos_token_ids, model.ensemble.vocabulary.width
    )
    judge = Judge(options, ends)
    needed = {n: index for n, index in members.items() if not n.startswith("direct")}
    valid = answers(model, needed, items["valid"], judge.num_positions)
    chosen, written = choose_by_answers(judge, valid)
    switch = None if options else best_switch(written)
    say(f"strengths: {chosen}")
    hits: dict[str, list[bool]] = defaultdict(list)
    test = items["test"]
    for count, answer in enumerate(answers(model, members, test, judge.num_positions), 1):
        logits, targets = answer
        for name, rows in predictions(logits, chosen, no_proxy):
            hits[name].append(bool(judge.are_right(rows, targets).all()))
        if switch is not None:
            hits["weak_to_strong"].append(is_written(*_written(judge, answer), switch))
        if count % max(1, len(test) // 4) == 0:
            say(f"test items: {count} of {len(test)}")
    shots = random.Random(0).sample(list(items["train"]), min(NUM_SHOTS, len(items["train"])))
    for logits, targets in few_shot_answers(model, test, shots, judge.num_positions):
        hits["few_shot"].append(bool(judge.are_right(logits["base"], targets).all()))
    places: dict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(test):
        places[item["focus"]].append(place)
    return {
        "measure": "accuracy",
        "alphas": _shown_alphas(chosen),
        "no_proxy": _shown(no_proxy),
        "switch": switch,
        "num_valid_items": len(items["valid"]),
        "num_questions": len({item["prompt"] for item in test}),
        "sizes": [len(where) for where in places.values()],
        "sums": {
            name: [sum(row[i] for i in where) for where in places.values()]
            for name, row in hits.items()
        },
    }


def measure(plan: Plan, name: str, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure one data set after all of its trainings are done."""
    with quietly():
        model, members = load(plan, name)
        no_proxy = fit_no_proxy(plan, name, model)
        if name in plan.tasks:
            items = {split: read_rows(plan, name, split) for split in ("train", "valid", "test")}
            options = list(option_ids(model.tokenizer).values()) if name == TASK else None
            return measure_task(model, members, items, no_proxy, options, say=say)
        texts = {
            split: model.tokenizer.encode(
                "\n\n".join(row["text"] for row in read_rows(plan, name, split)),
                add_special_tokens=False,
            )
            for split in ("valid", "test")
        }
        return measure_text(model, members, texts, no_proxy, plan.num_windows, say=say)
