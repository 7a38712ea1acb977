"""Fourier features of coordinates. Tancik et al., NeurIPS 2020, arXiv:2006.10739 (here: fixed octaves)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fourier_width(size: int, bands: int) -> int:
    """Width of `fourier_features` for `size` coordinates."""
    return size * (1 + 2 * bands)


def fourier_features(coordinates: Tensor, bands: int) -> Tensor:
    """(..., n) in [0, 1] -> (..., n * (1 + 2 * bands)): x, sin(2^k pi x), cos(2^k pi x) for k < bands.

    Computed in float32 whatever the input: in bfloat16 the high octaves would be noise.
    """
    x = coordinates.to(torch.float32)
    octaves = math.pi * 2.0 ** torch.arange(bands, device=x.device, dtype=torch.float32)
    angles = (x[..., None] * octaves).flatten(-2)
    return torch.cat([x, angles.sin(), angles.cos()], dim=-1)
