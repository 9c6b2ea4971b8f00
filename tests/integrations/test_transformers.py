"""Recipes as transformers models: the Auto classes, generate, pipelines, loss, saving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import proxytune  # noqa: F401  its import is what teaches the Auto classes
from proxytune.errors import (
    InvalidRequest,
    PromptTooLong,
    RecipeError,
    UnknownExpert,
    UnsafeModel,
    UnsupportedModel,
    UserError,
)
from proxytune.integrations.transformers import ProxyTunedCache, ProxyTunedForCausalLM
from proxytune.logits.steer import steer
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, LlamaCppSettings, ModelSpec
from proxytune.request import SamplingParams
from tests.support.foreign_code import model_with_code
from tests.support.tiny import NUM_TOKENS, Architecture, tiny_adapter, tiny_model, tiny_tokenizer

# Kernels for one and for many tokens round differently; logits here are of the order of 10.
CLOSE = {"atol": 3e-5, "rtol": 1e-4}

SMALL = ModelSpec(model="small")
TEXTS = ["the rain in Spain", "a", "stays mainly in the plain"]


def write(
    directory: Path, *experts: ExpertSpec, base: ModelSpec | None = None, **kwargs: Any
) -> Path:
    Recipe(base or ModelSpec(model="base"), experts, directory=directory, **kwargs).write(
        directory, overwrite=True
    )
    return directory


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA expert and its opposite on one small model, beside an expert of full weights."""
    architecture: Architecture = request.param
    directory = tmp_path_factory.mktemp(architecture)
    tiny_model(directory / "base", architecture, seed=1, hidden_size=32)
    tiny_model(directory / "small", architecture, seed=2)
    tiny_model(directory / "tuned", architecture, seed=3)
    tiny_adapter(directory / "small", directory / "adapters" / "good", seed=4)
    tiny_adapter(directory / "small", directory / "adapters" / "bad", seed=5)
    return write(
        directory,
        ExpertSpec("lora", ModelSpec(adapter="adapters/good"), SMALL),
        ExpertSpec(
            "opposed",
            ModelSpec(model="small", adapter="adapters/good"),
            ModelSpec(model="small", adapter="adapters/bad"),
            alpha=0.5,
        ),
        ExpertSpec("full", ModelSpec(model="tuned"), SMALL),
        ExpertSpec("contrast", ModelSpec(same_as="base"), SMALL, alpha=0.25),
        default_expert="lora",
    )


@pytest.fixture(scope="module")
def model(recipe: Path) -> ProxyTunedForCausalLM:
    return AutoModelForCausalLM.from_pretrained(recipe)


def reference(directory: Path, adapter: Path | None = None) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    return loaded.eval()


def batch(recipe: Path, texts: list[str] = TEXTS) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(recipe, padding_side="left")
    return tokenizer(texts, return_tensors="pt", padding=True)


NEW = {"max_new_tokens": 12, "min_new_tokens": 12}


def test_logits_are_the_formula_applied_to_the_models_run_apart(recipe, model):
    ids = batch(recipe, TEXTS[:1])["input_ids"]
    with torch.no_grad():
        base, small = (
            reference(recipe / "base")(ids).logits,
            reference(recipe / "small")(ids).logits,
        )
        good = reference(recipe / "small", recipe / "adapters" / "good")(ids).logits
        bad = reference(recipe / "small", recipe / "adapters" / "bad")(ids).logits
        tuned = reference(recipe / "tuned")(ids).logits
        for experts, expert, anti_expert, alpha in (
            (None, good, small, 1.0),
            ("opposed", good, bad, 0.5),
            ("full", tuned, small, 1.0),
            ("contrast", base, small, 0.25),
        ):
            expected = steer(
                base, expert_logits=expert, anti_expert_logits=anti_expert, alpha=alpha
            )
            logits = model(ids, experts=experts).logits
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, expected, **CLOSE)
        both = model(ids, experts={"lora": 0.5, "full": 2.0}).logits
        torch.testing.assert_close(both, base + 0.5 * (good - small) + 2 * (tuned - small), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_at_alpha_0_generate_gives_what_the_base_generates(recipe, model, options):
    inputs = batch(recipe)
    expected = reference(recipe / "base").generate(**inputs, do_sample=False, **NEW, **options)
    steered = model.generate(**inputs, alpha=0.0, do_sample=False, **NEW, **options)
    assert torch.equal(steered, expected)


def test_an_expert_equal_to_its_anti_expert_gives_the_base(recipe):
    write(recipe, ExpertSpec("same", SMALL, SMALL, alpha=3.0))
    inputs = batch(recipe)
    steered = AutoModelForCausalLM.from_pretrained(recipe).generate(**inputs, **NEW)
    assert torch.equal(steered, reference(recipe / "base").generate(**inputs, **NEW))


@pytest.fixture(autouse=True)
def _keep_recipe(request: pytest.FixtureRequest) -> Any:
    """Put back the recipe that a test wrote over."""
    if "recipe" not in request.fixturenames:
        yield
        return
    path = request.getfixturevalue("recipe") / "config.json"
    content = path.read_text()
    yield
    path.write_text(content)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_with_the_anti_expert_as_base_alpha_1_gives_the_expert(recipe, options):
    write(recipe, ExpertSpec("lora", ModelSpec(adapter="adapters/good"), SMALL), base=SMALL)
    inputs = batch(recipe)
    steered = AutoModelForCausalLM.from_pretrained(recipe).generate(**inputs, **NEW, **options)
    expert = reference(recipe / "small", recipe / "adapters" / "good")
    assert torch.equal(steered, expert.generate(**inputs, **NEW, **options))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "beams", "drafts"],
)
def test_a_batch_of_ragged_prompts_gives_what_each_gives_alone(recipe, model, options):
    texts = TEXTS[:1] if "prompt_lookup_num_tokens" in options else TEXTS
    together = model.generate(**batch(recipe, texts), **NEW, **options)
    for row, text in enumerate(texts):
        alone = model.generate(**batch(recipe, [text]), **NEW, **({"num_beams": 1} | options))
        assert together[row, -12:].tolist() == alone[0, -12:].tolist()
        if "num_beams" not in options:
            plain = model.generate(**batch(recipe, [text]), **NEW)
            assert plain[0].tolist() == alone[0].tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generating_with_and_without_a_cache_gives_the_same(recipe, model, options):
    inputs = batch(recipe)
    cached = model.generate(**inputs, experts="opposed", **NEW, **options)
    uncached = model.generate(**inputs, experts="opposed", use_cache=False, **NEW, **options)
    assert torch.equal(cached, uncached)


def test_the_library_and_generate_agree_token_for_token(recipe, model):
    """Texts end at the end-of-sequence token, which is compared too."""
    library = ProxyTuned.load(recipe)
    for text in TEXTS:
        for experts, alpha in ((None, None), ("opposed", 1.5), (("lora", "full"), 0.5)):
            trace = library.generate(
                text, SamplingParams(max_new_tokens=12), alpha=alpha, experts=experts
            )
            inputs = batch(recipe, [text])
            tokens = model.generate(**inputs, max_new_tokens=12, alpha=alpha, experts=experts)
            assert tokens[0, inputs["input_ids"].shape[1] :].tolist() == list(trace.token_ids)


def test_sampling_draws_from_the_steered_distribution(recipe, model):
    """4,000 draws of the first token lie within a total variation of 0.15 of the model's probs.

    A multinomial with at most 266 outcomes stays below half of that; a false alarm is rarer than 1e-9.
    """
    inputs = batch(recipe, TEXTS[:1])
    torch.manual_seed(0)
    drawn = model.generate(
        **inputs, do_sample=True, num_return_sequences=4000, max_new_tokens=1, top_k=0
    )[:, -1]
    probs = model(**inputs).logits[0, -1].softmax(-1)
    counts = torch.bincount(drawn, minlength=len(probs)) / 4000
    assert float((counts - probs).abs().sum() / 2) < 0.15


def test_sampled_text_repeats_with_its_seed(recipe, model):
    inputs = batch(recipe)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model.generate(**inputs, do_sample=True, **NEW))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_loss_is_the_cross_entropy_of_shifted_labels(recipe, model):
    inputs = batch(recipe)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    logprobs = output.logits[:, :-1].log_softmax(-1)
    kept = labels[:, 1:] != -100
    chosen = logprobs.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(output.loss, -chosen[kept].mean())


def test_logits_to_keep_gives_the_last_ones_or_the_places_asked_for(recipe, model):
    inputs = batch(recipe)
    whole = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, whole[:, -2:])
    places = torch.tensor([0, 3])
    torch.testing.assert_close(model(**inputs, logits_to_keep=places).logits, whole[:, places])


def test_set_steering_holds_until_it_is_taken_back(recipe, model):
    ids = batch(recipe, TEXTS[:1])["input_ids"]
    before = model(ids).logits
    model.set_steering(alpha=2.0, experts="full")
    torch.testing.assert_close(model(ids).logits, model(ids, alpha=2.0, experts="full").logits)
    torch.testing.assert_close(model(ids, alpha=1.0, experts="lora").logits, before)
    model.set_steering()
    torch.testing.assert_close(model(ids).logits, before)
    with pytest.raises(UnknownExpert, match="lora"):
        model.set_steering(experts="loar")
    with pytest.raises(InvalidRequest, match="alpha"):
        model.set_steering(alpha=float("nan"))


def test_a_cache_begun_without_an_expert_cannot_go_on_with_it(recipe, model):
    ids = batch(recipe, TEXTS[:1])["input_ids"]
    cache = model(ids, alpha=0.0).past_key_values
    assert isinstance(cache, ProxyTunedCache) and cache.get_seq_length() == ids.shape[1]
    with pytest.raises(InvalidRequest, match="begun without lora"):
        model(ids[:, :1], past_key_values=cache, alpha=1.0)


def test_a_cache_may_change_its_alpha_and_be_cropped(recipe, model):
    ids = batch(recipe, TEXTS[:1])["input_ids"]
    cache = model(ids[:, :6], alpha=1.0).past_key_values
    cache.crop(-2)
    for at, alpha in ((4, 0.0), (5, 0.7)):
        logits = model(ids[:, at : at + 1], past_key_values=cache, alpha=alpha).logits
        torch.testing.assert_close(logits[:, 0], model(ids, alpha=alpha).logits[:, at], **CLOSE)


def test_a_cache_follows_the_selection_and_repetition_of_rows(recipe, model):
    inputs = batch(recipe)
    cache = model(**inputs, experts="opposed").past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([4, 1]))
    rows = torch.tensor([2, 0])
    ids = torch.cat([inputs["input_ids"][rows], torch.tensor([[5], [6]])], dim=1)
    mask = torch.cat([inputs["attention_mask"][rows], torch.ones(2, 1).long()], dim=1)
    logits = model(ids[:, -1:], mask, cache=cache, experts="opposed").logits
    expected = model(ids, mask, experts="opposed").logits[:, -1:]
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_the_pipeline_writes_with_the_bases_tokenizer(recipe, model, caplog):
    pipe = pipeline("text-generation", model=str(recipe))
    assert isinstance(pipe.model, ProxyTunedForCausalLM)
    (answer,) = pipe(TEXTS[0], max_new_tokens=12, do_sample=False)
    tokens = model.generate(**batch(recipe, TEXTS[:1]), max_new_tokens=12)
    tokenizer = AutoTokenizer.from_pretrained(recipe)
    assert answer["generated_text"] == tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert "not supported" not in caplog.text


def test_saving_writes_the_recipe_and_no_weights(recipe, model, tmp_path):
    (recipe / "README.md").write_text("my card")
    model.save_pretrained(tmp_path / "saved")
    names = {p.relative_to(tmp_path / "saved").parts[0] for p in (tmp_path / "saved").rglob("*")}
    assert names == {"config.json", "README.md", "modeling_proxytune.py", "adapters"}
    assert (tmp_path / "saved" / "README.md").read_text() == "my card"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    inputs = batch(recipe)
    for experts in ("lora", "opposed", "full"):
        torch.testing.assert_close(
            again(**inputs, experts=experts).logits, model(**inputs, experts=experts).logits
        )


def test_a_config_saves_as_the_recipe_it_was_read_from(recipe, tmp_path):
    config = AutoConfig.from_pretrained(recipe)
    AutoModelForCausalLM.from_pretrained(recipe)
    config.save_pretrained(tmp_path)
    assert Recipe.read(tmp_path).to_dict() == Recipe.read(recipe).to_dict()


def test_the_dtype_of_from_pretrained_runs_every_model_and_is_not_saved(recipe, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(recipe, dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(**batch(recipe)).logits.dtype == torch.float32
    model.save_pretrained(tmp_path)
    assert Recipe.read(tmp_path).base.dtype is None and Recipe.read(tmp_path).base.device is None


def test_the_attention_implementation_reaches_every_model(recipe):
    model = AutoModelForCausalLM.from_pretrained(recipe, attn_implementation="eager")
    assert {m.config._attn_implementation for m in model.members} == {"eager"}


@pytest.mark.parametrize(
    "options",
    [
        {"quantization_config": {"load_in_4bit": True}},
        {"max_memory": {0: "1GB"}},
        {"device_map": {"model.embed_tokens": "cpu"}},
        {"device_map": "balanced"},
        {"use_safetensors": False},
        {"exact": True},
    ],
    ids=str,
)
def test_an_option_that_a_recipe_cannot_honour_is_refused_by_name(recipe, options):
    with pytest.raises(UnsupportedModel, match=next(iter(options))):
        ProxyTunedForCausalLM.from_pretrained(recipe, **options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"inputs_embeds": torch.zeros(1, 1, 16)}, "inputs_embeds"),
        ({"attention_mask": torch.ones(1, 9)}, "attention_mask has shape"),
        ({"input_ids": torch.tensor([[NUM_TOKENS]])}, f"no token {NUM_TOKENS}"),
        ({"alpha": float("inf")}, "alpha"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_forward_that_cannot_be_honoured_is_refused_by_name(model, options, why):
    with pytest.raises(InvalidRequest, match=why):
        model(**{"input_ids": torch.tensor([[1, 2]]), **options})


def test_a_cache_of_a_single_model_is_refused(recipe, model):
    ids = torch.tensor([[1, 2]])
    cache = reference(recipe / "base")(ids).past_key_values
    with pytest.raises(InvalidRequest, match="DynamicCache"):
        model(ids, past_key_values=cache)
    with pytest.raises(InvalidRequest, match="cache_implementation is 'static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)


def test_generate_refuses_a_misspelt_option(model):
    with pytest.raises(ValueError, match="alhpa"):
        model.generate(torch.tensor([[1]]), alhpa=0.5, max_new_tokens=1)


# Recipes of other shapes ----------------------------------------------------------------------------


def test_text_beyond_a_models_context_names_the_model(tmp_path):
    tiny_model(tmp_path / "base", max_context=64)
    tiny_model(tmp_path / "small", max_context=8)
    write(tmp_path, ExpertSpec("e", SMALL, SMALL))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.max_position_embeddings == 8
    ids = torch.arange(9)[None]
    with pytest.raises(PromptTooLong, match=r"small can hold 8 tokens.*hold 9"):
        model(ids)
    padded = torch.tensor([[0] * 5 + [1] * 4])
    model(ids, padded)  # nine slots, four tokens


def test_padding_ids_are_never_generated_and_widths_may_differ(tmp_path):
    tiny_model(tmp_path / "base", width=NUM_TOKENS + 6, seed=1)
    tiny_model(tmp_path / "small", width=NUM_TOKENS + 2, seed=2)
    tiny_model(tmp_path / "tuned", seed=3)
    write(tmp_path, ExpertSpec("e", ModelSpec(model="tuned"), SMALL))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    logits = model(ids).logits
    assert logits.shape[-1] == NUM_TOKENS + 6
    assert torch.isinf(logits[..., NUM_TOKENS:]).all()
    base, tuned, small = (
        reference(tmp_path / name)(ids).logits[..., :NUM_TOKENS]
        for name in ("base", "tuned", "small")
    )
    torch.testing.assert_close(logits[..., :NUM_TOKENS], base + tuned - small, **CLOSE)


def test_small_models_with_other_ids_for_the_same_tokens_are_permuted(tmp_path):
    tiny_model(tmp_path / "base", seed=1)
    shuffled = tiny_tokenizer(shuffle_seed=1)
    tiny_model(tmp_path / "small", seed=2, tokenizer=shuffled)
    tiny_model(tmp_path / "tuned", seed=3, tokenizer=shuffled)
    write(tmp_path, ExpertSpec("e", ModelSpec(model="tuned"), SMALL))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    own = shuffled(TEXTS[0], return_tensors="pt")["input_ids"]
    order = torch.tensor(
        [
            shuffled.convert_tokens_to_ids(t)
            for t in tokenizer.convert_ids_to_tokens(range(NUM_TOKENS))
        ]
    )
    offset = reference(tmp_path / "tuned")(own).logits - reference(tmp_path / "small")(own).logits
    expected = reference(tmp_path / "base")(ids).logits + offset[..., order]
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"model": "http://127.0.0.1:1/v1"}, "base runs behind an API"),
        ({"model": "base.gguf", "llama_cpp": LlamaCppSettings()}, r"base runs in llama\.cpp"),
    ],
    ids=["api", "llama.cpp"],
)
def test_a_model_that_another_engine_runs_is_refused_before_anything_is_loaded(tmp_path, keys, why):
    """The models used to be loaded, or the server called, and then an attribute was missing."""
    tiny_model(tmp_path / "small")
    write(tmp_path, ExpertSpec("e", SMALL, SMALL), base=ModelSpec(**keys))
    with pytest.raises(UnsupportedModel, match=why):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_recipe_whose_models_want_different_prompts_is_refused_by_name(tmp_path):
    for name in ("base", "small"):
        tiny_model(tmp_path / name)
    write(tmp_path, ExpertSpec("e", ModelSpec(model="small", prompt="chat"), SMALL))
    with pytest.raises(UnsupportedModel, match=r"e\.expert reads texts as 'chat'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_pushing_a_recipe_with_local_models_is_refused(recipe, model, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda *_, **__: pytest.fail("reached")
    )
    with pytest.raises(RecipeError, match=r"names .*base, a path of this machine"):
        model.push_to_hub("owner/name")


def test_pushing_uploads_the_recipe_and_its_adapters(recipe, model, monkeypatch):
    import types

    import huggingface_hub

    from proxytune.integrations.auto import ProxyTunedConfig

    uploaded: dict[str, str] = {}

    def upload_folder(_: Any, *, folder_path: Path, repo_id: str, **__: Any) -> str:
        files = [p for p in folder_path.rglob("*") if p.is_file()]
        uploaded.update({p.relative_to(folder_path).as_posix(): repo_id for p in files})
        uploaded["config"] = (folder_path / "config.json").read_text()
        return "commit"

    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "create_repo",
        lambda *_, **__: types.SimpleNamespace(repo_id="me/name"),
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    content = json.loads((recipe / "config.json").read_text())
    content["base"] = {"model": "owner/base"}
    content["experts"] = [
        {
            "name": "e",
            "expert": {"adapter": "adapters/good"},
            "anti_expert": {"model": "owner/small"},
        }
    ]
    del content["default_expert"]
    hub_config = ProxyTunedConfig(
        base=content["base"], experts=content["experts"], name_or_path=str(recipe)
    )
    monkeypatch.setattr(model, "config", hub_config)
    model.push_to_hub("name")
    assert uploaded["adapters/good/adapter_model.safetensors"] == "me/name"
    assert uploaded["modeling_proxytune.py"] == uploaded["README.md"] == "me/name"
    assert not any(name.startswith("model") and name.endswith(".safetensors") for name in uploaded)
    assert json.loads(uploaded["config"])["base"] == {"model": "owner/base"}


# Registration ---------------------------------------------------------------------------------------

FIRST_PROXYTUNE = """
import sys
import proxytune
assert "transformers" not in sys.modules and "torch" not in sys.modules, "import proxytune is cheap"
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
"""
FIRST_TRANSFORMERS = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
import proxytune
"""
FIRST_MODELING = """
import proxytune
import transformers.modeling_utils, transformers.generation.utils
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
"""
FIRST_INTEGRATION = """
from proxytune.integrations.transformers import ProxyTunedForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
"""


@pytest.mark.parametrize(
    "imports",
    [FIRST_PROXYTUNE, FIRST_TRANSFORMERS, FIRST_MODELING, FIRST_INTEGRATION],
    ids=["proxytune", "transformers", "modeling", "integration"],
)
def test_the_auto_classes_know_recipes_whichever_is_imported_first(tmp_path, imports):
    for name in ("base", "small"):
        tiny_model(tmp_path / name)
    write(tmp_path, ExpertSpec("e", SMALL, SMALL))
    program = f"""{imports}
print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)
print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)
print(AutoTokenizer.from_pretrained({str(tmp_path)!r}).decode([1, 2, 3]) != "")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["ProxyTunedConfig", "ProxyTunedForCausalLM", "True"]


def run_without_importing_proxytune(program: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that reads recipes as a stranger would, with a home directory of its own."""
    imports = "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline\n"
    return subprocess.run(
        [sys.executable, "-c", imports + program],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HOME": str(home)},
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def small_recipe(tmp_path: Path) -> Path:
    for name in ("base", "small"):
        tiny_model(tmp_path / name)
    return write(tmp_path, ExpertSpec("e", SMALL, SMALL))


def test_trust_remote_code_loads_a_recipe_where_nothing_imported_proxytune(small_recipe, tmp_path):
    done = run_without_importing_proxytune(
        f"""
path = {str(small_recipe)!r}
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
print(type(model).__name__, type(model).__module__)
print(tokenizer.decode([1, 2, 3]) != "")
pipe = pipeline("text-generation", model=path, trust_remote_code=True)
print(len(pipe("the rain", max_new_tokens=3)[0]["generated_text"]) > 8)
model.save_pretrained(path + "/saved")
model.config.save_pretrained(path + "/config")
""",
        tmp_path / "home",
    )
    assert done.returncode == 0, done.stderr  # older versions' pipelines warn of their own defaults
    assert done.stdout.split() == [
        *("ProxyTunedForCausalLM", "proxytune.integrations.transformers"),
        *("True", "True"),
    ]
    # transformers copies the module of a class it found by auto_map, and that is this package's own file.
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert saved == {"config.json", "README.md", "modeling_proxytune.py"}
    assert [path.name for path in (tmp_path / "config").iterdir()] == ["config.json"]


def test_the_tokenizer_alone_is_found_with_trust_remote_code(small_recipe, tmp_path):
    call = f"from_pretrained({str(small_recipe)!r}, trust_remote_code=True)"
    program = f"print(AutoTokenizer.{call}.decode([1]))"
    done = run_without_importing_proxytune(program, tmp_path / "home")
    assert (done.returncode, done.stderr) == (0, "")


def test_without_trust_transformers_refuses_to_run_the_recipes_loader(small_recipe, tmp_path):
    program = f"AutoModelForCausalLM.from_pretrained({str(small_recipe)!r})"
    done = run_without_importing_proxytune(program, tmp_path / "home")
    assert done.returncode == 1 and "trust_remote_code=True" in done.stderr


def test_trusting_a_recipe_is_not_trusting_the_code_of_its_models(small_recipe):
    path = small_recipe / "base" / "config.json"
    content = json.loads(path.read_text())
    own_code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    path.write_text(json.dumps({**content, "model_type": "evil", "auto_map": own_code}))
    with pytest.raises(UserError, match="needs Python code that comes with it"):
        AutoModelForCausalLM.from_pretrained(small_recipe, trust_remote_code=True)


@pytest.fixture
def recipe_with_code(tmp_path: Path) -> tuple[Path, Path]:
    """A recipe that asks to run its base's code, and the file that the code makes when it runs."""
    mark = tmp_path / "the-code-ran"
    model_with_code(tmp_path / "base", mark)
    tiny_model(tmp_path / "small")
    base = ModelSpec(model="base", trust_remote_code=True)
    return write(tmp_path, ExpertSpec("e", SMALL, SMALL), base=base), mark


@pytest.mark.parametrize("said", [{}, {"trust_remote_code": False}, {"trust_remote_code": None}])
@pytest.mark.parametrize("auto_class", [AutoTokenizer, AutoModelForCausalLM])
def test_without_the_callers_trust_no_auto_class_runs_the_code_that_a_recipe_asks_for(
    recipe_with_code, auto_class, said
):
    recipe, mark = recipe_with_code
    with pytest.raises(UnsafeModel, match="own_code"):
        auto_class.from_pretrained(recipe, **said)
    assert not mark.exists()


def test_the_config_of_a_recipe_runs_no_code_whatever_is_said(recipe_with_code):
    recipe, mark = recipe_with_code
    for said in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        AutoConfig.from_pretrained(recipe, **said)
    assert not mark.exists()


@pytest.mark.parametrize("auto_class", [AutoTokenizer, AutoModelForCausalLM])
def test_the_callers_trust_reaches_the_models_of_a_recipe(recipe_with_code, auto_class):
    recipe, mark = recipe_with_code
    auto_class.from_pretrained(recipe, trust_remote_code=True)
    assert mark.exists()


def test_trust_ends_with_the_call_that_gave_it(recipe_with_code, tmp_path):
    recipe, mark = recipe_with_code
    config = AutoConfig.from_pretrained(recipe, trust_remote_code=True)
    with pytest.raises(UnsafeModel):
        AutoTokenizer.from_pretrained(recipe)
    with pytest.raises(UnsafeModel):
        AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsafeModel):
        ProxyTunedForCausalLM(config)
    assert not mark.exists()


def test_no_key_of_a_recipe_grants_what_only_its_caller_can(recipe_with_code):
    recipe, mark = recipe_with_code
    path = recipe / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "_is_trusted": True, "allow_pickle": True}))
    assert not AutoConfig.from_pretrained(recipe)._is_trusted
    with pytest.raises(UserError):
        AutoTokenizer.from_pretrained(recipe)
    assert not mark.exists()


def test_pickled_weights_need_the_callers_word_in_transformers_too(tmp_path):
    for name in ("base", "small"):
        tiny_model(tmp_path / name)
    asks = ModelSpec(model="small", allow_pickle=True)
    recipe = write(tmp_path, ExpertSpec("e", asks, asks))
    with pytest.raises(UnsafeModel, match="allow_pickle=True"):
        AutoModelForCausalLM.from_pretrained(recipe)
    AutoModelForCausalLM.from_pretrained(recipe, allow_pickle=True)
