"""The transformers backend on small random models of several architectures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.checkpoints.adapter import AdapterFiles, find_adapter
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.errors import (
    AdapterMismatch,
    BackendError,
    CorruptModel,
    InvalidRequest,
    MissingExtra,
    PromptTooLong,
    UnsupportedModel,
)
from proxytune.recipe.spec import ModelSpec
from tests.support.tiny import tiny_adapter, tiny_config, tiny_model

# Kernels for one and for many tokens round differently; logits here are of the order of 10.
CLOSE = {"atol": 3e-5, "rtol": 1e-4}

WIDTH = 64
ARCHITECTURES = ("llama", "qwen2", "gpt2")
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5, "num_key_value_heads": 2, "intermediate_size": 48},
    "qwen2": {
        "sliding_window": 5,
        "use_sliding_window": True,
        "max_window_layers": 1,  # the first layer sees all tokens, the second five
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    },
    "gemma3_text": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
    },
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "llama4_text": {  # attends in chunks of eight tokens, and to all with a temperature that grows
        "attention_chunk_size": 8,
        "no_rope_layers": [1, 0],
        "attn_scale": 0.5,
        "floor_scale": 4,
        "num_local_experts": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "intermediate_size_mlp": 48,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 4},
    "mamba": {},
}
STATEFUL = {"lfm2", "mamba2", "mamba"}


def random_model(config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def make(architecture: str, *, windowed: bool = False) -> TransformersBackend:
    if architecture in ARCHITECTURES and not windowed:
        config = tiny_config(architecture, width=WIDTH)  # type: ignore[arg-type]
    else:
        config = transformers.AutoConfig.for_model(
            architecture,
            vocab_size=WIDTH,
            hidden_size=32,
            num_hidden_layers=2,
            initializer_range=0.3,
            **({} if "mamba" in architecture else {"num_attention_heads": 4}),
            **OTHERS[architecture],
        )
    return TransformersBackend(random_model(config), name=architecture)


@pytest.fixture(scope="module", params=[*ARCHITECTURES, *(f"other-{name}" for name in OTHERS)])
def backend(request: pytest.FixtureRequest) -> TransformersBackend:
    name = request.param.removeprefix("other-")
    return make(name, windowed=name != request.param)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def attention(request: pytest.FixtureRequest) -> TransformersBackend:
    return make(request.param)


def draw(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, WIDTH, (n,), generator=generator).tolist() for n in lengths]


def uncached(backend: TransformersBackend, token_ids: list[int]) -> torch.Tensor:
    """Logits after every token, from one forward without cache, mask or padding."""
    with torch.inference_mode():
        return backend.model(torch.tensor([token_ids]), use_cache=False).logits[0]


PROMPTS = draw(3, 11, 7)
TAILS = draw(9, 9, 9, seed=2)
WHOLE = [prompt + tail for prompt, tail in zip(PROMPTS, TAILS, strict=True)]


def test_ragged_prompts_give_the_logits_each_gives_alone(backend):
    _, logits = backend.prefill(PROMPTS)
    alone = torch.stack([uncached(backend, prompt)[-1] for prompt in PROMPTS])
    torch.testing.assert_close(logits, alone, **CLOSE)


def test_cached_tokens_give_the_logits_of_an_uncached_forward(backend):
    """With windows of five tokens, prompt and new tokens together are longer than the window."""
    state, _ = backend.prefill(PROMPTS)
    first = backend.extend(state, torch.tensor([tail[:4] for tail in TAILS]))
    second = backend.decode(state, torch.tensor([tail[4] for tail in TAILS]))
    for row, (prompt, whole) in enumerate(zip(PROMPTS, WHOLE, strict=True)):
        expected = uncached(backend, whole)[len(prompt) :]
        torch.testing.assert_close(first[row], expected[:4], **CLOSE)
        torch.testing.assert_close(second[row], expected[4], **CLOSE)


def test_a_batch_gives_what_its_rows_give_one_by_one(backend):
    state, together = backend.prefill(PROMPTS)
    extended = backend.extend(state, torch.tensor([tail[:3] for tail in TAILS]))
    for row, prompt in enumerate(PROMPTS):
        alone, logits = backend.prefill([prompt])
        torch.testing.assert_close(together[row], logits[0], **CLOSE)
        torch.testing.assert_close(
            extended[row], backend.extend(alone, torch.tensor([TAILS[row][:3]]))[0], **CLOSE
        )


@pytest.mark.parametrize("counts", [(2, 2, 2), (0, 3, 1), (4, 0, 4), (7, 15, 11), (5, 0, 0)])
def test_after_a_rewind_the_forgotten_tokens_leave_no_trace(backend, counts):
    if not backend.capabilities.can_rewind:
        return  # the next test but one says what these do
    state, _ = backend.prefill(PROMPTS)
    backend.extend(state, torch.tensor([tail[:4] for tail in TAILS]))
    backend.rewind(state, counts)
    lengths = [len(prompt) + 4 - n for prompt, n in zip(PROMPTS, counts, strict=True)]
    new = draw(5, 5, 5, seed=3)
    logits = backend.extend(state, torch.tensor(new))
    for row, length in enumerate(lengths):
        expected = uncached(backend, WHOLE[row][:length] + new[row])[length:]
        torch.testing.assert_close(logits[row], expected, **CLOSE)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "gemma3_text", "bloom", "gpt_neo"])
def test_where_distances_between_slots_count_a_rewind_leaves_no_gaps(architecture):
    backend = make(architecture, windowed=True)
    state, _ = backend.prefill(PROMPTS)
    backend.extend(state, torch.tensor([tail[:4] for tail in TAILS]))
    backend.rewind(state, [0, 3, 1])
    assert state.lengths == [7, 12, 10] and state.num_slots == 12
    backend.rewind(state, [2, 2, 2])
    assert state.num_slots == 10
    backend.rewind(state, [0, 6, 0])
    assert state.lengths == [5, 4, 8] and state.num_slots == 8


def test_a_rewind_leaves_keys_where_they_are_until_gaps_are_many(attention):
    state, _ = attention.prefill(draw(20, 20))
    cache = state.cache
    attention.extend(state, torch.tensor(draw(8, 8)))
    place = cache.layers[0].keys.data_ptr()
    compacted = 0
    for seed in range(28):
        before = state.num_slots
        attention.extend(state, torch.tensor(draw(4, 4, seed=seed)))
        attention.rewind(state, [3, 0] if seed % 2 else [0, 3])
        compacted += state.num_slots < before
        assert state.num_slots <= max(state.lengths) + max(state.lengths) // 8 + 16
        assert cache.get_seq_length() == state.num_slots
        if not compacted and not seed:
            assert cache.layers[0].keys.data_ptr() == place
    assert 1 <= compacted <= 4


def test_rows_with_gaps_can_be_selected_and_rewound_across_them(attention):
    """Row 0 takes back tokens on both sides of a gap."""
    state, _ = attention.prefill(PROMPTS)
    attention.extend(state, torch.tensor([tail[:4] for tail in TAILS]))
    attention.rewind(state, [3, 0, 1])
    attention.extend(state, torch.tensor([[1, 2], [3, 4], [5, 6]]))
    attention.rewind(state, [3, 0, 0])
    state = attention.select(state, [2, 0])
    new = draw(3, 3, seed=8)
    logits = attention.extend(state, torch.tensor(new))
    held = [PROMPTS[2] + TAILS[2][:3] + [5, 6], PROMPTS[0]]
    for row, token_ids in enumerate(held):
        expected = uncached(attention, token_ids + new[row])[len(token_ids) :]
        torch.testing.assert_close(logits[row], expected, **CLOSE)
    assert state.lengths == [len(held[0]) + 3, len(held[1]) + 3]


def test_selecting_all_rows_in_their_order_copies_nothing(attention):
    state, _ = attention.prefill(PROMPTS)
    place = state.cache.layers[0].keys.data_ptr()
    state = attention.select(state, [0, 1, 2])
    assert state.cache.layers[0].keys.data_ptr() == place


def test_long_prompts_in_chunks_give_the_logits_of_one_pass(backend, monkeypatch):
    """Prompts of 50, 3 and 33 tokens in chunks of 16; a chunk holds nothing of the short one."""
    prompts = draw(50, 3, 33, seed=9)
    new = torch.tensor(draw(2, 2, 2, seed=10))
    state, whole = backend.prefill(prompts)
    expected = backend.extend(state, new)
    sizes = []
    run = backend.run

    def counted(token_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(token_ids.shape[1])
        return run(token_ids, **options)

    monkeypatch.setattr("proxytune.backends.transformers.backend.PREFILL_TOKENS", 48)
    monkeypatch.setattr(backend, "run", counted)
    state, logits = backend.prefill(prompts)
    # A model with a running state may not go on from it with several tokens.
    assert sizes == ([16, 16, 16, 2] if backend.capabilities.can_rewind else [50])
    torch.testing.assert_close(logits, whole, **CLOSE)
    torch.testing.assert_close(backend.extend(state, new), expected, **CLOSE)


def test_rewinding_again_and_again_keeps_rows_exact(attention):
    generator = torch.Generator().manual_seed(5)
    state, _ = attention.prefill(PROMPTS)
    held = [list(prompt) for prompt in PROMPTS]
    for _ in range(6):
        new = torch.randint(0, WIDTH, (3, 4), generator=generator)
        logits = attention.extend(state, new)
        held = [row + tail for row, tail in zip(held, new.tolist(), strict=True)]
        for row in range(3):
            torch.testing.assert_close(logits[row], uncached(attention, held[row])[-4:], **CLOSE)
        counts = torch.randint(0, 4, (3,), generator=generator).tolist()
        attention.rewind(state, counts)
        held = [row[: len(row) - n] for row, n in zip(held, counts, strict=True)]


def test_selected_rows_go_on_as_if_alone_and_may_repeat(backend):
    state, _ = backend.prefill(PROMPTS)
    state = backend.select(state, [2, 0, 2])
    new = draw(2, 2, 2, seed=4)
    logits = backend.extend(state, torch.tensor(new))
    for place, row in enumerate([2, 0, 2]):
        expected = uncached(backend, PROMPTS[row] + new[place])[len(PROMPTS[row]) :]
        torch.testing.assert_close(logits[place], expected, **CLOSE)


def test_selecting_short_rows_drops_the_slots_of_the_long_one(attention):
    state, _ = attention.prefill(PROMPTS)
    assert attention.select(state, [0, 2]).num_slots == 7


@pytest.mark.parametrize("is_rewound", (False, True))
@pytest.mark.parametrize("longer_first", (False, True))
def test_rows_of_two_batches_go_on_as_if_alone_in_any_order(backend, longer_first, is_rewound):
    if not backend.capabilities.can_merge:
        pytest.skip(f"{backend.name} has a running state, which cannot be merged")
    firsts, seconds = ([1, 2], [0]) if longer_first else ([0, 2], [1])
    states = []
    for rows in (firsts, seconds):
        state, _ = backend.prefill([PROMPTS[row] for row in rows])
        backend.extend(state, torch.tensor([TAILS[row][:4] for row in rows]))
        if is_rewound:  # by another number in each row, which leaves gaps
            backend.extend(state, torch.tensor([[5, 6, 7]] * len(rows)))
            backend.rewind(state, [3] * len(rows))
            backend.extend(state, torch.tensor([[8, 9] for _ in rows]))
            backend.rewind(state, [2] * len(rows))
            backend.extend(state, torch.tensor([TAILS[row][4:6] for row in rows]))
            backend.rewind(state, [1 + place for place in range(len(rows))])
            # Row by row, so that all hold four tokens of their tails and no more.
            backend.rewind(state, [1 - place for place in range(len(rows))])
        states.append(state)
    merged = backend.merge(*states, [2, 0, 1])
    order = [seconds[0], *firsts]
    # The second batch, then the first one; afterwards one row leaves again.
    found = backend.extend(merged, torch.tensor([TAILS[row][4:6] for row in order]))
    for place, row in enumerate(order):
        stop = len(PROMPTS[row]) + 4
        torch.testing.assert_close(
            found[place], uncached(backend, WHOLE[row])[stop : stop + 2], **CLOSE
        )
    backend.rewind(merged, [0, 1, 2])
    merged = backend.select(merged, [0, 2])
    kept = [(order[0], 6), (order[2], 4)]
    found = backend.extend(
        merged, torch.tensor([TAILS[row][start : start + 2] for row, start in kept])
    )
    for place, (row, start) in enumerate(kept):
        stop = len(PROMPTS[row]) + start
        torch.testing.assert_close(
            found[place], uncached(backend, WHOLE[row])[stop : stop + 2], **CLOSE
        )


def test_copied_rows_go_on_by_themselves(backend):
    if not backend.capabilities.can_merge:
        pytest.skip(f"{backend.name} has a running state, which cannot be copied")
    state, _ = backend.prefill(PROMPTS)
    backend.extend(state, torch.tensor([tail[:5] for tail in TAILS]))
    backend.rewind(state, [0, 2, 1])
    copied = backend.copy(state, [2, 0])
    backend.extend(state, torch.tensor([[9, 8], [7, 6], [5, 4]]))  # what the copy must not see
    starts = {2: 4, 0: 5}
    found = backend.extend(
        copied, torch.tensor([TAILS[row][start : start + 2] for row, start in starts.items()])
    )
    for place, (row, start) in enumerate(starts.items()):
        stop = len(PROMPTS[row]) + start
        torch.testing.assert_close(
            found[place], uncached(backend, WHOLE[row])[stop : stop + 2], **CLOSE
        )


def test_models_with_a_running_state_refuse_to_merge():
    backend = make("mamba")
    one, two = (backend.prefill([PROMPTS[0]]).state for _ in range(2))
    with pytest.raises(UnsupportedModel, match="mamba"):
        backend.merge(one, two, [0, 1])


def test_models_with_a_running_state_refuse_to_rewind():
    for name in STATEFUL:
        backend = make(name, windowed=True)
        assert not backend.capabilities.can_rewind
        state, _ = backend.prefill(PROMPTS)
        with pytest.raises(UnsupportedModel, match="taken back"):
            backend.rewind(state, [1, 1, 1])


def test_rewinding_more_than_a_row_holds_is_refused(attention):
    state, _ = attention.prefill(PROMPTS)
    with pytest.raises(InvalidRequest, match="cannot rewind"):
        attention.rewind(state, [4, 0, 0])


def test_a_prompt_beyond_the_context_names_model_limit_and_length():
    backend = TransformersBackend(
        random_model(tiny_config("gpt2", width=WIDTH, max_context=8)), name="small/gpt2"
    )
    assert backend.capabilities.max_context == 8
    with pytest.raises(PromptTooLong, match=r"small/gpt2 can hold 8 tokens.*hold 9"):
        backend.prefill(draw(3, 9))
    state, _ = backend.prefill(draw(3, 7))
    backend.decode(state, torch.tensor([1, 1]))
    with pytest.raises(PromptTooLong, match=r"small/gpt2 can hold 8"):
        backend.decode(state, torch.tensor([1, 1]))


@pytest.mark.parametrize("wrong", [-1, WIDTH])
def test_a_token_id_the_model_does_not_have_is_refused(attention, wrong):
    with pytest.raises(InvalidRequest, match=f"no token {wrong}"):
        attention.prefill([[1, wrong]])
    state, _ = attention.prefill([[1]])
    with pytest.raises(InvalidRequest, match=f"no token {wrong}"):
        attention.decode(state, torch.tensor([wrong]))


def test_an_empty_prompt_is_refused(attention):
    with pytest.raises(InvalidRequest, match="empty prompt"):
        attention.prefill([[1], []])


def test_a_failure_inside_the_model_is_a_backend_error_with_its_cause():
    backend = make("llama")
    backend.model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(BackendError, match="llama failed: ZeroDivisionError") as caught:
        backend.prefill([[1]])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# Loading from files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ARCHITECTURES)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("small") / request.param, request.param, seed=3)


def adapters_of(small: Path, **seeds: int) -> dict[str, AdapterFiles]:
    for name, seed in seeds.items():
        tiny_adapter(small, small.parent / name, seed=seed)
    return {name: find_adapter(str(small.parent / name), root=small) for name in seeds}


def load(
    directory: Path, adapters: dict[str, AdapterFiles] | None = None, **options: Any
) -> TransformersBackend:
    spec = ModelSpec(model=str(directory), **{"device": "cpu", **options})
    checkpoint = find_checkpoint(str(directory), root=directory, allow_pickle=spec.allow_pickle)
    return TransformersBackend.load(checkpoint, spec, adapters)


def test_a_loaded_model_is_the_one_that_was_saved(small):
    backend = load(small)
    reference = transformers.AutoModelForCausalLM.from_pretrained(small)
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPTS[1]])).logits[:, -1]
    torch.testing.assert_close(backend.prefill([PROMPTS[1]]).logits, expected, **CLOSE)
    assert backend.vocab_size == reference.config.vocab_size
    assert not any(parameter.requires_grad for parameter in backend.model.parameters())


def test_rows_with_different_adapters_share_one_forward(small):
    """Expert and anti-expert as two rows of one model equal two models loaded apart."""
    from peft import PeftModel

    both = load(small, adapters_of(small, **{"v1.good": 1, "bad": 2}))
    assert both.capabilities.adapters == ("v1.good", "bad")
    rows = ["v1.good", None, "bad", "v1.good"]
    prompts = [*PROMPTS, PROMPTS[0]]
    state, first = both.prefill(prompts, adapters=rows)
    state = both.select(state, [3, 1, 2, 0])
    new = torch.tensor(draw(2, 2, 2, 2, seed=6))
    logits = both.extend(state, new)
    for place, row in enumerate([3, 1, 2, 0]):
        model = transformers.AutoModelForCausalLM.from_pretrained(small)
        if rows[row] is not None:
            model = PeftModel.from_pretrained(model, small.parent / rows[row])
        with torch.inference_mode():
            whole = model.eval()(torch.tensor([prompts[row] + new[place].tolist()])).logits[0]
        torch.testing.assert_close(first[row], whole[len(prompts[row]) - 1], **CLOSE)
        torch.testing.assert_close(logits[place], whole[len(prompts[row]) :], **CLOSE)


def test_plain_rows_are_bit_for_bit_those_of_the_model_without_adapters(small):
    plain = load(small).prefill(PROMPTS).logits
    adapted = load(small, adapters_of(small, good=1))
    assert torch.equal(adapted.prefill(PROMPTS).logits, plain)
    assert torch.equal(adapted.prefill(PROMPTS, adapters=[None] * 3).logits, plain)
    assert not torch.allclose(adapted.prefill(PROMPTS, adapters=["good"] * 3).logits, plain)


def test_an_unknown_adapter_lists_the_known_ones(small):
    backend = load(small, adapters_of(small, good=1, bad=2))
    with pytest.raises(InvalidRequest, match="no adapter 'ugly'; it has: good, bad"):
        backend.prefill([[1]], adapters=["ugly"])


def test_a_peft_model_can_be_given_as_it_is(small):
    from peft import PeftModel

    adapters_of(small, good=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(small)
    peft_model = PeftModel.from_pretrained(model, small.parent / "good", adapter_name="good")
    backend = TransformersBackend(peft_model, name="small", adapters=["good"])
    loaded = load(small, adapters_of(small, good=1))
    rows = ["good", None, "good"]
    torch.testing.assert_close(
        backend.prefill(PROMPTS, adapters=rows).logits,
        loaded.prefill(PROMPTS, adapters=rows).logits,
    )


def test_large_layers_are_packed_at_the_first_forward_and_not_before(small, monkeypatch):
    from proxytune.backends.transformers import linear

    adapters = adapters_of(small, good=1)
    rows = ["good", None, "good"]
    expected = load(small, adapters).prefill(PROMPTS, adapters=rows).logits
    monkeypatch.setattr(linear, "MIN_PACKED_SIDE", 16)

    def num_packed(backend: TransformersBackend) -> int:
        return sum(isinstance(m, linear.PackedLinear) for m in backend.model.modules())

    backend = load(small, adapters)
    assert num_packed(backend) == 0
    logits = backend.prefill(PROMPTS, adapters=rows).logits
    torch.testing.assert_close(logits, expected, **CLOSE)
    if backend.name.endswith("gpt2"):  # its layers are no linear layers of torch, its head is tied
        return
    assert num_packed(backend) > 0 or not linear._can_pack()
    handed_over = TransformersBackend(
        transformers.AutoModelForCausalLM.from_pretrained(small), name="small"
    )
    handed_over.prefill(PROMPTS)
    assert num_packed(handed_over) == 0


def edit_adapter(source: Path, target: Path, **changes: Any) -> AdapterFiles:
    shutil.copytree(source, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return find_adapter(str(target), root=target)


def test_an_adapter_of_another_model_is_a_mismatch(tmp_path):
    small = tiny_model(tmp_path / "small")
    other = tiny_model(tmp_path / "other", hidden_size=32)
    deep = tiny_model(tmp_path / "deep", num_layers=3)
    for trained_on, why in (
        (other, "has 16 inputs instead of 32"),
        (deep, r"model\.layers\.2\.self_attn\.q_proj is not there"),
    ):
        tiny_adapter(trained_on, tmp_path / f"of-{trained_on.name}")
        files = find_adapter(str(tmp_path / f"of-{trained_on.name}"), root=tmp_path)
        with pytest.raises(AdapterMismatch, match=rf"of-{trained_on.name} .*does not fit.*{why}"):
            load(small, {"a": files})


def test_an_adapter_that_lacks_layers_is_a_mismatch(tmp_path):
    small = tiny_model(tmp_path / "small", num_layers=1)
    deep = tiny_model(tmp_path / "deep", num_layers=2)
    tiny_adapter(small, tmp_path / "shallow")
    with pytest.raises(AdapterMismatch, match="lacks weights"):
        load(deep, {"a": find_adapter(str(tmp_path / "shallow"), root=tmp_path)})


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"use_dora": True}, CorruptModel, "use_dora True, and its weights"),
        ({"modules_to_save": ["lm_head"]}, AdapterMismatch, "the layer lm_head, and it lacks"),
        (
            {"trainable_token_indices": [1]},
            AdapterMismatch,
            "the tokens of trainable_token_indices",
        ),
        (
            {"init_lora_weights": "pissa"},
            UnsupportedModel,
            "'pissa', which changes the weights under",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_whose_config_asks_for_more_than_its_weights_is_refused(
    tmp_path, changes, error, why
):
    small = tiny_model(tmp_path / "small")
    tiny_adapter(small, tmp_path / "plain")
    files = edit_adapter(tmp_path / "plain", tmp_path / "more", **changes)
    with pytest.raises(error, match=why):
        load(small, {"a": files})


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "(.+)+q_proj|(a|b|.)+(c|.)+(.|.)+X"},
        {"alpha_pattern": {"(.+)+q_proj|(a|b|.)+(c|.)+(.|.)+X": 2}},
        {"rank_pattern": {"(.+)+q_proj|(a|b|.)+(c|.)+(.|.)+X": 2}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_adapter_with_a_pattern_that_takes_forever_is_refused_in_time(tmp_path, changes):
    """PEFT matched it against every layer's name, and loading never ended."""
    small = tiny_model(tmp_path / "small")
    tiny_adapter(small, tmp_path / "plain")
    files = edit_adapter(tmp_path / "plain", tmp_path / "slow", **changes)
    with pytest.raises(CorruptModel, match="takes too long to match"):
        load(small, {"a": files})


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*layers\.\d\.self_attn\.(q|v)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"alpha_pattern": {"q_proj": 4, r"layers\.[01]\..*v_proj": 4}, "lora_alpha": 1},
        {"rank_pattern": {"(q|v)_proj": 2}, "r": 77},
        {"exclude_modules": ["k_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"megatron_core": "os", "loftq_config": {"a": 1}, "unknown_key": {"b": 2}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_ways_to_name_the_same_layers_give_the_same_logits(tmp_path, changes):
    small = tiny_model(tmp_path / "small")
    tiny_adapter(small, tmp_path / "plain")
    plain = find_adapter(str(tmp_path / "plain"), root=tmp_path)
    other = edit_adapter(tmp_path / "plain", tmp_path / "other", **changes)
    backend = load(small, {"plain": plain, "other": other})
    _, logits = backend.prefill([PROMPTS[0]] * 3, adapters=["plain", "other", None])
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_alphas_by_pattern_scale_their_layers(tmp_path):
    """Twice the alpha of one layer is what PEFT computes for it."""
    small = tiny_model(tmp_path / "small")
    tiny_adapter(small, tmp_path / "plain")
    changes = {"alpha_pattern": {r"layers\.1\..*v_proj": 8, "model.layers.0.self_attn.q_proj": 0.5}}
    files = edit_adapter(tmp_path / "plain", tmp_path / "other", **changes)
    _, logits = load(small, {"a": files}).prefill([PROMPTS[0]], adapters=["a"])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(small)
    reference = peft.PeftModel.from_pretrained(model, str(tmp_path / "other"))
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPTS[0]])).logits[:, -1]
    torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("content", [b"not a pickle", b"\x80\x04K\x01.", b""])
def test_pickled_adapter_weights_that_cannot_be_read_are_corrupt(tmp_path, content):
    small = tiny_model(tmp_path / "small")
    directory = tiny_adapter(small, tmp_path / "adapter")
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.bin").write_bytes(content)
    files = find_adapter(str(directory), root=tmp_path, allow_pickle=True)
    with pytest.raises(CorruptModel, match="cannot be read"):
        load(small, {"a": files})


def test_dtype_and_device_are_those_of_the_spec(tmp_path):
    directory = tiny_model(tmp_path / "small", dtype="bfloat16")
    assert load(directory).model.dtype == torch.float32  # the default on a CPU
    assert load(directory, dtype="auto").model.dtype == torch.bfloat16
    half = load(directory, dtype="bfloat16", attn_implementation="eager")
    assert half.model.config._attn_implementation == "eager"
    state, logits = half.prefill(PROMPTS)
    assert logits.dtype == torch.bfloat16 and logits.shape == (3, half.vocab_size)
    assert half.extend(state, torch.tensor([[1], [2], [3]])).shape == (3, 1, half.vocab_size)


def test_weights_that_lack_a_tensor_are_corrupt(tmp_path):
    from safetensors.torch import load_file, save_file

    directory = tiny_model(tmp_path / "small")
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptModel, match=r"lack 1 weights.*layers\.1\.mlp\.up_proj"):
        load(directory)


def test_weights_of_another_shape_than_the_config_says_are_corrupt(tmp_path):
    directory = tiny_model(tmp_path / "small")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))
    with pytest.raises(CorruptModel, match="do not fit its config"):
        load(directory)


def test_pickled_weights_load_only_when_asked_for(tmp_path):
    directory = tiny_model(tmp_path / "small")
    expected = load(directory).prefill(PROMPTS).logits
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    torch.testing.assert_close(load(directory, allow_pickle=True).prefill(PROMPTS).logits, expected)


def test_a_quantisation_library_that_is_missing_gives_its_install_line(tmp_path, monkeypatch):
    directory = tiny_model(tmp_path / "small")
    for method in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, method, None)
        with pytest.raises(MissingExtra, match=r"pip install .*\[quantize\]'"):
            load(directory, quantization={"method": method})


def test_an_unknown_quantisation_is_refused_by_name(tmp_path):
    directory = tiny_model(tmp_path / "small")
    with pytest.raises(UnsupportedModel, match="'gptq'"):
        load(directory, quantization={"method": "gptq"})


def test_a_misspelt_quantisation_option_is_refused(tmp_path, monkeypatch):
    directory = tiny_model(tmp_path / "small")
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys)
    with pytest.raises(UnsupportedModel, match="load_in_4bits"):
        load(directory, quantization={"method": "bitsandbytes", "load_in_4bits": True})


def test_loading_prints_nothing_and_puts_logging_back(tmp_path):
    small = tiny_model(tmp_path / "small")
    tiny_adapter(small, tmp_path / "adapter")
    program = f"""
import transformers
from pathlib import Path
from proxytune.backends.transformers.backend import TransformersBackend
from proxytune.checkpoints.adapter import find_adapter
from proxytune.checkpoints.checkpoint import find_checkpoint
from proxytune.recipe.spec import ModelSpec
logging = transformers.utils.logging
before = logging.get_verbosity(), logging.is_progress_bar_enabled()
here = Path({str(tmp_path)!r})
checkpoint = find_checkpoint("small", root=here)
TransformersBackend.load(
    checkpoint, ModelSpec(model="small"), {{"a": find_adapter("adapter", root=here)}}
)
assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
