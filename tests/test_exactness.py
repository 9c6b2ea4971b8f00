"""The identities of exactness, end to end: recipes of tiny random models, loaded as a user loads them.

Float32 on the CPU. Two paths may part where the two best candidates lie within 1e-3 logits of each other;
`same` counts such ties, and every test says how many it allows. With `exact`, in any dtype, every bit is the
same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.decode.batch import Batch
from proxytune.decode.speculative import Drafting
from proxytune.errors import InvalidRequest, PromptTooLong, UnsupportedModel, VocabularyMismatch
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.trace import Trace
from tests.support.tiny import (
    MERGES,
    NUM_TOKENS,
    tiny_adapter,
    tiny_gguf,
    tiny_model,
    tiny_tokenizer,
)

ARCHITECTURES = ("llama", "qwen2", "gpt2")
PROMPTS = ("the", "in the end there was", "Zoë 🙂", "a", "an otter ran into the rain again")
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=0.9, top_p=0.9, seed=5)
TIE = 1e-3


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[str, Path]]:
    """A base, a small model, and a tuned one of each architecture, each with its own weights."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for architecture in ARCHITECTURES:
        folder = root / architecture
        found[architecture] = {
            "base": tiny_model(folder / "base", architecture, seed=1, hidden_size=24),
            "small": tiny_model(folder / "small", architecture, seed=2),
            "tuned": tiny_model(folder / "tuned", architecture, seed=3),
            "adapter": tiny_adapter(folder / "small", folder / "adapter", seed=4),
            "opposite": tiny_adapter(folder / "small", folder / "opposite", seed=5),
        }
    return found


@pytest.fixture(params=ARCHITECTURES)
def paths(request, models) -> dict[str, Path]:
    return models[request.param]


def spec(model: Path | None = None, adapter: Path | None = None, **options) -> ModelSpec:
    return ModelSpec(
        model=None if model is None else str(model),
        adapter=None if adapter is None else str(adapter),
        **options,
    )


def load(base: ModelSpec, *pairs: tuple[ModelSpec, ModelSpec], alpha: float = 1.0) -> ProxyTuned:
    experts = tuple(ExpertSpec(f"e{i}", e, a, alpha) for i, (e, a) in enumerate(pairs))
    return ProxyTuned.load(Recipe(base, experts))


def alone(model: Path, prompts=PROMPTS, num_new: int = 12) -> list[list[int]]:
    """Return what a model says by itself, by whole forwards without cache or padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        for _ in range(num_new):
            with torch.inference_mode():
                logits = network(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids = [*ids, int(logits.argmax())]
        answers.append(ids[-num_new:])
    return answers


def same(traces: list[Trace], others: list[list[int]], *, ties_allowed: int = 0) -> None:
    """Check that two paths agree token for token, but for counted ties."""
    num_ties = 0
    for trace, other in zip(traces, others, strict=True):
        for step, token_id in zip(trace.steps, other, strict=True):
            if step.token_id != token_id:
                (_, first), (_, second) = step.top[:2]
                assert first - second < TIE, f"{list(trace.token_ids)} against {other}"
                num_ties += 1
                break
    assert num_ties <= ties_allowed


def greedy(model: ProxyTuned, **request) -> list[Trace]:
    return model.generate_batch([Request(p, GREEDY, **request) for p in PROMPTS])


def test_alpha_zero_is_the_base(paths):
    model = load(spec(paths["base"]), (spec(paths["tuned"]), spec(paths["small"])))
    same(greedy(model, alpha=0.0), alone(paths["base"]))


def test_an_expert_equal_to_its_anti_expert_is_the_base(paths):
    model = load(spec(paths["base"]), (spec(paths["tuned"]), spec(paths["tuned"])))
    same(greedy(model, alpha=2.0), alone(paths["base"]))


def test_a_base_equal_to_the_anti_expert_is_the_expert_at_alpha_one(paths):
    model = load(spec(paths["small"]), (spec(paths["tuned"]), spec(paths["small"])))
    same(greedy(model), alone(paths["tuned"]))
    reused = load(spec(paths["small"]), (spec(paths["tuned"]), ModelSpec(same_as="base")))
    same(greedy(reused), alone(paths["tuned"]))


def test_steered_tokens_are_those_of_three_whole_forwards(paths):
    from transformers import AutoModelForCausalLM

    model = load(spec(paths["base"]), (spec(paths["tuned"]), spec(paths["small"])))
    networks = [
        AutoModelForCausalLM.from_pretrained(paths[name], dtype=torch.float32).eval()
        for name in ("base", "tuned", "small")
    ]
    expected = []
    for prompt in PROMPTS:
        ids = model.tokenizer.encode(prompt)
        for _ in range(12):
            with torch.inference_mode():
                base, tuned, small = (
                    network(torch.tensor([ids]), use_cache=False).logits[0, -1]
                    for network in networks
                )
            ids = [*ids, int((base + 0.7 * (tuned - small)).argmax())]
        expected.append(ids[-12:])
    same(greedy(model, alpha=0.7), expected)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_of_ragged_prompts_gives_what_each_gives_alone(paths, sampling):
    model = load(spec(paths["base"]), (spec(adapter=paths["adapter"]), spec(paths["small"])))
    requests = [
        Request(prompt, replace(sampling, max_new_tokens=6 + i), alpha)
        for i, (prompt, alpha) in enumerate(zip(PROMPTS, (None, 0.0, 0.5, 1.5, -0.5), strict=True))
    ]
    one_by_one = [model.generate(request) for request in requests]
    for batch_size in (2, 5):
        together = model.generate_batch(requests, batch_size=batch_size)
        assert [t.token_ids for t in together] == [t.token_ids for t in one_by_one]
        assert [t.text for t in together] == [t.text for t in one_by_one]


def test_streamed_text_joined_is_the_whole_text(paths):
    model = load(spec(paths["base"]), (spec(paths["tuned"]), spec(paths["small"])))
    for prompt in PROMPTS:
        sampling = replace(SAMPLED, max_new_tokens=40, temperature=1.5)
        pieces = [step.text for step in model.stream(prompt, sampling)]
        whole = model.generate(prompt, sampling)
        assert "".join(pieces) == whole.text
        complete = model.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
        assert whole.text == complete


def test_an_adapter_steers_like_the_same_adapter_merged_into_full_weights(paths, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(paths["small"], dtype=torch.float32)
    PeftModel.from_pretrained(network, paths["adapter"]).merge_and_unload().save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(paths["small"]).save_pretrained(tmp_path)
    adapted = load(spec(paths["base"]), (spec(adapter=paths["adapter"]), spec(paths["small"])))
    merged = load(spec(paths["base"]), (spec(tmp_path), spec(paths["small"])))
    same(greedy(adapted), [list(t.token_ids) for t in greedy(merged)])


def test_expert_and_opposite_are_two_adapters_on_one_copy_of_the_small_model(paths):
    small = spec(paths["small"])
    model = load(
        spec(paths["base"]),
        (spec(adapter=paths["adapter"]), spec(paths["small"], paths["opposite"])),
        (spec(adapter=paths["adapter"]), small),
    )
    assert len({id(m.backend) for m in model.ensemble.members}) == 2
    assert len(model.ensemble.members) == 4
    apart = load(spec(paths["base"]), (spec(adapter=paths["adapter"]), small))
    same(greedy(model, experts="e1"), [list(t.token_ids) for t in greedy(apart)])


def test_two_experts_are_summed_with_their_own_strengths(paths):
    """With e1 = e0 turned round, strengths 0.8 and 0.8 cancel and the base speaks."""
    tuned, small = spec(paths["tuned"]), spec(paths["small"])
    model = load(spec(paths["base"]), (tuned, small), (small, tuned))
    same(greedy(model, experts={"e0": 0.8, "e1": 0.8}), alone(paths["base"]), ties_allowed=1)
    left = greedy(model, experts={"e0": 1.0, "e1": 0.3})
    same(left, [list(t.token_ids) for t in greedy(model, experts={"e0": 0.7})], ties_allowed=1)


def test_heads_of_other_widths_over_one_tokenizer_go_together(tmp_path):
    base = tiny_model(tmp_path / "base", width=NUM_TOKENS + 22, seed=1)
    small = tiny_model(tmp_path / "small", width=NUM_TOKENS + 6, seed=2)
    tuned = tiny_model(tmp_path / "tuned", width=NUM_TOKENS + 14, seed=3)
    model = load(spec(base), (spec(tuned), spec(small)))
    sampling = replace(SAMPLED, max_new_tokens=60, temperature=3.0, top_p=1.0)
    for seed in range(5):
        trace = model.generate("the", replace(sampling, seed=seed))
        assert max(trace.token_ids) < NUM_TOKENS


def test_the_same_tokens_under_other_ids_steer_the_same(tmp_path):
    """The small models' rows are permuted with their tokenizer, so nothing else changes."""
    from transformers import AutoModelForCausalLM

    base = tiny_model(tmp_path / "base", seed=1)
    shuffled = tiny_tokenizer(shuffle_seed=7)
    plain_vocab, other_vocab = tiny_tokenizer().get_vocab(), shuffled.get_vocab()
    order = torch.empty(NUM_TOKENS, dtype=torch.long)
    for token, index in plain_vocab.items():
        order[other_vocab[token]] = index
    pairs = []
    for name, seed in (("small", 2), ("tuned", 3)):
        plain = tiny_model(tmp_path / name, seed=seed)
        network = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        for layer in (network.get_input_embeddings(), network.get_output_embeddings()):
            layer.weight.data = layer.weight.data[order].clone()
        network.config.eos_token_id = shuffled.eos_token_id
        other = tmp_path / f"{name}-permuted"
        network.save_pretrained(other)
        shuffled.save_pretrained(other)
        pairs.append((plain, other))
    (small, small_other), (tuned, tuned_other) = pairs
    straight = load(spec(base), (spec(tuned), spec(small)))
    permuted = load(spec(base), (spec(tuned_other), spec(small_other)))
    same(greedy(permuted), [list(t.token_ids) for t in greedy(straight)])


def test_models_with_other_tokens_are_refused_with_both_names_and_examples(tmp_path):
    base = tiny_model(tmp_path / "base")
    other = tiny_tokenizer(merges=[*MERGES, ("h", "u"), ("hu", "l")])
    small = tiny_model(tmp_path / "small", tokenizer=other)
    with pytest.raises(VocabularyMismatch, match=r"(?s)small.*base.*2 only in.*'hul?'"):
        load(spec(base), (spec(small), spec(small)))


def test_a_gguf_base_is_steered_like_the_same_base_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tiny_gguf(tmp_path / "base.gguf", seed=1)
    small, tuned = (tiny_model(tmp_path / n, seed=s) for n, s in (("small", 2), ("tuned", 3)))
    unpacked = find_checkpoint(str(file), root=tmp_path).weights_path()
    expected = alone(unpacked)
    model = load(spec(file), (spec(tuned), spec(small)))
    same(greedy(model, alpha=0.0), expected)
    steered = [list(t.token_ids) for t in greedy(model)]
    assert steered != expected
    same(greedy(load(spec(unpacked), (spec(tuned), spec(small)))), steered)


def test_each_model_gets_its_own_rendering_of_the_prompt(models):
    paths = models["llama"]
    base, small = spec(paths["base"]), spec(paths["small"])
    plain = load(base, (spec(paths["tuned"]), small))
    chat = load(base, (spec(paths["tuned"], prompt="chat"), small))
    template = load(
        base,
        (
            spec(
                paths["tuned"],
                prompt="<|im_start|>user\n{{ prompt }}<|im_end|>\n<|im_start|>assistant\n",
            ),
            small,
        ),
    )
    job = chat.job(Request("hello", GREEDY))
    base_ids, expert_ids, anti_expert_ids = job.prompts
    assert base_ids == anti_expert_ids == chat.tokenizer.encode("hello")
    assert chat.tokenizer.decode(expert_ids) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    same(greedy(template), [list(t.token_ids) for t in greedy(chat)])
    assert [t.token_ids for t in greedy(plain)] != [t.token_ids for t in greedy(chat)]


def test_text_messages_and_token_ids_of_one_prompt_give_the_same(models):
    paths = models["qwen2"]
    base, tuned, small = (spec(paths[name], chat="plain") for name in ("base", "tuned", "small"))
    model = load(base, (tuned, small))
    prompts = ["hello", [{"role": "user", "content": "hello"}], model.tokenizer.encode("hello")]
    answers = [model.generate(prompt, GREEDY).token_ids for prompt in prompts]
    assert answers[0] == answers[1] == answers[2]


def test_a_prompt_beyond_the_smallest_context_names_that_model_and_both_lengths(tmp_path, models):
    short = tiny_model(tmp_path / "short", max_context=20, seed=2)
    model = load(spec(models["llama"]["base"]), (spec(short), spec(short)))
    with pytest.raises(PromptTooLong, match=r"(?s)30 tokens.*short.*20"):
        model.generate([5] * 30, GREEDY)
    with pytest.raises(InvalidRequest, match="9999"):
        model.generate([9999], GREEDY)


def test_bfloat16_models_are_combined_in_float32(models):
    paths = models["llama"]
    pair = (spec(paths["tuned"]), spec(paths["small"]))
    recipe = Recipe(spec(paths["base"]), (ExpertSpec("e0", *pair),))
    model = ProxyTuned.load(recipe, dtype="bfloat16")
    backend = model.ensemble.members[0].backend
    _, logits = backend.prefill([[1, 2, 3]])
    assert logits.dtype == torch.bfloat16
    trace = model.generate("the", GREEDY, alpha=0.001)
    # A step of bfloat16 at logits of this size is above 0.001; float32 keeps the small offset.
    exact = model.generate("the", GREEDY, alpha=0.0)
    assert trace.steps[0].logprob != exact.steps[0].logprob


# Every dtype ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steered_recipe(tmp_path_factory) -> Recipe:
    """A base steered by an adapter and by a full model, with contexts of several pieces of a prompt."""
    root = tmp_path_factory.mktemp("exact")
    for name, seed in (("base", 1), ("small", 2), ("tuned", 3)):
        tiny_model(root / name, "qwen2", seed=seed, max_context=512)
    small = spec(root / "small")
    adapter = spec(adapter=tiny_adapter(root / "small", root / "adapter", seed=4))
    experts = (
        ExpertSpec("lora", adapter, small, 0.8),
        ExpertSpec("full", spec(root / "tuned"), small, 0.6),
    )
    return Recipe(spec(root / "base"), experts)


@pytest.fixture(scope="module", params=("float32", "bfloat16", "float16"))
def exact(request, steered_recipe) -> ProxyTuned:
    return ProxyTuned.load(steered_recipe, dtype=request.param, exact=True)


def mixed_requests() -> list[Request]:
    """Greedy and sampled rows of several lengths, strengths, experts and policies."""
    long = "in the end there was an otter that ran into the rain again and again " * 2
    sampled = replace(SAMPLED, logprobs=2, min_p=0.01)
    return [
        Request("the", GREEDY, experts="lora"),
        Request(long, sampled, experts="full"),
        Request("Zoë 🙂", replace(GREEDY, max_new_tokens=7), alpha=0.0),
        Request("a", replace(sampled, seed=9, presence_penalty=0.5), experts="full"),
        Request("an otter", GREEDY, experts=("lora", "full"), combine="inverse_entropy"),
        Request(long[:60], replace(sampled, top_k=20), experts="lora", policy="gate_sure"),
    ]


def bits(trace: Trace) -> list[object]:
    """Return a text's tokens with their logprobs and alternatives, which show every bit of the logits."""
    return [(step.token_id, step.logprob, step.top) for step in trace.steps]


@pytest.fixture(scope="module")
def one_by_one(exact) -> list[list[object]]:
    return [bits(exact.generate(request)) for request in mixed_requests()]


@pytest.mark.parametrize("batch_size", [2, 6])
def test_with_exact_a_batch_gives_the_bits_of_each_text_alone(exact, one_by_one, batch_size):
    traces = exact.generate_batch(mixed_requests(), batch_size=batch_size)
    assert [bits(trace) for trace in traces] == one_by_one


@pytest.mark.parametrize("source", ["expert", "base", "lookup", "auto"])
def test_with_exact_drafts_give_the_bits_of_plain_decoding(exact, one_by_one, source):
    drafts = Drafting(source=source, max_tokens=3)
    traces = exact.generate_batch(mixed_requests(), speculative=drafts)
    assert [bits(trace) for trace in traces] == one_by_one


def test_with_exact_rows_that_join_get_the_bits_of_each_alone(exact, one_by_one):
    jobs = [exact.job(request) for request in mixed_requests()]
    steps: list[list[object]] = [[] for _ in jobs]

    def run(batch: Batch) -> None:
        for event in batch.step():
            step = event.step
            assert step is not None
            steps[event.row].append((step.token_id, step.logprob, step.top))

    batch = Batch(exact.ensemble, jobs[:2])
    run(batch)
    for number in range(2, len(jobs)):
        other = Batch(exact.ensemble, [jobs[number]])
        (event,) = other.step()
        assert event.step is not None
        first = event.step
        steps[number].append((first.token_id, first.logprob, first.top))
        assert batch.join(other) == number
        run(batch)
    while not batch.is_done:
        run(batch)
    assert steps == one_by_one


def test_with_exact_a_conversation_gives_the_bits_of_its_prompts_read_afresh(exact):
    """The second turn goes on from caches where it can, and reads again what was chosen before."""
    talk = exact.chat(GREEDY, experts="lora")
    for _ in talk.say("in the end " * 12):
        pass
    second = [(step.token_id, step.logprob, step.top) for step in talk.say("the rain")]
    fresh = exact.generate(Request(talk.messages[:-1], GREEDY, experts="lora"))
    assert bits(fresh) == second


def test_with_exact_the_bits_of_a_given_text_are_those_it_was_chosen_with(exact):
    request = mixed_requests()[0]
    trace = exact.generate(request)
    given = exact.explain(request.prompt, trace.token_ids, experts="lora", top=2)
    assert [step.logprob for step in given.steps] == [step.logprob for step in trace.steps]


def test_exact_is_refused_by_name_where_it_cannot_hold(models):
    paths = models["llama"]
    pair = spec(paths["tuned"]), spec(paths["small"])
    with pytest.raises(UnsupportedModel, match=r"exact.*base.*CUDA graphs"):
        ProxyTuned.load(
            Recipe(spec(paths["base"]), (ExpertSpec("e0", *pair),)), cuda_graphs=True, exact=True
        )
    behind_api = Recipe(ModelSpec(model="http://127.0.0.1:9/v1"), (ExpertSpec("e0", *pair),))
    with pytest.raises(UnsupportedModel, match=r"exact.*base.*behind an API"):
        ProxyTuned.load(behind_api, exact=True)
