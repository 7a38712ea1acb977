"""What FID costs beside its network: the trace of the root, and the statistics, against the ways of other tools.

    python benchmarks/metrics.py [--dim 2048] [--rows 5000] [--rounds 3] [--memory]

Rounds alternate; medians and ratios to the slowest are printed, with the largest relative difference of the values.
--memory also prints the peak of precision, recall, density and coverage of 50,000 x 2,048 features (minutes).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from condgen.metrics.frechet import frechet_distance
from condgen.metrics.manifold import manifold
from condgen.metrics.statistics import Gaussian, gaussian_of


def features(count: int, dim: int, seed: int) -> Tensor:
    """Positive features with a spectrum that falls a thousandfold, as pooled ones have."""
    draws = torch.Generator().manual_seed(seed)
    return (torch.randn(count, dim, generator=draws) * torch.logspace(0, -1.5, dim)).relu()


def traces(a: Gaussian, b: Gaussian) -> dict[str, Callable[[], float]]:
    """Ways to the Frechet distance of the same two Gaussians."""
    mean = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace())
    one, two = a.covariance.numpy(), b.covariance.numpy()

    def scipy_root() -> float:
        from scipy.linalg import sqrtm

        return mean - 2 * float(np.trace(np.asarray(sqrtm(one @ two)).real))

    def eigenvalues() -> float:  # torchmetrics, torch-fidelity
        return mean - 2 * float(torch.linalg.eigvals(a.covariance @ b.covariance).sqrt().real.sum())

    return {
        "scipy sqrtm": scipy_root,
        "eigvals (torchmetrics)": eigenvalues,
        "condgen": lambda: frechet_distance(a, b),
    }


def collectors(rows: Tensor) -> dict[str, Callable[[], float]]:
    """Ways to the covariance of the same features; each returns its trace."""

    def per_batch() -> float:  # torchmetrics: batches of 50 in float64
        total, outer = torch.zeros(rows.shape[1]).double(), torch.zeros(rows.shape[1], rows.shape[1]).double()
        for part in rows.split(50):
            wide = part.double()
            total += wide.sum(0)
            outer += wide.T @ wide
        mean = total / len(rows)
        return float(((outer - len(rows) * torch.outer(mean, mean)) / (len(rows) - 1)).trace())

    return {
        "batches of 50 (torchmetrics)": per_batch,
        "numpy cov (torch-fidelity)": lambda: float(np.trace(np.cov(rows.numpy(), rowvar=False))),
        "condgen": lambda: float(gaussian_of(rows).covariance.trace()),
    }


def compare(title: str, ways: Mapping[str, Callable[[], float]], rounds: int, rows: int = 0) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, float] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            values[name] = way()
            seconds[name].append(time.perf_counter() - began)
    slowest = max(statistics.median(s) for s in seconds.values())
    truth = values["condgen"]
    print(f"\n{title}")
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        speed = f", {rows / middle:,.0f} rows/s" if rows else ""
        off = abs(values[name] - truth) / abs(truth)
        print(f"  {name:<30} {middle:8.3f} s  {slowest / middle:6.1f}x  differs by {off:.1e}{speed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    one, two = features(given.rows, given.dim, 1), features(given.rows, given.dim, 2) * 1.1
    full = [gaussian_of(x) for x in (one, two)]
    compare(f"Frechet distance, {given.dim} dimensions", traces(full[0], full[1]), given.rounds)
    few = max(3, given.dim // 2)
    singular = [gaussian_of(x[:few]) for x in (one, two)]
    compare(f"the same, singular: {few} rows", traces(singular[0], singular[1]), given.rounds)
    compare(f"statistics of {given.rows} x {given.dim}", collectors(one), given.rounds, given.rows)
    if given.memory:
        real, fake = features(50_000, 2048, 1), features(50_000, 2048, 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        print(f"\n{manifold(real, fake)}")
        gained = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
        print(
            f"  50,000 x 2,048 against as many: {time.perf_counter() - began:.0f} s, {gained:.2f} GB above the features"
        )


if __name__ == "__main__":
    main()
