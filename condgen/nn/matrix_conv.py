"""Convolutions as one product of matrices where the kernel is larger than what it looks at.

A library's convolution lays a kernel out anew at every call, and its gradient again. That is lost in the arithmetic of
large pictures, but at the coarse end of a network a kernel of 1024 x 512 x 4 x 4 x 4 meets 32 positions a clip: on a
CPU the product, which reads a channels-last kernel where it lies, takes 0.4 of the time in bf16 and 0.5 in fp32. The
sums are the same; names and shapes of parameters are those of the classes of torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW, HEAVY = 256, 1 << 20  # it pays up to so many positions, of all rows together, and from so many weights on


class Window(NamedTuple):
    """Kernel, stride and padding along each dimension of the pixels."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def coarse(self, size: Sequence[int]) -> tuple[int, ...]:
        """How many positions a convolution of pixels of this size has."""
        return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, *self, strict=True))

    def fine(self, size: Sequence[int]) -> tuple[int, ...]:
        """The pixels that a transposed convolution of so many positions makes."""
        return tuple((n - 1) * s - 2 * p + k for n, k, s, p in zip(size, *self, strict=True))


def patches_of(x: Tensor, window: Window) -> Tensor:
    """(B, C, *pixels) -> (B, *positions, *kernel, C), copied out."""
    padded = F.pad(x.movedim(1, -1), (0, 0, *(p for p in reversed(window.padding) for _ in range(2))))
    for at, (k, s) in enumerate(zip(window.kernel, window.stride, strict=True)):
        padded = padded.unfold(1 + at, k, s)
    return padded.movedim(1 + len(window.kernel), -1).contiguous()


def pixels_of(patches: Tensor, window: Window, size: Sequence[int]) -> Tensor:
    """(B, *positions, *kernel, C) -> (B, C, *size), overlapping patches added, in single precision or better."""
    batch, count, channels = patches.shape[0], patches.shape[1 : 1 + len(window.kernel)], patches.shape[-1]
    padded = [n + 2 * p for n, p in zip(size, window.padding, strict=True)]
    exact = torch.float64 if patches.dtype == torch.float64 else torch.float32
    total = patches.new_zeros(batch, *padded, channels, dtype=exact)
    for tap in itertools.product(*map(range, window.kernel)):
        place = [slice(t, t + s * (n - 1) + 1, s) for t, s, n in zip(tap, window.stride, count, strict=True)]
        at: tuple[Any, ...] = (..., *tap, slice(None))
        total[(slice(None), *place)] += patches[at]
    inner = [slice(p, p + n) for p, n in zip(window.padding, size, strict=True)]
    return total[(slice(None), *inner)].to(patches.dtype).contiguous().movedim(-1, 1)


class Patches(torch.autograd.Function):
    """`patches_of`; its gradient is `pixels_of`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:
        ctx.window, ctx.size = window, x.shape[2:]
        return patches_of(x, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        return pixels_of(given, ctx.window, ctx.size), None


class Pixels(torch.autograd.Function):
    """`pixels_of`; its gradient is `patches_of`."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, window: Window) -> Tensor:
        ctx.window = window
        return pixels_of(patches, window, window.fine(patches.shape[1 : 1 + len(window.kernel)]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        return patches_of(given, ctx.window), None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """A convolution: x (B, I, *pixels), weight (O, I, *kernel) -> (B, O, *positions)."""
    patches: Tensor = Patches.apply(x, window)
    count = patches.shape[1 : 1 + len(window.kernel)]
    made = F.linear(patches.view(-1, weight[0].numel()), weight.movedim(1, -1).flatten(1), bias)
    return made.view(len(x), *count, -1).movedim(-1, 1)


def spread(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """A transposed convolution: x (B, I, *positions), weight (I, O, *kernel) -> (B, O, *pixels)."""
    # a product and no linear layer: its gradient lies as the kernel does
    patches = x.movedim(1, -1).flatten(0, -2) @ weight.movedim(1, -1).flatten(1)
    made: Tensor = Pixels.apply(patches.view(len(x), *x.shape[2:], *window.kernel, -1), window)
    if bias is not None:
        made = made + bias.to(made.dtype).view(-1, *[1] * len(window.kernel))
    return made


def pays(x: Tensor, weight: Tensor, positions: Sequence[int]) -> bool:
    inside = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    rows = len(x) * math.prod(positions)
    return (
        x.device.type == "cpu"
        and rows <= FEW
        and weight.numel() >= HEAVY
        and weight.is_contiguous(memory_format=inside)
    )


def window_of(conv: Any) -> Window:
    assert set(conv.dilation) == {1} and conv.groups == 1
    return Window(conv.kernel_size, conv.stride, conv.padding)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        window = window_of(self)
        if pays(x, self.weight, window.coarse(x.shape[2:])):
            return convolve(x, self.weight, self.bias, window)
        return super().forward(x)


class Conv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        window = window_of(self)
        if pays(x, self.weight, window.coarse(x.shape[2:])):
            return convolve(x, self.weight, self.bias, window)
        return super().forward(x)


class ConvTranspose2d(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if pays(x, self.weight, x.shape[2:]):
            return spread(x, self.weight, self.bias, window_of(self))
        return super().forward(x)


class ConvTranspose3d(nn.ConvTranspose3d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if pays(x, self.weight, x.shape[2:]):
            return spread(x, self.weight, self.bias, window_of(self))
        return super().forward(x)
