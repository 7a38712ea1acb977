"""PatchGAN: a discriminator that judges every patch of a picture (Isola et al. 2017, arXiv:1611.07004)."""

from __future__ import annotations

import itertools
from typing import Literal

from torch import Tensor, nn

from condgen.nn.initialise import add_spectral_norm, initialise
from condgen.nn.unet import NormKind, normalisation

PatchNorm = NormKind | Literal["none"]
Patch = Literal[1, 16, 34, 70, 142, 286]
LAYERS: dict[int, int] = {1: 0, 16: 1, 34: 2, 70: 3, 142: 4, 286: 5}  # side of the patch -> halvings


class PatchGan(nn.Module):
    """x (B, M, H, W) -> logits (B, 1, h, w), each of a `patch` x `patch` window; 30 x 30 for 70 at 256 px.

    patch 1 is PixelGAN (1 x 1 convolutions), 70 the published default, 286 ImageGAN.
    """

    def __init__(
        self, inputs: int, *, patch: int = 70, width: int = 64, norm: PatchNorm = "batch", spectral_norm: bool = False
    ) -> None:
        super().__init__()
        halvings = LAYERS[patch]
        kernel, pad = (4, 1) if halvings else (1, 0)
        widths = [width * min(2**i, 8) for i in range(max(halvings, 1) + 1)]
        # PixelGAN keeps its biases, as released; elsewhere batch norm takes them out again
        bias = norm != "batch" or not halvings
        strides = [2] * (len(widths) - 2) + [1] if halvings else [1]
        first = nn.Conv2d(inputs, widths[0], kernel, 2 if halvings else 1, pad)
        blocks = [nn.Sequential(first, nn.LeakyReLU(0.2, inplace=True))]
        for (before, after), stride in zip(itertools.pairwise(widths), strides, strict=True):
            convolution = nn.Conv2d(before, after, kernel, stride, pad, bias=bias)
            blocks.append(nn.Sequential(convolution, normalisation(after, norm), nn.LeakyReLU(0.2, inplace=True)))
        self.blocks = nn.ModuleList(blocks)
        self.score = nn.Conv2d(widths[-1], 1, kernel, 1, pad)
        self.apply(initialise)
        if spectral_norm:
            add_spectral_norm(self)

    def features(self, x: Tensor) -> list[Tensor]:
        """The activations of every block, then the logits."""
        out = []
        for block in self.blocks:
            x = block(x)
            out.append(x)
        return [*out, self.score(x)]

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[-1]


def smallest_side(patch: int) -> int:
    """The shortest side, in pixels, for which the logits are not empty."""
    return 3 * 2 ** LAYERS[patch] if LAYERS[patch] else 1
