"""TRL's trainer by reward: prompts in exactly the tokens of generation, and noise by seed and step.

The method is Group Relative Policy Optimization (Shao et al. 2024, arXiv:2402.03300): several answers to a
prompt are sampled, and an answer's advantage is its reward less the group's mean, divided by the group's
standard deviation. The loss is summed over tokens and divided by their number in the whole step (Yu et al.
2025, arXiv:2503.14476). Every step samples anew, so the probability ratio that the method clips is 1.

What a reward is stands in `rewards.py`. A run that is resumed draws the answers that it would have drawn:
each step's noise depends on the seed and the step alone, and the order of the prompts on seed and epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Sampler
from transformers import GenerationConfig
from transformers.trainer_utils import EvalLoopOutput
from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]

from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.data.rows import Rows
from proxytune.errors import RewardError
from proxytune.text.detokenize import TextStream
from proxytune.text.prompts import Tokenizer
from proxytune.tune.encode import Encoded, PromptExample
from proxytune.tune.heads import check_head, head_of, run_body
from proxytune.tune.loss import CHUNK_ROWS
from proxytune.tune.rewards import Reward
from proxytune.tune.settings import TuneSettings
from proxytune.tune.trainer import _DurableCheckpoints

MOST_ANSWERS = 64
"""Maximum number of answers that are generated at once."""
DEFAULT_BETA = 0.02


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts in the small model's tokens, each with its row.

    Args:
        token_ids: Those that generation would feed.
        rows: Indices of the prompts' rows.
        source: The rows.
    """

    token_ids: list[list[int]]
    rows: list[int]
    source: Rows

    @classmethod
    def of(cls, part: Encoded, source: Rows) -> Prompts:
        """Return a part's encoded prompts with its rows."""
        token_ids = [e.token_ids for e in part.examples if isinstance(e, PromptExample)]
        return cls(token_ids, [row for (row,) in part.sources], source)


def ending_ids(small: Checkpoint, base: Checkpoint | None) -> list[int]:
    """Return the small model's ids of all tokens that end an answer of its own, or of the base."""
    ids = set(small.eos_token_ids)
    if base is not None:
        known = small.tokenizer.get_vocab()
        texts = base.tokenizer.convert_ids_to_tokens(list(base.eos_token_ids))
        ids |= {known[text] for text in texts if text in known}
    return sorted(ids)


def reward_arguments(settings: TuneSettings, shared: Mapping[str, Any]) -> GRPOConfig:
    """Return TRL's arguments.

    A forward pass reads `batch_size` answers. A step has `batch_size * accumulate` prompts, and that many
    times `group_size` answers.

    Args:
        settings: The run's settings.
        shared: The arguments of every method.
    """
    own = {
        "gradient_accumulation_steps": settings.accumulate * settings.group_size,
        "metric_for_best_model": shared["metric_for_best_model"] and "eval_reward",
        "greater_is_better": shared["metric_for_best_model"] and True,
    }
    kept = {key: value for key, value in shared.items() if key != "max_length"}
    return GRPOConfig(
        **{**kept, **own},
        beta=DEFAULT_BETA if settings.beta is None else settings.beta,
        num_generations=settings.group_size,
        num_generations_eval=1,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        disable_dropout=True,
    )


class RewardTrainer(_DurableCheckpoints, GRPOTrainer):
    """TRL's GRPO trainer on encoded prompts, with a reward of this project.

    The validation reward is the mean over greedy answers, as the last word measures them.

    Args:
        reward: What answers are worth.
        train: The prompts to train on.
        valid: The prompts to validate on; None if there are none.
        tokenizer: The small model's.
        ending_ids: Ids of the tokens that end an answer.
        kwargs: Arguments of TRL's trainer and of `_DurableCheckpoints`.
    """

    def __init__(
        self,
        *,
        reward: Reward,
        train: Prompts,
        valid: Prompts | None,
        tokenizer: Tokenizer,
        ending_ids: Sequence[int],
        **kwargs: Any,
    ) -> None:
        self._reward = reward
        self._prompts = train
        self._valid = valid
        self._own_tokenizer = tokenizer
        super().__init__(
            reward_funcs=[self._rewards],
            train_dataset=_dataset(train),
            eval_dataset=None if valid is None else _dataset(valid),
            processing_class=_padding(tokenizer),
            **kwargs,
        )
        self.eos_token_ids = list(ending_ids)
        small: Any = self._small
        # Whatever the model's files say of sampling, such as a top_p: answers are drawn from the whole
        # distribution, as the method demands.
        small.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        check_head(small, head_of(small))

    @property
    def _small(self) -> Any:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # What TRL asks for

    def _tokenize_prompts(
        self, prompts: list[list[int]]
    ) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        return Groups(
            num_prompts=len(self._prompts.token_ids),
            prompts_per_step=self.args.generation_batch_size // self.num_generations,
            group_size=self.num_generations or 1,
            repeats=self.args.steps_per_generation,
            seed=self.args.seed,
        )

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], None]:
        return self._answers(prompt_ids, temperature=self.args.temperature), None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor, None]:
        size = batch_size or len(input_ids)
        with self._autocast():
            parts = [
                answer_logprobs(
                    model,
                    input_ids[i : i + size],
                    attention_mask[i : i + size],
                    logits_to_keep,
                    self.args.temperature,
                )
                for i in range(0, len(input_ids), size)
            ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies), None

    def _autocast(self) -> Any:
        kind = self.accelerator.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=bool(self.args.bf16))

    def _rewards(
        self, prompts: list[list[int]], completion_ids: list[list[int]], row: list[int], **_: Any
    ) -> list[float]:
        answers = zip(prompts, completion_ids, row, strict=True)
        return [self._worth(self._prompts, i, ids, answer) for ids, answer, i in answers]

    def _worth(
        self, prompts: Prompts, index: int, prompt_ids: list[int], answer: list[int]
    ) -> float:
        row = prompts.source.rows[prompts.rows[index]]
        where = prompts.source.where(prompts.rows[index])
        return self._reward(row["prompt"], self._text(prompt_ids, answer), row["row"], where)

    def _text(self, prompt_ids: list[int], answer: list[int]) -> str:
        """Return an answer's text as `generate` shows it."""
        stream = TextStream(self._own_tokenizer, prompt_ids=prompt_ids)
        for token_id in answer:
            if token_id not in self.eos_token_ids:
                stream.push(token_id)
        stream.finish()
        return stream.text

    # Answers

    @torch.no_grad()
    def _answers(self, prompt_ids: list[list[int]], *, temperature: float) -> list[list[int]]:
        """Return an answer to each prompt, with the token that ends it; greedy at temperature 0."""
        small = self._small
        was_training = small.training
        small.eval()
        device = self.accelerator.device
        answers: list[list[int]] = []
        with torch.random.fork_rng(), self._autocast():
            torch.manual_seed((self.args.seed << 32) + self.state.global_step)
            for start in range(0, len(prompt_ids), MOST_ANSWERS):
                block = prompt_ids[start : start + MOST_ANSWERS]
                answers += self._block(block, temperature, device)
        small.train(was_training)
        return answers

    def _block(
        self, prompt_ids: list[list[int]], temperature: float, device: torch.device
    ) -> list[list[int]]:
        width = max(map(len, prompt_ids))
        pad_id = self.processing_class.pad_token_id  # type: ignore[union-attr]
        padded = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompt_ids])
        lengths = torch.tensor([len(ids) for ids in prompt_ids])
        mask = (torch.arange(width) >= width - lengths[:, None]).long()
        is_sampled = temperature > 0
        drawn = self._small.generate(
            input_ids=padded.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                max_new_tokens=self.args.max_completion_length,
                do_sample=is_sampled,
                **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if is_sampled else {}),
                eos_token_id=list(self.eos_token_ids) or None,
                pad_token_id=pad_id,
            ),
        )[:, width:].tolist()
        return [self._ended(ids) for ids in drawn]

    def _ended(self, token_ids: list[int]) -> list[int]:
        """Return the tokens up to the one that ends the answer."""
        ends = (i + 1 for i, token_id in enumerate(token_ids) if token_id in self.eos_token_ids)
        return token_ids[: next(ends, len(token_ids))]

    # Training and validation

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one batch, and save the state first if the reward fails, so that no step is lost."""
        try:
            return super().training_step(*args, **kwargs)
        except RewardError:
            # Rewards come before the step's first gradient, so this is the state after the step before.
            if self.state.global_step:
                self._save_checkpoint(self.model, None)
            raise

    def _rows_of(self, inputs: Any) -> list[int]:
        return [int(each["row"]) for each in inputs]

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, **kwargs: Any
    ) -> EvalLoopOutput:
        """Return mean reward and mean length in tokens of greedy answers to the validation prompts."""
        prompts = self._valid
        assert prompts is not None and self.model is not None
        # TRL's log takes what is reported in training mode for the training's.
        self.model.eval()
        answers = self._answers(prompts.token_ids, temperature=0.0)
        rewards = [
            self._worth(prompts, i, ids, answer)
            for i, (ids, answer) in enumerate(zip(prompts.token_ids, answers, strict=True))
        ]
        prefix = kwargs.get("metric_key_prefix", "eval")
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics={
                f"{prefix}_reward": sum(rewards) / len(rewards),
                f"{prefix}_length": sum(map(len, answers)) / len(answers),
            },
            num_samples=len(rewards),
        )


def logged_rewards(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a run's log shows of its rewards; see `TuneResult.rewards`.

    `share_alike` is the mean share of prompts whose answers all had one reward, and `best_at_end` is whether
    the last evaluation had the highest reward.
    """
    valid = [row["valid_reward"] for row in log if row.get("valid_reward") is not None]
    alike = [row["share_alike"] for row in log if row.get("share_alike") is not None]
    return {
        "first_valid": valid[0] if valid else None,
        "best_valid": max(valid, default=None),
        "best_at_end": len(valid) > 1 and valid[-1] > max(valid[:-1]),
        "share_alike": sum(alike) / len(alike) if alike else None,
    }


class Groups(Sampler[int]):
    """The prompts of a pass in random order, each `group_size` times, and each step's as often as it is read.

    TRL reads a step's prompts once for every forward pass of the step, and generates at the first. A last
    step that is not full is filled up from the pass's beginning.

    Args:
        num_prompts: Number of prompts.
        prompts_per_step: Number of prompts in a step.
        group_size: Number of answers per prompt.
        repeats: How often each step's prompts are read.
        seed: Random seed; the order depends on it and on the epoch.
    """

    def __init__(
        self, *, num_prompts: int, prompts_per_step: int, group_size: int, repeats: int, seed: int
    ) -> None:
        self._num_prompts = num_prompts
        self._per_step = prompts_per_step
        self._group_size = group_size
        self._repeats = repeats
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the pass that comes next."""
        self._epoch = epoch

    @property
    def _num_steps(self) -> int:
        return -(-self._num_prompts // self._per_step)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self._seed << 32) + self._epoch)
        order = torch.randperm(self._num_prompts, generator=generator).tolist()
        for step in range(self._num_steps):
            start = step * self._per_step
            chosen = [order[i % len(order)] for i in range(start, start + self._per_step)]
            for _ in range(self._repeats):
                for index in chosen:
                    yield from [index] * self._group_size

    def __len__(self) -> int:
        return self._num_steps * self._per_step * self._group_size * self._repeats


def _dataset(prompts: Prompts) -> Dataset:
    rows = list(range(len(prompts.token_ids)))
    return Dataset.from_dict({"prompt": prompts.token_ids, "row": rows})


def _padding(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer that can pad: TRL would change the one that renders prompts."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id is None:
        # Any token will do, since the attention mask hides it.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def answer_logprobs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, num_kept: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of answers' tokens, and the entropies of what they were drawn from.

    Prompts are padded on the left and answers on the right. Rows are moved to the left first, since models
    number the padding, too, and those with absolute positions would see other positions than in generation.

    Args:
        model: The model, or a PEFT model around it.
        input_ids: `[rows, length]`.
        attention_mask: `[rows, length]`, 1 at tokens.
        num_kept: Number of columns of the answers, the last ones.
        temperature: What logits are divided by.

    Returns:
        Two `[rows, num_kept]` in nats, 0 at padding. Gradients flow through the log-probabilities alone.
    """
    rows, length = input_ids.shape
    kept = attention_mask[:, -num_kept:].bool()
    start = attention_mask.argmax(1, keepdim=True)
    columns = (torch.arange(length, device=input_ids.device) + start) % length
    moved = (input_ids.gather(1, columns), attention_mask.gather(1, columns))
    hidden = run_body(model, *moved)
    # A token is predicted from the position before it.
    before = torch.arange(length - num_kept, length, device=input_ids.device) - start - 1
    states = hidden.gather(1, before[:, :, None].expand(-1, -1, hidden.shape[-1]))[kept]
    targets = input_ids[:, -num_kept:][kept]
    head = head_of(model)

    def chunk(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = (head.logits(states) / temperature).log_softmax(-1)
        entropies = torch.special.entr(logprobs.detach().exp()).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropies

    # Logits of a chunk exist once at a time; the backward pass computes them again.
    parts = [
        checkpoint(
            chunk, states[i : i + CHUNK_ROWS], targets[i : i + CHUNK_ROWS], use_reentrant=False
        )
        for i in range(0, len(targets), CHUNK_ROWS)
    ]
    logprobs, entropies = (
        torch.zeros(rows, num_kept, device=input_ids.device).masked_scatter(kept, torch.cat(column))
        for column in zip(*parts, strict=True)
    )
    return logprobs, entropies
