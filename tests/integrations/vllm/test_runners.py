"""What a request can ask, on each of vLLM's model runners: the library's values, whatever shares the batch.

The second runner needs Triton, which CPU builds do not have. Here its kernels run in Triton's interpreter, so
that a recipe meets the runner that vLLM chooses on GPUs; once, an expert drafts as well. Of the newest
version, the Python files run with the compiled kernels of the oldest.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM; `make test-vllm` installs it", exc_type=ImportError)

from proxytune.integrations.vllm.draft import speculative_config
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from tests.support.tiny_recipe import tiny_recipe, tiny_requests
from tests.support.vllm_engine import (
    ENVIRONMENT,
    IN_PROCESS,
    ROUNDING,
    SECOND_RUNNER,
    Engine,
    compare,
)
from tests.support.vllm_source import VllmSource, runnable_newest

pytestmark = pytest.mark.slow

os.environ.update(ENVIRONMENT)

# What requests ask of vLLM, and the same asked of the library.
ASKED: tuple[tuple[dict[str, Any] | None, dict[str, Any]], ...] = (
    (None, {}),
    ({"alpha": 0}, {"alpha": 0.0}),
    ({"expert": "mixed=1.5"}, {"experts": {"mixed": 1.5}}),
    (
        {"expert": ["two", "three"], "policy": "gate_sure"},
        {"experts": ("two", "three"), "policy": "gate_sure"},
    ),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def library(tiny) -> ProxyTuned:
    return ProxyTuned.load(tiny)


@pytest.fixture(scope="module")
def newest(tmp_path_factory) -> Path:
    """A folder with a vLLM 0.33 that runs."""
    if VllmSource.newest() is None:
        pytest.skip("vLLM 0.33 is not unpacked; `make test-vllm` does it")
    return runnable_newest(tmp_path_factory.mktemp("newest") / "vllm-0.33")


@pytest.fixture(
    scope="module",
    params=["0.32, first runner", "0.32, second, drafting", "0.33, first", "0.33, second"],
)
def engine(request, tiny) -> Iterator[Engine]:
    """Few rows, so that requests wait and change their places in the batch."""
    options: dict[str, Any] = {"max_model_len": 192, "max_num_seqs": 6}
    # A random model would go on writing spaces.
    options["structured_outputs_config"] = {"backend": "xgrammar", "disable_any_whitespace": True}
    if "drafting" in request.param:
        options["speculative_config"] = speculative_config(Recipe.read(tiny), num_tokens=3)
    environment = IN_PROCESS | (SECOND_RUNNER if "second" in request.param else {})
    if "0.33" in request.param:
        paths = [str(request.getfixturevalue("newest")), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with Engine(tiny, environment=environment, **options) as started:
        (said,) = started.ask([{"prompt": "a", "max_tokens": 1}])
        assert said["vllm"].startswith(request.param[:4])
        assert said["is_second_runner"] == ("second" in request.param)
        yield started


def check_logprobs(library: ProxyTuned, prompt: str, sample: dict[str, Any], own: Any) -> None:
    """Fail unless the tokens of a sample have the logprobs that the library gives them."""
    steps = library.explain(prompt, sample["token_ids"], **own).steps
    assert len(steps) == len(sample["token_ids"]) > 0
    for step, shown in zip(steps, sample["logprobs"], strict=True):
        assert shown[str(step.token_id)] == pytest.approx(step.logprob, abs=ROUNDING)


def test_neighbours_of_other_strengths_and_experts_do_not_change_a_text(engine, library):
    asked, same = tiny_requests(12, 6)
    assert compare(engine.ask(asked), library.generate_batch(same)) <= 1


OPTIONS = ["A", "B", "C", "D", "E", "F", "G", "H"]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "name": {"type": "string", "pattern": "^[a-h]{5}$"}},
    "required": ["ok", "name"],
    "additionalProperties": False,
}
CONSTRAINTS: dict[str, dict[str, Any] | None] = {
    "json": {"json": SCHEMA},
    "choice": {"choice": OPTIONS},
    "regex": {"regex": "[a-f]{4}-[0-9]{2}"},
    "free": None,
}


def test_constrained_and_free_rows_of_one_batch_are_each_as_alone(engine, library):
    """A JSON schema, choices, a regular expression and nothing, each at four strengths."""
    prompt = "what it was"
    places = [(name, place) for place in range(len(ASKED)) for name in CONSTRAINTS]
    requests = []
    for name, place in places:
        own = {} if CONSTRAINTS[name] is None else {"structured_outputs": CONSTRAINTS[name]}
        request = {"prompt": prompt, "max_tokens": 40 if own else 8, "extra_args": ASKED[place][0]}
        requests.append(request | own)
    together = engine.ask(requests)
    for index in range(0, len(requests), 3):  # every constraint and every strength
        (alone,) = engine.ask([requests[index]])
        assert together[index]["token_ids"] == alone["token_ids"], places[index]
    texts = {key: answer["text"] for key, answer in zip(places, together, strict=True)}
    for (name, place), text in texts.items():
        own = ASKED[place][1]
        if name == "json":
            found = json.loads(text)
            assert set(found) == {"ok", "name"} and isinstance(found["ok"], bool)
            assert re.fullmatch("[a-h]{5}", found["name"])
        elif name == "choice":
            assert text == library.choose(prompt, OPTIONS, **own).option
        elif name == "regex":
            assert re.fullmatch("[a-f]{4}-[0-9]{2}", text)
    for name in CONSTRAINTS:
        assert len({text for (kind, _), text in texts.items() if kind == name}) > 1, texts


def test_samples_of_one_prompt_are_drawn_from_the_rows_own_distribution(engine, library):
    prompt = "once more"
    requests = [
        {"prompt": prompt, "max_tokens": 6, "logprobs": 0, "temperature": 1, "seed": 3, "n": 3,
         "extra_args": extra}
        for extra, _ in ASKED
    ]  # fmt: skip
    answers = engine.ask(requests)
    for answer, (_, own) in zip(answers, ASKED, strict=True):
        drawn = [tuple(sample["token_ids"]) for sample in answer["samples"]]
        assert len(set(drawn)) == 3
        for sample in answer["samples"]:
            check_logprobs(library, prompt, sample, own)
    again = engine.ask(requests[1:2])
    assert again[0]["samples"] == answers[1]["samples"]


def test_a_prompts_logprobs_are_the_steered_ones_beside_rows_of_other_strengths(engine, library):
    prompt = "a prompt that is scored"
    requests = [
        {"prompt": prompt, "max_tokens": 2, "prompt_logprobs": 0, "extra_args": extra}
        for extra in (None, {"alpha": 0.5})  # the recipe's strength, given by name too
    ]
    others = [{"prompt": "x" * 9, "max_tokens": 4, "extra_args": extra} for extra, _ in ASKED]
    answers = engine.ask([*others[:2], *requests, *others[2:]])[2:4]
    token_ids = library.tokenizer.encode(prompt)
    steps = library.explain(token_ids[:1], token_ids[1:]).steps
    for answer in answers:
        assert "error" not in answer, answer
        shown = answer["prompt_logprobs"]
        assert shown[0] is None and len(shown) == len(token_ids)
        for step, entry in zip(steps, shown[1:], strict=True):
            assert entry[str(step.token_id)] == pytest.approx(step.logprob, abs=ROUNDING)
    (refused,) = engine.ask([requests[0] | {"extra_args": {"alpha": 0}}])
    assert "prompt_logprobs (echo with logprobs, over HTTP)" in refused["error"]


def test_a_prefix_cached_under_one_strength_is_used_under_another(engine, library):
    """The cache's hits are counted, and the texts are the library's."""
    prompt = "the same long prompt " * 8
    asked, cached = [], []
    for extra, own in ASKED:
        request = {"prompt": prompt, "max_tokens": 4, "logprobs": 2, "extra_args": extra}
        asked += engine.ask([request])
        cached.append(asked[-1]["num_cached_tokens"])
        check_logprobs(library, prompt, asked[-1], own)
    assert cached[0] == 0 and all(count >= 128 for count in cached[1:]), cached
    assert len({tuple(answer["token_ids"]) for answer in asked}) > 1
