"""How each model reads texts and messages where the recipe does not say, and what `doctor` says of it."""

from __future__ import annotations

from typing import Any

import pytest

from proxytune.loading.doctor import examine
from proxytune.loading.formats import find_formats
from proxytune.model import ProxyTuned
from proxytune.recipe.files import RecipeFiles
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams
from tests.support.tiny import tiny_model, tiny_tokenizer

OTHER = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
QUESTION = "Question: {{ prompt }}\nAnswer:"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`chat` and `other` have a chat template, `bare` has none, `ends` puts the end of a text after it."""
    from tokenizers.processors import TemplateProcessing

    directory = tmp_path_factory.mktemp("formats")
    tiny_model(directory / "chat", seed=1)
    tiny_model(directory / "other", seed=2, tokenizer=tiny_tokenizer(chat_template=OTHER))
    bare = tiny_tokenizer()
    bare.chat_template = None
    tiny_model(directory / "bare", seed=3, tokenizer=bare)
    ends = tiny_tokenizer()
    end = ends.convert_tokens_to_ids("<|im_end|>")
    ends.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    tiny_model(directory / "ends", seed=4, tokenizer=ends)
    return directory


def _recipe(directory: Any, base: Any, expert: Any, anti_expert: Any) -> Recipe:
    def spec(given: Any) -> ModelSpec:
        return ModelSpec(model=given) if isinstance(given, str) else ModelSpec(**given)

    pair = ExpertSpec("x", spec(expert), spec(anti_expert))
    return Recipe(base=spec(base), experts=(pair,), directory=directory)


CHAT, BARE = {"model": "chat"}, {"model": "bare"}
TEMPLATE = "the tokenizer's"


@pytest.mark.parametrize(
    ("base", "expert", "anti_expert", "read"),
    [
        # Base models: messages are joined.
        ("bare", "bare", "bare", ("plain", "plain", "plain")),
        # Instruct models: each its own template.
        ("chat", "chat", "chat", ("chat", "chat", "chat")),
        ("chat", "other", "chat", ("chat", "other's", "chat")),
        # A mixture: the pair reads what one of them was tuned on, and the base its own.
        ("bare", "chat", "bare", ("plain", "chat", "chat")),
        ("chat", "bare", "bare", ("chat", "chat", "chat")),
        ("bare", "bare", "chat", ("plain", "chat", "chat")),
        # What the recipe says, also with the key of old recipes, and for the plain partner, too.
        ("bare", BARE | {"prompt": QUESTION}, "bare", ("plain", QUESTION, QUESTION)),
        ("chat", CHAT | {"prompt": QUESTION}, "chat", ("chat", QUESTION, QUESTION)),
        ("chat", CHAT | {"chat": QUESTION}, "chat", ("chat", QUESTION, QUESTION)),
        ("chat", "chat", CHAT | {"chat": "plain"}, ("chat", "chat", "plain")),
        (CHAT | {"chat": "plain"}, "chat", "chat", ("plain", "chat", "chat")),
        (CHAT | {"prompt": QUESTION, "chat": "chat"}, "chat", "chat", ("chat", "chat", "chat")),
    ],
)  # fmt: skip
def test_where_a_recipe_does_not_say_how_messages_are_read(models, base, expert, anti_expert, read):
    found = find_formats(RecipeFiles(_recipe(models, base, expert, anti_expert)))

    def shown(own: Any) -> str:
        return "other's" if own.chat == "chat" and own.template == OTHER else str(own.chat)

    parts = ("base", "x.expert", "x.anti_expert")
    assert tuple(shown(found[part]) for part in parts) == read


def test_texts_stay_what_they_were(models):
    recipe = _recipe(models, "chat", CHAT | {"prompt": "chat"}, "chat")
    found = find_formats(RecipeFiles(recipe))
    assert [own.text for own in found.values()] == ["plain", "chat", "plain"]
    job = ProxyTuned.load(recipe).job(Request("Hi", SamplingParams(max_new_tokens=1)))
    base, expert = job.prompts  # base and anti-expert are one member here
    assert len(base) < len(expert)


def test_an_end_that_a_tokenizer_puts_after_a_text_is_left_off(models):
    model = ProxyTuned.load(_recipe(models, "chat", "ends", "chat"))
    job = model.job(Request("the end", SamplingParams(max_new_tokens=1)))
    assert len({tuple(prompt) for prompt in job.prompts}) == 1


def test_doctor_shows_what_models_see_and_where_they_part(models):
    same = examine(_recipe(models, "chat", "chat", "chat"))
    assert not same.notes
    parted = examine(_recipe(models, "chat", "other", "chat"))
    parted.raise_first()
    first, second = parted.notes
    assert first.startswith(
        "x: expert and anti-expert read messages differently, and steering adds"
    )
    assert "'<user>Wha" in first and "'<|im_start|>user" in first
    assert second.startswith(
        "x: base and expert read messages differently, so transformers and vLLM"
    )


def test_doctor_says_how_messages_are_joined_where_no_model_has_a_template(models):
    (note,) = examine(_recipe(models, "bare", "bare", "bare")).notes
    assert "are joined as `User: …` and `Assistant: …`" in note


def test_doctor_names_a_chat_template_that_fails_and_the_recipe_still_runs(models, tmp_path):
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('no chats today') }}")
    tiny_model(tmp_path / "angry", seed=5, tokenizer=tokenizer)
    diagnosis = examine(_recipe(models, str(tmp_path / "angry"), "chat", "chat"))
    diagnosis.raise_first()
    assert any(
        "base: it cannot read messages" in note and "no chats" in note for note in diagnosis.notes
    )


def test_doctor_says_where_only_the_last_question_is_read(models):
    asked = CHAT | {"prompt": QUESTION}
    notes = examine(_recipe(models, asked, asked, asked)).notes
    assert notes == (
        "of a conversation, base, x.expert and x.anti_expert read the last question only, because their "
        "template does not use `messages`",
    )
