"""The ensemble as one model of vLLM: `SteeredModel`.

Its members are vLLM's own models, made with its parallel layers. They read the same tokens at the same
positions, so one block table serves all of them, and vLLM keeps doing paging, prefix caching, chunked prefill
and preemption. Every member reads every token, whatever the request asks for, so that a cached prefix can be
reused with any strength.

`forward` returns the members' hidden states side by side. `compute_logits` splits them and applies the
strengths, with the formula of `logits/steer.py`. An expert that no row asks for computes no logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.sequence import IntermediateTensors

from proxytune.decode.ensemble import Pair
from proxytune.integrations.vllm.config import RecipeConfig, ServedMember
from proxytune.integrations.vllm.request import RowSteering
from proxytune.integrations.vllm.weights import share_equal_parameters
from proxytune.logits.rules import apply_policy
from proxytune.logits.steer import offset
from proxytune.policy import Policy


@dataclass(frozen=True)
class _RowLogits:
    """One member's logits for some of the rows, in the base's vocabulary.

    Args:
        values: `[len(places), vocab]`; None on a rank that does not gather logits.
        places: Their rows, ascending.
    """

    values: Tensor | None
    places: list[int]

    @classmethod
    def compute(
        cls, member: ServedMember, model: Any, states: Tensor, places: list[int]
    ) -> _RowLogits:
        """Compute a member's logits for some rows of its hidden states."""
        if len(places) < states.shape[0]:
            states = states[torch.tensor(places, device=states.device)]
        values: Tensor | None = model.compute_logits(states.contiguous())
        return cls(None if values is None else member.alignment.logits_to_base(values), places)

    def of(self, places: list[int]) -> Tensor:
        """Return the logits of these rows."""
        assert self.values is not None
        if places == self.places:
            return self.values
        index = {place: row for row, place in enumerate(self.places)}
        rows = torch.tensor([index[place] for place in places], device=self.values.device)
        return self.values[rows]


@dataclass(frozen=True)
class _Part:
    """A pair, the rows for which its logits are needed, and how strongly it steers each."""

    pair: Pair
    places: list[int]
    strengths: list[float]


@dataclass(frozen=True)
class _Group:
    """Rows that share a policy, and the pairs that steer some of them."""

    policy: Policy
    places: list[int]
    parts: list[_Part]


def _grouped(rows: Sequence[RowSteering], pairs: Sequence[Pair]) -> list[_Group]:
    """Return the rows by policy, with the pairs and rows whose logits are needed."""
    places_of: dict[Policy, list[int]] = {}
    for place, row in enumerate(rows):
        places_of.setdefault(row.policy, []).append(place)
    groups = []
    for policy, places in places_of.items():
        parts = []
        for index, pair in enumerate(pairs):
            active = [place for place in places if rows[place].strengths[index] != 0]
            if active:
                # Other policies than the published method look at all experts of a row at once.
                needed = active if policy.is_plain else places
                strengths = [rows[place].strengths[index] for place in needed]
                parts.append(_Part(pair, needed, strengths))
        groups.append(_Group(policy, places, parts))
    return groups


def _add_rows(logits: Tensor, places: list[int], change: Tensor) -> None:
    """Add a change to some rows of logits, in place."""
    if len(places) == logits.shape[0]:
        logits += change
    else:
        logits.index_add_(0, torch.tensor(places, device=logits.device), change)


class SteeredModel(nn.Module, SupportsPP):  # type: ignore[misc]
    """A base steered by experts.

    Args:
        vllm_config: vLLM's config for a recipe.
        prefix: vLLM's prefix of names; recipes are not part of other models.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        assert not prefix, prefix
        config: RecipeConfig = vllm_config.model_config.hf_config
        self.config = config
        self._vllm_config = vllm_config
        self._rows = config.rows
        self._menu = config.menu
        self._members = config.ensemble.members
        self._pairs = config.ensemble.pairs
        for member in self._members:
            self.add_module(member.name, _build(vllm_config, member))
        self._models: list[Any] = [getattr(self, member.name) for member in self._members]
        padding_ids = config.ensemble.base.vocabulary.padding_ids
        self.register_buffer("_padding_ids", padding_ids, persistent=False)
        self._widths: list[int] = []
        self._masks: dict[str, Tensor] = {}

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the base's embeddings."""
        embeddings: Tensor = self._models[0].embed_input_ids(input_ids)
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        """Run all members over the same tokens.

        Args:
            input_ids: `[num_tokens]`, of the base's vocabulary; None on later ranks of a pipeline.
            positions: `[num_tokens]`.
            intermediate_tensors: What the previous rank of a pipeline returned.
            inputs_embeds: Not used, since each member has its own embeddings.

        Returns:
            `[num_tokens, sum of hidden sizes]`, or what the next rank of the pipeline needs.
        """
        outputs = []
        for member, model in zip(self._members, self._models, strict=True):
            own = intermediate_tensors
            if own is not None:
                start = f"{member.name}."
                own = IntermediateTensors(
                    {k.removeprefix(start): t for k, t in own.items() if k.startswith(start)}
                )
            ids = input_ids
            if ids is not None and member.alignment.small_ids is not None:
                # vLLM pads batches with tokens that may have no counterpart. Their logits are not used.
                ids = member.alignment.ids_to_small(ids.long()).clamp_(min=0).to(ids.dtype)
            outputs.append(model(ids, positions, own, None))
        if isinstance(outputs[0], IntermediateTensors):
            return _joined(self._members, outputs)
        self._widths = [output.shape[-1] for output in outputs]
        return torch.cat(outputs, dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return each row's steered logits, `[rows, vocab]`, float32, -inf at ids that no token has.

        Args:
            hidden_states: `[rows, sum of hidden sizes]`, for the rows that `Rows` expects.
        """
        rows = self._rows.take(hidden_states.shape[0])
        if self._rows.alone is not None:
            return self._logits_alone(self._rows.alone, hidden_states)
        groups = _grouped(rows, self._pairs)
        wanted: dict[int, set[int]] = {0: set(range(len(rows)))}
        for part in (part for group in groups for part in group.parts):
            for member in (part.pair.expert, part.pair.anti_expert):
                wanted.setdefault(member, set()).update(part.places)
        states = torch.split(hidden_states, self._widths, dim=-1)
        # The same order on all ranks: each computes a part of every member's logits.
        logits = {
            index: _RowLogits.compute(
                self._members[index], self._models[index], states[index], sorted(wanted[index])
            )
            for index in sorted(wanted)
        }
        base = logits[0].values
        if base is None:
            return None
        steered = base.to(torch.float32, copy=True)
        padding_ids: Any = self._padding_ids
        for group in groups:
            contributions = [
                part.pair.contribution(
                    logits[part.pair.expert].of(part.places),
                    logits[part.pair.anti_expert].of(part.places),
                    _alpha(part.strengths),
                    base_logits=logits[0].of(part.places) if part.pair.reads_base else None,
                    is_unshared=self._unshared(part.pair),
                )
                for part in group.parts
            ]
            if group.policy.is_plain:
                for part, contribution in zip(group.parts, contributions, strict=True):
                    _add_rows(steered, part.places, offset(contribution))
                continue
            own = base if len(group.places) == len(rows) else logits[0].of(group.places)
            found = apply_policy(group.policy, own, contributions, padding_ids=padding_ids)
            if own is base:
                steered.copy_(found.logits)
            else:
                steered[torch.tensor(group.places, device=steered.device)] = found.logits
        if len(padding_ids):
            steered.index_fill_(-1, padding_ids, -torch.inf)
        return steered

    def _unshared(self, pair: Pair) -> Tensor | None:
        """Return the tokens that a pair does not share; see `Contribution`."""
        if pair.is_unshared is None:
            return None
        padding_ids: Any = self._padding_ids  # it is where the logits are
        if pair.name not in self._masks:
            self._masks[pair.name] = pair.is_unshared.to(padding_ids.device)
        return self._masks[pair.name]

    def _logits_alone(self, index: int, hidden_states: Tensor) -> Tensor | None:
        """Return one member's own logits in the base's vocabulary; otherwise as `compute_logits`."""
        states = torch.split(hidden_states, self._widths, dim=-1)[index]
        every = list(range(states.shape[0]))
        found = _RowLogits.compute(self._members[index], self._models[index], states, every).values
        if found is None:
            return None
        logits = found.to(torch.float32, copy=True)
        padding_ids: Any = self._padding_ids
        return logits.index_fill_(-1, padding_ids, -torch.inf) if len(padding_ids) else logits

    def steer_by_default(self, fields: dict[str, Any] | None, alone: int | None) -> None:
        """Set how rows are steered that do not say it, from the next step on.

        Args:
            fields: What a request could ask for; see `request.py`. None for what the recipe says.
            alone: The only member that answers, unsteered; None for the steered base.
        """
        self._rows.default = self._menu.asked(fields) or self._menu.default
        self._rows.alone = alone

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the members' weights, each under its member's name; return the names that were filled."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights)
        share_equal_parameters(self._models[1:])
        return loaded

    def get_model_state_cls(self) -> type:
        """Return what vLLM's second model runner keeps of each request; the first does not call this."""
        return _follow_rows(self._vllm_config, self)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Return what a later rank of a pipeline receives, without values."""
        shape = batch_size, dtype, device
        empty = [model.make_empty_intermediate_tensors(*shape) for model in self._models]
        return _joined(self._members, empty)


def _build(vllm_config: Any, member: ServedMember) -> nn.Module:
    """Build a member with vLLM's layers.

    The base's layers keep the names that they have in the model alone, since quantised checkpoints list by
    name what they leave unquantised. vLLM's quantisation settings are for the base; a small model uses
    those of its own checkpoint.
    """
    from vllm.compilation.backends import set_model_tag
    from vllm.model_executor.model_loader.utils import initialize_model

    is_base = member.name == "base"
    checkpoint = member.checkpoint
    inner = vllm_config.with_hf_config(checkpoint.config, architectures=[checkpoint.architecture])
    inner.model_config.hf_text_config = checkpoint.config.get_text_config(decoder=True)
    if not is_base:
        inner.model_config.quantization = None
        inner.quant_config = None
    inner.model_config.model_arch_config = inner.model_config.get_model_arch_config()
    if not is_base and inner.model_config.model_arch_config.quantization_config is not None:
        inner.model_config._verify_quantization()
        inner.quant_config = type(inner).get_quantization_config(
            inner.model_config, inner.load_config
        )
    # vLLM distinguishes compiled models by their tag.
    with set_model_tag(member.name):
        built: nn.Module = initialize_model(
            vllm_config=inner, prefix="" if is_base else member.name
        )
    return built


def _alpha(strengths: Sequence[float]) -> float | Tensor:
    """Return strengths of rows as `Contribution` takes them: a number if they are all the same."""
    return strengths[0] if len(set(strengths)) == 1 else torch.tensor(strengths)


def _joined(members: Sequence[ServedMember], tensors: Sequence[Any]) -> Any:
    return IntermediateTensors(
        {
            f"{member.name}.{key}": tensor
            for member, own in zip(members, tensors, strict=True)
            for key, tensor in own.items()
        }
    )


def _follow_rows(vllm_config: Any, steered: SteeredModel) -> type:
    """Return the base's state class for vLLM's second model runner, extended to follow the rows.

    That runner keeps requests in numbered places and reports, before each forward, the place of each row.
    """
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

    state: Any = resolve_model_state_cls(vllm_config, steered._models[0])

    class SteeredState(state):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._slots: dict[int, RowSteering | None] = {}

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            params = new_req_data.sampling_params
            asked = None if params is None else steered._menu.asked(params.extra_args)
            self._slots[req_index] = asked

        def preprocess_state(self, input_batch: Any, *args: Any, **kwargs: Any) -> None:
            super().preprocess_state(input_batch, *args, **kwargs)
            slots = input_batch.idx_mapping_np.tolist()
            if any(self._slots.get(slot) is not None for slot in slots):
                rows = input_batch.expanded_idx_mapping.tolist()
                steered._rows.expect([self._slots.get(slot) for slot in rows])

    return SteeredState
