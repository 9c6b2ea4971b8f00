"""Policies on their way: from a recipe through the loop, scoring, traces and transformers' generate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from proxytune.cli import app
from proxytune.commands.options import PolicyOptions
from proxytune.decode.speculative import Drafting
from proxytune.errors import InvalidRequest, RecipeError, UnsupportedModel
from proxytune.logits.rules import apply_policy
from proxytune.logits.steer import Contribution
from proxytune.measure.score import passage_losses, passage_of
from proxytune.model import ProxyTuned
from proxytune.policy import Policy
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.testing import TOKENS, toy_model, toy_recipe, toy_table
from proxytune.trace import Trace
from tests.support.tiny import tiny_adapter, tiny_model
from tests.support.toys import toy_load

TWO = {"first": 1.0, "second": 0.7}
POLICIES = [
    Policy(name="kl_match"),
    Policy(name="gate_sure", threshold=0.5),
    Policy("majority", "gate_agree"),
    Policy("union", clip=1.5),
    Policy("sign_agreement", plausibility=0.05),
    Policy("route_base", schedule=((0, 1.0), (3, 0.25), (9, 2.0))),
]


def steered_toy(policy: Policy, **options) -> ProxyTuned:
    return toy_model(
        recipe=replace(toy_recipe(TWO), policy=policy), memory=0.5, eos_logit=-100.0, **options
    )


@pytest.mark.parametrize("policy", POLICIES, ids=Policy.describe)
def test_each_token_is_the_best_of_what_the_policy_makes_of_that_position(policy):
    """Without memory a toy's logits are rows of its tables, so the loop can be followed by hand."""
    model = toy_model(recipe=replace(toy_recipe(TWO), policy=policy), eos_logit=-100.0)
    tables = [toy_table(n, eos_logit=-100.0) for n in (0, 1, sum(b"first"), sum(b"second"))]
    trace = model.generate("a", SamplingParams(max_new_tokens=12))
    last = TOKENS.index("a")
    for position, token_id in enumerate(trace.token_ids):
        base, anti_expert, first, second = (table[[last]] for table in tables)
        steered = apply_policy(
            policy,
            base,
            [Contribution(first, anti_expert, 1.0), Contribution(second, anti_expert, 0.7)],
            positions=torch.tensor([position]),
        )
        assert token_id == int(steered.logits.argmax())
        last = token_id


@pytest.mark.parametrize("policy", POLICIES, ids=Policy.describe)
def test_a_batch_of_different_rows_gives_what_each_gives_alone(policy):
    model = steered_toy(policy)
    requests = [
        Request("ab", SamplingParams(max_new_tokens=9)),
        Request("the sea", SamplingParams(max_new_tokens=14, temperature=1.0, seed=3), alpha=0.5),
        Request("c", SamplingParams(max_new_tokens=5), experts="second"),
        Request("no", SamplingParams(max_new_tokens=7), alpha=0.0),
    ]
    together = model.generate_batch(requests)
    alone = [model.generate(request) for request in requests]
    assert [t.token_ids for t in together] == [t.token_ids for t in alone]


@pytest.mark.parametrize("policy", POLICIES, ids=Policy.describe)
def test_drafts_change_nothing(policy):
    model = steered_toy(policy)
    for sampling in (
        SamplingParams(max_new_tokens=24),
        SamplingParams(max_new_tokens=24, temperature=1.0, seed=1),
    ):
        plain = model.generate("a sea", sampling)
        drafting = Drafting(source="expert", max_tokens=4, is_adaptive=False)
        assert model.generate("a sea", sampling, speculative=drafting).token_ids == plain.token_ids


def test_strength_zero_is_the_base_under_every_policy():
    plain = toy_model(experts=TWO, memory=0.5, eos_logit=-100.0)
    base = plain.generate("a", SamplingParams(max_new_tokens=20), alpha=0.0)
    for policy in POLICIES:
        found = steered_toy(policy).generate("a", SamplingParams(max_new_tokens=20), alpha=0.0)
        assert found.token_ids == base.token_ids


@pytest.fixture(scope="module")
def routed_trace():
    model = steered_toy(Policy("route_entropy"))
    return model.generate("a", SamplingParams(max_new_tokens=16), explain=True)


def test_an_explained_trace_says_how_much_each_expert_counted(routed_trace):
    for step in routed_trace.steps:
        assert step.weights is not None
        assert sorted(step.weights.values()) == [0.0, 1.0]


def test_an_explained_trace_says_where_the_experts_disagreed(routed_trace):
    trace = routed_trace
    conflicts = [step.has_conflict for step in trace.steps]
    assert None not in conflicts
    assert trace.conflict_rate == sum(conflicts) / 16
    assert Trace.from_json(trace.to_json()) == trace


def test_conflicts_are_those_of_the_experts_each_alone():
    model = toy_model(experts=TWO, eos_logit=-100.0)
    trace = model.generate("a", SamplingParams(max_new_tokens=16), explain=True)
    tables = [toy_table(n, eos_logit=-100.0) for n in (0, 1, sum(b"first"), sum(b"second"))]
    last = TOKENS.index("a")
    for step in trace.steps:
        base, anti_expert, first, second = (table[last] for table in tables)
        one = int((base + 1.0 * (first - anti_expert)).argmax())
        other = int((base + 0.7 * (second - anti_expert)).argmax())
        assert step.has_conflict == (one != other)
        assert step.weights is None  # the published method
        last = step.token_id


def test_one_expert_has_nobody_to_disagree_with():
    trace = toy_model().generate("a", SamplingParams(max_new_tokens=4), explain=True)
    assert trace.conflict_rate is None
    assert all(step.has_conflict is None for step in trace.steps)


def test_a_schedule_counts_new_tokens_whatever_the_prompts_length():
    """Steered from the fifth token on, a text begins as the base's does, and then parts from it."""
    late = steered_toy(Policy(schedule=((3, 0.0), (4, 1.0))))
    for prompt in ("a", "a longer one"):
        sampling = SamplingParams(max_new_tokens=16)
        found = late.generate(prompt, sampling)
        base = late.generate(prompt, sampling, alpha=0.0)
        assert found.token_ids[:4] == base.token_ids[:4]
        assert found.token_ids != base.token_ids


def test_choosing_among_answers_follows_the_policy():
    model = steered_toy(Policy(schedule=((0, 0.0), (1, 1.0))))
    base = model.choose("a", ["b", "c", "d"], alpha=0.0)
    assert model.choose("a", ["b", "c", "d"]).probs == base.probs  # the first token is not steered


@pytest.mark.parametrize("policy", POLICIES[:4], ids=Policy.describe)
def test_scored_losses_are_those_of_the_tokens_that_were_generated(policy):
    model = steered_toy(policy)
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=5)
    trace = model.generate("ab", sampling)
    prompt = model.tokenizer.encode("ab", add_special_tokens=False)
    losses = passage_losses(
        model.ensemble, [passage_of(model.ensemble, prompt, trace.token_ids)], [(1.0, 0.7)]
    )
    # A chunk and single steps sum 33 probabilities in different orders.
    np.testing.assert_allclose(losses[-1], [-step.logprob for step in trace.steps], atol=2e-5)


def test_a_text_is_not_scored_where_tokens_are_excluded():
    with pytest.raises(InvalidRequest, match=r"infinite perplexity.*\n.*leave"):
        steered_toy(Policy(plausibility=0.1)).score("abc")
    steered_toy(Policy(plausibility=0.1, implausible="leave")).score("abc")


# Recipes ------------------------------------------------------------------------------------------------


def recipe_of(policy: Policy, **base: str) -> Recipe:
    small = ModelSpec(model="small")
    return Recipe(
        ModelSpec(**{"model": "large", **base}),
        (ExpertSpec("law", ModelSpec(adapter="law"), small),),
        policy,
    )


def test_a_recipe_writes_its_policy_and_reads_it_back():
    policy = Policy("union", clip=2.0, schedule=((0, 1.0), (50, 0.5)))
    content = recipe_of(policy).to_dict()
    assert content["combine"] == "union"
    assert content["steering"] == {"clip": 2.0, "schedule": [[0, 1.0], [50, 0.5]]}
    assert Recipe.from_dict(content).policy == policy


def test_a_recipe_with_the_published_method_says_nothing_of_steering():
    assert "steering" not in recipe_of(Policy()).to_dict()


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({"polici": "constant"}, "steering: 'polici' is not a setting"),
        ({"policy": "kl_mtch"}, "steering: policy is 'kl_mtch'"),
        ({"policy": "gate_sure", "max_alpha": 1}, "steering: max_alpha has no effect"),
        ("kl_match", "steering is .*must be an object"),
        ([1], "steering is .*must be an object"),
    ],
)
def test_what_is_wrong_with_steering_is_said_with_its_place(steering, message):
    content = recipe_of(Policy()).to_dict() | {"steering": steering}
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(content)


@pytest.mark.parametrize(
    "policy",
    [Policy(name="kl_match"), Policy("majority"), Policy(plausibility=0.1), Policy(name="nudge")],
    ids=Policy.describe,
)
def test_a_base_behind_an_api_shows_too_little_for_policies_that_read_it(policy):
    with pytest.raises(RecipeError, match=r"behind an API(?s:.*)hint: .*clip.*union"):
        recipe_of(policy, model="http://localhost:1/v1")
    for allowed in (Policy("union"), Policy(clip=1.0), Policy("inverse_entropy")):
        recipe_of(allowed, model="http://localhost:1/v1")


def test_the_card_of_a_recipe_names_its_policy():
    assert "Policy: union, clip 2.0." in recipe_of(Policy("union", clip=2.0)).model_card()
    assert "Policy" not in recipe_of(Policy()).model_card()


# transformers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    tiny_model(directory / "base", seed=1)
    tiny_model(directory / "small", seed=2)
    for seed, name in enumerate(TWO, start=3):
        tiny_adapter(directory / "small", directory / "adapters" / name, seed=seed)
    return directory


def tiny_recipe(models: Path, target: Path, policy: Policy) -> Path:
    small = ModelSpec(model=str(models / "small"))
    Recipe(
        ModelSpec(model=str(models / "base")),
        tuple(
            ExpertSpec(name, ModelSpec(adapter=str(models / "adapters" / name)), small, alpha)
            for name, alpha in TWO.items()
        ),
        policy,
    ).write(target)
    return target


@pytest.mark.parametrize(
    "policy", [p for p in POLICIES if not p.has_positions], ids=Policy.describe
)
def test_transformers_generate_follows_the_policy(models, tmp_path, policy):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tiny_recipe(models, tmp_path / "recipe", policy)
    library = ProxyTuned.load(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("the rain in Spain", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=10, do_sample=False)
    sampling = SamplingParams(max_new_tokens=10)
    trace = library.generate(ids[0].tolist(), sampling)
    assert answer[0, ids.shape[1] :].tolist() == list(trace.token_ids)


def test_transformers_refuses_a_schedule_by_name(models, tmp_path):
    from transformers import AutoModelForCausalLM

    path = tiny_recipe(models, tmp_path / "recipe", Policy(schedule=((0, 1.0), (9, 0.0))))
    with pytest.raises(UnsupportedModel, match=r"schedule(?s:.*)proxytune generate"):
        AutoModelForCausalLM.from_pretrained(path)


def test_transformers_saves_the_policy(models, tmp_path):
    from transformers import AutoModelForCausalLM

    policy = Policy("union", clip=2.0)
    path = tiny_recipe(models, tmp_path / "recipe", policy)
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "saved")
    assert Recipe.read(tmp_path / "saved").policy == policy


# The command line ---------------------------------------------------------------------------------------


@pytest.fixture
def toy_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ProxyTuned, "load", toy_load)
    toy_recipe(TWO).write(tmp_path / "recipe")
    return tmp_path / "recipe"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_generate_follows_a_policy_named_on_the_command_line(toy_directory):
    policy = Policy("union", schedule=((0, 1.0), (4, 0.0)))
    wanted = toy_load(replace(toy_recipe(TWO), policy=policy)).generate(
        "ab", SamplingParams(max_new_tokens=12)
    )
    result = run(
        "generate", toy_directory, "ab", "--max-new-tokens", 12, "--json", "--combine", "union",
        "--policy", '{"schedule": [[0, 1], [4, 0]]}',
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["token_ids"] == list(wanted.token_ids)


def test_combine_alone_keeps_the_recipes_other_settings(toy_directory):
    recipe = replace(toy_recipe(TWO), policy=Policy(clip=1.5))
    changed = PolicyOptions(combine="intersection").applied_to(recipe)
    assert changed.policy == Policy("intersection", clip=1.5)
    assert PolicyOptions(policy="gate_agree").applied_to(recipe).policy == Policy(name="gate_agree")
    assert PolicyOptions().applied_to(recipe) is recipe


def test_score_follows_a_policy_named_on_the_command_line(toy_directory, tmp_path):
    (tmp_path / "text.txt").write_text("the sea is a sea and a ship is a ship")
    arguments = ["score", toy_directory, "--text-file", tmp_path / "text.txt", "--alphas", "1"]
    plain, clipped = (
        json.loads(run(*arguments, "--json", *more).stdout)["rows"][-1]["nats"]
        for more in ([], ["--policy", '{"clip": 0.5}'])
    )
    assert plain != clipped


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "kl"], "must be one of constant, kl_match"),
        (["--policy", '{"policy": "kl_match", "clip": -1}'], "clip is -1"),
        (["--policy", "{"], "--policy is not JSON"),
        (["--combine", "product"], "combine is 'product'"),
        (["--policy", "nudge", "--combine", "union"], "which expert counts"),
    ],
)
def test_an_unusable_policy_is_refused_with_exit_code_2(toy_directory, arguments, message):
    result = run("generate", toy_directory, "ab", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_new_writes_the_policy_it_is_given(tmp_path):
    result = run(
        "new", tmp_path / "recipe", "--base", "a/b", "--expert", "a/c", "--anti-expert", "a/d",
        "--policy", '{"clip": 2}', "--combine", "union",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert Recipe.read(tmp_path / "recipe").policy == Policy("union", clip=2.0)


def test_what_is_recorded_of_a_row_does_not_depend_on_its_neighbours():
    """A row with one expert used to record no conflict beside a row with two, and none known alone."""
    recipe = replace(toy_recipe({"x": 1.0, "y": 1.0}), policy=Policy(combine="inverse_entropy"))
    model = toy_model(recipe=recipe, eos_logit=-100.0)
    sampling = SamplingParams(max_new_tokens=4)
    requests = [
        Request("ab", sampling, experts="x", explain=True),
        Request("cd", sampling, experts=("x", "y"), explain=True),
        Request("ef", sampling, experts={"x": 1.0, "y": 0.0}, explain=True),
    ]
    for together, request in zip(model.generate_batch(requests), requests, strict=True):
        alone = model.generate(request)
        assert [s.has_conflict for s in together.steps] == [s.has_conflict for s in alone.steps]
        assert [s.weights for s in together.steps] == [s.weights for s in alone.steps]
