"""One server: what it shows and takes, and one question to it.

Most servers take a prompt as text and name tokens by their text; others take and return token ids. What
differs between servers is found out by asking (`ApiTraits`), each thing when it is first needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from proxytune.backends.api.answers import (
    ServerAnswer,
    ShownToken,
    is_alike,
    read_chat,
    read_completion,
    read_models,
)
from proxytune.backends.api.client import ANSWER_BYTES, ApiClient, RefusedCall
from proxytune.backends.api.tokens import ApiTokens, name_bytes
from proxytune.backends.base import NO_TOKEN
from proxytune.errors import UnsupportedModel
from proxytune.recipe.spec import ApiSettings
from proxytune.request import Message
from proxytune.text.prompts import ChatPrompt
from proxytune.trace import Usage

Endpoint = Literal["completions", "chat"]
Scoring = Literal["prompt_logprobs", "echo", "echo_shifted"]

DEFAULT_TOP_LOGPROBS = 100
"""Tokens asked for per position by default; more make answers long and certify little more."""

LADDER = (20, 5, 1)
"""Numbers to try if a server shows fewer: most servers have one of these limits."""

PROBES = ("the quick brown fox jumps over the lazy", "once upon a time", "a b c d e f g")
"""Short prompts to find out what a server shows; several, because a base may end a text at once."""

ENTRY_BYTES = 1024
"""More than an answer needs for one token with its logprob, even in the longest way of writing it."""

MAX_ANSWER_BYTES = 64 * 2**20
"""Maximum size of an answer, however much is asked for."""

FORCING_BIAS = 100.0
"""The largest `logit_bias` that the API allows; it leaves nothing else to choose."""


@dataclass(frozen=True, slots=True)
class ApiTraits:
    """What a server shows and takes.

    Args:
        served_model: What it calls the model.
        endpoint: `completions` or `chat`.
        top_logprobs: Number of tokens that it shows at each position.
        is_limited: Whether more were asked for.
        takes_token_ids: Whether a prompt may be token ids, and tokens are named by them.
        scoring: How it shows the positions of a given text; `echo_shifted` is one place late.
        bias: Whether `logit_bias` changes the logprobs that are shown, or only which token is chosen.
        continues: Whether it continues a chat answer that has been begun; None for completions.
    """

    served_model: str
    endpoint: Endpoint
    top_logprobs: int
    is_limited: bool
    takes_token_ids: bool
    scoring: Scoring | None
    bias: Literal["shown", "hidden"] | None
    continues: bool | None


class ApiServer:
    """A server, and the model it serves.

    Args:
        client: How to reach it.
        settings: From the recipe.
        tokens: The local vocabulary.
        name: What errors call it.

    Raises:
        ApiError: It cannot be reached.
        UnsupportedModel: It shows no logprobs, or serves several models and none is named.
    """

    def __init__(
        self, client: ApiClient, settings: ApiSettings, tokens: ApiTokens, *, name: str
    ) -> None:
        self.name = name
        self.tokens = tokens
        self._client = client
        self._settings = settings
        self._num_added = 0
        """Tokens that the server puts before a text, such as a beginning-of-sequence token."""
        self._probe = PROBES[0]
        self._model = settings.model or self._only_model()
        self.endpoint, self.top_logprobs, self._is_limited = self._find_limits()

    @cached_property
    def traits(self) -> ApiTraits:
        """Everything the server shows and takes; what is not known yet is asked for."""
        return ApiTraits(
            served_model=self._model,
            endpoint=self.endpoint,
            top_logprobs=self.top_logprobs,
            is_limited=self._is_limited,
            takes_token_ids=self.takes_token_ids,
            scoring=self.scoring,
            bias=self.bias,
            continues=self.continues if self.endpoint == "chat" else None,
        )

    # What the server shows and takes ---------------------------------------------------------------------

    def _only_model(self) -> str:
        """Return the name of the one model that the server lists."""
        names: list[str] = []

        def read(answer: dict[str, Any]) -> None:
            names[:] = read_models(answer)

        try:
            self._client.get("/models", read)
        except RefusedCall as error:
            raise UnsupportedModel(
                f"{self.name} does not list its models: {error}\n"
                'hint: name the model in the recipe: "api": {"model": …}'
            ) from error
        if len(names) != 1:
            raise UnsupportedModel(
                f"{self.name} serves {len(names)} models ({', '.join(names[:8])}), and the recipe names "
                "none of them.\n"
                'hint: name the model in the recipe: "api": {"model": …}'
            )
        return names[0]

    def _find_limits(self) -> tuple[Endpoint, int, bool]:
        """Return the endpoint, how many tokens it shows at a position, and whether more were asked for."""
        asked = min(self._settings.top_logprobs or DEFAULT_TOP_LOGPROBS, self.tokens.width)
        endpoints: list[Any] = [self._settings.endpoint or "completions"]
        if self._settings.endpoint is None:
            endpoints.append("chat")
        problem: Exception | None = None
        for endpoint in endpoints:
            self.endpoint = endpoint
            for wanted in (asked, *(n for n in LADDER if n < asked)):
                self.top_logprobs = wanted
                try:
                    for self._probe in PROBES:
                        answer = self.ask(self._text_probe(), max_tokens=1, is_probe=True)
                        if answer.tokens:
                            break
                except RefusedCall as error:
                    problem = error
                    if error.status in (401, 403):
                        raise
                    if error.status in (404, 405):
                        break
                    continue
                if not answer.tokens and answer.has_ended:
                    # It ends every text at once, and refuses nothing.
                    return endpoint, wanted, wanted < asked
                shown = answer.first
                if shown is None or not shown.top:
                    problem = UnsupportedModel("its answers have no logprobs")
                    break
                num_own = len(self.tokens.encode(self._probe))
                self._num_added = answer.usage.num_prompt_tokens - num_own
                # A greedy answer's token is one of the likeliest; some servers list it once more.
                num_shown = wanted if shown.is_by_text else min(len(shown.top), wanted)
                return endpoint, num_shown, num_shown < asked
        raise UnsupportedModel(
            f"{self.name} cannot be steered, because it shows no logprobs: {problem}\n"
            "hint: use a server that answers `logprobs` (completions) or `top_logprobs` (chat). The one of "
            "llama-cpp-python needs --logits_all true; vLLM shows 20 unless started with --max-logprobs"
        )

    @cached_property
    def takes_token_ids(self) -> bool:
        """Whether token ids mean here what they mean to the local tokenizer."""
        if self.endpoint != "completions":
            return False
        token_ids = self.tokens.encode(self._probe)
        try:
            by_text = self.ask(self.tokens.text_of(token_ids), max_tokens=1, is_probe=True)
            by_ids = self.ask(token_ids, max_tokens=1, is_probe=True)
        except RefusedCall:
            return False
        one, other = by_text.first, by_ids.first
        if one is None or other is None or not isinstance(other.token, int):
            return False
        # The same distribution under names that the local vocabulary turns into the same text.
        texts = {name_bytes(name): logprob for name, logprob in one.top}
        bytes_of = self.tokens.bytes_of
        return all(
            isinstance(name, int)
            and name in bytes_of
            and abs(texts.get(bytes_of[name], logprob) - logprob) < 0.05
            for name, logprob in other.top
        ) and any(bytes_of.get(int(name), b"?") in texts for name, _ in other.top)

    @cached_property
    def scoring(self) -> Scoring | None:
        """How the server shows the positions of a given text; None if it does not."""
        if self.endpoint != "completions":
            return None
        token_ids = self.tokens.encode(self._probe)
        shown = self.ask(self.prompt_of(token_ids), max_tokens=1, is_probe=True).first
        token_id = None if shown is None else self.tokens.match(shown.token)
        if shown is None or token_id is None:
            return None
        whole = [*token_ids, token_id]
        ways: tuple[Scoring, ...] = ("prompt_logprobs", "echo", "echo_shifted")
        for way in ways:
            if way == "prompt_logprobs" and not self.takes_token_ids:
                continue  # it names tokens by the server's ids
            try:
                answer = self.ask(self.prompt_of(whole), max_tokens=1, scoring=way, is_probe=True)
            except RefusedCall:
                continue
            found = self._scored(answer, whole, len(token_ids), way)
            if found and found[0] is not None and is_alike(found[0], shown):
                return way
        return None

    @cached_property
    def bias(self) -> Literal["shown", "hidden"] | None:
        """How `logit_bias` works (see `ApiTraits`), tried on an unlikely token; None if it does not work."""
        prompt = self._text_probe()
        shown = self.ask(prompt, max_tokens=1, is_probe=True).first
        if shown is None:
            return None
        matched = [(self.tokens.match(name), logprob) for name, logprob in shown.top]
        known = [(i, logprob) for i, logprob in matched if i is not None]
        if len(known) < 2:
            return None
        token_id, logprob = min(known, key=lambda pair: pair[1])
        try:
            answer = self.ask(prompt, max_tokens=1, bias={token_id: FORCING_BIAS}, is_probe=True)
        except RefusedCall:
            return None
        forced = answer.first
        if forced is None or forced.logprob is None or self.tokens.match(forced.token) != token_id:
            return None
        return "hidden" if abs(forced.logprob - logprob) < 0.05 else "shown"

    @cached_property
    def continues(self) -> bool:
        """Whether the server continues a chat answer that has been begun, just as it would have by itself."""
        prompt = self._text_probe()
        whole = self.ask(prompt, max_tokens=6, is_probe=True)
        ids = self._matched(whole)
        if len(ids) < 6 or None in ids:
            return False
        begun = [i for i in ids[:3] if i is not None]
        try:
            prompt = prompt[0], self.tokens.decode(begun)
            answer = self.ask(prompt, max_tokens=3, is_probe=True)
        except RefusedCall:
            return False
        return self._matched(answer) == ids[3:6]

    def _matched(self, answer: ServerAnswer) -> list[int | None]:
        return [None if s is None else self.tokens.match(s.token) for s in answer.tokens]

    def can_name(self, token_id: int) -> bool:
        """Return whether the server can be asked about a row that ends with this token."""
        if token_id == NO_TOKEN:
            return False
        if self.endpoint == "completions" and self.takes_token_ids:
            return True
        return self.tokens.match(self.tokens.bytes_of.get(token_id, b"\xff")) is not None

    def has_recut(self, usage: Usage, length: int) -> bool:
        """Return whether the server has read a text of `length` tokens as another number of tokens."""
        if self.endpoint == "chat" or self.takes_token_ids or not usage.num_prompt_tokens:
            return False
        return usage.num_prompt_tokens != length + self._num_added

    # One question ------------------------------------------------------------------------------------------

    def _text_probe(self) -> Any:
        """Return a short prompt as every server takes it."""
        if self.endpoint == "completions":
            return self._probe
        return [{"role": "user", "content": self._probe}], ""

    def prompt_of(self, token_ids: Sequence[int], *, prompt: Sequence[int] | None = None) -> Any:
        """Return what is sent for a row: token ids, text, or messages with the beginning of the answer.

        Only the chat endpoint needs `prompt`, the prompt that the row begins with.

        Raises:
            UnsupportedModel: A chat answer has been begun, and the server does not continue it.
            InvalidRequest: The row ends within a character, and the server takes text.
        """
        if self.endpoint == "completions":
            return list(token_ids) if self.takes_token_ids else self.tokens.text_of(token_ids)
        assert prompt is not None
        new = token_ids[len(prompt) :]
        if new and not self.continues:
            raise UnsupportedModel(
                f"{self.name} does not continue an answer that has been begun, so it cannot be asked what "
                "follows the first token that steering changes.\n"
                "hint: use a server with /v1/completions, or have one of a few answers chosen with --choice"
            )
        begun = self.tokens.decode(new) if new else ""
        if isinstance(prompt, ChatPrompt):
            return self._chat_of(prompt, begun)
        return [{"role": "user", "content": self.tokens.text_of(prompt)}], begun

    def _chat_of(self, prompt: ChatPrompt, begun: str) -> tuple[list[Message], str]:
        """Return the messages to send, and the beginning of the answer, which may be the last message."""
        options, messages = prompt.options, list(prompt.messages)
        asked = "template_kwargs" if options.template_kwargs else "add_generation_prompt"
        if options.template_kwargs or not (options.begins_turn or options.continue_final_message):
            raise UnsupportedModel(
                f"{self.name} renders messages itself, so {asked} cannot be set for it.\n"
                "hint: leave it out, or use a server with /v1/completions"
            )
        if not options.continue_final_message:
            return messages, begun
        if not self.continues:
            raise UnsupportedModel(
                f"{self.name} does not continue an answer that has been begun, so the last message cannot be "
                "continued.\nhint: end with the user's message, or use a server with /v1/completions"
            )
        return messages[:-1], messages[-1]["content"] + begun

    def ask(
        self,
        prompt: Any,
        *,
        max_tokens: int,
        bias: Mapping[int, float] | None = None,
        scoring: str | None = None,
        is_probe: bool = False,
    ) -> ServerAnswer:
        """Ask for a greedy continuation with logprobs.

        Args:
            prompt: From `prompt_of`.
            max_tokens: Maximum number of new tokens.
            bias: Added to the logits of tokens.
            scoring: How to ask for the positions of the prompt, too; None not to.
            is_probe: See `ApiClient.post`.

        Raises:
            BudgetSpent, UnsupportedModel, ApiError: See `ApiClient.post`.
        """
        body: dict[str, Any] = {"model": self._model, "max_tokens": max_tokens, "temperature": 0}
        if bias is not None:
            body["logit_bias"] = {str(token_id): value for token_id, value in bias.items()}
        read: list[ServerAnswer] = []
        if self.endpoint == "chat":
            path = "/chat/completions"
            messages, begun = prompt
            if begun:
                messages = [*messages, {"role": "assistant", "content": begun}]
                body |= {"add_generation_prompt": False, "continue_final_message": True}
            body |= {"messages": messages, "logprobs": True, "top_logprobs": self.top_logprobs}
        else:
            path = "/completions"
            body |= {"prompt": prompt, "logprobs": self.top_logprobs}
            if not isinstance(prompt, str):
                body["return_tokens_as_token_ids"] = True
            if scoring == "prompt_logprobs":
                body["prompt_logprobs"] = self.top_logprobs
            elif scoring is not None:
                body["echo"] = True

        def check(answer: dict[str, Any]) -> None:
            is_chat = self.endpoint == "chat"
            read.append(read_chat(answer) if is_chat else read_completion(answer, scoring))

        num_positions = max_tokens + (0 if scoring is None else len(prompt))
        num_bytes = ANSWER_BYTES + ENTRY_BYTES * num_positions * (self.top_logprobs + 1)
        max_bytes = min(num_bytes, MAX_ANSWER_BYTES)
        _, usage = self._client.post(path, body, check, max_bytes=max_bytes, is_probe=is_probe)
        return replace(read[-1], usage=usage)

    def ask_scored(
        self, token_ids: Sequence[int], first: int, *, prompt: Sequence[int], max_tokens: int
    ) -> tuple[list[ShownToken | None] | None, ServerAnswer]:
        """Ask for the positions of a text from `first` on and a continuation, in one call.

        Returns:
            What is shown from `first` on, and the answer. None for the former if the server has cut the text
            into other tokens.
        """
        assert self.scoring is not None
        asked = self.prompt_of(token_ids, prompt=prompt)
        answer = self.ask(asked, max_tokens=max_tokens, scoring=self.scoring)
        return self._scored(answer, token_ids, first, self.scoring), answer

    def _scored(
        self, answer: ServerAnswer, token_ids: Sequence[int], first: int, way: Scoring
    ) -> list[ShownToken | None] | None:
        """Return what an answer with a scored prompt shows from position `first` on; see `ask_scored`."""
        shown = answer.tokens
        if way == "prompt_logprobs":
            names = [None if one is None else one.token for one in shown[first : len(token_ids)]]
            return shown[first:] if names == list(token_ids[first:]) else None
        if answer.offsets is None or len(answer.offsets) != len(shown):
            return None
        begin = len(self.tokens.text_of(token_ids[:first])) if first else 0
        places = [n for n, offset in enumerate(answer.offsets) if offset == begin]
        if not places:
            return None
        place = places[-1]
        for n, token_id in enumerate(token_ids[first:]):
            there = shown[place + n] if place + n < len(shown) else None
            if there is None or self.tokens.match(there.token) != token_id:
                return None
        if way == "echo":
            return shown[place:]
        # One place late: an entry's token stands there, and its logprobs are those of the next token.
        if place == 0:
            return None
        return [
            None
            if one is None or other is None
            else ShownToken(other.token, None, one.top, one.token, is_by_text=one.is_by_text)
            for one, other in zip(shown[place - 1 : -1], shown[place:], strict=True)
        ]
