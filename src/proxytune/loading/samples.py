"""Short prompts as each model of a recipe sees them, and where the models' views part.

`doctor` shows them. A model that reads something else than its partner adds that difference to the offset at
every token, which is seldom meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from proxytune.errors import UserError
from proxytune.recipe.recipe import Recipe
from proxytune.request import Message
from proxytune.text.prompts import PromptFormat

TEXT = "What is steering?"
MESSAGE: Sequence[Message] = [{"role": "user", "content": TEXT}]
CONVERSATION: Sequence[Message] = [
    *MESSAGE,
    {"role": "assistant", "content": "A small push."},
    *MESSAGE,
]
"""Compared, too: templates may part only after an answer."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one model sees.

    Args:
        text: The tokens of a text.
        chat: The tokens of a user's message; the reason as an error if it cannot be rendered.
        conversation: The tokens of a longer conversation; None if it cannot be rendered.
    """

    text: tuple[str, ...]
    chat: tuple[str, ...] | UserError
    conversation: tuple[str, ...] | None


def sample_of(own: PromptFormat, name: str) -> Sample:
    """Return what a model sees.

    Raises:
        UserError: Its text format cannot render a text.
    """
    tokenizer = own.tokenizer

    def tokens(token_ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(str(tokenizer.decode([token_id])) for token_id in token_ids)

    text = tokens(own.render(TEXT, name))
    chat: tuple[str, ...] | UserError
    try:
        chat = tokens(own.render(MESSAGE, name))
    except UserError as error:
        return Sample(text, error, None)
    try:
        return Sample(text, chat, tokens(own.render(CONVERSATION, name)))
    except UserError:  # Templates may refuse what others allow.
        return Sample(text, chat, None)


def notes_on(
    recipe: Recipe, samples: Mapping[str, Sample], formats: Mapping[str, PromptFormat]
) -> Iterator[str]:
    """Yield what to know about how a recipe's models read prompts, in words.

    Args:
        recipe: The recipe.
        samples: What the models see, by part; parts that cannot be read are missing.
        formats: How they read prompts, by part.
    """
    for part, sample in samples.items():
        is_given = recipe.models[part].given_chat is not None
        if isinstance(sample.chat, UserError) and not is_given:
            yield f"{part}: it cannot read messages: {_first_line(sample.chat)}"
    base = samples.get("base")
    for pair in recipe.experts:
        expert, anti_expert = (
            samples.get(f"{pair.name}.{side}") or base for side in ("expert", "anti_expert")
        )
        if expert is None or anti_expert is None:
            continue
        for what, one, other in _views(expert, anti_expert):
            if one != other:
                yield (
                    f"{pair.name}: expert and anti-expert read {what} differently, and steering adds that "
                    f"difference at every token: {_parted(one, other)}"
                )
        if base is None or recipe.vocabulary != "same":
            continue  # Another tokenizer's tokens differ anyway.
        for what, one, other in _views(base, expert):
            if one != other:
                yield (
                    f"{pair.name}: base and expert read {what} differently, so transformers and vLLM, where "
                    f"all models read the same tokens, refuse {what}: {_parted(one, other)}"
                )
    short = [
        part
        for part, sample in samples.items()
        if not isinstance(sample.chat, UserError) and formats[part].is_single_turn
    ]
    if short:
        named = " and ".join(filter(None, (", ".join(short[:-1]), short[-1])))
        owner = "its" if len(short) == 1 else "their"
        yield (
            f"of a conversation, {named} read{'s' if len(short) == 1 else ''} the last question only, "
            f"because {owner} template does not use `messages`"
        )
    if formats and all(own.joins_messages for own in formats.values()):
        yield (
            "no model has a chat template, so the messages of a conversation are joined as `User: …` and "
            '`Assistant: …`; "chat" in the recipe sets another format'
        )


def _views(
    one: Sample, other: Sample
) -> Iterator[tuple[str, tuple[str, ...] | None, tuple[str, ...] | None]]:
    yield "a text", one.text, other.text
    if isinstance(one.chat, UserError) or isinstance(other.chat, UserError):
        return
    if one.chat != other.chat:
        yield "messages", one.chat, other.chat
    else:
        yield "messages", one.conversation, other.conversation


def _parted(one: tuple[str, ...] | None, other: tuple[str, ...] | None) -> str:
    """Return where two lists of tokens begin to differ."""
    if one is None or other is None:
        return "one of them refuses a conversation that the other accepts"
    start = next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )
    return f"{_shown(one, start)} and {_shown(other, start)}"


def _shown(tokens: Sequence[str], start: int, num: int = 8) -> str:
    # At the end of one of them, the last common token is shown.
    start = max(0, min(start, len(tokens) - 1))
    return repr("".join(tokens[start : start + num]))


def _first_line(error: UserError) -> str:
    return str(error).split("\n", 1)[0]
