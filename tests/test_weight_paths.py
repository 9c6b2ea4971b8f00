"""Weights and output biases on their way: through the loop, scores, traces and other engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from proxytune.backends.retokenised import UNMAPPED
from proxytune.checkpoints.output_bias import OutputBias, write_output_bias
from proxytune.cli import app
from proxytune.errors import CorruptModel, InvalidRequest, ModelNotFound, VocabularyMismatch
from proxytune.explain.moves import moves
from proxytune.explain.notebook import frame
from proxytune.explain.report import Report, Run
from proxytune.loading.doctor import examine
from proxytune.logits.steer import Weights
from proxytune.measure.score import passage_losses, passage_of
from proxytune.model import ProxyTuned
from proxytune.policy import Policy
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ApiSettings, ExpertSpec, ExpertWeights, ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.testing import TOKENS, toy_model, toy_recipe, toy_table
from proxytune.trace import Trace
from tests.backends.api.test_backend import PROMPTS, TRAITS, behind
from tests.support.tiny import MERGES, NUM_TOKENS, tiny_adapter, tiny_model, tiny_tokenizer

WEIGHTS = ExpertWeights(base=0.8, expert=0.9, anti_expert=0.6)
BIAS = OutputBias(torch.tensor([2, 17, 8]), torch.tensor([1.5, -2.0, 0.75]))
TWO = {"first": 0.7, "second": 0.4}


def steered_toy(
    policy: Policy | None = None, weights: ExpertWeights = WEIGHTS, **options
) -> ProxyTuned:
    """Return a toy with two experts, the first with weights and a bias, whose texts do not end."""
    recipe = toy_recipe(TWO)
    first, second = recipe.experts
    recipe = replace(
        recipe, experts=(replace(first, weights=weights), second), policy=policy or Policy()
    )
    model = toy_model(recipe=recipe, eos_logit=-100.0, **options)
    first_pair, second_pair = model.ensemble.pairs
    pairs = (replace(first_pair, bias=BIAS), second_pair)
    return ProxyTuned(replace(model.ensemble, pairs=pairs), model.formats, recipe)


def tables() -> list[torch.Tensor]:
    seeds = (0, 1, sum(b"first"), sum(b"second"))
    return [toy_table(seed, eos_logit=-100.0).double() for seed in seeds]


def added(last: int) -> torch.Tensor:
    """Return what the first expert adds at strength 1 after a token, by hand."""
    base, anti_expert, first, _ = (table[last] for table in tables())
    return -0.2 * base + 0.9 * first - 0.6 * anti_expert + BIAS.dense(len(TOKENS), base.device)


# The loop, scores and explanations -----------------------------------------------------------------------


def test_a_recipes_weights_reach_the_loop():
    model = steered_toy()
    trace = model.generate("a", SamplingParams(max_new_tokens=16))
    last = TOKENS.index("a")
    for token_id in trace.token_ids:
        base, anti_expert, _, second = (table[last] for table in tables())
        steered = base + 0.7 * added(last) + 0.4 * (second - anti_expert)
        assert token_id == int(steered.argmax())
        last = token_id


@pytest.mark.parametrize("policy", [Policy(), Policy("union", clip=1.5), Policy(name="kl_match")])
def test_scored_losses_are_those_of_the_tokens_that_were_generated(policy):
    model = steered_toy(policy, memory=0.5)
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=5)
    trace = model.generate("ab", sampling)
    prompt = model.tokenizer.encode("ab", add_special_tokens=False)
    losses = passage_losses(
        model.ensemble, [passage_of(model.ensemble, prompt, trace.token_ids)], [(0.7, 0.4)]
    )
    # A chunk and single steps sum 33 probabilities in different orders.
    np.testing.assert_allclose(losses[-1], [-step.logprob for step in trace.steps], atol=2e-5)


def test_an_explained_token_says_what_was_added_to_it_and_of_what():
    model = steered_toy()
    trace = model.generate(Request("abc", SamplingParams(max_new_tokens=12), explain=True))
    last = TOKENS.index("c")
    for move, step in zip(moves(trace), trace.steps, strict=True):
        token_id = step.token_id
        base, anti_expert, first, _ = (table[last] for table in tables())
        pair = 0.9 * first - 0.6 * anti_expert
        totals = (0.9 * first).logsumexp(0) - (0.6 * anti_expert).logsumexp(0)
        terms = [
            0.7 * float(pair[token_id] - totals),
            0.7 * -0.2 * float(base.log_softmax(0)[token_id]),
            0.7 * BIAS.value_of(token_id),
        ]
        assert move.terms is not None and list(move.terms) == ["first"]
        assert list(move.terms["first"]) == pytest.approx(terms, abs=1e-4)
        assert move.offsets["first"] == pytest.approx(sum(terms), abs=1e-4)
        last = token_id


def test_the_shift_is_the_offsets_and_what_all_tokens_have_in_common():
    model = steered_toy()
    rests = []
    for letter in "bdjnr":  # among them tokens with a bias and without
        trace = model.explain("a", letter)
        (move,) = moves(trace)
        rests.append(move.shift - sum(move.offsets.values()))
    assert rests == pytest.approx([rests[0]] * 5, abs=1e-4)


def test_given_and_generated_tokens_have_the_same_terms_also_in_a_file():
    model = steered_toy()
    request = Request("abc", SamplingParams(max_new_tokens=8), explain=True)
    trace = model.generate(request)
    assert Trace.from_json(trace.to_json()) == trace
    given = model.explain("abc", trace.text)
    for one, other in zip(given.steps, trace.steps, strict=True):
        assert one.terms["first"] == pytest.approx(other.terms["first"], abs=1e-5)


def test_reports_show_what_an_offset_consists_of():
    model = steered_toy()
    trace = model.generate(Request("abc", SamplingParams(max_new_tokens=8), explain=True))
    report = Report((Run("alpha", trace),))
    (token, *_) = report.to_dict()["runs"][0]["tokens"]
    assert sum(token["terms"]["first"].values()) == pytest.approx(token["offsets"]["first"])
    table = frame(trace)
    assert table["first.offset.bias"].iloc[0] == token["terms"]["first"]["bias"]
    assert "second.offset.bias" not in table


def test_a_trace_of_an_older_version_has_no_terms():
    trace = toy_model().generate(Request("a", SamplingParams(max_new_tokens=2), explain=True))
    fields = json.loads(trace.to_json())
    for step in fields["steps"]:
        assert step.pop("terms") is None
    assert Trace.from_json(json.dumps(fields)) == trace


# A base behind an API -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [0.7, 1.3])
@pytest.mark.parametrize("name", ["all", "vllm"])
def test_a_server_that_shows_everything_gives_the_in_process_text(name, base):
    local = steered_toy(weights=replace(WEIGHTS, base=base), memory=0.5)
    with behind(local, TRAITS[name]) as (remote, _, _):
        for prompt in PROMPTS[:3]:
            sampling = SamplingParams(max_new_tokens=12)
            wanted, found = local.generate(prompt, sampling), remote.generate(prompt, sampling)
            assert found.token_ids == wanted.token_ids
            assert found.num_certified == found.num_new_tokens
            for one, other in zip(found.steps, wanted.steps, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("base", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_part_of_the_logits_proves_is_so(base, temperature):
    """Certified tokens are those of the full logits, and no more probability is lost than the bound says."""
    local = steered_toy(weights=replace(WEIGHTS, base=base), memory=0.5)
    sampling = SamplingParams(max_new_tokens=16, temperature=temperature, seed=3)
    settings = ApiSettings(top_logprobs=12, lookahead=1)
    num_proved, bounds = 0, []
    with behind(local, TRAITS["vllm"], settings) as (remote, _, _):
        for prompt in PROMPTS:
            found = remote.generate(Request(prompt, sampling))
            for index, step in enumerate(found.steps):
                text = "".join(TOKENS[i] for i in found.token_ids[:index])
                whole = local.generate(
                    prompt + text, replace(sampling, max_new_tokens=1, logprobs=len(TOKENS))
                )
                full = dict(whole.steps[0].top)
                if step.is_certified and temperature == 0:
                    assert step.token_id == whole.token_ids[0]
                num_proved += bool(step.is_certified)
                # The chosen token has its share of what was seen, and less of everything.
                lost = 1 - np.exp(full[step.token_id] - step.logprob)
                assert lost <= step.max_lost_prob + 1e-5
                bounds.append(step.max_lost_prob)
    assert num_proved > 10
    assert min(bounds) < 0.2


def test_what_a_partial_base_cannot_honour_is_refused_by_name():
    local = steered_toy(memory=0.5)
    with behind(local) as (remote, _, _):
        with pytest.raises(InvalidRequest, match=r"union(?s:.*)needs all of them(?s:.*)hint:"):
            remote.generate(Request("a", combine="union"))
        with pytest.raises(InvalidRequest, match=r"count -0\.2 times"):
            remote.generate(Request("a", alpha=6.0))
        # Together, two weights may cancel out; a policy weighs each expert by itself.
        second = remote.ensemble.pairs[1]
        opposite = replace(second, weights=Weights(base=1.2))
        ensemble = replace(remote.ensemble, pairs=(remote.ensemble.pairs[0], opposite))
        both = ProxyTuned(ensemble, remote.formats, remote.recipe)
        with pytest.raises(InvalidRequest, match="majority"):
            both.generate(Request("a", alpha=0.5, combine="majority"))
        # An expert whose weight of the base is 1 is steered as ever.
        remote.generate(Request("a", experts="second", combine="union"))


# Models on disk -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    tiny_model(directory / "base", seed=1, width=NUM_TOKENS + 6)
    tiny_model(directory / "small", seed=2)
    tiny_adapter(directory / "small", directory / "adapters" / "first", seed=3)
    return directory


def recipe_of(models: Path, target: Path, bias: OutputBias = BIAS, **options) -> Path:
    spec = ExpertSpec(
        "first",
        ModelSpec(adapter=str(models / "adapters" / "first")),
        ModelSpec(model=str(models / "small")),
        0.8,
        options.get("weights", WEIGHTS),
        options.get("reference", "law.safetensors"),
    )
    target.mkdir()
    write_output_bias(target / "law.safetensors", bias)
    Recipe(ModelSpec(model=str(models / "base")), (spec,), directory=target).write(target)
    return target


def test_a_loaded_recipe_steers_by_its_weights_and_its_bias(models, tmp_path):
    path = recipe_of(models, tmp_path / "recipe")
    model = ProxyTuned.load(path)
    (pair,) = model.ensemble.pairs
    assert pair.weights == Weights(0.8, 0.9, 0.6)
    assert pair.bias is not None and pair.bias.values.tolist() == BIAS.values.tolist()
    step = model.generate(
        Request("the rain", SamplingParams(max_new_tokens=1), explain=True)
    ).steps[0]
    parts = step.terms["first"]
    shift = step.views["steered"].logprob - step.views["base"].logprob
    assert shift != pytest.approx(0.0, abs=1e-3) and sum(parts) != 0


@pytest.mark.parametrize("num_beams", [1, 3])
def test_transformers_generates_what_the_library_does_and_saves_the_bias(
    models, tmp_path, num_beams
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = recipe_of(models, tmp_path / "recipe")
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("the rain in Spain", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=10, do_sample=False, num_beams=num_beams)
    library = ProxyTuned.load(path)
    if num_beams == 1:
        trace = library.generate(ids[0].tolist(), SamplingParams(max_new_tokens=10))
        assert answer[0, ids.shape[1] :].tolist() == list(trace.token_ids)
    logits = model(answer).logits[0, ids.shape[1] - 1 : -1]
    new = answer[0, ids.shape[1] :]
    passage = passage_of(library.ensemble, ids[0].tolist(), new.tolist())
    losses = passage_losses(library.ensemble, [passage], [(0.8,)])[-1]
    own = -logits.log_softmax(-1).gather(-1, new[:, None])[:, 0]
    np.testing.assert_allclose(losses, own.detach().numpy(), atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = Recipe.read(tmp_path / "saved")
    assert again.experts[0].weights == WEIGHTS and again.experts[0].bias == "law.safetensors"
    assert (tmp_path / "saved" / "law.safetensors").read_bytes() == (
        path / "law.safetensors"
    ).read_bytes()


def test_tokens_that_another_tokenizer_lacks_get_the_base_weight_and_the_bias_alone(
    models, tmp_path
):
    other = tiny_tokenizer(merges=MERGES[:-1])
    for seed, name in enumerate(("other", "tuned")):
        tiny_model(tmp_path / name, seed=seed, tokenizer=other)
    path = recipe_of(models, tmp_path / "recipe")
    recipe = Recipe.read(path)
    pair = replace(
        recipe.experts[0],
        expert=ModelSpec(model=str(tmp_path / "tuned")),
        anti_expert=ModelSpec(model=str(tmp_path / "other")),
    )
    model = ProxyTuned.load(replace(recipe, experts=(pair,), vocabulary="map"))
    assert model.ensemble.pairs[0].unmapped == UNMAPPED
    small = model.ensemble.members[1].backend
    ids = model.ensemble.vocabulary.token_to_id.values()
    (token_id,) = [i for i in ids if small.token_map.small_id(i) is None]
    base = torch.randn(model.ensemble.vocabulary.width)
    _, logits = small.prefill([[5, 6]], adapters=[None])
    terms = model.ensemble.pairs[0].terms(
        token_id, base_logits=base, expert_logits=logits[0] * 1.0, anti_expert_logits=logits[0]
    )
    assert terms.pair == 0
    assert terms.base == pytest.approx(-0.2 * float(base.log_softmax(0)[token_id]))


def test_doctor_names_the_weights_and_the_bias(models, tmp_path):
    found = examine(Recipe.read(recipe_of(models, tmp_path / "recipe")))
    assert found.is_healthy
    notes = " ".join(found.notes)
    assert "first: its weights are base 0.8, expert 0.9, anti-expert 0.6" in notes
    assert "law.safetensors changes 3 tokens, by up to 2.00" in notes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"bias": OutputBias(torch.tensor([NUM_TOKENS]), torch.ones(1))},
            VocabularyMismatch,
            "no token for",
        ),
        ({"bias": OutputBias(torch.tensor([90000]), torch.ones(1))}, VocabularyMismatch, "90000"),
        ({"reference": "gone.safetensors"}, ModelNotFound, "gone.safetensors"),
    ],
)
def test_a_bias_that_does_not_fit_is_found_by_doctor_and_by_every_loader(
    models, tmp_path, change, error, message
):
    from transformers import AutoModelForCausalLM

    path = recipe_of(models, tmp_path / "recipe", **change)
    (problem,) = examine(Recipe.read(path)).problems
    assert problem.where == "first.bias"
    assert isinstance(problem.error, error) and message in str(problem.error)
    for load in (ProxyTuned.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(error, match=message):
            load(path)


def test_a_corrupt_bias_is_named_before_weights_are_read(models, tmp_path):
    path = recipe_of(models, tmp_path / "recipe")
    (path / "law.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptModel, match=r"law\.safetensors cannot be read"):
        ProxyTuned.load(path)


# The command line -----------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_new_writes_the_weights_and_the_bias_it_is_given(tmp_path):
    write_output_bias(tmp_path / "law.safetensors", BIAS)
    result = run(
        "new", tmp_path / "recipe", "--base", "a/b", "--expert", "a/c", "--anti-expert", "a/d",
        "--weights", "0.95,0.92,0.9", "--bias", tmp_path / "law.safetensors",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (expert,) = Recipe.read(tmp_path / "recipe").experts
    assert expert.weights == ExpertWeights(0.95, 0.92, 0.9)
    assert (tmp_path / "recipe" / str(expert.bias)).resolve() == tmp_path / "law.safetensors"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "1,1"], "--weights"),
        (["--weights", "0,1,1"], "base is 0"),
        (["--bias", "law.bin"], "a .safetensors file"),
    ],
)
def test_new_refuses_what_no_recipe_can_have(tmp_path, arguments, message):
    arguments = ["--base", "a/b", "--expert", "a/c", "--anti-expert", "a/d", *arguments]
    result = run("new", tmp_path / "recipe", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
