"""Requests in, traces out: batches, streams, choice of experts, conversations."""

from __future__ import annotations

import pytest

from proxytune.decode.speculative import Drafting
from proxytune.errors import InvalidRequest, PromptTooLong, UnknownExpert
from proxytune.request import Request, SamplingParams
from proxytune.testing import toy_model
from proxytune.text.prompts import PLAIN_USER_TURN

SHORT = SamplingParams(max_new_tokens=12)


@pytest.fixture
def model():
    return toy_model(experts={"first": 1.0, "second": 0.5}, memory=0.5)


def test_text_token_ids_and_a_request_give_the_same(model):
    ids = model.tokenizer.encode("hello")
    traces = [
        model.generate("hello", SHORT),
        model.generate(ids, SHORT),
        model.generate(Request("hello", SHORT)),
    ]
    assert len({trace.token_ids for trace in traces}) == 1
    assert traces[0].num_prompt_tokens == 5
    assert traces[0].latency_s > 0


def test_settings_beside_a_whole_request_are_refused(model):
    with pytest.raises(InvalidRequest, match="beside it"):
        model.generate(Request("x"), SHORT)
    with pytest.raises(InvalidRequest, match="beside it"):
        model.generate(Request("x"), alpha=0.5)


def test_closing_a_stream_stops_the_work(model):
    backend = model.ensemble.members[0].backend
    before = backend.num_rows_run
    steps = model.stream("ab", SamplingParams(max_new_tokens=50, ignore_eos=True))
    next(steps)
    steps.close()
    assert backend.num_rows_run - before < 5


def test_streamed_text_joined_is_the_whole_text(model):
    whole = model.generate("hello there", SHORT)
    steps = list(model.stream("hello there", SHORT))
    assert "".join(step.text for step in steps) == whole.text
    assert tuple(step.token_id for step in steps) == whole.token_ids
    assert steps[-1].finish_reason == whole.finish_reason


def test_a_stream_is_checked_before_it_begins(model):
    with pytest.raises(UnknownExpert):
        model.stream("x", experts="nobody")


def test_many_prompts_in_small_batches_give_what_each_gives_alone(model):
    requests = [
        Request(text, SHORT, alpha)
        for text, alpha in [("a", 0.0), ("hello", None), ("the end", 2.0), ("x y", 0.5), ("q", 1.0)]
    ]
    alone = [model.generate(request).token_ids for request in requests]
    for batch_size in (1, 2, 8):
        traces = model.generate_batch(requests, batch_size=batch_size)
        assert [trace.token_ids for trace in traces] == alone


def test_events_name_the_request_they_belong_to(model):
    seen: dict[int, list[int]] = {}
    requests = [Request(text, SHORT) for text in ("a", "bb", "ccc")]

    def note(index, event):
        seen.setdefault(index, []).append(event.step.token_id)

    traces = model.generate_batch(requests, batch_size=2, on_event=note)
    assert seen == {i: list(trace.token_ids) for i, trace in enumerate(traces)}


def test_all_requests_are_checked_before_any_is_run(model):
    bad = [Request("a"), Request("a", experts="nobody")]
    with pytest.raises(UnknownExpert):
        model.generate_batch(bad, on_event=lambda *_: pytest.fail("ran"))
    with pytest.raises(InvalidRequest, match="batch_size"):
        model.generate_batch([Request("a")], batch_size=0)


def test_without_a_choice_all_experts_steer_with_their_own_strength(model):
    assert dict(model.generate("a", SHORT).alphas) == {"first": 1.0, "second": 0.5}


def test_an_expert_chosen_by_name_steers_alone(model):
    trace = model.generate("a", SHORT, experts="second")
    assert dict(trace.alphas) == {"second": 0.5}
    alone = toy_model(experts={"first": 0.0, "second": 0.5}, memory=0.5)
    assert alone.generate("a", SHORT).token_ids == trace.token_ids


def test_one_alpha_is_given_to_each_chosen_expert_and_a_mapping_to_each_its_own(model):
    assert dict(model.generate("a", SHORT, alpha=2).alphas) == {"first": 2.0, "second": 2.0}
    mixed = model.generate("a", SHORT, experts={"first": 0.25, "second": -1.0})
    assert dict(mixed.alphas) == {"first": 0.25, "second": -1.0}


def test_an_unknown_expert_is_refused_with_the_known_names(model):
    with pytest.raises(UnknownExpert, match=r"third.*first.*second"):
        model.generate("a", experts="third")


def test_a_token_id_that_does_not_exist_is_refused(model):
    with pytest.raises(InvalidRequest, match="9999"):
        model.generate([1, 9999])


def test_a_prompt_that_does_not_fit_is_refused():
    small = toy_model(max_context=6)
    with pytest.raises(PromptTooLong, match="context of 6"):
        small.generate("much too long", SHORT)


def test_a_cancelled_generation_returns_what_is_there(model):
    calls = iter([False, False, True])
    trace = model.generate(
        "a",
        SamplingParams(max_new_tokens=50, ignore_eos=True),
        cancelled=lambda: next(calls),
    )
    assert trace.finish_reason == "cancelled"
    assert trace.num_new_tokens == 2


def test_the_seed_of_a_sampled_trace_repeats_it(model):
    sampled = SamplingParams(max_new_tokens=15, temperature=2.0)
    first = model.generate("a", sampled)
    again = model.generate("a", SamplingParams(max_new_tokens=15, temperature=2.0, seed=first.seed))
    assert first.token_ids == again.token_ids
    assert model.generate("a", SHORT).seed is None


def test_a_conversation_remembers_its_turns_and_settings_may_change(model):
    chat = model.chat(SamplingParams(max_new_tokens=8), system="be kind")
    answer = "".join(step.text for step in chat.say("hello"))
    chat.alpha, chat.experts = 0.0, "first"
    list(chat.say("again"))
    assert [m["role"] for m in chat.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert chat.messages[2]["content"] == answer.strip()


def test_an_answer_broken_off_is_remembered_as_far_as_it_went(model):
    chat = model.chat(SamplingParams(max_new_tokens=8, ignore_eos=True))
    steps = chat.say("hello")
    first = next(steps)
    steps.close()
    assert chat.messages[-1] == {"role": "assistant", "content": first.text.strip()}


def test_a_turn_that_is_refused_is_not_remembered(model):
    chat = model.chat(SHORT)
    chat.experts = "nobody"
    with pytest.raises(UnknownExpert):
        chat.say("hello")
    assert chat.messages == []


def test_scoring_ranks_the_models_and_gives_a_row_per_strength(model):
    report = model.score("the cat sat on the mat", [0, 1], experts="first")
    names = [(row.name, row.alpha) for row in report.rows]
    assert names == [
        ("base", None),
        ("first.expert", None),
        ("first.anti_expert", None),
        ("steered", 0),
        ("steered", 1),
    ]
    with pytest.raises(InvalidRequest):
        model.score("", [0])


@pytest.mark.parametrize("speculative", [False, True, Drafting(3, "expert", is_adaptive=False)])
@pytest.mark.parametrize("experts", ["first", ("first", "second")])
def test_each_turn_of_a_conversation_is_what_its_messages_alone_would_give(speculative, experts):
    model = toy_model(experts={"first": 1.0, "second": 0.5}, memory=0.5)
    sampling = SamplingParams(max_new_tokens=9, temperature=0.9, seed=4)
    chat = model.chat(sampling, experts=experts, speculative=speculative)
    for text in ("hello", "and", "more of it"):
        fresh = model.chat(sampling, experts=experts)
        fresh.messages = list(chat.messages)
        expected = [step.token_id for step in fresh.say(text)]
        assert [step.token_id for step in chat.say(text)] == expected
        assert fresh.messages == chat.messages


def test_a_conversation_reads_each_token_once():
    model = toy_model(memory=0.5)
    backend = model.ensemble.members[0].backend
    chat = model.chat(SamplingParams(max_new_tokens=5, ignore_eos=True))
    list(chat.say("hello"))
    before = backend.num_rows_run
    list(chat.say("you"))
    # What is new: the answer's last token, what separates the turns, the words, four tokens of the answer.
    separators = len("\nUser: you\nAssistant:") + 2
    assert backend.num_rows_run - before <= separators + 4


def test_settings_of_drafts_are_remembered_by_the_model(model):
    first = model.generate("hello", SHORT, speculative=True)
    again = model.generate("hello", SHORT, speculative=Drafting())
    assert first.token_ids == again.token_ids == model.generate("hello", SHORT).token_ids


def test_a_chat_without_a_format_ends_before_the_users_next_turn():
    """Whoever asks: the library, files of prompts and the server build their jobs in one place."""
    model = toy_model()
    messages = [{"role": "user", "content": "hi"}]
    assert PLAIN_USER_TURN in model.job(Request(messages)).sampling.stop
    assert model.job(Request("hi")).sampling.stop == ()
