"""What is recorded of a chosen token: its likeliest rivals, and what each model gave it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from proxytune.decode.lanes import Lanes, Row
from proxytune.decode.outlook import Outlook
from proxytune.logits.rules import has_conflict
from proxytune.logits.views import kl_divergence, partial_view, view
from proxytune.trace import FinishReason, Step, Terms, View


class Recorder:
    """Turns the tokens chosen at one position of some rows into steps."""

    def __init__(self, lanes: Lanes, outlook: Outlook) -> None:
        jobs = [lanes.rows[place].job for place in outlook.places]
        self._lanes = lanes
        self._outlook = outlook
        self._tops = _tops(outlook.steered, [job.sampling.logprobs or 0 for job in jobs])
        self._conflicts: list[bool] | None = None
        if len(outlook.contributions) > 1 and any(job.records_views for job in jobs):
            base = lanes.masked(outlook.base)
            self._conflicts = has_conflict(base, outlook.contributions).tolist()

    def step(
        self,
        at: int,
        row: Row,
        token_id: int,
        logprob: float,
        reason: FinishReason | None,
        text: str,
    ) -> Step:
        """Return the step of the outlook's row `at`, which has the token; `text` became safe to show."""
        views, kl, terms, weights, conflict, proof = None, None, None, None, None, None
        if row.job.records_views:
            views, kl, terms = self._views(at, row, token_id)
            if not row.policy.is_plain:
                found = self._outlook.weights[:, at].tolist()
                weights = self._lanes.weights_by_name(row, found)
            # The outlook has other rows' contributions, too; a row with one expert has no conflict.
            if self._conflicts is not None and len(row.experts) > 1:
                conflict = self._conflicts[at]
        if self._outlook.proofs:
            proof = self._outlook.proofs[at]
        return Step(
            index=len(row.new_ids) - 1,
            token_id=token_id,
            text=text,
            logprob=logprob,
            top=self._tops[at],
            views=views,
            kl=kl,
            weights=weights,
            terms=terms or None,
            has_conflict=conflict,
            finish_reason=reason,
            is_certified=None if proof is None else proof.is_certified,
            max_lost_prob=None if proof is None else proof.max_lost_prob,
        )

    def _views(
        self, at: int, row: Row, token_id: int
    ) -> tuple[dict[str, View], float | None, dict[str, Terms]]:
        """Return what each member that reads a row gave a token, KL(steered || base), and `Step.terms`."""
        lanes, outlook = self._lanes, self._outlook
        num_top = row.job.num_top
        base, steered = lanes.masked(outlook.base[at]), outlook.steered[at]
        kl: float | None = None
        if outlook.bounds:
            ceiling = outlook.bounds[at].ceiling
            of_base = partial_view(base, token_id, ceiling=ceiling, num_top=num_top)
        else:
            of_base = view(base, token_id, num_top=num_top)
            kl = kl_divergence(steered, base)
        # With a partial base, normalised over the tokens it showed, as the choice is.
        views = {"base": of_base, "steered": view(steered, token_id, num_top=num_top)}
        terms: dict[str, Terms] = {}
        for which in row.pairs:
            pair = lanes.ensemble.pairs[which]
            sides = {}
            for side, member in (("expert", pair.expert), ("anti_expert", pair.anti_expert)):
                name = f"{pair.name}.{side}"
                if member == 0:
                    views[name], sides[side] = of_base, base
                    continue
                own = lanes.masked(lanes.pick(outlook.logits, [lanes.ref(member, row)])[0])
                views[name], sides[side] = view(own, token_id, num_top=num_top), own
            if pair.is_weighted:
                terms[pair.name] = pair.terms(
                    token_id,
                    base_logits=base,
                    expert_logits=sides["expert"],
                    anti_expert_logits=sides["anti_expert"],
                )
        return views, kl, terms


def _tops(steered: Tensor, wanted: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """Return each row's likeliest tokens with their steered logprobs, best first."""
    if not any(wanted):
        return [()] * len(wanted)
    best = steered.log_softmax(-1).topk(min(max(wanted), steered.shape[1]))
    pairs = zip(best.indices.tolist(), best.values.tolist(), wanted, strict=True)
    return [tuple(zip(ids[:n], values[:n], strict=True)) for ids, values, n in pairs]
