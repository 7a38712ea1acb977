"""Frechet distance between two sets of features: FID (Heusel et al., NeurIPS 2017, arXiv:1706.08500)."""

from __future__ import annotations

import torch
from torch import Tensor

from condgen.errors import DataError, ShapeError
from condgen.metrics.statistics import Gaussian, gaussian_of

MIN_SAMPLES = 2048  # below it the covariance of 2048-d Inception features is singular and the bias dominates


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) in float64; never negative.

    The trace of the root is the sum of the roots of the eigenvalues of R^T S2 R for any S1 = R R^T, which is
    symmetric: no complex numbers, no scipy, and singular covariances are no special case for the reader.
    """
    if a.mean.shape != b.mean.shape:
        raise ShapeError(f"features of width {len(a.mean)} and {len(b.mean)} have no Frechet distance")
    mean, covariance = b.mean.to(a.mean.device), b.covariance.to(a.mean.device)
    root = _factor(a.covariance)
    product = root.T @ covariance @ root
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - mean).square().sum() + a.covariance.trace() + covariance.trace() - 2 * trace_root
    return max(0.0, float(distance))


def fid(real: Tensor, fake: Tensor, *, force: bool = False) -> float:
    """FID of features (N, d) and (M, d). Raises DataError below 2048 rows on either side unless `force`.

    Biased upwards by about 1/N: compare only equal N, and prefer KID for small sets.
    """
    require_enough(min(len(real), len(fake)), force=force)
    return frechet_distance(gaussian_of(real), gaussian_of(fake))


def require_enough(count: int, *, force: bool = False) -> None:
    """Raises DataError when FID from `count` samples would mislead, unless `force`."""
    if count < MIN_SAMPLES and not force:
        raise DataError(
            f"FID from {count} samples is dominated by its bias; it needs at least {MIN_SAMPLES} on each side. "
            "Use KID, which is unbiased, raise eval.num_samples, or, where only equal counts are compared, force it: "
            "eval.force_fid=true"
        )


def _factor(covariance: Tensor) -> Tensor:
    """R with R R^T = covariance: Cholesky (20 times faster than a general root), or eigenvectors if singular."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not bool(failed):
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()
