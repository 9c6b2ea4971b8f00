"""Cutting a small model out of a large one: an ordinary model comes out, and it is the one computed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proxytune.backends.transformers.cut import put_bridge
from proxytune.checkpoints.bridge_file import Bridge
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.checkpoints.cut import ARCHITECTURES, Keep, check_can_cut, cut_keep
from proxytune.cut.bridge import Streams, fit_bridge
from proxytune.cut.run import make_proxy
from proxytune.cut.settings import CutSettings
from proxytune.errors import InputFileError, InvalidRequest, OutputFileError, UnsupportedModel
from tests.architectures.models import save, scatter, tiny_config

NUM_LAYERS = 6


def network(kind: str, **changes: Any) -> Any:
    """Return a tiny model of six layers with random weights."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind)
    config.num_hidden_layers = NUM_LAYERS
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * NUM_LAYERS
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        scatter(model)
    return model.eval()


def text_file(directory: Path) -> Path:
    path = directory / "rows.jsonl"
    texts = (
        f"The {i}th of them went to the north in the rain, and then to the sea." for i in range(40)
    )
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def by_hand(model: Any, keep: Keep, bridge: Any, token_ids: Tensor) -> Tensor:
    """Return the logits of the large model's own layers, with `bridge(u)` added in place of the middle."""
    inner = model.model
    states = inner.embed_tokens(token_ids)
    positions = torch.arange(token_ids.shape[1])[None]
    size = token_ids.shape[1]
    mask = torch.full((size, size), -torch.inf).triu(1)[None, None]
    angles = inner.rotary_emb(states, positions)

    def through(layer: Any, states: Tensor) -> Tensor:
        found = layer(
            states, attention_mask=mask, position_ids=positions, position_embeddings=angles
        )
        return found if torch.is_tensor(found) else found[0]

    for layer in inner.layers[: keep.first]:
        states = through(layer, states)
    unit = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps)
    states = states + bridge(unit)
    for layer in inner.layers[-keep.last :]:
        states = through(layer, states)
    logits: Tensor = model.lm_head(inner.norm(states))
    return logits


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied head", "own head"])
@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_a_saved_cut_computes_the_kept_layers_with_the_bridge_between(
    kind: str, is_tied: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = network(kind, tie_word_embeddings=is_tied)
    if is_tied:
        model.tie_weights()
    save(model, tmp_path / "base")
    keep = Keep(2, 1)
    settings = CutSettings(
        output=str(tmp_path / "cut"), keep="2+1", data=str(text_file(tmp_path)), tokens=600
    )
    result = make_proxy(str(tmp_path / "base"), settings)
    cut: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert type(cut).__name__ == ARCHITECTURES[kind]
    assert cut.config.num_hidden_layers == 4
    assert cut_keep(cut.config) == keep
    assert result.num_layers == (4, NUM_LAYERS)
    mlp = cut.model.layers[2].mlp

    def bridge(unit: Tensor) -> Tensor:
        gate = mlp.act_fn(unit @ mlp.gate_proj.weight[0])
        products = (unit * gate[..., None]) @ mlp.up_proj.weight[: len(unit[0, 0])].t()
        return products @ mlp.down_proj.weight[:, : products.shape[-1]].t()

    token_ids = torch.tensor([[5, 17, 99, 250, 3, 40]])
    with torch.no_grad():
        expected = by_hand(model, keep, bridge, token_ids)
        # Sums of float32 in another order.
        torch.testing.assert_close(cut(token_ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert (
        find_checkpoint(str(tmp_path / "cut"), root=tmp_path).vocabulary.width
        == model.config.vocab_size
    )


class _Config:
    rms_norm_eps, hidden_act, model_type, intermediate_size = 1e-6, "silu", "llama", 32


def test_a_linear_map_is_found_where_a_direction_is_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(4_000, 16, generator=generator)
    before[:, 0] = 0
    before = before / before.norm(dim=1, keepdim=True) * 4
    before[:, 0] = 4  # so that u[0] is sqrt(8) for every token
    unit = before * torch.rsqrt(before.pow(2).mean(-1, keepdim=True) + 1e-6)
    wanted = torch.randn(16, 16, generator=generator)
    target = Streams(before, before + unit @ wanted.t())
    bridge, error = fit_bridge(target, _Config, nn.SiLU())
    assert error < 1e-4  # what the ridge of 1e-3 costs
    found = (unit * torch.nn.functional.silu(unit @ bridge.gate[0])[:, None]) @ bridge.up.t()
    torch.testing.assert_close(found @ bridge.down.t(), unit @ wanted.t(), atol=0.2, rtol=0)


def test_a_bridge_of_fewer_units_than_the_stream_is_wide_has_the_best_rank() -> None:
    class Narrow(_Config):
        intermediate_size = 3

    generator = torch.Generator().manual_seed(0)
    before = torch.randn(500, 8, generator=generator)
    bridge, _ = fit_bridge(Streams(before, before * 2), Narrow, nn.SiLU())
    assert bridge.up.shape == (3, 8)
    assert bridge.down.shape == (8, 3)


def test_an_activation_that_bends_large_numbers_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="leaves large numbers as they are"):
        fit_bridge(Streams(torch.ones(1, 4), torch.ones(1, 4)), _Config, nn.Sigmoid())


def test_attention_of_a_bridge_adds_nothing() -> None:
    layer = network("qwen3").model.layers[0]
    width = layer.mlp.gate_proj.in_features
    zero = torch.zeros(width)
    put_bridge(layer, Bridge(zero[None], torch.eye(width), torch.zeros(width, width)))
    assert not layer.self_attn.o_proj.weight.any()
    assert layer.self_attn.q_norm.weight.eq(1).all()


@pytest.mark.parametrize("text", ["3", "3+", "a+b", "3+3+3", "-1+2", ""])
def test_a_keep_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="must be two numbers of layers"):
        Keep.parse(text)


def test_a_cut_needs_a_layer_at_each_end() -> None:
    with pytest.raises(InvalidRequest, match="at least one of each"):
        Keep.parse("0+3")


@pytest.mark.parametrize("keep", ["3+2", "3+3", "40+40"])
def test_a_cut_that_would_not_be_smaller_is_refused(keep: str) -> None:
    config = network("llama").config
    with pytest.raises(InvalidRequest, match="has only 6"):
        check_can_cut(config, Keep.parse(keep), "base")
    check_can_cut(config, Keep(2, 2), "base")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("mixtral", "mixture of experts"),
        ("gemma3_text", "its layers differ"),
        ("deepseek_v3", "mixture of experts"),
        ("mamba", "is not known"),
        ("gpt2", "is not known"),
        ("minicpm3", "latent attention"),
        ("jamba", "mixture of experts"),
        ("gemma2", "its layers differ"),
    ],
)
def test_models_whose_layers_are_of_another_kind_are_refused_by_name(kind: str, why: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    with pytest.raises(UnsupportedModel, match=f"{kind}.*{why}"):
        check_can_cut(CONFIG_MAPPING[kind](), Keep(1, 1), "base")


def test_windows_that_differ_between_layers_are_refused() -> None:
    config = network("qwen2").config
    config.layer_types = ["full_attention"] * 3 + ["sliding_attention"] * 3
    with pytest.raises(UnsupportedModel, match="full_attention, sliding_attention"):
        check_can_cut(config, Keep(1, 1), "base")


def test_an_api_cannot_be_cut(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="needs a model's weights"):
        make_proxy(
            "http://localhost:1/v1", CutSettings(output=str(tmp_path / "cut"), data="rows.txt")
        )


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    save(network("llama"), tmp_path / "base")
    rows = tmp_path / "rows.txt"
    rows.write_text("Too short.")
    settings = CutSettings(output=str(tmp_path / "cut"), keep="1+1", data=str(rows))
    with pytest.raises(InputFileError, match="at least 256"):
        make_proxy(str(tmp_path / "base"), settings)


def test_without_text_the_base_writes_its_own(tmp_path: Path) -> None:
    save(network("llama"), tmp_path / "base")
    before = torch.random.get_rng_state()
    settings = CutSettings(output=str(tmp_path / "cut"), keep="2+1", tokens=300)
    result = make_proxy(str(tmp_path / "base"), settings)
    assert result.source == "text that the base wrote"
    assert result.num_tokens >= 300
    assert result.num_test_tokens > 0
    assert math.isfinite(result.perplexity["cut"])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert "--keep 2+1 --tokens 300" in (tmp_path / "cut" / "README.md").read_text("utf-8")


def test_of_a_single_window_a_part_is_held_out(tmp_path: Path) -> None:
    save(network("llama"), tmp_path / "base")
    rows = tmp_path / "rows.txt"
    rows.write_text("The rain in Spain. " * 40)
    options = {"keep": "1+1", "data": str(rows), "tokens": 256}
    settings = CutSettings(output=str(tmp_path / "cut"), **options)  # type: ignore[arg-type]
    result = make_proxy(str(tmp_path / "base"), settings)
    assert result.num_test_tokens > 40
    assert all(value < 1e4 for value in result.perplexity.values())  # not nan either


def test_a_directory_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(OutputFileError, match="is there already"):
        make_proxy("base", CutSettings(output=str(tmp_path), data="rows.txt"))


def test_healing_brings_the_cut_nearer_to_the_base_and_changes_only_the_bridge(
    tmp_path: Path,
) -> None:
    from proxytune.backends.transformers.cut import cut_model
    from proxytune.checkpoints.cut import cut_config
    from proxytune.cut.heal import heal

    base = network("llama", mlp_bias=True).requires_grad_(False)
    keep = Keep(2, 1)
    cut = cut_model(base, cut_config(base.config, keep), keep)
    bridge = cut.model.layers[keep.bridge]
    width = base.config.hidden_size
    gate = torch.full((1, width), 0.3)
    put_bridge(bridge, Bridge(gate, torch.eye(width), torch.zeros(width, width)))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    losses: list[float] = []
    windows = [[i % 250 for i in range(start, start + 200)] for start in range(8)]
    num_tokens = heal(
        base,
        cut,
        bridge,
        windows,
        num_tokens=24_000,
        seed=0,
        progress=lambda done, loss: losses.append(loss),
        learning_rate=1e-2,
    )
    assert num_tokens == 24_000
    # The eight windows are read in two steps.
    assert sum(losses[-2:]) < 0.98 * sum(losses[:2])
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(p.requires_grad for p in cut.parameters())
    assert not bridge.self_attn.o_proj.weight.any()
    assert not bridge.mlp.down_proj.bias.any()  # a bridge's file has none


def test_a_card_says_how_the_cut_was_made_and_what_it_costs(tmp_path: Path) -> None:
    save(network("llama"), tmp_path / "base")
    settings = CutSettings(
        output=str(tmp_path / "cut"),
        keep="1+1",
        data=str(text_file(tmp_path)),
        tokens=600,
        heal=300,
        bridge_only=True,
    )
    result = make_proxy(str(tmp_path / "base"), settings)
    card = (tmp_path / "cut" / "README.md").read_text()
    assert set(result.perplexity) == {"base", "cut", "healed"}
    for score in result.perplexity.values():
        assert f"| {score:.2f} |" in card
    assert f"proxytune make-proxy {tmp_path / 'base'} --keep 1+1 --data" in card
    assert "--tokens 600 --heal 300 --bridge-only" in card
    assert '"keep": [1, 1]' in card
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
        "README.md",
        "bridge.safetensors",
    ]
