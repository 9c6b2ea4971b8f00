"""How each model of a recipe reads texts and messages.

A recipe says it with `prompt` (for texts) and `chat` (for messages). Where it does not say how a model reads
messages, the first of these counts:

1. for an anti-expert, what the recipe gives its expert: their difference is meant for one text, and the
   expert was tuned on this format;
2. the chat template of the model's own tokenizer;
3. for a small model without one, what its partner reads, then what the base reads;
4. `plain`: the messages are joined, as `text/prompts.py` describes.

Files are read here, and no weights.
"""

from __future__ import annotations

from proxytune.errors import PromptFormatError
from proxytune.recipe.files import RecipeFiles
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.text.prompts import PromptFormat, Tokenizer, own_template


def find_formats(files: RecipeFiles) -> dict[str, PromptFormat]:
    """Return the prompt format of each part of a recipe that is not the base itself.

    Raises:
        UserError: A tokenizer is missing, unsafe or corrupt; see `errors.py`.
    """
    found = {"base": base_format(files)}
    for pair in files.recipe.experts:
        found |= pair_formats(pair, files, found["base"])
    return found


def base_format(files: RecipeFiles) -> PromptFormat:
    """Return how the base reads prompts; errors as of `find_formats`."""
    return _format(files.recipe.base, files)


def pair_formats(
    pair: ExpertSpec, files: RecipeFiles, base: PromptFormat
) -> dict[str, PromptFormat]:
    """Return how expert and anti-expert read prompts, by part; errors as of `find_formats`."""
    specs = {"expert": pair.expert, "anti_expert": pair.anti_expert}
    formats = {side: _format(spec, files) for side, spec in specs.items() if not spec.same_as}
    if len(formats) == 2:
        expert, anti_expert = formats["expert"], formats["anti_expert"]
        if pair.anti_expert.given_chat is None and pair.expert.given_chat is not None:
            anti_expert = _like(anti_expert, expert)
        if pair.expert.given_chat is None:
            expert = _or_like(expert, anti_expert)
        if pair.anti_expert.given_chat is None:
            anti_expert = _or_like(anti_expert, expert)
        formats = {"expert": expert, "anti_expert": anti_expert}
    return {
        f"{pair.name}.{side}": own if specs[side].given_chat else _or_like(own, base)
        for side, own in formats.items()
    }


def _format(spec: ModelSpec, files: RecipeFiles) -> PromptFormat:
    """Return what a model reads by itself."""
    tokenizer: Tokenizer = files.checkpoint(spec).tokenizer
    try:
        template = own_template(tokenizer, spec.model or "")
    except PromptFormatError:
        # If it is asked for, rendering says what is wrong with it.
        template = None
    chat = spec.given_chat or ("plain" if template is None else "chat")
    return PromptFormat(spec.prompt, chat, template, tokenizer)


def _or_like(own: PromptFormat, other: PromptFormat) -> PromptFormat:
    return _like(own, other) if own.joins_messages else own


def _like(own: PromptFormat, other: PromptFormat) -> PromptFormat:
    """Return a format that reads messages as another model does; `chat` stays its own template, if any."""
    return PromptFormat(own.text, other.chat, own.template or other.template, own.tokenizer)
