"""The Inception-v3 of the 2015 graph that published FID, IS and KID use: architecture only, no weights.

Szegedy et al., CVPR 2016 (arXiv:1512.00567). It differs from torchvision's: average pools leave padding out, the
last block pools by maximum, there are 1008 classes, and pictures are resized as TensorFlow 1 did. Parameter names
are those of torchvision, pytorch-fid and torch-fidelity, so their weight files load.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299


class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inside: int, out: int, kernel: int | tuple[int, int], stride: int = 1, *, pad: bool) -> None:
        super().__init__()
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (size[0] // 2, size[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(inside, out, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


Step = tuple[str, int, int | tuple[int, int], int]  # name, channels out, kernel, stride (2 = no padding)


class Block(nn.Module):
    """Parallel branches, concatenated. A branch is a chain of units; a last tuple of names is a fork of its end.

    pool "average" and "max" end in the unit `branch_pool`; "stride" is a strided maximum without parameters.
    """

    def __init__(
        self, inside: int, branches: Sequence[Sequence[Step]], forks: Sequence[str], pool: str, out: int
    ) -> None:
        super().__init__()
        self.pool = pool
        self.plan: list[tuple[list[str], list[str]]] = []
        for branch in branches:
            now, chain, ends = inside, [], []
            for name, channels, kernel, stride in branch:
                self.add_module(name, Unit(now, channels, kernel, stride, pad=stride == 1))
                if name in forks:
                    ends.append(name)
                else:
                    chain.append(name)
                    now = channels
            self.plan.append((chain, ends))
        if pool != "stride":
            self.branch_pool = Unit(inside, out, 1, pad=True)

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for chain, ends in self.plan:
            y = x
            for name in chain:
                y = self.get_submodule(name)(y)
            parts += [self.get_submodule(name)(y) for name in ends] or [y]
        if self.pool == "stride":
            parts.append(F.max_pool2d(x, 3, 2))
        elif self.pool == "max":
            parts.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            parts.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(parts, 1)


def _a(inside: int, pooled: int) -> Block:
    return Block(inside, [
        [("branch1x1", 64, 1, 1)],
        [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)],
    ], (), "average", pooled)  # fmt: skip


def _b(inside: int) -> Block:
    return Block(inside, [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)],
    ], (), "stride", 0)  # fmt: skip


def _c(inside: int, c: int) -> Block:
    row, column = (1, 7), (7, 1)
    return Block(inside, [
        [("branch1x1", 192, 1, 1)],
        [("branch7x7_1", c, 1, 1), ("branch7x7_2", c, row, 1), ("branch7x7_3", 192, column, 1)],
        [("branch7x7dbl_1", c, 1, 1), ("branch7x7dbl_2", c, column, 1), ("branch7x7dbl_3", c, row, 1),
         ("branch7x7dbl_4", c, column, 1), ("branch7x7dbl_5", 192, row, 1)],
    ], (), "average", 192)  # fmt: skip


def _d(inside: int) -> Block:
    return Block(inside, [
        [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)],
        [("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, (1, 7), 1), ("branch7x7x3_3", 192, (7, 1), 1),
         ("branch7x7x3_4", 192, 3, 2)],
    ], (), "stride", 0)  # fmt: skip


def _e(inside: int, pool: str) -> Block:
    forks = ("branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b")
    return Block(inside, [
        [("branch1x1", 320, 1, 1)],
        [("branch3x3_1", 384, 1, 1), ("branch3x3_2a", 384, (1, 3), 1), ("branch3x3_2b", 384, (3, 1), 1)],
        [("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 1),
         ("branch3x3dbl_3a", 384, (1, 3), 1), ("branch3x3dbl_3b", 384, (3, 1), 1)],
    ], forks, pool, 192)  # fmt: skip


class InceptionV3(nn.Module):
    """Shapes: uint8 or float 0..255 (B, 3, H, W) -> (B, 2048) pooled features; `logits` (B, 1008) of those."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, pad=True)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1, pad=False)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_c(768, c) for c in (128, 160, 160, 192))
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, "average"), _e(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> Tensor:
        x = (resize_tf1(images.to(self.fc.weight.dtype), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.get_submodule(f"Mixed_{name}")(x)
        return x.mean((2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """(B, 2048) -> (B, 1008) without the bias, as the published Inception score takes them."""
        return F.linear(features, self.fc.weight)


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """Bilinear resize (B, C, H, W) as TensorFlow 1 did it: source = target * in / out, no half-pixel centres."""
    for dim in (2, 3):
        old = images.shape[dim]
        at = torch.arange(size, device=images.device, dtype=images.dtype) * (old / size)
        low = at.floor().long().clamp(max=old - 1)
        weight = (at - low).view(-1, *[1] * (3 - dim))
        near, far = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=old - 1))
        images = near + (far - near) * weight
    return images
