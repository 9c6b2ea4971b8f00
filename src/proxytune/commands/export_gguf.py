"""Todo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxytune.commands.app import command
from proxytune.commands.console import stderr
from proxytune.errors import InvalidRequest

if TYPE_CHECKING:
    from proxytune.export.write import ExportedFile


@command("proxytune export-gguf my-recipe my-recipe-gguf --dtype Q8_0", name="export-gguf")
def export_gguf(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A recipe; or a small model: its directory, package:NAME/PATH, or its id on the Hugging "
            "Face Hub",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            help="Where to write: a directory for a recipe, else a .gguf file",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Store weights in it: F32, F16, BF16, Q8_0, Q4_0 or Q4_1; an adapter takes F32 or F16",
        ),
    ] = "F16",
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Write this LoRA adapter on the model instead of the model",
            show_default=False,
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Write the model with the adapter merged into its weights"),
    ] = False,
    pre: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="llama.cpp's name for how the tokenizer cuts text, taken as given  "
            "[default: found by comparing rules]",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is at OUTPUT with another content")
    ] = False,
) -> None:
    """Write models and adapters as GGUF files, which llama.cpp runs.

    Of a recipe, every small model and adapter is written, and a recipe that names them; its base stays the
    file it is. Models are Llama-shaped, with a byte-level tokenizer; others are refused by name.
    """
    from proxytune.checkpoints.adapter import find_adapter
    from proxytune.checkpoints.checkpoint import find_checkpoint, holds_recipe
    from proxytune.export.adapter import export_adapter
    from proxytune.export.model import export_model
    from proxytune.export.recipe import export_recipe
    from proxytune.recipe.recipe import Recipe

    root, dtype, output = Path.cwd(), dtype.upper(), output.expanduser()
    if merge and adapter is None:
        raise InvalidRequest(
            "--merge is given without --adapter, so there is nothing to merge.\n"
            "hint: name the adapter with --adapter"
        )
    if adapter is not None and not merge and pre is not None:
        raise InvalidRequest(
            "--pre says how text is cut, and the file of an adapter holds no tokenizer.\n"
            "hint: leave --pre out"
        )
    if holds_recipe(source, root=root):
        if adapter is not None:
            raise InvalidRequest(
                f"--adapter is given, and {source} is a recipe, whose adapters are all written.\n"
                "hint: leave --adapter out, or name the small model instead of the recipe"
            )
        with stderr().status("writing GGUF files"):
            written = export_recipe(
                Recipe.read(source), output, dtype=dtype, pre=pre, overwrite=force
            )
        for file in written.files:
            _say_exported(file)
        typer.echo(f"wrote {written.directory / 'config.json'}", err=True)
        typer.echo(written.directory)
        return
    model = find_checkpoint(source, root=root)
    with stderr().status("writing a GGUF file"):
        if adapter is None:
            file = export_model(model, output, dtype=dtype, pre=pre, overwrite=force)
        else:
            files = find_adapter(adapter, root=root)
            if merge:
                file = export_model(
                    model, output, dtype=dtype, adapter=files, pre=pre, overwrite=force
                )
            else:
                file = export_adapter(files, model, output, dtype=dtype, overwrite=force)
    _say_exported(file)
    typer.echo(file.path)


def _say_exported(file: ExportedFile) -> None:
    line = f"wrote {file.path} ({file.num_bytes / 1e6:.1f} MB, {file.num_tensors} tensors)"
    if file.num_unquantized:
        line += (
            f"; {file.num_unquantized} tensors in F16, because their rows do not divide into blocks"
        )
    typer.echo(line, err=True)
