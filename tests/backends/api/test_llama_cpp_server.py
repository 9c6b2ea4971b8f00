"""The server of llama-cpp-python as a black box: SmolLM2-135M-Instruct, steered by the smol experts.

What it says is compared with llama.cpp in this process, on the same file. It takes text only and cuts it into
tokens itself: `num_recut` counts where its cut differs from the tokens chosen, and there the two may part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

reason = "needs llama-cpp-python with its server; `make test-gguf` installs it"
pytest.importorskip("llama_cpp.server.app", reason=reason, exc_type=ImportError)

from proxytune.backends.api.backend import ApiBackend
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.decode.speculative import Drafting
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ApiSettings, LlamaCppSettings, ModelSpec
from proxytune.request import Request, SamplingParams
from tests.support.real_servers import free_port, running

pytestmark = pytest.mark.slow

SMOL = Recipe.read("package:proxytune/smol")
EXPERTS = ("tinyshakespeare", "legal")
PROMPTS = {
    "tinyshakespeare": ("My lord, the", "What news from", "Good morrow, cousin. I have"),
    "legal": ("Section 2. The Mayor shall", "(a) No person may", "The Council finds that"),
}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return replace(
        SMOL,
        base=replace(SMOL.base, llama_cpp=LlamaCppSettings()),
        experts=tuple(e for e in SMOL.experts if e.name in EXPERTS),
    )


@pytest.fixture(scope="module")
def server(recipe, tmp_path_factory) -> Iterator[str]:
    path = find_checkpoint(recipe.base.model or "", root=recipe.directory).gguf_path
    port = free_port()
    command = ["-m", "llama_cpp.server", "--model", str(path), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--logits_all", "true", "--n_ctx", "512"]
    # As this package runs it; without flash attention a quantised model's logits differ by tenths.
    command += ["--flash_attn", "true", "--verbose", "false"]
    log = tmp_path_factory.mktemp("server") / "log"
    with running(command, port, log, environment={}, limit_s=120) as url:
        yield url


@pytest.fixture(scope="module")
def local(recipe) -> ProxyTuned:
    return ProxyTuned.load(recipe)


def remote(recipe: Recipe, url: str, **settings: object) -> ProxyTuned:
    spec = ModelSpec(model=url, api=ApiSettings(**settings))  # type: ignore[arg-type]
    return ProxyTuned.load(replace(recipe, base=spec))


def test_what_the_server_shows_is_found_out(recipe, server):
    model = remote(recipe, server)
    backend = model.ensemble.members[0].backend
    assert isinstance(backend, ApiBackend)
    traits = backend.traits
    assert traits.endpoint == "completions"
    assert traits.top_logprobs == 100 and not traits.is_limited
    assert not traits.takes_token_ids
    assert traits.bias == "hidden"
    # Its echo has each token's logprobs one place late.
    assert traits.scoring in ("echo", "echo_shifted")


@pytest.mark.parametrize("expert", EXPERTS)
def test_steering_it_gives_the_text_of_steering_in_process(recipe, server, local, expert):
    sampling = SamplingParams(max_new_tokens=24)
    model = remote(recipe, server)
    num_same = num_recut = 0
    for prompt in PROMPTS[expert]:
        wanted = local.generate(prompt, sampling, experts=expert)
        found = model.generate(prompt, sampling, experts=expert)
        assert found.usage is not None
        if found.usage.num_recut:
            num_recut += 1
            continue
        assert found.token_ids == wanted.token_ids, prompt
        num_same += 1
    assert num_same >= 2, f"{num_recut} of {len(PROMPTS[expert])} texts were cut anew"


def test_all_logprobs_give_the_text_of_steering_in_process(recipe, server, local):
    sampling = SamplingParams(max_new_tokens=6)
    model = remote(recipe, server, top_logprobs=49_152, lookahead=3)
    for expert, prompts in PROMPTS.items():
        wanted = local.generate(prompts[0], sampling, experts=expert)
        found = model.generate(prompts[0], sampling, experts=expert)
        assert found.token_ids == wanted.token_ids


def test_the_expert_drafts_and_the_server_verifies(recipe, server):
    sampling = SamplingParams(max_new_tokens=16)
    model = remote(recipe, server, top_logprobs=20)
    requests = [Request(texts[0], sampling, None, name) for name, texts in PROMPTS.items()]
    plain = model.generate_batch(requests)
    drafting = Drafting(4, "expert", is_adaptive=False)
    drafted = model.generate_batch(requests, speculative=drafting)
    assert [t.token_ids for t in drafted] == [t.token_ids for t in plain]


def test_a_choice_of_answers(recipe, server, local):
    prompt = "Question: Which of these is an animal?\nA: stone\nB: horse\nC: river\nAnswer:"
    options = (" A", " B", " C")
    wanted = local.choose(prompt, options, experts="legal")
    found = remote(recipe, server).choose(prompt, options, experts="legal")
    assert found.option == wanted.option
    assert found.probs == pytest.approx(wanted.probs, abs=0.02)
    assert found.is_certified
