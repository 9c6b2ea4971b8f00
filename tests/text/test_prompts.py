"""Text and conversations become each model's token ids in its own format."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxytune.errors import InvalidRequest, PromptFormatError
from proxytune.text.prompts import (
    PLAIN_USER_TURN,
    behave_alike,
    check_syntax,
    continuation_ids,
    render,
)
from tests.support.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()

SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello."}
MORE = {"role": "user", "content": "More"}


def _text(prompt: Any, prompt_format: str, tokenizer: Any = TOKENIZER) -> str:
    token_ids = render(prompt, prompt_format=prompt_format, tokenizer=tokenizer, name="small/model")
    return str(tokenizer.decode(token_ids))


def _with_bos() -> Any:
    """A tokenizer that begins each text with a special token, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def test_plain_text_is_tokenised_as_it_is():
    token_ids = render("the end", prompt_format="plain", tokenizer=TOKENIZER, name="base")
    assert token_ids == TOKENIZER.encode("the end")


def test_plain_text_gets_the_special_tokens_that_the_tokenizer_usually_adds():
    assert _text("Hi", "plain", _with_bos()) == "<|im_start|>Hi"


def test_text_in_the_chat_format_is_one_user_message_before_the_assistants_turn():
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert _text("Hi", "chat") == _text([HI], "chat") == expected


def test_special_tokens_are_not_added_to_what_a_template_wrote():
    assert _text("Hi", "chat", _with_bos()).count("<|im_start|>") == 2  # the template's own
    assert _text("Hi", "{{ prompt }}", _with_bos()) == "Hi"
    assert _text("Hi", "{{ bos_token }}{{ prompt }}", _with_bos()) == "<|im_start|>Hi"


def test_a_conversation_keeps_its_turns_in_the_chat_format():
    assert _text([SYSTEM, HI, HELLO, MORE], "chat") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_single_user_message_is_its_text_in_the_plain_format():
    assert _text([HI], "plain") == "Hi"
    assert _text([SYSTEM, HI], "plain") == "Be brief.\n\nHi"


def test_a_longer_conversation_names_the_speakers_in_the_plain_format():
    text = _text([SYSTEM, HI, HELLO, MORE], "plain")
    assert text == "Be brief.\n\nUser: Hi\n\nAssistant: Hello.\n\nUser: More\n\nAssistant:"
    assert text.count(PLAIN_USER_TURN) == 2


def test_the_assistant_begins_a_new_turn_after_its_own_message():
    assert _text([HI, HELLO], "plain") == "User: Hi\n\nAssistant: Hello.\n\nAssistant:"


def test_a_jinja_template_sees_the_last_user_message_and_the_tokenizers_tokens():
    template = "[INST] {{ prompt }} [/INST]{{ eos_token }}"
    assert _text("Hi", template) == "[INST] Hi [/INST]<|endoftext|>"
    assert _text([HI, HELLO, MORE], template) == "[INST] More [/INST]<|endoftext|>"


def test_a_token_that_the_tokenizer_does_not_have_is_empty_in_a_template():
    assert TOKENIZER.bos_token is None
    assert _text("Hi", "{{ bos_token }}{{ prompt }}") == "Hi"


def test_a_chat_template_can_be_copied_into_a_recipe():
    messages = [SYSTEM, HI, HELLO, MORE]
    assert _text(messages, TOKENIZER.chat_template) == _text(messages, "chat")


def test_a_final_newline_of_a_template_stays():
    assert _text("Hi", "{{ prompt }}\n### Response:\n") == "Hi\n### Response:\n"


def test_a_template_may_ask_whether_a_variable_is_there():
    assert _text("Hi", "{% if thinking %}thinking{% endif %}{{ prompt }}") == "Hi"
    assert _text("Hi", "{% if thinking is defined %}thinking{% endif %}{{ prompt }}") == "Hi"


def test_a_template_sees_that_there_are_no_tools_as_chat_templates_do():
    assert _text("Hi", "{% if tools is not none %}tools{% endif %}{{ prompt }}") == "Hi"
    assert _text("Hi", "{% if documents is defined %}{{ prompt }}{% endif %}") == "Hi"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ promt }}", "'promt' is undefined"),
        ("{% for m in mesages %}{{ m }}{% endfor %}", "'mesages' is undefined"),
        ("{{ messages[5].content }}", "list object has no element 5"),
        ("{{ raise_exception('one user message, please') }}", "one user message, please"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_a_template_that_fails_is_refused_with_its_reason(template, why):
    with pytest.raises(PromptFormatError, match=why) as raised:
        _text("Hi", template)
    assert "small/model" in str(raised.value) and "hint: " in str(raised.value)


@pytest.mark.parametrize(
    "template", ["{{ prompt", "{% for %}", "a\n{{ prompt | shout }}", "{{" + "(" * 5000]
)
def test_a_malformed_template_is_refused_before_any_tokenizer_is_there(template):
    with pytest.raises(PromptFormatError, match="the prompt template of small/model is malformed"):
        check_syntax(template, "small/model")


def test_the_line_of_a_malformed_template_is_named():
    with pytest.raises(PromptFormatError, match="in line 2: No filter named 'shout'"):
        check_syntax("a\n{{ prompt | shout }}", "small/model")


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(
        PromptFormatError, match='\'chatml\', which is not "plain", "chat" or a Jinja'
    ):
        _text("Hi", "chatml")


@given(st.text(alphabet="{}%# promtifends()[]'|.\n", max_size=30))
def test_any_format_is_known_or_refused(prompt_format):
    for candidate in (prompt_format, "{{" + prompt_format, "{%" + prompt_format):
        with contextlib.suppress(PromptFormatError):
            assert check_syntax(candidate, "base") in ("plain", "chat", "jinja")


def test_the_chat_format_needs_a_chat_template_and_the_hint_works():
    tokenizer = tiny_tokenizer(chat_template=None)
    with pytest.raises(PromptFormatError, match="small/model has no chat template"):
        _text("Hi", "chat", tokenizer)
    assert _text("Hi", "plain", tokenizer) == "Hi"
    assert _text("Hi", "User: {{ prompt }}\nAssistant:", tokenizer) == "User: Hi\nAssistant:"


def test_a_chat_template_that_refuses_a_conversation_says_why():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}hi"
    tokenizer = tiny_tokenizer(chat_template=template)
    assert _text([HI], "chat", tokenizer) == "hi"
    with pytest.raises(PromptFormatError, match=r"\(roles system, user\): no system role"):
        _text([SYSTEM, HI], "chat", tokenizer)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(InvalidRequest, match="has no tokens for small/model"):
        _text("Hi", "{{ '' }}")
    with pytest.raises(InvalidRequest, match="has no tokens for small/model"):
        _text([{"role": "user", "content": ""}], "plain")


def test_a_format_that_a_model_has_renders_and_others_are_refused():
    for prompt_format in ("plain", "chat", "{{ prompt }}"):
        render("Hello", prompt_format=prompt_format, tokenizer=TOKENIZER, name="small/model")
    for prompt_format in ("chat", "{{ promt }}", "chatml"):
        with pytest.raises(PromptFormatError):
            render(
                "Hello",
                prompt_format=prompt_format,
                tokenizer=tiny_tokenizer(chat_template=None),
                name="small/model",
            )


def test_the_messages_of_the_caller_are_left_alone():
    messages = [dict(SYSTEM), dict(HI)]
    for prompt_format in ("plain", "chat", "{{ messages[0].update({'content': 'x'}) or prompt }}"):
        try:
            _text(messages, prompt_format)
        except PromptFormatError:
            assert "update" in prompt_format
    assert messages == [SYSTEM, HI]


def sentencepiece_like_tokenizer():
    """Return a tokenizer that writes a space before any text, as those of Llama 2 and Mistral do."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "\u2581", "\n", "a", "b", "\u2581a", "\u2581b"]
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[("\u2581", "a"), ("\u2581", "b")],
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Replace("\u2581", " ")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("a b", ["a", "\u2581b"]), (" a", ["\u2581a"]), ("\na", ["\n", "a"]), ("", [])],
)
def test_a_continuation_has_no_space_that_its_text_does_not_have(text, tokens):
    tokenizer = sentencepiece_like_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a")) == ["\u2581a"]
    assert tokenizer.convert_ids_to_tokens(continuation_ids(text, tokenizer)) == tokens


def test_a_continuation_in_byte_level_tokens_is_its_plain_encoding():
    tokenizer = tiny_tokenizer()
    for text in ("the tin", " the tin", "\n\nthe"):
        assert continuation_ids(text, tokenizer) == tokenizer.encode(text)


@pytest.mark.parametrize(
    "other",
    [
        _with_bos(),
        tiny_tokenizer(chat_template="{{ messages[0]['content'] }}"),
        tiny_tokenizer(shuffle_seed=1),
        tiny_tokenizer(extra_tokens=["new"]),
        tiny_tokenizer(
            merges=[
                ("t", "h"),
                ("th", "e"),
                ("i", "n"),
                ("a", "n"),
                ("a", "t"),
                ("o", "n"),
                ("e", "r"),
            ]
        ),
    ],
    ids=["begins texts", "chats", "numbers", "has more", "cuts"],
)
def test_tokenizers_that_do_something_else_do_not_behave_alike(other):
    assert behave_alike(TOKENIZER, tiny_tokenizer())
    assert not behave_alike(TOKENIZER, other) and not behave_alike(other, TOKENIZER)
