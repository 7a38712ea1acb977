"""Networks of coverage and quality driven training: decoders, encoders and discriminators, plain and residual.

No layers are published for it. Plain ones have the shapes of the CNN of Miyato et al. 2018 (SN-GAN, arXiv:1802.05957),
residual ones those of its ResNet, and encoders mirror the decoders. Two differences: group norm stands for batch norm,
since a decoder meets z of q(z | x) in one loss and of p(z) in the other and must be one function of z; and the number
of halvings follows the side (32 px: three, to 4x4).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.nn.initialise import add_spectral_norm
from condgen.nn.vae_nets import MOST_WIDER, Trunk, VectorDecoder, VectorEncoder, conv_encoder, halvings

GROUPS = 8
HIDDEN = 256  # units between a residual encoder's last maps and its heads
EXTRA_BLOCKS = 2  # of the large residual discriminator


def encoder(
    shape: Sequence[int], given: int, latent: int, *, width: int, context: int, residual: bool
) -> VectorEncoder:
    """q(z | x, c) of pictures `shape` (C, H, W): see `VectorEncoder`. residual: blocks of 2, 4, 4, ... widths."""
    if not residual:
        return conv_encoder(shape, given, latent, width=width, context=context)
    channels, height, side = shape
    count = max(halvings(height, side), 1)  # the first block halves
    widths = [2 * width, *[4 * width] * (count - 1)]
    body = nn.Sequential(*_downs(channels, widths), nn.ReLU())
    flat = widths[-1] * (height // 2**count) * (side // 2**count)
    return VectorEncoder(Trunk(body, flat, given, HIDDEN, nn.ELU()), latent, context)


def decoder(
    shape: Sequence[int], given: int, latent: int, *, width: int, outputs: int, residual: bool
) -> VectorDecoder:
    """(R, latent) and (R, given) -> `outputs` raw maps of the size of `shape` (C, H, W).

    width: maps next to the picture, doubled inwards; residual: a quarter of the maps everywhere.
    """
    _, height, side = shape
    count = halvings(height, side)
    size = (height // 2**count, side // 2**count)
    widths = [4 * width] * (count + 1) if residual else [width * min(2**i, MOST_WIDER) for i in range(count + 1)][::-1]
    layers: list[nn.Module] = [
        nn.Linear(latent + given, widths[0] * math.prod(size)),
        nn.Unflatten(1, (widths[0], *size)),
    ]
    for before, after in itertools.pairwise(widths):
        layers += [Up(before, after)] if residual else [
            _norm(before), nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1)
        ]  # fmt: skip
    last = nn.Conv2d(widths[-1], outputs, 3, 1, 1)
    with torch.no_grad():  # predicted log scales start at one value, so that means learn first
        last.weight[shape[0] :].zero_()
        last.bias[shape[0] :].zero_()  # type: ignore[index]
    layers += [_norm(widths[-1]), nn.ReLU(), last]
    return VectorDecoder(nn.Sequential(*layers))


class Discriminator(nn.Module):
    """Pixels (B, C, H, W) and condition (B, V) or None -> logits (B,), spectral norm on every layer, no other.

    residual   blocks of 2 widths, features summed over positions; else 3x3 and strided 4x4 convolutions by turns
    large      twice the maps and, where residual, two more blocks that keep the size
    given      V: the logit gains <W vector, features summed over positions> (Miyato, Koyama 2018, arXiv:1802.05637)
    """

    def __init__(self, shape: Sequence[int], given: int, *, width: int, residual: bool, large: bool) -> None:
        super().__init__()
        channels, height, side = shape
        count, wide = halvings(height, side), width * (2 if large else 1)
        layers: list[nn.Module] = []
        if residual:
            maps, downs = 2 * wide, max(count - 1, 1)
            layers += _downs(channels, [maps] * downs)
            layers += [Block(maps, maps, down=False) for _ in range(2 + (EXTRA_BLOCKS if large else 0))]
            layers += [nn.ReLU()]
            flat = maps
        else:
            widths = [wide * min(2**i, MOST_WIDER) for i in range(count + 1)]
            for before, after in zip([channels, *widths], widths[:-1], strict=False):
                layers += [nn.Conv2d(before, after, 3, 1, 1), nn.LeakyReLU(0.1)]
                layers += [nn.Conv2d(after, after, 4, 2, 1), nn.LeakyReLU(0.1)]
            layers += [nn.Conv2d(widths[-2], widths[-1], 3, 1, 1), nn.LeakyReLU(0.1)]
            maps = widths[-1]
            flat = maps * (height // 2**count) * (side // 2**count)
        self.residual = residual
        self.trunk, self.head = nn.Sequential(*layers), nn.Linear(flat, 1)
        self.match = nn.Linear(given, maps, bias=False) if given else None
        add_spectral_norm(self)

    def forward(self, pixels: Tensor, given: Tensor | None = None) -> Tensor:
        features = self.trunk(pixels)
        summed = features.sum((2, 3))
        logits = self.head(summed if self.residual else features.flatten(1))[:, 0]
        if self.match is not None:
            logits = logits + (self.match(given) * summed).sum(1)
        return logits.float()


class Block(nn.Module):
    """Residual block without norm: [ReLU] conv ReLU conv, halved by means where `down`; the shortcut likewise.

    first: no ReLU in front, since the input is the picture.
    """

    def __init__(self, before: int, after: int, *, down: bool, first: bool = False) -> None:
        super().__init__()
        self.down, self.first = down, first
        self.one, self.two = nn.Conv2d(before, after, 3, 1, 1), nn.Conv2d(after, after, 3, 1, 1)
        self.shortcut = nn.Conv2d(before, after, 1) if down or before != after else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.two(F.relu(self.one(x if self.first else F.relu(x))))
        if self.down:  # 1x1 convolutions and means commute
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h + (x if self.shortcut is None else self.shortcut(x))


class Up(nn.Module):
    """Residual block that doubles the size: norm ReLU up conv norm ReLU conv; the shortcut is up and a 1x1 conv."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm_one, self.one = _norm(before), nn.Conv2d(before, after, 3, 1, 1)
        self.norm_two, self.two = _norm(after), nn.Conv2d(after, after, 3, 1, 1)
        self.shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(_doubled(F.relu(self.norm_one(x))))
        return self.two(F.relu(self.norm_two(h))) + _doubled(self.shortcut(x))


def _downs(channels: int, widths: Sequence[int]) -> list[nn.Module]:
    every = zip([channels, *widths], widths, strict=False)
    return [Block(before, after, down=True, first=i == 0) for i, (before, after) in enumerate(every)]


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
