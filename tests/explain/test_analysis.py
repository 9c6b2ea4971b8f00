"""Many texts summed up: positions, token types, equations, strengths, in bounded memory."""

from __future__ import annotations

import gzip
import json
import math
import random
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from proxytune import cli
from proxytune.errors import InputFileError, InvalidRequest, OutputFileError
from proxytune.explain.analysis import analyze
from proxytune.explain.equations import equation_sides
from proxytune.explain.moves import moves
from proxytune.explain.welch import Moments, welch
from proxytune.model import ProxyTuned
from proxytune.testing import toy_recipe
from proxytune.trace import Trace, read_traces
from tests.support.toys import toy_load
from tests.support.traces import told_trace


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a recipe with the experts `first` and `second`, whose models are toys."""
    monkeypatch.setattr(ProxyTuned, "load", staticmethod(toy_load))
    toy_recipe({"first": 1.0, "second": 0.5}).write(tmp_path / "recipe")
    return tmp_path / "recipe"


def moments(*values: float) -> Moments:
    found = Moments()
    for value in values:
        found.add(value)
    return found


# Equations -------------------------------------------------------------------------------------------


def sides(text: str) -> list[tuple[str, str]]:
    found = list(equation_sides(text))
    texts = [text[span.start : span.end].strip() for span in found]
    assert [span.is_left for span in found] == [True, False] * (len(found) // 2)
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 16 - 3 - 4 = 9 eggs left.", [("16 - 3 - 4", "9")]),
        ("So 9 * 2 = $18.50. Then 1+1=2.", [("9 * 2", "$18.50"), ("1+1", "2")]),
        ("3 + 4 = 7 = 14/2, and 12 x 3 = 36", [("3 + 4", "7 = 14/2"), ("12 x 3", "36")]),
        ("1,000 * 2 = 2,000", [("1,000 * 2", "2,000")]),
        ("a box 3+4=7", [("3+4", "7")]),
        ("he sells 10 pops x $0.40 each = $4.00 a day", [("10 pops x $0.40 each", "$4.00")]),
        (
            "* He pays $150 - (40% of $150) = $150 - $60 = $90.",
            [("$150 - (40% of $150)", "$150 - $60 = $90")],
        ),
        ("Volume = 6 x 4 x 3 = 96 feet", [("6 x 4 x 3", "96")]),
        ("3 cats and 4 dogs = 7", []),  # no operator
        ("1/3 \\* 6 hours = 2 hours", [("1/3 \\* 6 hours", "2")]),
        ("so 2 + 2 = 4 and 9 more", [("2 + 2", "4")]),
        ("x = 5", []),  # nothing to work out
        ("5 = 5", []),
        ("-5 = 5", []),
        ("if 3 + a == 4", []),
        ("2 + 2 =\n4", []),  # another line
        ("= 4 + 4", []),
        ("", []),
    ],
)
def test_equations_are_arithmetic_with_an_equals_sign_on_one_line(text, expected):
    assert sides(text) == expected


def test_a_long_line_of_digits_is_read_in_no_time():
    """A pattern that tries every way to split it took minutes."""
    assert list(equation_sides("1 + " * 50_000 + "=")) == []
    assert len(list(equation_sides("1 + " * 50_000 + "1 = 5" + "=" * 50_000))) == 2
    assert list(equation_sides("1" + "+" * 100_000 + " = 3")) == []
    assert list(equation_sides("1" * 200_000 + " = x")) == []


def test_tokens_of_equations_are_counted_on_their_side_and_the_equals_sign_on_none():
    tokens = ["So", " 3", " +", " 4", " =", " 7", " eggs"]
    base = [0.5, 0.1, 0.1, 0.1, 0.1, 0.4, 0.5]
    steered = [0.5, 0.2, 0.3, 0.4, 0.9, 0.5, 0.9]
    (group,) = analyze([told_trace(tokens, base=base, steered=steered)]).groups
    assert group.num_equations == 1
    assert (group.left.num_tokens, group.right.num_tokens) == (3, 1)
    assert group.left.mean == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    assert group.right.mean == pytest.approx(0.1)


def test_characters_of_many_bytes_do_not_shift_the_sides():
    cat = "🐈".encode()
    tokens = [cat[:2], cat[2:], " 3", "×", "4", "=", "12"]  # noqa: RUF001
    (group,) = analyze([told_trace(tokens)]).groups
    assert (group.left.num_tokens, group.right.num_tokens) == (3, 1)


# Welch's test ----------------------------------------------------------------------------------------


def test_welchs_test_by_hand():
    one, other = moments(1, 2, 3, 4), moments(2, 4, 6)
    # Means 2.5 and 4, variances 5/3 and 4, of 4 and 3: squared errors 5/12 and 4/3.
    found = welch(one, other)
    assert found is not None
    assert found.t == pytest.approx(-1.5 / math.sqrt(5 / 12 + 4 / 3))
    assert found.degrees == pytest.approx(1.75**2 / ((5 / 12) ** 2 / 3 + (4 / 3) ** 2 / 2))


@pytest.mark.parametrize(
    ("t", "degrees"), [(0.0, 4), (0.3, 1), (2.0, 10), (2.5, 3.7), (12.0, 400), (33.09, 30_000)]
)
def test_its_p_is_that_of_students_distribution(t, degrees):
    mpmath = pytest.importorskip("mpmath")
    from proxytune.explain.welch import _log_incomplete_beta

    x = mpmath.mpf(degrees) / (degrees + mpmath.mpf(t) ** 2)
    exact = mpmath.betainc(mpmath.mpf(degrees) / 2, 0.5, 0, x, regularized=True)
    found = _log_incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))
    assert found == pytest.approx(float(mpmath.log(exact)), rel=1e-9, abs=1e-12)


def test_a_p_too_small_for_a_float_keeps_its_logarithm():
    rng = random.Random(0)
    one = moments(*(rng.gauss(1, 1) for _ in range(5000)))
    other = moments(*(rng.gauss(-1, 1) for _ in range(5000)))
    found = welch(one, other)
    assert found is not None and found.p == 0.0 and -2000 < found.log10_p < -400


def test_without_numbers_that_vary_there_is_no_test():
    assert welch(moments(1.0), moments(1.0, 2.0)) is None
    assert welch(moments(1.0, 1.0), moments(2.0, 2.0)) is None


def test_mean_and_variance_of_a_stream_are_those_of_the_list():
    rng = random.Random(1)
    values = [1e6 + rng.random() for _ in range(1000)]
    found = moments(*values)
    mean = sum(values) / 1000
    assert found.mean == pytest.approx(mean, rel=1e-12)
    expected = sum((v - mean) ** 2 for v in values) / 999
    assert found.variance == pytest.approx(expected, rel=1e-6)


# Positions, token types, strengths -------------------------------------------------------------------


def test_change_is_counted_by_position():
    one = told_trace(["a", "b", "c"], changed=[True, True, False])
    other = told_trace(["a", "b"], changed=[True, False])
    (group,) = analyze([one, other]).groups
    assert [tally.share_changed for tally in group.positions] == [1.0, 0.5, 0.0]
    assert group.tally.num_tokens == 5 and group.num_texts == 2
    assert group.tally.share_changed == 3 / 5


def test_far_positions_are_put_together_and_lose_no_token():
    (group,) = analyze([told_trace(["a"] * 500)]).groups
    bins = group.position_bins()
    assert [b.first for b in bins][:11] == list(range(11))
    assert sum(b.num_tokens for b in bins) == 500
    assert all(b.first == a.last + 1 for a, b in pairwise(bins))
    assert bins[-1].last == 499 and len(bins) < 40


def test_token_types_are_those_with_the_highest_mean_change_and_enough_occurrences():
    texts = [
        told_trace([" Here", " are", " some", " of"], base=[0.1] * 4, steered=[0.9, 0.5, 0.2, 0.1]),
        told_trace([" Here", " are", " some", " x"], base=[0.1] * 4, steered=[0.7, 0.5, 0.2, 0.9]),
        told_trace([" Here", " are", " some", " of"], base=[0.1] * 4, steered=[0.8, 0.5, 0.2, 0.1]),
    ]
    # Each text numbers its tokens by appearance: " x" stands for the same id as " of".
    (group,) = analyze(texts, min_count=3).groups
    assert [kind.label for kind in group.types][:3] == [" Here", " are", " of"]
    here = group.types[0]
    assert here.tally.num_tokens == 3
    assert here.tally.mean_prob_change == pytest.approx((0.8 + 0.6 + 0.7) / 3)
    assert (here.context, here.num_context) == (" Here are some of", 3)


def test_rare_types_are_left_out_in_proportion_to_the_tokens():
    few = analyze([told_trace(["a", "a", "b"])]).groups[0]
    assert few.min_count == 2 and [kind.label for kind in few.types] == ["a"]
    many = analyze(told_trace(["a"] * 1000) for _ in range(20)).groups[0]
    assert many.min_count == 10


def test_texts_with_other_strengths_are_another_group():
    texts = [told_trace(["a"], alphas={"first": alpha}) for alpha in (2.0, 0.5, 2.0)]
    groups = analyze(texts).groups
    assert [(group.strength, group.num_texts) for group in groups] == [(0.5, 1), (2.0, 2)]


def test_without_anything_to_analyze_there_is_an_error():
    with pytest.raises(InvalidRequest, match="nothing to analyze"):
        analyze([])
    with pytest.raises(InvalidRequest, match="explain=True"):
        analyze([toy_load(toy_recipe()).generate("ab")])


# Files -----------------------------------------------------------------------------------------------


def test_traces_are_read_one_at_a_time(tmp_path: Path):
    path = tmp_path / "traces.jsonl.gz"
    first = told_trace(["a", "🐈".encode()[:2]])
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(first.to_json() + "\n\n" + "{broken\n")
    traces = read_traces(path)
    assert next(traces) == first
    with pytest.raises(InputFileError, match="line 3"):
        next(traces)


@pytest.mark.parametrize(
    "line", ["[]", "{}", "3", '{"steps": [{"x": 1}]}', "\ufffd", '{"steps": 1}']
)
def test_a_line_that_is_no_trace_is_named(tmp_path: Path, line: str):
    path = tmp_path / "traces.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputFileError, match="line 1"):
        list(read_traces(path))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_texts(tmp_path: Path):
    """40,000 tokens weigh 40 MB as JSON; read at once they would take ten times that."""
    path = tmp_path / "traces.jsonl"
    rng = random.Random(0)
    words = [f" w{i}" for i in range(200)]

    def write(num_texts: int) -> None:
        with path.open("w", encoding="utf-8") as file:
            for _ in range(num_texts):
                trace = told_trace([rng.choice(words) for _ in range(200)])
                file.write(trace.to_json() + "\n")

    def peak_kb() -> int:
        code = (
            "import resource, sys; from pathlib import Path\n"
            "from proxytune.explain.analysis import analyze; from proxytune.trace import read_traces\n"
            "analyze(read_traces(Path(sys.argv[1])))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", code, str(path)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    write(5)
    little = peak_kb()
    write(200)
    assert peak_kb() - little < 20_000


# The command -----------------------------------------------------------------------------------------


def test_the_command_generates_at_several_strengths_and_sums_up(recipe: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n{"prompt": "de"}\n{"prompt": "f"}\n')
    saved = tmp_path / "traces.jsonl"
    result = run(
        "analyze", recipe, "--prompts", prompts, "--expert", "first", "--alpha", "0,0.5,2",
        "--limit", "2",
        "--max-new-tokens", "20", "--trace-file", saved, "--min-count", "2", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    groups = json.loads(result.stdout)["groups"]
    assert [group["alphas"] for group in groups] == [{"first": a} for a in (0.0, 0.5, 2.0)]
    assert [group["num_tokens"] for group in groups] == [40, 40, 40]
    assert groups[0]["share_changed"] == 0.0 < groups[1]["share_changed"]
    assert len(groups[2]["positions"]) == 20
    traces = list(read_traces(saved))
    assert len(traces) == 6 and all(isinstance(trace, Trace) for trace in traces)
    changed = [m.is_changed for t in traces if t.alphas["first"] == 2.0 for m in moves(t)]
    assert groups[2]["num_changed"] == sum(changed)
    again = run("analyze", "--traces", saved, "--min-count", "2", "--json")
    assert json.loads(again.stdout)["groups"] == groups


def test_the_tables_have_words_and_the_picture_is_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    saved = tmp_path / "traces.jsonl"
    tokens = ["So", " 3", " +", " 4", "=", " 7", " $x_", "\n"] * 3
    rng = random.Random(0)
    lines = [
        told_trace(
            tokens,
            base=[rng.random() for _ in tokens],
            steered=[rng.random() for _ in tokens],
            alphas={"first": alpha},
        ).to_json()
        for alpha in (0.5, 1.0)
    ]
    saved.write_text("\n".join(lines), encoding="utf-8")
    picture = tmp_path / "picture.png"
    result = run("analyze", "--traces", saved, "--picture", picture)
    assert result.exit_code == 0, result.output
    for words in ("changed, by position", "token types that moved most", "equations", "Welch"):
        assert words in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = run("analyze", "--traces", saved, "--picture", tmp_path / "picture.txt")
    assert refused.exit_code == 2 and ".png" in refused.stderr
    # A picture that fails does not take the numbers with it.
    assert refused.stdout == result.stdout


def test_a_name_that_matplotlib_would_read_as_mathematics_is_drawn(tmp_path: Path):
    """`$\\frac$` used to end in an error about the picture's file name."""
    saved = tmp_path / "traces.jsonl"
    traces = [
        told_trace(["a"] * 3, base=[0.5] * 3, steered=[0.6] * 3, alphas={r"$\frac$\x1b": alpha})
        for alpha in (0.5, 1.0)
    ]
    saved.write_text("\n".join(trace.to_json() for trace in traces), encoding="utf-8")
    result = run("analyze", "--traces", saved, "--picture", tmp_path / "picture.svg")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "picture.svg").read_bytes().startswith(b"<?xml")
    assert r"$\frac$\x1b at alpha 0.5" in result.stdout


def test_a_full_directory_for_temporary_files_is_named(monkeypatch: pytest.MonkeyPatch):
    trace = told_trace(["a"], base=[0.5], steered=[0.6], alphas={"first": 1.0})
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))  # noqa: SIM115
    with pytest.raises(OutputFileError, match=r"No space left(.|\n)*TMPDIR"):
        analyze([trace])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "nothing to analyze"),
        (["RECIPE"], "--prompts"),
        (["RECIPE", "--traces", "f"], "RECIPE"),
        (["--traces", "f", "--alpha", "1"], "--alpha"),
        (["--traces", "missing.jsonl"], "missing.jsonl"),
        (["--traces", "f", "--min-count", "0"], "--min-count"),
        (["RECIPE", "--prompts", "f", "--limit", "0"], "--limit"),
        (["RECIPE", "--prompts", "f", "--alpha", "x"], "--alpha"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(arguments, word):
    result = run("analyze", *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert word in result.stderr and not result.stdout
