"""The pages that a newcomer follows lead to answers: their commands run as they stand, in order.

`scripts/run_guide.py` runs them. What a page marks is left out: what installs, and what needs the Hub.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import run_guide  # noqa: E402

FIRST_STEPS = ROOT / "docs" / "first-steps.md"
GUIDES = {
    ROOT / "README.md": ("chat", "serve", "curl"),
    ROOT / "docs" / "guides" / "tune-an-expert.md": ("tune", "generate", "chat", "serve"),
    FIRST_STEPS: ("chat", "generate", "tune", "generate", "chat", "doctor"),
}
"""The commands that each page has, in order, among those that are run."""
COMMAND = re.compile(r"^(?:proxytune )?(chat|serve|curl|generate|tune|doctor) ", re.MULTILINE)


def commands_of(step: run_guide.Step) -> list[str]:
    return COMMAND.findall(step.text) if step.language == "bash" else []


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_page_has_the_commands_that_are_run(page):
    found = [name for step in run_guide.steps_of(page) for name in commands_of(step)]
    assert tuple(name for i, name in enumerate(found) if found[i - 1 : i] != [name]) == GUIDES[page]


def test_every_block_of_bash_that_is_not_run_says_why():
    """A mark that is misspelt, or stands elsewhere, would have a block run."""
    for page in GUIDES:
        text = page.read_text(encoding="utf-8")
        marks = re.findall(
            r"^<!-- (not run: .+|installs) -->$\n```(bash|python)$", text, re.MULTILINE
        )
        assert len(marks) == len(re.findall(r"<!-- (?:not run|installs)", text)), page


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_page_leads_to_answers_in_an_empty_directory(page, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed; the extra is proxytune[tune]")
    pytest.importorskip("uvicorn", reason="uvicorn is not installed; the extra is proxytune[serve]")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    ran = run_guide.run(
        run_guide.steps_of(page),
        run_guide.beside_checkout(tmp_path),
        environment=run_guide.own_environment(),
    )
    for each in ran:
        if {"chat", "generate"} & {*commands_of(each.step)} or each.step.language == "python":
            assert len(each.output.split()) > 20, f"{each.step.text}\n{each.output}"
        if "curl" in commands_of(each.step):
            (content,) = re.findall(r'"content": ?"([^"]+)"', each.output)
            assert len(content.split()) > 5, each.output


# How pages are run ------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path):
    def write(*blocks: str) -> Path:
        path = tmp_path / "page.md"
        path.write_text("# Page\n\n" + "\n\n".join(blocks) + "\n", encoding="utf-8")
        return path

    return write


def ran(page: Path, directory: Path, **options: str) -> list[str]:
    (directory / "work").mkdir()
    steps = run_guide.steps_of(page, installs=bool(options))
    environment = run_guide.own_environment()
    return [
        each.output
        for each in run_guide.run(steps, directory / "work", environment=environment, **options)
    ]


def test_blocks_are_run_in_one_shell_in_their_order(page, tmp_path):
    path = page(
        "```bash\nX=1; mkdir inner\ncd inner\n```",
        "```python\nprint(open('made', 'w').write('ab'))\n```",
        "```text\nexit 1\n```",
        "```bash\necho $X; cat made\n```",
    )
    assert ran(path, tmp_path) == ["", "2\n", "1\nab"]


def test_marked_blocks_are_left_out(page, tmp_path):
    path = page(
        "<!-- not run: it needs the Hub -->\n```bash\nfalse\n```",
        "<!-- installs -->\n```bash\nfalse\n```",
        "```bash\necho done\n```",
    )
    assert ran(path, tmp_path) == ["done\n"]


def test_blocks_that_install_are_run_with_the_address_of_the_repository(page, tmp_path):
    path = page("<!-- installs -->\n```bash\necho git clone ADDRESS proxytune\n```")
    assert ran(path, tmp_path, address="file:///x") == ["git clone file:///x proxytune\n"]


def test_a_failing_command_ends_the_run_with_its_line_and_what_it_printed(page, tmp_path):
    path = page(
        "```bash\necho before\nls nothing-here\necho after\n```", "```bash\ntouch later\n```"
    )
    with pytest.raises(run_guide.GuideFailed) as failure:
        ran(path, tmp_path)
    said = str(failure.value)
    assert said.startswith("line 4 ended with exit code") and "nothing-here" in said
    assert "before" in said and not (tmp_path / "work" / "later").exists()


def test_times_are_added_up_by_heading():
    steps = [run_guide.Step(heading, "bash", 1, "") for heading in ("a", "b", "a")]
    times = [
        run_guide.Ran(step, "", seconds) for step, seconds in zip(steps, (1, 62, 3), strict=True)
    ]
    rows = run_guide.table(times).splitlines()[2:]
    assert rows == ["| a | 0 min 4 s |", "| b | 1 min 2 s |", "| all | 1 min 6 s |"]
