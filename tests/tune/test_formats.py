"""What stands around a question: the formats that a run chooses, and what it trains through which method."""

from __future__ import annotations

from typing import Any

import pytest

from proxytune.checkpoints.checkpoint import Checkpoint, find_checkpoint
from proxytune.data.rows import read_rows
from proxytune.errors import PromptFormatError
from proxytune.tune.formats import QUESTION, Formats, formats_of
from proxytune.tune.settings import TuneSettings
from tests.support.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

BARE = [{"prompt": "How are you?", "completion": "Fine."}]
LED = [{"prompt": "Question: How?\nAnswer:", "completion": " Fine."}]
CHAT = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
TEXT = [{"text": "Once"}]
PAIRS = [{"prompt": "Hi", "chosen": "Ho", "rejected": "Hm"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Return checkpoints with the same vocabulary: with a chat template, with another one, and without."""
    folder = tmp_path_factory.mktemp("models")
    templates = {
        "chat": CHAT_TEMPLATE,
        "other": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "bare": None,
    }
    found = {}
    for name, template in templates.items():
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        tiny_model(folder / name, tokenizer=tokenizer)
        found[name] = find_checkpoint(str(folder / name), root=folder)
    return found


def chosen(
    models: dict[str, Checkpoint],
    rows: list[dict[str, Any]],
    small: str = "chat",
    base: str | None = "chat",
    **given: Any,
) -> Formats:
    settings = TuneSettings(data="rows", output="out", anti_expert="small", base="base", **given)
    return formats_of(settings, read_rows(rows), models[small], base and models[base])


@pytest.mark.parametrize("rows", [BARE, CHAT, PAIRS], ids=["bare", "messages", "pairs"])
def test_questions_are_asked_with_the_small_models_chat_template(models, rows):
    found = chosen(models, rows)
    assert (found.small, found.base, found.chat) == ("chat", "chat", None)
    assert found.reason and "chat template" in found.reason


def test_without_a_chat_template_a_bare_question_leads_to_an_answer(models):
    """The models used to see the question alone, and ended the text."""
    found = chosen(models, BARE, "bare", "bare")
    assert (found.small, found.base) == (QUESTION, QUESTION)
    assert found.reason and repr(QUESTION) in found.reason


def test_rows_that_hold_what_stands_between_are_joined_as_they_are(models):
    found = chosen(models, LED)
    assert (found.small, found.base) == ("plain", "plain")
    assert found.chat == "plain", "messages are read as the rows were"


def test_texts_need_no_format_and_say_nothing(models):
    found = chosen(models, TEXT)
    assert (found.small, found.base, found.chat, found.reason) == ("plain", "plain", None, None)


def test_messages_without_a_template_take_the_bases_or_are_joined(models):
    assert chosen(models, CHAT, "bare", "chat").small == CHAT_TEMPLATE
    assert chosen(models, CHAT, "bare", "bare").small == "plain"


def test_a_base_with_another_template_reads_the_small_models(models):
    found = chosen(models, BARE, "chat", "other")
    assert (found.small, found.base, found.are_equal) == ("chat", CHAT_TEMPLATE, True)


def test_a_given_template_is_every_models(models):
    found = chosen(models, BARE, template="Q: {{ prompt }}\nA:")
    assert found.small == found.base == "Q: {{ prompt }}\nA:"
    assert found.reason is None and found.are_equal


def test_the_base_may_have_a_template_of_its_own(models):
    found = chosen(models, BARE, template="plain", base_template="chat")
    assert (found.small, found.base, found.are_equal) == ("plain", "chat", False)


def test_chat_for_both_is_not_the_same_where_the_templates_differ(models):
    assert chosen(models, BARE, template="chat", base_template="chat").are_equal
    differ = chosen(models, BARE, "chat", "other", template="chat", base_template="chat")
    assert not differ.are_equal


@pytest.mark.parametrize("template", ["chatml", "{{ prompt"])
def test_a_template_that_is_none_is_refused(models, template):
    with pytest.raises(PromptFormatError):
        chosen(models, BARE, template=template)


def test_chat_is_refused_where_the_small_model_has_no_chat_template(models):
    with pytest.raises(PromptFormatError, match="no chat template"):
        chosen(models, BARE, "bare", template="chat")


@pytest.mark.parametrize(
    ("prompt", "completion", "holds"),
    [
        ("How?", "Fine.", False),
        ("How?\nAnswer:", "Fine.", True),
        ("How?\n", "Fine.", True),
        ("How?", " Fine.", True),
        ("", "Fine.", False),
    ],
)
def test_rows_hold_what_stands_between_if_most_do(prompt, completion, holds):
    one = {"prompt": prompt, "completion": completion}
    assert read_rows([one, one, BARE[0]]).hold_what_stands_between is holds
    assert not read_rows([one, BARE[0]]).hold_what_stands_between
