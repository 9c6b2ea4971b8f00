"""Identities of steering with small models that use the base's output matrix, end to end."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console

from proxytune.backends.exact import ExactBackend
from proxytune.commands.doctor import rendered
from proxytune.decode.speculative import Drafting
from proxytune.loading.doctor import examine
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams
from tests.support.tiny import NUM_TOKENS, tiny_adapter, tiny_model, tiny_tokenizer
from tests.test_exactness import GREEDY, bits, mixed_requests, same

WORDS = ("the", "otter", "ran", "into", "rain", "again", "there", "was", "an", "end", "of", "a")


def cut(base: Path, directory: Path) -> Path:
    """Write a model of the base's first layer, with its embedding and its head."""
    large = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = large.config
    config.num_hidden_layers = 1
    config.layer_types = (config.layer_types or [])[:1] or None
    small = type(large)(config)
    small.load_state_dict(large.state_dict(), strict=False)
    small.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """A calibrated pair, two adapters on a cut, and an expert of its own architecture beside it."""
    root = tmp_path_factory.mktemp("cut")
    base = tiny_model(root / "base", "qwen2", seed=1, hidden_size=32, num_layers=3, max_context=512)
    small = cut(base, root / "cut")
    one, other = (
        ModelSpec(model=str(small), adapter=str(tiny_adapter(small, root / name, seed=seed)))
        for seed, name in enumerate(("one", "other"))
    )
    gpt = ModelSpec(model=str(tiny_model(root / "gpt", "gpt2", seed=3, max_context=512)))
    experts = (
        ExpertSpec("lora", one, other, 0.8),
        ExpertSpec("full", gpt, ModelSpec(model=str(small)), 0.6),
    )
    return Recipe(ModelSpec(model=str(base)), experts)


@pytest.fixture(scope="module")
def model(recipe) -> ProxyTuned:
    return ProxyTuned.load(recipe)


@pytest.fixture(scope="module")
def separate(recipe) -> ProxyTuned:
    """The same models, each with its own product."""
    found = ProxyTuned.load(recipe)
    for member in found.ensemble.members:
        member.backend._host = None
    return found


def texts(count: int, sampling: SamplingParams = GREEDY) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    names = ("lora", "full", ("lora", "full"))
    asked = []
    for number in range(count):
        length = 1 + number % 7
        drawn = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        prompt = " ".join(WORDS[place] for place in drawn)
        asked.append(Request(prompt, sampling, experts=names[number % 3]))
    return asked


def test_every_member_on_the_cut_makes_its_logits_with_the_base(model):
    base, *others = (member.backend for member in model.ensemble.members)
    hosted = [backend.host is base for backend in others]
    assert hosted == [True, True, False, True]
    cut_model = others[0].model
    assert cut_model.lm_head.weight is base.model.lm_head.weight


def test_a_step_multiplies_with_the_matrix_once_for_all_rows(model):
    num_rows = []
    head = model.ensemble.members[0].backend.model.lm_head
    hook = head.register_forward_hook(lambda _, args, __: num_rows.append(args[0].shape[0]))
    try:
        model.generate_batch(texts(3)[::2][:1] * 2, batch_size=2)
    finally:
        hook.remove()
    # After the prompts: nothing for the cut's forward, then two rows of the base, and of both adapters.
    assert num_rows[-22:] == [0, 6] * 11


@pytest.mark.parametrize(("count", "batch_size"), [(200, 8), (12, 1)])
def test_texts_have_the_tokens_of_separate_heads(model, separate, count, batch_size):
    asked = texts(count)
    expected = separate.generate_batch(asked, batch_size=batch_size)
    traces = model.generate_batch(asked, batch_size=batch_size)
    same(traces, [list(trace.token_ids) for trace in expected])


def test_every_member_is_recorded_with_its_own_logits(model, separate):
    request = Request("the otter", GREEDY, experts=("lora", "full"), explain=True)
    trace, expected = model.generate(request), separate.generate(request)
    for step, other in zip(trace.steps, expected.steps, strict=True):
        assert step.views.keys() == other.views.keys()
        for name, view in step.views.items():
            assert view.logprob == pytest.approx(other.views[name].logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("source", "is_adaptive"),
    [("expert", False), ("base", False), ("lookup", False), ("expert", True), ("auto", True)],
)
def test_drafts_change_no_token(model, source, is_adaptive):
    asked = texts(12)
    plain = model.generate_batch(asked)
    drafting = Drafting(source=source, max_tokens=3, is_adaptive=is_adaptive)
    traces = model.generate_batch(asked, speculative=drafting)
    same(traces, [list(trace.token_ids) for trace in plain])


def test_a_batch_gives_what_each_text_gives_alone(model):
    asked = mixed_requests()
    alone = [model.generate(request) for request in asked]
    traces = model.generate_batch(asked)
    same(traces, [list(trace.token_ids) for trace in alone])


def test_streamed_pieces_are_the_whole_text(model):
    request = texts(3)[2]
    whole = model.generate(request)
    assert "".join(step.text for step in model.stream(request)) == whole.text


def test_alpha_zero_is_the_base_bit_by_bit(model, separate):
    request = Request("the otter", GREEDY, alpha=0.0)
    assert bits(model.generate(request)) == bits(separate.generate(request))


def test_with_exact_a_row_has_its_bits_in_any_company(recipe):
    exact = ProxyTuned.load(recipe, exact=True)
    assert all(isinstance(member.backend, ExactBackend) for member in exact.ensemble.members)
    base, small = (exact.ensemble.members[place].backend.inner.model for place in (0, 1))
    assert small.lm_head.weight is base.lm_head.weight
    alone = [bits(exact.generate(request)) for request in mixed_requests()]
    batch = exact.generate_batch(mixed_requests(), batch_size=6)
    drafted = exact.generate_batch(mixed_requests(), speculative=Drafting(max_tokens=3))
    assert [bits(trace) for trace in batch] == alone == [bits(trace) for trace in drafted]


def test_doctor_names_what_shares_the_bases_output_matrix(recipe):
    plain, found = examine(recipe), examine(recipe, compares_outputs=True)
    sharing = {model.part for model in found.models if model.shares_output}
    assert sharing == {"lora.expert", "lora.anti_expert", "full.anti_expert"}
    # Embedding and head of float32, which only the first of the three parts is said to hold.
    saved = 2 * 4 * 32 * NUM_TOKENS
    assert plain.devices[0].weight_bytes - found.devices[0].weight_bytes == saved
    with io.StringIO() as text:
        Console(file=text, width=200).print(rendered(found))
        assert text.getvalue().count("shares the base's output matrix") == len(sharing)


def test_doctor_does_not_name_a_matrix_that_an_adapter_changes(recipe, tmp_path):
    lora = recipe.experts[0]
    more = {"modules_to_save": ["lm_head"]}
    changed = tiny_adapter(Path(lora.expert.model), tmp_path / "changed", more=more)
    expert = replace(lora, expert=replace(lora.expert, adapter=str(changed)))
    found = examine(replace(recipe, experts=(expert,)), compares_outputs=True)
    assert found.is_healthy and not any(model.shares_output for model in found.models)


def test_the_class_of_transformers_shares_the_matrix_and_generates_the_same(
    recipe, model, tmp_path
):
    replace(recipe, default_expert="lora").write(tmp_path / "recipe")
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "recipe")
    trace = model.generate(Request("the otter", GREEDY, experts="lora"))
    ids = torch.tensor([model.tokenizer.encode("the otter")])
    found = network.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert found[0, ids.shape[1] :].tolist() == list(trace.token_ids)
