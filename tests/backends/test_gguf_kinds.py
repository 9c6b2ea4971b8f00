"""Kinds of GGUF files in llama.cpp: types of weights, files in parts, and names of rules that cut text.

Needs llama-cpp-python, which compiles for some minutes: `make test-gguf` installs it into an environment of
its own. llama.cpp quantises the tiny models itself.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python; `make test-gguf` installs it")

from proxytune.backends.llama_cpp import library
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.checkpoints.pre_tokenizers import CUTTING_RULES, cut_by, cutting_rule
from proxytune.decode.speculative import Drafting
from proxytune.errors import UnsupportedModel
from proxytune.loading.doctor import examine
from proxytune.model import ProxyTuned
from proxytune.recipe.recipe import Recipe
from proxytune.recipe.spec import ExpertSpec, LlamaCppSettings, ModelSpec
from proxytune.request import Request, SamplingParams
from proxytune.trace import Trace
from tests.support.cutting import TEXTS, crossing_bpe
from tests.support.tiny import tiny_gguf

PROMPTS = ("the", "in the end there was", "Zoë 🙂", "an otter ran into the rain again")
GREEDY = SamplingParams(max_new_tokens=10, ignore_eos=True, logprobs=2)

ROUNDING = 0.5
"""How far apart, in nats, two candidates may be where two paths part. llama.cpp rounds activations to 8 bits,
so a difference of 1e-6 between two kernels can become one of 0.2 in a logit, where a value lies between two
steps. The logits of these models reach 15."""

KINDS = {
    "Q2_K": "Q2_K",
    "Q3_K_M": "Q3_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "IQ2_XXS": "IQ2_XXS",
    "IQ3_S": "IQ3_S",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
    "Q5_0": "Q5_0",
    "TQ2_0": "TQ2_0",
}
"""The type of most tensors, by the name of llama.cpp's mixture. None of them keeps to one type."""


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def quantize(source: Path, target: Path, mixture: str) -> Path:
    """Write a GGUF file with other types of weights, chosen as llama.cpp's `llama-quantize` does."""
    api = library()
    options = api.llama_model_quantize_default_params()
    options.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{mixture}")
    options.nthread = 1
    # Every input matters as much as the others. The smallest types need such numbers.
    import gguf

    matrices = [t for t in gguf.GGUFReader(source).tensors if len(t.shape) == 2]
    even = [(ctypes.c_float * int(t.shape[0]))(*[1.0] * int(t.shape[0])) for t in matrices]
    entries = (api.llama_model_imatrix_data * (len(matrices) + 1))()
    for entry, tensor, data in zip(entries, matrices, even, strict=False):
        entry.name, entry.size = tensor.name.encode(), len(data)
        entry.data = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))
    options.imatrix = ctypes.cast(entries, ctypes.POINTER(api.llama_model_imatrix_data))
    assert api.llama_model_quantize(str(source).encode(), str(target).encode(), options) == 0
    return target


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Float32 models with rows of 256 and 512 values, as K-quants need them."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "small", "tuned")):
        tiny_gguf(root / f"{name}.gguf", seed=seed, hidden_size=256)
    return root


def recipe_of(root: Path, base: str, *, small: str = "small.gguf", tuned: str = "tuned.gguf"):
    def spec(name: str) -> ModelSpec:
        settings = LlamaCppSettings(threads=1, cache_dtype="float32")
        return ModelSpec(model=name, llama_cpp=settings)

    pair = ExpertSpec("one", spec(tuned), spec(small))
    return Recipe(base=spec(base), experts=(pair,), directory=root)


def part(one: Trace, other: Trace) -> bool:
    """Whether two texts part, which may happen only where both paths' two best are close."""
    for a, b in zip(one.steps, other.steps, strict=True):
        if a.token_id != b.token_id:
            assert all(step.top[0][1] - step.top[1][1] < ROUNDING for step in (a, b)), (a, b)
            return True
    return False


@pytest.mark.parametrize("mixture", KINDS)
def test_a_file_of_every_type_is_steered_and_unpacked(sources, mixture):
    """The identities hold within llama.cpp; transformers gets the values that the gguf package unpacks."""
    import gguf
    from safetensors.torch import load_file

    path = quantize(sources / "base.gguf", sources / f"{mixture}.gguf", mixture)
    found = find_checkpoint(path.name, root=sources)
    assert found.stored_dtype == KINDS[mixture]
    model = ProxyTuned.load(recipe_of(sources, path.name))
    requests = [Request(prompt, GREEDY, 0.8) for prompt in PROMPTS]
    alone = [model.generate(request) for request in requests]
    for options in (
        {"batch_size": 4},
        {"batch_size": 2, "speculative": Drafting(3, "expert", is_adaptive=False)},
    ):
        together = model.generate_batch(requests, **options)
        parted = [part(*pair) for pair in zip(alone, together, strict=True)]
        assert parted.count(True) <= 1
    same = ProxyTuned.load(recipe_of(sources, path.name, tuned="small.gguf"))
    base = model.generate(PROMPTS[1], GREEDY, alpha=0.0).token_ids
    assert same.generate(PROMPTS[1], GREEDY, alpha=1.0).token_ids == base

    found.check_buildable()
    converted = load_file(found.weights_path() / "model.safetensors")
    names = {"token_embd": "embed_tokens", "blk.1.ffn_down": "layers.1.mlp.down_proj"}
    stored = {
        tensor.name.removesuffix(".weight"): tensor for tensor in gguf.GGUFReader(path).tensors
    }
    for name, own in names.items():
        values = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
        torch.testing.assert_close(
            converted[f"model.{own}.weight"], torch.from_numpy(values), rtol=1e-6, atol=1e-7
        )


def test_a_model_in_parts_is_the_model_in_one_file(sources):
    first = tiny_gguf(sources / "parts.gguf", hidden_size=256, tensors_per_part=6)
    assert first.name == "parts-00001-of-00004.gguf"
    whole = ProxyTuned.load(recipe_of(sources, "base.gguf"))
    for number in (1, 3):
        recipe = recipe_of(sources, f"parts-{number:05}-of-00004.gguf")
        parts = ProxyTuned.load(recipe)
        for prompt in PROMPTS:
            wanted = whole.generate(prompt, GREEDY, alpha=0.5).token_ids
            assert parts.generate(prompt, GREEDY, alpha=0.5).token_ids == wanted
        files = sources.glob("parts-*.gguf")
        assert examine(recipe).models[0].weight_bytes == sum(file.stat().st_size for file in files)


# How text is cut ---------------------------------------------------------------------------------------

_CAPITALS = {TEXTS[8], TEXTS[9], TEXTS[13]}
_SPACES = {TEXTS[14]}
OTHERWISE = {
    # llama.cpp's rules have one kind of letter outside ASCII where the models' own have capitals and others.
    "tekken": _CAPITALS,
    "gpt-4o": _CAPITALS,
    "llama4": _CAPITALS,
    "kanana2": _CAPITALS,
    "talkie": _CAPITALS,
    "minimax-m2": _CAPITALS,
    # llama.cpp replaces spaces outside ASCII before these rules, which name ranges that hold some of them.
    "deepseek-llm": _SPACES,
    "deepseek-coder": _SPACES,
}
"""Texts that llama.cpp cuts otherwise than the tokenizer.json of the models with that rule."""


def llama_cpp_tokens(path: Path, texts: tuple[str, ...]) -> list[list[int]]:
    api = library()
    options = api.llama_model_default_params()
    options.vocab_only = True
    model = api.llama_model_load_from_file(str(path).encode(), options)
    assert model
    vocabulary = api.llama_model_get_vocab(model)
    found = []
    for text in texts:
        encoded, buffer = text.encode(), (ctypes.c_int32 * 512)()
        count = api.llama_tokenize(
            vocabulary, encoded, len(encoded), buffer, len(buffer), False, True
        )
        assert count >= 0
        found.append(list(buffer[:count]))
    api.llama_model_free(model)
    return found


def test_every_rule_gives_the_tokens_of_llama_cpp(tmp_path):
    """Digits, spaces, line ends, contractions, other scripts, emoji: 18 texts under every name."""
    import gguf
    from tokenizers import Tokenizer, models

    tokens, merges = crossing_bpe()
    for name, rule in CUTTING_RULES.items():
        path = tmp_path / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(0)
        writer.add_context_length(64)
        writer.add_embedding_length(8)
        writer.add_feed_forward_length(8)
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list(sorted(tokens, key=tokens.__getitem__))
        writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_add_bos_token(False)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=list(merges)))
        cut_by(tokenizer, rule)
        ours = [encoding.ids for encoding in tokenizer.encode_batch(list(TEXTS))]
        theirs = llama_cpp_tokens(path, TEXTS)
        differ = {text for text, a, b in zip(TEXTS, ours, theirs, strict=True) if a != b}
        assert differ == OTHERWISE.get(name, set()), name


def test_names_that_llama_cpp_does_not_know_are_refused_by_both(tmp_path):
    api = library()
    path = tiny_gguf(tmp_path / "a.gguf", pre="of-tomorrow")
    assert not api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    with pytest.raises(UnsupportedModel, match="'of-tomorrow'"):
        cutting_rule("of-tomorrow", str(path))
