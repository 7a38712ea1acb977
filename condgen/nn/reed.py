"""The networks of Reed et al. 2016 (arXiv:1605.05396), layer for layer as the authors released them.

Convolution biases are kept, as in the release, although batch norm follows most of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from condgen.errors import ShapeError
from condgen.nn.initialise import add_spectral_norm, initialise


def expect_two_rows(rows: int) -> None:
    """Batch norm of 1 x 1 maps or vectors has no spread over one row. Raises ShapeError."""
    if rows < 2:
        raise ShapeError(f"training with batch norm needs at least 2 rows a batch; got {rows}. Set train.batch_size=2")


class Bottleneck(nn.Module):
    """x + [1x1 to `narrow`, 3x3, 3x3 back], each with batch norm; the activation follows the sum."""

    def __init__(self, width: int, narrow: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, narrow, 1), nn.BatchNorm2d(narrow), activation(),
            nn.Conv2d(narrow, narrow, 3, padding=1), nn.BatchNorm2d(narrow), activation(),
            nn.Conv2d(narrow, width, 3, padding=1), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.body(x))


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def leaky() -> nn.Module:
    return nn.LeakyReLU(0.2, inplace=True)


class Generator(nn.Module):
    """noise (B, Z) and the condition's vector (B, V) -> (B, C, S, S) in [-1, 1]; S = 64 as published."""

    def __init__(
        self, vector_dim: int, side: int, channels: int, width: int, noise_dim: int, condition_dim: int
    ) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(vector_dim, condition_dim), nn.LeakyReLU(0.2))
        stages = int(math.log2(side)) - 3  # upsamplings between 4 x 4 and side / 2
        widths = [width * 2 ** max(stages - i, 0) for i in range(stages + 1)]  # 8, 4, 2, 1 x ngf at 64 px
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(noise_dim + condition_dim, widths[0], 4),
            nn.BatchNorm2d(widths[0]),
        ]
        layers.append(Bottleneck(widths[0], widths[0] // 4, relu))
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.BatchNorm2d(after)]
            layers.append(Bottleneck(after, after // 4, relu) if i == 0 else relu())
        layers += [nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1), nn.Tanh()]
        self.body = nn.Sequential(*layers)
        self.apply(initialise)

    def forward(self, noise: Tensor, vector: Tensor) -> Tensor:
        code = self.project(vector)
        return self.body(torch.cat([noise.to(code.dtype), code], dim=1)[:, :, None, None])


class Discriminator(nn.Module):
    """pixels (B, C, S, S) and the condition's vector (B, V) -> logits (B,)."""

    def __init__(
        self,
        vector_dim: int,
        side: int,
        channels: int,
        width: int,
        condition_dim: int,
        *,
        text_batchnorm: bool = True,
        trunk_activation: bool = False,
        projection: bool = False,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        norm = [nn.BatchNorm1d(condition_dim)] if text_batchnorm else []
        self.project = nn.Sequential(nn.Linear(vector_dim, condition_dim), *norm, nn.LeakyReLU(0.2))
        stages = int(math.log2(side)) - 2  # halvings down to 4 x 4
        widths = [width * 2**i for i in range(stages)]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1), leaky()]
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.BatchNorm2d(after)]
            last, third = i == stages - 2, i == stages - 3
            if last:
                layers.append(Bottleneck(after, after // 4, leaky))
            elif not third or trunk_activation:
                layers.append(leaky())
        self.trunk = nn.Sequential(*layers)
        top = widths[-1]
        self.joint = nn.Sequential(nn.Conv2d(top + condition_dim, top, 1), nn.BatchNorm2d(top), leaky())
        self.score = nn.Conv2d(top, 1, 4)
        self.match = nn.Linear(vector_dim, top, bias=False) if projection else None
        self.apply(initialise)
        if spectral_norm:
            add_spectral_norm(self)

    def forward(self, pixels: Tensor, vector: Tensor) -> Tensor:
        features = self.trunk(pixels)
        code = self.project(vector)[:, :, None, None].expand(-1, -1, 4, 4)
        joint = self.joint(torch.cat([features, code.to(features.dtype)], dim=1))
        logits = self.score(joint).flatten()
        if self.match is not None:
            logits = logits + (self.match(vector) * features.mean((2, 3))).sum(1)
        return logits


class StyleEncoder(nn.Module):
    """pixels (B, C, S, S) -> z (B, Z): D's trunk with ReLU and a linear output. The paper gives no layers;
    this is its description ("convolutional network") in D's shape."""

    def __init__(self, side: int, channels: int, width: int, noise_dim: int) -> None:
        super().__init__()
        widths = [channels, *[width * 2**i for i in range(int(math.log2(side)) - 2)]]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), relu()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, noise_dim))
        self.apply(initialise)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body(pixels)
