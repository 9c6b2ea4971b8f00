"""What a newcomer meets on the playground: examples to click, recipes of any size, answers without text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browser import open_browser, open_page
from tests.support.looks import sticking_out
from tests.support.playground import Fake, Script, answers, ready, run, serve_fake, settle


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serve_fake() as running:
        yield running


def examples(page: Any) -> list[str]:
    """Return what the examples on the page say."""
    return [str(text).strip() for text in page.locator("#examples button").all_text_contents()]


# Examples --------------------------------------------------------------------------------------------


def test_it_opens_with_an_example_for_each_expert_and_one_click_runs_it(browser, fake):
    with open_page(browser=browser) as page:
        ready(page, fake)
        assert examples(page) == [
            "shakespeare Good morrow, my good",
            "legal The owner of a building shall",
            "Once upon a time",
        ]
        page.click("#examples button:has-text('legal')")
        settle(page)
        steered = fake.sides()["steered"]
        assert steered["prompt"] == "The owner of a building shall"
        assert steered["proxytune"]["expert"] == "legal"
        assert steered["proxytune"]["alpha"] == 0.7  # the recipe's own
        assert page.input_value("#prompt") == "The owner of a building shall"
        assert page.is_checked("input[value=legal]")
        # They make room for the answers, and come back when asked for.
        assert page.is_hidden("#examples")
        page.click("#examples-open")
        assert page.get_attribute("#examples-open", "aria-expanded") == "true"
        page.click("#examples button:has-text('Once upon')")
        settle(page)
        assert fake.sides()["steered"]["proxytune"]["expert"] == "legal"  # it names none
        assert page.faults == []


def test_a_chat_has_examples_of_its_own(browser, fake):
    with open_page(browser=browser) as page:
        ready(page, fake)
        page.check("input[value=chat]")
        assert examples(page)[1] == "legal Explain what a contract is."
        page.click("#examples button:has-text('legal')")
        settle(page)
        asked = [{"role": "user", "content": "Explain what a contract is."}]
        assert fake.sides()["base"]["messages"] == fake.sides()["steered"]["messages"] == asked
        assert page.is_hidden("#examples")
        page.click("#new")
        assert page.is_visible("#examples")
        assert page.faults == []


def test_an_example_of_one_expert_ends_a_mixture_and_a_recipe_that_sums_keeps_its_sum(
    browser, fake
):
    with open_page(browser=browser) as page:
        ready(page, fake)
        page.check("#mix")
        page.check("input[value=legal]")
        page.click("#examples button:has-text('shakespeare')")
        settle(page)
        assert fake.sides()["steered"]["proxytune"]["expert"] == "shakespeare"
    fake.default_experts = ("shakespeare", "legal")
    with open_page(browser=browser) as page:
        ready(page, fake)
        assert examples(page)[0] == "Good morrow, my good"
        page.locator("#examples button").first.click()
        settle(page)
        assert fake.sides()["steered"]["proxytune"]["experts"] == {"shakespeare": 1, "legal": 0.7}


def test_examples_wait_while_an_answer_is_being_written(browser, fake):
    fake.script = Script(base=[" b"] * 300, steered=[" s"] * 300, pause_s=0.02)
    with open_page(browser=browser) as page:
        ready(page, fake)
        page.locator("#examples button").first.click()
        page.wait_for_selector("#pane-base .tok")
        page.click("#examples-open")
        assert page.locator("#examples button").first.is_disabled()
        page.click("#stop")
        settle(page)
        assert page.locator("#examples button").first.is_enabled()


# Recipes of any size ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [390, 900, 1280])
@pytest.mark.parametrize("num_experts", [1, 50])
def test_recipes_with_one_expert_and_with_fifty_fit(browser, fake, num_experts, width):
    fake.experts = tuple(f"customer-{number}" for number in range(num_experts))
    with open_page(browser=browser, width=width, height=844) as page:
        ready(page, fake)
        assert len(examples(page)) == 3
        assert examples(page)[0] == "customer-0 Once upon a time"
        if width < 960:
            page.click("#settings summary")
        assert page.is_visible("#mix-label") == (num_experts > 1)
        assert page.locator("#experts li").count() == num_experts
        assert (
            page.locator("#expert-card").bounding_box()["height"] < 400
        )  # the list scrolls in itself
        last = f"customer-{num_experts - 1}"
        page.check(f"input[value={last}]")
        run(page)
        assert fake.sides()["steered"]["proxytune"]["expert"] == last
        assert sticking_out(page) == []
        assert page.faults == []


def test_a_base_that_shows_no_distribution_leaves_the_figures_out(browser, fake):
    fake.hides_base = True
    with open_page(browser=browser) as page:
        ready(page, fake)
        run(page)
        assert answers(page) == [" one two three.", " one zwei drei vier."]
        said = page.inner_text("#pane-steered .sum")
        assert "KL" not in said and "first choices changed" not in said
        page.locator("#pane-steered .tok").nth(1).click()
        assert "how far it moved is not known" in page.inner_text("#details-sum")
        assert page.locator("#details .view .facts").first.inner_text() == "not shown"
        assert "NaN" not in page.inner_text("body") and "undefined" not in page.inner_text("body")
        assert page.faults == []


# Answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["text", "chat"])
def test_an_answer_that_ends_at_once_says_so_with_a_hint(browser, fake, mode):
    fake.script = Script(base=[""], steered=["\n", ""], finish_reason="stop")
    with open_page(browser=browser) as page:
        ready(page, fake)
        page.check(f"input[value={mode}]")
        run(page, "Hello")
        base = page.inner_text("#pane-base .flow:not([hidden]) .notice")
        steered = page.inner_text("#pane-steered .flow:not([hidden]) .notice")
        assert "The answer is empty: the first token ended it." in base
        assert "The answer is nothing but white space." in steered
        words = (
            "other words" if mode == "chat" else "the beginning of a text, Chat if it is a question"
        )
        assert f"Try {words} or another seed." in base
        assert f"Try a strength nearer to 0, {words} or another seed." in steered
        fake.script = Script()
        run(page, "Hello again")
        assert page.locator("#pane-base .flow:not([hidden]) .notice").count() == (mode == "chat")
        if mode == "chat":  # an empty answer is no part of the conversation
            assert fake.asked[-1]["messages"] == [{"role": "user", "content": "Hello again"}]
        assert page.faults == []


def test_fewer_tokens_than_asked_for_are_told_apart_from_the_maximum(browser, fake):
    with open_page(browser=browser) as page:
        ready(page, fake)
        page.fill("#max-tokens", "4")
        run(page)
        assert "reached the maximum number of tokens" in page.inner_text("#pane-steered .sum")
        page.fill("#max-tokens", "500")
        run(page)
        assert "reached the limit of the server" in page.inner_text("#pane-steered .sum")


def test_what_a_model_reasons_is_shown_apart_from_its_answer(browser, fake):
    fake.thoughts = 2
    fake.script = Script(base=[" hmm", " well", " Yes."], steered=[" hmm", " well", " Yes."])
    with open_page(browser=browser) as page:
        ready(page, fake)
        page.check("input[value=chat]")
        run(page, "Is it?")
        assert page.locator("#pane-steered .tok.thought").all_inner_texts() == ["hmm", "well"]
        assert "2 of them reasoning" in page.inner_text("#pane-steered .sum")
        run(page, "Really?")
        assert {"role": "assistant", "content": " Yes."} in fake.asked[-1]["messages"]
        assert page.faults == []


def test_an_empty_prompt_is_pointed_at_and_nothing_is_asked(browser, fake):
    with open_page(browser=browser, width=390) as page:
        ready(page, fake)
        page.fill("#prompt", " \n ")
        page.click("#run")
        assert page.evaluate("document.activeElement.id") == "prompt"
        assert page.evaluate("document.activeElement.validationMessage") == "Write a prompt first."
        assert fake.asked == []


def test_a_pasted_text_of_many_lines_is_sent_as_it_is(browser, fake):
    text = "first line\n\n  third line, indented\r\n\tfourth\n" + "long " * 3000
    with open_page(browser=browser, width=390, height=844) as page:
        ready(page, fake)
        run(page, text)
        assert fake.asked[-1]["prompt"] == text.replace("\r\n", "\n")
        # The answers are not pushed off the page by a long question.
        assert page.locator("#prompt").bounding_box()["height"] < 0.4 * 844
        assert sticking_out(page) == []


def test_enter_is_a_new_line_where_keys_are_on_the_screen(browser, fake):
    """There is no Shift Enter on a phone, so a message could have no second line."""
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    )
    try:
        page = context.new_page()
        ready(page, fake)
        page.check("input[value=chat]")
        page.fill("#prompt", "one")
        page.press("#prompt", "End")
        page.press("#prompt", "Enter")
        page.keyboard.type("two")
        assert page.input_value("#prompt") == "one\ntwo"
        assert fake.asked == []
        assert page.is_hidden("#hint")
    finally:
        context.close()


def test_an_answer_that_is_no_json_is_said_so(browser, fake):
    with open_page(browser=browser) as page:
        page.route("**/v1/proxytune", lambda route: route.fulfill(body="<h1>Please log in</h1>"))
        page.goto(fake.url)
        page.wait_for_selector("#trouble:has-text('answer cannot be read')")
        assert page.is_disabled("#run")
        assert page.faults == []


def test_a_conversation_that_has_grown_too_long_is_told_how_to_go_on(browser, fake):
    message = "the prompt has 401 tokens, and this server allows 200.\nhint: shorten the prompt"
    with open_page(browser=browser) as page:
        ready(page, fake)
        page.check("input[value=chat]")
        run(page, "Hello")
        refusal = (400, {"message": message, "code": "context_length_exceeded"}, {})
        fake.refusals = [refusal, refusal]
        run(page, "And then?")
        said = page.inner_text("#pane-steered .problem")
        assert message in said and "a new chat begins without it" in said
        assert "Change it and run again" not in said  # the server's hint says what to do
        assert page.inner_text("#pane-steered .sum") == "not answered"
        page.click("#new")
        run(page, "And then?")
        assert fake.asked[-1]["messages"] == [{"role": "user", "content": "And then?"}]
