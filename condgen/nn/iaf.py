"""Inverse autoregressive flows. Kingma et al. 2016, arXiv:1606.04934; masks after MADE (Germain et al. 2015,
arXiv:1502.03509).

A step is z' = s z + (1 - s) m with s = sigmoid(.): m and s of element i depend on the context and on the elements
before i alone, so that ln|det| = sum ln s. The order is reversed from step to step. All elements of a step are computed
at once, which is what an encoder needs; going back takes one pass an element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORGET_BIAS = 1.5  # the flow starts near the identity


def degrees(units: int, features: int) -> Tensor:
    """How many elements each of `units` hidden units may see, 0 .. features - 1, spread evenly (int64 (units,)).

    Units that see none still carry the context to the first element.
    """
    return torch.arange(units) * features // units


def places(features: int, reverse: bool = False) -> Tensor:
    """The place 0 .. features - 1 of each element in the order (int64)."""
    return torch.arange(features).flip(0) if reverse else torch.arange(features)


class MaskedLinear(nn.Linear):
    """A linear layer that is multiplied by a fixed mask (out, in) of zeros and ones."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedConv2d(nn.Conv2d):
    """A k x k convolution that sees earlier positions in raster order, and at its own those channels that the mask
    `centre` (out, in) allows. reverse: later positions instead of earlier ones."""

    mask: Tensor

    def __init__(self, centre: Tensor, kernel: int = 3, reverse: bool = False) -> None:
        super().__init__(centre.shape[1], centre.shape[0], kernel, padding=kernel // 2)
        mask = torch.zeros(*centre.shape, kernel * kernel)
        middle = kernel * kernel // 2
        mask[:, :, :middle] = 1
        if reverse:
            mask = mask.flip(-1)
        mask[:, :, middle] = centre.float()
        self.register_buffer("mask", mask.unflatten(-1, (kernel, kernel)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class Autoregressive(nn.Module):
    """z (B, D) or (B, D, h, w), context (B, V) or (B, V, h, w) -> m and the logit of s, each shaped like z.

    hidden    widths of the hidden layers; the context is added to the first
    spatial   maps: the order is raster, and by channel within a position
    """

    def __init__(
        self, features: int, context: int, hidden: Sequence[int], *, spatial: bool = False, reverse: bool = False
    ) -> None:
        super().__init__()
        order = places(features, reverse)
        first = degrees(hidden[0], features)

        def masked(mask: Tensor) -> nn.Module:
            return MaskedConv2d(mask, reverse=reverse) if spatial else MaskedLinear(mask)

        self.first = masked(first[:, None] > order[None, :])
        self.context: nn.Module | None = None
        if context:
            self.context = nn.Conv2d(context, hidden[0], 1) if spatial else nn.Linear(context, hidden[0])
        self.inner, before = nn.ModuleList(), first
        for width in hidden[1:]:
            after = degrees(width, features)
            self.inner.append(masked(after[:, None] >= before[None, :]))
            before = after
        last = order[:, None] >= before[None, :]
        self.shift, self.gate = masked(last), masked(last)

    def forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = self.first(z)
        if self.context is not None and context is not None:
            hidden = hidden + self.context(context)
        for layer in self.inner:
            hidden = layer(F.elu(hidden))
        hidden = F.elu(hidden)
        return self.shift(hidden), self.gate(hidden)


class Iaf(nn.Module):
    """`steps` gated autoregressive steps on z (B, D) or maps (B, D, h, w).

    Returns z and ln s summed over the steps, elementwise: ln q(z_T) = ln q(z_0) - that, summed. Both in float32.
    """

    def __init__(
        self, features: int, context: int, hidden: Sequence[int], *, steps: int = 2, spatial: bool = False
    ) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            Autoregressive(features, context, hidden, spatial=spatial, reverse=bool(step % 2)) for step in range(steps)
        )

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(z)
        for net in self.nets:
            shift, gate = (part.to(z.dtype) for part in net(z, context))
            keep = torch.sigmoid(gate + FORGET_BIAS)
            z = keep * z + (1 - keep) * shift
            total = total + F.logsigmoid(gate + FORGET_BIAS)
        return z, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """z before the flow, element by element: for checks and small cases."""
        for net in reversed(self.nets):
            before = torch.zeros_like(z)
            for _ in range(z[0].numel()):  # each pass makes one more element of the order right
                shift, gate = (part.to(z.dtype) for part in net(before, context))
                keep = torch.sigmoid(gate + FORGET_BIAS)
                before = (z - (1 - keep) * shift) / keep
            z = before
        return z
