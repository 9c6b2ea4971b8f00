"""Add to the site what is not in docs/: pages from elsewhere in the repository, and the files they link to.

MkDocs calls these functions (`hooks` in mkdocs.yml). Pages are written for the repository: their links are
relative to their own place, so that they work in an editor and on a forge. On the site, a link to another
page leads to that page, and a link to any other file leads to a page that shows the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "THIRD_PARTY.md": "third-party.md",
    "examples/README.md": "examples.md",
    "src/proxytune/smol/README.md": "smol.md",
    "zoo/README.md": "zoo.md",
}
"""Pages from elsewhere in the repository, and their place on the site."""

LANGUAGES = {
    ".py": "python",
    ".sh": "bash",
    ".json": "json",
    ".toml": "toml",
    ".yaml": "yaml",
    ".yml": "yaml",
}

_LINK = re.compile(r"(\]\(\s*<?|(?:src|href)=\")([^)\s>\"]+)")
_FENCE = re.compile(r"^\s*(`{3,}|~{3,})", re.MULTILINE)
# Material's code blocks begin with an empty span before their <code>.
_CODE_SPAN = re.compile(r"(?<!<span></span>)<code>([^<]+)</code>")
_WORD = re.compile(r"\S*-\S*")
LONGEST_WORD = 32
"""Characters of a word of code that is kept on one line; a longer one would not fit a phone."""


def site_path(path: Path) -> str | None:
    """Return a file's place on the site; None if it is neither a page nor a file of docs/."""
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    return path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else None


def source_page(path: Path) -> str:
    """Return the name of the page that shows a file of the repository, or a notebook's own file name."""
    name = f"source/{path.relative_to(ROOT).as_posix()}"
    return name if path.suffix == ".ipynb" else f"{name}.md"


def links(text: str) -> Iterator[re.Match[str]]:
    """Yield a page's links into the repository, leaving out code blocks and code spans."""
    is_code = False
    start = 0
    for line in text.splitlines(keepends=True):
        if _FENCE.match(line):
            is_code = not is_code
        elif not is_code:
            hidden = re.sub(r"`[^`\n]*`", lambda span: "`" * len(span[0]), line)
            for match in _LINK.finditer(hidden):
                target = match[2]
                if not re.match(r"[a-z][a-z+.-]*:|#", target):
                    yield _LINK.match(text, start + match.start()) or match
        start += len(line)


def target_of(link: str, page: Path) -> Path | None:
    """Return the file of the repository that a page's link leads to; None if there is none."""
    path = (page.parent / link.partition("#")[0]).resolve()
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from elsewhere, and a page for each source file that a page links to."""
    for name, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    shown: set[Path] = set()
    for file in list(files.documentation_pages()):
        page = Path(file.abs_src_path)
        for match in links(page.read_text(encoding="utf-8")):
            path = target_of(match[2], page)
            if path is not None and site_path(path) is None:
                shown.add(path)
    for path in sorted(shown):
        content = path.read_text("utf-8") if path.suffix == ".ipynb" else shown_source(path)
        files.append(File.generated(config, source_page(path), content=content))
    return files


def shown_source(path: Path) -> str:
    """Return the page that shows a source file."""
    name = path.relative_to(ROOT).as_posix()
    language = LANGUAGES.get(path.suffix, "text")
    text = path.read_text(encoding="utf-8")
    head = "---\nsearch:\n  exclude: true\n---\n\n"
    return f'{head}# {name}\n\n``````{language} linenums="1"\n{text}\n``````\n'


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Keep words with hyphens in code spans, such as `--max-tokens`, on one line."""

    def word(match: re.Match[str]) -> str:
        return (
            f'<span class="word">{match[0]}</span>' if len(match[0]) <= LONGEST_WORD else match[0]
        )

    return _CODE_SPAN.sub(lambda code: f"<code>{_WORD.sub(word, code[1])}</code>", html)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links into the repository into links of the site."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    origin = Path(page.file.abs_src_path)
    here = Path(page.file.src_uri).parent
    parts: list[str] = []
    end = 0
    for match in links(markdown):
        path = target_of(match[2], origin)
        if path is None:
            continue  # MkDocs names it as broken.
        place = site_path(path) or source_page(path)
        _, mark, anchor = match[2].partition("#")
        parts += [markdown[end : match.start(2)], os.path.relpath(place, here) + mark + anchor]
        end = match.end(2)
    return "".join([*parts, markdown[end:]])
