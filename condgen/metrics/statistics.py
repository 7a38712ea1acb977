"""Mean and covariance of features in float64, in blocks, so that memory is bounded and order does not matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from condgen.errors import DataError, ShapeError

BLOCK = 1024  # rows that are converted to float64 at a time


@dataclass(frozen=True)
class Gaussian:
    """mean (d,), covariance (d, d) unbiased (N - 1), both float64, of `count` feature vectors."""

    mean: Tensor
    covariance: Tensor
    count: int


class FeatureStatistics:
    """Running sums around a fixed point, the mean of the first block: sum of (x - p) and, below the diagonal, of
    (x - p)(x - p)^T.

    `add` takes features (N, d) of any floating type; `merge` joins what another process has seen; `gaussian`
    reads the result. Everything is float64, so only float64 rounding depends on the batching, and the point keeps a
    mean far from zero from eating the digits. Memory: 8 d (d + BLOCK) bytes, 50 MB at d = 2048, whatever N is.
    """

    def __init__(self) -> None:
        self.count = 0
        self.point = self.total = self.scatter = torch.empty(0, dtype=torch.float64)

    def add(self, features: Tensor) -> FeatureStatistics:
        """Raises ShapeError for a wrong shape and DataError for NaN or inf."""
        if features.dim() != 2 or not features.is_floating_point():
            raise ShapeError(
                f"features have dtype {features.dtype} and shape {tuple(features.shape)}; give float (N, d)"
            )
        for block in features.detach().split(BLOCK):
            rows = to_float64(block)
            if not len(rows):
                continue
            if self.count and rows.shape[1] != len(self.point):
                raise ShapeError(f"features of width {rows.shape[1]} cannot join features of width {len(self.point)}")
            point = self.point if self.count else rows.mean(0)
            centred = rows.to(point.device) - point
            total = centred.sum(0)
            if not bool(torch.isfinite(total).all()):  # one NaN or inf is enough for that
                raise DataError("the features hold NaN or inf; check the pictures and the extractor")
            if self.count == 0:
                self._begin(point)
            self.total += total
            _add_products(self.scatter, centred)
            self.count += len(rows)
        return self

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Adds everything that `other` has seen."""
        if other.count == 0:
            return self
        if self.count == 0:
            self._begin(other.point)
        if other.point.shape != self.point.shape:
            raise ShapeError(f"features of width {len(other.point)} cannot join features of width {len(self.point)}")
        total, scatter = other.total.to(self.point.device), other.scatter.to(self.point.device)
        step = other.point.to(self.point.device) - self.point
        cross = torch.outer(total, step)
        self.scatter += scatter + cross + cross.T + other.count * torch.outer(step, step)
        self.total = self.total + total + other.count * step
        self.count += other.count
        return self

    def _begin(self, point: Tensor) -> None:
        self.point, self.total = point.clone(), torch.zeros_like(point)
        self.scatter = torch.zeros(len(point), len(point), dtype=torch.float64, device=point.device)

    def gaussian(self) -> Gaussian:
        """Raises DataError below two feature vectors."""
        if self.count < 2:
            raise DataError(f"a covariance needs at least 2 feature vectors; got {self.count}")
        scatter = self.scatter.tril() + self.scatter.tril(-1).T
        covariance = (scatter - torch.outer(self.total, self.total) / self.count) / (self.count - 1)
        return Gaussian(self.point + self.total / self.count, covariance, self.count)


def gaussian_of(features: Tensor) -> Gaussian:
    """The Gaussian of features (N, d)."""
    return FeatureStatistics().add(features).gaussian()


def _add_products(lower: Tensor, rows: Tensor) -> None:
    """Adds rows^T rows to the lower triangle, in place; above the diagonal stands anything.

    A quarter is left out; of the two quarters on the diagonal numpy, which is used on the CPU, sees that they are
    symmetric and works out one half.
    """
    half = (len(lower) + 1) // 2
    first, second = slice(half), slice(half, None)
    for down, across in ((first, first), (second, first), (second, second)):
        if rows.device.type == "cpu":
            held = rows.numpy()
            lower[down, across] += torch.from_numpy(held[:, down].T @ held[:, across])
        else:
            lower[down, across] += rows[:, down].T @ rows[:, across]


def to_float64(values: Tensor) -> Tensor:
    """float64, on the CPU where the device has none (Apple's MPS)."""
    return (values.cpu() if values.device.type == "mps" else values).to(torch.float64)
