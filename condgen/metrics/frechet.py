"""Frechet distance between two sets of features: FID (Heusel et al., NeurIPS 2017, arXiv:1706.08500)."""

from __future__ import annotations

import torch
from torch import Tensor

from condgen.errors import DataError, ShapeError
from condgen.metrics.statistics import Gaussian, gaussian_of

BLOCK = 256  # columns of a triangular matrix that are multiplied at a time
MIN_SAMPLES = 2048  # below it the covariance of 2048-d Inception features is singular and the bias dominates


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) in float64; never negative.

    The trace of the root is the sum of the roots of the eigenvalues of L^T S2 L for any S1 = L L^T, which is symmetric:
    no complex numbers, no scipy, and singular covariances are no special case for the reader.
    """
    if a.mean.shape != b.mean.shape:
        raise ShapeError(f"features of width {len(a.mean)} and {len(b.mean)} have no Frechet distance")
    mean, covariance = b.mean.to(a.mean.device), b.covariance.to(a.mean.device)
    lower, other = _factor(a.covariance, covariance)
    trace_root = torch.linalg.eigvalsh(_between(lower, other)).clamp(min=0).sqrt().sum()
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


def _factor(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """(L, S): L lower triangular, L L^T = one of the two and S the other.

    Where both are singular, their larger one gets a ridge that float64 rounding asks for: at 1e-12 of its variances it
    adds at most 1e-6 of the standard deviations in directions where it has none.
    """
    for first, second in ((one, two), (two, one)):
        lower, failed = torch.linalg.cholesky_ex(first)
        if not bool(failed):
            return lower, second
    first, second = (one, two) if one.trace() >= two.trace() else (two, one)
    ridge = first.diagonal().max() * len(first) * torch.finfo(first.dtype).eps + torch.finfo(first.dtype).tiny
    while True:
        lower, failed = torch.linalg.cholesky_ex(
            first + ridge * torch.eye(len(first), dtype=first.dtype, device=first.device)
        )
        if not bool(failed):
            return lower, second
        ridge = ridge * 10


def _between(lower: Tensor, covariance: Tensor) -> Tensor:
    """The lower triangle of L^T S L, in blocks that leave out the zeros of L: a third of the full products."""
    size = len(lower)
    right, out = torch.empty_like(lower), torch.zeros_like(lower)
    starts = range(0, size, BLOCK)
    for at in starts:
        here = slice(at, at + BLOCK)
        right[:, here] = covariance[:, at:] @ lower[at:, here]
    for at in starts:
        here = slice(at, at + BLOCK)
        out[here, : at + BLOCK] = lower[at:, here].T @ right[at:, : at + BLOCK]
    return out
