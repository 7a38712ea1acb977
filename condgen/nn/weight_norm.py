"""Convolutions with weight normalisation, of concatenated ELUs, that start from the statistics of a first batch.

Salimans, Kingma 2016, "Weight Normalization", NeurIPS, arXiv:1602.07868; as in PixelCNN++ (arXiv:1701.05517).
"""

from __future__ import annotations

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
    """Convolution of concat_elu(x), padded and with dropout. Keeps x and the mask of what was kept, and computes the
    rest again in the backward pass: a third of the memory of the plain form."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        kept: float,
        weight: Tensor,
        bias: Tensor,
        pad: tuple[int, ...],
        stride: int,
    ) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            kind = torch.get_autocast_dtype(device)
            x, weight, bias = x.to(kind), weight.to(kind), bias.to(kind)
        ctx.save_for_backward(x, mask, weight)
        ctx.kept, ctx.pad, ctx.stride = kept, pad, stride
        with torch.autocast(device, enabled=False):
            return F.conv2d(padded_elu(x, mask, kept, pad), weight, bias, stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight = ctx.saved_tensors
        gradient = gradients[0].to(x.dtype)
        left, right, top, _ = ctx.pad
        with torch.autocast(x.device.type, enabled=False):
            needed = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
            padded = padded_elu(x, mask, ctx.kept, ctx.pad)
            into, weight_gradient, bias_gradient = torch.ops.aten.convolution_backward(
                gradient, padded, weight, [len(weight)], [ctx.stride] * 2, [0, 0], [1, 1],
                False, [0, 0], 1, needed,
            )  # fmt: skip
            out = None
            if into is not None:
                inner = into[:, :, top:, left : into.shape[3] - right]
                if mask is not None:
                    inner = _drop(inner, mask, ctx.kept)
                plus, minus = inner.chunk(2, 1)
                out = torch.exp(x.clamp(max=0)).mul_(plus).sub_(torch.exp(-x.clamp(min=0)).mul_(minus))
        return out, None, None, weight_gradient, bias_gradient, None, None


def padded_elu(x: Tensor, mask: Tensor | None, kept: float, pad: tuple[int, ...]) -> Tensor:
    """concat_elu(x) after inverted dropout, with zeros around: (left, right, top, bottom)."""
    left, right, top, bottom = pad
    batch, width, height, columns = x.shape
    out = x.new_zeros(batch, 2 * width, top + height + bottom, left + columns + right)
    inner = out[:, :, top : top + height, left : left + columns]
    inner[:, :width] = x
    torch.neg(x, out=inner[:, width:])
    F.elu_(inner)
    if mask is not None:
        _drop(inner, mask, kept)
    return out


def _drop(x: Tensor, mask: Tensor, kept: float) -> Tensor:
    return x.mul_(mask).mul_(1 / kept)


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
        self.v = nn.Parameter(torch.randn(shape) * 0.05)
        self.g = nn.Parameter(torch.full((outputs,), scale))
        self.b = nn.Parameter(torch.zeros(outputs))
        self.calibrating = False

    def folded(self) -> Tensor:
        """The weight that is convolved with."""
        axis = 1 if self.transposed else 0
        others = [i for i in range(4) if i != axis]
        shape = [-1 if i == axis else 1 for i in range(4)]
        return self.v * (self.g.view(shape) / torch.linalg.vector_norm(self.v, dim=others, keepdim=True))

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H', W'). `dropout` of units of concat_elu(x), from torch's generator."""
        mask = None
        if dropout:
            mask = torch.empty(len(x), 2 * x.shape[1], *x.shape[2:], dtype=torch.bool, device=x.device)
            mask.bernoulli_(1 - dropout)
        if self.calibrating:
            self._calibrate(self._convolve(x, mask, 1.0, torch.zeros_like(self.b)))
        return self._convolve(x, mask, 1 - dropout, self.b)

    def _convolve(self, x: Tensor, mask: Tensor | None, kept: float, bias: Tensor) -> Tensor:
        weight = self.folded()
        if self.transposed:
            left, right, top, bottom = self.pad
            out = F.conv_transpose2d(x, weight, bias, self.stride, output_padding=1)
            return out[:, :, top : out.shape[2] - bottom, left : out.shape[3] - right]
        if self.elu:
            return _EluConv.apply(x, mask, kept, weight, bias, self.pad, self.stride)
        return F.conv2d(F.pad(x, self.pad), weight, bias, self.stride)

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
