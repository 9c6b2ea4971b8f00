"""What stands around a question: how the models of a run read what rows hold and what people type.

Rows hold what people type and what they are to read. The words and tokens around that, such as `Question:`
before a question and `Answer:` after it, are the recipe's *format*, once. Training renders rows in it, and
the recipe takes it along, so that `generate`, `chat` and `serve` send the models what they were trained on.

A format that nobody chose leads to an answer. After a bare question, models end the text, or go on asking.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxytune.checkpoints.checkpoint import Checkpoint
from proxytune.data.rows import Rows
from proxytune.errors import PromptFormatError
from proxytune.text.prompts import Tokenizer, check_syntax, own_template
from proxytune.tune.settings import TuneSettings

QUESTION = "Question: {{ prompt }}\nAnswer:"
"""The format of rows with bare questions, where the small model has no chat template."""


@dataclass(frozen=True, slots=True)
class Formats:
    """How the models of a run read prompts: each `plain`, `chat` or a Jinja template.

    Args:
        small: Of expert and anti-expert.
        base: Of the base.
        reason: Why the format was chosen, for the user; None if it was asked for, or if nothing is chosen
            because the rows are texts.
        chat: How all of them read messages; None where that follows from the other two.
        are_equal: Whether base and small models see the same text, so that one sequence of tokens can be
            trained through all of them.
    """

    small: str
    base: str
    reason: str | None
    chat: str | None
    are_equal: bool


def formats_of(
    settings: TuneSettings, rows: Rows, small: Checkpoint, base: Checkpoint | None
) -> Formats:
    """Return the formats to train and generate with.

    Args:
        settings: `template` and `base_template`, if they are given.
        rows: The training rows.
        small: The model to tune.
        base: The large model; None if there is none.

    Raises:
        PromptFormatError: A format is of no known kind or malformed, or `chat` is asked for and the small
            model has no chat template.
    """
    own, reason = settings.template, None
    if own is None:
        own, reason = _chosen(rows, small, base)
    kind = check_syntax(own, small.name)
    template = own_template(small.tokenizer, small.name) if kind == "chat" else None
    of_base = settings.base_template
    # Messages are read as the rows were, which for rows joined as they are is no chat template.
    chat = "plain" if own == "plain" and rows.kind != "text" else None
    if of_base is None:
        # A base with a template of its own reads the small model's, so that both see the same text.
        differs = base is not None and template != _template(base.tokenizer)
        return Formats(
            own, template if template is not None and differs else own, reason, chat, True
        )
    if base is not None:
        check_syntax(of_base, base.name)
    shown = [template or own, of_base]
    if of_base == "chat" and base is not None:
        shown[1] = own_template(base.tokenizer, base.name)
    return Formats(own, of_base, reason, chat, shown[0] == shown[1])


def _chosen(rows: Rows, small: Checkpoint, base: Checkpoint | None) -> tuple[str, str | None]:
    """Return the format of rows whose user chose none, and why."""
    if rows.kind == "text":
        return "plain", None
    if not rows.is_conversation and rows.hold_what_stands_between:
        return "plain", (
            "the rows hold what stands between prompt and answer, so they are joined as they are, and your "
            "prompts have to end in the same way (--template plain)"
        )
    if _template(small.tokenizer):
        kept = "messages are" if rows.is_conversation else "what people type is"
        return "chat", f"{kept} rendered with the chat template of {small.name} (--template chat)"
    if not rows.is_conversation:
        return QUESTION, (
            f"{small.name} has no chat template, so a question stands in {QUESTION!r}; --template changes "
            "that"
        )
    if base is not None and (template := _template(base.tokenizer)):
        return template, (
            f"{small.name} has no chat template, so messages are rendered with the one of {base.name}"
        )
    return "plain", (
        f"{small.name} has no chat template, so messages are joined as plain text; --template changes that"
    )


def _template(tokenizer: Tokenizer) -> str | None:
    """Return a tokenizer's chat template, if it has one that can be used."""
    try:
        return own_template(tokenizer, "the model")
    except PromptFormatError:
        return None
