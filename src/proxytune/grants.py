"""What a caller allows: whoever runs a command or writes a program, and nobody else.

Recipes, models and adapters can ask for rights that would let them harm whoever runs them. What they say is
only a request. A right is there if a file asks for it *and* the caller grants it.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxytune.errors import InvalidRequest

KEY_VARIABLE = "PROXYTUNE_API_KEY"
"""The variable with the key of the API that is called; a server takes its clients' key from it."""


@dataclass(frozen=True, slots=True)
class Grants:
    """The rights that the caller grants for one run.

    Args:
        trust_remote_code: Run code that comes with models, where the recipe asks for it.
        allow_pickle: Read pickled weights, which can run any code, where the recipe asks for it.
        key_env: The environment variable whose key is sent to the API of the recipe's base; None for what is
            bound to that host (`backends/api/keys.py`).

    Raises:
        InvalidRequest: A grant that is true or false is something else.
    """

    trust_remote_code: bool = False
    allow_pickle: bool = False
    key_env: str | None = None

    def __post_init__(self) -> None:
        for name in ("trust_remote_code", "allow_pickle"):
            # "false" as text would count as true.
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(
                    f"{name} is {getattr(self, name)!r}, and must be True or False"
                )


NOTHING = Grants()
"""No rights: what every function takes unless its caller says otherwise."""
