"""Proxy-tuning inside other engines, and how transformers learns of it.

`AutoConfig`, `AutoTokenizer` and `AutoModelForCausalLM` must know recipes after `import proxytune`, and that
import must not load transformers. So `register_with_transformers` adds a finder to `sys.meta_path` that finds
nothing itself: when one of transformers' three Auto modules is imported, whenever that is, its registration
runs right after. A module that is already there gets its registration at once.

Each registration needs no more of transformers than its Auto module has loaded by then, so it never meets a
half-imported module: the config and the tokenizer live in `auto.py`, the model in `transformers.py`.

In the same way, `Trainer` and PEFT learn to refuse recipes when their modules are imported (`frozen.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register_config() -> None:
    from proxytune.integrations.auto import register_config

    register_config()


def _register_tokenizer() -> None:
    from proxytune.integrations.auto import register_tokenizer

    register_tokenizer()


def _register_model() -> None:
    import proxytune.integrations.transformers

    # Where that module is itself being imported at this moment, it registers at its end.
    register = getattr(proxytune.integrations.transformers, "register_model", None)
    if register is not None:
        register()


def _guard_trainer() -> None:
    from proxytune.integrations.frozen import guard_trainer

    guard_trainer()


def _guard_peft_model() -> None:
    from proxytune.integrations.frozen import guard_peft_model

    guard_peft_model()


def _guard_peft_tuners() -> None:
    from proxytune.integrations.frozen import guard_peft_tuners

    guard_peft_tuners()


_REGISTRATIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.tokenization_auto": _register_tokenizer,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.trainer": _guard_trainer,
    "peft.peft_model": _guard_peft_model,
    "peft.tuners.tuners_utils": _guard_peft_tuners,
}


class _AfterImport(MetaPathFinder):
    """Lets the other finders find the modules in `_REGISTRATIONS`, and has a registration run after each."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        register = _REGISTRATIONS.get(fullname)
        if register is None:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None
            if find is not None and not isinstance(finder, _AfterImport):
                spec = find(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _run_after(spec.loader, register)
                return spec
        return None


def _run_after(loader: Loader, register: Callable[[], None]) -> None:
    """Have `register` run when the loader has executed its module."""
    execute = loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        register()

    loader.exec_module = execute_and_register  # type: ignore[method-assign]


def register_with_transformers() -> None:
    """Make the Auto classes read recipes and trainers refuse them, now or once they are imported."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    for name, register in _REGISTRATIONS.items():
        if name in sys.modules:
            register()
