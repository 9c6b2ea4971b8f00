"""`proxytune explain`: what it prints where, what it writes, and what it refuses."""

# Changed tokens stand in angle brackets that look like others.
# ruff: noqa: RUF001

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from proxytune import cli
from proxytune.commands.shown import coloured, safe, summary_line
from proxytune.explain.moves import moves
from proxytune.explain.summary import summarise
from proxytune.model import ProxyTuned
from proxytune.request import Request, SamplingParams
from proxytune.testing import TOKENS, toy_recipe
from proxytune.trace import read_traces
from tests.support.toys import toy_load
from tests.support.traces import SPECIAL, told_trace

MODEL = toy_load(toy_recipe({"first": 1.0, "second": 0.5}))


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)


def answered(*arguments: str | Path, stdin: str | None = None) -> dict[str, Any]:
    result = run("explain", *arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a recipe with the experts `first` and `second`, whose models are toys."""
    monkeypatch.setattr(ProxyTuned, "load", staticmethod(toy_load))
    toy_recipe({"first": 1.0, "second": 0.5}).write(tmp_path / "recipe")
    return tmp_path / "recipe"


def expected(alpha: float, num_tokens: int = 12) -> Any:
    request = Request("ab", SamplingParams(max_new_tokens=num_tokens), alpha, "first", explain=True)
    return MODEL.generate_batch([request])[0]


FIRST = ("--expert", "first", "--max-new-tokens", "12")


def test_the_terminal_shows_prompt_text_moved_tokens_base_and_a_summary(recipe: Path):
    result = run("explain", recipe, "ab", *FIRST)
    assert result.exit_code == 0, result.output
    trace, base = expected(1.0), expected(0.0)
    plain = result.stdout.replace("‹", "").replace("›", "").replace("↵\n", "\n")
    assert f"ab{trace.text}" in plain and base.text.strip()[:6] in plain
    assert "steered by first at alpha 1" in result.stdout
    assert "base would say" in result.stdout
    tally = summarise(moves(trace)).tally
    assert f"{tally.num_changed} of 12 first choices changed" in result.stdout
    assert result.stdout.count("‹") == result.stdout.count("›") == tally.num_changed


def test_colours_are_there_on_a_terminal_and_brackets_in_any_case():
    told = moves(
        told_trace([" up", " down", "\n"], base=[0.1, 0.9, 0.5], steered=[0.9, 0.1, 0.5],
                   changed=[True, False, False])
    )  # fmt: skip
    console = Console(force_terminal=True, color_system="truecolor", width=80)
    with console.capture() as captured:
        console.print(coloured(told), end="")
    shown = captured.get()
    orange, blue = "48;2;240;162;74", "48;2;121;178;226"
    assert orange in shown.split("down")[0] and blue in shown.split("up")[1]
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == " ‹up› down↵\n"


def test_a_text_cannot_move_the_terminals_cursor_or_turn_its_letters():
    told = moves(told_trace(["\x1b[2J", "\u202eabc", "a\rb", "🐈".encode()[:2], SPECIAL]))
    text = coloured(told).plain
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    assert "⟨1B⟩" in text and "⟨202E⟩" in text and "⟨0D⟩" in text and "[<end>]" in text
    assert safe("tab\tand\nline") == "tab\tand\nline"


def test_the_json_has_every_token_of_every_continuation(recipe: Path):
    content = answered(recipe, "ab", *FIRST, "--top", "3")
    (report,) = content["reports"]
    assert report["prompt"] == "ab"
    assert [entry["name"] for entry in report["runs"]] == ["alpha 1", "base"]
    tokens = report["runs"][0]["tokens"]
    assert [t["token_id"] for t in tokens] == list(expected(1.0).token_ids)
    assert [t["shift"] for t in tokens] == [m.shift for m in moves(expected(1.0))]
    views = tokens[0]["views"]
    assert list(views) == ["base", "steered", "first.expert", "first.anti_expert"]
    assert all(len(view["top"]) == 3 for view in views.values())


def test_several_strengths_show_where_texts_part(recipe: Path):
    content = answered(recipe, "ab", *FIRST, "--alpha", "2,0,0.5")
    runs = content["reports"][0]["runs"]
    assert [entry["name"] for entry in runs] == ["alpha 2", "alpha 0.5", "base"]
    base = expected(0.0)
    for entry, alpha in zip(runs, (2.0, 0.5), strict=False):
        ids = [t["token_id"] for t in entry["tokens"]]
        assert ids == list(expected(alpha).token_ids)
        differs = [a != b for a, b in zip(ids, base.token_ids, strict=True)]
        place = differs.index(True) if any(differs) else None
        assert entry["parts_from_base_at"] == place


def test_another_token_may_be_put_in_and_the_text_goes_on_from_it(recipe: Path):
    whole = expected(1.0)
    other = next(t for t in "xyz" if TOKENS.index(t) != whole.token_ids[4])
    number = TOKENS.index(other)
    for token in (other, f"#{number}"):
        content = answered(recipe, "ab", *FIRST, "--what-if", f"4={token}")
        forked = content["reports"][0]["runs"][1]
        ids = [t["token_id"] for t in forked["tokens"]]
        assert ids[:5] == [*whole.token_ids[:4], number]
        assert len(ids) == 12 and forked["num_given"] == 5 and forked["is_forked"]
        further = MODEL.generate(
            [*MODEL.tokenizer.encode("ab"), *ids[:5]],
            SamplingParams(max_new_tokens=7),
            alpha=1.0,
            experts="first",
        )
        assert ids[5:] == list(further.token_ids)


def test_the_last_token_can_be_another_too(recipe: Path):
    content = answered(recipe, "ab", *FIRST, "--what-if", "11=q", "--what-if", "0=q")
    last, first = content["reports"][0]["runs"][1:3]
    assert last["text"].endswith("q") and len(last["tokens"]) == 12
    assert first["text"].startswith("q") and first["num_given"] == 1


def test_a_given_continuation_is_explained_and_the_bases_own_stands_beside_it(recipe: Path):
    content = answered(recipe, "ab", *FIRST, "--continuation", "hello.")
    given, base = content["reports"][0]["runs"]
    assert given["text"] == "hello." and given["finish_reason"] == "given"
    assert all(t["is_given"] for t in given["tokens"])
    assert base["is_base"] and len(base["tokens"]) == 12


def reports_of_a_file(recipe: Path, folder: Path) -> list[dict[str, Any]]:
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "abc"}\n{"prompt": "de", "continuation": "fgh", "options": {"alpha": 2}}\n'
    )
    return answered(recipe, "--input-file", prompts, "--max-new-tokens", "5")["reports"]


def test_each_prompt_of_a_file_gets_its_own_report(recipe: Path, tmp_path: Path):
    assert [r["prompt"] for r in reports_of_a_file(recipe, tmp_path)] == ["abc", "de"]


def test_a_line_of_a_file_may_hold_a_continuation_and_options(recipe: Path, tmp_path: Path):
    second = reports_of_a_file(recipe, tmp_path)[1]["runs"][0]
    assert second["text"] == "fgh" and set(second["alphas"].values()) == {2.0}


def test_saved_traces_are_shown_again_without_a_model(recipe: Path, tmp_path: Path):
    saved = tmp_path / "traces.jsonl"
    first = answered(recipe, "ab", *FIRST, "--what-if", "3=q", "--trace-file", saved)
    again = answered("--trace", saved)
    runs, before = again["reports"][0]["runs"], first["reports"][0]["runs"]
    assert [r["tokens"] for r in runs] == [r["tokens"] for r in before]
    assert [r["is_forked"] for r in runs] == [False, True, False]
    shown = run("explain", "--trace", saved)
    assert shown.exit_code == 0 and "the base by itself" in shown.stdout


def test_generate_writes_a_trace_that_explain_reads(recipe: Path, tmp_path: Path):
    saved = tmp_path / "trace.jsonl"
    result = run("generate", recipe, "ab", *FIRST, "--trace-file", saved)
    assert result.exit_code == 0, result.output
    (trace,) = read_traces(saved)
    assert trace.token_ids == expected(1.0).token_ids and trace.prompt == "ab"
    assert result.stdout == trace.text + "\n"
    (report,) = answered("--trace", saved)["reports"]
    assert report["runs"][0]["text"] == trace.text
    refused = run(
        "generate", recipe, "--input-file", "f", "--output-file", "g", "--trace-file", "t"
    )
    assert refused.exit_code == 2 and "--trace-file" in refused.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", ["generate", "explain"])
def test_a_trace_file_that_fails_does_not_take_the_answer_with_it(recipe: Path, command: str):
    shown = run(command, recipe, "ab", *FIRST)
    failed = run(command, recipe, "ab", *FIRST, "--trace-file", "/dev/full")
    assert failed.exit_code == 2 and "/dev/full cannot be written: No space" in failed.stderr
    assert failed.stdout and failed.stdout == shown.stdout


def test_the_page_is_written_beside_the_answer(recipe: Path, tmp_path: Path):
    page = tmp_path / "report.html"
    result = run("explain", recipe, "ab", *FIRST, "--html", page)
    assert result.exit_code == 0 and str(page) in result.stderr
    assert "<!doctype html>" in page.read_text(encoding="utf-8")
    refused = run("explain", recipe, "ab", *FIRST, "--html", tmp_path / "no" / "report.html")
    assert refused.exit_code == 2 and "cannot be written" in refused.stderr


def test_drawn_texts_share_their_seed_so_that_steering_alone_differs(recipe: Path):
    content = answered(recipe, "ab", *FIRST, "--temperature", "1", "--alpha", "1,2")
    seeds = {entry["seed"] for entry in content["reports"][0]["runs"]}
    assert len(seeds) == 1 and None not in seeds


def test_a_summary_of_nothing_is_words():
    assert summary_line([]) == "no tokens"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "nothing to explain"),
        (["RECIPE"], "no prompt"),
        (["RECIPE", ""], "empty"),
        (["RECIPE", "ab", "--input-file", "f"], "--input-file"),
        (["RECIPE", "--input-file", "f", "--what-if", "1=a"], "--what-if"),
        (["RECIPE", "--input-file", "f", "--continuation", "a"], "--continuation"),
        (["--trace", "f", "--alpha", "1"], "--alpha"),
        (["--trace", "missing.jsonl"], "missing.jsonl"),
        (["RECIPE", "ab", "--what-if", "a=b"], "--what-if"),
        (["RECIPE", "ab", "--what-if", "3="], "--what-if"),
        (["RECIPE", "ab", "--what-if", "99=b"], "position 99"),
        (["RECIPE", "ab", "--what-if", "0=#999"], "999"),
        (["RECIPE", "ab", "--alpha", "1,x"], "--alpha"),
        (["RECIPE", "ab", "--alpha", "1,2", "--expert", "first=0.5"], "--alpha"),
        (["RECIPE", "ab", "--top", "2000"], "--top"),
        (["RECIPE", "ab", "--rows", "-1"], "--rows"),
        (["RECIPE", "ab", "--expert", "third"], "third"),
        (["RECIPE", "ab", "--trace-file", "/no/such/folder/t.jsonl"], "cannot be written"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(recipe: Path, arguments, word):
    result = run("explain", *[str(recipe) if a == "RECIPE" else a for a in arguments])
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert "Traceback" not in result.output and not result.stdout
    assert word in result.stderr
