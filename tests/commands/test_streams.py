"""Text on its way out: escapes on a terminal, exact elsewhere; streams that fail."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from proxytune.commands.layout import PlainConsole
from proxytune.commands.serve import _OneLine
from proxytune.commands.streams import escaped
from proxytune.testing import toy_recipe
from tests.support.processes import in_pipes, on_terminal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="terminals and signals of Unix")

COMMANDS = Path(__file__).parents[2] / "src" / "proxytune" / "commands"
HOSTILE = (
    "a\x1b]0;owned\x07b\x9b31mc\rd\x7fe\u202ef\u2066g\u2028h[red]:smile:\tj\n\\x1b é 😀 \u200d"
)
SHOWN = (
    r"a\x1b]0;owned\x07b\u009b31mc\x0dd\u007fe\u202ef\u2066g\u2028h[red]:smile:"
    "\tj\n\\x1b é 😀 \u200d"
)


def writer(directory: Path) -> tuple[str, Path]:
    """Return code that puts a writer of `PIECES` in the place of a model, without torch, and a recipe."""
    toy_recipe().write(directory / "r")
    code = (
        "from types import SimpleNamespace as New\n"
        "from proxytune.commands.options import ModelOptions\n"
        "from proxytune.trace import Step, Trace\n"
        f"PIECES = {[*HOSTILE]!r}\n"
        "def steps(text=None):\n"
        "    yield from (Step(index, 1, piece, 0.0) for index, piece in enumerate(PIECES))\n"
        "def generate_batch(requests, *, on_event=None, speculative):\n"
        "    for step in steps() if on_event else ():\n"
        "        on_event(0, New(step=step, tail=''))\n"
        "    return [Trace(''.join(PIECES), 'stop', (), 1)]\n"
        "talk = New(messages=[], alpha=None, experts=None, joins_messages=False, say=steps)\n"
        "chat = lambda *_, **__: talk\n"
        "ModelOptions.load = lambda *_: New(generate_batch=generate_batch, chat=chat)\n"
    )
    return code, directory / "r"


# What is escaped ------------------------------------------------------------------------------------


def test_a_text_keeps_everything_but_control_characters():
    assert escaped(HOSTILE) == SHOWN
    plain = "Ünï 日本 \u0645\u06cc\u200c\u062e\u0648 \u200f 👩\u200d💻 \u00ad \ufeff\n\t"
    assert escaped(plain) == plain


def test_every_character_that_a_terminal_could_obey_is_escaped():
    controls = [chr(code) for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"]
    turning = [
        chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029)
    ]
    for character in (*controls, *turning):
        code = ord(character)
        assert escaped(character) == (f"\\x{code:02x}" if code < 32 else f"\\u{code:04x}")


def test_an_escaped_text_is_not_escaped_again():
    assert escaped(escaped(HOSTILE)) == escaped(HOSTILE)


def test_a_json_line_stays_json_with_its_controls_escaped():
    line = json.dumps({"text": HOSTILE}, ensure_ascii=False)
    assert json.loads(escaped(line)) == {"text": HOSTILE}


# Where it is escaped --------------------------------------------------------------------------------


def test_a_streamed_answer_is_escaped_on_a_terminal_though_its_sequences_are_split(tmp_path: Path):
    """Each piece has one character: `\\x1b` is shown before it is known what follows."""
    code, recipe = writer(tmp_path)
    status, sent = on_terminal(code, "generate", recipe, "ab")
    assert status == 0
    assert SHOWN + "\n" in sent
    assert "\x1b]" not in sent and "\x07" not in sent and "\x9b" not in sent


def test_an_answer_at_once_and_one_in_json_are_escaped_on_a_terminal(tmp_path: Path):
    code, recipe = writer(tmp_path)
    status, sent = on_terminal(code, "generate", recipe, "ab", "--no-stream")
    assert status == 0 and SHOWN + "\n" in sent
    status, sent = on_terminal(code, "generate", recipe, "ab", "--json")
    (line,) = re.findall(r"\{.*\}", sent)
    assert json.loads(line)["text"] == HOSTILE
    assert "\x9b" not in line and "\x7f" not in line and "\u202e" not in line


@pytest.mark.parametrize("options", [(), ("--stream",)])
def test_a_pipe_gets_an_answer_exactly(tmp_path: Path, options: tuple[str, ...]):
    """typer's `echo` used to leave out what looked like a colour."""
    code, recipe = writer(tmp_path)
    code = code.replace("PIECES = [", "PIECES = ['\\x1b[31m', ")
    status, stdout, _ = in_pipes(code, "generate", recipe, "ab", *options)
    assert (status, stdout) == (0, f"\x1b[31m{HOSTILE}\n")


def test_a_chat_on_a_terminal_shows_escapes(tmp_path: Path):
    code, recipe = writer(tmp_path)
    status, sent = on_terminal(code, "chat", recipe, keys="hi\n/quit\n")
    assert status == 0
    assert SHOWN + "\n" in sent and "\x1b]" not in sent and "\x07" not in sent


@pytest.fixture
def hostile_recipe(tmp_path: Path) -> Path:
    """Return a recipe with control characters and markup in the names of its directory and its models."""
    model = {"model": "./[red]y[/red]\u202e"}
    content = {
        "model_type": "proxytune",
        "base": model,
        "experts": [{"name": "a", "expert": model, "anti_expert": {"model": "./z"}}],
    }
    directory = tmp_path / "x\x1b]0;owned\x07\x9b31m\r"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(content))
    return directory


NAMES_SHOWN = (r"x\x1b]0;owned\x07\u009b31m\x0d", r"./[red]y[/red]\u202e")
COLOUR = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[[12]?[AK]|\r")
"""What rich itself sends: colours, and the cursor's way while something runs."""


def test_doctor_shows_names_as_text_on_a_terminal_and_in_a_file(hostile_recipe: Path):
    status, sent = on_terminal("", "doctor", hostile_recipe)
    assert status == 2 and all(name in "".join(sent.split()) for name in NAMES_SHOWN)
    assert "\x1b" not in COLOUR.sub("", sent) and not set("\x07\x9b\u202e") & set(sent)
    status, stdout, stderr = in_pipes("", "doctor", hostile_recipe)
    assert status == 2 and all(name in "".join(stdout.split()) for name in NAMES_SHOWN)
    assert escaped(stdout) == stdout and escaped(stderr) == stderr


def test_an_error_is_escaped_in_a_file_too(tmp_path: Path):
    status, stdout, stderr = in_pipes("", "generate", tmp_path / "no\x1b]0;owned\x07\r\u2028", "ab")
    assert (status, stdout) == (2, "")
    assert r"no\x1b]0;owned\x07\x0d\u2028" in stderr and escaped(stderr) == stderr


def test_warnings_log_lines_and_tracebacks_of_anybody_are_escaped():
    code = (
        "import logging, warnings\n"
        "import proxytune.commands.doctor as doctor\n"
        "def fail(*_):\n"
        "    print('print \\x1b[5m')\n"
        "    warnings.warn('warning \\x1b[5m')\n"
        "    logging.getLogger('library').warning('log \\x1b[5m')\n"
        "    raise ZeroDivisionError('traceback \\x1b[5m')\n"
        "import proxytune.recipe.recipe as module\n"
        "module.Recipe.read = staticmethod(fail)\n"
    )
    status, stdout, stderr = in_pipes(code, "doctor", "x")
    assert (status, stdout) == (1, "print \x1b[5m\n")
    for word in ("warning", "log", "traceback"):
        assert rf"{word} \x1b[5m" in stderr
    assert "\x1b" not in stderr
    status, sent = on_terminal(code, "doctor", "x")
    assert status == 1 and r"print \x1b[5m" in sent and "\x1b[5m" not in sent


def test_what_is_printed_above_a_progress_bar_is_escaped_too():
    """rich takes the streams over meanwhile, and would obey the sequences in what is printed."""
    code = (
        "import sys, proxytune.cli\n"
        "from proxytune.commands.console import print_text, say\n"
        "from proxytune.commands.progress import ProgressBars, waiting\n"
        "def app():\n"
        "    with ProgressBars() as bars:\n"
        "        bars.show('stage \\x1b[5m\\x07[red]', 1, 2, 'note \\x1b[6m')\n"
        "        say('said \\x1b[5m \\x1b]8;;http://x\\x07link')\n"
        "        print('printed \\x1b[5m')\n"
        "    with waiting('loading \\x1b[5m[red]'):\n"
        "        say('said later \\x1b[5m')\n"
        "    print_text('after \\x1b[5m')\n"
        "proxytune.cli.app = app\n"
    )
    status, sent = on_terminal(code)
    sent = COLOUR.sub("", sent)
    assert status == 0 and "\x1b" not in sent and "\x07" not in sent
    for shown in (
        r"stage \x1b[5m\x07[red]", r"note \x1b[6m", r"said \x1b[5m \x1b]8;;http://x\x07link",
        r"printed \x1b[5m", r"loading \x1b[5m[red]", r"said later \x1b[5m", r"after \x1b[5m",
    ):  # fmt: skip
        assert shown in sent


def test_an_answer_on_its_way_to_a_file_does_not_go_to_a_progress_bar(tmp_path: Path):
    code = (
        "import proxytune.cli\n"
        "from proxytune.commands.console import print_text\n"
        "from proxytune.commands import progress\n"
        "def app():\n"
        "    with progress.ProgressBars() as bars:\n"
        "        print_text('an answer')\n"
        "proxytune.cli.app = app\n"
        f"import sys; sys.stdout = open({str(tmp_path / 'out')!r}, 'w')\n"
    )
    status, sent = on_terminal(code)
    assert status == 0 and "an answer" not in sent
    assert (tmp_path / "out").read_text() == "an answer\n"


def test_a_table_takes_cells_as_text(capsys: pytest.CaptureFixture[str]):
    from proxytune.commands.console import plain_table, stdout, styled

    table = plain_table("[b]word[/b]", numbers=("n",), title="[i]title[/i]\x1b[5m")
    table.add_row("[red]x[/red] :smile: \x1b[5m\a\r", styled("\a[red]", "bold"))
    stdout().print(table)
    shown = capsys.readouterr().out
    for text in (
        r"[b]word[/b]",
        r"[i]title[/i]\x1b[5m",
        r"[red]x[/red] :smile: \x1b[5m\x07\x0d",
        r"\x07[red]",
    ):
        assert text in shown
    assert escaped(shown) == shown


def test_a_text_that_no_string_was_is_escaped_when_it_is_drawn(tmp_path: Path):
    from rich.text import Text

    with (tmp_path / "out").open("w", encoding="utf-8") as file:
        PlainConsole(file=file).print(Text("a\x1b[5m\x9bb"))
    assert (tmp_path / "out").read_text("utf-8") == "a\\x1b[5m\\u009bb\n"


def test_a_log_record_is_one_line_whatever_a_client_or_a_server_sent():
    record = logging.LogRecord("x", logging.INFO, "f", 1, "failed: %s", ("a\nb 200 OK",), None)
    assert _OneLine("%(levelname)s %(message)s").format(record) == r"INFO failed: a\nb 200 OK"
    try:
        raise ValueError("reason\nINFO a record")
    except ValueError:
        record.exc_info = sys.exc_info()
    lines = _OneLine("%(message)s").format(record).splitlines()[1:]
    assert lines[-2:] == ["    ValueError: reason", "    INFO a record"]
    assert all(line.startswith("    ") for line in lines)


def test_commands_print_with_the_functions_of_the_console_alone():
    """`typer.echo` leaves out parts of an answer in a pipe, and rich's `Text` drops control characters."""
    for path in COMMANDS.glob("*.py"):
        if path.stem in ("console", "layout"):
            continue
        functions = (
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)
        )
        for node in (node for function in functions for node in ast.walk(function)):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("rich.text", "rich.console") or "Text" not in ast.dump(
                    node
                )
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in (
                    "print",
                    "typer.echo",
                    "typer.secho",
                    "Console",
                )


# Streams that fail ----------------------------------------------------------------------------------

full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


@full
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["doctor", "RECIPE"]])
def test_a_full_disk_under_stdout_ends_with_2_and_a_message(hostile_recipe: Path, arguments):
    with open("/dev/full", "wb") as stdout:
        given = [str(hostile_recipe) if word == "RECIPE" else word for word in arguments]
        status, _, stderr = in_pipes("", *given, stdout=stdout)
    assert status == 2
    assert stderr.endswith(
        "error: stdout cannot be written: No space left on device.\n"
        "hint: make room where stdout goes, or send it to another file\n"
    )
    assert "Traceback" not in stderr and "ignored" not in stderr


@full
@pytest.mark.parametrize("options", [(), ("--stream",), ("--json",)])
def test_a_full_disk_under_an_answer_ends_with_2_and_a_message(tmp_path: Path, options):
    code, recipe = writer(tmp_path)
    with open("/dev/full", "wb") as stdout:
        status, _, stderr = in_pipes(code, "generate", recipe, "ab", *options, stdout=stdout)
    assert status == 2 and "error: stdout cannot be written: No space left" in stderr
    assert "Traceback" not in stderr and "ignored" not in stderr


@full
def test_a_full_disk_under_a_chat_ends_it(tmp_path: Path):
    code, recipe = writer(tmp_path)
    (tmp_path / "lines").write_text("hi\nand\n")
    with open("/dev/full", "wb") as stdout, (tmp_path / "lines").open() as stdin:
        status, _, stderr = in_pipes(code, "chat", recipe, stdout=stdout, stdin=stdin)
    assert status == 2 and stderr.count("stdout cannot be written: No space left") == 1
    assert "/reset" not in stderr


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "RECIPE"]])
def test_a_reader_that_is_gone_ends_a_command_without_a_word(hostile_recipe: Path, arguments):
    """As under `| head -1`; 141 is what a shell reports for a program that SIGPIPE ended."""
    given = [str(hostile_recipe) if word == "RECIPE" else word for word in arguments]
    reader, stdout = os.pipe()
    os.close(reader)
    status, _, stderr = in_pipes("", *given, stdout=stdout)
    os.close(stdout)
    assert status == 141
    assert "Traceback" not in stderr and "ignored" not in stderr and "error" not in stderr


def test_a_reader_that_is_gone_ends_a_streamed_answer_without_a_word(tmp_path: Path):
    code, recipe = writer(tmp_path)
    reader, stdout = os.pipe()
    os.close(reader)
    status, _, stderr = in_pipes(code, "generate", recipe, "ab", "--stream", stdout=stdout)
    os.close(stdout)
    assert (status, stderr.count("\n")) == (141, stderr.count("elapsed\n"))


@full
def test_the_work_goes_on_without_messages_that_cannot_be_written(tmp_path: Path):
    code, recipe = writer(tmp_path)
    with open("/dev/full", "wb") as stderr:
        status, stdout, _ = in_pipes(code, "generate", recipe, "ab", stderr=stderr)
    assert (status, stdout) == (0, HOSTILE + "\n")


def test_a_command_runs_with_its_streams_closed():
    """`>&- 2>&-` used to end in a traceback that nobody could read."""
    line = f"{sys.executable} -c 'from proxytune.cli import main; main()' --version >&- 2>&-"
    src = str(COMMANDS.parents[1])
    done = subprocess.run(line, shell=True, env={**os.environ, "PYTHONPATH": src}, check=False)
    assert done.returncode == 0
