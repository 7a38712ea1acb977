"""Differentiable augmentation that moves the condition with the pixels.

Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training", arXiv:2006.10738. The paper
augments pixels only; with boxes, keypoints or a source image in the condition, a shift of the pixels alone
would teach D a wrong pairing, so the same shift is applied to every spatial field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.rng import StepRandom
from condgen.types import Condition

Policy = Literal["color", "translation", "cutout"]
POLICIES: tuple[str, ...] = get_args(Policy)
MAX_SHIFT = 1 / 8  # of the side
CUTOUT = 1 / 2


def diffaugment(
    pixels: Tensor, condition: Condition, random: StepRandom, policy: Sequence[str]
) -> tuple[Tensor, Condition]:
    """pixels (B, C, H, W) in [-1, 1] and their condition, both augmented with one draw a row. Differentiable."""
    rows = len(pixels)
    if "color" in policy:
        pixels = _color(pixels, _draw(random, rows, 3))
    if "translation" in policy:
        height, width = pixels.shape[-2:]
        draw = _draw(random, rows, 2)
        span = torch.tensor([width, height], device=pixels.device) * MAX_SHIFT
        shift = ((draw * 2 - 1) * span).round().long()  # (B, 2) pixels to the right and down
        pixels = translate(pixels, shift)
        condition = _translate_condition(condition, shift, (height, width))
    if "cutout" in policy:
        pixels = _cutout(pixels, _draw(random, rows, 2))
    return pixels, condition


def _draw(random: StepRandom, rows: int, width: int) -> Tensor:
    """(rows, width) uniform; a generator batch with interpolated rows is longer than the data batch."""
    times = -(-rows // random.rows)
    return torch.cat([random.rand(width) for _ in range(times)])[:rows]


def _color(pixels: Tensor, draw: Tensor) -> Tensor:
    brightness, saturation, contrast = (draw[:, i].view(-1, 1, 1, 1) for i in range(3))
    pixels = pixels + (brightness - 0.5)
    mean = pixels.mean(1, keepdim=True)
    pixels = (pixels - mean) * (saturation * 2) + mean
    mean = pixels.mean((1, 2, 3), keepdim=True)
    return (pixels - mean) * (contrast + 0.5) + mean


def translate(pixels: Tensor, shift: Tensor) -> Tensor:
    """Whole-pixel shift (B, 2) = (right, down) of (B, C, H, W); uncovered pixels become 0."""
    rows, _, height, width = pixels.shape
    most = int(shift.abs().max()) if shift.numel() else 0
    padded = F.pad(pixels, (most, most, most, most))
    ys = torch.arange(height, device=pixels.device)[None] - shift[:, 1:2] + most  # (B, H)
    xs = torch.arange(width, device=pixels.device)[None] - shift[:, 0:1] + most  # (B, W)
    at = torch.arange(rows, device=pixels.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[at, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)


def _translate_condition(condition: Condition, shift: Tensor, size: tuple[int, int]) -> Condition:
    if condition.boxes is None and condition.keypoints is None and condition.image is None:
        return condition
    part = shift.float() / torch.tensor([size[1], size[0]], device=shift.device)
    windows = torch.cat([-part, 1 - part], dim=1)  # the shifted frame, seen from the unshifted one
    out = replace(condition, image=None, frames=None).crop_resize(windows)
    image = condition.image
    if image is not None:
        scale = torch.tensor([image.pixels.shape[-1], image.pixels.shape[-2]], device=shift.device)
        moved = (part * scale).round().long()
        image = image.map(lambda t: translate(t, moved.to(t.device)))
    return replace(out, image=image, frames=condition.frames)


def _cutout(pixels: Tensor, draw: Tensor) -> Tensor:
    height, width = pixels.shape[-2:]
    tall, wide = int(height * CUTOUT + 0.5), int(width * CUTOUT + 0.5)
    top = (draw[:, 0] * (height + 1 - tall % 2)).floor() - tall // 2
    left = (draw[:, 1] * (width + 1 - wide % 2)).floor() - wide // 2
    y = torch.arange(height, device=pixels.device)[None]
    x = torch.arange(width, device=pixels.device)[None]
    rows = (y >= top[:, None]) & (y < top[:, None] + tall)
    columns = (x >= left[:, None]) & (x < left[:, None] + wide)
    return pixels * ~(rows[:, None, :, None] & columns[:, None, None, :])
