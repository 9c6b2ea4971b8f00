"""What a batch is made from: members, pairs, the ensemble of them, and jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from proxytune.backends.base import Backend, Spelling
from proxytune.checkpoints.output_bias import OutputBias
from proxytune.errors import InvalidRequest, PromptTooLong
from proxytune.logits.steer import UNWEIGHTED, Contribution, Weights, offset, weighted
from proxytune.policy import Policy, needs_all_logits
from proxytune.request import SamplingParams
from proxytune.text.prompts import Tokenizer
from proxytune.text.vocab import Alignment, Vocabulary, align
from proxytune.trace import Terms


@dataclass(frozen=True, slots=True)
class Member:
    """One model of an ensemble: a backend, perhaps an adapter on it, and how its vocabulary is aligned.

    Args:
        name: Its name in messages.
        backend: What runs it.
        alignment: How its tokens correspond to the base's.
        adapter: The adapter's name in the backend.
        own: How it spells text, if its added tokens differ from the base's.
    """

    name: str
    backend: Backend[Any]
    alignment: Alignment
    adapter: str | None = None
    own: Spelling | None = None

    def own_ids(self, token_ids: Sequence[int], *, is_start: bool = False) -> list[int]:
        """Return a text of the base's tokens in those of the member's prompts; see `Backend.own_ids`."""
        ids = self.alignment.ids_to_small(torch.tensor(list(token_ids), dtype=torch.long))
        return self.backend.own_ids(ids.tolist(), is_start=is_start)


@dataclass(frozen=True, slots=True)
class Pair:
    """An expert and its anti-expert, as indices into the ensemble's members.

    Args:
        name: The expert's name.
        expert: Its index.
        anti_expert: Its anti-expert's.
        is_unshared: `[vocab]` bool on the CPU: the base's tokens that one of the two lacks, and padding ids;
            None if they have all tokens. The two say nothing about such tokens.
        weights: How strongly base, expert and anti-expert count.
        bias: What is added to the logits of some tokens.
        unmapped: What both give tokens that they have no opinion of; None if they have one of all.
    """

    name: str
    expert: int
    anti_expert: int
    is_unshared: Tensor | None = field(default=None, compare=False, repr=False)
    weights: Weights = field(default=UNWEIGHTED, compare=False)
    bias: OutputBias | None = field(default=None, compare=False, repr=False)
    unmapped: float | None = field(default=None, compare=False, repr=False)

    @property
    def is_weighted(self) -> bool:
        """Whether it has weights other than 1, or an output bias."""
        return self.weights != UNWEIGHTED or self.bias is not None

    @property
    def reads_base(self) -> bool:
        """Whether what it adds depends on the base's logits."""
        return bool(self.weights.base != 1)

    def contribution(
        self,
        expert_logits: Tensor,
        anti_expert_logits: Tensor,
        alpha: float | Tensor,
        *,
        base_logits: Tensor | None,
        is_unshared: Tensor | None = None,
    ) -> Contribution:
        """Return what the pair adds to the base.

        Args:
            expert_logits: `[batch, vocab]`.
            anti_expert_logits: Same shape and device.
            alpha: A number, or `[batch]`.
            base_logits: Same shape and device; None is enough unless `reads_base`.
            is_unshared: `is_unshared` on that device, if the caller has it there.
        """
        assert base_logits is not None or not self.reads_base
        mask = self.is_unshared if is_unshared is None else is_unshared
        part = Contribution(expert_logits, anti_expert_logits, alpha, mask)
        if not self.is_weighted:
            return part
        bias = None
        if self.bias is not None:
            bias = self.bias.dense(expert_logits.shape[-1], expert_logits.device)
        return weighted(part, base_logits, weights=self.weights, bias=bias, unmapped=self.unmapped)

    def terms(
        self,
        token_id: int,
        *,
        base_logits: Tensor,
        expert_logits: Tensor,
        anti_expert_logits: Tensor,
    ) -> Terms:
        """Return what the pair adds to a token at strength 1, apart.

        Args:
            token_id: The token, in the base's vocabulary.
            base_logits: `[vocab]`, -inf at ids that no token has.
            expert_logits: Same shape and device.
            anti_expert_logits: Same shape and device.
        """
        sides = expert_logits[None], anti_expert_logits[None]
        part = self.contribution(*sides, 1.0, base_logits=base_logits[None])
        ratio = float(offset(part._replace(own_logits=None))[0, token_id])
        if self.is_unshared is None and self.unmapped is None:
            # Elsewhere the sides are normalised already, over the tokens that they share.
            totals = [
                side.logsumexp(-1).item() for side in (part.expert_logits, part.anti_expert_logits)
            ]
            ratio -= totals[0] - totals[1]
        logprob = float(base_logits.float().log_softmax(-1)[token_id])
        scale = float(self.weights.base) - 1.0
        bias = 0.0 if self.bias is None else self.bias.value_of(token_id)
        return Terms(ratio, scale * logprob if scale else 0.0, bias)


@dataclass(frozen=True, slots=True)
class Ensemble:
    """The base and the pairs that can steer it.

    Args:
        members: Member 0 is the base; its alignment is the identity.
        pairs: The experts, by index into `members`. Index 0 reuses the base's logits.
        vocabulary: The base's vocabulary.
        eos_token_ids: Token ids that end a text, in the base's vocabulary.
        tokenizer: The base's tokenizer, which turns new tokens into text.
        policy: How strongly and by which pairs to steer at each token, where a job does not say it.
        engine: What runs all members together, where their logits do not come here; None if they do.
    """

    members: tuple[Member, ...]
    pairs: tuple[Pair, ...]
    vocabulary: Vocabulary
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer
    policy: Policy = field(default_factory=Policy)
    engine: Engine | None = None


class Answer(NamedTuple):
    """What an engine generated for one job.

    Args:
        row: Index of the job.
        token_ids: The new tokens, in the base's vocabulary, with the one that ended the text.
        tops: For each token, its steered logprob and the likeliest tokens with theirs, best first; empty if
            the job asks for no logprobs.
    """

    row: int
    token_ids: tuple[int, ...]
    tops: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] = ()


class Engine(Protocol):
    """What generates and scores with a whole ensemble and shows no logits, as another program does.

    Every method takes the ensemble, whose pairs and members may be some of those that the engine runs. An
    ensemble without pairs is its only, or its first, member by itself.
    """

    def start(self) -> None:
        """Load the models, if they are not loaded; a job would do it as well.

        Raises:
            UserError: The engine refuses how it is to run.
            BackendError: It failed.
        """

    def check(self, ensemble: Ensemble, job: Job) -> None:
        """Refuse a job that the engine cannot run.

        Raises:
            UserError: It asks for what the engine cannot do; the message names it.
        """

    def check_prompts(
        self, ensemble: Ensemble, members: Sequence[int], prompts: Sequence[Sequence[int]]
    ) -> None:
        """Refuse prompts that the engine cannot give to these members.

        Args:
            ensemble: The models.
            members: Which of them read a prompt.
            prompts: The prompt of every member, in its own vocabulary.

        Raises:
            UserError: The members read it differently, and the engine has one prompt for all.
        """

    def answers(self, ensemble: Ensemble, jobs: Sequence[Job]) -> Iterator[Answer]:
        """Yield the answers to jobs as they end.

        Raises:
            BackendError: The engine failed.
        """

    def first_logprobs(self, ensemble: Ensemble, job: Job, token_ids: Sequence[int]) -> list[float]:
        """Return the steered logprobs of some tokens as a job's first one, nats."""

    def losses(
        self,
        ensemble: Ensemble,
        texts: Sequence[tuple[Sequence[int], Sequence[int]]],
        alphas: Sequence[float],
        on_text: Callable[[int], None],
    ) -> list[list[float]]:
        """Return the loss of each given token, nats.

        Args:
            ensemble: The models and the policy.
            texts: Prompts and what follows them, at least one token each, in the base's vocabulary.
            alphas: Strength of each of the ensemble's pairs.
            on_text: Called with the index of each text that is done.
        """

    def close(self) -> None:
        """Give back the engine's memory; a later job starts it again."""


def alone(ensemble: Ensemble, index: int) -> Ensemble:
    """Return one member by itself, with nothing that steers it, in its own vocabulary if that is another."""
    member = ensemble.members[index]
    own, backend = member.own, member.backend
    if (translation := backend.translation) is not None:
        own, backend = translation.own, translation.inner
    if own is None:
        return replace(ensemble, members=(member,), pairs=())
    alignment = align(own.vocabulary, own.vocabulary)
    return replace(
        ensemble,
        members=(replace(member, backend=backend, alignment=alignment, own=None),),
        pairs=(),
        vocabulary=own.vocabulary,
        eos_token_ids=tuple(own.eos_token_ids),
        tokenizer=own.tokenizer,
    )


@dataclass(frozen=True, slots=True)
class Job:
    """One row to generate.

    Args:
        sampling: How tokens are chosen and when to stop.
        prompts: Token ids for each member, in that member's own vocabulary.
        alphas: Strength of each of the ensemble's pairs. A pair at 0 is run only if `records_views`, a pair
            at None never.
        records_views: Whether to record what each member gave every token.
        num_top: How many of each one's likeliest tokens to record.
        strengths: Strength of each expert that steers, by name, for the record; `alphas` is what is run.
        policy: How strongly and by which of its pairs it is steered at each token; None for the ensemble's.
        cancelled: Called once per step; True ends the row.
    """

    sampling: SamplingParams
    prompts: tuple[Sequence[int], ...]
    alphas: tuple[float | None, ...]
    records_views: bool = False
    num_top: int = 5
    cancelled: Callable[[], bool] | None = None
    strengths: Mapping[str, float] = field(default_factory=dict)
    policy: Policy | None = None


def check_job(ensemble: Ensemble, job: Job) -> None:
    """Refuse a job that cannot be run to its end.

    Raises:
        PromptTooLong: Prompt and new tokens exceed a member's context.
        InvalidRequest: A token id is outside the vocabulary, or the base cannot honour an option or the
            policy.
    """
    vocabulary, sampling = ensemble.vocabulary, job.sampling
    for name, token_ids in (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", [token_id for token_id, _ in sampling.logit_bias]),
        ("first_logit_bias", [token_id for token_id, _ in sampling.first_logit_bias]),
    ):
        if token_ids and max(token_ids) >= vocabulary.width:
            raise InvalidRequest(
                f"{name} holds {max(token_ids)}, but {vocabulary.name} has only {vocabulary.width} token ids"
            )
    if ensemble.engine is not None:
        ensemble.engine.check(ensemble, job)
    is_partial = ensemble.members[0].backend.partial is not None
    if is_partial and job.sampling.repetition_penalty != 1.0:
        raise InvalidRequest(
            "repetition_penalty depends on the zero point of logits, and a base behind an API shows only "
            "logprobs.\nhint: use presence_penalty or frequency_penalty"
        )
    if is_partial and policy_of(ensemble, job).reads_base:
        raise InvalidRequest(needs_all_logits(policy_of(ensemble, job)))
    if is_partial:
        _check_base_weights(ensemble, job)
    for index in members_of(ensemble, job):
        member, prompt = ensemble.members[index], job.prompts[index]
        for token_id in prompt:
            if not 0 <= token_id < member.backend.num_prompt_ids:
                raise InvalidRequest(
                    f"the prompt holds token id {token_id}, but {member.name} has only "
                    f"{member.backend.num_prompt_ids} token ids"
                )
        limit = member.backend.capabilities.max_context
        if limit is not None and len(prompt) >= limit:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens and {member.name} has a context of {limit}, so "
                "there is no room for new tokens.\nhint: shorten the prompt"
            )
        if limit is not None and len(prompt) + job.sampling.max_new_tokens > limit:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, {job.sampling.max_new_tokens} new ones were "
                f"requested, and {member.name} has a context of {limit}.\n"
                f"hint: shorten the prompt or ask for at most {limit - len(prompt)} new tokens"
            )


def _check_base_weights(ensemble: Ensemble, job: Job) -> None:
    """Refuse base weights that bounds of the base's logits prove nothing with."""
    pairs = zip(ensemble.pairs, job.alphas, strict=True)
    if not any(alpha and pair.reads_base for pair, alpha in pairs):
        return
    # Policies weigh each expert, so that two whose weights cancel out are no exception.
    if not policy_of(ensemble, job).is_plain:
        raise InvalidRequest(
            "the base is behind an API, which shows only some logits, and a base weight other than 1 under "
            f"the policy {policy_of(ensemble, job).describe()} needs all of them.\n"
            "hint: leave the policy out, or the base's weight"
        )
    scale = scale_of_base(ensemble, job)
    if scale <= 0:
        raise InvalidRequest(
            f"at these strengths the base's logits count {scale:g} times, and those that an API does not "
            "show would be the largest.\nhint: a smaller alpha, or a base weight nearer to 1"
        )


def scale_of_base(ensemble: Ensemble, job: Job) -> float:
    """Return what steering multiplies the base's logits with: `1 + sum_i alpha_i (w_base_i - 1)`."""
    pairs = zip(ensemble.pairs, job.alphas, strict=True)
    return 1.0 + sum((alpha or 0.0) * (float(pair.weights.base) - 1.0) for pair, alpha in pairs)


def policy_of(ensemble: Ensemble, job: Job) -> Policy:
    """Return the policy by which a job is steered."""
    return ensemble.policy if job.policy is None else job.policy


def pairs_of(job: Job) -> tuple[int, ...]:
    """List the pairs that a job runs."""
    given = [(which, alpha) for which, alpha in enumerate(job.alphas) if alpha is not None]
    return tuple(which for which, alpha in given if alpha != 0 or job.records_views)


def members_of(ensemble: Ensemble, job: Job) -> list[int]:
    """List the members that a job runs, the base first."""
    pairs = [ensemble.pairs[which] for which in pairs_of(job)]
    return sorted({0, *(pair.expert for pair in pairs), *(pair.anti_expert for pair in pairs)})
