"""Conventions for pixel values, and checks of shapes: uint8 0..255 on disk, float in [-1, 1] everywhere else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.errors import ShapeError

PIXEL_TOLERANCE = 1e-3


def pixels_to_float(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [-1, 1]; float tensors pass unchanged."""
    if pixels.dtype == torch.uint8:
        return pixels.to(torch.float32).mul_(2 / 255).sub_(1)
    return pixels


def pixels_to_uint8(pixels: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 0..255, rounded to nearest and clamped."""
    if pixels.dtype == torch.uint8:
        return pixels
    return pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def crop_pixels(pixels: Tensor, windows: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Bilinear cut of windows (B, 4) xyxy in [0, 1] from (B, C, H, W), resized to size (default: kept)."""
    height, width = size or (pixels.shape[-2], pixels.shape[-1])
    low, high = windows[:, :2] * 2 - 1, windows[:, 2:] * 2 - 1
    scale, centre = (high - low) / 2, (high + low) / 2
    zero = torch.zeros_like(scale[:, 0])
    theta = torch.stack([
        torch.stack([scale[:, 0], zero, centre[:, 0]], dim=1),
        torch.stack([zero, scale[:, 1], centre[:, 1]], dim=1),
    ], dim=1)  # (B, 2, 3)  # fmt: skip
    as_float = pixels.float()
    grid = F.affine_grid(theta.float(), [len(pixels), pixels.shape[1], height, width], align_corners=False)
    out = F.grid_sample(as_float, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return out.round().to(pixels.dtype) if not pixels.is_floating_point() else out.to(pixels.dtype)


def expect(
    name: str,
    value: Tensor | None,
    *,
    rank: int,
    dtype: torch.dtype | None = None,
    floating: bool = False,
) -> None:
    """Raises ShapeError unless value is None or has this rank and dtype."""
    if value is None:
        return
    if value.dim() != rank:
        raise ShapeError(f"{name} has shape {tuple(value.shape)}; expected {rank} dimensions")
    if dtype is not None and value.dtype != dtype:
        raise ShapeError(f"{name} has dtype {value.dtype}; expected {dtype}")
    if floating and not value.is_floating_point():
        raise ShapeError(f"{name} has dtype {value.dtype}; expected a floating type")


def expect_start(name: str, value: Tensor | None, sizes: Sequence[int]) -> None:
    """Raises ShapeError unless value is None or its first sizes are these: parts of one record must not broadcast."""
    if value is not None and tuple(value.shape[: len(sizes)]) != tuple(sizes):
        raise ShapeError(
            f"{name} has shape {tuple(value.shape)}; with the rest of its record it must start {tuple(sizes)}"
        )


def expect_pixels(name: str, value: Tensor) -> None:
    """Raises ShapeError for float pixels outside [-1, 1] (such as 0..255 given as float) and for NaN."""
    if not value.is_floating_point():
        return
    low, high = value.min().item(), value.max().item()
    if not (low >= -1 - PIXEL_TOLERANCE and high <= 1 + PIXEL_TOLERANCE):
        raise ShapeError(
            f"{name} spans [{low:.3g}, {high:.3g}]; float pixels must lie in [-1, 1]. "
            "Give uint8 0..255, or scale with x / 127.5 - 1"
        )
