"""A recipe becomes a directory of GGUF files; the command `export-gguf`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from proxytune import cli
from proxytune.checkpoints.checkpoint import holds_recipe
from proxytune.checkpoints.output_bias import OutputBias, write_output_bias
from proxytune.errors import RecipeError, UnsupportedModel
from proxytune.export.recipe import export_recipe
from proxytune.recipe.files import RecipeFiles
from proxytune.recipe.recipe import AUTO_MAP, Recipe
from proxytune.recipe.spec import ExpertSpec, ExpertWeights, ModelSpec
from tests.support.gguf import contents, llama, logits, lora
from tests.support.tiny import tiny_gguf, tiny_model

SMOL = "package:proxytune/smol"


@pytest.fixture
def recipe(tmp_path):
    """A recipe with two adapters on one anti-expert, one expert of its own weights, and a local base."""
    root = tmp_path / "recipe"
    llama(root / "small")
    llama(root / "tuned" / "small", seed=1)
    llama(tmp_path / "base", seed=2)
    lora(root / "small", root / "adapters" / "law", target_modules=["q_proj"])
    lora(root / "small", root / "adapters" / "tales", target_modules=["up_proj"])
    small = ModelSpec(model="small", dtype="float32", prompt="chat")
    return Recipe(
        base=ModelSpec(model="../base", dtype="float32"),
        experts=(
            ExpertSpec("law", ModelSpec(adapter="adapters/law"), small, 0.5),
            ExpertSpec("tales", ModelSpec(adapter="adapters/tales", prompt="chat"), small),
            ExpertSpec("own", ModelSpec(model="tuned/small"), small),
            ExpertSpec("bare", small, ModelSpec(same_as="base")),
        ),
        default_expert="law",
        directory=root,
    )


def test_a_recipe_becomes_a_directory_of_gguf_files_with_shared_weights_once(recipe, tmp_path):
    recipe.write(recipe.directory)
    written = export_recipe(recipe, tmp_path / "out" / "gguf", dtype="Q8_0")
    directory = tmp_path / "out" / "gguf"
    assert written.directory == directory
    there = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*.gguf"))
    assert there == [
        "adapters/law.gguf",
        "adapters/tales.gguf",
        "models/small-2.gguf",
        "models/small.gguf",
    ]
    assert sorted(str(file.path.relative_to(directory)) for file in written.files) == there
    content = json.loads((directory / "config.json").read_text())
    small = {"model": "models/small.gguf", "prompt": "chat", "llama_cpp": {}}
    assert content == {
        "model_type": "proxytune",
        "architectures": ["ProxyTunedForCausalLM"],
        # The base is the same directory from the new place, and runs as it did.
        "base": {"model": "../../base", "dtype": "float32"},
        "experts": [
            {
                "name": "law",
                "anti_expert": small,
                "expert": {"adapter": "adapters/law.gguf"},
                "alpha": 0.5,
            },
            {
                "name": "tales",
                "anti_expert": small,
                "expert": {"adapter": "adapters/tales.gguf", "prompt": "chat"},
                "alpha": 1.0,
            },
            {
                "name": "own",
                "anti_expert": small,
                "expert": {"model": "models/small-2.gguf", "llama_cpp": {}},
                "alpha": 1.0,
            },
            {"name": "bare", "anti_expert": {"same_as": "base"}, "expert": small, "alpha": 1.0},
        ],
        "combine": "sum",
        "default_expert": "law",
        "auto_map": AUTO_MAP,
    }
    assert "models/small.gguf" in (directory / "README.md").read_text()
    torch.testing.assert_close(
        logits(directory / "models/small-2.gguf"),
        logits(recipe.directory / "tuned/small"),
        rtol=0,
        atol=0.3,  # 8 bits; the logits have a standard deviation of 1.7
    )
    others = logits(directory / "models/small.gguf") - logits(directory / "models/small-2.gguf")
    assert others.std() > 1


def test_weights_are_kept_and_an_output_bias_is_carried_along(recipe, tmp_path):
    law, *_ = recipe.experts
    weights = ExpertWeights(base=0.9)
    write_output_bias(
        recipe.directory / "biases" / "law.safetensors",
        OutputBias(torch.tensor([3, 5]), torch.tensor([0.5, -1.0])),
    )
    law = replace(law, weights=weights, bias="biases/law.safetensors")
    recipe = replace(recipe, experts=(law,)).write(recipe.directory)
    directory = export_recipe(recipe, tmp_path / "gguf").directory
    (exported,) = Recipe.read(directory).experts
    assert (exported.weights, exported.bias) == (weights, law.bias)
    bias = RecipeFiles(Recipe.read(directory)).output_bias(exported)
    assert bias is not None and bias.token_ids.tolist() == [3, 5]


def test_a_gguf_base_is_run_by_llama_cpp_and_gguf_models_stay_where_they_are(recipe, tmp_path):
    from dataclasses import replace

    tiny_gguf(tmp_path / "base.gguf")
    tiny_gguf(recipe.directory / "tiny.gguf")
    expert = ExpertSpec("own", ModelSpec(model="small"), ModelSpec(model="tiny.gguf"))
    changed = replace(
        recipe,
        base=ModelSpec(model="../base.gguf", prompt="chat", dtype="bfloat16"),
        experts=(expert,),
        default_expert=None,
    )
    written = export_recipe(changed, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["base"] == {"model": "../base.gguf", "prompt": "chat", "llama_cpp": {}}
    assert content["experts"][0]["anti_expert"] == {
        "model": "../recipe/tiny.gguf",
        "llama_cpp": {},
    }
    assert [file.path.name for file in written.files] == ["small.gguf"]


def test_another_recipe_is_kept_unless_it_is_to_be_replaced(recipe, tmp_path):
    from dataclasses import replace

    export_recipe(recipe, tmp_path / "out")
    export_recipe(recipe, tmp_path / "out")  # the same one
    other = replace(recipe, default_expert="own")
    with pytest.raises(RecipeError, match="another recipe"):
        export_recipe(other, tmp_path / "out")
    export_recipe(other, tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["default_expert"] == "own"
    with pytest.raises(RecipeError, match='"llama"'):
        export_recipe(recipe, tmp_path / "base", overwrite=True)
    with pytest.raises(RecipeError, match="that is to be exported"):
        export_recipe(recipe, recipe.directory, overwrite=True)


def test_a_recipe_with_a_model_that_cannot_be_written_leaves_nothing(recipe, tmp_path):
    from dataclasses import replace

    tiny_model(recipe.directory / "gpt2", "gpt2")
    expert = ExpertSpec("odd", ModelSpec(model="small"), ModelSpec(model="gpt2"))
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel"):
        export_recipe(replace(recipe, experts=(*recipe.experts, expert)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, ["export-gguf", *map(str, arguments)])


def test_the_command_prints_the_path_and_says_what_it_wrote(recipe, tmp_path):
    small = recipe.directory / "small"
    done = run(small, tmp_path / "small.gguf", "--dtype", "q8_0")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'small.gguf'}\n"
    assert "MB, 21 tensors" in done.stderr
    adapter = recipe.directory / "adapters" / "law"
    done = run(small, tmp_path / "law.gguf", "--adapter", adapter)
    assert done.stdout == f"{tmp_path / 'law.gguf'}\n"
    assert contents(tmp_path / "law.gguf")[0]["general.type"] == "adapter"
    done = run(small, tmp_path / "merged.gguf", "--adapter", adapter, "--merge", "--dtype", "F32")
    assert done.exit_code == 0, done.output
    torch.testing.assert_close(
        logits(tmp_path / "merged.gguf"), logits(small, adapter), rtol=0, atol=1e-4
    )


def test_the_command_writes_a_recipe_to_a_directory(recipe, tmp_path):
    recipe.write(recipe.directory)
    done = run(recipe.directory, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'out'}\n"
    for name in ("models/small.gguf", "adapters/tales.gguf", "config.json"):
        assert str(tmp_path / "out" / name) in done.stderr
        assert (tmp_path / "out" / name).is_file()


def test_a_users_mistake_ends_with_code_2_and_a_message(recipe, tmp_path):
    recipe.write(recipe.directory)
    small, out = recipe.directory / "small", tmp_path / "out.gguf"
    adapter = recipe.directory / "adapters" / "law"
    for arguments, words in (
        ((small, out, "--merge"), "--merge is given without --adapter"),
        ((small, out, "--adapter", adapter, "--pre", "gpt-2"), "holds no tokenizer"),
        ((recipe.directory, out, "--adapter", adapter), "is a recipe"),
        ((small, out, "--dtype", "Q5_K"), "'Q5_K'"),
        ((small, tmp_path / "out"), "must end in .gguf"),
        ((tmp_path / "nowhere" / "at" / "all", out), "no directory at"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert words in done.stderr
        assert not done.stdout
        assert not out.exists()
    run(small, out)
    done = run(small, out, "--dtype", "F32")
    assert done.exit_code == 2
    assert "--force" in done.stderr
    assert run(small, out, "--dtype", "F32", "--force").exit_code == 0


def test_a_reference_tells_whether_it_is_a_recipe(recipe, tmp_path):
    recipe.write(recipe.directory)
    assert holds_recipe("recipe", root=tmp_path)
    assert holds_recipe(SMOL, root=tmp_path)
    assert not holds_recipe("recipe/small", root=tmp_path)
    assert not holds_recipe("recipe/adapters/law", root=tmp_path)
    assert not holds_recipe(f"{SMOL}/anti-expert", root=tmp_path)
