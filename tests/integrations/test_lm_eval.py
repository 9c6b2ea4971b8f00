"""lm-eval with a recipe as its model: equal to its own `hf` model at alpha 0, to the formula elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from tokenizers.processors import TemplateProcessing

from proxytune.errors import InvalidRequest, UnsafeModel
from proxytune.measure.likelihood import likelihoods
from proxytune.measure.score import passage_of
from proxytune.model import ProxyTuned
from proxytune.policy import Policy
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.testing import toy_model
from tests.support.foreign_code import model_with_code
from tests.support.served import served
from tests.support.tiny import tiny_model, tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval; `make test-lm-eval` installs it")

from lm_eval.api.instance import Instance  # noqa: E402

from proxytune.evaluate.harness import known_names, run_task  # noqa: E402
from proxytune.evaluate.run import _check_names  # noqa: E402
from proxytune.integrations.lm_eval import ProxyTunedLM  # noqa: E402

QUESTIONS = [
    ("Which animal barks?", ["A cat", "A dog", "The fish of the sea"], 1),
    ("What is 2 + 2?", ["4", "five", "the number 22"], 0),
    ("Where is the theatre?", ["In the tree", "There", "At a thing"], 1),
    ("Who is there?", ["A man in the inn", "The queen", "Nobody"], 2),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "expert", "anti-expert")):
        tiny_model(folder / name, seed=seed)
    return Recipe(
        base=ModelSpec(model="base"),
        experts=(ExpertSpec("tiny", ModelSpec(model="expert"), ModelSpec(model="anti-expert")),),
        directory=folder,
    ).write(folder / "recipe")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[dict]:
    """Three of the harness's own kinds of task, read from local files."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "question": q,
            "choices": c,
            "answer": a,
            "target": c[a],
            "page": f"{q} {' '.join(c)} " * 9,
        }
        for q, c, a in QUESTIONS
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
    }
    return [
        {
            "task": "local_choice",
            **source,
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            "task": "local_answer",
            **source,
            "output_type": "generate_until",
            "doc_to_text": "{{question}} ",
            "doc_to_target": "target",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}, {"metric": "bleu"}],
        },
        {
            "task": "local_text",
            **source,
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
    ]


def run(model, tasks, **settings):
    return lm_eval.simple_evaluate(
        model=model, tasks=tasks, bootstrap_iters=0, log_samples=True, verbosity="ERROR", **settings
    )


def test_at_alpha_0_every_number_is_the_harness_own(recipe, tasks):
    from lm_eval.models.huggingface import HFLM

    base = recipe.directory.parent / "base"
    # lm-eval 0.4.13 gives other rolling likelihoods in batches than one by one; one by one they are right.
    theirs = run(HFLM(pretrained=str(base), dtype="float32", batch_size=1, device="cpu"), tasks)
    ours = run(ProxyTunedLM(str(recipe.directory), alpha=0.0, batch_size=3), tasks)
    assert theirs["results"].keys() == ours["results"].keys()
    for task, values in theirs["results"].items():
        for name, value in values.items():
            if isinstance(value, float):
                # The digits that the harness prints.
                assert f"{ours['results'][task][name]:.4f}" == f"{value:.4f}", (task, name)
    for task in ("local_choice", "local_answer"):
        for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert one["arguments"] == other["arguments"]
            if task == "local_answer":
                assert one["resps"] == other["resps"]


def test_with_expert_for_base_and_anti_expert_alpha_1_is_the_expert(recipe, tasks):
    from lm_eval.models.huggingface import HFLM

    folder = recipe.directory.parent
    same = Recipe(
        base=ModelSpec(model="base"),
        experts=(ExpertSpec("e", ModelSpec(model="expert"), ModelSpec(model="base")),),
        directory=folder,
    )
    ours = run(ProxyTunedLM(ProxyTuned.load(same), alpha=1.0), tasks[:1])
    theirs = run(HFLM(pretrained=str(folder / "expert"), dtype="float32", device="cpu"), tasks[:1])
    for one, other in zip(
        ours["samples"]["local_choice"], theirs["samples"]["local_choice"], strict=True
    ):
        for (logprob, greedy), (wanted, is_greedy) in zip(
            [r[0] for r in one["resps"]], [r[0] for r in other["resps"]], strict=True
        ):
            # Logits combined and not combined differ by rounding in float32.
            assert float(logprob) == pytest.approx(float(wanted), abs=1e-3)
            assert str(greedy) == str(is_greedy)


def test_over_http_every_number_is_that_of_the_recipe_itself(recipe, tasks):
    """The harness scores texts with echo and logprobs, as token ids with one new token."""
    for package in ("tenacity", "aiohttp", "tiktoken"):
        pytest.importorskip(package, reason="needs `pip install 'lm-eval[api]'`")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    # The harness cuts texts for a server into windows that are two tokens shorter.
    max_length = ProxyTunedLM(str(recipe.directory)).max_length
    ours = run(ProxyTunedLM(str(recipe.directory), max_length=max_length - 2), tasks)
    with served(ProxyTuned.load(recipe)) as server:
        client = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model="toy",
            tokenizer=str(recipe.directory.parent / "base"),
            tokenizer_backend="huggingface",
            max_length=max_length,
            batch_size=3,
        )
        theirs = run(client, tasks)
        pairs = [pair for pair in SPANNING if pair[0].strip()]
        scored = client.loglikelihood(instances(pairs), disable_tqdm=True)
        wanted = ProxyTunedLM(str(recipe.directory)).loglikelihood(instances(pairs), True)
        assert [g for _, g in scored] == [g for _, g in wanted]
        assert [p for p, _ in scored] == pytest.approx([p for p, _ in wanted], abs=1e-4)
    for task, values in ours["results"].items():
        for name, value in values.items():
            if isinstance(value, float):
                # The digits that the harness prints.
                assert f"{theirs['results'][task][name]:.4f}" == f"{value:.4f}", (task, name)
    samples = (ours["samples"]["local_choice"], theirs["samples"]["local_choice"])
    for one, other in zip(*samples, strict=True):
        pairs = [(float(logprob), str(greedy)) for ((logprob, greedy),) in one["resps"]]
        found = [(float(logprob), str(greedy)) for ((logprob, greedy),) in other["resps"]]
        assert [greedy for _, greedy in found] == [greedy for _, greedy in pairs]
        # A prompt that is read in other pieces has logits that differ by rounding in float32.
        assert [p for p, _ in found] == pytest.approx([p for p, _ in pairs], abs=1e-4)


def test_likelihoods_in_a_batch_are_the_formula_applied_token_by_token():
    model = toy_model(memory=0.3)
    ensemble = model.ensemble
    texts = [("ab", "cde"), ("a", "b"), ("abc", "fghijk"), ("x", "yz")]
    passages = [
        passage_of(ensemble, model.tokenizer.encode(p), model.tokenizer.encode(c)) for p, c in texts
    ]
    found = dict(likelihoods(ensemble, passages, (0.7,), batch_size=3))
    for index, (prompt, continuation) in enumerate(texts):
        ids = model.tokenizer.encode(prompt + continuation)
        total, greedy = 0.0, True
        for place in range(len(prompt), len(ids)):
            base, anti, expert = (
                m.backend.prefill([ids[:place]], adapters=[m.adapter]).logits[0]
                for m in ensemble.members
            )
            steered = base + 0.7 * (expert - anti)
            total += float(steered.log_softmax(-1)[ids[place]])
            greedy = greedy and int(steered.argmax()) == ids[place]
        assert found[index].logprob == pytest.approx(total, abs=1e-5)
        assert found[index].is_greedy == greedy


def test_likelihoods_follow_the_policy_of_the_recipe():
    model = toy_model(memory=0.3)
    ensemble = replace(model.ensemble, policy=Policy(name="gate_sure", threshold=0.2))
    encode = model.tokenizer.encode
    passages = [passage_of(ensemble, encode("ab"), encode("cdefgh")) for _ in range(2)]
    found = dict(likelihoods(ensemble, passages, (1.5,), batch_size=2))
    ids = encode("abcdefgh")
    total, num_sure = 0.0, 0
    for place in range(2, len(ids)):
        base, anti, expert = (m.backend.prefill([ids[:place]]).logits[0] for m in ensemble.members)
        is_sure = float(base.softmax(-1).max()) >= 0.2
        num_sure += is_sure
        steered = base if is_sure else base + 1.5 * (expert - anti)
        total += float(steered.log_softmax(-1)[ids[place]])
    assert 0 < num_sure < 6
    assert found[0].logprob == found[1].logprob == pytest.approx(total, abs=1e-4)


def instance(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def instances(pairs):
    return [instance("loglikelihood", *pair) for pair in pairs]


SPANNING = [
    ("t", "he end"), ("in t", "here"), ("a i", "nn"), ("the e", "rr"), ("in ", "the end"),
    ("x  ", " a"), ("a\n", "b"), ("the end", " "), ("Zo", "ë"), ("🙂", " the"), ("in the", " a"),
    ("", "the"), ("<|im_start|>a", "b"),
]  # fmt: skip
"""Merges across the boundary, white space on both sides of it, characters of several bytes, a start token."""


@pytest.fixture(scope="module", params=[False, True], ids=["without start", "with start"])
def with_harness(request, tmp_path_factory):
    """A recipe at alpha 0 and the harness's own model of its base, whose texts may begin with a token."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("span")
    tokenizer = tiny_tokenizer()
    if request.param:
        start = "<|im_start|>"
        tokenizer.bos_token = start
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.convert_tokens_to_ids(start))]
        )
    for seed, name in enumerate(("base", "expert", "anti-expert")):
        tiny_model(folder / name, seed=seed, tokenizer=tokenizer)
    sides = ModelSpec(model="expert"), ModelSpec(model="anti-expert")
    recipe = Recipe(ModelSpec(model="base"), (ExpertSpec("e", *sides),), directory=folder)
    theirs = HFLM(pretrained=str(folder / "base"), dtype="float32", batch_size=1, device="cpu")
    return ProxyTunedLM(ProxyTuned.load(recipe), alpha=0.0), theirs


def agree(ours, theirs, pairs_of):
    """Check that two models give contexts and continuations, as each writes them, the same scores."""
    found, wanted = (
        lm.loglikelihood(instances(pairs_of(lm)), disable_tqdm=True) for lm in (ours, theirs)
    )
    assert [bool(greedy) for _, greedy in found] == [bool(greedy) for _, greedy in wanted]
    assert [p for p, _ in found] == pytest.approx([float(p) for p, _ in wanted], abs=1e-4)


def test_contexts_and_continuations_are_cut_as_by_the_harness_own_model(with_harness):
    """A start token that the context begins with used to be put there twice."""
    agree(*with_harness, lambda lm: SPANNING)
    ours, theirs = with_harness
    text = instance("loglikelihood_rolling", "<|im_start|>the end")
    (found,), (wanted,) = (lm.loglikelihood_rolling([text], True) for lm in (ours, theirs))
    assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("begun", ["", "t", "It is "])
def test_conversations_are_cut_as_by_the_harness_own_model(with_harness, begun):
    """The end of the prompt and the beginning of the answer used to be cut apart."""
    messages = [{"role": "user", "content": "Is it the"}]
    messages += [{"role": "assistant", "content": begun}] if begun else []

    def pairs(lm):
        context = lm.apply_chat_template(messages, add_generation_prompt=not begun)
        return [(context, answer) for answer in ("the end", " the", "here", "\nA")]

    agree(*with_harness, pairs)


def test_a_token_that_spans_all_of_the_continuation_is_scored(recipe):
    """It used to be certain: no token was left to score. The harness's own model fails there."""
    lm = ProxyTunedLM(str(recipe.directory), alpha=0.0)
    base = lm.model.ensemble.members[0].backend
    ids = lm.tokenizer.get_vocab()
    wanted = [
        ([ids["a"]], "Ġthe"),  # "a t" and "he"
        ([lm.prefix_token_id], "the"),  # "t" and "he"
        ([lm.prefix_token_id], "Ġthe"),  # " " and "the"
    ]
    found = lm.loglikelihood(instances([("a t", "he"), ("t", "he"), (" ", "the")]), True)
    for (logprob, _), (before, token) in zip(found, wanted, strict=True):
        logprobs = base.prefill([before]).logits[0].log_softmax(-1)
        assert logprob == pytest.approx(float(logprobs[ids[token]]), abs=1e-5)


def test_models_of_other_formats_do_not_read_what_the_continuation_took_over(recipe):
    sides = (
        ModelSpec(model="../expert", chat="{{ prompt }} answer: "),
        ModelSpec(model="../anti-expert"),
    )
    mixed = Recipe(recipe.base, (ExpertSpec("e", *sides),), directory=recipe.directory)
    lm = ProxyTunedLM(ProxyTuned.load(mixed))
    begun = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "a t"}]
    context = lm.apply_chat_template(begun, add_generation_prompt=False)
    passage = lm._passage(context, "he")
    read = [str(lm.tokenizer.decode(list(p))) for p in passage.prompts]
    assert str(lm.tokenizer.decode(list(passage.token_ids))) == " the"
    assert read[0].endswith("<|im_start|>assistant\na")
    assert read[1:] == ["the answer: a", "the answer: a"]


def test_an_empty_continuation_is_refused(recipe):
    lm = ProxyTunedLM(str(recipe.directory))
    for context in ("a", ""):
        with pytest.raises(InvalidRequest, match=r"continuation of .* is empty"):
            lm.loglikelihood(instances([(context, "")]), disable_tqdm=True)


def test_an_empty_context_begins_with_the_start_token():
    lm = ProxyTunedLM(toy_model(), alpha=0.0)
    ((logprob, _),) = lm.loglikelihood([instance("loglikelihood", "", "a")], disable_tqdm=True)
    base = lm.model.ensemble.members[0].backend
    wanted = base.prefill([[lm.prefix_token_id]]).logits[0].log_softmax(-1)
    assert logprob == pytest.approx(float(wanted[lm.tok_encode("a")[0]]), abs=1e-5)


def test_generation_settings_that_are_not_done_here_are_refused_by_name():
    lm = ProxyTunedLM(toy_model())
    with pytest.raises(InvalidRequest, match="'num_beams'"):
        lm.generate_until([instance("generate_until", "a", {"num_beams": 4})], disable_tqdm=True)


def test_a_conversation_reaches_every_model_in_its_own_format(recipe):
    chat = Recipe(
        base=replace(recipe.base, chat="plain"),
        experts=(
            ExpertSpec(
                "tiny",
                ModelSpec(model="../expert", prompt="chat"),
                ModelSpec(model="../anti-expert", chat="plain"),
            ),
        ),
        directory=recipe.directory,
    )
    lm = ProxyTunedLM(ProxyTuned.load(chat))
    asked = [{"role": "user", "content": "Hello"}]

    def read(context: str) -> list[str]:
        return [str(lm.tokenizer.decode(list(p))) for p in lm._passage(context, " A").prompts]

    base, expert, anti = read(lm.apply_chat_template(asked))
    assert base == anti == "Hello"
    assert expert == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    # A task may have begun the answer (gen_prefix).
    begun = [*asked, {"role": "assistant", "content": "It is"}]
    base, expert, anti = read(lm.apply_chat_template(begun, add_generation_prompt=False))
    assert base == anti == "User: Hello\n\nAssistant: It is"
    assert expert == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nIt is"


def test_a_prompt_longer_than_the_context_loses_its_beginning(recipe):
    lm = ProxyTunedLM(str(recipe.directory), alpha=0.5, max_length=16)
    passage = lm._passage("x" * 40, "ab")
    assert [len(prompt) for prompt in passage.prompts] == [15, 15, 15]  # the last token is not read


@pytest.mark.parametrize("size", ["auto", 0])
def test_a_batch_size_that_is_no_count_is_refused(size):
    with pytest.raises(InvalidRequest, match="batch_size"):
        ProxyTunedLM(toy_model(), batch_size=size)


def test_the_code_of_a_recipes_models_runs_only_with_the_harness_users_word(tmp_path):
    mark = tmp_path / "the-code-ran"
    model_with_code(tmp_path / "base", mark)
    small = ModelSpec(model=str(tiny_model(tmp_path / "small")))
    base = ModelSpec(model="base", trust_remote_code=True)
    Recipe(base, (ExpertSpec("e", small, small),), directory=tmp_path).write(tmp_path)
    arguments = f"recipe={tmp_path}"
    with pytest.raises(UnsafeModel, match="own_code"):
        ProxyTunedLM.create_from_arg_string(arguments)
    assert not mark.exists()
    # What its flag --trust_remote_code adds to the arguments.
    ProxyTunedLM.create_from_arg_string(arguments + ",trust_remote_code=True")
    assert mark.exists()


@pytest.mark.slow
def test_the_harness_command_line_knows_the_model(recipe, tasks, tmp_path):
    config = dict(tasks[0])
    lines = [f"{key}: {json.dumps(value)}" for key, value in config.items()]
    (tmp_path / "local_choice.yaml").write_text("\n".join(lines))
    command = [
        sys.executable, "-m", "proxytune.integrations.lm_eval", "run", "--model", "proxytune",
        "--model_args", f"recipe={recipe.directory},alpha=0.5", "--tasks", "local_choice",
        "--include_path", str(tmp_path), "--batch_size", "2",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "|local_choice|" in result.stdout


def settings(tmp_path, **changes):
    return {
        "alpha": 0.5, "experts": None, "limit": None, "batch_size": 4, "seed": 0, "rule": "paper",
        "cache": tmp_path / "cache" / "base", **changes,
    }  # fmt: skip


def test_a_task_of_the_harness_gives_scores_by_item(tasks, recipe, tmp_path):
    model = ProxyTuned.load(recipe)
    found = run_task(tasks[0], model, **settings(tmp_path))
    theirs = run(ProxyTunedLM(model, alpha=0.5), tasks[:1])
    values = [record["acc"] for record in theirs["samples"]["local_choice"]]
    assert list(found.grade.scores) == [f"local_choice/{i}" for i in range(4)]
    assert list(found.grade.scores.values()) == values
    assert (found.grade.name, found.grade.metric) == ("acc", sum(values) / 4)
    assert not found.lower_is_better


def test_what_the_harness_has_asked_is_not_asked_again(tasks, recipe, tmp_path, monkeypatch):
    model = ProxyTuned.load(recipe)
    first = run_task(tasks[0], model, **settings(tmp_path, limit=3))

    def count(ensemble, passages, *arguments, **options):
        asked.extend(passages)
        yield from likelihoods(ensemble, passages, *arguments, **options)

    asked: list = []
    monkeypatch.setattr("proxytune.integrations.lm_eval.likelihoods", count)
    second = run_task(tasks[0], model, **settings(tmp_path))
    assert len(asked) == 3  # the options of the fourth question
    assert list(second.grade.scores.items())[:3] == list(first.grade.scores.items())


def test_a_perplexity_has_no_score_by_item(tasks, recipe, tmp_path):
    found = run_task(tasks[2], ProxyTuned.load(recipe), **settings(tmp_path))
    assert found.grade.name == "byte_perplexity"
    assert found.grade.metric == found.grade.metrics["byte_perplexity"]
    assert set(found.grade.scores.values()) == {None}


def test_names_of_the_harness_are_known_and_others_refused_with_names_like_them():
    assert "arc_easy" in known_names()
    with pytest.raises(InvalidRequest, match="arc_easy"):
        _check_names(("arc_eazy",))
    _check_names(("gsm8k", "arc_easy"))
