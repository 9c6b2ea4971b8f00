"""`proxytune chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.commands.app import (
    CHAT_TOKENS,
    GREEDY,
    AlphaOption,
    ContextSizeOption,
    CudaGraphsOption,
    DeviceOption,
    DtypeOption,
    ExpertOption,
    FrequencyPenaltyOption,
    GpuLayersOption,
    LlamaCppOption,
    MaxCallsOption,
    MaxCostOption,
    MinPOption,
    PresencePenaltyOption,
    RecipeArgument,
    RepetitionPenaltyOption,
    SpeculativeOption,
    StopOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    command,
    load_models,
    number_of,
    read_recipe,
    steering_of,
    strengths_text,
)
from proxytune.errors import (
    InvalidRequest,
    UserError,
)
from proxytune.request import SamplingParams

if TYPE_CHECKING:
    from proxytune.model import Conversation
    from proxytune.recipe import Recipe
    from proxytune.trace import Step


@command("proxytune chat my-recipe --alpha 0.5", is_endless=True)
def chat(
    recipe: RecipeArgument,
    alpha: AlphaOption = None,
    expert: ExpertOption = None,
    system: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="What the model is told before the first turn", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens of an answer")
    ] = CHAT_TOKENS,
    temperature: TemperatureOption = GREEDY.temperature,
    top_k: TopKOption = GREEDY.top_k,
    top_p: TopPOption = GREEDY.top_p,
    min_p: MinPOption = GREEDY.min_p,
    repetition_penalty: RepetitionPenaltyOption = GREEDY.repetition_penalty,
    presence_penalty: PresencePenaltyOption = GREEDY.presence_penalty,
    frequency_penalty: FrequencyPenaltyOption = GREEDY.frequency_penalty,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Makes drawn answers repeatable  [default: another each time]",
            show_default=False,
        ),
    ] = None,
    stop: StopOption = None,
    speculative: SpeculativeOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    cuda_graphs: CudaGraphsOption = False,
    llama_cpp: LlamaCppOption = False,
    threads: ThreadsOption = None,
    gpu_layers: GpuLayersOption = None,
    context_size: ContextSizeOption = None,
    max_calls: MaxCallsOption = None,
    max_cost: MaxCostOption = None,
) -> None:
    """Talk with a steered model.

    Strength and expert can be changed while talking: /help says how.
    """
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    found = read_recipe(
        recipe, llama_cpp, threads=threads, gpu_layers=gpu_layers, context_size=context_size
    )
    own_alpha, experts = steering_of(found, expert, alpha)
    model = load_models(
        found,
        None,
        device=device,
        dtype=dtype,
        cuda_graphs=cuda_graphs,
        max_calls=max_calls,
        max_cost=max_cost,
    )
    conversation = model.chat(
        sampling, system=system, alpha=own_alpha, experts=experts, speculative=speculative
    )
    _Chat(conversation, found).run()


class _Chat:
    """A conversation on the terminal, or on any pair of streams."""

    HELP = (
        "/alpha A              strength of steering: 0 is the base alone; default takes the recipe's\n"
        "/expert NAME[=A] ...  steer with these; none takes the base alone, default the recipe's; "
        "alone it lists them\n"
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
        self._say(f"{self._recipe.base.model}, {self._steering()}. /help lists the commands.")
        for line in _typed_lines(is_terminal):
            line = line.strip()
            if line == "/quit":
                return
            if line.startswith("/"):
                try:
                    self._command(*line.split())
                except UserError as error:
                    self._say(str(error))
            elif line:
                self._answer(line)

    def _answer(self, text: str) -> None:
        steps: Iterator[Step] | None = None
        try:
            steps = self._conversation.say(text)
            for step in steps:
                typer.echo(step.text, nl=False)
                sys.stdout.flush()
            typer.echo()
        except KeyboardInterrupt:
            typer.echo()
            self._say("stopped")
        except UserError as error:
            self._say(f"{error}\nhint: /reset forgets the conversation so far")
        finally:
            if steps is not None:
                steps.close()  # type: ignore[attr-defined]  # a generator: this ends the turn

    def _command(self, name: str, *values: str) -> None:
        if name == "/alpha":
            self._set_alpha(values)
        elif name == "/expert":
            self._set_experts(values)
        elif name in ("/reset", "/help") and values:
            self._say(f"{name} takes nothing after it")
        elif name == "/reset":
            self._conversation.messages = list(self._first_messages)
            self._say("forgotten")
        elif name == "/help":
            self._say(self.HELP)
        else:
            self._say(f"there is no {name}; there are\n{self.HELP}")

    def _set_alpha(self, values: Sequence[str]) -> None:
        if len(values) > 1:
            raise InvalidRequest(f"/alpha takes one number, and {len(values)} are given")
        if values:
            alpha = None if values[0] == "default" else number_of(values[0], "/alpha")
            experts = self._conversation.experts
            if isinstance(experts, Mapping):
                experts = tuple(experts)
            self._recipe.choose(experts, alpha)
            self._conversation.alpha, self._conversation.experts = alpha, experts
        self._say(self._steering())

    def _set_experts(self, values: Sequence[str]) -> None:
        known = [e.name for e in self._recipe.experts]
        if not values:
            self._say(f"experts: {', '.join(known)}; now {self._steering()}")
            return
        if values == ("none",) and "none" not in known:
            self._conversation.alpha, self._conversation.experts = 0.0, None
        elif values == ("default",) and "default" not in known:
            self._conversation.alpha, self._conversation.experts = None, None
        else:
            # A strength of 0 was "none", and would silence the expert that is asked for now.
            alpha = self._conversation.alpha or None
            if all("=" in value for value in values):
                alpha = None
            alpha, experts = steering_of(self._recipe, values, alpha)
            self._conversation.alpha, self._conversation.experts = alpha, experts
        self._say(self._steering())

    def _steering(self) -> str:
        chosen = self._recipe.choose(self._conversation.experts, self._conversation.alpha)
        return strengths_text(chosen)

    def _say(self, text: str) -> None:
        typer.echo(text, err=True)


def _typed_lines(is_terminal: bool) -> Iterator[str]:
    """Yield what the user types; Ctrl-C drops a line that is being typed, Ctrl-D ends."""
    if not is_terminal:
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            typer.echo("\n(Ctrl-D or /quit ends)", err=True)
        except EOFError:
            typer.echo()
            return
