"""Linear layers that multiply from the other side for few rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from proxytune.backends.linear import MAX_ROWS, FewRowsLinear, speed_up_linear_layers

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
