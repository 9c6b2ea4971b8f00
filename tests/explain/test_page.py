"""The report page in a real browser: on phones, in print, with keys alone, and of hostile text."""

# The page writes minus signs with the letter a reader expects, which looks like another.
# ruff: noqa: RUF001

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxytune.explain.moves import moves
from proxytune.explain.page import page as report_page
from proxytune.explain.report import Report, Run
from proxytune.explain.summary import summarise
from proxytune.pages.policy import assemble
from proxytune.trace import Terms, View
from tests.support.browser import open_browser, open_page
from tests.support.looks import covered, sticking_out, too_faint
from tests.support.traces import SPECIAL, told_trace

SIDES = pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
WIDTHS = pytest.mark.parametrize("width", [390, 1280])

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<!--",
    "<img src=x onerror=alert(3)>",
    "]]>",
    "\u202eright to left\u202c",
    " \u0634\u062c\u0631\u0629",
    " 👩\u200d👩\u200d👧",
    "🐈".encode()[:2],
    "🐈".encode()[2:] + b" purrs",
    "🐈".encode()[:3],
    " @data@ @policy@",
    "\u2028\u2029\x00\x1b[31m",
    "\n",
    "a\tb",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


def written(path: Path, *reports: Report, recipe: str = "my-recipe") -> str:
    """Write a page and return its address."""
    path.write_text(report_page(reports, recipe=recipe), encoding="utf-8")
    return path.as_uri()


def two_runs() -> Report:
    steered = told_trace(
        [" not", " be", " held", ".", SPECIAL],
        base=[0.1, 0.5, 0.4, 0.2, 0.3],
        steered=[0.9, 0.5, 0.04, 0.5, 0.3],
        changed=[True, False, False, True, False],
        prompt="The owner shall",
    )
    base = told_trace([" not", " not", " held"], prompt="The owner shall", alphas={"first": 0.0})
    return Report((Run("alpha 1", steered), Run("base", base, is_base=True)))


def many_runs() -> Report:
    steered, base = two_runs().runs
    forked = told_trace([" not", " pay"], prompt="The owner shall", num_given=2)
    return Report(
        (
            steered,
            Run("alpha 2", forked.__class__(**fields(forked, num_given=0))),
            Run("what if 1 = ' pay'", forked, is_forked=True),
            base,
        )
    )


def fields(trace: Any, **changes: Any) -> dict[str, Any]:
    return {name: getattr(trace, name) for name in trace.__dataclass_fields__} | changes


def long_report(num_tokens: int) -> Report:
    rng = random.Random(0)
    tokens = [rng.choice([" the", " owner", " of", " law", ",", "\n"]) for _ in range(num_tokens)]
    base = [rng.uniform(0.01, 0.9) for _ in tokens]
    steered = [rng.uniform(0.01, 0.9) for _ in tokens]
    changed = [rng.random() < 0.2 for _ in tokens]
    trace = told_trace(tokens, base=base, steered=steered, changed=changed)
    other = told_trace(tokens[:40] + tokens[41:], alphas={"first": 0.0})
    return Report((Run("alpha 1", trace), Run("base", other, is_base=True)))


# What is shown ---------------------------------------------------------------------------------------


@WIDTHS
@SIDES
def test_it_shows_both_texts_and_has_nothing_to_complain_about(tmp_path, browser, width, is_dark):
    address = written(tmp_path / "report.html", two_runs())
    with open_page(browser=browser, width=width, is_dark=is_dark) as page:
        page.goto(address)
        assert page.locator("#pane-steered .text").inner_text().startswith("The owner shall not be")
        assert page.locator("#pane-base .text").inner_text() == "The owner shall not not held"
        assert page.locator("#pane-steered .tok.end").get_attribute("data-name") == SPECIAL
        # Nothing needs to be scrolled sideways, however narrow the window.
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.locator("#pane-steered .tok").first.click()
        assert page.locator("#details .view").count() == 4
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.faults == []


@SIDES
@pytest.mark.parametrize(
    ("width", "height"), [(390, 844), (900, 1000), (1280, 650), (1280, 1000)], ids=str
)
def test_nothing_sticks_out_or_is_covered_or_too_faint(tmp_path, browser, width, height, is_dark):
    address = written(tmp_path / "report.html", many_runs(), long_report(150), recipe="r" * 80)
    with open_page(browser=browser, width=width, height=height, is_dark=is_dark) as page:
        page.goto(address)

        def check(when: str) -> None:
            assert too_faint(page) == [], when
            if not is_dark:  # places are the same
                assert sticking_out(page) == [], when
                assert covered(page) == [], when

        check("several continuations")
        page.locator("#case").select_option(index=1)
        check("a long text")
        page.locator("#pane-steered .tok").nth(70).click()
        token, details = (page.locator(which).bounding_box() for which in (".tok.on", "#details"))
        assert token["y"] >= 0 and token["y"] + token["height"] <= details["y"]
        assert details["y"] + details["height"] <= height + 1
        check("a token open")
        assert page.faults == []


def test_a_table_that_is_too_wide_scrolls_in_itself(tmp_path, browser):
    with open_page(browser=browser, width=390) as page:
        page.goto(written(tmp_path / "report.html", long_report(60)))
        own, inner = page.evaluate(
            "[...document.querySelectorAll('.scroller')].flatMap(e => [e.clientWidth, e.scrollWidth])"
        )
        assert own < 390 < inner
        page.locator(".scroller").focus()
        # A busy machine may paint the page first, and the key before that moves nothing.
        for _ in range(50):
            page.keyboard.press("ArrowRight")
            page.wait_for_timeout(100)
            if page.evaluate("document.querySelector('.scroller').scrollLeft") > 0:
                break
        assert page.evaluate("document.querySelector('.scroller').scrollLeft") > 0
        assert page.evaluate("scrollX") == 0


def test_a_place_clicked_in_the_curve_stays_in_sight(tmp_path, browser):
    """The page used to jump to the token, away from the curve."""
    with open_page(browser=browser, width=390, height=844) as page:
        page.goto(written(tmp_path / "report.html", long_report(400)))
        plot = page.locator(".plot.shift")
        plot.scroll_into_view_if_needed()
        plot.click(position={"x": 100, "y": 20})
        seen, details = plot.bounding_box(), page.locator("#details").bounding_box()
        assert seen["y"] >= 0 and seen["y"] + seen["height"] <= details["y"]


def test_its_figures_are_those_of_the_summary(tmp_path, browser):
    report = two_runs()
    told = moves(report.runs[0].trace)
    with open_page(browser=browser) as page:
        page.goto(written(tmp_path / "report.html", report))
        text = page.locator("#figures").inner_text()
    tally = summarise(told).tally
    assert "40 %" in text and "2 of 5" in text
    assert f"{100 * tally.mean_prob_change:+.1f}" in text
    assert f"{tally.mean_shift:+.2f}".replace("-", "−") in text
    assert f"{tally.mean_kl:.2f}" in text


def test_colours_say_how_far_a_token_moved_and_words_say_so_too(tmp_path, browser):
    with open_page(browser=browser) as page:
        page.goto(written(tmp_path / "report.html", two_runs()))
        tokens = page.locator("#pane-steered .tok")
        classes = [tokens.nth(i).get_attribute("class") for i in range(4)]
        # 9, 1, 1/10 and 2.5 times as likely.
        assert [set(c.split()) - {"tok"} for c in classes] == [
            {"more-3", "changed"},
            set(),
            {"less-3"},
            {"more-2", "changed"},
        ]
        says = tokens.nth(0).get_attribute("aria-label")
        assert "9.0 times as likely as under the base" in says and "first choice: other" in says
        assert "10 times less likely" in tokens.nth(2).get_attribute("aria-label")
        page.locator("#colours").uncheck()
        background = (
            "getComputedStyle(document.querySelector('#pane-steered .tok.more-3')).backgroundColor"
        )
        assert page.evaluate(background) == "rgba(0, 0, 0, 0)"


def test_a_token_opened_shows_what_each_model_gave(tmp_path, browser):
    with open_page(browser=browser) as page:
        page.goto(written(tmp_path / "report.html", two_runs()))
        page.locator("#pane-steered .tok").nth(2).click()
        assert "␣held at position 2" in page.locator("#details-title").inner_text()
        summary = page.locator("#details-sum").inner_text()
        assert f"{math.log(0.04 / 0.4):.2f}".replace("-", "−") in summary
        assert f"offset first +{math.log(0.6 / 0.3):.2f}" in summary
        views = page.locator("#details .view")
        assert [views.nth(i).locator("h3").inner_text() for i in range(4)] == [
            "Base",
            "+ α Expert first",
            "− α Anti-expert first",
            "= Steered",
        ]
        assert "40 % · rank 1" in views.nth(0).locator(".facts").inner_text()
        assert views.nth(0).locator(".row.chosen").inner_text().split("\n")[0] == "␣held"


def test_a_token_opened_shows_what_its_offset_consists_of(tmp_path, browser):
    trace = two_runs().runs[0].trace
    terms = {"first": Terms(pair=0.5, base=-0.5, bias=2.0)}
    steps = tuple(replace(step, terms=terms) for step in trace.steps)
    report = Report((Run("alpha 0.5", replace(trace, steps=steps, alphas={"first": 0.5})),))
    with open_page(browser=browser) as page:
        page.goto(written(tmp_path / "report.html", report))
        page.locator("#pane-steered .tok").nth(2).click()
        assert (
            "offset first +1.00 (its models +0.25, the base's weight −0.25, its output bias +1.00) nats"
            in page.locator("#details-sum").inner_text()
        )


def test_a_place_in_the_curve_opens_its_token(tmp_path, browser):
    with open_page(browser=browser) as page:
        page.goto(written(tmp_path / "report.html", two_runs()))
        plot = page.locator(".plot.shift")
        box = plot.bounding_box()
        plot.click(position={"x": box["width"] * 0.7, "y": 20})  # 0.7 of five tokens
        assert "position 3" in page.locator("#details-title").inner_text()
        assert page.locator(".cursor").first.is_visible()


def test_the_table_has_the_token_types_and_their_means(tmp_path, browser):
    with open_page(browser=browser) as page:
        page.goto(written(tmp_path / "report.html", two_runs()))
        rows = page.locator("#types tr")
        first = rows.first.locator("td").all_inner_texts()
    assert first == ["␣not", "1", "1", "+80.0", f"+{math.log(9):.2f}", "not be held."]


def test_several_continuations_can_be_chosen_and_compared(tmp_path, browser):
    with open_page(browser=browser) as page:
        page.goto(written(tmp_path / "report.html", many_runs()))
        assert page.locator("#paths").is_visible()
        places = page.locator("#path-list li .small").all_inner_texts()
        assert places[0] == "parts from the base at position 1"
        assert places[-1] == "the base by itself"
        page.get_by_label("what if 1").check()
        assert "pay" in page.locator("#pane-steered .text").inner_text()
        assert page.locator("#pane-steered .tok.forced").count() == 1
        assert page.faults == []


def test_of_several_prompts_one_is_shown(tmp_path, browser):
    other = told_trace([" other", " words"], prompt="Another prompt")
    address = written(tmp_path / "report.html", two_runs(), Report((Run("alpha 1", other),)))
    with open_page(browser=browser) as page:
        page.goto(address)
        page.locator("#case").select_option(index=1)
        assert page.locator("#pane-steered .text").inner_text() == "Another prompt other words"
        assert not page.locator("#pane-base").is_visible()
        assert page.faults == []


def test_what_a_base_behind_an_api_did_not_show_is_left_out(tmp_path, browser):
    trace = told_trace([" not", " be"])
    hidden = View(None, None, None)
    steps = tuple(replace(s, kl=None, views={**s.views, "base": hidden}) for s in trace.steps)
    report = Report((Run("alpha 1", replace(trace, steps=steps)),))
    with open_page(browser=browser) as page:
        page.goto(written(tmp_path / "report.html", report))
        page.locator("#pane-steered .tok").first.click()
        assert "how far it moved is not known" in page.locator("#details-sum").inner_text()
        assert page.locator("#details .view").first.locator(".facts").inner_text() == "not shown"
        assert "KL" not in page.locator("#figures").inner_text()
        assert page.faults == []


def test_an_empty_text_is_a_report_too(tmp_path, browser):
    report = Report((Run("alpha 1", told_trace([])),))
    with open_page(browser=browser) as page:
        page.goto(written(tmp_path / "report.html", report))
        assert page.locator("#pane-steered .text").inner_text() == "A prompt:"
        page.locator("#pane-steered-list").focus()
        page.keyboard.press("Enter")
        assert page.faults == []


# With keys alone ---------------------------------------------------------------------------------------


def test_everything_can_be_reached_with_keys(tmp_path, browser):
    with open_page(browser=browser) as page:
        page.goto(written(tmp_path / "report.html", two_runs()))
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "pane-steered-list":
                break
        else:
            raise AssertionError("the text cannot be reached with Tab")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.locator("#pane-steered .on").inner_text() == "be"
        page.keyboard.press("Enter")
        assert "position 1" in page.locator("#details-title").inner_text()
        page.keyboard.press("ArrowRight")
        assert "position 2" in page.locator("#details-title").inner_text()
        page.keyboard.press("End")
        assert "position 4" in page.locator("#details-title").inner_text()
        assert "position 4" in page.locator("#details-title").inner_text()
        spoken = page.locator("#status").inner_text()
        assert spoken.startswith(SPECIAL) and "as likely as under the base" in spoken
        page.keyboard.press("Escape")
        assert not page.locator("#details").is_visible()
        assert page.evaluate("document.activeElement.id") == "pane-steered-list"
        assert page.faults == []


def test_the_line_below_is_reached_with_the_arrow_down(tmp_path, browser):
    with open_page(browser=browser, width=390) as page:
        page.goto(written(tmp_path / "report.html", long_report(120)))
        page.locator("#pane-steered-list").focus()
        page.keyboard.press("Home")
        top = page.locator("#pane-steered .on").bounding_box()["y"]
        page.keyboard.press("ArrowDown")
        assert page.locator("#pane-steered .on").bounding_box()["y"] > top


# Hostile text ------------------------------------------------------------------------------------------


@SIDES
def test_hostile_text_is_shown_as_text(tmp_path, browser, is_dark):
    prompt = "</script><script>document.title='hacked'</script>\u202e{{x}} @data@"
    count = len(HOSTILE)
    trace = told_trace(list(HOSTILE), changed=[True] * count, prompt=prompt)
    report = Report((Run("<i>alpha</i>", trace), Run("base", trace, is_base=True)))
    address = written(tmp_path / "report.html", report, recipe="<b>recipe</b>")
    with open_page(browser=browser, is_dark=is_dark) as page:
        page.goto(address)
        assert page.title().startswith("Steering report: </script><script>")
        text = page.locator("#pane-steered .text").text_content()
        assert "<script>alert(1)</script></script><script>alert(2)</script><!--" in text
        assert "🐈 purrs" in text and "\ufffd" in text and "👩\u200d👩\u200d👧" in text
        assert page.locator("#recipe").text_content() == "<b>recipe</b>"
        assert page.locator("img, .flow b, .switch i, #recipe b").count() == 0
        assert page.locator("script").count() == 2
        page.locator("#pane-steered-list").focus()
        for _ in range(count):
            page.keyboard.press("ArrowRight")
            page.keyboard.press("Enter")
            # What turns text around is named in the details, not obeyed.
            title = page.locator("#details-title").text_content()
            assert not re.search("[\u202a-\u202e\u2028\x00\x1b]", title)
        assert page.faults == []


def test_parts_of_a_character_are_marked_and_named(tmp_path, browser):
    with open_page(browser=browser) as page:
        page.goto(written(tmp_path / "report.html", Report((Run("r", told_trace(list(HOSTILE))),))))
        part = page.locator("#pane-steered .tok").nth(8)
        assert "part" in part.get_attribute("class")
        part.click()
        assert "⟨F0␣9F⟩" in page.locator("#details-title").inner_text()
        assert "part of 🐈" in page.locator("#details-sum").inner_text()


def test_the_data_cannot_end_its_element():
    trace = told_trace(list(HOSTILE), prompt="</script>")
    content = report_page([Report((Run("r", trace),))], recipe="r")
    (data,) = re.findall('id="data">(.*?)</script>', content, flags=re.DOTALL)
    assert "<" not in data and ">" not in data
    assert json.loads(data)["reports"][0]["prompt"] == "</script>"
    assert content.count("</script>") == 2


def test_it_asks_nothing_of_a_network_and_allows_no_other_script(tmp_path, browser):
    with open_page(browser=browser) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(written(tmp_path / "report.html", two_runs()))
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        page.evaluate(
            "() => { const s = document.createElement('script'); s.textContent = 'window.bad = 1';"
            "document.body.append(s); }"
        )
        assert page.evaluate("window.bad") is None


# Long texts, print ---------------------------------------------------------------------------------------


def test_two_thousand_tokens_stay_smooth(tmp_path, browser):
    """Drawing them takes well below a second, a key a few frames; a busy machine gets five times that."""
    with open_page(browser=browser) as page:
        page.goto(written(tmp_path / "report.html", long_report(2000)))
        assert page.locator("#pane-steered .tok").count() == 2000
        drawn = page.evaluate(
            "() => { const t = performance.now(); const box = document.querySelector('#runs input');"
            "box.dispatchEvent(new Event('change', {bubbles: true})); document.body.offsetHeight;"
            "return performance.now() - t; }"
        )
        page.locator("#pane-steered-list").focus()
        page.keyboard.press("Enter")
        times = page.evaluate(
            "() => { const list = document.querySelector('#pane-steered-list'); const times = [];"
            "for (let i = 0; i < 60; i++) { const t = performance.now();"
            "list.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));"
            "document.body.offsetHeight; times.push(performance.now() - t); }"
            "return times; }"
        )
        assert page.faults == []
    typical = sorted(times)[len(times) // 2]
    assert drawn < 4000 and typical < 250, (drawn, typical)


@WIDTHS
def test_in_print_the_colours_stay_and_the_controls_go(tmp_path, browser, width):
    with open_page(browser=browser, width=width, is_dark=True) as page:
        page.goto(written(tmp_path / "report.html", many_runs()))
        page.emulate_media(media="print")
        assert not page.locator("#picks").is_visible()
        assert page.locator("#pane-steered .text").is_visible()
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        colour = page.evaluate(
            "getComputedStyle(document.querySelector('#pane-steered .tok.more-3')).backgroundColor"
        )
        assert (paper, colour) == ("rgb(255, 255, 255)", "rgb(240, 162, 74)")


def test_the_colours_are_those_of_the_playground():
    def colours(name: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key, value in re.findall(
            r"--((?:more|less)-\d|mark|token-ink): (#\w+)", assemble(name)
        ):
            found.setdefault(key, []).append(value)
        return found

    ours, theirs = colours("report"), colours("playground")
    assert len(ours) == 8
    assert {key: ours[key] for key in theirs} == theirs
