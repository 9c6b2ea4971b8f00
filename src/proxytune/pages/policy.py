"""The Content-Security-Policy of a page: its own style and script run, by their hashes, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re


def page_policy(page: str, *further: str) -> str:
    """Return the policy of a page with one `<style>` and one `<script>`.

    Args:
        page: Its HTML.
        further: What else is allowed, such as `connect-src 'self'`, or is said beside it.
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
