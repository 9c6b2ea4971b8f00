"""What a report says of a trace equals what the raw logits give by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from proxytune.errors import InvalidRequest, MissingExtra, PromptTooLong, UnknownExpert
from proxytune.explain.moves import label, moves, pieces
from proxytune.explain.notebook import frame, plot, show
from proxytune.explain.report import Report, Run
from proxytune.explain.summary import (
    common_contexts,
    first_difference,
    running_share,
    summarise,
    token_types,
)
from proxytune.model import ProxyTuned
from proxytune.policy import Policy
from proxytune.request import Request, SamplingParams
from proxytune.testing import TOKENS, toy_model, toy_table
from proxytune.trace import Step, Trace, View
from tests.support.traces import SPECIAL, told_trace

TWO = {"first": 0.7, "second": 0.4}
PROMPT = "abc"


@pytest.fixture
def model() -> ProxyTuned:
    """Return a toy with two experts, whose texts do not end by themselves."""
    return toy_model(experts=TWO, eos_logit=-100.0)


def explained(model: ProxyTuned, *, top: int = 4, **options: object) -> Trace:
    request = Request(
        PROMPT,
        SamplingParams(max_new_tokens=24, **options),  # type: ignore[arg-type]
        experts=("first", "second"),
        explain=True,
        explain_top=top,
    )
    return model.generate_batch([request])[0]


def tables() -> dict[str, torch.Tensor]:
    """Return the toy's tables: the logits after a token are its row, in float64 for the hand's work."""
    seeds = {"base": 0, "anti": 1} | {name: sum(name.encode()) for name in TWO}
    return {name: toy_table(seed, eos_logit=-100.0).double() for name, seed in seeds.items()}


# Against raw logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 4}])
def test_every_number_of_a_token_is_that_of_the_raw_logits(model, options):
    trace = explained(model, **options)
    logits = tables()
    before = TOKENS.index(PROMPT[-1])
    for move, step in zip(moves(trace), trace.steps, strict=True):
        base = logits["base"][before].log_softmax(-1)
        small = {n: logits[n][before].log_softmax(-1) for n in ("anti", *TWO)}
        raw = logits["base"][before].clone()
        for name, alpha in TWO.items():
            raw += alpha * (logits[name][before] - logits["anti"][before])
        steered = raw.log_softmax(-1)
        token_id = step.token_id
        p, q = float(steered[token_id].exp()), float(base[token_id].exp())
        # The models work in float32, whose logits near 10 are good to 1e-6.
        close = {"abs": 1e-5, "rel": 1e-4}
        assert move.prob_change == pytest.approx(p - q, **close)
        assert move.shift == pytest.approx(math.log(p / q), **close)
        odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
        assert move.log_odds_change == pytest.approx(odds, abs=1e-4, rel=1e-3)
        assert move.is_changed == (int(steered.argmax()) != int(base.argmax()))
        assert (move.base_choice, move.steered_choice) == (
            int(base.argmax()),
            int(steered.argmax()),
        )
        assert move.base_rank == int((base > base[token_id]).sum()) + 1
        kl = float((steered.exp() * (steered - base)).sum())
        assert move.kl == pytest.approx(kl, **close)
        assert move.base_entropy == pytest.approx(-float((base.exp() * base).sum()), **close)
        for name, alpha in TWO.items():
            offset = alpha * float(small[name][token_id] - small["anti"][token_id])
            assert move.offsets[name] == pytest.approx(offset, **close)
        before = token_id


def test_the_shift_is_the_offsets_and_what_all_tokens_have_in_common(model):
    """`log p_steered = log p_base + sum of offsets - log Z`, with one Z for all tokens of a place."""
    trace = explained(model, top=len(TOKENS))
    for step in trace.steps[:5]:
        views = {name: dict(view.top) for name, view in step.views.items()}
        rests = [
            logprob
            - views["base"][token_id]
            - sum(
                alpha * (views[f"{name}.expert"][token_id] - views[f"{name}.anti_expert"][token_id])
                for name, alpha in TWO.items()
            )
            for token_id, logprob in views["steered"].items()
        ]
        assert len(rests) == len(TOKENS)
        # Logits near -100 have steps of 1e-5 in float32.
        assert rests == pytest.approx([rests[0]] * len(rests), abs=1e-4)


def test_a_policys_weights_count_in_the_offsets_and_conflicts_in_the_summary(model):
    trace = explained(model)
    plain = moves(trace)
    steps = tuple(
        replace(step, weights={"first": 0.5, "second": 0.0}, has_conflict=step.index < 6)
        for step in trace.steps
    )
    told = moves(replace(trace, steps=steps))
    assert [m.offsets["first"] for m in told] == [m.offsets["first"] / 2 for m in plain]
    assert {m.offsets["second"] for m in told} <= {0.0, -0.0}
    assert summarise(told).conflict_rate == 6 / 24
    assert told[0].weights == {"first": 0.5, "second": 0.0}


def test_a_schedule_would_begin_anew_so_going_on_is_refused(model):
    policy = Policy(schedule=((0, 1.0), (20, 0.0)))
    ensemble = replace(model.ensemble, policy=policy)
    scheduled = ProxyTuned(ensemble, model.formats, model.recipe)
    assert scheduled.explain(PROMPT, "def").num_given == 3
    with pytest.raises(InvalidRequest, match="schedule"):
        scheduled.explain(PROMPT, "def", SamplingParams(max_new_tokens=2))


def test_the_summary_is_the_mean_of_the_tokens(model):
    trace = explained(model)
    told = moves(trace)
    summary = summarise(told)
    assert summary.tally.num_tokens == summary.tally.num_known == 24
    assert summary.tally.share_changed == sum(m.is_changed for m in told) / 24
    assert summary.tally.mean_shift == pytest.approx(sum(m.shift for m in told) / 24)
    assert summary.tally.mean_prob_change == pytest.approx(sum(m.prob_change for m in told) / 24)
    sizes = [abs(m.log_odds_change) for m in told]
    assert summary.early_share == pytest.approx(sum(sizes[:10]) / sum(sizes))
    assert summary.early_uniform_share == 10 / 24
    by_expert = [sum(abs(m.offsets[n]) for m in told) for n in TWO]
    assert list(summary.expert_shares.values()) == pytest.approx(
        [size / sum(by_expert) for size in by_expert]
    )


def test_a_base_by_itself_moves_nothing(model):
    request = Request(PROMPT, experts={"first": 0.0, "second": 0.0}, explain=True)
    summary = summarise(moves(model.generate_batch([request])[0]))
    assert (summary.tally.num_changed, summary.tally.mean_shift) == (0, 0.0)
    assert summary.early_share is None  # nothing changed, so there is nothing to share out
    assert summary.expert_shares == {}


# A given continuation ---------------------------------------------------------------------------------


def test_a_text_explained_as_given_has_the_numbers_it_was_generated_with(model):
    generated = explained(model)
    given = model.explain(PROMPT, generated.token_ids, experts=("first", "second"), top=4)
    assert given.text == generated.text
    assert (given.num_given, given.finish_reason) == (24, "given")
    for one, other in zip(moves(given), moves(generated), strict=True):
        assert one.is_given and not other.is_given
        assert one.shift == pytest.approx(other.shift, abs=1e-5)
        assert one.kl == pytest.approx(other.kl, abs=1e-5)
        assert (one.is_changed, one.base_choice) == (other.is_changed, other.base_choice)
    assert [s.views.keys() for s in given.steps] == [s.views.keys() for s in generated.steps]


def test_going_on_after_a_text_that_steering_would_give_gives_the_rest_of_it(model):
    whole = explained(model)
    begun = model.explain(
        PROMPT,
        whole.token_ids[:9],
        SamplingParams(max_new_tokens=15),
        experts=("first", "second"),
        top=4,
    )
    assert begun.token_ids == whole.token_ids
    assert begun.text == whole.text
    assert [step.index for step in begun.steps] == list(range(24))
    assert begun.num_given == 9 and begun.finish_reason == "length"
    assert begun.num_prompt_tokens == whole.num_prompt_tokens


def test_another_token_leads_to_another_text(model):
    whole = explained(model)
    other = next(i for i in range(26) if i != whole.token_ids[5])
    forked = model.explain(
        PROMPT, [*whole.token_ids[:5], other], SamplingParams(max_new_tokens=18), top=4
    )
    assert first_difference(forked, whole) == 5
    assert forked.steps[5].token_id == other


def test_a_continuation_given_as_text_is_read_as_it_is(model):
    trace = model.explain(PROMPT, "def", experts="second")
    assert trace.text == "def"
    assert [m.piece for m in moves(trace)] == ["d", "e", "f"]
    assert dict(trace.alphas) == {"second": 0.4}
    assert set(trace.steps[0].views) == {
        "base",
        "steered",
        "second.expert",
        "second.anti_expert",
    }


def test_what_cannot_be_explained_is_refused(model):
    with pytest.raises(InvalidRequest, match="no tokens"):
        model.explain(PROMPT, "")
    with pytest.raises(InvalidRequest, match="999"):
        model.explain(PROMPT, [999])
    with pytest.raises(UnknownExpert):
        model.explain(PROMPT, "a", experts="third")
    with pytest.raises(PromptTooLong):
        toy_model(max_context=8).explain(PROMPT, "abcdef")
    with pytest.raises(InvalidRequest, match="explain=True"):
        moves(model.generate(PROMPT))


# Texts of tokens --------------------------------------------------------------------------------------


def test_a_trace_knows_every_token_that_it_names_and_only_when_explained(model):
    trace = explained(model)
    named = {i for s in trace.steps for v in s.views.values() for i, _ in v.top}
    assert set(trace.tokens) == named | set(trace.token_ids)
    assert all(trace.tokens[i] == TOKENS[i] for i in trace.tokens)
    assert trace.prompt == PROMPT
    assert "".join(piece for piece, _ in pieces(trace)) == trace.text
    plain = model.generate(PROMPT)
    assert (plain.tokens, plain.prompt, plain.special_ids) == ({}, "", ())


def test_the_end_of_a_text_is_special_and_adds_nothing():
    trace = toy_model(eos_logit=100.0).generate(PROMPT, explain=True)
    assert trace.finish_reason == "stop"
    (move,) = moves(trace)
    assert move.is_special and move.piece == "" and move.label == "<eos>"


def test_a_character_over_several_tokens_stands_at_the_one_that_completes_it():
    cat = "🐈".encode()
    trace = told_trace(["a", cat[:1], cat[1:3], cat[3:] + b" b", "c"])
    assert [m.piece for m in moves(trace)] == ["a", "", "", "🐈 b", "c"]
    assert [m.part_of for m in moves(trace)] == [None, "🐈", "🐈", None, None]
    assert [m.label for m in moves(trace)][1:3] == ["⟨F0⟩", "⟨9F 90⟩"]


def test_a_character_that_is_never_completed_is_a_replacement_character():
    cat = "🐈".encode()
    assert [m.piece for m in moves(told_trace([cat[:2], "b"]))] == ["", "\ufffdb"]
    assert [m.piece for m in moves(told_trace(["a", cat[:2]]))] == ["a", "\ufffd"]
    assert [m.piece for m in moves(told_trace([cat[:2], SPECIAL]))] == ["", "\ufffd"]
    # The byte that begins the next character is not lost with the broken one.
    assert [m.piece for m in moves(told_trace([cat[:2], cat[:1], cat[1:]]))] == ["", "\ufffd", "🐈"]


def test_a_token_by_itself_shows_its_bytes():
    assert label(b" \xf0\x9f", 7) == " ⟨F0 9F⟩"
    assert label("\u05d0", 7) == "\u05d0"
    assert label(None, 7) == "⟨token 7⟩"


def test_a_trace_with_half_characters_can_be_written_and_read_back():
    trace = told_trace(["a", "🐈".encode()[:2], "🐈".encode()[2:], SPECIAL], num_given=1)
    assert Trace.from_json(trace.to_json()) == trace


def test_a_line_that_an_earlier_version_wrote_is_still_read():
    line = json.loads(told_trace(["a", "b"]).to_json())
    for name in ("tokens", "special_ids", "prompt", "num_given"):
        del line[name]
    trace = Trace.from_json(json.dumps(line))
    assert [m.label for m in moves(trace)] == ["⟨token 1⟩", "⟨token 2⟩"]


# Single rules -----------------------------------------------------------------------------------------


def test_without_lists_the_ranks_tell_whether_the_choice_changed():
    def move(base: int | None, steered: int | None) -> bool | None:
        views = {"base": View(-1.0, base, 1.0), "steered": View(-0.5, steered, 1.0)}
        step = Step(0, 5, "x", -0.5, views=views)
        return moves(Trace("x", "length", (step,), 1))[0].is_changed

    assert move(1, 1) is False
    assert move(3, 1) is True
    assert move(1, 2) is True
    assert move(3, 2) is None  # both may have the same first choice, or not
    assert move(None, 1) is None


def test_a_token_that_the_base_did_not_show_has_no_shift():
    views = {"base": View(None, None, None), "steered": View(-0.5, 1, 1.0, ((5, -0.5),))}
    (move,) = moves(Trace("x", "length", (Step(0, 5, "x", -0.5, views=views),), 1))
    assert (move.shift, move.is_changed, move.level) == (None, None, 0)
    summary = summarise([move])
    assert summary.tally.num_tokens == 1 and summary.tally.share_changed is None


def test_a_sure_token_has_finite_odds():
    views = {"base": View(math.log(0.5), 1, 1.0), "steered": View(0.0, 1, 0.0)}
    (move,) = moves(Trace("x", "length", (Step(0, 5, "x", 0.0, views=views),), 1))
    # 1 in float32 is at most 2**-24 away from 1.
    assert move.log_odds_change == pytest.approx(24 * math.log(2))


@pytest.mark.parametrize(
    ("factor", "level"),
    [
        (1, 0),
        (1.2, 0),
        (1.3, 1),
        (1.9, 1),
        (2.1, 2),
        (7.9, 2),
        (8.1, 3),
        (1 / 1.3, -1),
        (1 / 9, -3),
    ],
)
def test_colours_change_at_a_quarter_more_twice_and_eight_times(factor, level):
    (move,) = moves(told_trace(["a"], base=[0.1], steered=[0.1 * factor]))
    assert move.level == level


def test_token_types_are_summed_over_their_occurrences_and_sorted_by_change():
    trace = told_trace(
        ["a", "b", "a", "c", "a", "b", "a", "c"],
        base=[0.1, 0.5, 0.2, 0.5, 0.1, 0.5, 0.2, 0.5],
        steered=[0.3, 0.4, 0.2, 0.5, 0.3, 0.4, 0.2, 0.5],
        changed=[True, False, False, False, True, False, False, False],
    )
    kinds = {kind.label: kind for kind in token_types(moves(trace))}
    assert list(kinds) == ["a", "b", "c"]
    assert kinds["a"].tally.num_tokens == 4 and kinds["a"].tally.num_changed == 2
    assert kinds["a"].tally.mean_prob_change == pytest.approx(0.1)
    assert kinds["b"].tally.mean_prob_change == pytest.approx(-0.1)
    assert (kinds["b"].context, kinds["b"].num_context) == ("abac", 2)


def test_the_commonest_context_is_the_most_frequent_window_and_the_first_of_equals():
    texts = [[1, 2, 3, 4, 5], [9, 2, 3, 4, 5], [2, 3], [7]]
    found = common_contexts(texts, [2, 5, 7])
    assert found[5] == ((2, 3, 4, 5), 2)
    assert found[2] == ((2, 3, 4, 5), 2)
    assert found[7] == ((7,), 1)


def test_texts_part_at_the_first_different_token_or_where_one_ends():
    one = told_trace(["a", "b", "c"])
    assert first_difference(one, told_trace(["a", "b", "c"])) is None
    assert first_difference(one, told_trace(["a", "a", "c"])) == 1
    assert first_difference(one, told_trace(["a", "b"])) == 2


def test_the_running_share_is_that_of_the_tokens_around():
    changed = [True] + [False] * 11
    shares = running_share(moves(told_trace(["a"] * 12, changed=changed)))
    assert shares[0] == pytest.approx(1 / 6)  # itself and five behind it
    assert shares[5] == pytest.approx(1 / 11)
    assert shares[6] == 0.0


# Notebooks -------------------------------------------------------------------------------------------


def test_a_table_of_pandas_has_a_row_per_token_and_every_models_numbers(model):
    pytest.importorskip("pandas")
    trace = explained(model)
    table = frame(trace)
    told = moves(trace)
    assert list(table.index) == list(range(24))
    assert list(table["token"]) == [m.label for m in told]
    assert list(table["shift"]) == [m.shift for m in told]
    assert list(table["first.offset"]) == [m.offsets["first"] for m in told]
    assert list(table["second.expert.rank"]) == [s.views["second.expert"].rank for s in trace.steps]
    difference = table["steered.prob"] - table["base.prob"]
    assert list(difference) == pytest.approx([m.prob_change for m in told])


def test_a_missing_library_is_named_with_its_install_line(model, monkeypatch):
    trace = explained(model)
    for name in ("pandas", "matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    for view in (frame, plot):
        with pytest.raises(MissingExtra, match=r"pip install .*\[explain\]'"):
            view(trace)


def test_the_picture_has_a_bar_per_token_as_high_as_its_shift(model):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    trace = explained(model)
    axes = plot(trace)
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([m.shift for m in moves(trace)])
    pyplot.close(axes.figure)


def test_a_notebook_shows_the_text_with_colours_and_hostile_text_as_text():
    trace = told_trace(
        ["<script>alert(1)</script>", ' "x"', "&"], changed=[True, False, False], prompt="<b>"
    )
    shown = show(trace)._repr_html_()
    assert shown is not None
    assert "<script" not in shown and "<b>" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown and "&lt;b&gt;" in shown
    assert "33% of first choices changed" in shown
    assert shown.count("text-decoration:underline") == 1


def test_a_trace_that_is_not_explained_is_shown_as_its_text(model):
    trace = model.generate(PROMPT)
    assert show(trace)._repr_html_() is None
    assert repr(show(trace)) == trace.text


def test_the_numbers_for_programs_are_json_and_say_where_texts_part(model):
    trace = explained(model)
    base = model.generate_batch(
        [Request(PROMPT, SamplingParams(max_new_tokens=24), 0.0, ("first", "second"), True)]
    )[0]
    report = Report((Run("steered", trace), Run("base", base, is_base=True)))
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    first = content["runs"][0]
    assert first["parts_from_base_at"] == first_difference(trace, base)
    assert [t["shift"] for t in first["tokens"]] == [m.shift for m in moves(trace)]
    assert first["tokens"][0]["views"]["base"]["top"][0]["token"] in TOKENS
    assert content["runs"][1]["parts_from_base_at"] is None
