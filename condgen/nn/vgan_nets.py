"""The networks of VGAN: a stream of moving pixels with its mask, a stream of one still picture, and a 3-D critic.

Vondrick, Pirsiavash, Torralba 2016, arXiv:1609.02612, as released: 64 px and 32 frames. Here for squares of 8, 16, 32,
... px and any number of frames: each level doubles the side, and the number of frames as long as that can be halved.
Kernels are time x height x width; clips inside are (B, C, T, H, W).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from condgen.nn.matrix_conv import Conv2d, Conv3d, ConvTranspose2d, ConvTranspose3d

CRITIC_EPS = 1e-3  # of batch norm in the critic and in the encoder, as released


class Size(NamedTuple):
    """levels: doublings of the side, from 4 px; first: frames before the first level; doubled: levels that double T."""

    levels: int
    first: int
    doubled: int

    @staticmethod
    def of(side: int, frames: int) -> Size:
        levels = (side // 4).bit_length() - 1
        doubled = min(levels, (frames & -frames).bit_length() - 1)
        return Size(levels, frames >> doubled, doubled)


class Streams(NamedTuple):
    """What a generator makes. video, foreground (B, C, T, H, W); mask (B, 1, T, H, W) in (0, 1); background
    (B, C, 1, H, W). Mask and background are None with one stream."""

    video: Tensor
    foreground: Tensor
    mask: Tensor | None
    background: Tensor | None


def compose(foreground: Tensor, mask: Tensor, background: Tensor) -> Tensor:
    """m f + (1 - m) b: the mask is shared by the colours, the background by the frames."""
    return mask * foreground + (1 - mask) * background


def up3(inputs: int, outputs: int, *, in_time: bool) -> nn.ConvTranspose3d:
    """Doubles the side, and the frames too where `in_time`."""
    return ConvTranspose3d(inputs, outputs, (4 if in_time else 3, 4, 4), (2 if in_time else 1, 2, 2), 1)


def down3(inputs: int, outputs: int, *, in_time: bool) -> nn.Conv3d:
    return Conv3d(inputs, outputs, (4 if in_time else 3, 4, 4), (2 if in_time else 1, 2, 2), 1)


class Moving(nn.Module):
    """A code -> foreground (B, C, T, S, S) in [-1, 1] and, where asked for, its mask (B, 1, T, S, S) in (0, 1).

    from_map   the code is (B, inputs, 1, 4, 4) and not (B, inputs, 1, 1, 1)
    """

    def __init__(self, inputs: int, channels: int, size: Size, width: int, *, mask: bool, from_map: bool) -> None:
        super().__init__()
        wide = width << (size.levels - 1)
        side = 1 if from_map else 4
        layers: list[nn.Module] = [ConvTranspose3d(inputs, wide, (size.first, side, side)), *norm3(wide)]
        still = size.levels - size.doubled  # levels that leave the number of frames alone come first
        for level in range(size.levels - 1):
            layers += [up3(wide, wide // 2, in_time=level >= still), *norm3(wide // 2)]
            wide //= 2
        self.body = nn.Sequential(*layers)
        last = size.doubled > 0
        self.foreground = up3(wide, channels, in_time=last)
        self.mask = up3(wide, 1, in_time=last) if mask else None

    def forward(self, code: Tensor) -> tuple[Tensor, Tensor | None]:
        body, head = self.body(code), self.foreground
        if self.mask is None:
            return torch.tanh(head(body)), None
        assert head.bias is not None and self.mask.bias is not None
        # one convolution of both, which reads the body once; then channel by channel, as colours share the mask
        weight, bias = torch.cat([head.weight, self.mask.weight], 1), torch.cat([head.bias, self.mask.bias])
        both = F.conv_transpose3d(body, weight, bias, head.stride, padding=1).contiguous()
        foreground, mask = both.split([head.out_channels, 1], 1)
        return torch.tanh(foreground), torch.sigmoid(mask)


class Still(nn.Module):
    """A code -> one picture (B, C, S, S) in [-1, 1]; the code is (B, inputs, 1, 1), or with `from_map` of 4 x 4."""

    def __init__(self, inputs: int, channels: int, size: Size, width: int, *, from_map: bool) -> None:
        super().__init__()
        wide = width << (size.levels - 1)
        layers: list[nn.Module] = [] if from_map else [ConvTranspose2d(inputs, wide, 4), *norm2(wide)]
        inputs = inputs if from_map else wide
        for _ in range(size.levels - 1):
            layers += [ConvTranspose2d(inputs, wide // 2, 4, 2, 1), *norm2(wide // 2)]
            inputs = wide = wide // 2
        self.body = nn.Sequential(*layers, ConvTranspose2d(inputs, channels, 4, 2, 1), nn.Tanh())

    def forward(self, code: Tensor) -> Tensor:
        out: Tensor = self.body(code)
        return out


class Encoder(nn.Module):
    """A picture (B, inputs, S, S) -> a code (B, width * 2 ** (levels - 1), 4, 4)."""

    def __init__(self, inputs: int, size: Size, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [Conv2d(inputs, width, 4, 2, 1), nn.ReLU(inplace=True)]
        for _ in range(size.levels - 1):
            layers += [Conv2d(width, 2 * width, 4, 2, 1), *norm2(2 * width, CRITIC_EPS)]
            width *= 2
        self.body = nn.Sequential(*layers)
        self.width = width

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.body(pixels)
        return out


class Trunk(nn.Module):
    """The critic without its last layer: clips (B, C, T, S, S) -> features (B, width * 2 ** (levels - 1), first, 4, 4).
    What it has learned about motion serves action recognition, see `condgen.metrics.actions`."""

    def __init__(self, channels: int, size: Size, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [down3(channels, width, in_time=size.doubled > 0), nn.LeakyReLU(0.2, inplace=True)]
        for level in range(1, size.levels):
            layers += [
                down3(width, 2 * width, in_time=level < size.doubled),
                nn.BatchNorm3d(2 * width, CRITIC_EPS),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            width *= 2
        self.body = nn.Sequential(*layers)
        self.width, self.first = width, size.first

    def forward(self, clip: Tensor) -> Tensor:
        out: Tensor = self.body(clip)
        return out

    def head(self, outputs: int) -> nn.Conv3d:
        """A layer that turns the features into (B, outputs, 1, 1, 1)."""
        return Conv3d(self.width, outputs, (self.first, 4, 4))


def norm3(width: int) -> list[nn.Module]:
    return [nn.BatchNorm3d(width), nn.ReLU(inplace=True)]


def norm2(width: int, eps: float = 1e-5) -> list[nn.Module]:
    return [nn.BatchNorm2d(width, eps), nn.ReLU(inplace=True)]


def initialise(module: nn.Module) -> None:
    """As released: convolutions N(0, 0.01) with bias 0, batch norm weight N(1, 0.02)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Conv3d | nn.ConvTranspose3d):
        nn.init.normal_(module.weight, 0.0, 0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
