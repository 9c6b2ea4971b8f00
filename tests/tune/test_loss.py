"""The chunked loss against torch's own on whole logits, and heads against the models they come from."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from proxytune.errors import UnsupportedModel
from proxytune.logits.steer import Contribution, combine
from proxytune.text.vocab import Vocabulary, align
from proxytune.tune.heads import (
    BasePart,
    FrozenHeads,
    FrozenPart,
    Head,
    ShownPart,
    align_base_head,
    base_ids,
    check_head,
    form_coefficients,
    head_of,
    run_body,
)
from proxytune.tune.loss import _Work, cross_entropy, divergence
from tests.support.tiny import tiny_config

VOCAB, WIDTH, BASE_WIDTH, POSITIONS = 23, 6, 9, 11
SHAPES = [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 1.5)]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_head(
    seed: int, width: int = WIDTH, *, bias: bool = False, scale: float = 1.0, softcap=None
) -> Head:
    return Head(
        random(VOCAB, width, seed=seed),
        random(VOCAB, seed=seed + 50) if bias else None,
        scale,
        softcap,
    )


HIDDEN, ANTI_HIDDEN = random(POSITIONS, WIDTH, seed=0), random(POSITIONS, WIDTH, seed=1)
BASE_HIDDEN = random(POSITIONS, BASE_WIDTH, seed=2)
TARGETS = torch.randint(0, VOCAB, (POSITIONS,), generator=torch.Generator().manual_seed(3))


def plain_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden @ head.weight.T
    logits = (logits if head.bias is None else logits + head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def loss_and_gradients(loss_of, head: Head, upstream: float = 0.7) -> list[torch.Tensor | None]:
    """Return the loss of (hidden, head) and its gradients of hidden states, weight and bias."""
    hidden = HIDDEN.clone().requires_grad_()
    weight = head.weight.clone().requires_grad_()
    bias = None if head.bias is None else head.bias.clone().requires_grad_()
    loss = loss_of(hidden, replace(head, weight=weight, bias=bias))
    (upstream * loss).backward()
    return [loss.detach(), hidden.grad, weight.grad, None if bias is None else bias.grad]


def frozen_part(form: str, alpha: float, base: Head, anti_expert: Head) -> tuple[FrozenPart, float]:
    factors = form_coefficients(form, alpha)
    heads = FrozenHeads.of(
        base, anti_expert, base_factor=factors.base, anti_expert_factor=factors.anti_expert
    )
    return FrozenPart(torch.cat([BASE_HIDDEN, ANTI_HIDDEN], 1), heads), factors.expert


def explicit_logits(form, alpha, hidden, head, base, anti_expert):
    expert = plain_logits(hidden, head)
    base, anti_expert = plain_logits(BASE_HIDDEN, base), plain_logits(ANTI_HIDDEN, anti_expert)
    if form == "steered":
        return base + alpha * (expert - anti_expert)
    return expert + alpha * (base - anti_expert)


@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), SHAPES)
def test_loss_and_gradients_are_those_of_torch_on_whole_logits(scale, softcap, bias, chunk_rows):
    head = random_head(7, bias=bias, scale=scale, softcap=softcap)
    ours = loss_and_gradients(
        lambda h, head: cross_entropy(h, head, TARGETS, chunk_rows=chunk_rows), head
    )
    theirs = loss_and_gradients(
        lambda h, head: F.cross_entropy(plain_logits(h, head), TARGETS, reduction="sum"), head
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # float32, sums of 11 x 23 terms
    assert float(theirs[1].abs().max()) > 0.1


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("form", ["steered", "paper"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), SHAPES)
def test_the_ensembles_loss_and_gradients_follow_the_formula(form, alpha, bias, scale, softcap):
    head, anti_expert = (random_head(s, bias=bias, scale=scale, softcap=softcap) for s in (7, 8))
    base = random_head(9, BASE_WIDTH, bias=bias, scale=1.5, softcap=softcap and 2.0)
    part, factor = frozen_part(form, alpha, base, anti_expert)
    ours = loss_and_gradients(
        lambda h, head: cross_entropy(
            h, head, TARGETS, frozen=part, expert_factor=factor, chunk_rows=4
        ),
        head,
    )
    theirs = loss_and_gradients(
        lambda h, head: F.cross_entropy(
            explicit_logits(form, alpha, h, head, base, anti_expert), TARGETS, reduction="sum"
        ),
        head,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["steered", "paper"])
def test_a_head_shared_with_the_anti_expert_gives_what_two_equal_heads_give(form):
    """A LoRA expert shares its head with the anti-expert; one product then makes the logits of both."""
    shared = random_head(7, bias=True, scale=0.5)
    base = random_head(9, BASE_WIDTH, bias=True)
    results = []
    for anti_expert in (shared, shared.copy()):
        part, factor = frozen_part(form, 0.5, base, anti_expert)
        hidden = HIDDEN.clone().requires_grad_()
        loss = cross_entropy(
            hidden, shared, TARGETS, frozen=part, expert_factor=factor, chunk_rows=4
        )
        loss.backward()
        results.append([loss.detach(), hidden.grad])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_the_two_forms_agree_at_alpha_one_and_at_no_other():
    head, anti_expert, base = random_head(7), random_head(8), random_head(9, BASE_WIDTH)

    def loss(form: str, alpha: float) -> torch.Tensor:
        part, factor = frozen_part(form, alpha, base, anti_expert)
        return cross_entropy(HIDDEN, head, TARGETS, frozen=part, expert_factor=factor)

    torch.testing.assert_close(loss("steered", 1.0), loss("paper", 1.0))
    assert abs(float(loss("steered", 0.5) - loss("paper", 0.5))) > 0.1


def test_alpha_zero_steered_is_the_bases_loss_with_no_gradient():
    base = random_head(9, BASE_WIDTH)
    part, factor = frozen_part("steered", 0.0, base, random_head(8))
    loss, *gradients = loss_and_gradients(
        lambda h, head: cross_entropy(h, head, TARGETS, frozen=part, expert_factor=factor),
        random_head(7),
    )
    torch.testing.assert_close(loss, cross_entropy(BASE_HIDDEN, base, TARGETS))
    assert [float(g.abs().max()) for g in gradients if g is not None] == [0.0, 0.0]


@pytest.mark.parametrize("is_copy", [False, True])
def test_an_expert_that_is_the_anti_expert_gives_the_bases_loss(is_copy):
    small = random_head(7, bias=True)
    base = random_head(9, BASE_WIDTH, bias=True)
    part, factor = frozen_part("steered", 0.8, base, small.copy() if is_copy else small)
    loss = cross_entropy(ANTI_HIDDEN, small, TARGETS, frozen=part, expert_factor=factor)
    assert abs(float(loss - cross_entropy(BASE_HIDDEN, base, TARGETS))) < 1e-5


def test_no_gradient_work_is_done_where_no_gradient_is_asked_for(monkeypatch):
    calls = []
    plain = _Work._add_gradients
    monkeypatch.setattr(_Work, "_add_gradients", lambda *a: (calls.append(a), plain(*a))[1])
    hidden = HIDDEN.clone().requires_grad_()
    with torch.no_grad():
        assert not cross_entropy(hidden, random_head(7), TARGETS).requires_grad
    assert not cross_entropy(HIDDEN, random_head(7), TARGETS).requires_grad
    assert calls == []
    cross_entropy(hidden, random_head(7), TARGETS).backward()
    assert len(calls) == 1
    assert calls[0][1][1:] == [
        None,
        None,
    ]  # the head takes none, so no [vocab, width] tensor is made


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_two_tensors_of_a_chunks_logits_are_alive_at_most(softcap):
    from torch.utils._python_dispatch import TorchDispatchMode

    head, anti_expert = (random_head(s, softcap=softcap) for s in (7, 8))
    base = random_head(9, BASE_WIDTH, softcap=softcap)
    weights = {h.weight.data_ptr() for h in (head, anti_expert, base)}
    alive: list[weakref.ref[torch.Tensor]] = []
    most, largest = 0, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal most, largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and VOCAB in result.shape:
                alive.append(weakref.ref(result))
            there = [t for t in (ref() for ref in alive) if t is not None]
            sizes = {t.data_ptr(): t.numel() for t in there if t.data_ptr() not in weights}
            most = max(most, len(sizes))
            largest = max(largest, *sizes.values(), 0)
            return result

    part, factor = frozen_part("steered", 1.0, base, anti_expert)
    hidden = HIDDEN.clone().requires_grad_()
    with Watch():
        cross_entropy(
            hidden, head, TARGETS, frozen=part, expert_factor=factor, chunk_rows=3
        ).backward()
    assert largest == 3 * VOCAB
    assert most == (1 if softcap is None else 2)


def test_autocast_makes_products_in_bfloat16_and_the_rest_in_float32():
    head = random_head(7)
    hidden = HIDDEN.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(hidden, head, TARGETS)
    rounded = (HIDDEN.bfloat16() @ head.weight.bfloat16().T).float()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(rounded, TARGETS, reduction="sum"))
    loss.backward()
    assert hidden.grad.dtype == torch.float32
    exact = loss_and_gradients(lambda h, head: cross_entropy(h, head, TARGETS), head, 1.0)[1]
    # bfloat16 keeps 8 significant bits; gradients here are sums of 23 terms of size 1.
    torch.testing.assert_close(hidden.grad, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(hidden.grad, exact)


def test_no_positions_give_zero_and_a_gradient_of_nothing():
    hidden = HIDDEN[:0].clone().requires_grad_()
    loss = cross_entropy(hidden, random_head(7), TARGETS[:0])
    loss.backward()
    assert float(loss.detach()) == 0
    assert hidden.grad.shape == (0, WIDTH)


def test_a_head_that_is_trained_cannot_be_the_anti_experts_too():
    head = random_head(7)
    head.weight.requires_grad_()
    part, factor = frozen_part("steered", 1.0, random_head(9, BASE_WIDTH), head)
    with pytest.raises(AssertionError, match="copy"):
        cross_entropy(HIDDEN, head, TARGETS, frozen=part, expert_factor=factor)


# Vocabularies --------------------------------------------------------------------------------------


def vocabularies(kind: str) -> tuple[Vocabulary, Vocabulary]:
    """Return a base's and a small model's vocabulary; the small one has `VOCAB` rows."""
    tokens = [chr(97 + i) for i in range(20)]
    same = {token: i for i, token in enumerate(tokens)}
    if kind == "same":  # with padding ids in both
        return Vocabulary("base", same, VOCAB), Vocabulary("small", same, VOCAB)
    if kind == "wider":
        return Vocabulary("base", same, 30), Vocabulary("small", same, VOCAB)
    if kind == "narrower":
        return Vocabulary("base", same, 20), Vocabulary("small", same, VOCAB)
    order = torch.randperm(VOCAB - 1, generator=torch.Generator().manual_seed(5)).tolist()
    permuted = {token: order[i] for i, token in enumerate(tokens)}
    return Vocabulary("base", same, 21), Vocabulary("small", permuted, VOCAB)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["same", "wider", "narrower", "permuted"])
def test_the_loss_is_that_of_decodings_ensemble_whatever_the_vocabularies(kind, softcap):
    base_vocabulary, small_vocabulary = vocabularies(kind)
    alignment = align(base_vocabulary, small_vocabulary)
    base = Head(random(base_vocabulary.width, BASE_WIDTH, seed=9), softcap=softcap)
    expert, anti_expert = random_head(7), random_head(8)
    in_small = torch.tensor(list(small_vocabulary.token_to_id.values()))[TARGETS % 20]
    in_base = torch.tensor(list(base_vocabulary.token_to_id.values()))[TARGETS % 20]
    # As decode.py does it: in the base's order, padding ids never sampled.
    small_logits = (plain_logits(HIDDEN, expert), plain_logits(ANTI_HIDDEN, anti_expert))
    steered = combine(
        plain_logits(BASE_HIDDEN, base),
        [Contribution(*map(alignment.logits_to_base, small_logits), 0.7)],
    ).index_fill(-1, base_vocabulary.padding_ids, -torch.inf)

    aligned = align_base_head(base, alignment, small_vocabulary)
    part, factor = frozen_part("steered", 0.7, aligned, anti_expert)
    loss = cross_entropy(HIDDEN, expert, in_small, frozen=part, expert_factor=factor)
    torch.testing.assert_close(loss, F.cross_entropy(steered, in_base, reduction="sum"))
    logits = aligned.logits(BASE_HIDDEN)
    assert logits.isneginf().all(0).nonzero().flatten().tolist() == (
        small_vocabulary.padding_ids.tolist()
    )


def test_padding_ids_have_no_probability_in_the_published_form_at_alpha_zero_either():
    """The base's factor is 0 there, and 0 times -inf would be NaN."""
    base_vocabulary, small_vocabulary = vocabularies("same")
    alignment = align(base_vocabulary, small_vocabulary)
    aligned = align_base_head(random_head(9, BASE_WIDTH), alignment, small_vocabulary)
    part, factor = frozen_part("paper", 0.0, aligned, random_head(8))
    loss = cross_entropy(HIDDEN, random_head(7), TARGETS % 20, frozen=part, expert_factor=factor)
    logits = plain_logits(HIDDEN, random_head(7))[:, :20]
    torch.testing.assert_close(loss, F.cross_entropy(logits, TARGETS % 20, reduction="sum"))


def test_base_ids_lead_back_to_the_token_of_the_same_string():
    base_vocabulary, small_vocabulary = vocabularies("permuted")
    ids = base_ids(align(base_vocabulary, small_vocabulary))
    for token, small_id in small_vocabulary.token_to_id.items():
        assert ids[small_id] == base_vocabulary.token_to_id[token]
    assert ids[small_vocabulary.padding_ids].tolist() == [-1] * 3


# Heads of models -----------------------------------------------------------------------------------


def model_of(kind: str):
    from transformers import (
        AutoModelForCausalLM,
        CohereConfig,
        Gemma2Config,
        GPTNeoXConfig,
        GraniteConfig,
    )

    small = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    grouped = {**small, "num_key_value_heads": 2}
    if kind in ("llama", "gpt2"):
        config = tiny_config(kind, width=40)
    elif kind == "tied llama":
        config = tiny_config(width=40)
        config.tie_word_embeddings = True
    else:
        config = {
            "gemma2": lambda: Gemma2Config(**grouped, head_dim=4, final_logit_softcapping=3.0),
            "granite": lambda: GraniteConfig(**grouped, logits_scaling=4.0),
            "cohere": lambda: CohereConfig(**grouped, logit_scale=0.25),
            "neox": lambda: GPTNeoXConfig(**small),
        }[kind]()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


KINDS = ["llama", "tied llama", "gpt2", "neox", "gemma2", "granite", "cohere"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_on_the_body_is_the_model(kind):
    model = model_of(kind)
    head = head_of(model)
    assert (head.scale, head.softcap) == {
        "gemma2": (1.0, 3.0),
        "granite": (0.25, None),
        "cohere": (0.25, None),
    }.get(kind, (1.0, None))
    check_head(model, head)
    token_ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(token_ids).logits
        torch.testing.assert_close(
            head.logits(run_body(model, token_ids)), expected, rtol=1e-4, atol=1e-5
        )
        loss = cross_entropy(
            run_body(model, token_ids)[:, :-1].flatten(0, 1), head, token_ids[:, 1:].flatten()
        )
    expected = F.cross_entropy(
        expected[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["scale", "softcap", "weight", "shape"])
def test_a_model_whose_logits_are_not_its_heads_is_refused(change):
    model = model_of("gemma2")
    head = head_of(model)
    altered = {
        "scale": lambda: replace(head, scale=1.01),
        "softcap": lambda: replace(head, softcap=None),
        "weight": lambda: replace(head, weight=head.weight + 1e-2),
        "shape": lambda: replace(head, weight=head.weight[:-1]),
    }[change]()
    with pytest.raises(UnsupportedModel, match=r"(?s)Gemma2ForCausalLM.*differ.*hint: .*sft"):
        check_head(model, altered)


def test_checking_leaves_training_as_it_was():
    model = model_of("llama").train()
    model.model.layers[0].eval()
    check_head(model, head_of(model))
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_gradients_through_body_and_head_are_the_models_own():
    """With gradient checkpointing, and a tied head, whose weight gets gradients from both its ends."""
    token_ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    model = model_of("tied llama").train()
    model(input_ids=token_ids, labels=token_ids).loss.backward()  # a mean over 2 x 8 positions
    expected = {n: 16 * p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    # Older versions of transformers know only the second name, and newer ones warn of it.
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    hidden = run_body(model, token_ids)[:, :-1].flatten(0, 1)
    cross_entropy(hidden, head_of(model), token_ids[:, 1:].flatten(), chunk_rows=5).backward()
    ours = {n: p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def lora(model, **settings):
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": ["q_proj", "v_proj"], **settings}
    return get_peft_model(
        model, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    )


def test_an_adapter_acts_in_the_body_and_can_be_switched_off():
    plain = model_of("llama")
    token_ids = torch.arange(8)[None]
    before = run_body(plain, token_ids)
    model = lora(plain).eval()
    check_head(model, head_of(model))
    with_adapter = run_body(model, token_ids)
    with model.disable_adapter():
        torch.testing.assert_close(run_body(model, token_ids), before)
    assert float((with_adapter - before).detach().abs().max()) > 0.1
    assert not head_of(model).weight.requires_grad


def test_a_head_that_peft_trains_a_copy_of_is_the_copy():
    model = lora(model_of("llama"), modules_to_save=["lm_head"])
    head = head_of(model)
    assert head.weight.requires_grad
    with torch.no_grad():
        head.weight.add_(1)
    check_head(model, head)
    with model.disable_adapter():
        assert not torch.equal(head_of(model).weight, head.weight)
        check_head(model, head_of(model))


def test_an_adapter_on_the_output_layer_is_refused():
    model = lora(model_of("llama"), target_modules=["q_proj", "lm_head"])
    with pytest.raises(UnsupportedModel, match=r"(?s)no plain linear output head.*hint: "):
        head_of(model)


def test_virtual_tokens_are_refused():
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(
        model_of("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(UnsupportedModel, match="virtual tokens"):
        head_of(model)


def test_a_quantised_head_is_refused():
    model = model_of("llama")
    model.lm_head.weight = torch.nn.Parameter(
        torch.zeros(40, 16, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(UnsupportedModel, match=r"stored as uint8"):
        head_of(model)


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({"model_type": "hyperclovax", "logits_scaling": 8.0}, 8.0),
        ({"model_type": "minicpm3", "logits_scaling": 8.0}, 0.125),
        ({"model_type": "falcon_h1", "lm_head_multiplier": 0.5}, 0.5),
        ({"model_type": "mpt", "logit_scale": None}, 1.0),
    ],
)
def test_each_familys_word_for_the_scale_is_known(keys, scale):
    config = SimpleNamespace(**keys)
    config.get_text_config = lambda: config
    layer = torch.nn.Linear(2, 3)
    model = SimpleNamespace(config=config, get_output_embeddings=lambda: layer)
    assert head_of(model).scale == scale


# Divergence from the base --------------------------------------------------------------------------


def base_logprobs(base: Head, own: Head) -> torch.Tensor:
    """Return `[positions, vocab]`, over the tokens that neither head calls padding."""
    logits = plain_logits(BASE_HIDDEN, replace(base, bias=None))
    for head in (base, own):
        if head.bias is not None:
            logits = logits + torch.where(head.bias.isneginf(), -torch.inf, 0.0)
    return logits.log_softmax(1)


def kl(base: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return the sum over positions of KL(base || own), by its definition, of log-probabilities."""
    terms = base.exp() * (base - own)
    return terms.masked_fill(base.isneginf(), 0.0).sum()


@pytest.mark.parametrize(("scale", "softcap"), SHAPES)
@pytest.mark.parametrize("chunk_rows", [3, 64])
def test_the_divergence_and_its_gradients_are_those_of_whole_logits(scale, softcap, chunk_rows):
    own = random_head(10, bias=True, scale=scale, softcap=softcap)
    base = random_head(11, BASE_WIDTH, softcap=softcap)
    part = BasePart(BASE_HIDDEN, base)

    def plain(hidden, head):
        return kl(base_logprobs(base, head), plain_logits(hidden, head).log_softmax(1))

    expected = loss_and_gradients(plain, own)
    found = loss_and_gradients(
        lambda hidden, head: divergence(hidden, head, part, chunk_rows=chunk_rows), own
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_padding_of_either_head_has_no_part_in_the_divergence():
    own, base = random_head(10, bias=True), random_head(11, BASE_WIDTH, bias=True)
    own.bias[-2:] = -torch.inf
    base.bias[:] = 0.0
    base.bias[3] = -torch.inf
    kept = torch.ones(VOCAB, dtype=torch.bool)
    kept[[3, VOCAB - 2, VOCAB - 1]] = False
    hidden = HIDDEN.clone().requires_grad_()
    divergence(hidden, own, BasePart(BASE_HIDDEN, base)).backward()
    again = HIDDEN.clone().requires_grad_()
    logits = again @ own.weight[kept].T + own.bias[kept]
    whole = kl((BASE_HIDDEN @ base.weight[kept].T).log_softmax(1), logits.log_softmax(1))
    whole.backward()
    torch.testing.assert_close(hidden.grad, again.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            divergence(HIDDEN, own, BasePart(BASE_HIDDEN, base)), whole, rtol=1e-5, atol=1e-5
        )


def test_under_autocast_only_products_are_rounded():
    """The divergence of almost equal distributions is small, and would be lost in bfloat16."""
    own, base = random_head(10), random_head(11, BASE_WIDTH)
    rounded = [replace(head, weight=head.weight.bfloat16().float()) for head in (own, base)]
    hidden, base_hidden = (t.bfloat16().float() for t in (HIDDEN, BASE_HIDDEN))
    with torch.autocast("cpu", torch.bfloat16):
        found = divergence(hidden, rounded[0], BasePart(base_hidden, rounded[1]))
    logits = [
        (states.bfloat16() @ head.weight.T.bfloat16()).float().log_softmax(1)
        for states, head in ((base_hidden, rounded[1]), (hidden, rounded[0]))
    ]
    torch.testing.assert_close(found, kl(*logits), rtol=1e-5, atol=1e-5)


def test_a_model_that_agrees_with_the_base_has_no_divergence_and_no_gradient():
    head = random_head(10)
    hidden = HIDDEN.clone().requires_grad_()
    loss = divergence(hidden, head, BasePart(HIDDEN, head))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert hidden.grad.abs().max() < 1e-5


@pytest.mark.parametrize("shown", [1, 4, VOCAB])
def test_of_a_base_that_shows_a_part_the_other_tokens_count_as_one(shown):
    own, base = random_head(10, bias=True), random_head(11, BASE_WIDTH)
    logprobs = base_logprobs(base, own)
    top = logprobs.topk(shown, dim=1)
    part = ShownPart(top.indices, top.values)

    def plain(hidden, head):
        own_probs = plain_logits(hidden, head).softmax(1).gather(1, top.indices)
        loss = (top.values.exp() * (top.values - own_probs.log())).sum()
        if shown == VOCAB:
            return loss
        rest, own_rest = 1 - top.values.exp().sum(1), 1 - own_probs.sum(1)
        return loss + (rest * (rest / own_rest).log()).sum()

    expected = loss_and_gradients(plain, own)
    found = loss_and_gradients(
        lambda hidden, head: divergence(hidden, head, part, chunk_rows=4), own
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        whole = divergence(HIDDEN, own, BasePart(BASE_HIDDEN, base))
    assert float(found[0]) <= float(whole) + 1e-3


def test_a_slot_without_a_token_changes_nothing():
    own, base = random_head(10), random_head(11, BASE_WIDTH)
    top = base_logprobs(base, own).topk(3, dim=1)
    indices = torch.cat([top.indices, torch.zeros(POSITIONS, 2, dtype=torch.long)], 1)
    logprobs = torch.cat([top.values, torch.full((POSITIONS, 2), -torch.inf)], 1)
    found = [
        loss_and_gradients(lambda hidden, head, p=part: divergence(hidden, head, p), own)
        for part in (ShownPart(top.indices, top.values), ShownPart(indices, logprobs))
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
