"""Rotary angles that depend on a row's length: each row is read as it is alone, also across the switch.

What a row alone gives comes from a fresh copy of the model in transformers, one sequence at a time.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from proxytune.backends.transformers import backend as backend_module
from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.errors import UnsupportedModel

# Kernels for one and for many tokens round differently; logits here are of the order of 10.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}

WIDTH = 64
SWITCH = 32
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": SWITCH,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": (
        "phi3",
        {
            "original_max_position_embeddings": SWITCH,
            "sliding_window": None,
            "rope_parameters": {**LONG, "partial_rotary_factor": 1.0},
        },
    ),
    "phi3 with a window": (
        "phi3",
        {
            "original_max_position_embeddings": SWITCH,
            "sliding_window": 20,
            "rope_parameters": {**LONG, "partial_rotary_factor": 1.0},
        },
    ),
    "phimoe": (
        "phimoe",
        {
            "num_local_experts": 2,
            "rope_parameters": {**LONG, "short_mscale": 1.1, "long_mscale": 1.4},
        },
    ),
    "llama": ("llama", {"rope_parameters": {**LONG, "factor": 4.0}}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 10,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": PLAIN, "full_attention": LONG},
        },
    ),
}
STEPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"max_position_embeddings": SWITCH, "rope_parameters": DYNAMIC}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 10,
            "max_position_embeddings": SWITCH,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": PLAIN, "full_attention": DYNAMIC},
        },
    ),
}


def make(kind: str, settings: dict[str, Any]) -> Any:
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=WIDTH,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **{"max_position_embeddings": 256, **copy.deepcopy(settings)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


class Alone:
    """A model in transformers, which reads one sequence at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def uncached(self, token_ids: list[int]) -> torch.Tensor:
        """The logits after the last token, from a forward of the whole sequence."""
        with torch.inference_mode():
            fresh = copy.deepcopy(self.model)
            return fresh(torch.tensor([token_ids]), use_cache=False).logits[0, -1]

    def cached(self, prompt: list[int], tail: list[int]) -> torch.Tensor:
        """The logits after the prompt and after each token of the tail, which come one by one."""
        with torch.inference_mode():
            fresh = copy.deepcopy(self.model)
            cache = transformers.DynamicCache(config=fresh.config)
            found = []
            for ids in (prompt, *([token] for token in tail)):
                output = fresh(torch.tensor([ids]), past_key_values=cache, use_cache=True)
                found.append(output.logits[0, -1])
            return torch.stack(found)


def draw(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, WIDTH, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module", params=MODELS)
def longrope(request: pytest.FixtureRequest) -> tuple[TransformersBackend, Alone]:
    model = make(*MODELS[request.param])
    alone = Alone(copy.deepcopy(model))
    return TransformersBackend(model, name=request.param), alone


@pytest.fixture(scope="module", params=STEPPED)
def stepped(request: pytest.FixtureRequest) -> tuple[TransformersBackend, Alone]:
    model = make(*STEPPED[request.param])
    alone = Alone(copy.deepcopy(model))
    return TransformersBackend(model, name=request.param), alone


def check_rows(logits: torch.Tensor, rows: list[list[int]], alone: Alone) -> None:
    expected = torch.stack([alone.uncached(row) for row in rows])
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_a_long_prompt_does_not_change_its_short_neighbours(longrope):
    backend, alone = longrope
    prompts = draw(3, 50, SWITCH, SWITCH + 1)
    check_rows(backend.prefill(prompts).logits, prompts, alone)


def test_prompts_read_in_pieces_are_read_as_whole_ones(longrope, monkeypatch):
    """The first piece used to be read as a short prompt."""
    backend, alone = longrope
    monkeypatch.setattr(backend_module, "PREFILL_TOKENS", 32)
    prompts = draw(70, 20)
    state, logits = backend.prefill(prompts)
    check_rows(logits, prompts, alone)
    token_ids = torch.tensor(draw(1, 1, seed=5))
    again = backend.extend(state, token_ids)[:, -1]
    check_rows(again, [p + t for p, t in zip(prompts, token_ids.tolist(), strict=True)], alone)


def test_a_row_that_passes_the_switch_is_read_again(longrope):
    """Rows pass one after another, while one stays short and one was long from the start."""
    backend, alone = longrope
    prompts = draw(SWITCH - 2, SWITCH - 4, 5, 40)
    rows = [list(prompt) for prompt in prompts]
    state, _ = backend.prefill(prompts)
    for step in range(6):
        new = [ids[0] for ids in draw(1, 1, 1, 1, seed=step)]
        logits = backend.decode(state, torch.tensor(new))
        for row, token in zip(rows, new, strict=True):
            row.append(token)
        check_rows(logits, rows, alone)


def test_a_block_is_split_where_rows_pass_the_switch(longrope):
    backend, alone = longrope
    prompts, tails = draw(SWITCH - 2, SWITCH - 4, 5, 40), draw(6, 6, 6, 6, seed=3)
    state, _ = backend.prefill(prompts)
    logits = backend.extend(state, torch.tensor(tails))
    for num_new in range(1, 7):
        rows = [p + tail[:num_new] for p, tail in zip(prompts, tails, strict=True)]
        check_rows(logits[:, num_new - 1], rows, alone)


def test_a_rewind_across_the_switch_reads_the_row_again(longrope):
    backend, alone = longrope
    prompts, tails = draw(SWITCH - 2, SWITCH - 1, 5, 40), draw(6, 6, 6, 6, seed=3)
    state, _ = backend.prefill(prompts)
    backend.extend(state, torch.tensor(tails))
    backend.rewind(state, [5, 2, 6, 12])
    rows = [prompts[0] + tails[0][:1], prompts[1] + tails[1][:4], prompts[2], prompts[3][:34]]
    for step in range(3):
        new = [ids[0] for ids in draw(1, 1, 1, 1, seed=step)]
        logits = backend.decode(state, torch.tensor(new))
        rows = [[*row, token] for row, token in zip(rows, new, strict=True)]
        check_rows(logits, rows, alone)


def test_random_calls_across_the_switch_give_what_each_row_gives_alone(longrope):
    """Rows are selected, merged, copied and rewound, and pass the switch in both directions."""
    backend, alone = longrope
    generator = torch.Generator().manual_seed(0)

    def below(limit: int) -> int:
        return int(torch.randint(0, limit, (), generator=generator))

    def fresh() -> tuple[Any, list[list[int]]]:
        prompts = draw(20 + below(25), 20 + below(25), seed=below(1000))
        return backend.prefill(prompts).state, prompts

    state, rows = fresh()
    for _ in range(14):
        action = below(4)
        if action == 0:
            order = [below(len(rows)) for _ in range(1 + below(3))]
            state, rows = backend.select(state, order), [rows[place] for place in order]
        elif action == 1:
            other, more = fresh()
            both = rows + more
            order = torch.randperm(len(both), generator=generator).tolist()[:3]
            state, rows = backend.merge(state, other, order), [both[place] for place in order]
        elif action == 2:
            kept = backend.copy(state, list(range(len(rows))))
            backend.extend(state, torch.tensor(draw(*[9] * len(rows), seed=below(1000))))
            state = kept
        else:
            counts = [below(12) for _ in rows]
            backend.rewind(state, counts)
            rows = [row[: len(row) - n] for row, n in zip(rows, counts, strict=True)]
        tails = draw(*[1 + below(4)] * len(rows), seed=below(1000))
        logits = backend.extend(state, torch.tensor(tails))
        rows = [row + tail for row, tail in zip(rows, tails, strict=True)]
        check_rows(logits[:, -1], rows, alone)


def test_dynamic_ntk_reads_each_row_as_it_is_alone(stepped):
    backend, alone = stepped
    # Longer rows first: what they leave behind in the model must not reach later ones.
    backend.prefill(draw(90))
    prompts, tails = draw(3, 50, SWITCH - 2, 40), draw(6, 6, 6, 6, seed=3)
    expected = torch.stack([alone.cached(p, tail) for p, tail in zip(prompts, tails, strict=True)])
    state, logits = backend.prefill(prompts)
    torch.testing.assert_close(logits, expected[:, 0], **CLOSE)
    one = backend.decode(state, torch.tensor([tail[0] for tail in tails]))
    torch.testing.assert_close(one, expected[:, 1], **CLOSE)
    block = backend.extend(state, torch.tensor([tail[1:] for tail in tails]))
    torch.testing.assert_close(block, expected[:, 2:], **CLOSE)
    backend.rewind(state, [3, 1, 4, 5])
    state = backend.select(state, [3, 0])
    new = torch.tensor([tails[3][1], tails[0][3]])
    again = backend.decode(state, new)
    torch.testing.assert_close(again, torch.stack([expected[3, 2], expected[0, 4]]), **CLOSE)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_without_a_cache_each_row_counts_for_itself(kind):
    model = make(*(MODELS if kind == "longrope" else STEPPED)["llama"])
    alone = Alone(copy.deepcopy(model))
    backend = TransformersBackend(model, name="llama")
    short, long = draw(20, 50)
    token_ids = torch.tensor([[0] * 30 + short, long])
    mask = torch.tensor([[0] * 30 + [1] * 20, [1] * 50])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = backend.run(token_ids, attention_mask=mask, position_ids=positions, num_logits=1)
    check_rows(logits[:, -1], [short, long], alone)


def test_the_owner_of_a_model_finds_it_as_it_was():
    """A model may get a second backend, and its owner goes on calling it."""
    model = make(*MODELS["phi3"])
    alone = Alone(copy.deepcopy(model))
    (prompt,) = draw(50)
    names = [name for name, _ in model.named_parameters()]
    TransformersBackend(model, name="once")
    check_rows(TransformersBackend(model, name="twice").prefill([prompt]).logits, [prompt], alone)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[:, -1]
    check_rows(logits, [prompt], alone)
    assert [name for name, _ in model.named_parameters()] == names


def test_cuda_graphs_are_refused_by_name():
    with pytest.raises(UnsupportedModel, match="CUDA graph has the same"):
        TransformersBackend(
            make(*MODELS["phi3"]), name="phi", recorder=lambda forward: (forward, forward())
        )


def test_rotary_code_that_is_not_transformers_own_is_refused():
    model = make(*MODELS["llama"])
    model.model.rotary_emb.rope_type = None  # as in a model that brings its own code
    with pytest.raises(UnsupportedModel, match="longrope rotary embeddings"):
        TransformersBackend(model, name="foreign")
