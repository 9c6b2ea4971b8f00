"""A row's logits bit by bit, alone and beside others, on tiny random models of several kinds and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from proxytune.backends.exact import PIECE_TOKENS, ExactBackend
from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.errors import InvalidRequest, PromptTooLong, UnsupportedModel

WIDTH = 300
SHARED = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "windows": (
        "gemma3_text",
        {
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 96,
        },
    ),
    "experts": (
        "mixtral",
        {"num_local_experts": 4, "num_key_value_heads": 2, "intermediate_size": 96},
    ),
    "adapters": ("llama", {"num_key_value_heads": 2, "intermediate_size": 96}),
    "states": (
        "lfm2",
        {
            "layer_types": ["conv", "full_attention"],
            "num_key_value_heads": 2,
            "intermediate_size": 96,
        },
    ),
}
DTYPES = ("float32", "bfloat16", "float16")
LENGTHS = (1, 40, 2 * PIECE_TOKENS + 21, 5)
NUM_NEW = 6


def make(kind: str, dtype: str) -> ExactBackend:
    architecture, options = KINDS[kind]
    config = transformers.AutoConfig.for_model(
        architecture,
        vocab_size=WIDTH,
        max_position_embeddings=512,
        initializer_range=0.3,
        **SHARED,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        if kind == "adapters":
            lora = peft.LoraConfig(
                r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
            )
            model = peft.get_peft_model(model, lora, "one")
            model.add_adapter("other", lora)
    model = model.to(getattr(torch, dtype))
    adapters = ("one", "other") if kind == "adapters" else ()
    inner = TransformersBackend(model, name=kind, adapters=adapters, owns_model=True)
    return ExactBackend(inner)


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=KINDS)
def backend(request, dtype) -> ExactBackend:
    return make(request.param, dtype)


def texts(lengths: Sequence[int] = LENGTHS, *, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(WIDTH, (n,), generator=generator).tolist() for n in lengths]


def names(backend: ExactBackend) -> list[str | None]:
    """Return each row's adapter: two rows share one, so that adapters' products have several rows."""
    known = backend.capabilities.adapters
    return [None, "one", "other", "one"] if known else [None] * 4


def alone(
    backend: ExactBackend, prompt: list[int], new_ids: Sequence[int], adapter: str | None
) -> Tensor:
    """Return the logits after a prompt and after each new token, `[1 + num_new, vocab]`."""
    state, logits = backend.prefill([prompt], adapters=[adapter])
    steps = [logits]
    for token_id in new_ids:
        steps.append(backend.extend(state, torch.tensor([[token_id]]))[:, 0])
    return torch.cat(steps)


@pytest.fixture(scope="module")
def expected(backend) -> list[Tensor]:
    """What each text gives alone."""
    rows = zip(texts(), texts([NUM_NEW] * 4, seed=1), names(backend), strict=True)
    return [alone(backend, *row) for row in rows]


def new_ids(*rows: int) -> Tensor:
    return torch.tensor([texts([NUM_NEW] * 4, seed=1)[row] for row in rows])


def test_a_batch_gives_each_row_what_it_gets_alone(backend, expected):
    state, logits = backend.prefill(texts(), adapters=names(backend))
    steps = [logits]
    for step in range(NUM_NEW):
        steps.append(backend.extend(state, new_ids(0, 1, 2, 3)[:, step : step + 1])[:, 0])
    for row, own in enumerate(expected):
        assert torch.equal(torch.stack([logits[row] for logits in steps]), own)


def test_rows_that_join_and_leave_change_no_other(backend, expected):
    prompts, adapters = texts(), names(backend)
    first, _ = backend.prefill(prompts[:2], adapters=adapters[:2])
    backend.extend(first, new_ids(0, 1)[:, :2])
    second, _ = backend.prefill(prompts[2:], adapters=adapters[2:])
    backend.extend(second, new_ids(2, 3)[:, :2])
    joined = backend.merge(first, second, [1, 2, 0, 3])
    logits = backend.extend(joined, new_ids(1, 2, 0, 3)[:, 2:4])
    left = backend.select(joined, [1, 0])
    rest = backend.extend(left, new_ids(2, 1)[:, 4:])
    for place, row in enumerate((1, 2, 0, 3)):
        assert torch.equal(logits[place], expected[row][3:5])
    for place, row in enumerate((2, 1)):
        assert torch.equal(rest[place], expected[row][5:])


def test_a_repeated_row_goes_on_as_the_row_itself(backend, expected):
    state, _ = backend.prefill(texts()[1:3], adapters=names(backend)[1:3])
    backend.extend(state, new_ids(1, 2)[:, :3])
    twice = backend.select(state, [1, 0, 1])
    backend.extend(twice[:1], torch.tensor([[7]]))  # the two copies are apart
    logits = backend.extend(twice[1:], new_ids(1, 2)[:, 3:])
    for place, row in enumerate((1, 2)):
        assert torch.equal(logits[place], expected[row][4:])


def test_tokens_that_were_taken_back_leave_no_trace(backend, expected):
    if not backend.capabilities.can_rewind:
        pytest.skip("a state cannot forget")
    state, _ = backend.prefill(texts(), adapters=names(backend))
    wrong = torch.randint(WIDTH, (4, 50), generator=torch.Generator().manual_seed(2))
    logits = backend.extend(state, torch.cat((new_ids(0, 1, 2, 3)[:, :2], wrong), dim=1))
    backend.rewind(state, [50, 50, 50, 50])
    backend.extend(state, wrong[:, :5])
    backend.rewind(state, [6, 5, 6, 5])
    fresh = torch.stack([new_ids(row)[0, 1 if row in (0, 2) else 2] for row in range(4)])
    after = backend.extend(state, fresh[:, None])
    for row, own in enumerate(expected):
        assert torch.equal(logits[row, :2], own[1:3])
        assert torch.equal(after[row, 0], own[2 if row in (0, 2) else 3])


def test_a_prompt_goes_on_from_the_whole_pieces_of_an_earlier_text(backend, expected):
    """The pieces stay; what was chosen before and is a prompt's now is read as a prompt."""
    if not backend.capabilities.can_rewind:
        pytest.skip("a state cannot forget")
    prompts, adapters = texts(), names(backend)
    for num_shared, num_kept in (
        (PIECE_TOKENS - 1, 0),
        (PIECE_TOKENS + 9, PIECE_TOKENS),
        (2 * PIECE_TOKENS + 20, 2 * PIECE_TOKENS),
    ):
        earlier = [*prompts[2][:num_shared], *texts([30], seed=3)[0]]
        state, _ = backend.prefill([prompts[1], earlier], adapters=adapters[1:3])
        backend.extend(state, new_ids(1, 2))
        copied = backend.copy(state, [1])
        resumed = backend.resume(
            copied,
            [prompts[2]],
            num_held=[len(earlier) + NUM_NEW],
            num_shared=[num_shared],
        )
        assert resumed.num_kept == [num_kept]
        rest = backend.extend(resumed.state, new_ids(2))
        assert torch.equal(torch.cat((resumed.logits, rest[0])), expected[2])


def test_what_was_chosen_is_never_kept_as_a_part_of_a_prompt(backend, expected):
    if not backend.capabilities.can_rewind:
        pytest.skip("a state cannot forget")
    (prompt,), (adapter,) = texts()[2:3], names(backend)[2:3]
    short = prompt[:3]
    state, _ = backend.prefill([short], adapters=[adapter])
    backend.extend(state, torch.tensor([prompt[3:]]))
    held = [len(prompt)]
    resumed = backend.resume(state, [prompt], num_held=held, num_shared=[len(prompt) - 1])
    assert resumed.num_kept == [0]
    assert torch.equal(resumed.logits[0], expected[2][0])


def test_heads_of_an_odd_size_get_the_same_bits_in_every_buffer():
    """Where a head's first key lay followed from the size of the buffer, and kernels add otherwise there."""
    config = transformers.LlamaConfig(
        vocab_size=WIDTH,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=6,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    backend = ExactBackend(TransformersBackend(model, name="six", owns_model=True))
    (prompt,) = texts([40])
    state, _ = backend.prefill([prompt])
    for token_id in texts([5], seed=1)[0]:
        copied = backend.copy(state, [0])  # its buffer is made anew, larger by one each time
        token = torch.tensor([[token_id]])
        assert torch.equal(backend.extend(copied, token), backend.extend(state, token))


def test_it_refuses_what_the_model_inside_refuses():
    backend = make("windows", "float32")
    with pytest.raises(InvalidRequest, match="empty prompt"):
        backend.prefill([[1], []])
    with pytest.raises(PromptTooLong, match="512 tokens"):
        backend.prefill([[1] * 513])
    with pytest.raises(InvalidRequest, match="no adapter 'x'"):
        backend.prefill([[1]], adapters=["x"])
    state, _ = backend.prefill([[1] * 511, [2]])
    with pytest.raises(InvalidRequest, match=r"\[2, num_tokens\]"):
        backend.extend(state, torch.tensor([[1]]))
    with pytest.raises(PromptTooLong):
        backend.extend(state, torch.tensor([[1, 1], [1, 1]]))
    with pytest.raises(InvalidRequest, match="cannot rewind"):
        backend.rewind(state, [1, 3])
    with pytest.raises(UnsupportedModel, match="taken back"):
        stateful = make("states", "float32")
        stateful.rewind(stateful.prefill([[1, 2]]).state, [1])
