"""`proxytune chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from proxytune.commands.app import command
from proxytune.commands.console import EMPTY_ANSWER, print_text, say, strengths_text
from proxytune.commands.flags import Pick, number_of
from proxytune.commands.options import ModelOptions, RecipeArgument, SteeringOptions, steering_of
from proxytune.errors import InvalidRequest, OutputFileError, UserError
from proxytune.request import SPECULATIVE, ChatOptions, SamplingParams, Steering
from proxytune.settings import option

if TYPE_CHECKING:
    from proxytune.model import Conversation
    from proxytune.recipe.recipe import Recipe
    from proxytune.trace import Step


@dataclass(frozen=True, kw_only=True)
class TalkOptions:
    """How a conversation begins, and how its answers are generated."""

    system: str | None = option(None, "System message before the first turn")
    chat_template_kwargs: str | None = option(
        None,
        "Variables for the chat template, as a JSON object, such as '{\"enable_thinking\": false}'",
        metavar="JSON",
    )
    speculative: bool = option(False, SPECULATIVE)

    def rendering(self) -> ChatOptions:
        """Return how the conversation is rendered.

        Raises:
            InvalidRequest: The variables are not a JSON object, or one has a name that is taken.
        """
        try:
            variables = json.loads(self.chat_template_kwargs or "{}")
        except (ValueError, RecursionError):
            variables = None
        if not isinstance(variables, dict):
            raise InvalidRequest(
                f"--chat-template-kwargs is {self.chat_template_kwargs!r}, and must be a JSON object.\n"
                "hint: --chat-template-kwargs '{\"enable_thinking\": false}'"
            )
        return ChatOptions(template_kwargs=variables)


@command("proxytune chat my-recipe --alpha 0.5", is_endless=True)
def chat(
    recipe: RecipeArgument,
    *,
    options: TalkOptions,
    steering: SteeringOptions,
    sampling: Annotated[
        SamplingParams, Pick(leave_out=("logprobs",), defaults={"max_new_tokens": 256})
    ],
    models: ModelOptions,
) -> None:
    """Chat with a steered model: type a message, and Ctrl-D to leave.

    Strength and expert can be changed during the conversation: /help shows how.
    """
    rendering = options.rendering()
    found = models.read(recipe)
    wanted = steering.of(found)
    conversation = models.load(found, None).chat(
        sampling,
        system=options.system,
        alpha=wanted.alpha,
        experts=wanted.experts,
        speculative=options.speculative,
    )
    conversation.options = rendering
    _Chat(conversation, found).run()


class _Chat:
    """A conversation on the terminal, or on any pair of streams."""

    HELP = (
        "/alpha A              strength of steering: 0 is the base alone; default is the recipe's\n"
        "/expert NAME[=A] ...  steer with these experts; none is the base alone, default the recipe's; "
        "without a name, list them\n"
        "/reset                forget the conversation\n"
        "/help                 show this\n"
        "/quit                 end, as Ctrl-D does; Ctrl-C stops an answer"
    )

    def __init__(self, conversation: Conversation, recipe: Recipe) -> None:
        self._conversation = conversation
        self._recipe = recipe
        self._first_messages = list(conversation.messages)

    def run(self) -> None:
        """Talk until the input ends or the user does."""
        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  # gives input() a history and arrow keys
        say(f"{self._recipe.base.model}, {self._steering()}. /help lists the commands.")
        if self._conversation.joins_messages:
            say(
                "The base has no chat template: messages are joined as `User: …` and `Assistant: …`. "
                '"chat" in the recipe sets another format.'
            )
        for line in _typed_lines(is_terminal):
            line = line.strip()
            if line == "/quit":
                return
            if line.startswith("/"):
                try:
                    self._command(*line.split())
                except UserError as error:
                    say(str(error))
            elif line:
                self._answer(line)

    def _answer(self, text: str) -> None:
        steps: Iterator[Step] | None = None
        try:
            steps = self._conversation.say(text)
            answer = ""
            for step in steps:
                answer += step.text
                print_text(step.text, end="")
            print_text()
            if not answer.strip():
                say(EMPTY_ANSWER)
        except KeyboardInterrupt:
            print_text()
            say("stopped")
        except OutputFileError:
            raise  # stdout takes no more answers
        except UserError as error:
            say(f"{error}\nhint: /reset forgets the conversation so far")
        finally:
            if steps is not None:
                steps.close()  # type: ignore[attr-defined]  # a generator: this ends the turn

    def _command(self, name: str, *values: str) -> None:
        if name == "/alpha":
            self._set_alpha(values)
        elif name == "/expert":
            self._set_experts(values)
        elif name in ("/reset", "/help") and values:
            say(f"{name} takes no arguments")
        elif name == "/reset":
            self._conversation.messages = list(self._first_messages)
            say("conversation forgotten")
        elif name == "/help":
            say(self.HELP)
        else:
            say(f"{name} is not a command; the commands are\n{self.HELP}")

    def _set_alpha(self, values: Sequence[str]) -> None:
        if len(values) > 1:
            raise InvalidRequest(f"/alpha takes one number, and {len(values)} are given")
        if values:
            alpha = None if values[0] == "default" else number_of(values[0], "/alpha")
            experts = self._conversation.experts
            if isinstance(experts, Mapping):
                experts = tuple(experts)
            self._steer(Steering(alpha, experts))
        say(self._steering())

    def _set_experts(self, values: Sequence[str]) -> None:
        known = [e.name for e in self._recipe.experts]
        if not values:
            say(f"experts: {', '.join(known)}; now {self._steering()}")
            return
        if values == ("none",) and "none" not in known:
            self._steer(Steering(0.0))
        elif values == ("default",) and "default" not in known:
            self._steer(Steering())
        else:
            # A strength of 0 was "none", and would silence the expert that is asked for now.
            alpha = self._conversation.alpha or None
            if all("=" in value for value in values):
                alpha = None
            self._steer(steering_of(self._recipe, values, alpha))
        say(self._steering())

    def _steer(self, steering: Steering) -> None:
        self._conversation.alpha, self._conversation.experts = steering.alpha, steering.experts

    def _steering(self) -> str:
        steering = Steering(self._conversation.alpha, self._conversation.experts)
        return strengths_text(self._recipe.strengths(steering))


def _typed_lines(is_terminal: bool) -> Iterator[str]:
    """Yield what the user types; Ctrl-C drops a line that is being typed, Ctrl-D ends."""
    if not is_terminal:
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            say("\n(Ctrl-D or /quit ends)")
        except EOFError:
            print_text()
            return
