"""Parzen-window log-likelihood of held-out pictures, as the tables of 2014 and 2015 have it, with the caveat it needs.

Protocol of Goodfellow et al. 2014 (arXiv:1406.2661): a Gaussian around each sample, pixels in [0, 1], sigma by
validation. Theis et al. 2016 (arXiv:1511.01844) show that it ranks models wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from condgen import rng
from condgen.errors import ConfigError, DataError
from condgen.metrics.neighbours import tiles
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.pixels import pixels_to_uint8

SIGMAS = tuple(round(10 ** (i / 9 - 1), 6) for i in range(10))  # 0.1 .. 1, as in the released code
MOST = 10_000  # samples that make the window, as published
VALIDATION = 1000  # held-out pictures that choose sigma, as published
CAVEAT = (
    "Theis et al. 2016 (arXiv:1511.01844): in many dimensions a Parzen estimate is far from the true likelihood with "
    "any number of samples, k-means centroids beat true samples, and it ranks models otherwise than likelihood or "
    "looks do. Quote it only beside the tables of 2014-15, with the ceiling, which takes training pictures as samples"
)


def parzen_log_likelihood(samples: Tensor, points: Tensor, sigma: float) -> Tensor:
    """ln of the mean over samples (N, D) of a Gaussian of width sigma at points (M, D): nats (M,), float64."""
    return _log_likelihoods(samples, points, (sigma,))[0]


def choose_sigma(samples: Tensor, validation: Tensor, sigmas: Sequence[float] = SIGMAS) -> float:
    """The sigma under which the validation points (M, D) are most likely."""
    means = _log_likelihoods(samples, validation, sigmas).mean(1)
    return sigmas[int(means.argmax())]


def _log_likelihoods(samples: Tensor, points: Tensor, sigmas: Sequence[float]) -> Tensor:
    """(sigmas, M) in float64; the distances are worked out once for all of them."""
    if not len(samples) or not len(points):
        raise DataError("a Parzen window needs at least one sample and one point")
    if min(sigmas) <= 0:
        raise ConfigError(f"sigma = {min(sigmas)}; a window has a width above 0")
    total = torch.full((len(sigmas), len(points)), -math.inf, dtype=torch.float64)
    for rows, _, square in tiles(points, samples):
        near = square.cpu()
        for i, sigma in enumerate(sigmas):
            part = torch.logsumexp(-near / (2 * sigma**2), dim=1)
            total[i, rows] = torch.logaddexp(total[i, rows], part)
    width = torch.tensor(sigmas, dtype=torch.float64)[:, None] * math.sqrt(2 * math.pi)
    return total - math.log(len(samples)) - points.shape[1] * width.log()


def parzen_scores(
    fake: Tensor, real: Tensor, train: Tensor, noise: Tensor, *, fields: Mapping[str, object], seed: int = 0
) -> list[Score]:
    """`parzen`: nats a picture of held-out pictures (N, C, H, W), uint8 or float [-1, 1], at most 10,000 samples.

    Half of the held-out pictures, at most 1,000, choose sigma, each set of samples its own; the others are scored.
    Floor: noise as the samples. Ceiling: training pictures as the samples. The error is the standard error.
    """
    if len(real) < 4:
        raise DataError(f"a Parzen window needs at least 4 held-out pictures; got {len(real)}")
    order = rng.permutation(len(real), seed, "parzen")
    held = min(VALIDATION, len(real) // 2)
    points, validation = _unit(real[order[held:]]), _unit(real[order[:held]])
    used = min(len(fake), len(train), MOST)
    found, sigmas = [], []
    for pictures in (fake, noise, train):
        samples = _unit(pictures[:used])
        sigmas.append(choose_sigma(samples, validation))
        found.append(parzen_log_likelihood(samples, points, sigmas[-1]))
    protocol = {
        "sigmas": f"{SIGMAS[0]:g}..{SIGMAS[-1]:g}x{len(SIGMAS)}", "valid": held, "dims": points.shape[1],
        "n": used, "ref": len(points), "seed": seed,
    }  # fmt: skip
    edge = ", at the end of the range tried" if sigmas[0] in (SIGMAS[0], SIGMAS[-1]) else ""
    return [
        Score(
            "parzen",
            float(found[0].mean()),
            floor=float(found[1].mean()),
            ceiling=float(found[2].mean()),
            error=float(found[0].std()) / math.sqrt(len(points)) if len(points) > 1 else None,
            signature=signature("parzen", **fields, **protocol),
            note=f"sigma {sigmas[0]:.3g}{edge}. {CAVEAT}",
        )
    ]


def _unit(pictures: Tensor) -> Tensor:
    """Rows of pixels in [0, 1]."""
    return pixels_to_uint8(pictures).flatten(1).float() / 255
