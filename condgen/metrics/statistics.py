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
    """Running mean and covariance by the pairwise update of Chan, Golub and LeVeque (1983).

    `add` takes features (N, d) of any floating type; `merge` joins what another process has seen; `gaussian`
    reads the result. Blocks are combined exactly, so only float64 rounding depends on the batching.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.empty(0, dtype=torch.float64)
        self.scatter = torch.empty(0, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T, (d, d)

    def add(self, features: Tensor) -> FeatureStatistics:
        """Raises ShapeError for a wrong shape and DataError for NaN or inf."""
        if features.dim() != 2 or not features.is_floating_point():
            raise ShapeError(
                f"features have dtype {features.dtype} and shape {tuple(features.shape)}; give float (N, d)"
            )
        for block in features.detach().split(BLOCK):
            rows = to_float64(block)
            if not bool(torch.isfinite(rows).all()):
                raise DataError("the features hold NaN or inf; check the pictures and the extractor")
            mean = rows.mean(0)
            centred = rows - mean
            self._join(len(rows), mean, centred.T @ centred)
        return self

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Adds everything that `other` has seen."""
        if other.count:
            self._join(other.count, other.mean, other.scatter)
        return self

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean.clone(), scatter.clone()
            return
        if mean.shape != self.mean.shape:
            raise ShapeError(f"features of width {len(mean)} cannot join features of width {len(self.mean)}")
        total = self.count + count
        delta = mean.to(self.mean.device) - self.mean
        self.scatter += scatter.to(self.scatter.device) + torch.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Raises DataError below two feature vectors."""
        if self.count < 2:
            raise DataError(f"a covariance needs at least 2 feature vectors; got {self.count}")
        return Gaussian(self.mean, self.scatter / (self.count - 1), self.count)


def gaussian_of(features: Tensor) -> Gaussian:
    """The Gaussian of features (N, d)."""
    return FeatureStatistics().add(features).gaussian()


def to_float64(values: Tensor) -> Tensor:
    """float64, on the CPU where the device has none (Apple's MPS)."""
    return (values.cpu() if values.device.type == "mps" else values).to(torch.float64)
