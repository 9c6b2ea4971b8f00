"""The bridge of a cut: one layer that stands for all the layers left out, computed in closed form.

Words: `x` is the residual stream after the last of the first layers, `y` the one that enters the first of the
last layers, and `u = x / rms(x)`. The bridge adds to `x` what ridge regression predicts of `y - x`:

    y ~ x + T f(u)        T minimises  sum_t |y_t - x_t - T f(u_t)|^2 / |y_t|^2  +  ridge |T|^2

Tokens are weighted by `1 / |y|^2`, because the next layer begins with a norm, and because a text's first
tokens have norms hundreds of times larger than the others.

The layer is written as one of the model's own, whose MLP computes `down(act(gate u) * (up u))`. Without
biases nothing in it is constant, so a linear map needs a direction `g` of `u` that hardly varies: residual
streams have one (regression of 1 on `u` finds it), and every unit's gate is `GAIN * g`. There the activation
is the identity, `act(z) = z` for large `z`, and `f(u) = u * act(GAIN g.u)`. T is fitted to that product, so
the direction need not be constant exactly. The attention of the layer is zero.

Source: a linear map in place of layers, fitted in closed form to text, as in Shopkhoev et al. 2025,
"ReplaceMe", arXiv:2505.02819. The norm before the map, the tokens' weights and the gate are this project's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from proxytune.checkpoints.bridge_file import Bridge
from proxytune.checkpoints.cut import Keep
from proxytune.errors import BackendError, UnsupportedModel

RIDGE = 1e-3
"""Ridge of the map, in units of the mean diagonal of its normal equations."""

GATE_RIDGE = 1e-4
"""The same for the gate's direction."""

GAIN = 10.0
"""What the gate's direction is multiplied by: silu(10) is 10 to 5e-4, gelu(10) to float32."""


class Streams(NamedTuple):
    """The residual stream at both ends of the layers left out.

    Args:
        before: `[num_tokens, hidden]` float32, after the last of the first layers.
        after: `[num_tokens, hidden]` float32, as it enters the first of the last layers.
    """

    before: Tensor
    after: Tensor


@torch.no_grad()
def read_streams(model: Any, texts: Sequence[Sequence[int]], keep: Keep) -> Iterator[Streams]:
    """Yield both ends of what is left out, for each text.

    Args:
        model: A causal language model of transformers, of a kind in `ARCHITECTURES`.
        texts: Token ids.
        keep: Which layers are kept.
    """
    layers = model.model.layers
    places = (keep.first, len(layers) - keep.last)
    for token_ids in texts:
        with _entering(layers, places) as found:
            model.model(torch.tensor([list(token_ids)], device=model.device), use_cache=False)
        yield Streams(*(found[place].float().cpu() for place in places))


@contextmanager
def _entering(layers: Any, places: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Keep what enters layers in the block's forward, `[num_tokens, hidden]` by the layer's index."""
    found: dict[int, Tensor] = {}

    def keeper(place: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[place] = (args[0] if args else kwargs["hidden_states"])[0]

        return keep

    hooks = [layers[i].register_forward_pre_hook(keeper(i), with_kwargs=True) for i in places]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def fit_bridge(streams: Streams, config: Any, activation: nn.Module) -> tuple[Bridge, float]:
    """Return the bridge between two places of a model, and what it misses.

    The second is the weighted squared error over the weighted square of `y - x`, on the same tokens.

    Args:
        streams: What enters and leaves the layers left out.
        config: The model's config.
        activation: The activation of its MLPs.

    Raises:
        UnsupportedModel: The activation is not the identity for large arguments.
        BackendError: The streams are not finite.
    """
    check_activation(activation, config)
    before, after = (stream.double() for stream in streams)
    if not (before.isfinite().all() and after.isfinite().all()):
        raise BackendError("the model's residual stream is not finite on the text given")
    unit = before * torch.rsqrt(before.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
    ones = torch.ones(len(unit), 1, dtype=unit.dtype)
    gate = GAIN * _ridge(unit, ones, GATE_RIDGE)[:, 0]
    features = unit * activation(unit @ gate)[:, None]
    weights = after.norm(dim=-1, keepdim=True).clamp(min=1e-12).reciprocal()
    wanted = (after - before) * weights
    down = _ridge(features * weights, wanted, RIDGE).t()
    missed = wanted - (features * weights) @ down.t()
    error = float(missed.pow(2).sum() / wanted.pow(2).sum().clamp(min=1e-300))
    up = torch.eye(len(gate), dtype=down.dtype)
    if config.intermediate_size < len(gate):
        left, sizes, right = torch.linalg.svd(down, full_matrices=False)
        rank = config.intermediate_size
        down, up = left[:, :rank] * sizes[:rank], right[:rank]
    return Bridge(gate[None].float(), up.float(), down.float()), error


def _ridge(features: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Return `[num_features, num_targets]`, the coefficients of a ridge regression without intercept."""
    products = features.t() @ features
    products.diagonal().add_(ridge * products.diagonal().mean())
    found: Tensor = torch.linalg.solve(products, features.t() @ targets)
    return found


def check_activation(activation: nn.Module, config: Any) -> None:
    """Check that a gate can be held where an activation is the identity.

    Raises:
        UnsupportedModel: It is not, such as a sigmoid.
    """
    with torch.no_grad():
        value = float(activation(torch.tensor(GAIN)))
    if abs(value / GAIN - 1) > 1e-3:
        raise UnsupportedModel(
            f"the activation {config.hidden_act!r} of a {config.model_type} gives {value:.4g} for {GAIN:g}, "
            "and the bridge needs one that leaves large numbers as they are.\n"
            "hint: silu and gelu do"
        )
