"""Check the script of the pages: the playground and the steering report.

    python scripts/check_pages.py

Every file must parse. The files of one page share a scope: together they may declare no name twice, they may
use only names that they declare or that the browser has, and an element that they ask for by its id must be
in the page. The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tree_sitter_javascript
from tree_sitter import Language, Node, Parser

from proxytune.pages.policy import SCRIPTS, STYLES, assemble

FOLDER = Path(__file__).parents[1] / "src" / "proxytune" / "pages"
PARSER = Parser(Language(tree_sitter_javascript.language()))
BROWSER = """
AbortController Array Boolean Date Error Infinity JSON Map Math Number Object Option Promise Set String
ResizeObserver SyntaxError TextDecoder clearTimeout document fetch getComputedStyle getSelection innerHeight
matchMedia navigator performance requestAnimationFrame setTimeout undefined
"""
"""Names of the language and of the browser that the pages use. A new one goes here once it is meant."""
PATTERNS = {
    "variable_declarator": ("name",),
    "function_declaration": ("name",),
    "generator_function_declaration": ("name",),
    "class_declaration": ("name",),
    "formal_parameters": None,
    "arrow_function": ("parameter",),
    "catch_clause": ("parameter",),
    "for_in_statement": ("left",),
}
"""What declares names, and in which fields; None for in all children."""


def nodes(node: Node) -> Iterator[Node]:
    """Yield a node and all below it."""
    yield node
    for child in node.children:
        yield from nodes(child)


def bound(pattern: Node) -> Iterator[Node]:
    """Yield the names that a pattern binds; what it takes by default binds none."""
    if pattern.type in {"identifier", "shorthand_property_identifier_pattern"}:
        yield pattern
    elif pattern.type in {"assignment_pattern", "object_assignment_pattern"}:
        left = pattern.child_by_field_name("left")
        if left is not None:
            yield from bound(left)
    else:
        for child in pattern.named_children:
            yield from bound(child)


def declared(node: Node) -> Iterator[Node]:
    """Yield the names that a node declares itself."""
    if node.type not in PATTERNS:
        return
    fields = PATTERNS[node.type]
    if fields is None:
        yield from (name for child in node.named_children for name in bound(child))
    for field in fields or ():
        child = node.child_by_field_name(field)
        # `for (x of y)` without const or let declares nothing.
        if child is not None and (
            node.type != "for_in_statement" or node.child_by_field_name("kind")
        ):
            yield from bound(child)


def word(node: Node) -> str:
    """Return the text of a node."""
    assert node.text is not None
    return node.text.decode()


def syntax_faults(name: str, root: Node) -> Iterator[str]:
    """Yield where a file is no JavaScript."""
    for node in nodes(root):
        if node.is_error or node.is_missing:
            what = f"{node.type} is missing" if node.is_missing else "this does not parse"
            yield f"{name}:{node.start_point.row + 1}: {what}: {word(node)[:60]!r}"


def scope_faults(files: dict[str, Node], ids: set[str]) -> Iterator[str]:
    """Yield names of one page that are declared twice or not at all, and elements that it lacks."""
    known = set(BROWSER.split())
    first: dict[str, str] = {}
    for name, root in files.items():
        known |= {word(found) for node in nodes(root) for found in declared(node)}
        for statement in root.named_children:
            for node in (statement, *statement.named_children):
                if node.type == "variable_declarator" or node is statement:
                    for found in declared(node):
                        place = f"{name}:{found.start_point.row + 1}"
                        if word(found) in first:
                            yield f"{place}: {word(found)} is declared already, in {first[word(found)]}"
                        first.setdefault(word(found), place)
    for name, root in files.items():
        for node in nodes(root):
            place = f"{name}:{node.start_point.row + 1}"
            if node.type in {"identifier", "shorthand_property_identifier"}:
                if word(node) not in known:
                    yield f"{place}: {word(node)} is declared nowhere"
            elif node.type == "call_expression":
                found = re.fullmatch(r'\$\("([^"]*)"\)', word(node))
                if found and found[1] not in ids:
                    yield f"{place}: the page has no element {found[1]!r}"


def page_faults(scripts: dict[str, str], html: str) -> list[str]:
    """Return what is wrong with one page: its files of script by name, in order, and its HTML."""
    roots = {name: PARSER.parse(text.encode()).root_node for name, text in scripts.items()}
    faults = [fault for name, root in roots.items() for fault in syntax_faults(name, root)]
    ids = set(re.findall(r'\bid="([^"]+)"', html))
    return faults or list(scope_faults(roots, ids))


def end_faults(name: str, text: str) -> Iterator[str]:
    """Yield where a file would end the element that it is put into."""
    for number, line in enumerate(text.split("\n"), 1):
        if re.search(r"</(?:script|style)|<!--", line, re.IGNORECASE):
            yield f"{name}:{number}: this ends the page's element, or begins a comment: {line.strip()!r}"


def main() -> int:
    """Check both pages; returns the exit code."""
    faults: set[str] = set()
    for page, names in SCRIPTS.items():
        scripts = {name: (FOLDER / name).read_text("utf-8") for name in names}
        styles = {name: (FOLDER / name).read_text("utf-8") for name in STYLES[page]}
        faults |= set(page_faults(scripts, assemble(page)))
        faults |= {f for item in (scripts | styles).items() for f in end_faults(*item)}
    for fault in sorted(faults):
        print(f"src/proxytune/pages/{fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
