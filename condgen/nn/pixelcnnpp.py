"""PixelCNN++: shifted convolutions on several scales with skip connections.

Salimans, Karpathy, Chen, Kingma 2017, ICLR, arXiv:1701.05517, layer for layer as released. Two streams: u has seen
the rows above, ul also the pixels to the left. Nothing has seen anything of its own pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.nn.causal import CausalConv2d, ConditionBias, down, run, to_the_right
from condgen.nn.weight_norm import WeightNormConv2d, calibrate

if TYPE_CHECKING:
    from condgen.nn.pixelcnnpp_steps import PixelCnnPpSteps

ABOVE: dict[str, Any] = {
    "kernel": (2, 3),
    "pad": (1, 1, 1, 0),
}  # down-shifted: this row and the one above, columns beside
LEFT: dict[str, Any] = {"kernel": (2, 2), "pad": (1, 0, 1, 0)}  # down-right-shifted: also nothing to the right


class Gate(torch.autograd.Function):
    """F.glu over channels: p sigmoid(q). torch's own takes 10 times as long back where channels are innermost."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        p, q = y.chunk(2, 1)
        return q.sigmoid().mul_(p)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        p, q = y.chunk(2, 1)
        gate, out = q.sigmoid(), torch.empty_like(y)
        of_p, of_q = out.chunk(2, 1)
        torch.mul(gradients[0], gate, out=of_p)
        torch.ops.aten.sigmoid_backward(gradients[0] * p, gate, grad_input=of_q)
        return out


class GatedResnet(nn.Module):
    """x + p sigmoid(q), (p, q) = conv(dropout(concat_elu(conv(concat_elu(x)) + 1x1(concat_elu(a))))) + V condition."""

    def __init__(self, width: int, stream: dict, skips: int, dropout: float, vector: int, maps: int) -> None:
        super().__init__()
        self.dropout = dropout
        self.conv_in = WeightNormConv2d(width, width, **stream, elu=True)
        self.skip = WeightNormConv2d(skips * width, width, elu=True) if skips else None
        self.conv_out = WeightNormConv2d(width, 2 * width, **stream, scale=0.1, elu=True)
        self.told = ConditionBias(vector, maps, 2 * width)

    def forward(self, x: Tensor, vector: Tensor | None, maps: Tensor | None, *a: Tensor) -> Tensor:
        y = self.conv_in(x)
        if self.skip is not None:
            y = y + self.skip(*a)
        y = self.conv_out(y, dropout=self.dropout if self.training else 0.0)
        told = self.told(vector, maps)
        return x + Gate.apply(y if told is None else y + told)


class PixelCnnPp(nn.Module):
    """(B, C, H, W) in [-1, 1] -> parameters (B, P, H, W); sides are multiples of 2 ** (scales - 1).

    width    F, 160 as released; blocks: gated resnets a scale on the way up, one more on the way down but for the last
    maps     M, at each scale: `forward` takes one map per scale, the finest first
    head     None: a 1x1 convolution of elu(ul). Otherwise what gives each colour those before it in its pixel
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int,
        blocks: int,
        scales: int,
        dropout: float,
        colours: int,
        head_width: int,
        vector: int = 0,
        maps: int = 0,
        save_memory: bool = False,
    ) -> None:
        super().__init__()
        self.save_memory, self.scales, self.blocks = save_memory, scales, blocks
        self.first_u = WeightNormConv2d(channels + 1, width, (2, 3), pad=(1, 1, 1, 0))
        self.first_above = WeightNormConv2d(channels + 1, width, (1, 3), pad=(1, 1, 0, 0))
        self.first_left = WeightNormConv2d(channels + 1, width, (2, 1), pad=(0, 0, 1, 0))

        def resnets(stream: dict, skips: int, many: int) -> nn.ModuleList:
            return nn.ModuleList(GatedResnet(width, stream, skips, dropout, vector, maps) for _ in range(many))

        back = [blocks + (scale < scales - 1) for scale in range(scales)]
        self.up_u = nn.ModuleList(resnets(ABOVE, 0, blocks) for _ in range(scales))
        self.up_ul = nn.ModuleList(resnets(LEFT, 1, blocks) for _ in range(scales))
        self.back_u = nn.ModuleList(resnets(ABOVE, 1, many) for many in back)
        self.back_ul = nn.ModuleList(resnets(LEFT, 2, many) for many in back)
        halvings = range(scales - 1)
        self.halve_u = nn.ModuleList(WeightNormConv2d(width, width, **ABOVE, stride=2) for _ in halvings)
        self.halve_ul = nn.ModuleList(WeightNormConv2d(width, width, **LEFT, stride=2) for _ in halvings)
        self.double_u = nn.ModuleList(
            WeightNormConv2d(width, width, (2, 3), pad=(1, 1, 0, 1), stride=2, transposed=True) for _ in halvings
        )
        self.double_ul = nn.ModuleList(
            WeightNormConv2d(width, width, (2, 2), pad=(0, 1, 0, 1), stride=2, transposed=True) for _ in halvings
        )
        self.head = ColourHead(width, channels, head_width, outputs) if colours > 1 else PlainHead(width, outputs)
        self.calibrated: Tensor
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor, vector: Tensor | None, maps: Sequence[Tensor]) -> Tensor:
        picture = torch.cat([x, torch.ones_like(x[:, :1])], 1)  # the ones tell the picture from its padding
        picture = picture.contiguous(memory_format=torch.channels_last)  # and so everything after it: 10 % faster
        u = down(self.first_u(picture))
        ul = down(self.first_above(picture)) + to_the_right(self.first_left(picture))
        us, uls = [u], [ul]
        for scale in range(self.scales):
            told = (vector, maps[scale] if maps else None)
            for block_u, block_ul in zip(self.up_u[scale], self.up_ul[scale], strict=True):  # type: ignore[call-overload]
                u = run(block_u, (us[-1], *told), self.save_memory)
                us.append(u)
                uls.append(run(block_ul, (uls[-1], *told, u), self.save_memory))
            if scale < self.scales - 1:
                us.append(self.halve_u[scale](us[-1]))
                uls.append(self.halve_ul[scale](uls[-1]))
        u, ul = us.pop(), uls.pop()
        for scale in reversed(range(self.scales)):
            told = (vector, maps[scale] if maps else None)
            for block_u, block_ul in zip(self.back_u[scale], self.back_ul[scale], strict=True):  # type: ignore[call-overload]
                u = run(block_u, (u, *told, us.pop()), self.save_memory)
                ul = run(block_ul, (ul, *told, u, uls.pop()), self.save_memory)
            if scale:
                u, ul = self.double_u[scale - 1](u), self.double_ul[scale - 1](ul)
        return self.head(ul, x)

    @torch.no_grad()
    def calibrate(self, x: Tensor, vector: Tensor | None, maps: Sequence[Tensor]) -> None:
        """Sets every g and b from one batch, once: what has been done is kept in a buffer, and so in checkpoints."""
        training = self.training
        self.eval()
        calibrate(self, True)
        try:
            self(x, vector, maps)
        finally:
            calibrate(self, False)
            self.train(training)
        self.calibrated.fill_(True)

    def steps(self, rows: int, size: tuple[int, int], vector: Tensor | None, maps: Sequence[Tensor]) -> PixelCnnPpSteps:
        """The same network a pixel at a time, for pictures of `size` (H, W)."""
        from condgen.nn.pixelcnnpp_steps import PixelCnnPpSteps

        return PixelCnnPpSteps(self, rows, size, vector, maps)


class PlainHead(nn.Module):
    """elu, then a 1x1 convolution to the parameters."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.out = WeightNormConv2d(width, outputs)

    def forward(self, ul: Tensor, x: Tensor) -> Tensor:
        return self.out(F.elu(ul))


class ColourHead(nn.Module):
    """Logits of each colour from ul and from the colours before it in its own pixel: what a softmax needs.

    ReLU(1x1(elu(ul)) + 1x1 A(x)), then 1x1 B.
    """

    def __init__(self, width: int, colours: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.features = WeightNormConv2d(width, hidden)
        self.own = CausalConv2d(colours, hidden, kind="A", colours=colours, bias=False)
        self.out = CausalConv2d(hidden, outputs, colours=colours)

    def forward(self, ul: Tensor, x: Tensor) -> Tensor:
        return self.out(F.relu(self.features(F.elu(ul)) + self.own(x)))
