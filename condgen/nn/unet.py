"""Image-to-image generators: U-Net, encoder-decoder and ResNet of pix2pix, as functions of tensors.

Isola, Zhu, Zhou, Efros 2017, arXiv:1611.07004; the ResNet is Johnson et al. 2016, arXiv:1603.08155, as CycleGAN uses
it. Noise comes in as masks, never from dropout layers, so what a network does does not depend on train() or eval().
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.nn.initialise import initialise

NormKind = Literal["batch", "instance"]
Statistics = Literal["image", "running"]


class BatchNorm(nn.Module):
    """Batch norm whose evaluation is named: statistics "image" normalise each picture by its own mean and variance,
    which is what a batch of one does in training; "running" by the averages of the training."""

    def __init__(self, width: int, statistics: Statistics) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.statistics = statistics

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if self.training or self.statistics == "running":
            return norm(x)
        # picture by picture: group norm with a group per channel takes 10 to 100 times longer on maps of 16 px
        rows = [F.batch_norm(row, None, None, norm.weight, norm.bias, True, eps=norm.eps) for row in x.split(1)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def normalisation(width: int, kind: NormKind | Literal["none"], statistics: Statistics = "image") -> nn.Module:
    """Instance norm has no parameters and no running statistics, as published."""
    if kind == "none":
        return nn.Identity()
    return BatchNorm(width, statistics) if kind == "batch" else nn.InstanceNorm2d(width)


class UNet(nn.Module):
    """x (B, M, H, W) -> (B, C, H, W) in [-1, 1]; H and W multiples of 2^levels. skips False = encoder-decoder.

    levels        halvings; 8 is the published U-Net-256, 7 U-Net-128
    width         channels of the first level; they double up to 8 times that
    noise_blocks  decoder blocks, 1 = after the bottleneck, whose output is multiplied by a mask

    The bottleneck has no norm: it is 1 x 1 at the published size, which any statistics over space would set to 0.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        levels: int = 8,
        width: int = 64,
        norm: NormKind = "batch",
        statistics: Statistics = "image",
        skips: bool = True,
        noise_blocks: Sequence[int] = (1, 2, 3),
    ) -> None:
        super().__init__()
        self.skips, self.noise_blocks = skips, tuple(sorted(noise_blocks))
        self.multiple = 2**levels
        bias = norm == "instance"  # batch norm takes it out again
        self.widths = [width * min(2**i, 8) for i in range(levels)]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (before, after) in enumerate(itertools.pairwise([inputs, *self.widths])):
            normed = [normalisation(after, norm, statistics)] if 0 < i < levels - 1 else []
            self.down.append(nn.Sequential(nn.Conv2d(before, after, 4, 2, 1, bias=bias), *normed))
        for i, (before, after) in enumerate(itertools.pairwise([*reversed(self.widths), outputs])):
            doubled = before * (2 if skips and i > 0 else 1)
            last = i == levels - 1
            normed = [] if last else [normalisation(after, norm, statistics)]
            self.up.append(nn.Sequential(nn.ConvTranspose2d(doubled, after, 4, 2, 1, bias=bias or last), *normed))
        self.apply(initialise)

    def noise_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """(channels, h, w) of every mask that `forward` takes for pictures of this size."""
        out = []
        for block in self.noise_blocks:
            scale = 2 ** (len(self.widths) - block)
            out.append((self.widths[-block - 1], height // scale, width // scale))
        return out

    def forward(self, x: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        noise = dict(zip(self.noise_blocks, masks, strict=False))
        passed: list[Tensor] = []
        for i, down in enumerate(self.down):
            x = down(x)
            if i < len(self.down) - 1:  # in place: the ReLU of a skip is the same before and after a leaky ReLU
                x = F.leaky_relu(x, 0.2, inplace=True)
            passed.append(x)
        for i, up in enumerate(self.up):
            x = torch.cat([x, passed[-1 - i]], dim=1) if self.skips and i else x
            x = up(F.relu(x, inplace=True))
            x = x * noise[i + 1].to(x.dtype) if i + 1 in noise else x
        return torch.tanh(x)


class ResNet(nn.Module):
    """x (B, M, H, W) -> (B, C, H, W) in [-1, 1] through `blocks` residual blocks at a quarter of the size.

    H and W are multiples of 4 and at least 8. With noise, one mask between the two convolutions of every block.
    """

    multiple = 4

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        blocks: int = 9,
        width: int = 64,
        norm: NormKind = "batch",
        statistics: Statistics = "image",
        noise: bool = True,
    ) -> None:
        super().__init__()
        bias = norm == "instance"
        self.inner, self.noise = 4 * width, noise

        def normed(channels: int) -> list[nn.Module]:
            return [normalisation(channels, norm, statistics), nn.ReLU(inplace=True)]

        head: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(inputs, width, 7, bias=bias), *normed(width)]
        for before, after in ((width, 2 * width), (2 * width, 4 * width)):
            head += [nn.Conv2d(before, after, 3, 2, 1, bias=bias), *normed(after)]
        self.head = nn.Sequential(*head)
        self.blocks = nn.ModuleList(_Residual(self.inner, norm, statistics) for _ in range(blocks))
        tail: list[nn.Module] = []
        for before, after in ((4 * width, 2 * width), (2 * width, width)):
            tail += [nn.ConvTranspose2d(before, after, 3, 2, 1, output_padding=1, bias=bias), *normed(after)]
        self.tail = nn.Sequential(*tail, nn.ReflectionPad2d(3), nn.Conv2d(width, outputs, 7), nn.Tanh())
        self.apply(initialise)

    def noise_shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """(channels, h, w) of every mask that `forward` takes for pictures of this size."""
        return [(self.inner, height // 4, width // 4)] * len(self.blocks) if self.noise else []

    def forward(self, x: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        x = self.head(x)
        for i, block in enumerate(self.blocks):
            x = block(x, masks[i] if masks else None)
        return self.tail(x)


class _Residual(nn.Module):
    """x + [conv, norm, ReLU, mask, conv, norm], with reflected borders."""

    def __init__(self, width: int, norm: NormKind, statistics: Statistics) -> None:
        super().__init__()
        bias = norm == "instance"
        pad = nn.ReflectionPad2d(1)
        self.first = nn.Sequential(
            pad, nn.Conv2d(width, width, 3, bias=bias), normalisation(width, norm, statistics), nn.ReLU(inplace=True)
        )
        self.second = nn.Sequential(
            pad, nn.Conv2d(width, width, 3, bias=bias), normalisation(width, norm, statistics)
        )  # fmt: skip

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        inner = self.first(x)
        return x + self.second(inner if mask is None else inner * mask.to(inner.dtype))
