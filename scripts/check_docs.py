"""Check that the documentation is current.

    python scripts/check_docs.py            say what is stale; the exit code is 1 if anything is
    python scripts/check_docs.py --write    write again what is made from the code, then check

Made from the code are docs/reference/cli.md, docs/reference/recipe.schema.json, docs/reference/models.md
(from what the tests of architectures found), and on any page what stands
between `<!-- from WHAT -->` and `<!-- end -->`: `src/proxytune/logits/steer.py: combine, offset` is the
code of two functions without their docstrings, `recipe: ModelSpec` a table of a recipe's keys,
`options: proxytune.request.SamplingParams` a table of the options that a dataclass declares.

Checked on every page: Python blocks parse, and what they import from proxytune is there; JSON blocks parse,
and recipes among them are valid; commands in shell blocks and code spans exist, with their options and make
targets; files named in code spans exist; links inside the repository lead somewhere, headings included.
"""

from __future__ import annotations

import argparse
import ast
import doctest
import importlib
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import typer.main
from models_page import PAGE as MODELS_PAGE
from models_page import models_page
from recipe_schema import key_table, recipe_schema

from proxytune.cli import app
from proxytune.errors import RecipeError
from proxytune.recipe.recipe import Recipe
from proxytune.settings import options_of

ROOT = Path(__file__).parents[1]
CLI_PAGE = ROOT / "docs" / "reference" / "cli.md"
SCHEMA = ROOT / "docs" / "reference" / "recipe.schema.json"
CLI_PAGE_HEAD = """\
# Command line

<!-- Written by `make format` from the commands' own help; edit src/proxytune/commands/ instead. -->
"""
SHELL = {"bash", "sh", "shell", "console"}
FOLDERS = ("src/", "tests/", "docs/", "examples/", "docker/", "scripts/", "benchmarks/", "zoo/")
COMMAND = typer.main.get_command(app)


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language, first line's number, and text."""

    language: str
    line: int
    text: str


def pages() -> list[Path]:
    """Return every page of documentation, model cards included."""
    found = set(ROOT.glob("*.md"))
    for folder in FOLDERS:
        found |= set((ROOT / folder).rglob("*.md"))
    build = {ROOT / "zoo" / "build", ROOT / "benchmarks" / "build"}
    return sorted(path for path in found if not build & set(path.parents))


def split(text: str) -> tuple[str, list[Block]]:
    """Return a page's prose, its code blocks blanked out line by line, and the blocks."""
    prose: list[str] = []
    blocks: list[Block] = []
    fence = language = ""
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*(`{3,}|~{3,})\s*([\w+-]*)", line)
        if not fence and mark:
            fence, language, lines = mark[1], mark[2].lower(), []
        elif fence and line.strip() == fence:
            blocks.append(Block(language, number - len(lines), textwrap.dedent("\n".join(lines))))
            fence = ""
        elif fence:
            lines.append(line)
        else:
            prose.append(line)
            continue
        prose.append("")
    return "\n".join(prose), blocks


# Code -------------------------------------------------------------------------------------------------------


def python_faults(code: str) -> Iterator[str]:
    """Yield what is wrong with a Python block."""
    if code.lstrip().startswith(">>>"):
        code = "".join(example.source for example in doctest.DocTestParser().get_examples(code))
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        yield f"Python does not parse: {error}"
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "proxytune":
            continue
        try:
            module = importlib.import_module(node.module or "")
        except ImportError as error:
            yield f"cannot import {node.module}: {error}"
            continue
        for alias in node.names:
            if not hasattr(module, alias.name):
                yield f"{node.module} has no {alias.name}"


def json_faults(text: str) -> Iterator[str]:
    """Yield what is wrong with a block of JSON or JSON lines."""
    try:
        values = [json.loads(text)]
    except ValueError as error:
        try:
            values = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            yield f"JSON does not parse: {error}"
            return
    for value in values:
        if isinstance(value, dict) and value.get("model_type") == "proxytune":
            try:
                Recipe.from_dict(value)
            except RecipeError as error:
                yield f"not a valid recipe: {error}"


def commands(block: Block) -> Iterator[str]:
    """Yield a shell block's command lines; in a `console` block those after a `$`."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            yield line[2:]
        elif block.language != "console":
            yield line


def command_faults(line: str) -> Iterator[str]:
    """Yield what is wrong with a command line of this project's; others pass."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # an example of something else, such as a heredoc
        return
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    ends = [
        i for i, word in enumerate(words) if word in {"|", "&&", "||", ";", ">", ">>", "<", "&"}
    ]
    if ends:
        yield from command_faults(shlex.join(words[ends[0] + 1 :]))
        words = words[: ends[0]]
    if not words:
        return
    if words[0] == "make":
        targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        yield from (
            f"the Makefile has no target {word!r}"
            for word in words[1:]
            if word not in targets and "=" not in word and not word.startswith("-")
        )
    elif (
        words[0].split("/")[-1].startswith("python") and words[1:2] and words[1].startswith(FOLDERS)
    ):
        if not (ROOT / words[1]).is_file():
            yield f"there is no {words[1]}"
    elif words[0].split("/")[-1] == "proxytune":
        yield from option_faults(words[1:])


def option_faults(words: list[str]) -> Iterator[str]:
    """Yield which subcommand or options of a `proxytune` command line do not exist.

    What follows -- belongs to another program.
    """
    words = words[: words.index("--")] if "--" in words else words
    command: Any = COMMAND
    known_commands = getattr(COMMAND, "commands", {})
    if words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
        if words[0] not in known_commands:
            yield f"proxytune has no command {words[0]!r}"
            return
        command = known_commands[words[0]]
    known = {"--help"} | {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for word in words:
        option = word.strip("[]").split("=")[0]
        # "--stream/--no-stream" names both sides of a switch.
        for side in option.split("/--"):
            side = side if side.startswith("-") else f"--{side}"
            if (
                re.fullmatch(r"--?[a-z][a-z-]*", side)
                and option.startswith("-")
                and side not in known
            ):
                yield f"proxytune {command.name} has no option {side}"


# Prose ------------------------------------------------------------------------------------------------------


def span_faults(span: str) -> Iterator[str]:
    """Yield what is wrong with a code span that names a command or a file."""
    if re.match(r"(proxytune|make) ", span):
        yield from command_faults(span)
    elif (
        span.startswith(FOLDERS)
        and not re.search(r"[\s*<{]|::", span)
        and not (ROOT / span).exists()
    ):
        yield f"there is no {span}"


def anchors(page: Path) -> set[str]:
    """Return the link targets of a page's headings, as GitHub makes them."""
    prose, _ = split(page.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", prose, flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = 1
        while (numbered := slug if number == 1 else f"{slug}-{number - 1}") in found:
            number += 1
        found.add(numbered)
    return found


def link_faults(page: Path, prose: str) -> Iterator[str]:
    """Yield the links of a page that lead nowhere inside the repository."""
    without_code = re.sub(r"`[^`\n]*`", "``", prose)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", without_code)
    targets += re.findall(r"^\s*\[[^\]]+\]:\s+(\S+)", without_code, flags=re.MULTILINE)
    targets += re.findall(r"(?:src|href)=\"([^\"]+)\"", without_code)
    for target in targets:
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue
        path_text, _, anchor = target.partition("#")
        path = (page.parent / path_text).resolve() if path_text else page
        if not path.exists():
            yield f"the link {target} leads to no file"
        elif anchor and path.suffix == ".md" and anchor not in anchors(path):
            yield f"the link {target} leads to no heading of {path.name}"


# The command line's page ------------------------------------------------------------------------------------


def help_text(command: Any, name: str, parent: Any = None) -> tuple[str, Any]:
    """Return a command's help in plain text, 100 columns wide, and the context it was made in."""
    command.rich_markup_mode = None
    context = typer.Context(
        command, info_name=name, parent=parent, terminal_width=100, max_content_width=100
    )
    lines = command.get_help(context).strip().splitlines()
    return "\n".join(line.rstrip() for line in lines), context


def cli_page() -> str:
    """Return docs/reference/cli.md as the commands are now."""
    text, context = help_text(COMMAND, "proxytune")
    parts = [CLI_PAGE_HEAD, f"```text\n{text}\n```\n"]
    for name, command in getattr(COMMAND, "commands", {}).items():
        text, _ = help_text(command, name, context)
        parts.append(f"## proxytune {name}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


# Parts of pages ---------------------------------------------------------------------------------------------


def function_code(path: Path, names: Sequence[str]) -> str:
    """Return the code of a file's functions and methods, without their docstrings."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = {
        node.name: node
        for node in ast.walk(ast.parse("\n".join(lines)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    parts = []
    for name in names:
        if name not in found:
            return f"there is no {name} in {path.relative_to(ROOT)}"
        node = found[name]
        code = lines[node.lineno - 1 : node.end_lineno]
        if ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            del code[first - node.lineno : last - node.lineno + 1]
        parts.append(textwrap.dedent("\n".join(code)))
    return "\n\n\n".join(parts)


def option_table(path: str) -> str:
    """Return the options of a dataclass, `package.module.Class`, as a Markdown table."""
    module, _, name = path.rpartition(".")
    lines = ["| option | values | if left out | meaning |", "| --- | --- | --- | --- |"]
    for option in options_of(getattr(importlib.import_module(module), name)).values():
        default = "required" if option.default is MISSING else f"`{option.default!r}`"
        if option.option.none_means is not None:
            default += f": {option.option.none_means}"
        meaning = option.option.help.replace("|", "\\|")
        lines.append(f"| `{option.name}` | {option.values} | {default} | {meaning} |")
    return "\n".join(lines)


def made_part(what: str) -> str:
    """Return what is made from the code for a page: a table of keys, or a block of code."""
    place, _, names = what.partition(": ")
    if place == "recipe":
        return key_table(names)
    if place == "options":
        return option_table(names)
    code = function_code(ROOT / place, names.split(", "))
    return f"```python\n{code}\n```"


def with_made_parts(text: str) -> str:
    """Return a page with its parts that are made from the code as they are now."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{made_part(match[2])}\n\n{match[3]}"

    return re.sub(
        r"^(<!-- from (.+?) -->)$.*?^(<!-- end -->)$", made, text, flags=re.MULTILINE | re.DOTALL
    )


def schema_text() -> str:
    """Return docs/reference/recipe.schema.json as recipe.py is now."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def made_files() -> dict[Path, str]:
    """Return each file that is made from the code, whole or in part, as it should be now."""
    made = {CLI_PAGE: cli_page(), SCHEMA: schema_text(), MODELS_PAGE: models_page()}
    for page in pages():
        if page not in made and "\n<!-- from " in (text := page.read_text(encoding="utf-8")):
            made[page] = with_made_parts(text)
    return made


# All --------------------------------------------------------------------------------------------------------


def page_faults(page: Path) -> Iterator[str]:
    """Yield everything stale on a page, each with its place where there is one."""
    prose, blocks = split(page.read_text(encoding="utf-8"))
    yield from link_faults(page, prose)
    for number, line in enumerate(prose.splitlines(), 1):
        if re.match(r"(<{7}|>{7}) ", line):
            yield f"line {number}: a merge was left unfinished"
    # A changelog tells of what was there at its time.
    if page.name != "CHANGELOG.md":
        for number, line in enumerate(prose.splitlines(), 1):
            for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", line):
                yield from (f"line {number}: {fault}" for fault in span_faults(span))
    for block in blocks:
        faults: list[str] = []
        if block.language in {"python", "py", "pycon"}:
            faults = list(python_faults(block.text))
        elif block.language in {"json", "jsonl"}:
            faults = list(json_faults(block.text))
        elif block.language in SHELL:
            faults = [fault for line in commands(block) for fault in command_faults(line)]
        yield from (f"line {block.line}: {fault}" for fault in faults)


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Check that the documentation is current.")
    parser.add_argument(
        "--write", action="store_true", help="write what is made from the code first"
    )
    arguments = parser.parse_args()
    made = made_files()
    if arguments.write:
        for path, text in made.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    faults = [
        f"{page.relative_to(ROOT)}: {fault}" for page in pages() for fault in page_faults(page)
    ]
    faults += [
        f"{path.relative_to(ROOT)} is not what the code says now; run: make format"
        for path, text in made.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for fault in faults:
        print(fault)
    print(f"{len(pages())} pages, {len(faults)} faults", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
