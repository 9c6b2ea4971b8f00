"""vLLM as a black box: SmolLM2-135M-Instruct behind it in float32, steered by the smol experts.

It takes token ids, so what it says is of exactly the tokens chosen, and the steered text is that of
transformers in this process, token for token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="needs vLLM; `make test-vllm` installs it", exc_type=ImportError)

from proxytune.backends.api.backend import ApiBackend
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.decode.speculative import Drafting
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ApiSettings, ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.trace import Trace
from tests.support.real_servers import free_port, running

pytestmark = pytest.mark.slow

SMOL = Recipe.read("package:proxytune/smol")
EXPERTS = ("tinyshakespeare", "legal")
PROMPTS = {
    "tinyshakespeare": ("KING RICHARD:\n", "My lord, the", "What news from"),
    "legal": ("Section 2. The Mayor shall", "(a) No person may", "The Council finds that"),
}
TIE = 1e-3


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return replace(SMOL, experts=tuple(e for e in SMOL.experts if e.name in EXPERTS))


@pytest.fixture(scope="module")
def server(recipe, tmp_path_factory) -> Iterator[str]:
    files = find_checkpoint(recipe.base.model or "", root=recipe.directory)
    port = free_port()
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(files.weights_path())]
    command += ["--served-model-name", "smollm2", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-logprobs", "-1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with running(command, port, log, environment=environment, limit_s=300) as url:
        yield url


@pytest.fixture(scope="module")
def local(recipe) -> ProxyTuned:
    return ProxyTuned.load(recipe)


def remote(recipe: Recipe, url: str, **settings: object) -> ProxyTuned:
    spec = ModelSpec(model=url, api=ApiSettings(**settings))  # type: ignore[arg-type]
    return ProxyTuned.load(replace(recipe, base=spec))


def requests_for(length: int) -> list[Request]:
    sampling = SamplingParams(max_new_tokens=length, logprobs=2)
    return [
        Request(text, sampling, None, name) for name, texts in PROMPTS.items() for text in texts
    ]


def is_same(found: Trace, wanted: Trace) -> bool:
    """Whether two texts are the same; False if they part at a token that is not certified, or at a tie."""
    for one, other in zip(found.steps, wanted.steps, strict=True):
        if one.token_id != other.token_id:
            is_tie = other.top[0][1] - other.top[1][1] < TIE
            assert is_tie or not one.is_certified, (found.text, wanted.text)
            return False
    return True


def test_what_the_server_shows_is_found_out(recipe, server):
    backend = remote(recipe, server).ensemble.members[0].backend
    assert isinstance(backend, ApiBackend)
    assert backend.traits.takes_token_ids
    assert backend.traits.scoring == "prompt_logprobs"
    assert backend.traits.bias == "hidden"
    assert backend.traits.top_logprobs == 100


@pytest.mark.parametrize("top_logprobs", [20, 100])
def test_steering_it_gives_the_text_of_steering_in_process(recipe, server, local, top_logprobs):
    model = remote(recipe, server, top_logprobs=top_logprobs)
    wanted = local.generate_batch(requests_for(32))
    found = model.generate_batch(requests_for(32))
    same = [is_same(*pair) for pair in zip(found, wanted, strict=True)]
    assert same.count(False) <= (0 if top_logprobs == 100 else 2)
    for trace in found:
        assert trace.usage is not None and trace.usage.num_recut == 0
        if trace.num_certified == trace.num_new_tokens:
            continue
        assert top_logprobs == 20


def test_with_all_logprobs_it_is_the_whole_distribution(recipe, server, local):
    model = remote(recipe, server, top_logprobs=49_152, lookahead=4)
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=3)
    for expert, prompts in PROMPTS.items():
        wanted = local.generate(prompts[0], sampling, experts=expert)
        found = model.generate(prompts[0], sampling, experts=expert)
        assert found.token_ids == wanted.token_ids
        for one, other in zip(found.steps, wanted.steps, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=TIE)
            assert one.max_lost_prob == 0


def test_drafts_change_nothing(recipe, server):
    model = remote(recipe, server, top_logprobs=20)
    plain = [trace.token_ids for trace in model.generate_batch(requests_for(20))]
    for speculative in (True, Drafting(5, "expert", is_adaptive=False)):
        found = model.generate_batch(requests_for(20), speculative=speculative, batch_size=3)
        assert [trace.token_ids for trace in found] == plain


def test_scores_are_those_of_transformers(recipe, server, local):
    text = (
        "KING RICHARD:\nMy lord, the people of the city wait without, and will not be sent away.\n"
        * 3
    )
    model = remote(recipe, server, top_logprobs=100)
    one = model.score(text, (0.0, 0.5), experts="tinyshakespeare", window=64).to_dict()["rows"]
    other = local.score(text, (0.0, 0.5), experts="tinyshakespeare", window=64).to_dict()["rows"]
    for row, wanted in zip(one, other, strict=True):
        # What the base gives the text's own tokens is exact; steered, what it did not show is estimated.
        exact = row["name"] != "steered" or row["alpha"] == 0
        assert row["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-3 if exact else 0.02)


def test_a_chat_is_continued(recipe, server):
    model = remote(recipe, server, endpoint="chat", top_logprobs=20)
    backend = model.ensemble.members[0].backend
    assert isinstance(backend, ApiBackend) and backend.traits.continues
    sampling = SamplingParams(max_new_tokens=12)
    trace = model.generate("Who goes there?", sampling, experts="tinyshakespeare")
    assert trace.num_new_tokens > 0 and trace.text.strip()
