"""Assembles pages from their files, with a policy of what may run in them.

A page is one HTML file with one style and one script. Their sources are separate files, some of which both
pages share. `assemble` inserts them, and `page_policy` allows exactly these, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

STYLES = {"playground": ("look.css", "playground.css"), "report": ("look.css", "report.css")}
"""The style files of each page, in order; later rules win."""
SCRIPTS = {
    "playground": ("tokens.js", "requests.js", "playground.js"),
    "report": ("tokens.js", "report.js"),
}
"""The script files of each page, in order. They share one block scope, so they define no global names."""


def assemble(name: str) -> str:
    """Return the page `playground` or `report` with its style and its script."""
    parts = {
        "style": "\n" + "\n".join(_read(part) for part in STYLES[name]),
        "script": f'\n"use strict";\n{{\n{script(name)}}}\n',
    }
    # One pass, so that placeholders in the inserted text stay as they are.
    return re.sub("@(style|script)@", lambda mark: parts[mark[1]], _read(f"{name}.html"))


def script(name: str) -> str:
    """Return a page's script: the text of its files, one after the other."""
    return "\n".join(_read(part) for part in SCRIPTS[name])


def page_policy(page: str, *further: str) -> str:
    """Return the Content-Security-Policy of a page with one `<style>` and one `<script>`.

    Args:
        page: Its HTML.
        further: Further directives, such as `connect-src 'self'`.
    """

    def digest(tag: str) -> str:
        found = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert found is not None, f"the page has no <{tag}>"
        value = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        return f"'sha256-{value}'"

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {digest('script')}",
            f"style-src {digest('style')}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            *further,
        )
    )


def _read(name: str) -> str:
    return files("proxytune.pages").joinpath(name).read_text("utf-8")
