"""The playground on a phone, on a tablet and in a wide window: all of it is seen, read and reached."""

# The page writes strengths with the letter a reader expects, which looks like another.
# ruff: noqa: RUF001

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browser import open_browser, open_page
from tests.support.looks import covered, sticking_out, too_faint
from tests.support.playground import Fake, Script, ready, run, serve_fake, settle

SIZES = pytest.mark.parametrize(
    ("width", "height"), [(390, 844), (900, 1000), (1280, 650), (1280, 960)], ids=str
)
WORDS = [" word" if i % 7 else " longer,\n" for i in range(150)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serve_fake() as running:
        running.experts = (
            "shakespeare",
            "legal",
            "python",
            "medical",
            "a-customer" * 6,
            "instruct",
        )
        running.script = Script(base=WORDS, steered=WORDS, per_chunk=10)
        yield running


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("mode", ["text", "chat"])
@SIZES
def test_nothing_sticks_out_or_is_covered_or_too_faint(browser, fake, width, height, mode, is_dark):
    fake.has_chat = False  # then the chat has a note as well
    with open_page(browser=browser, width=width, height=height, is_dark=is_dark) as page:
        ready(page, fake)
        page.check(f"input[value={mode}]")

        def check(when: str) -> None:
            assert too_faint(page) == [], when
            if not is_dark:  # places are the same
                assert sticking_out(page) == [], when
                assert covered(page) == [], when

        check("at the start")
        run(page, "word " * 30 + "x" * 200)
        check("with both answers")
        if width < 960:
            page.click("#settings summary")
        page.check("#mix")
        page.click("#examples-open")
        check("with settings and examples open")
        if mode == "chat":
            run(page, "Again\n\nand again")
        page.locator("#pane-steered .tok").nth(30).click()
        # What it opened may lie over the page, which can be scrolled clear of it.
        check("with a token open")
        assert page.faults == []


@SIZES
def test_a_token_opened_is_in_sight_with_what_is_behind_it(browser, fake, width, height):
    with open_page(browser=browser, width=width, height=height) as page:
        ready(page, fake)
        run(page)
        for index in (0, 80, 149):
            page.locator("#pane-steered .tok").nth(index).click()
            token = page.locator("#pane-steered .tok.on").bounding_box()
            details = page.locator("#details").bounding_box()
            assert token["y"] >= 0 and token["y"] + token["height"] <= details["y"]
            assert details["y"] + details["height"] <= height + 1
            assert details["height"] <= 0.61 * height


@pytest.mark.parametrize(("width", "height"), [(390, 844), (900, 1000)], ids=str)
def test_settings_are_one_click_away_in_a_narrow_window(browser, fake, width, height):
    with open_page(browser=browser, width=width, height=height) as page:
        ready(page, fake)
        assert page.inner_text("#settings-sum") == (
            "α = 1 · shakespeare · 120 tokens · temperature 0.7 · seed 1"
        )
        # The answers begin on the first screen.
        assert page.locator("#pane-base").bounding_box()["y"] < 0.6 * height
        page.click("#settings summary")
        page.fill("#temperature", "0")
        page.fill("#max-tokens", "40")
        page.check("input[value=legal]")
        assert page.inner_text("#settings-sum") == "α = 0.7 · legal · 40 tokens · greedy"
        page.click("#settings summary")
        run(page)
        assert fake.asked[-1]["max_tokens"] == 40 and fake.asked[-1]["temperature"] == 0
        page.set_viewport_size({"width": 1280, "height": 900})
        page.wait_for_selector("#temperature", state="visible")
        assert page.faults == []


@pytest.mark.parametrize("width", [390, 900])
def test_the_page_stays_where_its_reader_is_when_the_answers_end(browser, fake, width):
    """It used to jump back to the button, with the answers out of sight."""
    fake.script = Script(base=[" word"] * 60, steered=[" word"] * 60, pause_s=0.01)
    with open_page(browser=browser, width=width, height=400) as page:
        ready(page, fake)
        page.fill("#prompt", "Count:")
        page.click("#run")
        page.wait_for_selector("#pane-steered .tok")
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        before = page.evaluate("scrollY")
        assert before > 100
        settle(page)
        assert page.evaluate("document.activeElement.id") == "run"
        assert page.evaluate("scrollY") >= before - 80


def test_stop_can_be_clicked_on_a_phone_while_a_token_is_open(browser, fake):
    fake.script = Script(base=[" word"] * 500, steered=[" word"] * 500, pause_s=0.02)
    with open_page(browser=browser, width=390, height=844) as page:
        ready(page, fake)
        page.fill("#prompt", "Count:")
        page.click("#run")
        page.wait_for_selector("#pane-base .tok")
        page.locator("#pane-base .tok").first.click()
        page.click("#stop")
        settle(page)
        assert "stopped" in page.inner_text("#pane-base .sum")


def test_keys_go_from_the_question_over_examples_and_settings_to_the_answers(browser, fake):
    with open_page(browser=browser, width=390, height=844) as page:
        ready(page, fake)
        run(page)
        page.click("#examples-open")
        page.focus("#prompt")
        passed = []
        while "tokens" not in passed and len(passed) < 40:
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.matches('summary')"):
                page.keyboard.press("Enter")  # unfolds
            name, is_seen = page.evaluate(
                "(() => { const e = document.activeElement; const label = e.closest('label') ?? e;"
                "const { top, bottom } = label.getBoundingClientRect();"
                "const name = e.localName === 'summary' ? 'settings' : e.value === 'text' ? 'mode'"
                " : ['example', 'tokens'].includes(e.className) ? e.className : e.id;"
                "return [name, top >= 0 && bottom <= innerHeight]; })()"
            )
            passed.append(name)
            assert is_seen or name == "tokens", passed  # the text may be taller than the window
        order = [
            *("mode", "examples-open", "run", "example", "settings", "alpha-number", "alpha"),
            *("mix", "max-tokens", "temperature", "top-p", "seed", "tokens"),
        ]
        assert [name for name in dict.fromkeys(passed) if name in order] == order
        assert page.faults == []
