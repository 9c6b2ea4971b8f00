"""A base behind an API: the same text as in process, as far as it shows enough; and what it proves."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from proxytune.backends.api.answers import read_completion
from proxytune.backends.api.backend import ApiBackend
from proxytune.backends.api.client import ApiClient, Budget
from proxytune.backends.api.positions import Position, position_of
from proxytune.decode.speculative import Drafting
from proxytune.errors import ApiError, BackendError, BudgetSpent, InvalidRequest, UnsupportedModel
from proxytune.model import ProxyTuned
from proxytune.recipe.spec import ApiSettings, ModelSpec
from proxytune.request import ChatOptions, Request, SamplingParams
from proxytune.testing import EOS, TOKENS, toy_model
from tests.support.completion_server import (
    LLAMA_CPP,
    OPENAI,
    OPENAI_CHAT,
    VLLM,
    VLLM_CHAT,
    CompletionServer,
    ServerTraits,
)
from tests.support.fault_proxy import FaultProxy, random_faults

ALL = ServerTraits(has_echo=True)
"""A server that shows every token's logprob, and names tokens by text."""

PROMPTS = ["the cat", "a", "some longer prompt.", "x y z", "now"]


def _short_sleep(seconds: float) -> None:
    time.sleep(min(seconds, 0.02))


def in_process(**settings: Any) -> ProxyTuned:
    return toy_model(memory=0.5, **{"eos_logit": -100.0, **settings})


@contextlib.contextmanager
def behind(
    local: ProxyTuned,
    traits: ServerTraits = ALL,
    settings: ApiSettings | None = None,
    *,
    budget: Budget | None = None,
    proxy: Any = None,
) -> Iterator[tuple[ProxyTuned, CompletionServer, ApiBackend]]:
    """Yield a toy whose base is reached through a server, the server, and the backend between them."""
    base = local.ensemble.members[0]
    tokenizer = local.tokenizer
    eos = TOKENS.index(EOS)
    settings = settings or ApiSettings()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            CompletionServer(base.backend, tokenizer, traits=traits, eos_token_ids=[eos])
        )
        url = server.url
        if proxy is not None:
            url = stack.enter_context(FaultProxy(server.url, **proxy)).url
        client = ApiClient(url, settings, budget=budget, sleep=_short_sleep)
        backend = ApiBackend(
            client,
            settings,
            name="server",
            tokenizer=tokenizer,
            vocabulary=local.ensemble.vocabulary,
            eos_token_ids=[eos],
        )
        stack.callback(backend.close)
        members = (replace(base, backend=backend), *local.ensemble.members[1:])
        recipe = replace(local.recipe, base=ModelSpec(model=url, api=settings))
        formats = local.formats
        yield ProxyTuned(replace(local.ensemble, members=members), formats, recipe), server, backend
        assert not server.failures


def greedy(length: int = 24, **settings: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=length, **settings)


TRAITS = {
    "all": ALL,
    "vllm": replace(VLLM, max_top_logprobs=None),
    "llama.cpp": replace(LLAMA_CPP, max_top_logprobs=None),
    "ids": ServerTraits(token_format="token_id", returns_token_ids=True, has_prompt_logprobs=True),
    "apart": ServerTraits(sampled_in_top="apart", has_echo=True),
}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", TRAITS)
def test_a_server_that_shows_everything_gives_the_in_process_text(name, alpha):
    local = in_process()
    with behind(local, TRAITS[name]) as (remote, _, _):
        for prompt in PROMPTS:
            wanted = local.generate(prompt, greedy(), alpha=alpha)
            found = remote.generate(prompt, greedy(), alpha=alpha)
            assert found.token_ids == wanted.token_ids
            assert found.num_certified == found.num_new_tokens
            for one, other in zip(found.steps, wanted.steps, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("name", TRAITS)
def test_a_sampled_text_depends_on_the_seed_alone(name):
    local = in_process()
    sampling = greedy(temperature=1.0, seed=7)
    with behind(local, TRAITS[name]) as (remote, _, _):
        for prompt in PROMPTS:
            wanted = local.generate(prompt, sampling)
            found = remote.generate(prompt, sampling)
            assert found.token_ids == wanted.token_ids
            assert found.num_certified == found.num_new_tokens
            assert all(step.max_lost_prob == 0 for step in found.steps)


@pytest.mark.parametrize("name", TRAITS)
@pytest.mark.parametrize("eos_logit", [1.0, 3.0])
def test_texts_that_end_by_themselves_end_alike(name, eos_logit):
    local = in_process(eos_logit=eos_logit)
    with behind(local, TRAITS[name]) as (remote, _, _):
        for prompt in PROMPTS:
            wanted = local.generate(prompt, greedy(40), alpha=1.0)
            found = remote.generate(prompt, greedy(40), alpha=1.0)
            assert found.token_ids == wanted.token_ids
            assert found.finish_reason == wanted.finish_reason


@pytest.mark.parametrize("lookahead", [1, 3, 16])
@pytest.mark.parametrize("speculative", [False, True, Drafting(4, "expert", is_adaptive=False)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_text_does_not_depend_on_how_it_was_asked_for(lookahead, speculative, batch_size):
    local = in_process(eos_logit=0.5)
    requests = [
        local_request(prompt, greedy(20 + 3 * place, presence_penalty=0.5))
        for place, prompt in enumerate(PROMPTS)
    ]
    wanted = local.generate_batch(requests)
    settings = ApiSettings(lookahead=lookahead)
    with behind(local, ALL, settings) as (remote, _, _):
        found = remote.generate_batch(requests, batch_size=batch_size, speculative=speculative)
    assert [trace.token_ids for trace in found] == [trace.token_ids for trace in wanted]


def test_tokens_that_the_pair_does_not_share_get_no_offset_behind_a_server_either():
    local = in_process()
    width = len(TOKENS)
    (pair,) = local.ensemble.pairs
    pair = replace(pair, is_unshared=torch.arange(width) < width // 2)
    local = ProxyTuned(replace(local.ensemble, pairs=(pair,)), local.formats, local.recipe)
    requests = [Request(prompt, greedy()) for prompt in PROMPTS]
    expected = [trace.token_ids for trace in local.generate_batch(requests)]
    assert expected != [trace.token_ids for trace in in_process().generate_batch(requests)]
    with behind(local) as (model, _, _):
        assert [trace.token_ids for trace in model.generate_batch(requests)] == expected


def local_request(prompt: str, sampling: SamplingParams) -> Any:
    return Request(prompt, sampling)


def test_a_stretch_that_steering_agrees_with_costs_one_call():
    local = in_process()
    with behind(local, ALL, ApiSettings(lookahead=16)) as (remote, server, backend):
        assert backend.traits.top_logprobs == len(TOKENS)
        before = server.num_requests
        trace = remote.generate("the cat", greedy(32), alpha=0.0)
        assert server.num_requests - before == 2
        assert trace.usage is not None and trace.usage.num_calls == 2
        assert trace.usage.num_completion_tokens == 32


def test_one_call_a_token_where_nothing_is_looked_ahead():
    local = in_process()
    with behind(local, ALL, ApiSettings(lookahead=1)) as (remote, server, backend):
        assert backend.can_score
        before = server.num_requests
        remote.generate("the cat", greedy(12))
        assert server.num_requests - before == 12


def test_the_expert_drafts_and_one_call_verifies():
    """With the expert as its own base every draft is right."""
    local = in_process()
    expert = local.ensemble.members[2].backend
    members = (replace(local.ensemble.members[0], backend=expert), *local.ensemble.members[1:])
    local = ProxyTuned(replace(local.ensemble, members=members), local.formats, local.recipe)
    drafting = Drafting(7, "expert", is_adaptive=False)
    with behind(local, ALL, ApiSettings(lookahead=1)) as (remote, server, backend):
        assert backend.can_score
        before = server.num_requests
        trace = remote.generate("the cat", greedy(33), alpha=1e-6, speculative=drafting)
        # The first token, and then eight a call.
        assert server.num_requests - before == 5
        assert trace.num_accepted == trace.num_drafted
        assert trace.token_ids == local.generate("the cat", greedy(33), alpha=1e-6).token_ids


# Certificates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_logprobs", [2, 3, 5, 10])
@pytest.mark.parametrize("bias", ["none", "hidden", "shown"])
def test_a_certified_token_is_the_one_of_the_full_logits(top_logprobs, bias):
    num_certified = num_tokens = num_wrong = 0
    traits = replace(ALL, max_top_logprobs=top_logprobs, logit_bias=bias)
    for seed in range(6):
        local = in_process(seed=seed)
        with behind(local, traits) as (remote, _, _):
            for prompt in PROMPTS[:3]:
                found = remote.generate(prompt, greedy(16), alpha=0.7)
                num_certified += found.num_certified or 0
                num_tokens += found.num_new_tokens
                # Each token on its own: what the full logits give after the same text.
                for place, step in enumerate(found.steps):
                    text = prompt + "".join(s.text for s in found.steps[:place])
                    full = local.generate(text, greedy(1), alpha=0.7).token_ids[0]
                    num_wrong += full != step.token_id
                    assert full == step.token_id or not step.is_certified
    assert 0 < num_certified <= num_tokens
    if top_logprobs == 2 and bias == "none":
        assert num_wrong and num_certified < num_tokens


@pytest.mark.parametrize("bias", ["hidden", "shown"])
def test_asking_for_missing_candidates_certifies_more(bias):
    local = in_process(seed=3)
    shares = {}
    for kind in ("none", bias):
        traits = replace(ALL, max_top_logprobs=5, logit_bias=kind)
        with behind(local, traits) as (remote, _, backend):
            assert backend.traits.bias == (None if kind == "none" else kind)
            traces = [remote.generate(prompt, greedy(), alpha=0.7) for prompt in PROMPTS]
        shares[kind] = sum(trace.num_certified or 0 for trace in traces)
    assert shares[bias] > shares["none"]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_lost_probability_is_bounded(temperature):
    local = in_process(seed=1)
    traits = replace(ALL, max_top_logprobs=5, logit_bias="none")
    sampling = greedy(1, temperature=temperature, seed=1)
    bounds, losses = [], []
    with behind(local, traits) as (remote, _, backend):
        for text in itertools.islice(map("".join, itertools.permutations("abcdef", 3)), 40):
            step = remote.generate(text, sampling, alpha=0.5).steps[0]
            job = local.job(local_request(text, sampling))
            logits = [
                member.backend.prefill([prompt]).logits[0]
                for member, prompt in zip(local.ensemble.members, job.prompts, strict=True)
            ]
            probs = ((logits[0] + 0.5 * (logits[2] - logits[1])) / temperature).softmax(-1)
            seen = backend.prefill([job.prompts[0]]).logits[0] > -torch.inf
            losses.append(float(probs[~seen].sum()))
            bounds.append(step.max_lost_prob)
    assert all(loss <= bound + 1e-6 for loss, bound in zip(losses, bounds, strict=True))
    assert min(bounds) < 0.9


def test_what_is_not_certified_ends_a_text_that_has_to_be():
    local = in_process(seed=2)
    traits = replace(ALL, max_top_logprobs=2)
    sampling = greedy(24)
    with behind(local, traits) as (remote, _, _):
        free = remote.generate("the cat", sampling, alpha=1.0)
        strict = remote.generate("the cat", replace(sampling, require_certified=True), alpha=1.0)
    first = next(n for n, step in enumerate(free.steps) if not step.is_certified)
    assert strict.finish_reason == "uncertified"
    assert strict.token_ids == free.token_ids[:first]
    assert strict.num_certified == first
    # A base that shows everything certifies everything.
    whole = local.generate("the cat", replace(sampling, require_certified=True), alpha=1.0)
    assert whole.finish_reason == "length"


# What servers show -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("traits", "shown"),
    [
        (ALL, 33),
        (replace(ALL, max_top_logprobs=20), 20),
        (VLLM, 20),
        (OPENAI, 5),
        (replace(ALL, max_top_logprobs=3), 1),
        (replace(ALL, max_top_logprobs=20, token_format="token_id"), 20),
    ],
)
def test_the_limit_is_found_out(traits, shown):
    with behind(in_process(), traits) as (_, _, backend):
        assert backend.traits.top_logprobs == shown
        assert backend.traits.is_limited == (shown < 33)


def test_traits_are_those_of_the_server():
    with behind(in_process(), VLLM) as (_, _, backend):
        assert backend.traits.takes_token_ids
        assert backend.traits.scoring in ("prompt_logprobs", "echo")
    with behind(in_process(), replace(ALL, has_echo=False, logit_bias="none")) as (_, _, backend):
        assert backend.traits.scoring is None
        assert backend.traits.bias is None


def test_a_chat_answer_is_continued_if_the_server_can():
    local = in_process()
    traits = replace(VLLM_CHAT, max_top_logprobs=None, endpoint="chat")
    with behind(local, traits) as (remote, server, backend):
        assert backend.traits.endpoint == "chat"
        assert backend.traits.continues
        for prompt in PROMPTS[:3]:
            # The server renders the message itself; the small models see what they are given.
            text = server.chat_template([{"role": "user", "content": prompt}])
            first = local.generate(text, greedy(1), alpha=0.0)
            trace = remote.generate(prompt, greedy(16), alpha=0.0)
            assert trace.num_new_tokens == 16
            assert trace.token_ids[0] == first.token_ids[0]
            assert remote.generate(prompt, greedy(16), alpha=1.0).num_certified == 16


def test_the_last_message_is_continued_if_the_server_can():
    messages = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": "the"}]
    traits = replace(VLLM_CHAT, max_top_logprobs=None, endpoint="chat")
    with behind(in_process(), traits) as (remote, server, _):
        options = ChatOptions(continue_final_message=True)
        continued = Request(messages, greedy(8), 0.0, chat=options)
        whole = server.chat_template(messages[:1]) + "the"
        assert (
            remote.generate(continued).token_ids
            == in_process().generate(whole, greedy(8), alpha=0.0).token_ids
        )
    with (
        behind(in_process(), OPENAI_CHAT) as (remote, _, _),
        pytest.raises(UnsupportedModel, match="the last message cannot be continued"),
    ):
        remote.generate(continued)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (ChatOptions(template_kwargs={"enable_thinking": False}), "template_kwargs"),
        (ChatOptions(add_generation_prompt=False), "add_generation_prompt"),
    ],
)
def test_what_a_chat_endpoint_renders_itself_cannot_be_set(options, name):
    messages = [{"role": "user", "content": "the cat"}]
    with (
        behind(in_process(), OPENAI_CHAT) as (remote, _, _),
        pytest.raises(UnsupportedModel, match=f"renders messages itself, so {name}"),
    ):
        remote.generate(Request(messages, greedy(1), chat=options))


def test_a_server_that_does_not_continue_chat_answers_is_refused_when_it_has_to():
    with behind(in_process(), OPENAI_CHAT) as (remote, _, backend):
        assert backend.traits.endpoint == "chat" and backend.traits.continues is False
        assert remote.generate("the cat", greedy(1)).num_new_tokens == 1
        with pytest.raises(UnsupportedModel, match="does not continue"):
            remote.generate("the cat", greedy(40), alpha=2.0)


def test_no_logprobs_is_refused():
    traits = replace(ALL, max_top_logprobs=0)
    with pytest.raises(UnsupportedModel, match="shows no logprobs"), behind(in_process(), traits):
        pass


def test_a_repetition_penalty_is_refused():
    penalised = greedy(2, repetition_penalty=1.1)
    with (
        behind(in_process()) as (remote, _, _),
        pytest.raises(InvalidRequest, match="repetition_penalty"),
    ):
        remote.generate("a", penalised)


# Faults, budgets, keys ---------------------------------------------------------------------------------


def test_faults_do_not_change_the_text():
    local = in_process(eos_logit=0.0)
    requests = [
        local_request(prompt + " " + word, greedy(24, temperature=t, seed=5))
        for word in ("one", "two", "three", "four", "five", "six")
        for prompt in PROMPTS
        for t in (0.0, 1.0)
    ]
    with behind(local, ALL) as (remote, _, _):
        wanted = remote.generate_batch(requests)
    settings = ApiSettings(max_retries=12, timeout_s=2.0, lookahead=4)
    plan = random_faults(11, rate=0.5, seconds=0.01)
    proxy = {"plan": plan, "max_consecutive": 3, "num_passes": 1}
    with behind(local, ALL, settings, proxy=proxy) as (remote, _, backend):
        found = remote.generate_batch(requests, batch_size=6)
        retries = backend.client.usage.num_retries
    assert [t.token_ids for t in found] == [t.token_ids for t in wanted]
    assert retries >= 300


def test_a_server_that_does_not_come_back_is_given_up_with_the_text_so_far():
    local = in_process()
    settings = ApiSettings(max_retries=2, lookahead=4)
    with behind(local, ALL, settings) as (remote, server, _):
        wanted = local.generate("the cat", greedy(40)).token_ids

        def stop_after_a_while(_: int, event: Any) -> None:
            if event.step is not None and event.step.index == 7:
                server._http.stop()

        with pytest.raises(ApiError, match="3 tries") as failure:
            remote.generate_batch(
                [local_request("the cat", greedy(40))], on_event=stop_after_a_while
            )
    (trace,) = failure.value.traces
    assert trace.finish_reason == "failed"
    assert 8 <= trace.num_new_tokens < 40
    assert trace.token_ids == wanted[: trace.num_new_tokens]
    assert trace.usage is not None and trace.usage.num_calls >= 1


def test_a_budget_of_calls_is_kept():
    local = in_process()
    with behind(local, ALL, ApiSettings(lookahead=1)) as (remote, server, backend):
        assert backend.can_score
        used = backend.client.usage.num_calls
    settings = ApiSettings(lookahead=1)
    with behind(local, ALL, settings, budget=Budget(max_calls=used + 5)) as (remote, server, _):
        with pytest.raises(BudgetSpent, match="--max-calls"):
            remote.generate("the cat", greedy(40))
        assert server.num_requests <= used + 6


def test_a_budget_of_money_is_kept():
    settings = ApiSettings(lookahead=1, prompt_price=1.0, completion_price=2.0)
    local = in_process()
    with behind(local, ALL, settings, budget=Budget(max_cost=1e-4)) as (remote, _, backend):
        with pytest.raises(BudgetSpent, match="--max-cost"):
            remote.generate("the cat", greedy(40))
        assert 1e-4 <= backend.client.usage.cost < 1.5e-4
    with pytest.raises(InvalidRequest, match="no prices"):
        ApiClient("http://localhost:1/v1", ApiSettings(), budget=Budget(max_cost=1.0))


def test_a_key_comes_from_the_environment_and_shows_nowhere(monkeypatch):
    settings = ApiSettings(max_retries=0)
    with pytest.raises(InvalidRequest, match="TEST_KEY is not set"):
        ApiClient("http://localhost:1/v1", settings, key_env="TEST_KEY")
    monkeypatch.setenv("TEST_KEY", "sk-very-secret")
    local = in_process()
    base = local.ensemble.members[0].backend
    with CompletionServer(base, local.tokenizer, traits=ALL, api_key="sk-very-secret") as server:
        client = ApiClient(server.url, settings, key_env="TEST_KEY")
        assert client.get("/models", bool)["data"]
        client.close()
        assert "sk-very-secret" not in repr(vars(client))
    with CompletionServer(base, local.tokenizer, traits=ALL, api_key="another") as server:
        client = ApiClient(server.url, settings, key_env="TEST_KEY")
        with pytest.raises(UnsupportedModel, match="TEST_KEY") as refusal:
            client.get("/models", bool)
        client.close()
    assert "very-secret" not in str(refusal.value)


def test_concurrent_rows_are_not_mixed_up():
    local = in_process()
    rng = random.Random(3)
    requests = [
        local_request("".join(rng.choices("abcdefgh ", k=rng.randint(1, 12))) + "z", greedy(12))
        for _ in range(32)
    ]
    wanted = local.generate_batch(requests)
    with behind(local, ALL, ApiSettings(max_concurrency=8)) as (remote, _, _):
        found = remote.generate_batch(requests, batch_size=16)
    assert [t.token_ids for t in found] == [t.token_ids for t in wanted]


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_calls_gives_what_asking_anew_gives(seed):
    """Appended, taken back and dropped rows, by chance, with and without scoring by the server."""
    rng = random.Random(seed)
    local = in_process(seed=seed)
    traits = replace(ALL, has_echo=seed % 2 == 0)
    settings = ApiSettings(lookahead=rng.choice([1, 2, 5]))
    with behind(local, traits, settings) as (_, _, backend):
        table = local.ensemble.members[0].backend
        rows = [[rng.randrange(26) for _ in range(rng.randint(1, 6))] for _ in range(3)]
        state, _ = backend.prefill(rows)
        for _ in range(10):
            kind = rng.randrange(3)
            if kind == 0:
                counts = [rng.randrange(len(row)) for row in rows]
                backend.rewind(state, counts)
                rows = [row[: len(row) - n] for row, n in zip(rows, counts, strict=True)]
            elif kind == 1 and len(rows) > 1:
                places = rng.sample(range(len(rows)), len(rows) - 1)
                state = backend.select(state, places)
                rows = [rows[place] for place in places]
            pending = [rng.randrange(26) for _ in rows]
            ahead = backend.lookahead(state, pending)
            length = rng.randint(1, 4)
            new = [
                ([token] + more + [rng.randrange(26) for _ in range(length)])[:length]
                for token, more in zip(pending, ahead, strict=True)
            ]
            found = backend.extend(state, torch.tensor(new))
            for place, (row, more) in enumerate(zip(rows, new, strict=True)):
                for count in range(1, length + 1):
                    wanted = table.prefill([row + more[:count]]).logits[0].log_softmax(-1)
                    assert torch.allclose(found[place, count - 1], wanted, atol=1e-4)
            rows = [row + more for row, more in zip(rows, new, strict=True)]


# What a second look found --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 2}, {"top_k": 3}, {"min_p": 0.3}, {"top_p": 0.8}], ids=str
)
def test_a_certified_draw_is_the_one_of_the_full_logits(filters):
    traits = replace(ALL, max_top_logprobs=5, logit_bias="none")
    num_certified = 0
    for seed in range(8):
        local = in_process(seed=seed)
        sampling = greedy(12, temperature=1.2, seed=seed, **filters)
        with behind(local, traits) as (remote, _, _):
            for prompt in PROMPTS:
                found = remote.generate(prompt, sampling, alpha=0.8)
                wanted = local.generate(prompt, sampling, alpha=0.8)
                for one, other in zip(found.steps, wanted.steps, strict=True):
                    if one.token_id != other.token_id:
                        assert not one.is_certified
                        break
                    num_certified += bool(one.is_certified)
    assert bool(num_certified) == (not filters)


def position(backend: ApiBackend, top: dict[str, float], token: str) -> Position:
    """Return what the backend knows of a position at which a server shows `top` and `token` stands."""
    logprobs = {"tokens": [token], "token_logprobs": [top[token]], "top_logprobs": [top]}
    answer = {"choices": [{"finish_reason": "length", "logprobs": logprobs}]}
    (shown,) = read_completion(answer, None).tokens
    assert shown is not None
    server = backend.server
    return position_of(shown, server.tokens, top_logprobs=server.top_logprobs)


def test_tokens_that_share_one_entry_prove_nothing():
    """Two of five tokens shown have no text. The entry for both has the less likely logprob."""
    with behind(in_process(), replace(ALL, max_top_logprobs=5)) as (_, _, backend):
        whole = {"a": -0.6, "b": -2.0, "c": -3.0, "d": -4.0, "e": -5.0}
        assert position(backend, whole, "a").bounds.ceiling <= -4.0
        fallen = {"a": -0.6, "b": -2.0, "c": -3.0, "": -12.0}
        left = 1 - sum(torch.tensor(list(fallen.values())).exp().tolist())
        ceiling = position(backend, fallen, "a").bounds.ceiling
        assert ceiling >= torch.tensor(left).log().item()


def test_half_characters_match_nothing():
    with behind(in_process(), ALL) as (_, _, backend):
        for key in (
            "",
            "\N{REPLACEMENT CHARACTER}",
            "x\N{REPLACEMENT CHARACTER}",
            b"\xf0\x9f",
            "\ud83d",
        ):
            assert backend.server.tokens.match(key) is None
        assert backend.server.tokens.match("a") == 0


def test_lone_bytes_of_sentencepiece_are_not_taken_for_characters():
    from proxytune.backends.api.tokens import ids_by_bytes
    from proxytune.text.vocab import Vocabulary, token_bytes

    tokens = {"<0x41>": 0, "<0x0A>": 1, "A": 2, "▁A": 3, "▁": 4}
    vocabulary = Vocabulary("toy", tokens, 5)
    ids = ids_by_bytes(vocabulary, token_bytes(vocabulary))
    assert ids == {b"A": 2, b"\n": 1, b" A": 3, b" ": 4}


def test_an_estimated_end_is_never_certified():
    local = in_process(eos_logit=3.0)
    traits = replace(ALL, shows_eos=False)
    with behind(local, traits) as (remote, _, _):
        for prompt in PROMPTS:
            trace = remote.generate(prompt, greedy(40), alpha=0.0)
            assert trace.finish_reason == "stop"
            assert not trace.steps[-1].is_certified
            assert trace.token_ids == local.generate(prompt, greedy(40), alpha=0.0).token_ids


def test_a_draft_keeps_to_the_small_models_context():
    from proxytune.backends.toy import ToyBackend
    from proxytune.testing import toy_table

    local = in_process()
    small = ToyBackend(toy_table(1, eos_logit=-100.0), name="small", memory=0.5, max_context=42)
    members = list(local.ensemble.members)
    members[1] = replace(members[1], backend=small)
    local = ProxyTuned(replace(local.ensemble, members=tuple(members)), local.formats, local.recipe)
    requests = [
        local_request("a" * 30, greedy(12)),
        local_request("abc", greedy(39)),
    ]
    wanted = [trace.token_ids for trace in local.generate_batch(requests)]
    with behind(local, ALL, ApiSettings(lookahead=16)) as (remote, _, _):
        for speculative in (False, Drafting(8, "expert", is_adaptive=False)):
            found = remote.generate_batch(requests, speculative=speculative)
            assert [trace.token_ids for trace in found] == wanted


def test_a_full_context_is_reached_token_by_token_and_the_text_kept():
    local = in_process()
    traits = replace(ALL, max_context=48)
    with behind(local, traits, ApiSettings(lookahead=16)) as (remote, _, _):
        with pytest.raises(UnsupportedModel, match="context") as failure:
            remote.generate("the cat", greedy(60))
        (trace,) = failure.value.traces
    assert trace.num_new_tokens >= 48 - 7
    wanted = local.generate("the cat", greedy(60)).token_ids
    assert trace.token_ids == wanted[: trace.num_new_tokens]


def test_answers_that_the_server_does_not_show_cannot_be_chosen():
    local = in_process()
    traits = replace(ALL, max_top_logprobs=1, logit_bias="none")
    with behind(local, traits) as (remote, _, _):
        best = local.generate("the cat", greedy(1), alpha=0.0).text
        options = [letter for letter in "abcdefgh" if letter != best]
        with pytest.raises(BackendError, match="none of the options"):
            remote.choose("the cat", options)


@pytest.mark.parametrize("key", ["line\nbreak", "with space", "ünïcode"])
def test_what_cannot_be_a_key_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("TEST_KEY", key)
    with pytest.raises(InvalidRequest, match="no API key has") as refusal:
        ApiClient("http://localhost:1/v1", ApiSettings(), key_env="TEST_KEY")
    assert key not in str(refusal.value)


def test_a_failed_batch_stops_asking():
    local = in_process()
    settings = ApiSettings(max_retries=8, timeout_s=1.0)
    with behind(local, ALL, settings) as (remote, server, backend):
        backend.client._sleep = None  # as outside of tests
        assert backend.can_score
        server._http.stop()
        started = time.perf_counter()
        requests = [local_request(prompt, greedy(4)) for prompt in PROMPTS * 4]
        backend.client._settings = replace(settings, max_retries=1)
        with pytest.raises(ApiError):
            remote.generate_batch(requests, batch_size=20)
        backend._pool.shutdown(wait=True)
        assert time.perf_counter() - started < 20


def test_answers_with_the_same_id_are_believed_the_second_time():
    """A gateway may give all its answers the same id."""
    local = in_process()
    with behind(local) as (remote, _, backend):
        wanted = local.generate("the cat", greedy(8)).token_ids
        real = backend.client._is_late
        backend.client._seen.append("cmpl")

        def late(answer: Any) -> bool:
            return real({**answer, "id": "cmpl"})

        backend.client._is_late = late  # type: ignore[method-assign]
        assert remote.generate("the cat", greedy(8)).token_ids == wanted


@pytest.mark.parametrize("shown", [1, 3, 5])
@pytest.mark.parametrize("traits", [ALL, replace(VLLM, logit_bias="none")], ids=["echo", "vllm"])
def test_what_is_guessed_changes_nothing_where_little_is_shown(traits, shown):
    """A guessed token is listed beside the most likely ones, but does not count as seen."""
    for seed in range(4):
        local = in_process(seed=seed)
        limited = replace(traits, max_top_logprobs=shown)
        settings = ApiSettings(top_logprobs=shown)
        with behind(local, limited, settings) as (remote, _, backend):
            assert backend.can_score
            for prompt in PROMPTS[:3]:
                plain = remote.generate(prompt, greedy(20), alpha=1.5).token_ids
                for drafting in (Drafting(4, "expert", is_adaptive=False), True):
                    found = remote.generate(prompt, greedy(20), alpha=1.5, speculative=drafting)
                    assert found.token_ids == plain


def test_a_guess_that_does_not_count_is_still_possible():
    """The server shows the likeliest token and lists a guess, which is still part of the rest."""
    with behind(in_process(), replace(ALL, max_top_logprobs=1)) as (_, _, backend):
        guessed = position(backend, {"a": -0.7, "b": -0.95}, "b")
        assert guessed.token_ids == [0]
        assert guessed.bounds.ceiling >= -0.95
        assert guessed.bounds.rest >= 0.38
