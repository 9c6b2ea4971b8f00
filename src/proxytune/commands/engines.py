"""Which engine runs a recipe's models: this process, or vLLM, for the commands that do the same with both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from proxytune.commands.flags import given_flags
from proxytune.commands.options import ModelOptions, argument
from proxytune.errors import InvalidRequest
from proxytune.request import EngineName
from proxytune.settings import option

if TYPE_CHECKING:
    from proxytune.model import ProxyTuned
    from proxytune.recipe.recipe import Recipe

VllmOptions = Annotated[
    list[str] | None,
    argument("OPTIONS", "With --engine vllm, after --: further options of vLLM's engine"),
]
VLLM_FLAGS = frozenset({"--engine", "--dtype", "--exact", "--trust-remote-code", "--allow-pickle"})
"""What --engine vllm honours of the options of models; the rest has names of vLLM's own."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions(ModelOptions):
    """Where and how a recipe's models run, and in which engine."""

    engine: EngineName = option("local", "Run the models here, or in vLLM, on one GPU or many")
    vllm_options: tuple[str, ...] = ()

    def taking(self, vllm_options: Sequence[str] | None) -> EngineOptions:
        """Return these options with those that follow --.

        Raises:
            InvalidRequest: An option is for another engine.
        """
        if self.engine == "local" and vllm_options:
            raise InvalidRequest(
                f"{vllm_options[0]!r} follows the other arguments, and the engine here has no options of its "
                "own.\nhint: quote a prompt of several words; vLLM's options need --engine vllm"
            )
        others = sorted(given_flags(models=self) - VLLM_FLAGS)
        if self.engine == "vllm" and others:
            raise InvalidRequest(
                f"{others[0]} is for models that run here, and --engine vllm runs them in vLLM.\n"
                "hint: vLLM's own options follow --, as in: -- --tensor-parallel-size 4"
            )
        return replace(self, vllm_options=tuple(vllm_options or ()))

    def load(self, recipe: Recipe, experts: Collection[str] | None) -> ProxyTuned:
        """Load a recipe's models as `ModelOptions` does; vLLM loads them when the first one is to run."""
        if self.engine == "local":
            return super().load(recipe, experts)
        from proxytune.integrations.vllm.engine import load_in_vllm

        return load_in_vllm(
            recipe,
            experts=None if experts is None else tuple(experts),
            dtype=self.dtype,
            grants=self.grants(),
            options=self.vllm_options,
            is_exact=self.exact,
        )
