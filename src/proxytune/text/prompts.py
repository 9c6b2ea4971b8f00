"""Turns text or a conversation into each model's token ids.

Every model of a recipe renders the same prompt in its own way: the expert may need its chat template where
the base sees plain text. A recipe says for each model how it reads a text and how it reads messages, each as

- `plain`: the text as it is, with the special tokens that the tokenizer usually adds; messages are joined;
- `chat`: a chat template, ready for the assistant's turn; a text is then the user's message;
- a Jinja template, recognised by `{{` or `{%`. It sees `messages`, `prompt` (the text of the last user
  message), `bos_token`, `eos_token` and `add_generation_prompt`, and writes its special tokens itself. A chat
  template can be copied, since it also sees what transformers gives to one. One that does not use `messages`
  stands around a question: of a conversation it shows the last one only.

Both kinds of templates are rendered by `template.py`, in the language of transformers and within its bounds.
Where a recipe does not say how a model reads messages, `loading/formats.py` does. Prompts given as token ids
do not pass through here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jinja2

from proxytune.errors import InvalidRequest, PromptFormatError
from proxytune.request import ChatOptions, Message, Prompt
from proxytune.text import template
from proxytune.text.meter import TemplateRefused

PLAIN_USER_TURN = "\n\nUser:"
"""The beginning of the user's next turn in a longer conversation in the `plain` format."""

_MAX_REASON = 1000
"""Characters of a template's own message that an error repeats."""
_END_OF_CONTENT = "END_OF_THE_LAST_MESSAGE "
"""Marks in a rendered conversation where the message to be continued ends; no template writes it."""


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How one member reads prompts.

    Args:
        text: How it reads a text: `plain`, `chat` or a Jinja template.
        chat: How it reads messages, in the same three ways.
        template: The chat template that `chat` stands for; None if there is none.
        tokenizer: Its tokenizer.
    """

    text: str
    chat: str
    template: str | None
    tokenizer: Tokenizer

    @property
    def is_single_turn(self) -> bool:
        """Whether it shows only the last question of a conversation."""
        is_template = check_syntax(self.chat, "the model") == "jinja"
        return is_template and "messages" not in template.names(self.chat, strict=True)

    @property
    def joins_messages(self) -> bool:
        """Whether it has no chat format, so that messages are joined as `render` describes."""
        return self.chat == "plain"

    def of(self, prompt: Prompt) -> str:
        """Return how it reads this prompt."""
        return self.text if isinstance(prompt, str) else self.chat

    def render(self, prompt: Prompt, name: str, options: ChatOptions | None = None) -> list[int]:
        """Return the token ids that the member sees; see `render`."""
        return render(
            prompt,
            prompt_format=self.of(prompt),
            tokenizer=self.tokenizer,
            name=name,
            chat_template=self.template,
            options=options,
        )


class ChatPrompt(tuple[int, ...]):
    """Token ids together with the messages they were rendered from.

    Only a base behind a chat endpoint uses the messages, since it renders them itself.
    """

    messages: tuple[Message, ...]
    options: ChatOptions

    @classmethod
    def of(cls, token_ids: Sequence[int], prompt: Prompt, options: ChatOptions) -> ChatPrompt:
        """Return these token ids with the text or messages they come from, and how those are rendered."""
        itself = cls(token_ids)
        itself.messages, itself.options = tuple(_messages(prompt)), options
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


def render(
    prompt: Prompt,
    *,
    prompt_format: str,
    tokenizer: Tokenizer,
    name: str,
    chat_template: str | None = None,
    options: ChatOptions | None = None,
) -> list[int]:
    """Return the token ids that one model sees.

    In the `plain` format, a single user message is its content, after the system message and a blank line if
    there is one. Longer conversations are written as `User: …`, `Assistant: …`, with blank lines between
    them and an open `Assistant:` at the end. That is our choice: models without a chat template have no
    convention. In every format the assistant begins a new turn, even after a message of its own, unless the
    options say otherwise.

    Args:
        prompt: Text or messages.
        prompt_format: `plain`, `chat` or a Jinja template.
        tokenizer: The model's tokenizer.
        name: The model's name in errors.
        chat_template: What `chat` stands for; None for the tokenizer's own.
        options: How messages are rendered; None for a new turn of the assistant.

    Raises:
        InvalidRequest: The result has no tokens.
        PromptFormatError: The format is unknown, the tokenizer has no chat template, or a template fails.
    """
    text = render_text(
        prompt,
        prompt_format=prompt_format,
        tokenizer=tokenizer,
        name=name,
        chat_template=chat_template,
        options=options,
    )
    # A template writes its special tokens itself.
    if prompt_format == "plain":
        token_ids = prompt_ids(text, tokenizer)
    else:
        token_ids = list(tokenizer.encode(text, add_special_tokens=False))
    if not token_ids:
        raise InvalidRequest(
            f"the prompt has no tokens for {name} in the format {_shorten(prompt_format)}, so there is "
            "nothing to continue.\nhint: give at least one token of text"
        )
    return token_ids


def render_each(
    prompt: Prompt,
    formats: Sequence[PromptFormat],
    names: Sequence[str],
    options: ChatOptions | None = None,
) -> list[Sequence[int]]:
    """Return the token ids that each of several models sees; see `render`."""
    # Models that share a tokenizer and a format see the same; a long prompt takes a while to tokenise.
    known: dict[tuple[str, str | None, int], Sequence[int]] = {}
    keys = [(own.of(prompt), own.template, id(own.tokenizer)) for own in formats]
    for key, own, name in zip(keys, formats, names, strict=True):
        if key not in known:
            known[key] = own.render(prompt, name, options)
    return [known[key] for key in keys]


def added_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the tokens that a tokenizer keeps beside its model, special ones and words added later."""
    try:
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder  # type: ignore[attr-defined]
    except (AttributeError, NotImplementedError):  # toy tokenizers, and Mistral's own
        added = {}
    return {str(token): token_id for token_id, token in added.items()}


def text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return a plain text's token ids, without special tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def start_id(tokenizer: Tokenizer) -> int | None:
    """Return the token that the tokenizer puts before a text; None if there is none."""
    with_start = tokenizer.encode("a", add_special_tokens=True)
    bos = getattr(tokenizer, "bos_token", None)
    bos_id = None if bos is None else tokenizer.get_vocab().get(bos)
    return with_start[0] if with_start[0] == bos_id else None


def prompt_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a plain text that is to be continued, with special tokens before it.

    Tokens that a tokenizer puts after a text, as its training may have needed, are left out: a model that has
    read the end of a text does not go on.
    """
    token_ids = list(tokenizer.encode(text, add_special_tokens=True))
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    whole = list(tokenizer.encode("a", add_special_tokens=True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return token_ids[: len(token_ids) - (len(whole) - start - len(bare))]
    return token_ids


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
    chat_template: str | None = None,
    options: ChatOptions | None = None,
) -> str:
    """Return the text that `render` tokenises; arguments and errors are the same.

    Without a generation prompt, a conversation that ends with the assistant's message shows how a format ends
    that turn.
    """
    options = options or ChatOptions()
    kind = check_syntax(prompt_format, name)
    if kind == "plain" and isinstance(prompt, str):
        return prompt
    messages = _messages(prompt)
    if kind == "plain":
        return _joined(messages, options)
    is_own = kind == "chat"
    source = (chat_template or own_template(tokenizer, name)) if is_own else prompt_format
    apply = _Template(source, tokenizer, name, is_own)
    if not is_own and options.continue_final_message and not apply.sees_messages:
        text = answered(apply(messages, options), messages[-1]["content"])
    elif options.continue_final_message:
        text = _continued(apply, messages, options)
    else:
        text = apply(messages, options)
    if isinstance(prompt, AskedPrompt) and prompt.answer_start:
        text = answered(text, prompt.answer_start)
    return text


def answered(text: str, answer: str) -> str:
    """Return a rendered prompt with an answer after it: a space stands between them unless one is there."""
    return (
        text + answer
        if not text or text[-1].isspace() or answer[:1].isspace()
        else f"{text} {answer}"
    )


def _continued(apply: _Template, messages: Sequence[Message], options: ChatOptions) -> str:
    """Return a conversation up to the end of its last message's content.

    Source: `continue_final_message` of transformers, whose result this is.
    """
    last: Any = {**messages[-1], "content": messages[-1]["content"] + _END_OF_CONTENT}
    text = apply([*messages[:-1], last], options)
    end = text.rfind(_END_OF_CONTENT.strip())
    if end < 0:
        raise PromptFormatError(
            f"the {_kind(apply.is_own)} template of {apply.name} does not show the last message, so it "
            "cannot be continued.\nhint: leave continue_final_message out"
        )
    # A template that trims a message's content would have trimmed it without the mark, too.
    return text[:end] if text.startswith(_END_OF_CONTENT, end) else text[:end].rstrip()


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


def _joined(messages: Sequence[Message], options: ChatOptions) -> str:
    roles = [message["role"] for message in messages]
    is_single = roles[-1:] == ["user"] and set(roles[:-1]) <= {"system"}
    parts = []
    for message in messages:
        if is_single or message["role"] == "system":
            parts.append(message["content"])
        else:
            parts.append(f"{message['role'].capitalize()}: {message['content']}")
    if options.begins_turn and not is_single:
        parts.append("Assistant:")
    return "\n\n".join(part for part in parts if part)


def own_template(tokenizer: Tokenizer, name: str) -> str:
    """Return a tokenizer's chat template; of several, the one that transformers takes.

    Raises:
        PromptFormatError: It has none, or several and none of them is named `default`.
    """
    source = tokenizer.chat_template
    if isinstance(source, Mapping):
        if "default" not in source:
            raise PromptFormatError(
                f"{name} has several chat templates ({', '.join(sorted(source))}) and none is named "
                '"default".\nhint: set its "chat" to the one that fits'
            )
        source = source["default"]
    if not source:
        raise PromptFormatError(
            f'{name} has no chat template, and its prompt format is "chat".\n'
            'hint: set it to "plain", or to a Jinja template such as '
            '"User: {{ prompt }}\nAssistant:"'
        )
    return str(source)


@dataclass(frozen=True, slots=True)
class _Template:
    """A tokenizer's chat template (`is_own`), or a template of the recipe."""

    source: str
    tokenizer: Tokenizer
    name: str
    is_own: bool

    def __post_init__(self) -> None:
        _check_template(self.source, self.name, is_own=self.is_own)

    @property
    def sees_messages(self) -> bool:
        """Whether it shows a conversation, and not only its last question."""
        return "messages" in template.names(self.source, strict=not self.is_own)

    def __call__(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """Return what the template makes of messages."""
        # What transformers passes to a chat template. A recipe's template sees a little more.
        variables: dict[str, Any] = {
            **getattr(self.tokenizer, "special_tokens_map", {}),
            **options.template_kwargs,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": options.begins_turn,
        }
        if not self.is_own:
            users = [message["content"] for message in messages if message["role"] == "user"]
            variables |= {
                "prompt": users[-1] if users else "",
                "bos_token": self.tokenizer.bos_token or "",
                "eos_token": self.tokenizer.eos_token or "",
            }
        try:
            return template.render(self.source, variables, strict=not self.is_own)
        except TemplateRefused as error:
            raise _refused(error, self.name, self.is_own) from error
        except Exception as error:  # A template may raise anything, by intent or by accident.
            hint = (
                "some templates allow no system message, or only alternating user and assistant turns; "
                'set "chat" to a Jinja template of your own to change that'
                if self.is_own
                else "templates see messages, prompt, bos_token, eos_token and add_generation_prompt"
            )
            roles = ", ".join(message["role"] for message in messages)
            raise PromptFormatError(
                f"the {_kind(self.is_own)} template of {self.name} fails on this prompt (roles {roles}): "
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
