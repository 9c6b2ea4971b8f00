"""Models whose rows run one by one: each gives what it gives alone, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from proxytune.backends.transformers import backend as backend_module
from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.backends.transformers.lengthwise import Tokens
from proxytune.backends.transformers.rows import RowsReader
from proxytune.errors import UnsupportedModel

# Kernels for one and for many tokens round differently; logits here are of the order of 10.
CLOSE = {"atol": 1e-4, "rtol": 1e-3}

WIDTH = 64
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
OF_BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "positions that count padding": (
        "bart",
        {**OF_BART, "max_position_embeddings": 64, "init_std": 0.3, "is_encoder_decoder": False},
    ),
    "a cache of its own": (
        "minimax",
        SIZES
        | {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "num_local_experts": 2}
        | {"num_experts_per_tok": 1, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    ),
    "no cache": ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}),
    "a state beside the cache": ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}),
    "a state in its modules": (
        "recurrent_gemma",
        SIZES
        | {"intermediate_size": 48, "lru_width": 32, "head_dim": 8, "attention_window_size": 64}
        | {"block_types": ["recurrent", "attention"]},
    ),
}  # fmt: skip
REWINDS = set(MODELS) - {"a cache of its own"}


def make(name: str) -> TransformersBackend:
    kind, settings = MODELS[name]
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(kind, vocab_size=WIDTH, **tokens, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    return TransformersBackend(model, name=kind)


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def backend(name: str) -> TransformersBackend:
    return make(name)


def draw(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, WIDTH, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = draw(3, 20, 7)
TAILS = draw(6, 6, 6, seed=2)
ROWS = list(zip(PROMPTS, TAILS, strict=True))


def check(backend: TransformersBackend, logits: torch.Tensor, rows: list[list[int]]) -> None:
    """Compare `[rows, vocab]` with forwards of each row by itself, without a cache."""
    with torch.inference_mode():
        alone = [backend.model(torch.tensor([row]), use_cache=False).logits[0, -1] for row in rows]
    torch.testing.assert_close(logits, torch.stack(alone), **CLOSE)


def test_padding_and_new_tokens_leave_each_row_as_it_is_alone(backend):
    """Such models failed at the first token, or counted a short row's padding as tokens."""
    assert isinstance(backend._reader, RowsReader)
    state, logits = backend.prefill(PROMPTS)
    check(backend, logits, PROMPTS)
    block = backend.extend(state, torch.tensor([tail[:4] for tail in TAILS]))
    for num_new in range(1, 5):
        check(backend, block[:, num_new - 1], [p + tail[:num_new] for p, tail in ROWS])
    check(
        backend,
        backend.decode(state, torch.tensor([t[4] for t in TAILS])),
        [p + t[:5] for p, t in ROWS],
    )


def test_prompts_in_pieces_are_whole_prompts(backend, monkeypatch):
    monkeypatch.setattr(
        backend_module, "PREFILL_TOKENS", 48
    )  # pieces of 16 tokens, all padding in some rows
    state, logits = backend.prefill(PROMPTS)
    check(backend, logits, PROMPTS)
    check(
        backend,
        backend.decode(state, torch.tensor([1, 2, 3])),
        [[*p, i] for i, p in enumerate(PROMPTS, 1)],
    )


def test_rows_are_repeated_joined_and_copied(backend):
    state, _ = backend.prefill(PROMPTS)
    other = backend.prefill(TAILS[:1]).state
    copied = backend.copy(state, [1])
    state = backend.select(state, [2, 0, 2])
    backend.decode(state, torch.tensor([9, 8, 7]))
    state = backend.merge(state, other, [3, 0, 2])
    rows = [TAILS[0], [*PROMPTS[2], 9], [*PROMPTS[2], 7]]
    check(
        backend,
        backend.decode(state, torch.tensor([4, 5, 6])),
        [[*r, i] for i, r in enumerate(rows, 4)],
    )
    check(backend, backend.decode(copied, torch.tensor([3])), [[*PROMPTS[1], 3]])


def test_tokens_are_taken_back_where_the_cache_allows_it(backend, name):
    state, _ = backend.prefill(PROMPTS)
    backend.extend(state, torch.tensor([tail[:4] for tail in TAILS]))
    assert backend.capabilities.can_rewind == (name in REWINDS)
    if name not in REWINDS:
        with pytest.raises(UnsupportedModel, match="taken back"):
            backend.rewind(state, [1, 1, 1])
        return
    backend.rewind(state, [0, 5, 2])
    rows = [PROMPTS[0] + TAILS[0][:4], PROMPTS[1][:-1], PROMPTS[2] + TAILS[2][:2]]
    check(
        backend,
        backend.decode(state, torch.tensor([4, 5, 6])),
        [[*r, i] for i, r in enumerate(rows, 4)],
    )


def test_an_engine_with_a_padded_batch_of_its_own_gets_the_same(backend):
    """`run` and `new_cache`, as transformers' generate uses them: a mask, and rows that are reordered."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    cache = backend.new_cache()
    with torch.inference_mode():
        first = backend.run(ids, cache=cache, attention_mask=mask)
        cache.reorder_cache(torch.tensor([1, 0, 0]))
        mask = torch.cat((mask[[1, 0, 0]], torch.ones(3, 1, dtype=torch.long)), dim=1)
        second = backend.run(
            torch.tensor([[4], [5], [6]]), cache=cache, attention_mask=mask, num_logits=1
        )
    assert first.shape[:2] == ids.shape
    check(backend, first[:, -1], PROMPTS)
    rows = [[*PROMPTS[1], 4], [*PROMPTS[0], 5], [*PROMPTS[0], 6]]
    check(backend, second[:, -1], rows)


def test_two_batches_take_turns(backend):
    """A state that stays in the modules used to be overwritten by the next batch."""
    one, two = (backend.prefill([prompt]).state for prompt in PROMPTS[:2])
    for step, token in enumerate(TAILS[0], 1):
        check(backend, backend.decode(one, torch.tensor([token])), [PROMPTS[0] + TAILS[0][:step]])
        check(backend, backend.decode(two, torch.tensor([token])), [PROMPTS[1] + TAILS[0][:step]])


def test_a_model_that_reads_single_tokens_after_others_gets_single_tokens():
    """ProphetNet failed at the first draft, and at the second piece of a prompt.

    Its own forward of a whole text differs from its cached ones, so those are what is compared.
    """
    sizes = {"num_decoder_layers": 2, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = transformers.ProphetNetConfig(
        vocab_size=WIDTH, hidden_size=32, num_buckets=8, relative_max_distance=8, init_std=0.3,
        max_position_embeddings=64, is_encoder_decoder=False, add_cross_attention=False, pad_token_id=0,
        **sizes,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.ProphetNetForCausalLM(config).eval()
    backend = TransformersBackend(model, name="prophetnet")
    assert not backend.capabilities.can_rewind
    state, _ = backend.prefill(PROMPTS)
    block = backend.extend(state, torch.tensor(TAILS))
    option = str(backend._cache_option)
    for row, (prompt, tail) in enumerate(ROWS):
        cache = transformers.DynamicCache(config=config)
        with torch.inference_mode():
            for ids in (prompt, *([token] for token in tail)):
                output = model(torch.tensor([ids]), use_cache=True, **{option: cache})
        torch.testing.assert_close(block[row, -1], output.logits[0, -1], **CLOSE)


@pytest.mark.parametrize("num_logits", [1, 3, 0])
def test_a_padded_row_is_asked_for_no_more_logits_than_are_shown(num_logits):
    """Those of a whole prompt would take gigabytes."""
    asked: list[tuple[int, int]] = []

    def forward(tokens: Tokens) -> torch.Tensor:
        count = tokens.num_logits or tokens.token_ids.shape[1]
        asked.append((tokens.token_ids.shape[1], count))
        return tokens.token_ids[:, -count:, None].float().expand(-1, -1, 4)

    token_ids = torch.arange(1, 13).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [0] * 4 + [1] * 2])
    reader = RowsReader(forward, object)
    logits = reader.run(Tokens(token_ids, reader.new_cache(), mask, None, None, num_logits))
    shown = num_logits or 6
    assert asked == [(6, shown), (2, min(2, shown))]
    assert logits[..., 0].tolist() == (token_ids * mask)[:, -shown:].tolist()
