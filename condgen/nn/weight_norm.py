"""Convolutions with weight normalisation, of concatenated ELUs, that start from the statistics of a first batch.

Salimans, Kingma 2016, "Weight Normalization", NeurIPS, arXiv:1602.07868; as in PixelCNN++ (arXiv:1701.05517).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.nn.sync_norm import sum_over_ranks


def concat_elu(x: Tensor) -> Tensor:
    """(B, F, *) -> (B, 2 F, *): elu of x and of -x."""
    return F.elu(torch.cat([x, -x], 1))


class _EluConv(torch.autograd.Function):
    """Convolution of concat_elu(parts side by side), padded and with dropout. Keeps the parts and the mask of what was
    kept, and computes the rest again in the backward pass: a third of the memory of the plain form."""

    @staticmethod
    def forward(
        ctx: Any,
        mask: Tensor | None,
        kept: float,
        weight: Tensor,
        bias: Tensor,
        pad: tuple[int, ...],
        stride: int,
        *parts: Tensor,
    ) -> Tensor:
        device = bias.device.type
        if torch.is_autocast_enabled(device):
            kind = torch.get_autocast_dtype(device)
            weight, bias, parts = weight.to(kind), bias.to(kind), tuple(part.to(kind) for part in parts)
        ctx.save_for_backward(mask, weight, *parts)
        ctx.kept, ctx.pad, ctx.stride = kept, pad, stride
        with torch.autocast(device, enabled=False):
            padded, inside = padded_elu(parts, mask, kept, pad)
            return convolved(padded, weight, bias, stride, (0, inside))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mask, weight, *parts = ctx.saved_tensors
        height, columns = parts[0].shape[2:]
        with torch.autocast(weight.device.type, enabled=False):
            padded, inside = padded_elu(parts, mask, ctx.kept, ctx.pad)
            rows = flat_rows(padded, weight)
            gradient = gradients[0].to(weight.dtype)
            into, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
                gradient if rows is padded else flat_rows(gradient, weight), rows, weight, [len(weight)],
                [ctx.stride] * 2, [0, inside], [1, 1], False, [0, 0], 1, [True, *ctx.needs_input_grad[2:4]],
            )  # fmt: skip
            left, top = ctx.pad[0] - inside, ctx.pad[2]
            into, padded = (
                x[:, :, top : top + height, left : left + columns]
                for x in (into if rows is padded else unflat_rows(into, padded.shape), padded)
            )
            if mask is not None:
                _blank(into, mask)
            # of elu from its result, which dropout has made 1 / kept times larger: (y + 1 / kept) where y <= 0
            into = torch.ops.aten.elu_backward(into, 1.0, 1 / ctx.kept, 1.0, True, padded)
            plus, minus = into.chunk(2, 1)
            found = torch.split(plus - minus, [part.shape[1] for part in parts], 1)
        return None, None, weight_gradient, bias_gradient, None, None, *found


def padded_elu(parts: Sequence[Tensor], mask: Tensor | None, kept: float, pad: tuple[int, ...]) -> tuple[Tensor, int]:
    """concat_elu(parts side by side) after inverted dropout, with zeros around: (left, right, top, bottom), channels
    innermost. Equal columns at both sides are left to the convolution: how many is returned too.

    elu(x) = max(x, e) and elu(-x) = max(-x, e) with e = exp(-|x|) - 1, so that one exponential serves both.
    """
    left, right, top, bottom = pad
    inside = left if left == right else 0
    left, right = left - inside, right - inside
    width = sum(part.shape[1] for part in parts)
    batch, _, height, columns = parts[0].shape
    size = (batch, top + height + bottom, left + columns + right, 2 * width)
    out = (parts[0].new_zeros(size) if any((left, right, top, bottom)) else parts[0].new_empty(size)).movedim(3, 1)
    inner = out[:, :, top : top + height, left : left + columns]
    at = 0
    for x in parts:
        features = x.shape[1]
        minus = -x
        low = torch.minimum(x, minus).expm1_()
        torch.maximum(x, low, out=inner[:, at : at + features])
        torch.maximum(minus, low, out=inner[:, width + at : width + at + features])
        at += features
    if mask is not None:
        _blank(inner, mask)
        inner.mul_(1 / kept)
    return out, inside


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """F.conv2d, with 1x1 convolutions row by row."""
    rows = flat_rows(x, weight)
    out = F.conv2d(rows, weight, bias, stride, padding)
    return out if rows is x else unflat_rows(out, x.shape)


def flat_rows(x: Tensor, weight: Tensor) -> Tensor:
    """(B, F, H, W) -> (B H, F, 1, W) for a 1x1 convolution: torch's choice for few pictures on one thread is slow."""
    if weight.shape[2:] != (1, 1):
        return x
    return x.movedim(1, 3).flatten(0, 1)[:, None].movedim(3, 1)


def unflat_rows(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `flat_rows` for pictures of `shape` (B, any, H, W)."""
    return x.movedim(1, 3).reshape(shape[0], shape[2], shape[3], x.shape[1]).movedim(3, 1)


def drawn_mask(shape: Sequence[int], dropout: float, device: torch.device) -> tuple[Tensor, float]:
    """int8 or int16 (B, F, H, W), channels innermost, -1 (all bits) where a unit is kept and 0 elsewhere, from torch's
    generator; and the probability of -1: 1 - dropout, to 2 ** -17 where it is no multiple of 2 ** -8.

    On the CPU from random bits, since torch's Bernoulli can take as long as the convolution.
    """
    batch, features, height, columns = shape
    kind = torch.int8 if (256 * dropout).is_integer() else torch.int16
    half = 1 << (8 * kind.itemsize - 1)
    first = min(round((1 - dropout) * 2 * half), 2 * half - 1) - half  # the first number that is not kept
    kept, size = (first + half) / (2 * half), (batch, height, columns, features)
    if device.type == "cpu":
        words = math.prod(size) * kind.itemsize // 8 + 1
        drawn = torch.empty(words, dtype=torch.int64).random_(-(2**63), None).view(kind)[: math.prod(size)]
        mask = drawn.clamp_(first - 1, first).sub_(first).view(size)
    else:
        mask = torch.empty(size, dtype=kind, device=device).bernoulli_(kept).neg_()
    return mask.movedim(3, 1), kept


def _blank(x: Tensor, mask: Tensor) -> None:
    """Zeros where the mask is 0, in place."""
    bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    bits.bitwise_and_(mask.to(bits.dtype))


class WeightNormConv2d(nn.Module):
    """g v / |v| convolved, plus b: one g and one norm per output channel.

    pad          zeros at the (left, right, top, bottom) before the convolution
    transposed   a transposed convolution; its result is cropped from (left, right, top, bottom) = crop
    scale        standard deviation of the outputs of the first batch
    elu          of concat_elu(x): the weights have 2 * inputs input channels

    `calibrating`: the next forward sets g and b so that each output channel of that batch has mean 0 and standard
    deviation `scale`, over every process.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int] = (1, 1),
        *,
        pad: tuple[int, int, int, int] = (0, 0, 0, 0),
        stride: int = 1,
        transposed: bool = False,
        scale: float = 1.0,
        elu: bool = False,
    ) -> None:
        super().__init__()
        self.pad, self.stride, self.transposed, self.scale, self.elu = pad, stride, transposed, scale, elu
        inputs = 2 * inputs if elu else inputs
        shape = (inputs, outputs, *kernel) if transposed else (outputs, inputs, *kernel)
        self.v = nn.Parameter((torch.randn(shape) * 0.05).contiguous(memory_format=torch.channels_last))
        self.g = nn.Parameter(torch.full((outputs,), scale))
        self.b = nn.Parameter(torch.zeros(outputs))
        self.calibrating = False

    def folded(self) -> Tensor:
        """The weight that is convolved with."""
        if self.transposed:
            return torch._weight_norm(self.v, self.g.view(1, -1, 1, 1), 1)
        inner = torch._weight_norm(self.v.movedim(1, 3), self.g.view(-1, 1, 1, 1), 0)  # one kernel each way
        return inner.movedim(3, 1)

    def forward(self, *parts: Tensor, dropout: float = 0.0) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H', W'). `dropout` of units of concat_elu(x), from torch's generator.

        Several parts, which only `elu` takes, count as one picture with their channels side by side.
        """
        mask, kept = None, 1.0
        if dropout:
            shape = (len(parts[0]), 2 * sum(part.shape[1] for part in parts), *parts[0].shape[2:])
            mask, kept = drawn_mask(shape, dropout, parts[0].device)
        if self.calibrating:
            self._calibrate(self._convolve(parts, mask, 1.0, torch.zeros_like(self.b)))
        return self._convolve(parts, mask, kept, self.b)

    def _convolve(self, parts: Sequence[Tensor], mask: Tensor | None, kept: float, bias: Tensor) -> Tensor:
        weight = self.folded()
        if self.elu:
            return _EluConv.apply(mask, kept, weight, bias, self.pad, self.stride, *parts)
        (x,) = parts
        if self.transposed:
            left, right, top, bottom = self.pad
            out = F.conv_transpose2d(x, weight, bias, self.stride, output_padding=1)
            return out[:, :, top : out.shape[2] - bottom, left : out.shape[3] - right]
        return convolved(F.pad(x, self.pad), weight, bias, self.stride)

    @torch.no_grad()
    def _calibrate(self, out: Tensor) -> None:
        axes = [0, 2, 3]
        wide = out.double()
        sums = torch.cat([wide.sum(axes), wide.square().sum(axes), wide.new_tensor([wide[:, 0].numel()])])
        if dist.is_initialized() and dist.get_world_size() > 1:
            sums = sum_over_ranks(sums)
        mean, square = (part / sums[-1] for part in sums[:-1].chunk(2))
        factor = self.scale / (square - mean.square()).clamp(min=0).add(1e-8).sqrt()
        self.g.mul_(factor.to(self.g.dtype))
        self.b.copy_(-mean * factor)


def calibrate(net: nn.Module, on: bool) -> None:
    """Tells every convolution of `net` to take its scale from the next forward, or no longer to."""
    for module in net.modules():
        if isinstance(module, WeightNormConv2d):
            module.calibrating = on
