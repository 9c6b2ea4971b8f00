"""Files answered, texts scored, strengths swept and benchmarks run in vLLM: as the library does them.

Greedy texts are the library's, and the losses of given tokens its losses within 1e-3. Sampled texts are
vLLM's own, and the same in every run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("vllm", reason="needs vLLM; `make test-vllm` installs it", exc_type=ImportError)

from proxytune.checkpoints.output_bias import write_output_bias
from proxytune.cli import app
from proxytune.data.batch import run_batch
from proxytune.data.lines import BatchOptions
from proxytune.errors import InputFileError, InvalidRequest, OutputFileError, UnsupportedModel
from proxytune.evaluate.plan import EvalOptions
from proxytune.evaluate.run import evaluate
from proxytune.integrations.vllm import engine as vllm_engine
from proxytune.integrations.vllm.engine import load_in_vllm
from proxytune.measure.metrics import METRICS
from proxytune.measure.sweep import Grid, PromptWithReference, sweep_generations, sweep_likelihood
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams
from tests.support.tiny import NUM_TOKENS, tiny_adapter, tiny_model, tiny_tokenizer
from tests.support.tiny_recipe import BIAS, WEIGHTS

pytestmark = pytest.mark.slow

CLOSE = 1e-3
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)
OPTIONS = ("--enforce-eager", "--max-num-seqs", "6")
BANNED = [[token_id, -10000] for token_id in range(100)]
"""As a benchmark bans tokens; vLLM's server would change it to -100."""
TEXT = "The mayor shall hear what the council says, and say what the law is. " * 12


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A padded base, an adapter, and a pair whose tokens have other ids."""
    place = tmp_path_factory.mktemp("recipe")
    shuffled = tiny_tokenizer(shuffle_seed=5)
    tiny_model(place / "base", width=NUM_TOKENS + 6, hidden_size=128, seed=1, max_context=512)
    tiny_model(place / "small", hidden_size=128, seed=2, max_context=512)
    tiny_model(
        place / "other", "qwen2", hidden_size=128, seed=3, tokenizer=shuffled, max_context=512
    )
    tiny_model(place / "tuned", hidden_size=128, seed=4, max_context=512)
    tiny_adapter(place / "small", place / "adapter")
    write_output_bias(place / "two.safetensors", BIAS)
    small = ModelSpec(model="small")
    experts = (
        ExpertSpec("one", ModelSpec(adapter="adapter"), small, 0.5),
        ExpertSpec("two", ModelSpec(model="other"), small, 0.4, WEIGHTS, "two.safetensors"),
    )
    base = ModelSpec(model="base")
    return Recipe(base, experts, default_expert="one", directory=place).write(place)


@pytest.fixture(scope="module")
def library(recipe: Recipe) -> ProxyTuned:
    return ProxyTuned.load(recipe)


@pytest.fixture(scope="module")
def served(recipe: Recipe) -> Iterator[ProxyTuned]:
    """The recipe in vLLM; it is started by the first test that needs it, and gone after the last."""
    model = load_in_vllm(recipe, dtype="float32", options=OPTIONS)
    yield model
    engine: Any = model.ensemble.engine
    engine.close()


def is_started(model: ProxyTuned) -> bool:
    engine: Any = model.ensemble.engine
    return engine._llm is not None


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def answer_file(model: ProxyTuned, source: Path, target: Path, **changes: Any) -> Any:
    on_progress = changes.pop("on_progress", None)
    sampling = SamplingParams(max_new_tokens=10)
    options = {"engine": "local" if model.ensemble.engine is None else "vllm", "batch_size": 8}
    return run_batch(
        source,
        target,
        recipe=model.recipe,
        load=lambda names: model,
        options=BatchOptions(sampling, **{**options, **changes}),
        on_progress=on_progress,
    )


# Refused before vLLM starts: these tests come first ----------------------------------------------------


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ({"policy": {"schedule": [[0, 1], [5, 0]]}}, "schedule"),
        ({"temperature": 3}, "temperature is 3"),
        ({"temperature": 0.001}, "temperature is 0.001"),
        ({"presence_penalty": 5}, "presence_penalty is 5"),
        ({"first_logit_bias": [[7, 1.0]]}, "first_logit_bias"),
        ({"max_new_tokens": 600}, "context"),
    ],
)
def test_a_line_that_vllm_cannot_answer_is_named_before_it_starts(served, tmp_path, own, named):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b", "options": own}])
    with pytest.raises(InputFileError, match=f"line 2(.|\n)*{named}"):
        answer_file(served, source, tmp_path / "out.jsonl")
    assert not is_started(served)


def test_a_prompt_that_the_models_read_differently_is_refused(served, recipe, tmp_path):
    """The expert has a chat template of its own; texts are the same for all, and messages are not."""
    own = replace(recipe.experts[0].expert, chat="{{ messages[0].content }}!")
    model = load_in_vllm(
        replace(recipe, experts=(replace(recipe.experts[0], expert=own),)),
        dtype="float32",
        options=OPTIONS,
    )
    model.job(Request("a text"))
    with pytest.raises(UnsupportedModel, match="reads the prompt in another format"):
        model.job(Request([{"role": "user", "content": "Who?"}]))
    with pytest.raises(UnsupportedModel, match="reads the prompt in another format"):
        model.score_completions([([{"role": "user", "content": "Who?"}], "me")], alphas=(0.5,))
    assert not is_started(model)
    # By itself it reads what it wants.
    model.alone(1).job(Request([{"role": "user", "content": "Who?"}]))


def test_an_expert_with_a_token_of_its_own_steers_and_does_not_answer_by_itself(
    recipe, data, tmp_path
):
    """vLLM's rows hold the base's tokens, and the expert could end its answer with its own."""
    own = tiny_tokenizer()
    own.add_special_tokens({"pad_token": "<pad>"})
    tiny_model(tmp_path / "small", width=NUM_TOKENS + 1, hidden_size=128, tokenizer=own)
    base = ModelSpec(model=str(recipe.directory / "base"))
    pair = ExpertSpec("padded", ModelSpec(model="small"), ModelSpec(same_as="base"))
    written = Recipe(base, (pair,), directory=tmp_path).write(tmp_path)
    model = load_in_vllm(written, dtype="float32", options=OPTIONS)
    sampling = SamplingParams(max_new_tokens=8)
    model.job(Request("a text", sampling))
    with pytest.raises(UnsupportedModel, match="cannot answer by itself"):
        model.alone(1).job(Request("a text", sampling))
    # Nor does a benchmark's first predictor answer before the last one is refused.
    options = EvalOptions(("gsm8k",), data_dir=data, max_new_tokens=6, engine="vllm")
    with pytest.raises(UnsupportedModel, match="cannot answer by itself"):
        evaluate(written, tmp_path / "out", options, load=lambda *_: model)
    assert not is_started(model)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--nonsense", "3"), "--nonsense"),
        (("--tensor-parallel-size", "many"), "tensor-parallel-size"),
        (("--model", "another"), "--model"),
        (("--dtype", "bfloat16"), "--dtype"),
        (("--speculative-config", '{"method": "ngram"}'), "--speculative-config"),
        (("--additional-config", '{"proxytune": {}}'), "--additional-config"),
    ],
)
def test_options_of_vllm_are_checked_by_name(recipe, options, named):
    with pytest.raises(InvalidRequest, match=named):
        load_in_vllm(recipe, options=options)


def test_exactness_is_refused_where_vllm_has_no_kernels_for_it(recipe):
    with pytest.raises(
        UnsupportedModel, match="batch-invariant kernels for GPUs only, not for cpu"
    ):
        load_in_vllm(recipe, is_exact=True)
    assert "VLLM_BATCH_INVARIANT" not in os.environ


def test_options_of_vllm_reach_it(recipe):
    model = load_in_vllm(
        recipe,
        experts=["two"],
        options=[
            *("--tensor-parallel-size", "2", "--distributed-executor-backend", "ray"),
            *("--max-model-len", "100", "--additional-config", '{"other": 1}'),
        ],
    )
    args: Any = vars(model.ensemble.engine)["_args"]
    assert (args.tensor_parallel_size, args.distributed_executor_backend) == (2, "ray")
    assert args.additional_config == {"other": 1, "proxytune": {"experts": ["two"]}}
    assert {m.backend.capabilities.max_context for m in model.ensemble.members} == {100}


# As the library ----------------------------------------------------------------------------------------


def lines() -> list[dict[str, Any]]:
    """Return lines that differ in strength, experts, policy and length; every fourth is sampled."""
    steering: tuple[dict[str, Any], ...] = (
        {},
        {"alpha": 0},
        {"alpha": 0.8, "expert": "two"},
        {"expert": {"one": 0.3, "two": 0.6}},
        {"policy": "gate_sure", "alpha": 1.2},
        {"combine": "union", "expert": ["one", "two"]},
        {"stop": ["e"], "min_new_tokens": 3, "logit_bias": BANNED},
        {"logprobs": 2, "repetition_penalty": 1.3},
    )
    found = []
    for index in range(24):
        own = {"max_new_tokens": 6 + index % 5} | steering[index % len(steering)]
        if index % 4 == 3:
            own |= {"temperature": 0.9, "top_p": 0.9}
        found.append({"id": index, "prompt": "the law is " + "abcdef"[: index % 6], "options": own})
    return found


def test_a_file_is_answered_as_the_library_does_and_goes_on_after_an_interruption(
    served, library, tmp_path
):
    source = write_lines(tmp_path / "in.jsonl", lines())
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    answer_file(served, source, whole)
    answer_file(library, source, tmp_path / "library.jsonl")

    class Interrupted(Exception):
        pass

    def interrupt(progress: Any) -> None:
        if progress.num_done >= 13:
            raise Interrupted

    with pytest.raises(Interrupted):
        answer_file(served, source, parts, on_progress=interrupt)
    assert len(read_lines(parts)) == 8
    with pytest.raises(OutputFileError, match="engine was"):
        answer_file(library, source, parts)
    report = answer_file(served, source, parts)
    assert report.num_resumed == 8 and report.num_lines == 24
    assert parts.read_bytes() == whole.read_bytes()

    for own, same in zip(read_lines(whole), read_lines(tmp_path / "library.jsonl"), strict=True):
        if "temperature" in own["options"]:
            assert own["output"]["seed"] == same["output"]["seed"]
            continue
        found, expected = own["output"].pop("logprobs", None), same["output"].pop("logprobs", None)
        assert own == same
        for token, other in zip(found or (), expected or (), strict=True):
            assert token["logprob"] == pytest.approx(other["logprob"], abs=CLOSE)
            assert [i for i, _ in token["top"]] == [i for i, _ in other["top"]]


def test_a_seed_gives_one_text_whatever_shares_the_batch(served):
    sampling = SamplingParams(max_new_tokens=10, temperature=1.0)
    requests = [Request(f"the law {i}", replace(sampling, seed=i), alpha=i / 2) for i in range(6)]
    together = [trace.text for trace in served.generate_batch(requests)]
    assert together == [served.generate(request).text for request in reversed(requests)][::-1]
    assert len(set(together)) == 6


@pytest.mark.parametrize("experts", ["one", ("one", "two")])
@pytest.mark.parametrize("window", [100, 512])
def test_a_text_is_scored_as_the_library_does(served, library, experts, window):
    alphas = (0.0, 0.5, -0.25)
    found = served.score(TEXT, alphas, experts=experts, window=window)
    expected = library.score(TEXT, alphas, experts=experts, window=window)
    assert [(row.name, row.alpha) for row in found.rows] == [
        (row.name, row.alpha) for row in expected.rows
    ]
    for own, same in zip(found.rows, expected.rows, strict=True):
        assert own.nats == pytest.approx(same.nats, abs=CLOSE), own.name
    assert len({round(row.nats, 2) for row in found.rows if row.alpha != 0}) > 4


def test_a_sweep_of_perplexities_picks_and_measures_as_the_library_does(served, library):
    reports = []
    for model in (served, library):
        passages = model.text_passages(TEXT, window=80)
        reports.append(
            sweep_likelihood(
                model.steered_by("two"),
                Grid.of(["two"], [0.2, 0.6, 1.0]),
                valid=passages[:5],
                test=passages[5:],
                own=[0.4],
            )
        )
    found, expected = reports
    assert found.picked == expected.picked and found.num_tokens == expected.num_tokens
    sides = [(*each.points, *each.test.values()) for each in reports]
    pairs = zip(*sides, strict=True)
    for own, same in pairs:
        assert own.value == pytest.approx(same.value, rel=CLOSE)
        assert own.change == pytest.approx(same.change, rel=CLOSE)


def test_a_sweep_of_generated_texts_is_the_librarys(served, library):
    reports = []
    for model in (served, library):
        rows = [
            PromptWithReference(model.job(Request(f"law {i}")).prompts, "the law") for i in range(8)
        ]
        reports.append(
            sweep_generations(
                model.steered_by(("one", "two")),
                Grid.of(["one", "two"], {"one": [0.0, 0.5], "two": [0.3, 1.0]}),
                METRICS["chrf"],
                valid=rows[:4],
                test=rows[4:],
                own=[0.5, 0.4],
                sampling=SamplingParams(max_new_tokens=8),
            )
        )
    found, expected = reports
    assert replace(found, num_read=None) == replace(expected, num_read=None)
    assert found.num_read == found.num_tokens  # each text is generated by itself


def test_the_commands_hand_vllm_its_options(served, recipe, tmp_path, monkeypatch):
    asked: list[dict[str, Any]] = []

    def load(wanted: Recipe, **options: Any) -> ProxyTuned:
        asked.append(options)
        return served

    monkeypatch.setattr(vllm_engine, "load_in_vllm", load)
    source = write_lines(tmp_path / "in.jsonl", lines()[:3])
    text = tmp_path / "text.txt"
    text.write_text(TEXT, "utf-8")
    there = str(recipe.directory)
    own = ["--engine", "vllm", "--dtype", "float32"]
    files = ["--input-file", str(source), "--output-file", str(tmp_path / "out.jsonl")]
    for command in (
        ["generate", there, *own, *files, "--json"],
        ["score", there, *own, "--text-file", str(text), "--window", "100", "--json"],
        ["sweep", there, *own, "--text-file", str(text), "--window", "100", "--json"],
    ):
        result = CliRunner().invoke(app, [*command, "--", "--tensor-parallel-size", "4"])
        assert result.exit_code == 0, result.output
        json.loads(result.stdout)
        assert asked[-1]["options"] == ("--tensor-parallel-size", "4")
        assert asked[-1]["dtype"] == "float32"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    gsm = [{"question": f"Tom has {n}?", "answer": f"x\n#### {n}"} for n in range(4)]
    news = [
        {"question_id": f"q{i}", "question_sentence": "?", "choices": ["x", "y"], "answer": ["0"]}
        for i in range(4)
    ]
    for name, rows in (("gsm8k/test.jsonl", gsm), ("realtimeqa/past.jsonl", news)):
        (folder / name).parent.mkdir()
        write_lines(folder / name, rows)
    return folder


def test_benchmarks_have_the_librarys_table_with_the_tuned_model(
    served, recipe, data, tmp_path, capfd
):
    """Answers by generation and by likelihood; base, expert, steered, and another model as the tuned one.

    Each engine ends with its predictors, so this test comes last.
    """
    started: list[Recipe] = []

    def load(wanted: Recipe, experts: Any) -> ProxyTuned:
        if wanted.base == recipe.base:
            return served
        started.append(wanted)
        return load_in_vllm(wanted, experts=experts, dtype="float32", options=OPTIONS)

    def run(name: str, load: Any, **changes: Any) -> dict[str, Any]:
        options = EvalOptions(
            ("gsm8k", "realtimeqa"),
            data_dir=data,
            max_new_tokens=6,
            alphas=(0.5, 1.0),
            tuned="tuned",
            dtype="float32",
            **changes,
        )
        tasks = evaluate(recipe, tmp_path / name, options, load=load).to_dict()["tasks"]
        for result in (result for task in tasks for result in task["results"]):
            del result["seconds"], result["tokens_per_s"]
        return tasks

    found = run("vllm", load, engine="vllm")
    assert len(started) == 1 and not is_started(served)
    assert capfd.readouterr().out == ""  # stdout is for the command's answer
    expected = run("library", lambda wanted, experts: ProxyTuned.load(wanted, experts=experts))
    assert found == expected
    for task in ("gsm8k", "realtimeqa"):
        for file in sorted((tmp_path / "library" / "generated" / task).glob("*.jsonl")):
            same = tmp_path / "vllm" / "generated" / task / file.name
            own, other = read_lines(same), read_lines(file)
            texts = [[line["output"]["text"] for line in side] for side in (own, other)]
            assert texts[0] == texts[1], file.name
