"""A page assembled from its files, and the policy of what may run in it.

A page is served or written as one HTML file with one style and one script. In this folder, style and script
have files of their own, some of which both pages share, as they do the panel of a token's details. `assemble`
inserts them, and `page_policy` allows exactly the style and script that were inserted, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

STYLES = {"playground": ("look.css", "playground.css"), "report": ("look.css", "report.css")}
"""The files of a page's style, in order: later rules win."""
SCRIPTS = {
    "playground": ("tokens.js", "requests.js", "examples.js", "playground.js"),
    "report": ("tokens.js", "report.js"),
}
"""The files of a page's script, in order. They share one scope, apart from the browser's global names."""


def assemble(name: str) -> str:
    """Return a page, `playground` or `report`, with its style, its script and the details of a token."""
    script = "\n".join(_read(part) for part in SCRIPTS[name])
    parts = {
        "details": _read("details.html"),
        "style": "\n" + "\n".join(_read(part) for part in STYLES[name]),
        "script": f'\n"use strict";\n{{\n{script}}}\n',
    }
    # In one pass, so that the inserted text is not searched for marks.
    return re.sub("@(details|style|script)@", lambda mark: parts[mark[1]], _read(f"{name}.html"))


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
