"""Compact matching-aware networks for CPUs: the same inputs and outputs as `condgen.nn.reed`, about a fifth of
the arithmetic. G modulates every resolution with noise and condition; D has no batch norm.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.nn.initialise import add_spectral_norm
from condgen.nn.reed import leaky


def whiten(vector: Tensor) -> Tensor:
    """Zero mean and unit variance along each row (B, V).

    Sentence encoders give unit vectors, whose entries are about 1 / sqrt(V): beside noise of unit variance the
    condition would start out nearly invisible.
    """
    return F.layer_norm(vector, vector.shape[-1:])


class ModulatedNorm(nn.Module):
    """Batch norm without affine, then (1 + gamma(code)) x + beta(code): conditional batch norm
    (de Vries et al. 2017, arXiv:1707.00683)."""

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.affine = nn.Linear(code, 2 * width)
        nn.init.normal_(self.affine.weight, 0.0, 0.02)
        nn.init.zeros_(self.affine.bias)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        gamma, beta = self.affine(code)[:, :, None, None].to(x.dtype).chunk(2, dim=1)
        return torch.addcmul(beta, self.norm(x), 1 + gamma)


class UpBlock(nn.Module):
    """Doubles the side: transposed convolution, modulated norm, ReLU.

    Kernel 4 at stride 2 covers every output evenly and costs 2.25 times less than upsampling before a 3x3.
    """

    def __init__(self, before: int, after: int, code: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)
        self.norm = ModulatedNorm(after, code)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x), code))


class Generator(nn.Module):
    """noise (B, Z) and the condition's vector (B, V) -> (B, C, S, S) in [-1, 1].

    The last doubling repeats pixels before a 3x3 convolution to colours, which leaves no checkerboard.
    """

    def __init__(
        self, vector_dim: int, side: int, channels: int, width: int, noise_dim: int, condition_dim: int
    ) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(vector_dim, condition_dim), nn.LeakyReLU(0.2))
        code = noise_dim + condition_dim
        stages = int(math.log2(side)) - 3
        widths = [min(width * 2 ** (stages - i), width * 4) for i in range(stages + 1)]
        self.start = nn.Linear(code, widths[0] * 16)
        self.first = widths[0]
        self.blocks = nn.ModuleList(UpBlock(a, b, code) for a, b in itertools.pairwise(widths))
        self.paint = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Tanh()
        )

    def forward(self, noise: Tensor, vector: Tensor) -> Tensor:
        code = self.project(whiten(vector))
        code = torch.cat([noise.to(code.dtype), code], dim=1)
        x = self.start(code).view(len(code), self.first, 4, 4)
        for block in self.blocks:
            x = block(x, code)
        return self.paint(x)


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
        projection: bool = False,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(vector_dim, condition_dim), nn.LeakyReLU(0.2))
        halvings = int(math.log2(side)) - 2  # down to 4 x 4
        widths = [min(width * 2**i, width * 8) for i in range(halvings)]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1), leaky()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1), leaky()]
        self.trunk = nn.Sequential(*layers)
        top = widths[-1]
        self.joint = nn.Sequential(nn.Conv2d(top + condition_dim, top, 1), leaky())
        self.score = nn.Conv2d(top, 1, 4)
        self.match = nn.Linear(vector_dim, top, bias=False) if projection else None
        if spectral_norm:
            add_spectral_norm(self)

    def forward(self, pixels: Tensor, vector: Tensor) -> Tensor:
        vector = whiten(vector)
        features = self.trunk(pixels)
        code = self.project(vector)[:, :, None, None].expand(-1, -1, 4, 4)
        joint = self.joint(torch.cat([features, code.to(features.dtype)], dim=1))
        logits = self.score(joint).flatten()
        if self.match is not None:
            logits = logits + (self.match(vector) * features.sum((2, 3))).sum(1)
        return logits
