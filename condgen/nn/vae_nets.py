"""Encoders and decoders of latent vectors: picture -> moments of q(z | x), z -> maps of p(x | z).

"mlp"   one hidden tanh layer each (Kingma, Welling 2013, arXiv:1312.6114): 815,824 parameters at 28 x 28, 500 units,
        20 latents
"conv"  4x4 convolutions of stride 2 between the picture and its smallest even division (4x4 for 16, 32, 64, 128 px;
        7x7 for 28 px), ELU, widths doubling inwards. No norm: decoders see z of q in training and of p when sampling
A condition vector (B, V), if any, is concatenated to the features of the encoder and to z.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from condgen.errors import ShapeError

MOST_WIDER = 8  # the innermost layer has at most this many times the outermost width


def halvings(height: int, width: int, smallest: int = 4) -> int:
    """How often both sides can be halved without falling below `smallest`. ShapeError where more than 16 px remain."""
    count = 0
    while height % 2 == 0 and width % 2 == 0 and min(height, width) >= 2 * smallest:
        height, width, count = height // 2, width // 2, count + 1
    if max(height, width) > 16:
        raise ShapeError(
            f"a side that can be halved down to 16 px or less is needed, such as 16, 28, 32, 48, 64 or 128; after "
            f"{count} halvings {height} x {width} px remain. Change data.size, or use system.architecture=mlp"
        )
    return count


class Trunk(nn.Module):
    """Picture (B, C, H, W) and condition (B, V) -> features (B, width).

    body    picture -> (B, `flat`) after flattening
    The condition passes the last layer together with the features, so that they can act on each other.
    """

    def __init__(self, body: nn.Module, flat: int, given: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.width = body, width
        self.joint = nn.Sequential(nn.Linear(flat + given, width), activation)

    def forward(self, pixels: Tensor, given: Tensor | None) -> Tensor:
        return self.joint(joined(self.body(pixels).flatten(1), given))


class VectorEncoder(nn.Module):
    """q(z | x, c): mean and log standard deviation (B, D) in float32, and a context (B, context) or None.

    log standard deviations are clamped to [-7, 5].
    """

    def __init__(self, trunk: Trunk, latent: int, context: int = 0) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.Linear(trunk.width, 2 * latent)
        self.context = nn.Linear(trunk.width, context) if context else None

    def forward(self, pixels: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        features = self.trunk(pixels, given)
        mean, log_std = self.heads(features).float().chunk(2, dim=1)
        return mean, log_std.clamp(-7, 5), None if self.context is None else self.context(features)


class VectorDecoder(nn.Module):
    """z (R, D) and condition (R, V) -> raw maps (R, outputs, H, W)."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, latent: Tensor, given: Tensor | None = None) -> Tensor:
        return self.body(joined(latent, given))


def conv_encoder(
    shape: Sequence[int], given: int, latent: int, *, width: int, context: int = 0, hidden: int = 256
) -> VectorEncoder:
    channels, height, side = shape
    widths = _widths(halvings(height, side), width)
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, 1, 1), nn.ELU()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 4, 2, 1), nn.ELU()]
    size = _smallest(height, side, len(widths) - 1)
    trunk = Trunk(nn.Sequential(*layers), widths[-1] * math.prod(size), given, hidden, nn.ELU())
    return VectorEncoder(trunk, latent, context)


def conv_decoder(shape: Sequence[int], given: int, latent: int, *, width: int, outputs: int) -> VectorDecoder:
    """`outputs` raw maps of the picture size of `shape` (C, H, W)."""
    _, height, side = shape
    widths = _widths(halvings(height, side), width)[::-1]
    size = _smallest(height, side, len(widths) - 1)
    layers: list[nn.Module] = [
        nn.Linear(latent + given, widths[0] * math.prod(size)), nn.Unflatten(1, (widths[0], *size)), nn.ELU()
    ]  # fmt: skip
    for before, after in itertools.pairwise(widths):
        layers += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.ELU()]
    layers += [nn.Conv2d(widths[-1], outputs, 3, 1, 1)]
    return VectorDecoder(nn.Sequential(*layers))


def mlp_encoder(shape: Sequence[int], given: int, latent: int, *, width: int, context: int = 0) -> VectorEncoder:
    return VectorEncoder(Trunk(nn.Flatten(), math.prod(shape), given, width, nn.Tanh()), latent, context)


def mlp_decoder(shape: Sequence[int], given: int, latent: int, *, width: int, outputs: int) -> VectorDecoder:
    size = (outputs, *shape[1:])
    body = [nn.Linear(latent + given, width), nn.Tanh(), nn.Linear(width, math.prod(size)), nn.Unflatten(1, size)]
    return VectorDecoder(nn.Sequential(*body))


def joined(features: Tensor, given: Tensor | None) -> Tensor:
    """(R, F) beside (R, V); None = no condition."""
    return features if given is None else torch.cat([features, given.to(features.dtype)], dim=1)


def _widths(count: int, width: int) -> list[int]:
    return [width * min(2**i, MOST_WIDER) for i in range(count + 1)]


def _smallest(height: int, width: int, count: int) -> tuple[int, int]:
    return height // 2**count, width // 2**count
