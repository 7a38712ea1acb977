"""Are the pictures of one class all alike? Mean MS-SSIM of pairs of the same class, as AC-GAN measures it.

MS-SSIM: Wang, Simoncelli, Bovik 2003. Its use for diversity: Odena et al. 2017, arXiv:1610.09585.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen import rng
from condgen.errors import DataError, ShapeError
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.pixels import pixels_to_float, pixels_to_uint8

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
PAIRS = 100  # of each class, at most


def scales_for(side: int) -> int:
    """How often pictures of `side` px can be halved with a full window left: 5 from 176 px, 3 at 64, 2 at 32."""
    if side < WINDOW:
        raise ShapeError(f"MS-SSIM needs pictures of at least {WINDOW} px; these have {side}")
    return next(n for n in range(len(WEIGHTS), 0, -1) if side >> (n - 1) >= WINDOW)


def ms_ssim(a: Tensor, b: Tensor, *, scales: int | None = None) -> Tensor:
    """Multi-scale structural similarity of pictures (N, C, H, W), uint8 or float [-1, 1] -> (N,) in [0, 1].

    Rounded to 8 bits first; valid windows; the mean over channels. Below 176 px the first `scales` weights are
    used, scaled to sum to 1: such values compare only with values of as many scales.
    """
    if a.shape != b.shape or a.dim() != 4:
        raise ShapeError(f"pictures of shape {tuple(a.shape)} and {tuple(b.shape)}; give two of (N, C, H, W)")
    depth = scales_for(min(a.shape[-2:])) if scales is None else scales
    x, y = ((pixels_to_float(pixels_to_uint8(p)).double() + 1) / 2 for p in (a, b))
    weights = torch.tensor(WEIGHTS[:depth], dtype=torch.float64) / sum(WEIGHTS[:depth])
    product = torch.ones(len(a), a.shape[1], dtype=torch.float64)
    for level, weight in enumerate(weights):
        luminance, contrast = _ssim(x, y)
        last = level == depth - 1
        # a negative similarity has no fractional power
        here = (luminance * contrast if last else contrast).mean((2, 3)).clamp(min=0)
        product = product * here**weight
        if not last:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return product.mean(1)


def diversity_scores(
    fake: Tensor,
    asked: Tensor,
    real: Tensor,
    real_labels: Tensor,
    *,
    names: Sequence[str] = (),
    about: Mapping[str, str],
    seed: int = 0,
) -> list[Score]:
    """`ms_ssim`, the mean over classes, then `ms_ssim/<class>` for each class with two samples and two real pictures.

    Lower is more diverse. Floor 1: one picture for a class. Ceiling: real pictures of the same class.
    """
    depth = scales_for(min(fake.shape[-2:]))
    values, anchors = (_by_class(x, y, seed) for x, y in ((fake, asked), (real, real_labels)))
    shared = [number for number in values if number in anchors]
    if not shared:
        raise DataError("no class has two samples and two real pictures; raise eval.num_samples")
    fields = {**about, "scales": depth, "weights": "first", "channels": "mean", "pairs": PAIRS, "n": len(fake)}
    fields |= {"ref": len(real), "seed": seed}

    def score(name: str, value: float, ceiling: float) -> Score:
        text = signature(name, **fields)
        return Score(name, value, floor=1.0, ceiling=ceiling, signature=text, higher_is_better=False)

    means = [sum(of[number] for number in shared) / len(shared) for of in (values, anchors)]
    each = [score(f"ms_ssim/{_name(names, n)}", values[n], anchors[n]) for n in shared]
    return [score("ms_ssim", *means), *each]


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if number < len(names) else str(number)


def _by_class(images: Tensor, labels: Tensor, seed: int) -> dict[int, float]:
    """Mean MS-SSIM of at most PAIRS pairs of different rows, for each class with two rows."""
    out = {}
    for number in sorted(set(labels.tolist())):
        rows = (labels.cpu() == number).nonzero()[:, 0].tolist()
        pairs = list(itertools.islice(_pairs(len(rows), seed, number), PAIRS))
        if pairs:
            left, right = ([rows[i] for i in side] for side in zip(*pairs, strict=True))
            out[number] = float(ms_ssim(images[left], images[right]).mean())
    return out


def _pairs(count: int, seed: int, number: int) -> list[tuple[int, int]]:
    """Pairs of different rows in random order, each once; of at most 200 rows."""
    chosen = rng.permutation(count, seed, "pairs of rows", number)[:200].tolist()
    every = list(itertools.combinations(chosen, 2))
    return [every[i] for i in rng.permutation(len(every), seed, "pairs", number).tolist()]


def _ssim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure maps of (N, C, H, W) in [0, 1]."""
    at = torch.arange(WINDOW, dtype=x.dtype) - WINDOW // 2
    line = torch.exp(-(at**2) / (2 * SIGMA**2))
    line = (line / line.sum()).expand(x.shape[1], 1, WINDOW)

    def blur(z: Tensor) -> Tensor:
        z = F.conv2d(z, line[:, :, :, None], groups=z.shape[1])
        return F.conv2d(z, line[:, :, None, :], groups=z.shape[1])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    return luminance, (2 * cov + K2**2) / (var_x + var_y + K2**2)
