"""Linear layers that multiply from the other side for few rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from proxytune.backends.transformers import linear
from proxytune.backends.transformers.linear import (
    MAX_ROWS,
    FewRowsLinear,
    PackedLinear,
    pack_linear_layers,
    speed_up_linear_layers,
)

# The two products add the same numbers in another order.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def layer(*, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(48, 24, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, MAX_ROWS, MAX_ROWS + 1, 40])
def test_any_number_of_rows_gives_what_torchs_layer_gives(num_rows, bias):
    plain = layer(bias=bias)
    fast = copy.deepcopy(plain)
    speed_up_linear_layers(fast)
    assert type(fast) is FewRowsLinear
    rows = torch.randn(num_rows, 48, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fast(rows), plain(rows), **CLOSE)


@pytest.mark.parametrize("shape", [(48,), (1, 1, 48), (2, 3, 48), (3, 1, 48), (5, 4, 3, 48)])
def test_the_axes_before_the_last_are_kept_and_the_answer_is_contiguous(shape):
    plain = layer()
    fast = copy.deepcopy(plain)
    speed_up_linear_layers(fast)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    answer = fast(given)
    assert answer.is_contiguous()
    torch.testing.assert_close(answer, plain(given), **CLOSE)
    turned = given.transpose(0, -2) if len(shape) > 2 else given
    torch.testing.assert_close(fast(turned), plain(turned), **CLOSE)


def test_gradients_are_those_of_torchs_layer():
    plain = layer()
    fast = copy.deepcopy(plain)
    speed_up_linear_layers(fast)
    for each in (plain, fast):
        each(torch.ones(1, 48)).square().sum().backward()
    torch.testing.assert_close(fast.weight.grad, plain.weight.grad, **CLOSE)
    torch.testing.assert_close(fast.bias.grad, plain.bias.grad, **CLOSE)


def test_tied_weights_stay_tied_and_names_stay_the_same():
    model = nn.Sequential(nn.Embedding(24, 48), layer())
    model[0].weight = model[1].weight
    before = list(model.state_dict())
    speed_up_linear_layers(model)
    assert model[0].weight is model[1].weight
    assert list(model.state_dict()) == before


def test_other_dtypes_and_subclasses_are_left_alone():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(layer().to(torch.bfloat16), Own(3, 3), nn.Linear(3, 3, device="meta"))
    speed_up_linear_layers(model)
    assert [type(each) for each in model] == [nn.Linear, Own, nn.Linear]


# Packed weights --------------------------------------------------------------------------------------

can_pack = pytest.mark.skipif(
    not linear._can_pack(), reason="weights are packed on x86 processors with oneDNN only"
)


@pytest.fixture
def small_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MIN_PACKED_SIDE", 16)


def packed(*, bias: bool = True) -> nn.Linear:
    fast = copy.deepcopy(layer(bias=bias)).requires_grad_(False)
    speed_up_linear_layers(fast)
    pack_linear_layers(fast)
    assert type(fast) is PackedLinear
    return fast


@can_pack
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 48), (48,), (1, 1, 48), (2, 3, 48), (5, 7, 48)])
def test_packed_weights_give_what_plain_ones_give(small_sides, shape, bias):
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(packed(bias=bias)(given), layer(bias=bias)(given), **CLOSE)


@can_pack
def test_packed_weights_take_the_place_of_the_plain_ones_and_can_still_be_read(small_sides):
    fast, plain = packed(), layer()
    assert [name for name, _ in fast.named_parameters()] == ["bias"]
    assert torch.equal(fast.weight, plain.weight)
    assert torch.equal(fast.state_dict()["weight"], plain.weight)


@can_pack
def test_a_packed_layer_that_is_cast_copied_or_loaded_into_is_still_right(small_sides):
    given = torch.ones(2, 48)
    expected = layer()(given)
    torch.testing.assert_close(copy.deepcopy(packed())(given), expected, **CLOSE)
    cast = packed().to(torch.float64)
    torch.testing.assert_close(cast(given.double()).float(), expected, **CLOSE)
    assert cast.weight.dtype == torch.float64
    filled = packed()
    filled.load_state_dict({"weight": torch.zeros(24, 48), "bias": torch.ones(24)})
    assert torch.equal(filled(given), torch.ones(2, 24))


@can_pack
def test_tied_trainable_and_small_layers_are_not_packed(small_sides):
    tied, trainable, small = layer(), layer(), nn.Linear(8, 48)
    model = nn.Sequential(nn.Embedding(24, 48), tied, trainable, small).requires_grad_(False)
    model[0].weight = tied.weight
    trainable.requires_grad_(True)
    speed_up_linear_layers(model)
    pack_linear_layers(model)
    assert [type(each) for each in model[1:]] == [FewRowsLinear] * 3


def test_without_the_operators_everything_stays_plain(small_sides, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    fast = layer().requires_grad_(False)
    speed_up_linear_layers(fast)
    pack_linear_layers(fast)
    assert type(fast) is FewRowsLinear


@can_pack
def test_weights_mapped_from_a_file_are_packed_like_others(small_sides, tmp_path):
    from safetensors.torch import load_file, save_file

    # Large enough for whole pages of memory to be given back.
    plain = nn.Linear(512, 256).requires_grad_(False)
    save_file({"a": plain.weight, "b": plain.weight + 1}, tmp_path / "weights.safetensors")
    mapped = load_file(tmp_path / "weights.safetensors")
    fast = copy.deepcopy(plain)
    fast.weight = nn.Parameter(mapped["a"], requires_grad=False)
    speed_up_linear_layers(fast)
    pack_linear_layers(fast)
    given = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fast(given), plain(given), **CLOSE)
    assert torch.equal(mapped["a"], plain.weight), "whoever else holds them can still read them"
    assert torch.equal(mapped["b"], plain.weight + 1)


def test_the_last_tokens_of_many_prompts_are_one_product():
    """A slice is not contiguous; torch multiplied each of 32 rows by the whole head by itself."""
    layer = nn.Linear(16, 24, bias=False).requires_grad_(False)
    model = nn.Sequential(layer)
    speed_up_linear_layers(model)
    hidden = torch.randn(32, 8, 16)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as seen:
        found = model(hidden[:, -1:])
    torch.testing.assert_close(found, hidden[:, -1:] @ layer.weight.T)
    names = {event.key for event in seen.key_averages()}
    assert "aten::mm" in names and "aten::bmm" not in names
