"""How a request over HTTP says how it is steered, in each of the places where it can."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx2 as httpx
import openai
import pytest

from proxytune.policy import COMBINATIONS, POLICIES, Policy
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams, Steering
from proxytune.server.schema import InvalidField
from proxytune.server.steering import about_recipe, expert_named, steering_of
from proxytune.testing import toy_model, toy_recipe
from tests.support.served import Served, served

EXPERTS = {"one": 1.0, "two": 0.5}
GREEDY: dict[str, Any] = {"prompt": "ab", "max_tokens": 12, "temperature": 0}


def fresh(policy: Policy | None = None) -> Any:
    recipe = replace(toy_recipe(EXPERTS), policy=policy or Policy())
    return toy_model(recipe=recipe, memory=0.5, eos_logit=-100.0, max_context=256)


@pytest.fixture(scope="module")
def server():
    with served(fresh()) as running:
        yield running


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return server.client()


def text_of(**steering: Any) -> str:
    return fresh().generate(Request("ab", SamplingParams(max_new_tokens=12), **steering)).text


def post(server: Served, body: dict[str, Any] | bytes, path: str = "/v1/completions") -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return httpx.post(server.url + path, content=content, headers=headers, timeout=60)


# One steering, said in several ways; and the same for the library.
SAID: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"proxytune": {"policy": "gate_agree"}}, {"policy": "gate_agree"}),
    (
        {"proxytune": {"policy": {"clip": 1.5}, "combine": "union"}},
        {"policy": {"clip": 1.5}, "combine": "union"},
    ),
    (
        {"proxytune": {"policy": {"schedule": [[0, 1], [4, 0]]}}},
        {"policy": {"schedule": [[0, 1], [4, 0]]}},
    ),
    ({"proxytune": {"policy": None, "combine": None, "alpha": None, "expert": None}}, {}),
    ({"proxytune": {"policy": {"policy": None, "clip": None}}}, {"policy": "constant"}),
    ({"proxytune": None, "vllm_xargs": None}, {}),
    ({"proxytune": {}, "vllm_xargs": {}}, {}),
    ({"vllm_xargs": {"alpha": None, "expert": None}}, {}),
    ({"vllm_xargs": {"alpha": 0}}, {"alpha": 0.0}),
    ({"vllm_xargs": {"alpha": 0.4, "expert": "two"}}, {"alpha": 0.4, "experts": "two"}),
    ({"vllm_xargs": {"expert": ["one=0.25", "two"]}}, {"experts": {"one": 0.25, "two": 0.5}}),
    (
        {"vllm_xargs": {"expert": "one=0.25, two", "alpha": 2}},
        {"experts": {"one": 0.25, "two": 2.0}},
    ),
    ({"vllm_xargs": {"expert": {"two": 0.25}}}, {"experts": {"two": 0.25}}),
    ({"vllm_xargs": {"policy": "gate_agree"}}, {"policy": "gate_agree"}),
    (
        {"vllm_xargs": {"policy": '{"clip": 1.5}', "combine": "union"}},
        {"policy": {"clip": 1.5}, "combine": "union"},
    ),
    (
        {"vllm_xargs": {"policy": '{"schedule": [[0, 1], [4, 0]]}'}},
        {"policy": {"schedule": [[0, 1], [4, 0]]}},
    ),
    # In two places, which say the same or different things.
    ({"proxytune": {"alpha": 0.5}, "vllm_xargs": {"alpha": 0.5}}, {"alpha": 0.5}),
    (
        {"proxytune": {"alpha": 0.5}, "vllm_xargs": {"expert": "two"}},
        {"alpha": 0.5, "experts": "two"},
    ),
    ({"proxytune": {"expert": "two"}, "vllm_xargs": {"expert": ["two"]}}, {"experts": "two"}),
    (
        {"proxytune": {"expert": "two"}, "vllm_xargs": {"expert": "two=0.3"}},
        {"experts": {"two": 0.3}},
    ),
    (
        {"proxytune": {"experts": {"two": 0.3}}, "vllm_xargs": {"expert": "two"}},
        {"experts": {"two": 0.3}},
    ),
    (
        {"proxytune": {"policy": {"clip": 2}}, "vllm_xargs": {"policy": '{"clip": 2.0}'}},
        {"policy": {"clip": 2}},
    ),
    (
        {"proxytune": {"policy": "gate_agree"}, "vllm_xargs": {"combine": "union"}},
        {"policy": "gate_agree", "combine": "union"},
    ),
    ({"model": "toy:two"}, {"experts": "two"}),
    (
        {"model": "toy:two", "proxytune": {"alpha": 0.3, "policy": "gate_agree"}},
        {"alpha": 0.3, "experts": "two", "policy": "gate_agree"},
    ),
    ({"model": "toy:two", "proxytune": {"experts": {"two": 0.3}}}, {"experts": {"two": 0.3}}),
    (
        {"model": "toy:two", "vllm_xargs": {"expert": "two", "alpha": 0.3}},
        {"alpha": 0.3, "experts": "two"},
    ),
]


@pytest.mark.parametrize(("said", "same"), SAID, ids=lambda each: json.dumps(each))
def test_whatever_the_place_it_is_said_in_the_steering_is_the_librarys(server, said, same):
    answer = post(server, {"model": "toy"} | GREEDY | said)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == text_of(**same)


def test_the_texts_of_these_tests_differ():
    """Otherwise the test above could not fail."""
    assert len({text_of(**same) for _, same in SAID}) > 10


def test_a_chat_and_a_stream_take_a_policy(client):
    options: Any = {"model": "toy", "max_tokens": 12, "temperature": 0}
    body = {"proxytune": {"policy": {"clip": 1.5}, "combine": "union"}}
    messages: Any = [{"role": "user", "content": "ab"}]
    chat = client.chat.completions.create(messages=messages, extra_body=body, **options)
    wanted = text_of(policy={"clip": 1.5}, combine="union")
    assert chat.choices[0].message.content == wanted
    stream = client.completions.create(prompt="ab", stream=True, extra_body=body, **options)
    assert "".join(chunk.choices[0].text for chunk in stream) == wanted


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": GREEDY,
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 12},
    "/v1/responses": {"input": "ab", "max_output_tokens": 12},
    "/v1/messages": {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 12},
}


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_that_generates_is_steered_in_every_way(server, path):
    body = {"model": "toy", "temperature": 0} | ROUTES[path]
    steered = {"alpha": 0.4, "expert": "two", "policy": {"clip": 1.5}, "combine": "union"}
    ways: list[dict[str, Any]] = [
        {"proxytune": steered},
        {"vllm_xargs": {**steered, "policy": '{"clip": 1.5}'}},
        {"model": "toy:two", "proxytune": {**steered, "expert": None}},
        {"proxytune": {"alpha": 0.4}, "vllm_xargs": {**steered, "alpha": None}},
    ]
    wanted = text_of(alpha=0.4, experts="two", policy={"clip": 1.5}, combine="union")
    for asked in ways:
        answer = post(server, body | asked, path)
        assert answer.status_code == 200, answer.text
        assert json.dumps(wanted) in answer.text
    for asked in ({"proxytune": {"policy": "nonsense"}}, {"vllm_xargs": {"policy": "nonsense"}}):
        answer = post(server, body | asked, path)
        assert answer.status_code == 400 and "policy is 'nonsense'" in answer.text


def test_an_explained_answer_under_a_policy_that_excludes_tokens_is_json(server):
    """Excluded tokens have no logprob that JSON could write."""
    policy = {"plausibility": 0.9}
    explain = {"explain": True, "explain_top": 20, "policy": policy}
    body = {"model": "toy", **GREEDY, "logprobs": 20, "proxytune": explain}
    for more in ({}, {"stream": True}):
        answer = post(server, body | more)
        assert answer.status_code == 200, answer.text
        assert "Infinity" not in answer.text and '"error"' not in answer.text
    messages = [{"role": "user", "content": "ab"}]
    chat = {
        "model": "toy",
        "messages": messages,
        "logprobs": True,
        "top_logprobs": 20,
        "max_tokens": 4,
    }
    answer = post(server, chat | {"proxytune": explain}, "/v1/chat/completions")
    assert answer.status_code == 200 and "Infinity" not in answer.text


def test_a_scored_prompt_is_scored_by_the_requests_policy(server):
    body = {"model": "toy", "prompt": "the sea", "max_tokens": 0, "echo": True, "logprobs": 0}

    def logprobs(**asked: Any) -> list[float]:
        answer = post(server, body | asked)
        assert answer.status_code == 200, answer.text
        found: list[float] = answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:]
        return found

    asked = {"policy": {"clip": 0.5}, "combine": "union"}
    wanted = fresh(Policy("union", clip=0.5)).explain("t", "he sea").steps
    assert logprobs(proxytune=asked) == pytest.approx([step.logprob for step in wanted], abs=1e-5)
    assert logprobs(proxytune=asked) != logprobs()
    schedule = {"policy": {"schedule": [[0, 1], [4, 0]]}}
    answer = post(server, body | {"proxytune": schedule})
    assert answer.status_code == 400 and "schedule" in answer.json()["error"]["message"]


# Refusals -----------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"proxytune": 3}, "proxytune", "an object"),
    ({"proxytune": []}, "proxytune", "an object"),
    ({"proxytune": "gate_sure"}, "proxytune", "an object"),
    ({"proxytune": {"policy": "kl_mtch"}}, "proxytune.policy", "policy is 'kl_mtch'"),
    ({"proxytune": {"policy": 3}}, "proxytune.policy", "policy is 3"),
    ({"proxytune": {"policy": True}}, "proxytune.policy", "policy is True"),
    ({"proxytune": {"policy": ["gate_sure"]}}, "proxytune.policy", "a name or an object"),
    ({"proxytune": {"policy": {"threshold": 0.5}}}, "proxytune.policy", "threshold has no effect"),
    ({"proxytune": {"policy": {"x": 0.5}}}, "proxytune.policy", "'x' is not a setting"),
    ({"proxytune": {"policy": {"schedule": [[2**70, 1]]}}}, "proxytune.policy", "schedule is"),
    (
        {"proxytune": {"policy": {"schedule": [[i, 1] for i in range(1001)]}}},
        "proxytune.policy",
        "at most 1,000",
    ),
    ({"proxytune": {"combine": "product"}}, "proxytune.combine", "combine is 'product'"),
    ({"proxytune": {"combine": {}}}, "proxytune.combine", "combine is"),
    ({"proxytune": {"policy": "nudge", "combine": "union"}}, "proxytune", "which expert counts"),
    ({"proxytune": {"expert": "three"}}, "proxytune", "no expert 'three'"),
    ({"vllm_xargs": 3}, "vllm_xargs", "an object"),
    ({"vllm_xargs": ["alpha"]}, "vllm_xargs", "an object"),
    ({"vllm_xargs": {"alpha": "0.5"}}, "vllm_xargs", "alpha is '0.5'"),
    ({"vllm_xargs": {"alpha": True}}, "vllm_xargs", "alpha is True"),
    ({"vllm_xargs": {"alpha": 10**400}}, "vllm_xargs", "alpha is"),
    ({"vllm_xargs": {"expert": 3}}, "vllm_xargs", "expert is 3"),
    ({"vllm_xargs": {"expert": ["one", "one=1"]}}, "vllm_xargs", "names 'one' twice"),
    ({"vllm_xargs": {"expert": "one=much"}}, "vllm_xargs", "'much'"),
    ({"vllm_xargs": {"expert": "three"}}, "vllm_xargs", "no expert 'three'"),
    ({"vllm_xargs": {"expert": "one=1", "alpha": 1}}, "vllm_xargs", "alpha would do nothing"),
    ({"vllm_xargs": {"policy": "{"}}, "vllm_xargs", "not JSON"),
    ({"vllm_xargs": {"policy": '{"a":' * 9000}}, "vllm_xargs", "not JSON"),
    ({"vllm_xargs": {"combine": 3}}, "vllm_xargs", "combine is 3"),
    ({"vllm_xargs": {"experts": "one"}}, "vllm_xargs", "'experts'"),
    ({"vllm_xargs": {"session_id": "x"}}, "vllm_xargs", "'session_id'"),
    (
        {"proxytune": {"alpha": 1}, "vllm_xargs": {"alpha": 0.5}},
        "vllm_xargs",
        "one strength and vllm_xargs for another",
    ),
    (
        {"proxytune": {"expert": "one"}, "vllm_xargs": {"expert": "two"}},
        "vllm_xargs",
        "one expert and vllm_xargs for another",
    ),
    (
        {"proxytune": {"experts": {"one": 1}}, "vllm_xargs": {"expert": "one=2"}},
        "vllm_xargs",
        "one strength and vllm_xargs for another",
    ),
    (
        {"proxytune": {"alpha": 1}, "vllm_xargs": {"expert": "one=2"}},
        "vllm_xargs",
        "strength is given twice",
    ),
    (
        {"proxytune": {"policy": "nudge"}, "vllm_xargs": {"policy": "gate_sure"}},
        "vllm_xargs",
        "one policy and vllm_xargs for another",
    ),
    (
        {"proxytune": {"combine": "sum"}, "vllm_xargs": {"combine": "union"}},
        "vllm_xargs",
        "one combination and vllm_xargs for another",
    ),
    (
        {"model": "toy:two", "proxytune": {"expert": "one"}},
        "proxytune",
        "one expert and proxytune for another",
    ),
    (
        {"model": "toy:two", "proxytune": {"experts": {"one": 1, "two": 1}}},
        "proxytune",
        "one expert and proxytune for another",
    ),
    (
        {"model": "toy:two", "vllm_xargs": {"expert": "one"}},
        "vllm_xargs",
        "one expert and vllm_xargs for another",
    ),
]


@pytest.mark.parametrize(("asked", "param", "said"), WRONG, ids=lambda each: json.dumps(each)[:60])
def test_a_wrong_steering_is_answered_with_the_name_of_its_field(server, asked, param, said):
    answer = post(server, {"model": "toy"} | GREEDY | asked)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and said in error["message"]
    assert len(error["message"]) < 1000


@pytest.mark.parametrize("model", ["toy:three", "toy:", "other", "toy:two:one", ":two"])
def test_a_model_that_is_not_served_is_not_found(server, model):
    answer = post(server, GREEDY | {"model": model})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


def test_more_experts_than_may_steer_a_text_are_refused():
    names = [f"e{number}" for number in range(65)]
    recipe = toy_recipe(dict.fromkeys(names, 1.0))
    with pytest.raises(InvalidField, match="65 experts, and 64 may"):
        steering_of(recipe, expert=None, fields=None, xargs={"expert": names})
    assert steering_of(recipe, expert=None, fields=None, xargs={"expert": names[1:]})


def test_what_does_not_go_together_with_the_recipe_is_answered_400():
    with served(fresh(Policy("union"))) as running:
        answer = post(running, {"model": "toy", **GREEDY, "proxytune": {"policy": "kl_match"}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "proxytune"
    assert "kl_match and combine is union" in answer.json()["error"]["message"]


# What can be asked --------------------------------------------------------------------------------------


def test_the_server_says_what_requests_may_choose(server):
    about = httpx.get(server.url + "/v1/proxytune").json()
    assert about["policies"] == list(POLICIES) and about["combinations"] == list(COMBINATIONS)
    assert (about["steering"], about["combine"]) == ({}, "sum")
    for policy in about["policies"]:
        body = {"model": "toy", **GREEDY, "proxytune": {"policy": policy}}
        assert post(server, body).status_code == 200
    for combine in about["combinations"]:
        body = {"model": "toy", **GREEDY, "proxytune": {"combine": combine}}
        assert post(server, body).status_code == 200


def test_a_base_behind_an_api_offers_what_it_can_show():
    small = ModelSpec(model="small")
    recipe = Recipe(ModelSpec(model="http://localhost:1/v1"), (ExpertSpec("law", small, small),))
    about = about_recipe(recipe, "law", base=fresh().formats[0], limits={})
    assert about["policies"] == ["constant"]
    assert about["combinations"] == [
        "sum", "inverse_entropy", "sign_agreement", "route_entropy", "union", "intersection",
    ]  # fmt: skip
    assert expert_named(recipe, "law", "law:law") == "law"
    asked = steering_of(recipe, expert="law", fields=None, xargs={"alpha": 2})
    assert asked == Steering(2, "law")
