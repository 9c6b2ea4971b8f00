"""Options as flags of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from proxytune import cli
from proxytune.commands.flags import Pick, flattened, given_flags
from proxytune.errors import InvalidRequest
from proxytune.measure.score import SCORE_WINDOW
from proxytune.settings import Option, check, option


@dataclass(frozen=True)
class Filters:
    """Settings as a library declares them."""

    strength: float = option(0.5, "How strong", above=0, at_most=1)
    kind: Literal["low", "high"] = option("low", "Which side")
    cuts: tuple[float, ...] = option((1.0, 2.5), "Where to cut", separator=",")
    names: tuple[str, ...] = option((), "A name", flag="--name", none_means="all")
    file: Path | None = option(None, "Where to write")
    is_exact: bool = option(False, "Be exact", flag="--exact/--rough")

    def __post_init__(self) -> None:
        check(self)


def run(*arguments: str, pick: Pick | None = None) -> tuple[str, Filters | None]:
    """Run a command that takes `Filters`; return what it printed, and what arrived."""
    arrived: list[Filters] = []

    def command(filters: Annotated[Filters, pick or Pick()]) -> None:
        arrived.append(filters)

    command.__annotations__["filters"] = Annotated[Filters, pick or Pick()]
    app = typer.Typer(rich_markup_mode=None)
    app.command()(flattened(command))
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, InvalidRequest):
        raise result.exception
    return result.output, arrived[0] if arrived else None


def test_settings_arrive_from_flags_with_their_types_and_defaults():
    assert run()[1] == Filters()
    given = (
        "--strength",
        "1",
        "--kind",
        "high",
        "--cuts",
        "0,3",
        "--name",
        "a",
        "--name",
        "b",
        "--exact",
    )
    assert run(*given, "--file", "x")[1] == Filters(
        1.0, "high", (0.0, 3.0), ("a", "b"), Path("x"), True
    )


def test_help_gives_names_defaults_and_what_none_means():
    help_text = " ".join(run("--help")[0].split())
    for words in (
        "--strength FLOAT How strong [default: 0.5]", "--kind [low|high] Which side [default: low]",
        "--cuts TEXT Where to cut [default: 1,2.5]", "--name TEXT A name; repeat for more [default: all]",
        "--file FILE Where to write", "--exact / --rough Be exact [default: rough]",
    ):  # fmt: skip
        assert words in help_text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strength", "0"), "strength is 0.0, and must be a finite number above 0 and at most 1"),
        (("--kind", "middle"), "kind is 'middle', and must be low or high"),
        (("--cuts", "1,x"), "--cuts is 'x', and must be a number"),
    ],
)
def test_a_value_beyond_its_declaration_is_refused(arguments, message):
    with pytest.raises(InvalidRequest, match=message):
        run(*arguments)


def test_a_command_may_leave_out_options_and_have_defaults_of_its_own():
    pick = Pick(leave_out=("file",), defaults={"strength": 0.25}, help={"kind": "The side"})
    output, _ = run("--help", pick=pick)
    assert "--file" not in output and "0.25" in output and "The side" in output
    assert run(pick=pick)[1] == Filters(0.25)
    with pytest.raises(AssertionError, match="has no speed"):
        Pick(only=("speed",)).of(Filters)


def test_what_was_given_is_what_differs_from_the_defaults():
    filters = Filters(strength=0.75, cuts=(1.0, 2.5), file=Path("x"), is_exact=True)
    given = given_flags(RECIPE=None, PROMPT="hi", filters=filters)
    assert given == {"PROMPT", "--strength", "--file", "--exact"}


def test_an_option_is_declared_with_known_words_only():
    with pytest.raises(TypeError, match="at_leats"):
        option(1, "How many", at_leats=1)
    assert Option("How many", at_least=1).at_least == 1


@pytest.mark.parametrize("command", ["score", "sweep", "rank-experts"])
def test_help_says_the_window_that_is_used(command):
    assert f"[default: {SCORE_WINDOW}," in " ".join(
        CliRunner().invoke(cli.app, [command, "--help"]).stdout.split()
    )
