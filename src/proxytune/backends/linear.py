"""Linear layers in float32 on a CPU: which matrix product is fastest for few rows.

Decoding multiplies every weight by one to a few rows of activations. `x @ W.T`, what torch's linear layer
asks for, is the slow way round there: `W @ x.T` gives the same numbers, to rounding, in as little as a third
of the time, from the same weights. docs/design/0001-few-row-linear-layers.md has the measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_ROWS = 8
"""Most rows for which `W @ x.T` was faster in the sum over the layers of a model."""


class FewRowsLinear(nn.Linear):
    """`nn.Linear` that multiplies from the other side when it is given few rows.

    Weights, names and results, to rounding, are those of `nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias`, `[..., out_features]`."""
        num_rows = input.numel() // self.in_features
        if not 0 < num_rows <= MAX_ROWS:
            return functional.linear(input, self.weight, self.bias)
        rows = input.reshape(num_rows, self.in_features)
        if num_rows == 1:
            # A product with one column is a matrix-vector product; its kernel is slower than that for two.
            rows = torch.cat((rows, rows))
        bias: Tensor | None = self.bias
        if bias is None:
            product = torch.mm(self.weight, rows.t())
        else:
            product = torch.addmm(bias[:, None], self.weight, rows.t())
        # Contiguous, because what follows (norms, heads' views, softmax) reads row by row.
        rows = product[:, :num_rows].t().contiguous()
        return rows.view(*input.shape[:-1], self.out_features)


def speed_up_linear_layers(model: nn.Module) -> None:
    """Turn the plain linear layers of a model into `FewRowsLinear` where that is what was measured.

    That is float32 on a CPU. Parameters, hooks and tied weights stay as they are. Subclasses, quantised
    layers among them, keep their own forward.
    """
    for module in model.modules():
        if (
            type(module) is nn.Linear
            and module.weight.device.type == "cpu"
            and module.weight.dtype == torch.float32
        ):
            module.__class__ = FewRowsLinear
