"""A request's own policy and combination belong to its row, whatever the recipe and its neighbours say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from proxytune.data.batch import run_batch
from proxytune.data.lines import BatchOptions, read_lines
from proxytune.decode.batch import Batch
from proxytune.decode.speculative import Drafting
from proxytune.errors import InputFileError, InvalidRequest
from proxytune.logits.rules import apply_policies, apply_policy, scheduled
from proxytune.logits.steer import Contribution
from proxytune.model import ProxyTuned
from proxytune.policy import MAX_POINTS, Policy, settings_in
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams, Steering
from proxytune.testing import toy_model, toy_recipe

TWO = {"first": 1.0, "second": 0.7}
LENGTH = SamplingParams(max_new_tokens=16)
ASKED: list[dict[str, object]] = [
    {},
    {"policy": "gate_agree"},
    {"policy": {"policy": "gate_sure", "threshold": 0.5}},
    {"combine": "union"},
    {"policy": {"clip": 1.5}, "combine": "majority"},
    {"policy": {"schedule": [[0, 1.0], [3, 0.25], [9, 2.0]]}},
    {"policy": {"plausibility": 0.05}, "combine": "sign_agreement"},
    {"policy": "kl_match"},
]


def toy(policy: Policy | None = None) -> ProxyTuned:
    recipe = replace(toy_recipe(TWO), policy=policy or Policy())
    return toy_model(recipe=recipe, memory=0.5, eos_logit=-100.0)


def settings_of(asked: dict[str, object]) -> Policy:
    return Steering(policy=asked.get("policy"), combine=asked.get("combine")).policy_over(Policy())


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_a_request_is_steered_as_a_recipe_with_its_policy(asked):
    of_request = toy().generate("ab", LENGTH, **asked)
    assert of_request.token_ids == toy(settings_of(asked)).generate("ab", LENGTH).token_ids


def test_the_policies_of_these_tests_give_different_texts():
    """Otherwise the tests here could not fail."""
    assert len({toy().generate("ab", LENGTH, **asked).token_ids for asked in ASKED}) >= 5


def test_a_policy_of_a_request_replaces_the_recipes_as_a_whole():
    model = toy(Policy("union", "gate_agree", clip=0.5))
    found = model.generate("ab", LENGTH, policy="constant", combine="sum")
    assert found.token_ids == toy().generate("ab", LENGTH).token_ids


def test_what_a_request_leaves_open_is_the_recipes():
    model = toy(Policy("union", clip=1.5))
    job = model.job(Request("ab", combine="majority"))
    assert job.policy == Policy("majority", clip=1.5)
    assert model.job(Request("ab", policy={"clip": 2})).policy == Policy("union", clip=2.0)
    assert model.job(Request("ab")).policy == Policy("union", clip=1.5)


def requests(**more: object) -> list[Request]:
    """Return requests of every policy, each also sampled, with another expert, and of another length."""
    found = []
    for number, asked in enumerate(ASKED):
        sampled = SamplingParams(max_new_tokens=6 + number, temperature=1.0, seed=number)
        found += [
            Request(f"{'abcdefgh'[number]} sea", LENGTH, **asked, **more),
            Request("the sea", sampled, alpha=0.5, **asked, **more),
            Request("no", LENGTH, experts="second", **asked, **more),
        ]
    return found


@pytest.mark.parametrize("speculative", [False, True])
def test_rows_of_different_policies_in_one_batch_give_what_each_gives_alone(speculative):
    model = toy()
    drafting = Drafting(source="expert", max_tokens=4, is_adaptive=False) if speculative else False
    together = model.generate_batch(requests(), batch_size=32, speculative=drafting)
    alone = [model.generate(request) for request in requests()]
    assert [t.token_ids for t in together] == [t.token_ids for t in alone]


def test_what_is_recorded_of_a_row_is_its_own_policys():
    model = toy()
    for request, together in zip(
        requests(explain=True), model.generate_batch(requests(explain=True)), strict=True
    ):
        alone = model.generate(request)
        assert [s.weights for s in together.steps] == [s.weights for s in alone.steps]
        is_plain = request.policy is None and request.combine is None
        assert (together.steps[0].weights is None) == is_plain


def test_rows_that_join_a_running_batch_keep_their_policies():
    model = toy()
    asked = [Request("ab", LENGTH, **one) for one in ASKED]
    wanted = [model.generate(request).token_ids for request in asked]
    batch = Batch(model.ensemble, [model.job(asked[0])])
    found: dict[int, list[int]] = {}

    def step() -> None:
        for event in batch.step():
            if event.step is not None:
                found.setdefault(event.row, []).append(event.step.token_id)

    step()
    for request in asked[1:]:
        other = Batch(model.ensemble, [model.job(request)])
        first = other.step()
        offset = batch.join(other)
        for event in first:
            assert event.step is not None
            found.setdefault(event.row + offset, []).append(event.step.token_id)
        step()
    while not batch.is_done:
        step()
    assert [tuple(ids) for _, ids in sorted(found.items())] == wanted


def test_streams_conversations_choices_and_explanations_take_a_policy():
    model = toy()
    wanted = toy(Policy("union", clip=1.5))
    asked = {"policy": {"clip": 1.5}, "combine": "union"}
    steps = list(model.stream("ab", LENGTH, **asked))
    assert [s.token_id for s in steps] == list(wanted.generate("ab", LENGTH).token_ids)
    chat, chat_wanted = model.chat(LENGTH, **asked), wanted.chat(LENGTH)
    for turn in ("a", "b"):
        said = [step.token_id for step in chat.say(turn)]
        assert said == [step.token_id for step in chat_wanted.say(turn)]
    answers = ["a", "b", "c"]
    assert model.choose("ab", answers, **asked).probs == wanted.choose("ab", answers).probs
    found = model.explain("ab", "the sea", **asked)
    assert [s.views for s in found.steps] == [
        s.views for s in wanted.explain("ab", "the sea").steps
    ]
    assert found.steps[0].weights is not None


def test_a_conversation_changes_its_policy_between_turns():
    model = toy()
    chat = model.chat(LENGTH)
    list(chat.say("a"))
    chat.policy, chat.combine = {"clip": 1.5}, "union"
    other = toy(Policy("union", clip=1.5)).chat(LENGTH)
    other.messages = list(chat.messages)
    assert [s.token_id for s in chat.say("b")] == [s.token_id for s in other.say("b")]


def test_a_schedule_of_a_request_does_not_go_on_after_a_given_text():
    with pytest.raises(InvalidRequest, match="schedule"):
        toy().explain("ab", "sea", LENGTH, policy={"schedule": [[0, 1], [4, 0]]})


# Lines of a file ----------------------------------------------------------------------------------------


def test_a_line_of_a_file_has_a_policy_of_its_own(tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "ab", "options": asked} for asked in ASKED]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = toy()
    options = BatchOptions(LENGTH)
    run_batch(
        prompts,
        tmp_path / "answers.jsonl",
        recipe=model.recipe,
        options=options,
        load=lambda *_: model,
    )
    answers = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    for answer, asked in zip(answers, ASKED, strict=True):
        wanted = model.generate("ab", LENGTH, **asked)
        assert tuple(answer["output"]["token_ids"]) == wanted.token_ids


def test_a_line_leaves_open_what_the_run_says(tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "a"}\n{"prompt": "b", "options": {"combine": "majority", "policy": null}}\n'
    )
    run = Steering(policy={"clip": 2}, combine="union")
    one, two = read_lines(prompts, recipe=toy_recipe(TWO), sampling=LENGTH, steering=run)
    assert one.request.steering == run
    assert two.request.steering == Steering(policy={"clip": 2}, combine="majority")


# Refusals -----------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, object], str]] = [
    ({"policy": "kl_mtch"}, "policy is 'kl_mtch'.*one of constant"),
    ({"policy": 3}, "policy is 3.*a name or an object"),
    ({"policy": ["gate_sure"]}, "policy is .*a name or an object"),
    ({"policy": {"treshold": 0.5}}, "'treshold' is not a setting.*\n.*threshold"),
    ({"policy": {"threshold": 0.5}}, "threshold has no effect with policy constant"),
    ({"policy": {"policy": "gate_sure", "threshold": 2}}, "threshold is 2"),
    ({"policy": {"policy": "gate_sure", "threshold": "0.5"}}, "threshold is '0.5'"),
    ({"policy": {"policy": ["gate_sure"]}}, "policy is \\['gate_sure'\\]"),
    ({"policy": {"clip": True}}, "clip is True"),
    ({"policy": {"clip": float("nan")}}, "clip is nan"),
    ({"policy": {"combine": "union"}}, "'combine' is not a setting"),
    ({"policy": {"schedule": 3}}, "schedule is 3"),
    ({"policy": {"schedule": {"0": 1}}}, "schedule is"),
    ({"policy": {"schedule": [[2**70, 1]]}}, "schedule is"),
    ({"policy": {"schedule": [[3, 1], [2, 1]]}}, "schedule is"),
    ({"policy": {"schedule": [[i, 1] for i in range(MAX_POINTS + 1)]}}, "at most 1,000 pairs"),
    ({"combine": "product"}, "combine is 'product'"),
    ({"combine": 3}, "combine is 3"),
    ({"policy": "nudge", "combine": "union"}, "which expert counts"),
]


@pytest.mark.parametrize(("asked", "said"), WRONG, ids=str)
def test_a_policy_that_cannot_be_used_is_refused_when_the_request_is_built(asked, said):
    with pytest.raises(InvalidRequest, match=said):
        Request("ab", **asked)


@pytest.mark.parametrize(("asked", "said"), WRONG, ids=str)
def test_a_line_with_an_unusable_policy_is_refused_with_its_number(asked, said, tmp_path):
    text = json.dumps({"prompt": "ab", "options": asked})
    if "NaN" in text:
        said = "JSON that cannot be kept"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' + text + "\n")
    with pytest.raises(InputFileError, match=f"line 2 of .*{said}"):
        read_lines(
            tmp_path / "prompts.jsonl",
            recipe=toy_recipe(TWO),
            sampling=LENGTH,
            steering=Steering(),
        )


def test_what_does_not_go_together_with_the_recipes_own_is_refused():
    with pytest.raises(InvalidRequest, match="kl_match and combine is union"):
        toy(Policy("union")).generate("ab", policy="kl_match")
    with pytest.raises(InvalidRequest, match="nudge and combine is majority"):
        toy(Policy(name="nudge")).generate("ab", combine="majority")


def test_a_base_behind_an_api_shows_too_little_for_some_policies_of_requests():
    small = ModelSpec(model="small")
    recipe = Recipe(ModelSpec(model="http://localhost:1/v1"), (ExpertSpec("law", small, small),))
    assert recipe.policy_for(Steering(policy={"clip": 2})) == Policy(clip=2.0)
    for asked in (Steering(policy="gate_sure"), Steering(combine="majority")):
        with pytest.raises(InvalidRequest, match=r"behind an API(?s:.*)hint: .*clip.*union"):
            recipe.policy_for(asked)


def test_a_policy_in_a_text_is_a_name_or_json():
    assert settings_in("gate_sure") == "gate_sure"
    assert settings_in(' {"clip": 2}') == {"clip": 2}
    for text in ("{", '{"a": ' * 10_000):
        with pytest.raises(InvalidRequest, match="--policy is not JSON"):
            settings_in(text, "--policy")


# Arithmetic ---------------------------------------------------------------------------------------------


def test_each_row_of_logits_is_steered_by_its_own_policy():
    generator = torch.Generator().manual_seed(0)

    def logits() -> torch.Tensor:
        return torch.randn(6, 11, generator=generator)

    base = logits()
    alphas = torch.tensor([1.0, 0.5, 0.0, 1.0, 2.0, 1.0])
    parts = [Contribution(logits(), logits(), 0.7), Contribution(logits(), logits(), alphas)]
    policies = [
        Policy(),
        Policy("union", clip=0.5),
        Policy(),
        Policy(schedule=((0, 0.0), (8, 1.0))),
        Policy("union", clip=0.5),
        Policy(name="kl_match"),
    ]
    positions = torch.arange(6)
    found = apply_policies(policies, base, parts, positions=positions)
    for row, policy in enumerate(policies):
        own = torch.tensor([row])
        alone = apply_policy(
            policy, base[own], [part.at(own) for part in parts], positions=positions[own]
        )
        assert torch.equal(found.logits[row], alone.logits[0])
        assert torch.equal(found.weights[:, row], alone.weights[:, 0])


def test_a_schedule_of_many_points_is_looked_up_at_once():
    """By hand between points, at them, before and after them."""
    schedule = ((2, 0.0), (4, 1.0), (5, 3.0))
    positions = torch.tensor([0, 2, 3, 4, 5, 9])
    assert scheduled(schedule, positions).tolist() == [0.0, 0.0, 0.5, 1.0, 3.0, 3.0]
    assert scheduled(((7, 0.5),), positions).tolist() == [0.5] * 6
