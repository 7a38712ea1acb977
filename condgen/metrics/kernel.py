"""Kernel distance between two sets of features: KID (Binkowski et al., ICLR 2018, arXiv:1801.01401)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from condgen import rng
from condgen.errors import DataError, ShapeError
from condgen.metrics.statistics import to_float64

BLOCK = 1024  # rows of the kernel matrix that exist at a time


@dataclass(frozen=True)
class Kid:
    """value = mean over subsets, error = standard deviation over subsets (what papers print); may be negative.

    interval: 95 % confidence interval of the value, by subsampling without replacement (Politis and Romano 1994): the
    variance over subsets of m of n rows, times (m / n) / (1 - m / n). None with one subset or m = n.
    """

    value: float
    error: float
    subsets: int
    subset_size: int
    interval: tuple[float, float] | None = None


def polynomial_mmd2(x: Tensor, y: Tensor, *, degree: int = 3, block: int = BLOCK) -> float:
    """Unbiased squared MMD of features (N, d), (M, d) under k(x, y) = (x.y / d + 1)^degree, in float64.

    mean of k(x, x') over x != x' + mean of k(y, y') over y != y' - 2 mean of k(x, y). Memory is block * max(N, M).
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ShapeError(f"features of shape {tuple(x.shape)} and {tuple(y.shape)}; give (N, d) and (M, d)")
    if min(len(x), len(y)) < 2:
        raise DataError(f"an unbiased MMD needs at least 2 rows on each side; got {len(x)} and {len(y)}")
    a, b = to_float64(x.detach()), to_float64(y.detach()).to(x.device if x.device.type != "mps" else "cpu")
    within = [_kernel_sum(s, s, degree, block) - float(_diagonal(s, degree).sum()) for s in (a, b)]
    n, m = len(a), len(b)
    cross = _kernel_sum(a, b, degree, block)
    return within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * cross / (n * m)


def kid(
    real: Tensor, fake: Tensor, *, subsets: int = 100, subset_size: int | None = None, seed: int = 0, degree: int = 3
) -> Kid:
    """KID of features (N, d) and (M, d): polynomial MMD over `subsets` random subsets without replacement.

    subset_size: 1000 as published, by default no more than half of the smaller set, so that subsets differ and
    the error means something. Raises DataError when it exceeds a set.
    """
    smaller = min(len(real), len(fake))
    size = min(1000, max(2, smaller // 2)) if subset_size is None else subset_size
    if not 2 <= size <= smaller or subsets < 1:
        raise DataError(
            f"KID with {subsets} subsets of {size} needs at least 1 subset of 2 rows and {size} rows on each side; "
            f"there are {len(real)} and {len(fake)}"
        )
    values = torch.tensor(
        [polynomial_mmd2(real[i], fake[j], degree=degree) for i, j in _subsets(real, fake, subsets, size, seed)],
        dtype=torch.float64,
    )
    mean, error = float(values.mean()), float(values.std(unbiased=False))
    if subsets == 1 or size == smaller:
        return Kid(mean, error, subsets, size)
    share = size / smaller
    half = 1.96 * float(values.std()) * (share / (1 - share)) ** 0.5
    return Kid(mean, error, subsets, size, (mean - half, mean + half))


def _subsets(real: Tensor, fake: Tensor, count: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    draws = rng.generator(seed, "kid")
    for _ in range(count):
        one = torch.randperm(len(real), generator=draws)[:size]
        two = torch.randperm(len(fake), generator=draws)[:size]
        yield one.to(real.device), two.to(fake.device)


def _kernel_sum(x: Tensor, y: Tensor, degree: int, block: int) -> float:
    return sum(float((rows @ y.T / x.shape[1] + 1).pow(degree).sum()) for rows in x.split(block))


def _diagonal(x: Tensor, degree: int) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1).pow(degree)
