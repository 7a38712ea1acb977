"""A small convolutional encoder from pictures to vectors: the image side of joint embeddings and of evaluators."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from condgen.errors import ConfigError

LAST = 4  # side of the last feature map


class ImageTower(nn.Module):
    """Strided convolutions with batch norm down to 4x4, then a linear layer.

    Pictures of another side are resized to `size` first (bilinear, antialiased).
    Shapes: float (B, channels, H, W) in [-1, 1] -> (B, dim).
    """

    def __init__(self, *, channels: int, dim: int, width: int = 32, size: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.size = size
        layers: list[nn.Module] = []
        now = channels
        for stage in range(halvings(size)):
            out = width * min(2**stage, 8)
            layers += [nn.Conv2d(now, out, 4, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            now = out
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(now * LAST * LAST, dim))

    def features(self, images: Tensor) -> Tensor:
        """What the last linear layer sees, (B, d)."""
        return self.convolutions(resize(images, self.size)).flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        """`features` (B, d) -> (B, dim)."""
        return self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.convolutions(resize(images, self.size)))


def halvings(size: int) -> int:
    """How often a square of `size` pixels is halved until 4 are left. Raises ConfigError."""
    count = math.log2(size / LAST) if size > 0 else 0
    if count < 1 or count != int(count):
        raise ConfigError(f"a tower of size {size} is not possible; give 8, 16, 32, 64, 128 ...")
    return int(count)


def resize(images: Tensor, size: int) -> Tensor:
    """Float pictures (B, C, H, W) as squares of `size` pixels; unchanged when they already are."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
