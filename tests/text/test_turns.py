"""How an answer follows a prompt in each format."""

from __future__ import annotations

import pytest

from proxytune.text.turns import Turn, Turns
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
QUESTION = "Question: {{ prompt }}\nAnswer:"
LINES = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
HI = [{"role": "user", "content": "Hi"}]


def turn(form: str, prompt: object, answer: str) -> Turn:
    return Turns(form, TOKENIZER, "a model").after(prompt, answer)  # type: ignore[arg-type]


def test_a_text_and_its_answer_are_joined_as_they_are_in_the_plain_format():
    assert turn("plain", "Hi\nAnswer:", " Yes.") == Turn(" Yes.")
    assert turn("plain", "Hi", "Yes.") == Turn("Yes.")


@pytest.mark.parametrize("prompt", ["Hi", HI], ids=["text", "messages"])
def test_a_space_stands_between_a_template_that_ends_in_a_word_and_the_answer(prompt):
    assert turn(QUESTION, prompt, "Yes.") == Turn(" Yes.")


def test_an_answer_that_begins_with_a_space_gets_no_second_one():
    assert turn(QUESTION, "Hi", " Yes.") == Turn(" Yes.")


@pytest.mark.parametrize("prompt", ["Hi", HI], ids=["text", "messages"])
def test_a_turn_that_begins_on_a_line_of_its_own_needs_no_space(prompt):
    assert turn(LINES, prompt, "Yes.") == Turn("Yes.", "<|im_end|>\n", True)


def test_a_chat_template_that_writes_a_space_before_an_answer_keeps_it():
    assert turn(BRACKETS, "Hi", "Yes.") == Turn(" Yes.", f" {TOKENIZER.eos_token}", True)


def test_an_answer_ends_with_the_end_of_sequence_token_once():
    for form in ("plain", QUESTION, LINES, BRACKETS):
        token_ids = Turns(form, TOKENIZER, "a model").answer_ids("Hi", "Yes.")
        assert token_ids.count(TOKENIZER.eos_token_id) == 1
        assert token_ids[-1] == TOKENIZER.eos_token_id


def test_an_answer_in_joined_messages_follows_the_name_of_the_assistant():
    history = [*HI, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "More"}]
    assert turn("plain", history, "Sure.") == Turn(" Sure.")
