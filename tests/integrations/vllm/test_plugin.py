"""Recipes inside vLLM: the same tokens as the library's, whatever shares the batch; and what is refused.

Two engines may round differently. Where they part, the two candidates' steered logits must lie within 1e-3
of each other, and the texts are not compared further; the tests say how many such ties they allow.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM; `make test-vllm` installs it", exc_type=ImportError)

import torch

from proxytune.errors import UnsupportedModel, VocabularyMismatch
from proxytune.grants import Grants
from proxytune.integrations.vllm.config import RecipeConfig, find_ensemble
from proxytune.integrations.vllm.draft import draft_model, speculative_config
from proxytune.integrations.vllm.server import vllm_server_command
from proxytune.integrations.vllm.weights import share_equal_parameters
from proxytune.model import ProxyTuned
from proxytune.policy import Policy
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ApiSettings, ExpertSpec, LlamaCppSettings, ModelSpec
from proxytune.request import Request, SamplingParams
from tests.support.foreign_code import model_with_code
from tests.support.real_servers import free_port, running
from tests.support.tiny import MERGES, NUM_TOKENS, tiny_model, tiny_tokenizer
from tests.support.tiny_recipe import tiny_recipe, tiny_requests
from tests.support.vllm_engine import ENVIRONMENT, TIE, Engine, compare

pytestmark = pytest.mark.slow

os.environ.update(ENVIRONMENT)

SMOL = Recipe.read("package:proxytune/smol")
SERVED = ("tinyshakespeare", "legal", "medical")

# What requests ask of vLLM, and the same asked of the library.
ASKED: tuple[tuple[dict[str, Any] | None, dict[str, Any]], ...] = (
    (None, {}),
    ({"alpha": 0}, {"alpha": 0.0}),
    ({"alpha": 0.5}, {"alpha": 0.5}),
    ({"expert": "legal"}, {"experts": "legal"}),
    ({"expert": "medical", "alpha": 0.4}, {"experts": "medical", "alpha": 0.4}),
    ({"expert": ["legal", "medical"]}, {"experts": ("legal", "medical")}),
    (
        {"expert": "tinyshakespeare=0.3,legal=0.6"},
        {"experts": {"tinyshakespeare": 0.3, "legal": 0.6}},
    ),
    # A row's own policy, beside rows of others.
    ({"policy": "gate_sure"}, {"policy": "gate_sure"}),
    (
        {"policy": '{"clip": 1.5}', "expert": "legal", "alpha": 1.2},
        {"policy": {"clip": 1.5}, "experts": "legal", "alpha": 1.2},
    ),
    (
        {"combine": "union", "expert": ["legal", "medical"]},
        {"combine": "union", "experts": ("legal", "medical")},
    ),
)


def texts(num: int) -> list[str]:
    """Return excerpts of the held-out texts, of different lengths."""
    place = SMOL.directory / "heldout"
    words = [path.read_text(encoding="utf-8").split() for path in sorted(place.glob("*.txt"))]
    found = []
    for index in range(num):
        source = words[index % len(words)]
        start = 11 * (index // len(words))
        assert start + 20 < len(source)
        found.append(" ".join(source[start : start + 3 + index % 17]))
    return found


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> Path:
    """Three of the experts of the smol family, as a directory."""
    experts = tuple(expert for expert in SMOL.experts if expert.name in SERVED)
    place = tmp_path_factory.mktemp("recipe") / "smol"
    replace(SMOL, experts=experts).write(place)
    return place


Cases = tuple[list[dict[str, Any]], list[Request]]
"""Requests to vLLM, and the same to the library."""


def cases_of(
    given: list[tuple[str, dict[str, Any] | None, dict[str, Any]]], length: int, **more: Any
) -> Cases:
    """Return requests for texts, each with what it asks of vLLM and of the library."""
    asked, same = [], []
    sampling = SamplingParams(max_new_tokens=length, logprobs=2, **more)
    for text, extra, own in given:
        asked.append(
            {"prompt": text, "max_tokens": length, "logprobs": 2, "extra_args": extra, **more}
        )
        same.append(Request(text, sampling, **own))
    return asked, same


LONG = " ".join(texts(16))
REPEATING = "The Mayor shall the Mayor shall the Mayor"
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
LEGAL = ({"expert": "legal"}, {"experts": "legal"})
CASES: dict[str, Cases] = {
    # Neighbours with different strengths and experts.
    "mixed": cases_of([(text, *ASKED[i % len(ASKED)]) for i, text in enumerate(texts(112))], 12),
    "long": cases_of([(LONG, *one) for one in ASKED], 8),
    "repetition": cases_of([(REPEATING, *LEGAL)], 12, repetition_penalty=1.5),
    "presence": cases_of([(REPEATING, *LEGAL)], 12, presence_penalty=1.0),
    "ending": cases_of([(QUESTION, {"alpha": 0}, {"alpha": 0.0})], 60),
    "drafted": cases_of([(text, None, {}) for text in texts(16)], 16),
    "http": cases_of([("The Mayor shall", *one) for one in ASKED], 12),
}


@pytest.fixture(scope="module")
def expected(smol) -> dict[str, list[Any]]:
    """The library's answers to all cases, before an engine takes the processor."""
    library = ProxyTuned.load(smol)
    return {name: library.generate_batch(same, batch_size=16) for name, (_, same) in CASES.items()}


@pytest.fixture(scope="module")
def engine(smol, expected) -> Iterator[Engine]:
    started = Engine(smol, max_num_seqs=16)
    yield started
    started.close()


def test_in_mixed_batches_it_is_the_library_token_by_token(engine, expected):
    assert len({trace.text for trace in expected["mixed"]}) > 100
    assert compare(engine.ask(CASES["mixed"][0]), expected["mixed"]) <= 3


def test_a_prompt_cached_under_one_strength_serves_every_other(engine, expected):
    """All models read every token, so blocks that one request filled are right for all."""
    one_by_one = [engine.ask([request])[0] for request in CASES["long"][0]]
    assert compare(one_by_one, expected["long"]) == 0


@pytest.mark.parametrize("name", ["repetition", "presence"])
def test_penalties_see_the_rows_own_logits(engine, expected, name):
    """Penalties change steered logits, so a strength that came after them would give another text."""
    (answer,) = engine.ask(CASES[name][0])
    assert answer["token_ids"] == list(expected[name][0].token_ids)


def test_a_text_ends_where_the_base_says(engine, expected):
    answers = engine.ask(CASES["ending"][0])
    assert answers[0]["finish_reason"] == expected["ending"][0].finish_reason == "stop"
    assert compare(answers, expected["ending"]) == 0


def test_a_wrong_request_is_refused_and_the_engine_goes_on(engine):
    for extra, field in (
        ({"alpha": "x"}, "alpha"),
        ({"expert": "nonsense"}, "nonsense"),
        ({"policy": "x"}, "policy"),
    ):
        (answer,) = engine.ask([{"prompt": "a", "max_tokens": 2, "extra_args": extra}])
        assert answer["kind"] in ("VLLMValidationError", "ValueError") and field in answer["error"]
    (answer,) = engine.ask([{"prompt": "a", "max_tokens": 2, "extra_args": {"alpha": 1}}])
    assert len(answer["token_ids"]) == 2


# Other shapes: widths, ids, architectures, adapters, the base as its own expert ----------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_expected(tiny) -> list[Any]:
    return ProxyTuned.load(tiny).generate_batch(tiny_requests(40, 12)[1])


def check_tiny(tiny: Path, expected: list[Any], **options: Any) -> None:
    engine = Engine(tiny, max_model_len=192, **options)
    try:
        answers = engine.ask(tiny_requests(40, 12)[0])
    finally:
        engine.close()
    assert compare(answers, expected) <= 2
    padding = range(NUM_TOKENS + 1, NUM_TOKENS + 6)
    assert not any(token in padding for answer in answers for token in answer["token_ids"])


def test_other_widths_ids_and_architectures_are_the_library_too(tiny, tiny_expected):
    """Few rows and blocks, so that requests wait, are preempted, and change their places in the batch."""
    check_tiny(tiny, tiny_expected, max_num_seqs=6, num_gpu_blocks_override=5)


def two_ranks() -> dict[str, str]:
    """Return where two ranks run: vLLM wants a NUMA node for each where it chooses itself."""
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}


def test_two_ranks_that_share_every_layer_give_the_same(tiny, tiny_expected):
    check_tiny(tiny, tiny_expected, environment=two_ranks(), tensor_parallel_size=2)


def test_two_ranks_of_a_pipeline_and_compiled_models_give_the_same(tiny):
    """Both at once: on a CPU, vLLM 0.32 pipelines no model in eager mode, a plain one neither."""
    given = [
        (f"{letter} few words", {"alpha": index % 3}, {"alpha": float(index % 3)})
        for index, letter in enumerate("abcdefgh")
    ]
    asked, same = cases_of(given, 12)
    expected = ProxyTuned.load(tiny, experts=["one"]).generate_batch(same)
    engine = Engine(
        tiny,
        environment=two_ranks(),
        pipeline_parallel_size=2,
        enforce_eager=False,
        max_model_len=192,
        additional_config={"proxytune": {"experts": ["one"]}},
    )
    try:
        # Compiled kernels round otherwise, and random models at strength 2 magnify it; 1.1e-4 was seen.
        assert compare(engine.ask(asked), expected, rounding=TIE) <= 1
    finally:
        engine.close()


def quantised(source: Path, target: Path) -> Path:
    """Write a model with its projections in 8 bits, as compressed-tensors stores them."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    weights = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights[name] = (weight / scale).round().to(torch.int8)
            weights[f"{name}_scale"] = scale
        else:
            weights[name] = weight
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight | {"strategy": "channel", "dynamic": False},
        "input_activations": eight | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],  # by the name that it has in a model alone
        "config_groups": {"group_0": group},
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_quantised_base_is_itself_at_alpha_0_and_steered_by_models_that_are_not(tiny, tmp_path):
    # Without padding ids: vLLM alone would sample them, and a recipe never does.
    plain = tiny_model(tmp_path / "plain", hidden_size=128, seed=1, max_context=256)
    base = quantised(plain, tmp_path / "base")
    recipe = Recipe.read(tiny)
    one = tuple(expert for expert in recipe.experts if expert.name == "one")
    replace(recipe, base=ModelSpec(model=str(base)), experts=one).write(tmp_path / "recipe")
    texts = [f"{letter} few words" for letter in "abcdefgh"]
    asked = [{"prompt": text, "max_tokens": 12} for text in texts]
    steered_too = [
        {**request, "extra_args": {"alpha": alpha}} for alpha in (0, 0.5) for request in asked
    ]
    alone = Engine(base, max_model_len=192)
    try:
        expected = [answer["token_ids"] for answer in alone.ask(asked)]
    finally:
        alone.close()
    engine = Engine(tmp_path / "recipe", max_model_len=192)
    try:
        found = [answer["token_ids"] for answer in engine.ask(steered_too)]
    finally:
        engine.close()
    assert found[: len(texts)] == expected
    assert found[len(texts) :] != expected


def test_a_policy_of_the_recipe_steers_as_in_the_library(tiny, tmp_path):
    """Strengths found for each token, in rows whose experts differ, and tokens that are left out."""
    recipe = Recipe.read(tiny)
    policy = Policy(combine="majority", plausibility=0.001)
    replace(recipe, policy=policy).write(tmp_path / "policy")
    expected = ProxyTuned.load(tmp_path / "policy").generate_batch(tiny_requests(40, 12)[1])
    check_tiny(tmp_path / "policy", expected)


# Speculation --------------------------------------------------------------------------------------


def test_with_an_expert_that_drafts_the_text_is_the_same(smol, expected):
    engine = Engine(smol, speculative_config=speculative_config(Recipe.read(smol), num_tokens=3))
    try:
        assert compare(engine.ask(CASES["drafted"][0]), expected["drafted"]) <= 1
        (answer,) = engine.ask([{"prompt": "a", "max_tokens": 2, "extra_args": {"alpha": 0.5}}])
        said = (
            "alpha cannot be set per request: with speculative decoding vLLM's first model runner"
        )
        assert said in answer["error"] and "VLLM_USE_V2_MODEL_RUNNER=1" in answer["error"]
    finally:
        engine.close()


def test_with_drafts_experts_have_names_where_requests_can_choose_them(tiny, monkeypatch):
    for runner, names in (("0", []), ("1", ["t:mixed", "t:one", "t:two", "t:three", "t:contrast"])):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
        command = vllm_server_command(tiny, name="t", num_drafted=3)
        place = command.index("--served-model-name")
        assert command[place + 1 : command.index("--middleware")] == ["t", *names]


@pytest.mark.parametrize("name", ["one", "three", "mixed"])
def test_an_expert_is_written_as_a_draft_in_the_bases_ids(tiny, name, tmp_path, monkeypatch):
    """The written model, alone, gives the expert's logits in the base's vocabulary."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = Recipe.read(tiny)
    if name == "mixed":  # its anti-expert has permuted ids
        pair = next(e for e in recipe.experts if e.name == name)
        turned = ExpertSpec("mixed", pair.anti_expert, pair.expert)
        recipe = replace(recipe, experts=(turned,), default_expert=None)
    ensemble = find_ensemble(recipe)
    index = next(pair.expert for pair in ensemble.pairs if pair.name == name)
    place = draft_model(ensemble, ensemble.members[index])
    assert draft_model(ensemble, ensemble.members[index]) == place
    written = AutoModelForCausalLM.from_pretrained(place)
    ids = torch.tensor([[3, 14, 15, 92, 65]])
    assert written.config.vocab_size == NUM_TOKENS + 6
    found = written(ids).logits[..., :NUM_TOKENS]
    member = ensemble.members[index]
    small: Any = AutoModelForCausalLM.from_pretrained(member.checkpoint.weights_path())
    if member.adapter is not None:
        from peft import PeftModel

        small = PeftModel.from_pretrained(small, str(member.adapter.path))
    own = small(member.alignment.ids_to_small(ids)).logits
    wanted = member.alignment.logits_to_base(own)[..., :NUM_TOKENS]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


# Over HTTP ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(smol, expected, tmp_path_factory) -> Iterator[str]:
    port = free_port()
    command = vllm_server_command(
        str(smol),
        port=port,
        name="smol",
        dtype="float32",
        max_model_len=256,
        options=["--enforce-eager"],
    )
    assert command[0] == sys.executable
    log = tmp_path_factory.mktemp("server") / "log"
    with running(command[1:], port, log, environment=ENVIRONMENT, limit_s=300) as url:
        yield url


def test_the_openai_client_steers_each_request(server, expected):
    from openai import BadRequestError, OpenAI

    client = OpenAI(base_url=server, api_key="none", max_retries=0)
    names = ["smol", *(f"smol:{expert}" for expert in SERVED)]
    assert sorted(model.id for model in client.models.list()) == sorted(names)
    for (extra, _), trace in zip(ASKED, expected["http"], strict=True):
        body = None if extra is None else {"vllm_xargs": extra}
        answer = client.completions.create(
            model="smol", prompt="The Mayor shall", max_tokens=12, temperature=0, extra_body=body
        )
        assert answer.choices[0].text == trace.text
    chat = client.chat.completions.create(
        model="smol",
        messages=[{"role": "user", "content": "Who goes there?"}],
        max_tokens=12,
        temperature=0,
        extra_body={"vllm_xargs": {"alpha": 0.5}},
    )
    assert chat.choices[0].message.content
    for extra, field in (
        ({"alpha": "much"}, "alpha"),
        ({"expert": "nonsense"}, "nonsense"),
        ({"experts": "legal"}, "experts"),
        ({"expert": "legal=0.5", "alpha": 1}, "alpha"),
    ):
        with pytest.raises(BadRequestError, match=field):
            client.completions.create(
                model="smol", prompt="a", max_tokens=2, extra_body={"vllm_xargs": extra}
            )
    with pytest.raises(BadRequestError, match="prompt_logprobs"):
        client.completions.create(
            model="smol", prompt="a", max_tokens=2, echo=True, logprobs=1,
            extra_body={"vllm_xargs": {"alpha": 0}},
        )  # fmt: skip


def as_field(own: dict[str, Any]) -> dict[str, Any]:
    """Return the field `proxytune` for what is asked of the library."""
    experts = own.get("experts")
    field = {key: value for key, value in own.items() if key != "experts"}
    if isinstance(experts, tuple):
        experts = {name: next(e.alpha for e in SMOL.experts if e.name == name) for name in experts}
    if experts is not None:
        field["expert" if isinstance(experts, str) else "experts"] = experts
    return field


def test_the_request_language_of_the_local_server_steers_in_vllm(server, expected):
    """In the field `proxytune`, in the name of the model, and on every route that generates."""
    import httpx

    def post(path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(server.removesuffix("/v1") + path, json=body, timeout=120)

    prompt: dict[str, Any] = {"prompt": "The Mayor shall", "max_tokens": 12, "temperature": 0}
    for (_, own), trace in zip(ASKED, expected["http"], strict=True):
        answer = post("/v1/completions", {"model": "smol", **prompt, "proxytune": as_field(own)})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == trace.text
    answer = post("/v1/completions", {"model": "smol:legal", **prompt})
    assert answer.json()["choices"][0]["text"] == expected["http"][ASKED.index(LEGAL)].text
    question = [{"role": "user", "content": "Who goes there?"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": prompt,
        "/v1/chat/completions": {"messages": question, "max_tokens": 12, "temperature": 0},
        "/v1/responses": {"input": "Who goes there?", "max_output_tokens": 12, "temperature": 0},
        "/v1/messages": {"messages": question, "max_tokens": 12, "temperature": 0},
    }
    steered = {"expert": "legal", "alpha": 1.5, "policy": {"clip": 2}, "combine": "union"}
    texts = {}
    for path, body in bodies.items():
        said = post(path, {"model": "smol", **body, "proxytune": steered})
        named = post(
            path, {"model": "smol:legal", **body, "proxytune": {**steered, "expert": None}}
        )
        extra = {**steered, "policy": '{"clip": 2}'}
        own = post(path, {"model": "smol", **body, "vllm_xargs": extra})
        for answer in (said, named, own):
            assert answer.status_code == 200, answer.text
        texts[path] = [_text_in(answer.json()) for answer in (said, named, own)]
        assert len(set(texts[path])) == 1
        plain = post(path, {"model": "smol", **body, "proxytune": {"alpha": 0}})
        assert _text_in(plain.json()) != texts[path][0]
        wrong = post(path, {"model": "smol", **body, "proxytune": {"policy": "nonsense"}})
        assert wrong.status_code == 400 and "policy is 'nonsense'" in wrong.text
        explained = post(path, {"model": "smol", **body, "proxytune": {"explain": True}})
        assert explained.status_code == 400 and "proxytune.explain" in explained.text
        assert post(path, {"model": "smol:nobody", **body}).status_code == 404
    schema = {"type": "object", "properties": {"found": {"type": "boolean"}}, "required": ["found"]}
    said = post("/v1/chat/completions", {
        "model": "smol", "messages": question, "max_tokens": 40, "temperature": 0, "proxytune": steered,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    })  # fmt: skip
    assert isinstance(json.loads(_text_in(said.json()))["found"], bool)
    chats = {texts[path][0] for path in bodies if path != "/v1/completions"}
    assert len(chats) == 1
    about = httpx.get(server.removesuffix("/v1") + "/v1/proxytune").json()
    assert {each["name"] for each in about["experts"]} == set(SERVED)
    assert about["limits"]["max_context"] == 256


def _text_in(answer: dict[str, Any]) -> str:
    """Return the text of an answer of any route."""
    if "choices" in answer:
        choice = answer["choices"][0]
        found: str = choice["text"] if "text" in choice else choice["message"]["content"]
    elif "output" in answer:
        found = answer["output"][-1]["content"][0]["text"]
    else:
        found = answer["content"][0]["text"]
    return found


def test_texts_and_chats_of_a_recipe_with_formats_of_its_own_are_the_librarys(tiny, tmp_path):
    """A template around every text, and messages that are joined, which need an end of their own."""
    import httpx

    recipe = Recipe.read(tiny)
    formats = {"prompt": "Q: {{ prompt }}\nA:", "chat": "plain"}
    own = {part: formats for part in ("base", "expert", "anti_expert")}
    changed(recipe, **own).write(tmp_path / "formats")
    library = ProxyTuned.load(tmp_path / "formats")
    sampling = SamplingParams(max_new_tokens=12)
    policy = {"clip": 1.5}
    text = library.generate("the rain", sampling, alpha=1.5, policy=policy).token_ids
    plain = library.generate("the rain", sampling).token_ids
    chat = tuple(step.token_id for step in library.chat(sampling).say("the rain"))
    assert len({text, plain, chat}) == 3
    port = free_port()
    command = vllm_server_command(
        str(tmp_path / "formats"), port=port, name="formats", dtype="float32",
        options=["--enforce-eager"],
    )  # fmt: skip
    with running(command[1:], port, tmp_path / "log", environment=ENVIRONMENT, limit_s=400) as url:

        def ask(path: str, **body: Any) -> tuple[int, ...]:
            # Tokens: of a text that ends within a character, vLLM leaves the rest out.
            body = {"model": "formats", "max_tokens": 12, "temperature": 0} | body
            body["return_token_ids"] = True
            answer = httpx.post(url.removesuffix("/v1") + path, json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            return tuple(answer.json()["choices"][0]["token_ids"])

        steered = {"alpha": 1.5, "policy": policy}
        assert ask("/v1/completions", prompt="the rain", proxytune=steered) == text
        assert ask("/v1/completions", prompt=["the rain"]) == plain
        messages = [{"role": "user", "content": "the rain"}]
        assert ask("/v1/chat/completions", messages=messages) == chat


# Refusals -----------------------------------------------------------------------------------------


def checked(directory: Path, **options: Any) -> Any:
    """Return vLLM's whole config of a recipe, without starting anything."""
    from vllm import EngineArgs

    return EngineArgs(
        model=str(directory), dtype=options.pop("dtype", "float32"), **options
    ).create_engine_config()


def changed(
    recipe: Recipe,
    *,
    base: Any = None,
    expert: Any = None,
    anti_expert: Any = None,
    policy: Policy | None = None,
) -> Recipe:
    first = recipe.experts[1]
    first = replace(
        first,
        expert=replace(first.expert, **(expert or {})),
        anti_expert=replace(first.anti_expert, **(anti_expert or {})),
    )
    return replace(
        recipe,
        base=replace(recipe.base, **(base or {})),
        experts=(first,),
        default_expert=None,
        policy=policy or recipe.policy,
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expert": {"prompt": "chat"}}, "one.expert reads texts as 'chat'.*\n.*proxytune serve"),
        ({"base": {"model": "http://localhost/v1", "api": ApiSettings()}}, "behind an API"),
        ({"base": {"quantization": {"load_in_4bit": True}}}, "base is to be quantised"),
        ({"base": {"device": "cuda:0"}}, "base sets device"),
        ({"base": {"attn_implementation": "sdpa"}}, "base sets attn_implementation"),
        ({"policy": Policy(schedule=((0, 0.0), (8, 1.0)))}, "steering has a schedule"),
        ({"base": {"dtype": "float16"}, "expert": {"dtype": "float32"}, "anti_expert": {"dtype": "float32"}},
         "base is to run in float16 and one.expert in float32"),
    ],
)  # fmt: skip
def test_what_vllm_cannot_honour_is_refused_by_name(tiny, change, said):
    with pytest.raises(UnsupportedModel, match=said):
        find_ensemble(changed(Recipe.read(tiny), **change))


def test_a_file_for_llama_cpp_and_another_vocabulary_are_refused(tiny, tmp_path):
    recipe = Recipe.read(tiny)
    gguf = replace(SMOL.base, llama_cpp=LlamaCppSettings())
    with pytest.raises(UnsupportedModel, match=r"base is to be run by llama\.cpp"):
        find_ensemble(replace(recipe, base=gguf))
    tiny_model(tmp_path / "other", tokenizer=tiny_tokenizer(merges=[*MERGES, ("h", "u")]))
    other = ModelSpec(model=str(tmp_path / "other"))
    with pytest.raises(VocabularyMismatch, match="'hu'"):
        find_ensemble(
            replace(recipe, experts=(ExpertSpec("x", other, other),), default_expert=None)
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_model_len": 256}, "max_model_len.*256.*192"),
        ({"load_format": "tensorizer"}, "load_format is 'tensorizer'"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"enable_lora": True}, "enable_lora"),
        ({"prefill_context_parallel_size": 2}, "the rows of one rank"),
        ({"additional_config": {"proxytune": {"expert": ["one"]}}}, "proxytune.expert"),
        ({"additional_config": {"proxytune": {"experts": ["ones"]}}}, "no expert 'ones'"),
    ],
)
def test_settings_of_vllm_that_several_models_cannot_honour_are_refused(tiny, options, said):
    with pytest.raises(Exception, match=said):
        checked(tiny, **options)


def test_a_template_around_texts_is_refused_where_vllm_would_leave_it_out(tiny, tmp_path):
    recipe = Recipe.read(tiny)

    def written(text: str) -> Path:
        parts = {part: {"prompt": text} for part in ("base", "expert", "anti_expert")}
        changed(recipe, **parts).write(tmp_path / "recipe", overwrite=True)
        return tmp_path / "recipe"

    place = written("Q: {{ prompt }}")
    with pytest.raises(Exception, match=r"template around every text(?s:.*)proxytune serve"):
        checked(place)
    promised = {"proxytune": {"renders_texts": True}}
    checked(place, additional_config=promised)
    command = vllm_server_command(place)
    assert json.loads(command[command.index("--additional-config") + 1]) == promised
    assert "--additional-config" not in vllm_server_command(tiny)
    checked(written("chat"))  # as before: messages are rendered


def test_the_config_is_the_bases_within_the_limits_of_all(tiny):
    config = checked(tiny, additional_config={"proxytune": {"experts": ["one", "contrast"]}})
    recipe_config: RecipeConfig = config.model_config.hf_config
    assert [member.name for member in recipe_config.ensemble.members] == [
        "base",
        "small_0",
        "small_1",
    ]
    assert config.model_config.get_vocab_size() == NUM_TOKENS + 6
    assert config.load_config.load_format == "proxytune"
    assert recipe_config.menu.asked({"expert": "contrast"}).strengths == (0.0, 0.5)
    with pytest.raises(Exception, match="no expert 'two'"):
        recipe_config.menu.asked({"expert": "two"})
    assert checked(tiny).model_config.max_model_len == 192


def test_a_recipe_that_asks_for_a_dtype_runs_in_no_other(tiny, tmp_path):
    recipe = Recipe.read(tiny)
    asking = changed(recipe, **{p: {"dtype": "float32"} for p in ("base", "expert", "anti_expert")})
    asking.write(tmp_path / "asking")
    assert checked(tmp_path / "asking", dtype="float32").model_config.dtype == torch.float32
    with pytest.raises(
        Exception, match="the recipe asks for float32, and vLLM would run in bfloat16"
    ):
        checked(tmp_path / "asking", dtype="bfloat16")


def test_code_and_pickles_of_a_recipes_models_need_the_word_of_vllms_caller(tmp_path):
    mark = tmp_path / "the-code-ran"
    model_with_code(tmp_path / "base", mark)
    tiny_model(tmp_path / "small")
    small = ModelSpec(model="small", allow_pickle=True)
    base = ModelSpec(model="base", trust_remote_code=True)
    Recipe(base, (ExpertSpec("e", small, small),), directory=tmp_path).write(tmp_path)
    pickles = {"additional_config": {"proxytune": {"allow_pickle": True}}}
    for options in ({}, pickles, {"trust_remote_code": True}):
        with pytest.raises(Exception, match="Only you can allow that"):
            checked(tmp_path, **options)
        assert mark.exists() == ("trust_remote_code" in options)
    config = checked(tmp_path, trust_remote_code=True, **pickles).model_config.hf_config
    assert config.grants == Grants(trust_remote_code=True, allow_pickle=True)
    assert mark.exists()
    command = vllm_server_command(tmp_path, grants=config.grants)
    assert "--trust-remote-code" in command
    given = json.loads(command[command.index("--additional-config") + 1])
    assert given == pickles["additional_config"]


def test_models_of_one_shape_share_what_is_equal_in_them():
    def model(*, last: float) -> torch.nn.Module:
        layers = torch.nn.Sequential(torch.nn.Embedding(50, 4), torch.nn.Linear(4, 4))
        for parameter in layers.parameters():
            torch.nn.init.constant_(parameter, 0.5)
        torch.nn.init.constant_(layers[1].weight, last)
        return layers

    models = [model(last=1.0), model(last=2.0), model(last=1.0)]
    assert share_equal_parameters(models) == 4 * (2 * (50 * 4 + 4) + 16)
    assert models[0][0].weight is models[1][0].weight is models[2][0].weight
    assert models[0][1].weight is models[2][1].weight
    assert models[1][1].weight[0, 0].item() == 2.0
