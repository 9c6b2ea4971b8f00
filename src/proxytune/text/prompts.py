"""Turns text or a conversation into each model's token ids.

Every model of a recipe has a prompt format and renders the same prompt in its own way: the expert may need
its chat template where the base sees plain text. A format is

- `plain`: the text as it is, with the special tokens that the tokenizer usually adds;
- `chat`: the tokenizer's chat template, ready for the assistant's turn;
- a Jinja template, recognised by `{{` or `{%`. It sees `messages`, `prompt` (the text of the last user
  message), `bos_token`, `eos_token` and `add_generation_prompt`, and writes its special tokens itself. A chat
  template can be copied, since it also sees what transformers gives to one.

Both kinds of templates are rendered by `template.py`, in the language of transformers and within its bounds.
Prompts given as token ids do not pass through here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jinja2

from proxytune.errors import InvalidRequest, PromptFormatError
from proxytune.request import Message, Prompt
from proxytune.text import template
from proxytune.text.meter import TemplateRefused


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """One member's prompt format and tokenizer."""

    prompt_format: str
    tokenizer: Tokenizer


_MAX_REASON = 1000
"""Characters of a template's own message that an error repeats."""
PLAIN_USER_TURN = "\n\nUser:"
"""The beginning of the user's next turn in a longer conversation in the `plain` format."""


class ChatPrompt(tuple[int, ...]):
    """Token ids together with the messages they were rendered from.

    Only a base behind a chat endpoint uses the messages, since it renders them itself.
    """

    messages: tuple[Message, ...]

    @classmethod
    def of(cls, token_ids: Sequence[int], prompt: Prompt) -> ChatPrompt:
        """Return these token ids with the text or messages they come from."""
        itself = cls(token_ids)
        itself.messages = tuple(_messages(prompt))
        return itself


class AskedPrompt(str):
    """A question as text for plain models, and as messages for chat models.

    The text ends where the answer begins, such as with `Answer:`. In a chat the question is the user's
    message, and the assistant's turn begins with that word. It can be used wherever a text can.

    Args:
        text: The prompt in the `plain` format.
        messages: The prompt in the other formats; the last message is the user's.
        answer_start: The beginning of the assistant's turn in those.
    """

    messages: tuple[Message, ...]
    answer_start: str

    def __new__(cls, text: str, messages: Sequence[Message], answer_start: str = "") -> AskedPrompt:
        """Make the text, with its messages beside it."""
        itself = super().__new__(cls, text)
        itself.messages = tuple(messages)
        itself.answer_start = answer_start
        return itself


class Tokenizer(Protocol):
    """What this package needs of a tokenizer; the ones of transformers have it."""

    @property
    def chat_template(self) -> Any:
        """A Jinja template, several by name, or None."""

    @property
    def bos_token(self) -> str | None:
        """The token that begins a sequence, if there is one."""

    @property
    def eos_token(self) -> str | None:
        """The token that ends a sequence, if there is one."""

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`."""

    @property
    def all_special_ids(self) -> Sequence[int]:
        """The ids of the named special tokens."""

    def get_vocab(self) -> Mapping[str, int]:
        """Return every token with its id, added tokens included."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Return the token ids of a text."""

    def decode(
        self,
        token_ids: Any,
        *,
        skip_special_tokens: bool = ...,
        clean_up_tokenization_spaces: bool = ...,
    ) -> Any:
        """Return the text of token ids."""

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Return the token strings of token ids."""


def behave_alike(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers treat every text and chat alike, as far as their settings show."""
    names = (
        "chat_template",
        "bos_token",
        "eos_token",
        "all_special_ids",
        "clean_up_tokenization_spaces",
    )
    differ = (getattr(one, name, None) != getattr(other, name, None) for name in names)
    if type(one) is not type(other) or any(differ):
        return False
    # What decides how a text is cut: tokens, normaliser, rules, merges, and what is added around it.
    mine, theirs = (getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (one, other))
    return mine is not None and theirs is not None and mine.to_str() == theirs.to_str()


def render(prompt: Prompt, *, prompt_format: str, tokenizer: Tokenizer, name: str) -> list[int]:
    """Return the token ids that one model sees.

    In the `plain` format, a single user message is its content, after the system message and a blank line if
    there is one. Longer conversations are written as `User: …`, `Assistant: …`, with blank lines between
    them and an open `Assistant:` at the end. That is our choice: models without a chat template have no
    convention. In every format the assistant begins a new turn, even after a message of its own.

    Args:
        prompt: Text or messages.
        prompt_format: `plain`, `chat` or a Jinja template.
        tokenizer: The model's tokenizer.
        name: The model's name in errors.

    Raises:
        InvalidRequest: The result has no tokens.
        PromptFormatError: The format is unknown, the tokenizer has no chat template, or a template fails.
    """
    text = render_text(prompt, prompt_format=prompt_format, tokenizer=tokenizer, name=name)
    # A template writes its special tokens itself.
    token_ids = tokenizer.encode(text, add_special_tokens=prompt_format == "plain")
    if not token_ids:
        raise InvalidRequest(
            f"the prompt has no tokens for {name} in the format {_shorten(prompt_format)}, so there is "
            "nothing to continue.\nhint: give at least one token of text"
        )
    return list(token_ids)


def render_each(
    prompt: Prompt, formats: Sequence[PromptFormat], names: Sequence[str]
) -> list[Sequence[int]]:
    """Return the token ids that each of several models sees; see `render`."""
    # Models that share a tokenizer and a format see the same; a long prompt takes a while to tokenise.
    known: dict[tuple[str, int], Sequence[int]] = {}
    keys = [(own.prompt_format, id(own.tokenizer)) for own in formats]
    for key, own, name in zip(keys, formats, names, strict=True):
        if key not in known:
            known[key] = render(prompt, prompt_format=key[0], tokenizer=own.tokenizer, name=name)
    return [known[key] for key in keys]


def text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return a plain text's token ids, without special tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def start_id(tokenizer: Tokenizer) -> int | None:
    """Return the token that the tokenizer puts before a text; None if there is none."""
    with_start = tokenizer.encode("a", add_special_tokens=True)
    bos = getattr(tokenizer, "bos_token", None)
    bos_id = None if bos is None else tokenizer.get_vocab().get(bos)
    return with_start[0] if with_start[0] == bos_id else None


def continuation_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a text that continues another.

    SentencePiece tokenizers put a space before any text, which belongs only before the first. A line break
    put before the text, and removed again, prevents that.
    """
    start = list(tokenizer.encode("\n", add_special_tokens=False))
    if len(start) > 1 and tokenizer.convert_ids_to_tokens(start)[0] == "\u2581":
        whole = list(tokenizer.encode("\n" + text, add_special_tokens=False))
        if whole[: len(start)] == start:
            return whole[len(start) :]
    return list(tokenizer.encode(text, add_special_tokens=False))


def render_text(
    prompt: Prompt,
    *,
    prompt_format: str,
    tokenizer: Tokenizer,
    name: str,
    add_generation_prompt: bool = True,
) -> str:
    """Return the text that `render` tokenises; arguments and errors are the same.

    `add_generation_prompt` begins the assistant's turn at the end, as generation needs it. Without it, a
    conversation that ends with the assistant's message shows how a format ends that turn.
    """
    kind = check_syntax(prompt_format, name)
    if kind == "plain" and isinstance(prompt, str):
        return prompt
    messages = _messages(prompt)
    if kind == "plain":
        return _plain_text(messages, add_generation_prompt)
    is_own = kind == "chat"
    text = _apply_template(
        _chat_template(tokenizer, name) if is_own else prompt_format,
        messages,
        tokenizer,
        name,
        is_own=is_own,
        add_generation_prompt=add_generation_prompt,
    )
    if isinstance(prompt, AskedPrompt) and prompt.answer_start:
        # A turn that begins on a line of its own, or after a space, needs no further one.
        text += prompt.answer_start if text[-1:].isspace() else " " + prompt.answer_start
    return text


def check_syntax(prompt_format: str, name: str) -> Literal["plain", "chat", "jinja"]:
    """Return the kind of a prompt format, without a tokenizer.

    Raises:
        PromptFormatError: It is of no known kind, or a malformed template.
    """
    if prompt_format == "plain":
        return "plain"
    if prompt_format == "chat":
        return "chat"
    if "{{" in prompt_format or "{%" in prompt_format:
        _check_template(prompt_format, name, is_own=False)
        return "jinja"
    raise PromptFormatError(
        f'the prompt format of {name} is {_shorten(prompt_format)}, which is not "plain", "chat" or a Jinja '
        "template.\nhint: a template contains {{ prompt }}, or loops over messages with {% for %}"
    )


def _check_template(source: str, name: str, *, is_own: bool) -> None:
    try:
        template.compiled(source, strict=not is_own)
    except TemplateRefused as error:
        raise _refused(error, name, is_own) from error
    except Exception as error:  # A template may break Jinja, or Python's own parser.
        number = getattr(error, "lineno", None)
        line = f" in line {number}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else _reason(error)
        raise PromptFormatError(
            f"the {_kind(is_own)} template of {name} is malformed{line}: {reason}\n"
            "hint: the simplest template is {{ prompt }}"
        ) from error


def _messages(prompt: Prompt) -> list[Message]:
    if isinstance(prompt, AskedPrompt):
        return list(prompt.messages)
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = [message for message in prompt if not isinstance(message, int)]
    assert len(messages) == len(prompt), "token ids need no rendering"
    return messages


def _plain_text(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    roles = [message["role"] for message in messages]
    is_single = roles[-1:] == ["user"] and set(roles[:-1]) <= {"system"}
    parts = []
    for message in messages:
        if is_single or message["role"] == "system":
            parts.append(message["content"])
        else:
            parts.append(f"{message['role'].capitalize()}: {message['content']}")
    if add_generation_prompt and not is_single:
        parts.append("Assistant:")
    return "\n\n".join(part for part in parts if part)


def _chat_template(tokenizer: Tokenizer, name: str) -> str:
    """Return a tokenizer's chat template; of several, the one that transformers takes."""
    source = tokenizer.chat_template
    if isinstance(source, Mapping):
        if "default" not in source:
            raise PromptFormatError(
                f"{name} has several chat templates ({', '.join(sorted(source))}) and none is named "
                '"default".\nhint: set its "prompt" to the one that fits'
            )
        source = source["default"]
    if not source:
        raise PromptFormatError(
            f'{name} has no chat template, and its prompt format is "chat".\n'
            'hint: set its "prompt" to "plain", or to a Jinja template such as '
            '"User: {{ prompt }}\\nAssistant:"'
        )
    return str(source)


def _apply_template(
    source: str,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    name: str,
    *,
    is_own: bool,
    add_generation_prompt: bool,
) -> str:
    """Return what a tokenizer's own chat template (`is_own`), or a recipe's, makes of messages."""
    _check_template(source, name, is_own=is_own)
    # What transformers passes to a chat template. A recipe's template sees a little more.
    variables: dict[str, Any] = {
        **getattr(tokenizer, "special_tokens_map", {}),
        "messages": [dict(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    if not is_own:
        users = [message["content"] for message in messages if message["role"] == "user"]
        variables |= {
            "prompt": users[-1] if users else "",
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token or "",
        }
    try:
        return template.render(source, variables, strict=not is_own)
    except TemplateRefused as error:
        raise _refused(error, name, is_own) from error
    except Exception as error:  # A template may raise anything, by intent or by accident.
        hint = (
            "some templates allow no system message, or only alternating user and assistant turns; "
            'set "prompt" to a Jinja template of your own to change that'
            if is_own
            else "templates see messages, prompt, bos_token, eos_token and add_generation_prompt"
        )
        roles = ", ".join(message["role"] for message in messages)
        raise PromptFormatError(
            f"the {_kind(is_own)} template of {name} fails on this prompt (roles {roles}): "
            f"{_reason(error)}\nhint: {hint}"
        ) from error


def _kind(is_own: bool) -> str:
    return "chat" if is_own else "prompt"


def _refused(error: TemplateRefused, name: str, is_own: bool) -> PromptFormatError:
    return PromptFormatError(
        f"the {_kind(is_own)} template of {name} {error}, so it is not rendered.\n"
        'hint: set "prompt" to a simpler Jinja template'
    )


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself too often"
    text = str(error)
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "..."


def _shorten(prompt_format: str) -> str:
    return repr(prompt_format if len(prompt_format) <= 60 else prompt_format[:57] + "...")
