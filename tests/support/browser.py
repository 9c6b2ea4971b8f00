"""A real browser for tests: headless Chromium, driven by playwright.

    with open_page(width=390, is_dark=True) as page:
        page.goto(server.url)
    assert page.faults == []

Where Chromium or playwright is missing, the test is skipped with the reason. Nothing is downloaded: the
browser is the system's own (`apt-get install chromium`), or the one that `CHROMIUM` names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox",  # root has none, as in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium() -> str:
    """Return the browser's path; skip the test where there is none."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    return found


@contextmanager
def open_browser() -> Iterator[Any]:
    """Yield a playwright `Browser`, for a module whose tests share one: it takes a second to start."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = chromium()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(
    *, width: int = 1280, height: int = 900, is_dark: bool = False, browser: Any = None
) -> Iterator[Any]:
    """Yield a playwright `Page` with `faults`: what its console said of errors, and failed requests.

    It shares nothing with other pages, also in a `browser` that is given; else it has one of its own.
    """
    with nullcontext(browser) if browser else open_browser() as opened:
        context = opened.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if is_dark else "light",
            reduced_motion="reduce",
        )
        try:
            page: Any = context.new_page()
            page.faults = []
            page.on("pageerror", lambda error: page.faults.append(str(error)))
            page.on(
                "requestfailed",
                lambda request: (
                    page.faults.append(f"{request.url} failed: {request.failure}")
                    # A page's own abort; Chromium sometimes says the same of a stream read to its end.
                    if "ERR_ABORTED" not in str(request.failure)
                    else None
                ),
            )
            page.on(
                "console",
                lambda message: (
                    page.faults.append(message.text)
                    if message.type in {"error", "warning"}
                    else None
                ),
            )
            yield page
        finally:
            context.close()
