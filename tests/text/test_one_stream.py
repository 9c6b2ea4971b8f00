"""A recipe's formats as one chat template: transformers renders what the library renders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from proxytune.errors import PromptFormatError
from proxytune.request import ChatOptions
from proxytune.text.one_stream import as_template, one_template
from proxytune.text.prompts import PromptFormat
from tests.support.tiny import tiny_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi, Zoë <b>\n"}
HELLO = {"role": "assistant", "content": " Hello."}
MORE = {"role": "user", "content": "More"}
CHATS = ([HI], [SYSTEM, HI], [HI, HELLO, MORE], [SYSTEM, HI, HELLO, MORE], [HI, MORE])
FORMATS = (
    "plain",
    "chat",
    "Question: {{ prompt }}\nAnswer:",
    "{{ bos_token }}{{ prompt }}\n",
    "\n{{ prompt }}",
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{{ prompt }}{% for m in messages %}|{{ m.content }}{% endfor %}\n",
)


def _format(chat: str, tokenizer: Any = None) -> PromptFormat:
    tokenizer = tokenizer or tiny_tokenizer()
    return PromptFormat("plain", chat, str(tokenizer.chat_template), tokenizer)


def _with_start() -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def _in_transformers(own: PromptFormat, messages: Any, **options: Any) -> list[int]:
    tokenizer: Any = own.tokenizer
    tokenizer.chat_template = as_template(own)
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("chat", FORMATS)
@pytest.mark.parametrize("has_start", [False, True])
@pytest.mark.parametrize("messages", CHATS)
def test_transformers_renders_what_the_library_renders(chat, has_start, messages):
    own = _format(chat, _with_start() if has_start else tiny_tokenizer())
    expected = own.render(messages, "base")
    assert _in_transformers(own, messages, add_generation_prompt=True) == expected


@pytest.mark.parametrize("chat", FORMATS)
@pytest.mark.parametrize("content", ["Hel", " Hel", "Hel "])
def test_a_message_is_continued_alike(chat, content):
    own = _format(chat)
    messages = [HI, {"role": "assistant", "content": content}]
    expected = own.render(messages, "base", ChatOptions(continue_final_message=True))
    assert _in_transformers(own, messages, continue_final_message=True) == expected


def test_models_that_read_messages_alike_share_a_template():
    base = _format("chat")
    assert one_template({"base": base, "a.expert": _format("chat")}) == base.template


def test_a_template_that_one_model_cannot_share_says_so():
    formats = {"base": _format("chat"), "a.expert": _format("plain")}
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = one_template(formats)
    with pytest.raises(Exception, match=r"base and a\.expert of this recipe read messages in diff"):
        tokenizer.apply_chat_template([HI], tokenize=False)


def test_a_token_that_one_model_lacks_counts_where_a_template_writes_it():
    template = "<tool>{{ messages[0].content }}"
    own, other = tiny_tokenizer(extra_tokens=["<tool>"]), tiny_tokenizer(extra_tokens=["<pad>"])
    formats = [replace(_format(template), tokenizer=tokenizer) for tokenizer in (own, other)]
    assert "raise_exception" in one_template(dict(zip(("base", "a.expert"), formats, strict=True)))
    formats = [replace(own, chat="{{ messages[0].content }}") for own in formats]
    one = one_template(dict(zip(("base", "a.expert"), formats, strict=True)))
    assert one == "{{ messages[0].content }}"


def test_special_tokens_count_where_a_template_writes_them():
    own, other = tiny_tokenizer(), tiny_tokenizer()
    other.eos_token = "<|endoftext|>"
    own.eos_token = "<|im_end|>"
    template = "{{ messages[0].content }}{{ eos_token }}"
    formats = [replace(_format(template), tokenizer=tokenizer) for tokenizer in (own, other)]
    assert "raise_exception" in one_template(dict(zip(("base", "a.expert"), formats, strict=True)))


def test_a_template_that_hides_the_last_message_cannot_continue_it():
    with pytest.raises(PromptFormatError, match="does not show the last message"):
        _format("{{ messages[0].content }}").render(
            [HI, HELLO], "base", ChatOptions(continue_final_message=True)
        )
