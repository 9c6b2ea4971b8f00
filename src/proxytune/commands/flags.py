"""Options as flags of the command line: a parameter that is a dataclass is taken apart, and built again.

    @command("proxytune write my-recipe")
    def write(recipe: RecipeArgument, sampling: Annotated[SamplingParams, Pick(leave_out=("seed",))]) -> None:

has a flag for every option that `SamplingParams` declares, apart from `--seed`, with the declared type,
default, help and limits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from proxytune.errors import InvalidRequest
from proxytune.request import check_alpha
from proxytune.settings import Declared, Option, options_of

PANELS = {
    "steering": "Steering options",
    "policy": "Steering options",
    "sampling": "Sampling options",
    "models": "Model options",
}
"""Headings of the help, by a parameter's name; the flags of the others stand under "Options"."""


METAVARS = {int: "N", float: "FLOAT", Path: "FILE", bool: None}


@dataclass(frozen=True, slots=True)
class Flag(Option):
    """An option of a command alone.

    Args:
        complete: What a shell offers for an incomplete value.
    """

    complete: Callable[[typer.Context, str], list[str]] | None = None


@dataclass(frozen=True, slots=True)
class Pick:
    """Which options a command takes, and what it says of them otherwise than their declaration.

    Args:
        only: Names of the only ones; empty for all.
        leave_out: Names of those that it does not take.
        defaults: Its own defaults, by name.
        help: Its own words, by name.
        none_means: What None stands for here, by name.
    """

    only: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    help: Mapping[str, str] = field(default_factory=dict)
    none_means: Mapping[str, str] = field(default_factory=dict)

    def of(self, settings: type) -> list[Declared]:
        """Return the options of a dataclass that are taken."""
        known = options_of(settings)
        unknown = {*self.only, *self.leave_out, *self.defaults, *self.help} - known.keys()
        assert not unknown, f"{settings.__name__} has no {', '.join(unknown)}"
        return [
            replace(
                declared,
                default=self.defaults.get(name, declared.default),
                option=replace(
                    declared.option,
                    help=self.help.get(name, declared.option.help),
                    none_means=self.none_means.get(name, declared.option.none_means),
                ),
            )
            for name, declared in known.items()
            if name not in self.leave_out and (not self.only or name in self.only)
        ]


def flattened(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command's function as typer takes it: a parameter for every flag."""
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    bundles: dict[str, tuple[type, list[Declared]]] = {}
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        settings, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if is_dataclass(settings):
            pick = next((note for note in notes if isinstance(note, Pick)), Pick())
            taken = pick.of(settings)  # type: ignore[arg-type]  # a class, since it annotates
            bundles[parameter.name] = (settings, taken)  # type: ignore[assignment]
            panel = PANELS.get(parameter.name)
            parameters += [_parameter(declared, panel) for declared in taken]
        else:
            parameters.append(parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        built = {}
        for name, (settings, taken) in bundles.items():
            own = {each.name: _value(each, values.pop(each.name)) for each in taken}
            # Else it checks itself, under its fields' names.
            if not hasattr(settings, "__post_init__"):
                for each in taken:
                    each.check(own[each.name], flag_of(each))
            built[name] = settings(**own)
        function(**values, **built)

    run.__name__ = function.__name__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def flag_of(declared: Declared) -> str:
    """Return an option's name on the command line."""
    return declared.option.flag or "--" + declared.name.replace("_", "-")


def given_flags(**values: Any) -> set[str]:
    """Return what was given on the command line, of some arguments and options.

    Args:
        values: Arguments by their name in the help, and dataclasses of options by any name. Nothing was given
            where a value is a default, or as good as none.
    """
    found = set()
    for name, value in values.items():
        if not is_dataclass(value):
            found |= {name} if value is not None else set()
            continue
        for declared in options_of(value.__class__).values():
            own = getattr(value, declared.name)
            if own != declared.default and own is not None and own is not False:
                found.add(flag_of(declared).split("/")[0])
    return found


def number_of(text: str, name: str) -> float:
    """Return a strength typed as text.

    Raises:
        InvalidRequest: It is not a number, or too large.
    """
    try:
        value = float(text)
    except ValueError:
        raise InvalidRequest(
            f"{name} is {text.strip()!r}, and must be a number.\n"
            "hint: 0 is the base alone, 1 the published method"
        ) from None
    return check_alpha(value, name)


def _parameter(declared: Declared, panel: str | None) -> inspect.Parameter:
    """Return the parameter that typer makes a flag of."""
    option, kind, default = declared.option, declared.type, declared.default
    is_tuple = get_origin(kind) is tuple
    is_repeated = is_tuple and option.separator is None
    item = _item(kind) if is_tuple else kind
    # What has no plain type is text here, and checked where the dataclass is built.
    typed: Any = item if item in (bool, int, float, Path) and option.separator is None else str
    if default is MISSING:
        default = inspect.Parameter.empty
    elif is_tuple:
        default = (option.separator or "").join(f"{each:g}" for each in default or ()) or None
    annotation: Any = list[typed] if is_repeated else typed
    annotation = annotation | None if default is None else annotation
    text = option.help
    if is_repeated and "repeat" not in text:
        text += "; repeat for more"
    if option.none_means is not None:
        text += f"  [default: {option.none_means}]"
    metavar = option.metavar or METAVARS.get(typed, "TEXT")
    if get_origin(kind) is Literal and option.metavar is None:
        metavar = f"[{'|'.join(get_args(kind))}]"
    has_default = default not in (None, inspect.Parameter.empty)
    flag = typer.Option(
        flag_of(declared),
        metavar=metavar,
        help=text,
        show_default=option.none_means is None and has_default,
        autocompletion=getattr(option, "complete", None),
        rich_help_panel=panel,
    )
    return inspect.Parameter(
        declared.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, flag],
    )


def _value(declared: Declared, given: Any) -> Any:
    """Return what was given on the command line as the dataclass's field holds it."""
    option, kind = declared.option, declared.type
    if get_origin(kind) is not tuple or given is None or given == []:
        return declared.default if given in (None, []) else given
    texts: Iterable[Any] = given
    if option.separator is not None:
        texts = [part.strip() for part in given.split(option.separator)]
    item = _item(kind)
    if item is float:
        return tuple(number_of(text, flag_of(declared)) for text in texts)
    if get_origin(item) is tuple:
        return tuple(_pair(text, flag_of(declared)) for text in texts)
    return tuple(text for text in texts if text != "" or option.separator is None)


def _item(kind: Any) -> Any:
    """Return the type of a tuple's items, without their limits."""
    item = get_args(kind)[0]
    return get_args(item)[0] if get_origin(item) is Annotated else item


def _pair(text: str, flag: str) -> tuple[int, float]:
    """Return a token id and a bias."""
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise InvalidRequest(
            f"{flag} is {text!r}, and must be a token id, an equals sign and a number.\n"
            f"hint: {flag} 42=-100 all but forbids the token 42"
        ) from None
