"""Networks of AC-GAN (Odena et al. 2017, arXiv:1610.09585) and DCGAN (Radford et al. 2015, arXiv:1511.06434).

"acgan"  G: linear layer with ReLU, then 5x5 transposed convolutions of stride 2. D: six 3x3 convolutions of strides
         2, 1, 2, 1, 2, 1. At 128 px the paper's table gives the linear layer "768 feature maps" and four doublings
         without a start size: 768 maps of 8x8 are the reading taken here, with padding that doubles exactly. 32 px:
         384 maps of 4x4 and three doublings. 64 px is mentioned without a table: 128 px with one doubling fewer;
         16 px is 32 px with one fewer.
"dcgan"  G and D of 4x4 convolutions without biases between 4x4 and the picture, as in the authors' Torch release:
         widths 512, 256, 128, 64 at 64 px, one doubling fewer at 32 px.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from condgen.errors import ConfigError
from condgen.nn import reed
from condgen.nn.initialise import initialise

ACGAN_GENERATOR = {  # side -> (start side, widths); the last doubling goes to pixels
    16: (4, (384, 192)),
    32: (4, (384, 192, 96)),
    64: (8, (768, 384, 256)),
    128: (8, (768, 384, 256, 192)),
}
ACGAN_DISCRIMINATOR = (16, 32, 64, 128, 256, 512)
DCGAN_WIDTH = 64


def initialise_all(module: nn.Module) -> None:
    """Weights N(0, 0.02) and biases 0, linear layers included; batch norm weight N(1, 0.02)."""
    initialise(module)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ActivationNoise(nn.Module):
    """Adds N(0, std^2) in training (Salimans et al. 2016, arXiv:1606.03498)."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        return x + self.std * torch.randn_like(x) if self.training else x


def generator(architecture: str, inputs: int, side: int, channels: int, scale: float) -> nn.Sequential:
    """(B, inputs) -> (B, channels, side, side) in [-1, 1]. ConfigError for a side without published shapes."""
    layers: list[nn.Module]
    if architecture == "acgan":
        if side not in ACGAN_GENERATOR:
            sides = ", ".join(map(str, ACGAN_GENERATOR))
            raise ConfigError(f"architecture=acgan knows {sides} px, not {side}; choose system.architecture=dcgan")
        start, published = ACGAN_GENERATOR[side]
        widths = [_scaled(width, scale) for width in published]
        layers = [nn.Linear(inputs, widths[0] * start**2), nn.Unflatten(1, (widths[0], start, start)), reed.relu()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.ConvTranspose2d(before, after, 5, 2, 2, 1), nn.BatchNorm2d(after), reed.relu()]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 5, 2, 2, 1), nn.Tanh()]
    else:
        widths = _dcgan_widths(side, scale)[::-1]
        layers = [nn.Unflatten(1, (inputs, 1, 1)), nn.ConvTranspose2d(inputs, widths[0], 4, bias=False)]
        for before, after in itertools.pairwise(widths):
            layers += [nn.BatchNorm2d(before), reed.relu(), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(widths[-1]), reed.relu()]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.Sequential(*layers).apply(initialise_all)


def trunk(
    architecture: str,
    channels: int,
    side: int,
    scale: float,
    *,
    batchnorm: bool = True,
    dropout: float = 0.5,
    activation_noise: float = 0.0,
) -> nn.Sequential:
    """(B, channels, side, side) -> D's last feature map: side / 8 wide ("acgan") or 4x4 ("dcgan").

    `dropout` and `activation_noise` belong to "acgan". No batch norm after the first convolution of either.
    """
    layers: list[nn.Module] = []
    before = channels
    for i, after in enumerate(_trunk_widths(architecture, side, scale)):
        norm = batchnorm and i > 0
        if architecture == "acgan":
            layers.append(nn.Conv2d(before, after, 3, 2 - i % 2, 1))
        else:
            layers.append(nn.Conv2d(before, after, 4, 2, 1, bias=not batchnorm))
        layers += [nn.BatchNorm2d(after)] if norm else []
        layers.append(reed.leaky())
        if architecture == "acgan":
            layers += [ActivationNoise(activation_noise)] if activation_noise else []
            layers += [nn.Dropout(dropout)] if dropout else []
        before = after
    return nn.Sequential(*layers).apply(initialise_all)


def head(architecture: str, body: nn.Sequential, side: int, outputs: int) -> nn.Module:
    """D's last feature map -> (B, outputs) or (B, outputs, 1, 1)."""
    last: nn.Module
    if architecture == "acgan":
        last = nn.Sequential(nn.Flatten(), nn.Linear(features(body) * (side // 8) ** 2, outputs))
    else:
        last = nn.Conv2d(features(body), outputs, 4, bias=False)
    return last.apply(initialise_all)


def features(body: nn.Sequential) -> int:
    """Channels of a trunk's output."""
    return [layer for layer in body if isinstance(layer, nn.Conv2d)][-1].out_channels


def _trunk_widths(architecture: str, side: int, scale: float) -> list[int]:
    if architecture == "acgan":
        return [_scaled(width, scale) for width in ACGAN_DISCRIMINATOR]
    return _dcgan_widths(side, scale)


def _dcgan_widths(side: int, scale: float) -> list[int]:
    """From the picture inwards; 64, 128, 256, ... doubling up to 1,024."""
    return [_scaled(DCGAN_WIDTH * min(2**i, 16), scale) for i in range(int(math.log2(side)) - 2)]


def _scaled(width: int, scale: float) -> int:
    return max(1, round(width * scale))
