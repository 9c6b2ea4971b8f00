"""A recipe's models stay as they are: what would train, extend or replace their weights is refused.

A `Trainer` and PEFT ask nothing of a model before they begin to change it. So they are made to ask here when
their modules are imported; `integrations/__init__.py` says how.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from proxytune.errors import UnsupportedModel

_TUNE = "`proxytune tune` trains a small expert for a recipe's base, and leaves the base as it is"
_ADD_EXPERT = "name the adapter as an expert in the recipe; `proxytune tune` trains one"


def _refusing(what: str, hint: str) -> Callable[..., NoReturn]:
    """Return a method that refuses whatever it is given."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedModel(f"{what}.\nhint: {hint}")

    refuse.__doc__ = f"Refuse: {what}.\n\nRaises:\n    UnsupportedModel: Always."
    return refuse


class FrozenModels(nn.Module):
    """The part of a model of transformers that would change its weights, for models that are frozen."""

    members: nn.ModuleList

    def train(self, mode: bool = True) -> Any:
        """Set whether this module is in training mode; the members always run as in inference.

        A frozen member with dropout would answer differently each time.
        """
        super().train(mode)
        self.members.train(False)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze all weights, as they are already.

        Raises:
            UnsupportedModel: `requires_grad` is true.
        """
        if requires_grad:
            raise UnsupportedModel(
                f"the models of a recipe are frozen, so they get no gradients.\nhint: {_TUNE}"
            )
        return super().requires_grad_(False)

    enable_input_require_grads = _refusing(
        "the models of a recipe are frozen, so their inputs get no gradients", _TUNE
    )
    activation_checkpointing_enable = _refusing(
        "the models of a recipe are frozen, so there is no backward pass to checkpoint for", _TUNE
    )
    gradient_checkpointing_enable = activation_checkpointing_enable
    add_adapter = load_adapter = _refusing(
        "the models of a recipe are frozen, so no adapter can be added to them", _ADD_EXPERT
    )
    resize_token_embeddings = _refusing(
        "a recipe's vocabulary is that of its models, so it cannot be resized",
        "resize the embeddings of each model, save them, and name those in the recipe",
    )
    set_input_embeddings = set_output_embeddings = init_weights = _refusing(
        "the models of a recipe are frozen, so their weights cannot be replaced",
        "change and save the model itself, and name it in the recipe",
    )


def refuse_training(model: Any) -> None:
    """Refuse to train a recipe; other models pass.

    Raises:
        UnsupportedModel: The model is a recipe.
    """
    # By its config, so that asking about another model does not import a recipe's model class.
    if getattr(getattr(model, "config", None), "model_type", None) == "proxytune":
        raise UnsupportedModel(
            "the model is a recipe, whose models are frozen, so it can be neither trained nor adapted.\n"
            f"hint: {_TUNE}"
        )


def guard_trainer() -> None:
    """Make transformers' `Trainer` refuse to train a recipe; it still evaluates one."""
    from transformers.trainer import Trainer

    _check_first(Trainer, "train", lambda trainer, **_: trainer.model)


def guard_peft_model() -> None:
    """Make `PeftModel`, and so `get_peft_model`, refuse a recipe."""
    from peft.peft_model import PeftModel

    _check_first(PeftModel, "__init__", lambda _, model=None, **__: model)


def guard_peft_tuners() -> None:
    """Make PEFT's tuners, and so `inject_adapter_in_model`, refuse a recipe."""
    from peft.tuners.tuners_utils import BaseTuner

    _check_first(BaseTuner, "__init__", lambda _, model=None, **__: model)


def _check_first(owner: type, name: str, model_of: Callable[..., Any]) -> None:
    """Let a method run only if the model that it is about may be trained.

    Args:
        owner: The class that defines the method.
        name: The method.
        model_of: Finds the model from the instance and the call's keyword arguments; the first positional one
            counts as `model`.
    """
    run = getattr(owner, name)
    if run.__module__ == __name__:
        return

    @functools.wraps(run, assigned=("__name__", "__qualname__", "__doc__"))
    def checked(self: Any, *arguments: Any, **options: Any) -> Any:
        first = {"model": arguments[0]} if arguments else {}
        refuse_training(model_of(self, **{**options, **first}))
        return run(self, *arguments, **options)

    setattr(owner, name, checked)
