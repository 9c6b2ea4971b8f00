"""llama.cpp as a backend: the identities of exactness, and the same tokens as transformers in float32.

Needs llama-cpp-python, which compiles for some minutes: `make test-gguf` installs it into an environment of
its own. Two paths may part where the two best candidates lie within 1e-3 logits of each other; `agree` counts
such ties, and no test here meets one.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python; `make test-gguf` installs it")

from proxytune.backends.exact import ExactBackend
from proxytune.backends.llama_cpp import FIRST_ROOM, LlamaCppBackend
from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.decode.speculative import Drafting
from proxytune.errors import (
    AdapterMismatch,
    CorruptModel,
    InvalidRequest,
    PromptTooLong,
    UnsupportedModel,
    VocabularyMismatch,
)
from proxytune.export.model import export_model
from proxytune.export.recipe import export_recipe
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, LlamaCppSettings, ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.trace import Trace
from tests.support.tiny import tiny_adapter, tiny_model

PROMPTS = ("the", "in the end there was", "Zoë 🙂", "a", "an otter ran into the rain again")
GREEDY = SamplingParams(max_new_tokens=16, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(max_new_tokens=16, ignore_eos=True, temperature=0.9, seed=5)
TIE = 1e-3
ONE_THREAD = LlamaCppSettings(threads=1)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, Recipe]:
    """One steered tiny model twice: in the Hugging Face layout, and all of it as F32 GGUF files."""
    root = tmp_path_factory.mktemp("models")
    tiny_model(root / "base", "llama", seed=1, hidden_size=24, max_context=2048)
    tiny_model(root / "small", "llama", seed=2, max_context=2048)
    tiny_model(root / "tuned", "llama", seed=3, max_context=2048)
    tiny_adapter(root / "small", root / "adapter", seed=4)
    recipe = Recipe(
        base=ModelSpec(model="base"),
        experts=(
            ExpertSpec("lora", ModelSpec(adapter="adapter"), ModelSpec(model="small")),
            ExpertSpec("full", ModelSpec(model="tuned"), ModelSpec(model="small"), alpha=0.5),
        ),
        directory=root,
    )
    base = find_checkpoint("base", root=root)
    export_model(base, root / "base.gguf", dtype="F32")
    with_gguf_base = replace(recipe, base=ModelSpec(model="base.gguf"))
    exported = export_recipe(with_gguf_base, root / "gguf", dtype="F32").directory
    return {
        "transformers": recipe,
        "llama.cpp": Recipe.read(exported).with_llama_cpp(threads=1),
        "gguf base": replace(recipe, base=ModelSpec(model="base.gguf", llama_cpp=ONE_THREAD)),
    }


@pytest.fixture(scope="module")
def models(recipes) -> dict[str, ProxyTuned]:
    loaded = {name: ProxyTuned.load(recipe) for name, recipe in recipes.items()}
    mixed = replace(recipes["llama.cpp"], base=ModelSpec(model="../base"))
    return loaded | {"gguf pair": ProxyTuned.load(mixed)}


def agree(one: Trace, other: Trace) -> bool:
    """Whether two texts are the same; False if they part at a tie, where both paths' two best are close."""
    for a, b in zip(one.steps, other.steps, strict=True):
        if a.token_id != b.token_id:
            assert all(step.top[0][1] - step.top[1][1] < TIE for step in (a, b)), (a, b)
            return False
        assert a.logprob == pytest.approx(b.logprob, abs=TIE)
    return True


@pytest.mark.parametrize("name", ["llama.cpp", "gguf base", "gguf pair"])
@pytest.mark.parametrize("expert", ["lora", "full"])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_float32_files_give_the_tokens_of_transformers(models, name, expert, alpha):
    requests = [Request(prompt, GREEDY, alpha, expert) for prompt in PROMPTS]
    wanted = models["transformers"].generate_batch(requests)
    found = models[name].generate_batch(requests)
    assert [agree(*pair) for pair in zip(found, wanted, strict=True)].count(False) == 0


@pytest.mark.parametrize("name", ["llama.cpp", "gguf base", "gguf pair"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_batches_and_drafts_change_nothing(models, name, sampling):
    model = models[name]
    requests = [
        Request(prompt, replace(sampling, max_new_tokens=6 + 5 * place), 0.8, experts)
        for place, (prompt, experts) in enumerate(
            zip(PROMPTS, ["lora", "full", ("lora", "full"), "lora", "full"], strict=True)
        )
    ]
    alone = [model.generate(request) for request in requests]
    texts = [trace.token_ids for trace in alone]
    for options in (
        {"batch_size": 5},
        {"batch_size": 2},
        {"batch_size": 3, "speculative": Drafting(4, "expert", is_adaptive=False)},
        {"batch_size": 1, "speculative": Drafting(3, "base", is_adaptive=False)},
        {"batch_size": 5, "speculative": Drafting(3, "lookup", is_adaptive=False)},
        {"batch_size": 4, "speculative": True},
    ):
        assert [t.token_ids for t in model.generate_batch(requests, **options)] == texts, options


def test_identities_hold(models, recipes):
    model = models["llama.cpp"]
    base = model.generate("in the end", GREEDY, alpha=0.0).token_ids
    recipe = recipes["llama.cpp"]
    pair = recipe.experts[1]
    same = replace(recipe, experts=(replace(pair, expert=pair.anti_expert, alpha=1.0),))
    assert ProxyTuned.load(same).generate("in the end", GREEDY).token_ids == base
    # With the base as anti-expert, strength 1 is the expert.
    as_anti = replace(pair, anti_expert=recipe.base, alpha=1.0)
    steered = ProxyTuned.load(replace(recipe, experts=(as_anti,)))
    alone = ProxyTuned.load(replace(recipe, base=pair.expert, experts=(as_anti,)))
    wanted = alone.generate("in the end", GREEDY, alpha=0.0).token_ids
    assert steered.generate("in the end", GREEDY, alpha=1.0).token_ids == wanted


def test_a_chat_goes_on_from_what_was_read(models):
    fresh, kept = models["llama.cpp"], models["llama.cpp"].chat(GREEDY, alpha=0.5)
    for text in ("the rain", "and then", "again"):
        messages = [*kept.messages, {"role": "user", "content": text}]
        sampling = replace(GREEDY, stop=("\n\nUser:",))
        wanted = fresh.generate(messages, sampling, alpha=0.5).token_ids
        assert tuple(step.token_id for step in kept.say(text)) == wanted


def test_scores_are_those_of_transformers(models):
    text = "the otter ran into the rain again and again in the end. " * 12
    reports = [
        models[name].score(text, (0.0, 0.5), experts="lora", window=300).to_dict()
        for name in ("transformers", "llama.cpp")
    ]
    for one, other in zip(reports[0]["rows"], reports[1]["rows"], strict=True):
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)


# The backend itself ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backend(recipes) -> LlamaCppBackend:
    recipe = recipes["llama.cpp"]
    root = recipe.directory
    spec = recipe.experts[0].expert
    adapter = find_adapter(spec.adapter, root=root)
    files = find_checkpoint(spec.model, root=root)
    return LlamaCppBackend.load(files, spec, {"tuned": adapter})


def logits_of(backend: LlamaCppBackend, row: list[int], adapter: str | None = None) -> torch.Tensor:
    """Return the logits after a row, read by itself."""
    return backend.prefill([row], adapters=[adapter]).logits[0].clone()


def test_a_view_is_not_a_copy(backend):
    state, _ = backend.prefill([[1, 2, 3]])
    one = backend.extend(state, torch.tensor([[4]]))
    address = one.data_ptr()
    kept = one.clone()
    other = backend.extend(state, torch.tensor([[5]]))
    assert other.data_ptr() == address
    assert not torch.equal(one, kept)  # overwritten, as `reuses_logits` says
    assert backend.capabilities.reuses_logits


def test_logits_outlive_the_state_they_came_from(backend):
    logits = backend.prefill([[1, 2, 3]]).logits
    kept = logits.clone()
    gc.collect()
    assert torch.equal(logits, kept)


def test_rows_with_and_without_an_adapter_keep_to_themselves(backend):
    rows = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
    adapters = ["tuned", None, "tuned", None]
    state, logits = backend.prefill(rows, adapters=adapters)
    for row, adapter, answer in zip(rows, adapters, logits, strict=True):
        assert torch.allclose(answer, logits_of(backend, row, adapter), atol=1e-4)
    new = torch.tensor([[20, 21], [22, 23], [24, 25], [26, 27]])
    found = backend.extend(state, new)
    for place, (row, adapter) in enumerate(zip(rows, adapters, strict=True)):
        for count in (1, 2):
            wanted = logits_of(backend, [*row, *new[place, :count].tolist()], adapter)
            assert torch.allclose(found[place, count - 1], wanted, atol=1e-4)
    assert not torch.allclose(logits_of(backend, rows[0]), logits_of(backend, rows[0], "tuned"))


def test_exact_gives_the_bits_of_each_row_alone(backend):
    """Also when a context grows, rows repeat, and tokens are taken back from a larger context."""
    exact = ExactBackend(backend)
    generator = torch.Generator().manual_seed(0)
    lengths, num_new = (1, 40, FIRST_ROOM - 3, 5), 6
    rows = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths]
    adapters = ["tuned", None, "tuned", None]
    new = torch.randint(3, 250, (len(rows), num_new), generator=generator)
    alone = []
    for row, adapter, more in zip(rows, adapters, new, strict=True):
        state, logits = exact.prefill([row], adapters=[adapter])
        steps = [exact.extend(state, token[None, None])[:, 0] for token in more]
        alone.append(torch.cat([logits, *steps]))
    state, logits = exact.prefill(rows, adapters=adapters)
    wrong = torch.full((len(rows), 8), 9)
    found = exact.extend(state, torch.cat((new[:, :2], wrong), dim=1))
    exact.rewind(state, [8] * len(rows))
    places = [2, 0, 2, 1, 3]
    rest = exact.extend(exact.select(state, places), new[places, 2:])
    for row, own in enumerate(alone):
        assert torch.equal(torch.cat((logits[row, None], found[row, :2])), own[:3])
    for place, row in enumerate(places):
        assert torch.equal(rest[place], alone[row][3:])


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_calls_gives_what_reading_anew_gives(backend, seed):
    """Appended, taken back, dropped, reordered and doubled rows, by chance, against rows read alone."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rows = [[number(3, 250) for _ in range(number(1, 9))] for _ in range(number(1, 5))]
    adapters = [("tuned", None)[number(0, 2)] for _ in rows]
    state, _ = backend.prefill(rows, adapters=adapters)
    for _ in range(8):
        kind = number(0, 3)
        if kind == 0:
            counts = [number(0, len(row)) for row in rows]
            backend.rewind(state, counts)
            rows = [row[: len(row) - n] for row, n in zip(rows, counts, strict=True)]
        elif kind == 1:
            places = [number(0, len(rows)) for _ in range(number(1, 5))]
            if number(0, 2):
                places = sorted(set(places))
            state = backend.select(state, places)
            rows = [list(rows[p]) for p in places]
            adapters = [adapters[p] for p in places]
        new = torch.randint(3, 250, (len(rows), number(1, 4)), generator=generator)
        found = backend.extend(state, new)
        rows = [row + more for row, more in zip(rows, new.tolist(), strict=True)]
        for row, adapter, answer in zip(rows, adapters, found, strict=True):
            assert torch.allclose(answer[-1], logits_of(backend, row, adapter), atol=2e-4)


def test_a_long_text_moves_into_a_larger_context(backend):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (2, FIRST_ROOM + 300), generator=generator)
    state, _ = backend.prefill(ids[:, : FIRST_ROOM - 5].tolist())
    for start in range(FIRST_ROOM - 5, FIRST_ROOM + 300, 61):
        found = backend.extend(state, ids[:, start : start + 61])
    for row in range(2):
        wanted = logits_of(backend, ids[row].tolist())
        assert torch.allclose(found[row, -1], wanted, atol=1e-3)


def test_rows_that_end_just_before_a_context_grows(backend):
    """llama.cpp copies a sequence at the next decode only, and growing copies before it."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 250, (3, FIRST_ROOM), generator=generator).tolist()
    state, _ = backend.prefill(ids)
    state = backend.select(state, [2, 1])
    found = backend.extend(state, torch.tensor([[5], [6]]))
    for place, row, token in ((0, 2, 5), (1, 1, 6)):
        wanted = logits_of(backend, [*ids[row], token])
        assert torch.allclose(found[place, 0], wanted, atol=1e-3)


def test_more_outputs_than_one_decode_gives(backend):
    ids = torch.randint(3, 250, (1, 301), generator=torch.Generator().manual_seed(1))
    state, _ = backend.prefill(ids[:, :1].tolist())
    found = backend.extend(state, ids[:, 1:])
    for place in (0, 127, 128, 299):
        wanted = logits_of(backend, ids[0, : place + 2].tolist())
        assert torch.allclose(found[0, place], wanted, atol=1e-3)


def test_what_cannot_be_done_is_refused(backend):
    with pytest.raises(InvalidRequest, match="empty prompt"):
        backend.prefill([[1], []])
    with pytest.raises(InvalidRequest, match="no token 99999"):
        backend.prefill([[99999]])
    with pytest.raises(InvalidRequest, match="no adapter 'other'; it has: tuned"):
        backend.prefill([[1]], adapters=["other"])
    with pytest.raises(PromptTooLong, match="2048"):
        backend.prefill([[1] * 2049])
    state, _ = backend.prefill([[1, 2]])
    with pytest.raises(InvalidRequest, match="cannot rewind"):
        backend.rewind(state, [3])
    with pytest.raises(InvalidRequest, match="shape"):
        backend.extend(state, torch.tensor([[1], [2]]))


# Files -------------------------------------------------------------------------------------------------


def test_bad_files_are_refused_in_words(recipes, tmp_path):
    root = recipes["transformers"].directory
    content = (root / "base.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:-1000])
    with pytest.raises(CorruptModel, match="cannot load cut"):
        LlamaCppBackend(tmp_path / "cut.gguf", ONE_THREAD, name="cut")
    with pytest.raises(AdapterMismatch, match="cannot put the adapter"):
        files = {"a": recipes["llama.cpp"].directory / "adapters" / "adapter.gguf"}
        LlamaCppBackend(root / "base.gguf", ONE_THREAD, name="base", adapters=files)
    with pytest.raises(UnsupportedModel, match="trained for 2048"):
        LlamaCppBackend(root / "base.gguf", LlamaCppSettings(context_size=4096), name="base")


def test_tokens_that_llama_cpp_numbers_otherwise_are_refused(recipes, monkeypatch):
    recipe = recipes["llama.cpp"]
    spec = recipe.experts[0].anti_expert
    files = find_checkpoint(spec.model, root=recipe.directory)
    tokens = dict(files.vocabulary.token_to_id)
    tokens["the"], tokens["in"] = tokens["in"], tokens["the"]
    monkeypatch.setitem(files.__dict__, "vocabulary", replace(files.vocabulary, token_to_id=tokens))
    with pytest.raises(VocabularyMismatch, match=r"and .* in its tokenizer"):
        LlamaCppBackend.load(files, spec)


def test_settings_reach_llama_cpp(recipes):
    recipe = recipes["llama.cpp"].with_llama_cpp(context_size=64, threads=1)
    model = ProxyTuned.load(recipe, experts=["lora"])
    assert all(m.backend.capabilities.max_context == 64 for m in model.ensemble.members)
    with pytest.raises(PromptTooLong, match="at most"):
        model.generate("the " * 20, SamplingParams(max_new_tokens=60))


# The offline family ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> dict[str, Any]:
    """The smol family in float32: in transformers, and as GGUF files made from the same values."""
    root = tmp_path_factory.mktemp("smol")
    recipe = Recipe.read("package:proxytune/smol")
    files = find_checkpoint(recipe.base.model or "", root=recipe.directory)
    whole = find_checkpoint(str(files.weights_path()), root=root)
    export_model(whole, root / "base.gguf", dtype="F32", pre="smollm")
    kept = tuple(e for e in recipe.experts if e.name in ("legal", "tinyshakespeare"))
    recipe = replace(recipe, experts=kept)
    exported = export_recipe(recipe, root / "gguf", dtype="F32").directory
    in_files = replace(Recipe.read(exported), base=ModelSpec(model="../base.gguf"))
    return {
        "transformers": recipe,
        "llama.cpp": in_files.with_llama_cpp(),
        "quantised": Recipe.read(exported).with_llama_cpp(),
    }


TEXTS = {
    "legal": ("Section 2. The Mayor shall", "(a) No person may", "Notwithstanding any other law,"),
    "tinyshakespeare": ("KING RICHARD:\n", "My lord, the", "What news from"),
}


@pytest.mark.slow
def test_real_models_give_the_tokens_of_transformers(smol):
    models = {name: ProxyTuned.load(smol[name]) for name in ("transformers", "llama.cpp")}
    sampling = SamplingParams(max_new_tokens=24, logprobs=2)
    requests = [
        Request(text, sampling, None, name) for name, texts in TEXTS.items() for text in texts
    ]
    wanted = models["transformers"].generate_batch(requests, batch_size=2)
    found = models["llama.cpp"].generate_batch(requests, batch_size=2)
    same = [
        one.token_ids == other.token_ids or agree(one, other)
        for one, other in zip(found, wanted, strict=True)
    ]
    assert same.count(False) == 0


@pytest.mark.slow
def test_quantised_models_keep_the_identities(smol):
    model = ProxyTuned.load(smol["quantised"])
    sampling = SamplingParams(max_new_tokens=24)
    requests = [
        Request(text, sampling, None, name) for name, texts in TEXTS.items() for text in texts
    ]
    alone = [model.generate(request).token_ids for request in requests]
    assert [t.token_ids for t in model.generate_batch(requests, batch_size=6)] == alone
    drafted = model.generate_batch(requests, batch_size=1, speculative=True)
    assert [t.token_ids for t in drafted] == alone
    base = model.generate(TEXTS["legal"][0], sampling, alpha=0.0, experts="legal").token_ids
    assert (
        model.generate(TEXTS["legal"][0], sampling, alpha=0.0, experts="tinyshakespeare").token_ids
        == base
    )
    assert base != alone[0]
    pair = smol["quantised"].experts[0]
    same = replace(pair, expert=pair.anti_expert, alpha=1.0)
    steered = ProxyTuned.load(replace(smol["quantised"], experts=(same,), default_expert=None))
    assert steered.generate(TEXTS["legal"][0], sampling).token_ids == base
