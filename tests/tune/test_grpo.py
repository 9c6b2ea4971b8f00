"""A tuning run by reward: what it learns, resume, what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.errors import InvalidRequest, RewardError
from proxytune.model import ProxyTuned
from proxytune.request import Request, SamplingParams
from proxytune.tune import Interrupted, TuneSettings, tune
from proxytune.tune.card import last_word
from proxytune.tune.reward_trainer import Groups, answer_logprobs, ending_ids
from proxytune.tune.training import Training
from tests.support.tiny import tiny_model
from tests.tune.test_run import StopAt, sentence, write_rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a `base` and a `small` model of one vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder / "base", seed=1, hidden_size=24, num_layers=3)
    tiny_model(folder / "small", seed=2)
    return folder


def prompts(count: int = 20) -> list[dict[str, Any]]:
    return [{"prompt": f"{sentence(i, 1 + i % 4)}:", "answer": "tin"} for i in range(count)]


def settings(models: Path, folder: Path, **changes: Any) -> TuneSettings:
    folder.mkdir(exist_ok=True)
    own: dict[str, Any] = {
        "output": str(folder / "out"),
        "data": write_rows(folder / "rows.jsonl", prompts()),
        "anti_expert": str(models / "small"),
        "base": str(models / "base"),
        "method": "grpo",
        "template": "plain",
        "batch_size": 3,
        "group_size": 4,
        "max_new_tokens": 4,
        "lora_rank": 4,
        "learning_rate": 2e-2,
        "valid_share": 0.25,
        "test_share": 0.25,
        "patience": 0,
        "max_steps": 6,
        "eval_every": 2,
    }
    return TuneSettings(**own | changes)


def letters(prompt: Any, answer: str, row: Any) -> float:
    """Share of the answer's characters that are ASCII letters, which a random model writes now and then."""
    return sum(c.isascii() and c.isalpha() for c in answer) / max(len(answer), 1)


def read_log(run: TuneSettings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.training / "log.jsonl").read_text().splitlines()]


def weights(run: TuneSettings) -> dict[str, torch.Tensor]:
    return load_file(run.directory / "adapters" / "out" / "adapter_model.safetensors")


def test_a_reward_is_learned_and_measured(models: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 16, "eval_every": 4, "learning_rate": 5e-2, "group_size": 8}
    run = settings(models, tmp_path, alpha=1.0, **changes)
    result = tune(run, reward=letters)
    assert result.method == "grpo" and result.rewards is not None and result.verdict is not None
    assert result.rewards["best_valid"] > result.rewards["first_valid"] + 0.3
    rows = {row["name"]: row for row in result.rewards["test"]["rows"]}
    assert rows["expert"]["reward"] > rows["base"]["reward"] + 0.3
    # The report's numbers are those of the recipe's own greedy answers.
    model = ProxyTuned.load(str(run.directory))
    sampling = SamplingParams(max_new_tokens=4)
    held_out = [row["prompt"] for row in prompts()]
    answers = model.generate_batch([Request(p, sampling, alpha=1.0) for p in held_out])
    by_prompt = {p: letters(p, trace.text, {}) for p, trace in zip(held_out, answers, strict=True)}
    assert rows["steered"]["reward"] <= max(by_prompt.values())
    assert result.verdict["answers"]["measure"] == "reward"
    said = "\n".join(last_word(run, result))
    assert "mean reward of greedy answers to 5 prompts that nothing was chosen on" in said
    card = (run.directory / "README.md").read_text("utf-8")
    assert "## Rewarded on test rows" in card and "arXiv:2402.03300" in card
    log = read_log(run)
    assert {"reward", "kl", "length", "share_alike", "loss"} <= log[1].keys()
    assert {"valid_reward", "valid_length"} <= log[0].keys()
    assert (run.training / "loss.png").stat().st_size > 1000


def test_the_strength_is_chosen_by_reward(models: Path, tmp_path: Path) -> None:
    result = tune(settings(models, tmp_path, max_steps=2), reward=letters)
    assert result.rewards is not None
    steered = [r for r in result.rewards["valid"]["rows"] if r["name"] == "steered"]
    assert tuple(row["alpha"] for row in steered) == result.tried
    best = max(row["reward"] for row in steered)
    assert result.best_alpha in [row["alpha"] for row in steered if row["reward"] == best]


@pytest.mark.parametrize("epochs", [1, 4], ids=["within a pass", "in a later pass"])
def test_a_stopped_run_goes_on_to_the_weights_of_a_whole_one(
    epochs: int, models: Path, tmp_path: Path
) -> None:
    """A pass has four steps, so that step 3 lies within the first and step 7 within the second."""
    changes = {"max_steps": 4 + epochs, "measure_tokens": 0, "learning_rate": 1e-2}
    whole, parts = (settings(models, tmp_path / n, **changes) for n in ("whole", "parts"))
    expected = tune(whole, reward=letters)
    stop = 3 if epochs == 1 else 7
    with pytest.raises(Interrupted, match=f"step {stop}"):
        tune(parts, reward=letters, display=StopAt(stop))
    result = tune(parts, reward=letters, resume=True)
    assert result.rewards == expected.rewards
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name
    assert [{**row, "elapsed_s": 0} for row in read_log(parts)] == [
        {**row, "elapsed_s": 0} for row in read_log(whole)
    ]


def test_a_run_that_ended_early_is_not_trained_again(models: Path, tmp_path: Path) -> None:
    """It used to look for losses, which are not logged here, and run on."""
    changes = {"max_steps": 12, "patience": 1, "eval_every": 1, "measure_tokens": 0}
    run = settings(models, tmp_path, **changes)

    def same(prompt: Any, answer: str, row: Any) -> float:
        return 0.5

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "_save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        tune(run, reward=same)
    steps = max(row["step"] for row in read_log(run))
    assert steps < 12
    assert tune(run, reward=same, resume=True).num_steps == steps


def test_a_reward_that_fails_keeps_the_state_and_goes_on_once_mended(
    models: Path, tmp_path: Path
) -> None:
    file = tmp_path / "score.py"
    good = "def score(prompt, answer, row):\n    return len(answer) / 8\n"
    bad = good.replace("return", "import pathlib; n = pathlib.Path('calls'); return", 1)
    changes = {"reward": f"{file}:score", "measure_tokens": 0}
    file.write_text(good)
    whole = settings(models, tmp_path / "whole", **changes)
    expected = tune(whole)
    calls = tmp_path / "calls"
    # It fails in the fourth step: 5 validation prompts, 12 answers a step, validation again after two steps.
    bad = (
        f"import pathlib\ncalls = pathlib.Path({str(calls)!r})\n"
        "def score(prompt, answer, row):\n"
        "    n = int(calls.read_text()) if calls.exists() else 0\n"
        "    calls.write_text(str(n + 1))\n"
        "    if n == 5 + 24 + 5 + 12 + 3:\n"
        "        raise ZeroDivisionError\n"
        "    return len(answer) / 8\n"
    )
    file.write_text(bad)
    parts = settings(models, tmp_path / "parts", **changes)
    with pytest.raises(RewardError, match=r"raised ZeroDivisionError.*line \d+ of rows.jsonl"):
        tune(parts)
    assert (parts.training / "checkpoints" / "checkpoint-3" / "whole").exists()
    file.write_text(good)
    result = tune(parts, resume=True)
    assert result.rewards == expected.rewards
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name


def test_prompts_are_the_tokens_of_generation(models: Path, tmp_path: Path) -> None:
    """The training's greedy answers are the ones that the tuned model's recipe gives."""
    template = "Question: {{ prompt }}\nAnswer:"
    seen: dict[str, str] = {}

    def reward(prompt: Any, answer: str, row: Any) -> float:
        seen.setdefault(prompt, answer)
        return 0.0

    changes = {"template": template, "base": None, "max_steps": 1, "measure_tokens": 0}
    tune(settings(models, tmp_path, **changes), reward=reward)
    small = ProxyTuned.load(str(tmp_path / "out"))
    # No reward differs, so that nothing was learned; the first answers are those of the first validation.
    first = list(seen.items())[:5]
    requests = [Request(prompt, SamplingParams(max_new_tokens=4), alpha=1.0) for prompt, _ in first]
    assert [t.text for t in small.generate_batch(requests)] == [answer for _, answer in first]


def test_training_starts_from_an_adapter(models: Path, tmp_path: Path) -> None:
    first = settings(models, tmp_path / "first", measure_tokens=0)
    tune(first, reward=letters)
    adapter = str(first.directory / "adapters" / "out")
    more = {"start_from": adapter, "lora_rank": 32, "measure_tokens": 0, "learning_rate": 1e-9}
    second = settings(models, tmp_path / "second", **more)
    result = tune(second, reward=letters)
    own = json.loads((second.directory / "adapters" / "out" / "adapter_config.json").read_text())
    assert own["r"] == 4 and own["inference_mode"]
    for name, tensor in weights(first).items():
        torch.testing.assert_close(tensor, weights(second)[name], atol=1e-6, rtol=0)
    assert result.rewards is not None
    kls = [row["kl"] for row in read_log(second) if "kl" in row]
    assert max(kls) < 1e-4  # from the adapter that it started from, not from the untuned model
    unset = {"group_size": TuneSettings.group_size, "max_new_tokens": TuneSettings.max_new_tokens}
    sft = settings(models, tmp_path / "sft", **more | unset | {"method": "sft", "alpha": 1.0})
    write_rows(Path(sft.data), [{"prompt": r["prompt"], "completion": " tin"} for r in prompts()])
    tune(sft)
    for name, tensor in weights(first).items():
        torch.testing.assert_close(tensor, weights(sft)[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_answers_have_the_log_probabilities_of_generation(
    architecture: Any, models: Path, tmp_path: Path
) -> None:
    """Padding shifts no position, which absolute ones (GPT-2's) would show."""
    tiny_model(tmp_path / "model", architecture, seed=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    rows = [([70, 80, 90], [65, 66]), ([71], [67]), ([72, 73], [68, 69])]
    input_ids = torch.tensor([[70, 80, 90, 65, 66], [0, 0, 71, 67, 0], [0, 72, 73, 68, 69]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 1, 1, 1]])
    found, entropies = answer_logprobs(model, input_ids, mask, 2, temperature=0.5)
    for i, (prompt, answer) in enumerate(rows):
        logits = model(torch.tensor([prompt + answer])).logits[0].float() / 0.5
        logprobs = logits.log_softmax(-1)
        for k, token_id in enumerate(answer):
            at = logprobs[len(prompt) + k - 1]
            torch.testing.assert_close(found[i, k], at[token_id])
            torch.testing.assert_close(entropies[i, k], -(at.exp() * at).sum())
    assert found[1, 1] == entropies[1, 1] == 0
    assert found.requires_grad and not entropies.requires_grad


def test_an_answer_ends_where_the_bases_would(models: Path) -> None:
    small, base = (find_checkpoint(str(models / n), root=models) for n in ("small", "base"))
    assert ending_ids(small, base) == [small.tokenizer.eos_token_id]


def test_a_pass_has_every_prompt_in_groups_and_a_full_last_step() -> None:
    groups = Groups(num_prompts=5, prompts_per_step=2, group_size=3, repeats=2, seed=7)
    first = list(groups)
    assert len(first) == len(groups) == 3 * 2 * 3 * 2
    steps = [first[i : i + 12] for i in range(0, 36, 12)]
    for step in steps:
        assert step[:6] == step[6:]
        assert step[0:3] == [step[0]] * 3 and step[3:6] == [step[3]] * 3
    order = [step[i] for step in steps for i in (0, 3)]
    assert sorted(order[:5]) == [0, 1, 2, 3, 4] and order[5] == order[0]
    assert list(groups) == first
    groups.set_epoch(1)
    assert list(groups) != first
    assert len(set(Groups(num_prompts=1, prompts_per_step=4, group_size=2, repeats=1, seed=0))) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": "exact", "method": "sft"}, "has no use for the reward"),
        ({"reward": "exact", "full": True}, "grpo trains an adapter"),
        ({"reward": "exact", "start_from": "x", "lora_rank": 8}, "lora_rank is 8"),
        ({"reward": "exact", "calibrate": True}, "calibrate concerns an anti-expert"),
        ({"reward": "nothing"}, "must be exact"),
        ({"group_size": 1}, "group_size is 1"),
        ({"method": "dpo", "beta": 0.0}, "beta is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    changes: dict[str, Any], said: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        settings(models, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "sft", "group_size": 4}, "group_size is 4, and method sft has no use for it"),
        ({"method": "sft", "beta": 0.2}, "beta is 0.2, and method sft has no use for it"),
        ({"reward": "exact", "cpt_form": "paper"}, "cpt_form is 'paper', and method grpo"),
    ],
)
def test_a_setting_that_the_method_has_no_use_for_is_refused(
    changes: dict[str, Any], said: str, models: Path, tmp_path: Path
) -> None:
    rows = [{**row, "completion": row["answer"]} for row in prompts()]
    unset = {"group_size": TuneSettings.group_size, "max_new_tokens": TuneSettings.max_new_tokens}
    data = write_rows(tmp_path / "given.jsonl", rows)
    with pytest.raises(InvalidRequest, match=said):
        tune(settings(models, tmp_path / "run", data=data, **unset | changes))


def test_a_run_by_reward_needs_one_reward_and_room(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="none is given"):
        tune(settings(models, tmp_path))
    with pytest.raises(InvalidRequest, match="only one can be used"):
        tune(settings(models, tmp_path, reward="exact"), reward=letters)
    with pytest.raises(InvalidRequest, match="leaves no room for a prompt within 128 tokens"):
        tune(settings(models, tmp_path, max_new_tokens=127), reward=letters)
