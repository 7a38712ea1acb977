"""Scores of pictures against their own true picture and their own source: L1, PSNR, SSIM, input recovery.

SSIM is Wang et al. 2004 (IEEE TIP 13(4)). Each has measured ends, because an output that copies its source, or
that is the same mean picture for every source, already gets a fair number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from condgen import rng
from condgen.errors import DataError, ShapeError
from condgen.metrics.score import Score
from condgen.metrics.signature import signature

WINDOW = 11  # of SSIM, as published
MAX_DECIBELS = 100.0  # of equal pictures, whose PSNR would be infinite
FLAT = 1e-8  # variance of an edge map below which it shows no edges


class Measure(NamedTuple):
    """(picture, true picture) (N, C, H, W) in [-1, 1] -> (N,)."""

    name: str
    each: Callable[[Tensor, Tensor], Tensor]
    perfect: float | None
    higher_is_better: bool


def l1(fake: Tensor, real: Tensor) -> Tensor:
    """Mean absolute difference of each picture (N,), on the scale of [-1, 1]."""
    return (fake - real).abs().flatten(1).mean(1)


def psnr(fake: Tensor, real: Tensor) -> Tensor:
    """Peak signal to noise ratio of each picture (N,) in dB, at most 100; the peak is 2, the span of [-1, 1]."""
    error = (fake - real).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error.clamp_min(1e-30))).clamp_max(MAX_DECIBELS)


def ssim(fake: Tensor, real: Tensor) -> Tensor:
    """Structural similarity of each picture (N,), at most 1; Gaussian window of 11 px, smaller for tiny pictures."""
    from kornia.metrics import ssim as ssim_map

    side = min(WINDOW, min(fake.shape[-2:]) // 2 * 2 - 1)
    return ssim_map((fake + 1) / 2, (real + 1) / 2, window_size=side).flatten(1).mean(1)


def edges(pixels: Tensor) -> Tensor:
    """Sobel edge strength (N, H, W) of pictures with 1 or 3 channels; polarity does not matter."""
    from kornia.filters import sobel

    return sobel(pixels.float().mean(1, keepdim=True))[:, 0]


def edge_agreement(first: Tensor, second: Tensor) -> Tensor:
    """Correlation (N,) of the edge maps of two sets of pictures; 0 where one of them has no edges."""
    a, b = (edges(x).flatten(1) for x in (first, second))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    power = a.square().mean(1) * b.square().mean(1)
    agreement = (a * b).mean(1) / power.clamp_min(FLAT**2).sqrt()
    return torch.where(power > FLAT**2, agreement, 0.0)


MEASURES = (
    Measure("l1", l1, 0.0, False),
    Measure("psnr", psnr, None, True),
    Measure("ssim", ssim, 1.0, True),
)


def paired_scores(
    fake: Tensor, real: Tensor, source: Tensor, seen: Tensor, *, about: Mapping[str, str], seed: int = 0
) -> list[Score]:
    """l1, psnr and ssim against the true picture, the same of the mean picture, and input recovery.

    fake, real  pictures (N, C, H, W) in [-1, 1], row by row for the same source
    source      (N, 1 or C, H, W): what was translated; grey is repeated over the channels
    seen        true pictures that were trained on: `<score>/mean-image` is what their mean gets

    Floor of l1, psnr and ssim: the source copied, or its negative where that is nearer over all rows. Floor of
    input_recovery, the correlation of Sobel edges of output and source: the sources shuffled; ceiling: real pictures.
    Raises ShapeError and DataError.
    """
    if fake.shape != real.shape or source.shape[-2:] != real.shape[-2:] or len(source) != len(real):
        raise ShapeError(f"outputs {tuple(fake.shape)}, truth {tuple(real.shape)}, sources {tuple(source.shape)}")
    if len(fake) < 2:
        raise DataError("paired scores shuffle the sources, which needs at least 2 rows")
    copied = _as_target(source, real)
    mean = seen.mean(0, keepdim=True).expand_as(real)
    fields = {**about, "n": str(len(fake))}
    found = []
    for measure in MEASURES:
        each = measure.each(fake, real)
        floors = [float(measure.each(sign * copied, real).mean()) for sign in (1, -1)]
        made = Score(
            measure.name, float(each.mean()), floor=max(floors) if measure.higher_is_better else min(floors),
            ceiling=measure.perfect, error=_error(each), higher_is_better=measure.higher_is_better,
            signature=signature(measure.name, **fields, floor="copied-source"),
        )  # fmt: skip
        base = Score(
            f"{measure.name}/mean-image", float(measure.each(mean, real).mean()), floor=made.floor,
            ceiling=measure.perfect, higher_is_better=measure.higher_is_better,
            signature=signature(f"{measure.name}/mean-image", **fields, of=len(seen)),
        )  # fmt: skip
        found += [made, base]
    order = shuffled(len(source), seed)
    each = edge_agreement(fake, source)
    found.append(
        Score(
            "input_recovery",
            float(each.mean()),
            floor=float(edge_agreement(fake, source[order]).mean()),
            ceiling=float(edge_agreement(real, source).mean()),
            error=_error(each),
            signature=signature("input_recovery", **fields, edges="sobel", seed=seed),
        )
    )
    return found


def shuffled(rows: int, seed: int) -> Tensor:
    """A permutation of range(rows), at least 2, without a fixed point: one cycle."""
    order = rng.permutation(rows, seed, "shuffled sources")
    out = torch.empty_like(order)
    out[order] = order.roll(1)
    return out


def _as_target(source: Tensor, real: Tensor) -> Tensor:
    channels = real.shape[1]
    if source.shape[1] == channels:
        return source
    return source.mean(1, keepdim=True).expand(-1, channels, -1, -1)


def _error(each: Tensor) -> float:
    """Standard error of the mean."""
    return float(each.std() / len(each) ** 0.5)
