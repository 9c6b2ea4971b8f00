"""Which layers get the rows of a batch one by one, found out without weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from proxytune.checkpoints.rows import layout_of, modules_of_rows

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def empty(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def missed(model):
    """Return the ends of the names of linear layers that do not get rows."""
    gets_rows = modules_of_rows(model)
    names = {name for name in layout_of(model).linear if not gets_rows.get(name, False)}
    return {name.partition("layers.")[2].partition(".")[2] or name for name in names}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(**SIZES, intermediate_size=32), set()),
        (transformers.Gemma3TextConfig(**SIZES, intermediate_size=32, head_dim=8), set()),
        (transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=4), set()),
        # Positions are the same for all rows.
        (
            transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2),
            {"transformer.wpe"},
        ),
        # transformers looks for the padding token among the token ids.
        (
            transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, pad_token_id=0),
            {"transformer.wpe"},
        ),
        (
            transformers.OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16),
            {"fc1", "fc2", "model.decoder.embed_positions"},
        ),
        (
            transformers.Qwen2MoeConfig(
                **SIZES,
                intermediate_size=32,
                moe_intermediate_size=8,
                shared_expert_intermediate_size=8,
                num_experts=4,
                num_experts_per_tok=2,
            ),
            {
                f"mlp.shared_expert{part}"
                for part in (".gate_proj", ".up_proj", ".down_proj", "_gate")
            },
        ),
        # The router makes a list of its values, by which the queries' experts split their input.
        (
            transformers.JetMoeConfig(
                **{key: size for key, size in SIZES.items() if key != "num_attention_heads"},
                kv_channels=4,
                intermediate_size=32,
                num_local_experts=4,
                num_experts_per_tok=2,
            ),
            {"self_attention.experts.router.layer", "mlp.router.layer"},
        ),
        # Each language's rows are taken out by a mask.
        (
            transformers.XmodConfig(
                **SIZES,
                intermediate_size=32,
                languages=["en_XX"],
                default_language="en_XX",
                is_decoder=True,
            ),
            {
                f"roberta.encoder.layer.{layer}.output.adapter_modules.en_XX.{part}"
                for layer in range(2)
                for part in ("dense1", "dense2")
            },
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_linear_layers_get_rows_unless_the_model_flattens_them(config, expected):
    assert missed(empty(config)) == expected


@pytest.mark.parametrize("is_training", [False, True])
def test_the_model_is_left_as_it_was(is_training):
    model = empty(transformers.LlamaConfig(**SIZES, intermediate_size=32)).train(is_training)
    model.lm_head.train(not is_training)
    before = [module.training for module in model.modules()]
    assert modules_of_rows(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_of_a_model_that_cannot_be_run_without_values_nothing_is_known():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, device="meta")

        def forward(self, input_ids, use_cache=True):
            return self.layer(torch.ones(input_ids.tolist(), device="meta"))

    assert modules_of_rows(Odd()) == {}


class Fails(nn.Module):
    def forward(self, hidden_states):
        raise RuntimeError


class Half(nn.Module):
    """A model with layers that run, layers that fail and layers that are not called."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 8, device="meta")
        self.fails, self.after = Fails(), nn.Linear(8, 8, device="meta")
        self.flat, self.never = nn.Linear(8, 8, device="meta"), nn.Linear(8, 8, device="meta")

    def forward(self, input_ids):
        hidden_states = self.after(self.fails(self.embedding(input_ids)))
        return self.flat(hidden_states.flatten(0, 1)), self.fails(hidden_states.flatten(0, 1))


def test_modules_that_fail_or_never_run_are_left_out():
    class FailsOnce(Half):
        def forward(self, input_ids):
            hidden_states = self.after(self.fails(self.embedding(input_ids)))
            return self.flat(hidden_states.flatten(0, 1))

    known = {"embedding": True, "after": True, "flat": False, "": False}
    assert modules_of_rows(FailsOnce()) == known
    # What gets other rows once does so whether it fails or not.
    assert modules_of_rows(Half()) == {**known, "fails": False}


def mask_of(token_ids):
    return token_ids == 1


@pytest.mark.parametrize(
    "choose",
    [
        lambda states, ids: states[mask_of(ids)],
        lambda states, ids: states[mask_of(ids).nonzero(as_tuple=True)],
        lambda states, ids: states[torch.where(mask_of(ids))],
        lambda states, ids: states.flatten(0, 1)[mask_of(ids).flatten().nonzero().squeeze(-1)],
        lambda states, ids: states[mask_of(ids[:, 0])],
        lambda states, ids: states.flatten(0, 1).split(ids.sum(0).tolist())[0],
    ],
)
def test_what_is_chosen_by_value_is_no_batch(choose):
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 8, device="meta")
            self.chosen, self.all = (nn.Linear(8, 8, device="meta") for _ in range(2))

        def forward(self, input_ids):
            hidden_states = self.embedding(input_ids)
            self.chosen(choose(hidden_states, input_ids))
            hidden_states[mask_of(input_ids)] = 0.0
            return self.all(hidden_states)

    found = modules_of_rows(Chooses())
    assert found["all"] and not found["chosen"]
