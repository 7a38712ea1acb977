"""Convolutions that never look ahead, in raster order and in the order of the colours.

van den Oord, Kalchbrenner, Kavukcuoglu 2016, "Pixel Recurrent Neural Networks", ICML, arXiv:1601.06759. Channels are
dealt out to the colours in turn, so channel i belongs to colour i mod 3, as do the 3 channels of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from condgen.errors import ConfigError

Kind = Literal["A", "B"]


def causal_mask(outputs: int, inputs: int, above: int, left: int, right: int, kind: Kind, colours: int) -> Tensor:
    """(outputs, inputs, above + 1, left + 1 + right): 1 where an output may look.

    Everything above and to the left; at its own position colours before its own ("A") and its own ("B").
    """
    mask = torch.ones(outputs, inputs, above + 1, left + 1 + right)
    mask[:, :, above, left + 1 :] = 0
    mine, theirs = torch.arange(outputs)[:, None] % colours, torch.arange(inputs)[None] % colours
    mask[:, :, above, left] = (theirs < mine if kind == "A" else theirs <= mine).float()
    return mask


class CausalConv2d(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H, W), looking at `above` rows above, `left` and `right` columns beside.

    The published k x k masked convolution is above = left = right = k // 2, without its rows that are always 0.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        above: int = 0,
        left: int = 0,
        right: int = 0,
        kind: Kind = "B",
        colours: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if outputs % colours or inputs % colours:
            raise ConfigError(
                f"a masked convolution from {inputs} to {outputs} channels cannot share them among {colours} colours; "
                f"choose multiples of {colours}"
            )
        self.above, self.left, self.right, self.kind, self.colours = above, left, right, kind, colours
        self.mask: Tensor
        mask = causal_mask(outputs, inputs, above, left, right, kind, colours)
        self.register_buffer("mask", mask, persistent=False)
        seen = max(1, int(mask.sum()) // outputs)  # weights that count, an output
        self.weight = nn.Parameter(torch.randn(mask.shape) * seen**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def folded(self) -> Tensor:
        """The weight with its mask applied."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (self.left, self.right, self.above, 0)), self.folded(), self.bias)


class RowsConv2d(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H, W) over `above` rows above and its own row, whole: for vertical streams."""

    def __init__(self, inputs: int, outputs: int, *, above: int, beside: int) -> None:
        super().__init__()
        self.above, self.beside = above, beside
        size = (outputs, inputs, above + 1, 2 * beside + 1)
        self.weight = nn.Parameter(torch.randn(size) * (inputs * size[2] * size[3]) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (self.beside, self.beside, self.above, 0)), self.weight, self.bias)


class ConditionBias(nn.Module):
    """What a condition adds to `outputs` channels: V^T vector everywhere, a 1x1 convolution of a map in its place.

    van den Oord et al. 2016, arXiv:1606.05328, section 2.3. A width of 0 = no such condition.
    """

    def __init__(self, vector: int, maps: int, outputs: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(outputs, vector) * 0.05) if vector else None
        self.map = nn.Parameter(torch.randn(outputs, maps, 1, 1) * 0.05) if maps else None

    def forward(self, vector: Tensor | None, maps: Tensor | None) -> Tensor | None:
        """(B, V) and (B, M, H, W) -> (B, outputs, H or 1, W or 1), or None without a condition."""
        total = None
        if self.vector is not None:
            assert vector is not None
            total = F.linear(vector, self.vector)[:, :, None, None]
        if self.map is not None:
            assert maps is not None
            placed = F.conv2d(maps, self.map)
            total = placed if total is None else total + placed
        return total


def down(x: Tensor) -> Tensor:
    """One row lower, zeros on top."""
    return F.pad(x, (0, 0, 1, -1))  # a slice would lose the memory layout of the gradient


def to_the_right(x: Tensor) -> Tensor:
    """One column further, zeros at the left."""
    return F.pad(x, (1, -1))


def run(block: Callable[..., Any], inputs: Sequence[Tensor | None], save_memory: bool) -> Any:
    """block(*inputs); with `save_memory` its activations are computed again in the backward pass, dropout included."""
    if save_memory and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
