"""One output matrix for two models: when it is shared, that it is freed, and what each model's logits are."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import peft
import pytest
import torch
import transformers

from proxytune.backends.exact import ExactBackend
from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.backends.transformers.linear import PackedLinear
from proxytune.errors import UnsupportedModel

WIDTH, HIDDEN = 300, 32
PROMPTS = ([5, 6, 7, 8], [9], [40, 41])


def network(architecture: str = "llama", *, num_layers: int = 3, **options: Any) -> Any:
    config = transformers.AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": WIDTH,
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
            **options,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config)


def cut_of(model: Any, **options: Any) -> Any:
    """Return the model's first layer between its embedding and its head, all in tensors of their own."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    for key, value in options.items():
        setattr(config, key, value)
    small = type(model)(config).to(model.dtype)
    small.load_state_dict(model.state_dict(), strict=False)
    small.tie_weights()
    return small


def backend(model: Any, name: str = "model", **options: Any) -> TransformersBackend:
    return TransformersBackend(model.eval().requires_grad_(False), name=name, **options)


SHARING = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "soft cap": ("gemma2", {"tie_word_embeddings": True, "final_logit_softcapping": 3.0}),
    "scale": ("cohere", {"tie_word_embeddings": True, "logit_scale": 0.0625}),
    "divisor": ("granite", {"logits_scaling": 8.0}),
    "windows": ("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 4}),
}


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_both_models_are_those_of_their_own_products(kind, dtype):
    architecture, options = SHARING[kind]
    large = network(architecture, **options).to(dtype)
    small = cut_of(large)
    expected = []
    for model in (large, small):
        plain = backend(copy.deepcopy(model))
        state, _ = plain.prefill(PROMPTS)
        expected.append(plain.extend(state, torch.tensor([[1, 2], [3, 4], [5, 6]])))
    base, guest = backend(large, "base"), backend(small, "cut")
    assert guest.share_output(base)
    assert guest.host is base and base.host is None
    base_state, _ = base.prefill(PROMPTS)
    state, _ = guest.prefill(PROMPTS)
    tokens = torch.tensor([[1, 2], [3, 4], [5, 6]])
    states = guest.final_states(state, tokens)
    assert states.shape == (3, 2, HIDDEN)
    found = base.extend_with(base_state, tokens, states)
    # Sums of 32 products, in one order or another: a few units in the last place of logits up to 10.
    error = 1e-5 if dtype == torch.float32 else 0.1
    for logits, own in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, own, rtol=0, atol=error)
    # Afterwards both go on as ever.
    assert base.extend(base_state, tokens).shape == guest.extend(state, tokens).shape


def others() -> dict[str, Any]:
    """Return small models that do not end as the base does, and what each of them is beside."""
    plain = network()
    one_value = cut_of(plain)
    with torch.no_grad():
        one_value.lm_head.weight[-1, -1] += 1e-6
    adapted = peft.get_peft_model(cut_of(plain), peft.LoraConfig(target_modules=["lm_head"]))
    with_bias = cut_of(plain)
    with_bias.lm_head.bias = torch.nn.Parameter(torch.ones(WIDTH))
    return {
        "one value": (plain, one_value),
        "dtype": (plain, cut_of(plain).bfloat16()),
        "shape": (plain, network(vocab_size=WIDTH + 1)),
        "adapter on the head": (plain, adapted),
        "bias": (plain, with_bias),
    }


@pytest.mark.parametrize("kind", others())
def test_a_head_that_is_not_the_same_stays_the_models_own(kind):
    large, small = others()[kind]
    base = backend(large)
    adapters = ["default"] if kind == "adapter on the head" else []
    guest = backend(small, "cut", adapters=adapters)
    head = guest.model.get_output_embeddings()
    assert not guest.share_output(base)
    assert guest.host is None and guest.model.get_output_embeddings() is head
    state, _ = guest.prefill(PROMPTS)
    with pytest.raises(UnsupportedModel, match="cut does not share"):
        guest.final_states(state, torch.tensor([[1], [2], [3]]))


@pytest.mark.parametrize(
    ("architecture", "options", "others"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0}, {"final_logit_softcapping": 20.0}),
        ("gemma2", {"final_logit_softcapping": 30.0}, {"final_logit_softcapping": None}),
        ("cohere", {"logit_scale": 0.0625}, {"logit_scale": 0.125}),
    ],
)
def test_models_that_treat_logits_otherwise_share_the_matrix_and_not_the_product(
    architecture, options, others
):
    large = network(architecture, **options)
    small = cut_of(large, **others)
    plain = backend(copy.deepcopy(small))
    base, guest = backend(large), backend(small)
    assert guest.share_output(base) and guest.host is None
    assert small.lm_head.weight is large.lm_head.weight
    for own, expected in zip(guest.prefill(PROMPTS)[1], plain.prefill(PROMPTS)[1], strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_small_models_own_copy_is_freed(is_tied):
    large = network(tie_word_embeddings=is_tied)
    small = cut_of(large)
    own = [weakref.ref(small.lm_head.weight), weakref.ref(small.model.embed_tokens.weight)]
    assert backend(small).share_output(backend(large))
    gc.collect()
    assert [weight() for weight in own] == [None, None]
    assert small.lm_head.weight is large.lm_head.weight
    assert small.model.embed_tokens.weight is large.model.embed_tokens.weight


def test_tensors_that_two_models_hold_already_are_found():
    """As those of a cut that is made of its base in memory."""
    large = network(tie_word_embeddings=True)
    small = cut_of(large)
    small.lm_head = large.lm_head
    small.model.embed_tokens = large.model.embed_tokens
    assert backend(small).share_output(backend(large))


def test_a_shared_head_is_packed_once():
    options = {"vocab_size": 1100, "hidden_size": 1024, "num_layers": 1, "head_dim": 64}
    large = network(**options)
    small = cut_of(large)
    base = backend(large, owns_model=True)
    guest = backend(small, owns_model=True)
    assert guest.share_output(base)
    guest.prefill(PROMPTS)
    assert type(small.lm_head) is not PackedLinear  # what another model uses is that one's to pack
    base.prefill(PROMPTS)
    assert small.lm_head is large.lm_head


def test_models_whose_states_cannot_be_rewound_share_the_matrix_and_not_the_product():
    options = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    large = network("lfm2", **options)
    guest = backend(copy.deepcopy(large))
    assert guest.share_output(backend(large)) and guest.host is None


def test_an_exact_backend_makes_its_own_products():
    """A row's product must have the same shape with drafts, where base and expert do not read together."""
    large = network()
    base, guest = backend(large), backend(cut_of(large))
    assert guest.share_output(base)
    assert ExactBackend(guest).host is None


def test_a_head_that_is_called_by_keyword_makes_its_own_logits():
    class ByKeyword(torch.nn.Module):
        def __init__(self, head: torch.nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.head(input=states)

    large = network()
    base, guest = backend(large, "base"), backend(cut_of(large), "cut")
    inner = guest.model.lm_head
    guest.model.lm_head = ByKeyword(inner)
    guest.model.get_output_embeddings = lambda: inner
    guest.model.set_output_embeddings = lambda head: setattr(guest.model.lm_head, "head", head)
    assert guest.share_output(base)
    assert guest.host is None and guest.model.lm_head.head is base.model.lm_head
    assert guest.prefill(PROMPTS).logits.shape == (3, WIDTH)
