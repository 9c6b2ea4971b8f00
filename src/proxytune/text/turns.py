"""How an answer follows a prompt: what a format writes between them, and how it closes the assistant's turn.

Training takes its loss on these tokens, scores measure them, and generation writes them. So in each of the
three a space stands between `Answer:` and the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from proxytune.request import ChatOptions, Message, Prompt
from proxytune.text.prompts import Tokenizer, answered, continuation_ids, render_text


class Turn(NamedTuple):
    """An assistant's turn as its format writes it.

    Args:
        text: The answer, with what stands between it and the prompt.
        end: What closes the turn; empty if the format writes nothing visible there, or `text` has it already.
        is_ended: Whether the format closes the turn; otherwise the end-of-sequence token does.
    """

    text: str
    end: str = ""
    is_ended: bool = False


class Turns:
    """The answers to prompts in one format.

    Args:
        prompt_format: `plain`, `chat` or a Jinja template.
        tokenizer: The model's tokenizer.
        name: The model's name in errors.
        chat_template: What `chat` stands for; None for the tokenizer's own.
    """

    def __init__(
        self, prompt_format: str, tokenizer: Tokenizer, name: str, chat_template: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._format: dict[str, Any] = {
            "prompt_format": prompt_format,
            "tokenizer": tokenizer,
            "name": name,
            "chat_template": chat_template,
        }

    def after(self, prompt: Prompt, answer: str) -> Turn:
        """Return the turn that answers a prompt.

        A text in the `plain` format and its answer are joined as they are. Otherwise the turn is what the
        format makes of a conversation that ends with the answer, after what it makes of the prompt. A format
        that shows no answers is followed by one as `answered` says.

        Raises:
            PromptFormatError: The format cannot render them; see `render`.
        """
        is_text = isinstance(prompt, str)
        if is_text and self._format["prompt_format"] == "plain":
            return Turn(answer)
        history: Sequence[Any] = [{"role": "user", "content": prompt}] if is_text else prompt
        before = self._rendered(history)
        turn: Message = {"role": "assistant", "content": answer}
        whole = self._rendered([*history, turn], ChatOptions(add_generation_prompt=False))
        if not whole.startswith(
            before
        ):  # The format opens a turn with something that it does not show later.
            return Turn(answer)
        return self._written(whole[len(before) :], answer, before)

    def answer_ids(self, prompt: Prompt, answer: str) -> list[int]:
        """Return the token ids of the answer to a prompt, and the end-of-sequence token if there is one.

        Raises:
            PromptFormatError: The format cannot render them; see `render`.
        """
        turn = self.after(prompt, answer)
        token_ids = continuation_ids(turn.text, self._tokenizer)
        eos_id = self._tokenizer.eos_token_id
        if eos_id is None or not token_ids:
            return token_ids
        if turn.is_ended and not turn.end and eos_id in token_ids:
            # Behind the end, templates write a line break for the next turn.
            return token_ids[: len(token_ids) - token_ids[::-1].index(eos_id)]
        return [*token_ids, eos_id]

    def _written(self, rest: str, answer: str, before: str) -> Turn:
        """Return a turn as the format wrote it after the prompt."""
        shown = answer if answer in rest else answer.strip()  # Many templates trim it.
        start = rest.find(shown)
        if start < 0:  # The format strips reasoning from turns, or writes prompts only.
            if rest.strip():
                return Turn(rest, is_ended=True)
            return Turn(answered(before, answer)[len(before) :])
        lead, after = rest[:start], rest[start + len(shown) :]
        if not lead.strip() and not self._has_generation_prompt:
            # Some templates open the assistant's next turn even when not asked to.
            while after and before.endswith(after[-1]):
                after, before = after[:-1], before[:-1]
        return Turn(lead + shown, after, True) if after.strip() else Turn(lead + shown)

    @cached_property
    def _has_generation_prompt(self) -> bool:
        """Whether the format opens the assistant's turn only when asked to."""
        probe: list[Message] = [{"role": "user", "content": "x"}]
        without = ChatOptions(add_generation_prompt=False)
        return self._rendered(probe) != self._rendered(probe, without)

    def _rendered(self, messages: Sequence[Message], options: ChatOptions | None = None) -> str:
        return render_text(list(messages), options=options or ChatOptions(), **self._format)
