"""What the box and the keypoint networks of GAWWN share: D's image trunk, its head, and steps of a doubling."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from condgen.nn.reed import leaky, relu


def grid_of(side: int) -> int:
    """Cells of a side on which places are decided: 16 as published, 8 for pictures of 16 px."""
    return min(16, side // 2)


def down(before: int, after: int, activation: Callable[[], nn.Module]) -> list[nn.Module]:
    """Halves the side."""
    return [nn.Conv2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), activation()]


def up(before: int, after: int) -> list[nn.Module]:
    """Doubles the side; no activation."""
    return [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.BatchNorm2d(after)]


def starts(before: int, after: int) -> list[nn.Module]:
    """1 x 1 -> 4 x 4; no activation."""
    return [nn.ConvTranspose2d(before, after, 4), nn.BatchNorm2d(after)]


def paint(scale: int, before: int, widths: Sequence[int], channels: int) -> nn.Sequential:
    """Doublings from the grid to pixels in [-1, 1], log2(scale) of them; the last width serves any more."""
    inner = scale.bit_length() - 2
    widths = [before, *[widths[min(i, len(widths) - 1)] for i in range(inner)]]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [*up(a, b), relu()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1), nn.Tanh())


class Trunk(nn.Module):
    """pixels (B, C, S, S) -> (B, 2d, grid, grid); without batch norm down to one halving above the grid."""

    def __init__(self, side: int, channels: int, width: int, activation: Callable[[], nn.Module] = leaky) -> None:
        super().__init__()
        halvings = (side // grid_of(side)).bit_length() - 1
        widths = [channels, *[width] * (halvings - 1), 2 * width]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths[:-1]):
            layers += [nn.Conv2d(a, b, 4, 2, 1), activation()]
        if halvings == 1:  # the first convolution has no batch norm: D must see how bright a picture is
            layers += [nn.Conv2d(channels, 2 * width, 4, 2, 1), activation()]
        else:
            layers += down(widths[-2], 2 * width, activation)
        self.body = nn.Sequential(
            *layers, nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.BatchNorm2d(2 * width), activation()
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body(pixels)


def head(width: int, activation: Callable[[], nn.Module] = leaky) -> nn.Sequential:
    """[region, whole] (B, 2d) -> logits (B, 1)."""
    return nn.Sequential(nn.Linear(2 * width, width), nn.BatchNorm1d(width), activation(), nn.Linear(width, 1))


def projected(words: Tensor, scene: Tensor) -> Tensor:
    """<words (B, V), features (B, V, h, w) summed over positions> (B,)."""
    return (words * scene.sum((2, 3))).sum(1)


def without_batch_norm(network: nn.Module) -> None:
    """Removes every batch norm. Right before D's last layer it hides the mean of a pass, and a pass is all real or
    all fake, so that D begins slowly."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
