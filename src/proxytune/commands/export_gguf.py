"""`proxytune export-gguf`: models, adapters and recipes as GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from proxytune.commands.app import command
from proxytune.commands.console import print_text, say
from proxytune.commands.flags import Pick
from proxytune.commands.options import GrantOptions, argument
from proxytune.commands.progress import waiting
from proxytune.errors import InvalidRequest
from proxytune.settings import option

if TYPE_CHECKING:
    from proxytune.export.write import ExportedFile


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is written, and in which dtype."""

    dtype: str = option(
        "F16",
        "Dtype of the stored weights: F32, F16, BF16, Q8_0, Q4_0 or Q4_1; for an adapter F32 or F16",
        metavar="NAME",
    )
    adapter: str | None = option(
        None, "Write this LoRA adapter of the model instead of the model", metavar="PATH"
    )
    merge: bool = option(False, "Write the model with the adapter merged into its weights")
    pre: str | None = option(
        None,
        "llama.cpp's name for how the tokenizer splits text; it is not checked",
        metavar="NAME",
        none_means="found by comparing rules",
    )
    force: bool = option(False, "Replace OUTPUT if it exists with different content")


@command("proxytune export-gguf my-recipe my-recipe-gguf --dtype Q8_0", name="export-gguf")
def export_gguf(
    source: Annotated[
        str,
        argument(
            "SOURCE",
            "A recipe; or a small model: its directory, package:NAME/PATH, or its id on the Hugging "
            "Face Hub",
        ),
    ],
    output: Annotated[
        Path, argument("OUTPUT", "Where to write: a directory for a recipe, otherwise a .gguf file")
    ],
    options: ExportOptions,
    rights: Annotated[GrantOptions, Pick(leave_out=("key_env",))],
) -> None:
    """Write models and adapters as GGUF files, which llama.cpp runs.

    For a recipe, every small model and adapter is written, and a recipe that names them; its base stays the
    file it is. Models must be Llama-shaped with a byte-level tokenizer; others are refused by name.
    """
    from proxytune.checkpoints.checkpoint import holds_recipe
    from proxytune.export.recipe import export_recipe
    from proxytune.recipe.recipe import Recipe

    output = output.expanduser()
    if options.merge and options.adapter is None:
        raise InvalidRequest(
            "--merge is given without --adapter, so there is nothing to merge.\n"
            "hint: name the adapter with --adapter"
        )
    if options.adapter is not None and not options.merge and options.pre is not None:
        raise InvalidRequest(
            "--pre says how text is split, and the file of an adapter holds no tokenizer.\n"
            "hint: leave --pre out"
        )
    if not holds_recipe(source, root=Path.cwd()):
        file = _export_model(source, output, options)
        _say_exported(file)
        print_text(str(file.path))
        return
    if options.adapter is not None:
        raise InvalidRequest(
            f"--adapter is given, and {source} is a recipe, whose adapters are all written.\n"
            "hint: leave --adapter out, or name the small model instead of the recipe"
        )
    with waiting("writing GGUF files"):
        written = export_recipe(
            Recipe.read(source),
            output,
            dtype=options.dtype.upper(),
            pre=options.pre,
            overwrite=options.force,
            grants=rights.grants(),
        )
    for file in written.files:
        _say_exported(file)
    say(f"wrote {written.directory / 'config.json'}")
    print_text(str(written.directory))


def _export_model(source: str, output: Path, options: ExportOptions) -> ExportedFile:
    """Write a model, an adapter on it, or both in one."""
    from proxytune.checkpoints.adapter import find_adapter
    from proxytune.checkpoints.checkpoint import find_checkpoint
    from proxytune.export.adapter import export_adapter
    from proxytune.export.model import export_model

    dtype, overwrite = options.dtype.upper(), options.force
    model = find_checkpoint(source, root=Path.cwd())
    with waiting("writing a GGUF file"):
        files = None
        if options.adapter is not None:
            files = find_adapter(options.adapter, root=Path.cwd())
            if not options.merge:
                return export_adapter(files, model, output, dtype=dtype, overwrite=overwrite)
        return export_model(
            model, output, dtype=dtype, adapter=files, pre=options.pre, overwrite=overwrite
        )


def _say_exported(file: ExportedFile) -> None:
    line = f"wrote {file.path} ({file.num_bytes / 1e6:.1f} MB, {file.num_tensors} tensors)"
    if file.num_unquantized:
        line += (
            f"; {file.num_unquantized} tensors in F16, because their rows do not divide into blocks"
        )
    say(line)
