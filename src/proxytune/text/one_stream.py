"""How a recipe's models read messages, as one chat template.

transformers and vLLM render a conversation themselves, with the tokenizer's chat template, and all models
read the same tokens. So the recipe's tokenizer there gets a template that writes what the library renders for
every model. If the models read messages differently there is none, and the template says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from proxytune.text import template
from proxytune.text.prompts import PromptFormat, added_tokens, check_syntax

_DIFFERENT = (
    "base and {} of this recipe read messages in different formats, but here all models read one prompt: "
    "`proxytune serve` and ProxyTuned render each model's own"
)

_JOINED = """\
{%- set ns = namespace(single=messages[-1].role == 'user', text=PREFIX, started=false) -%}
{%- for message in messages[:-1] -%}
  {%- if message.role != 'system' -%}{%- set ns.single = false -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set part = message.content -%}
  {%- if not ns.single and message.role != 'system' -%}
    {%- set part = message.role | capitalize ~ ': ' ~ part -%}
  {%- endif -%}
  {%- if part -%}
    {%- set ns.text = ns.text ~ ('\\n\\n' if ns.started else '') ~ part -%}
    {%- set ns.started = true -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.single -%}
  {%- set ns.text = ns.text ~ ('\\n\\n' if ns.started else '') ~ 'Assistant:' -%}
{%- endif -%}
{{- ns.text -}}"""
"""`plain`; PREFIX stands for the special tokens before a text."""

_QUESTION = """\
{%- set ns = namespace(prompt='') -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set ns.prompt = message.content -%}{%- endif -%}
{%- endfor -%}
{%- set prompt = ns.prompt -%}{{ '' }}"""
"""Sets `prompt`, which a template of a recipe may use; the empty string keeps a line break that follows."""

# transformers marks the end of a message that is to be continued, and cuts there.
_CONTINUED = """\
{%- set text -%}{{ '' }}SOURCE{{ '' }}{%- endset -%}
{{- text -}}
{%- if messages[-1].role == 'assistant' and not add_generation_prompt -%}
  {%- set content = messages[-1].content -%}
  {{- '' if not text or text[-1].isspace() or content[:1].isspace() else ' ' -}}{{- content -}}
{%- endif -%}"""
"""A template that shows only a question, SOURCE, with an answer that is to be continued."""


def one_template(formats: Mapping[str, PromptFormat]) -> str:
    """Return the chat template with which an engine of one token stream renders a recipe's messages.

    Args:
        formats: The prompt format of each part, the base first.

    Raises:
        PromptFormatError: A template of the recipe is malformed.
    """
    base = next(iter(formats.values()))
    wanted = _kind(base)
    for part, own in formats.items():
        if _kind(own) != wanted:
            return "{{- raise_exception(" + json.dumps(_DIFFERENT.format(part)) + ") -}}"
    return as_template(base)


def as_template(own: PromptFormat) -> str:
    """Return a chat template for transformers that writes what a member reads.

    Raises:
        PromptFormatError: The recipe's own template is malformed.
    """
    check_syntax(own.chat, "the recipe")
    if own.chat == "plain":
        return _JOINED.replace("PREFIX", json.dumps("".join(_tokens_before(own.tokenizer))))
    if own.chat == "chat":
        return own.template or ""
    source, names = own.chat, template.names(own.chat, strict=True)
    if "messages" not in names:
        return _QUESTION + _CONTINUED.replace("SOURCE", source)
    # transformers drops a line break at a template's end.
    ending = "{{ '' }}" if source.endswith("\n") else ""
    return (_QUESTION if "prompt" in names else "") + source + ending


def _kind(own: PromptFormat) -> tuple[Any, ...]:
    """Return what two formats have in common if they write the same for all messages, in the same tokens."""
    source = as_template(own)
    named = getattr(own.tokenizer, "special_tokens_map", {})
    used = template.names(source, strict=False) if own.chat != "plain" else ()
    values = {name: str(named[name]) for name in used if name in named}
    written = "\n".join((source, *values.values()))
    # A token that only one tokenizer has added is several tokens to the other.
    added = sorted(token for token in added_tokens(own.tokenizer) if token in written)
    return source, values, added


def _tokens_before(tokenizer: Any) -> list[str]:
    """Return the special tokens that the tokenizer puts before a text."""
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    whole = list(tokenizer.encode("a", add_special_tokens=True))
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return [str(token) for token in tokenizer.convert_ids_to_tokens(whole[:start])]
