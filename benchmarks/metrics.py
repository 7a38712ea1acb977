"""What FID costs beside its network: the trace of the root, and the statistics, against the ways of other tools.

    python benchmarks/metrics.py [--dim 2048] [--rows 5000] [--rounds 3] [--memory] [--json FILE]

Rounds alternate; medians and ratios to the slowest are printed, with the largest relative difference of the values.
--memory prints instead what statistics and distance, and precision, recall, density and coverage, of 50,000 x 2,048
features take beside the features: seconds and peak (Linux; 6 to 15 minutes on two cores).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

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


def compare(title: str, ways: Mapping[str, Callable[[], float]], rounds: int, rows: int = 0) -> dict[str, object]:
    """Prints and returns the median seconds of each way, in alternating rounds, and how far its value is from ours."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, float] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            values[name] = way()
            seconds[name].append(time.perf_counter() - began)
    slowest = max(statistics.median(s) for s in seconds.values())
    truth = values["condgen"]
    out: dict[str, object] = {}
    print(f"\n{title}")
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        speed = f", {rows / middle:,.0f} rows/s" if rows else ""
        off = abs(values[name] - truth) / abs(truth)
        out[name] = {"seconds": middle, "differs_by": off}
        print(f"  {name:<30} {middle:8.3f} s  {slowest / middle:6.1f}x  differs by {off:.1e}{speed}", flush=True)
    return out


def held(which: str) -> float:
    """MiB that this process holds now (VmRSS) or has held at most since `forget_peak` (VmHWM)."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory(count: int, dim: int) -> dict[str, object]:
    """Seconds and MiB above the features of what is computed in blocks."""
    real, fake = features(count, dim, 1), features(count, dim, 2)
    ways: dict[str, Callable[[], object]] = {
        "statistics and Frechet distance": lambda: frechet_distance(gaussian_of(real), gaussian_of(fake)),
        "precision, recall, density, coverage": lambda: manifold(real, fake),
    }
    out: dict[str, object] = {}
    for name, way in ways.items():
        before = held("VmRSS")
        forget_peak()
        began = time.perf_counter()
        value = way()
        took, gained = time.perf_counter() - began, held("VmHWM") - before
        out[name] = {"seconds": took, "mib_above_features": gained}
        print(f"  {name}: {took:.0f} s, {gained:.0f} MiB above {before:.0f} MiB; {value}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-rows", type=int, default=50_000)
    parser.add_argument("--threads", type=int, help="torch's threads; the default is torch's")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    found: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dim": given.dim}
    if given.memory:
        print(f"{given.memory_rows:,} x {given.dim} against as many")
        found |= {"rows": given.memory_rows, **memory(given.memory_rows, given.dim)}
    else:
        found |= {"rows": given.rows, "rounds": given.rounds, **speeds(given.rows, given.dim, given.rounds)}
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def speeds(count: int, dim: int, rounds: int) -> dict[str, object]:
    one, two = features(count, dim, 1), features(count, dim, 2) * 1.1
    full = [gaussian_of(x) for x in (one, two)]
    out: dict[str, object] = {}
    out["distance"] = compare(f"Frechet distance, {dim} dimensions", traces(full[0], full[1]), rounds)
    few = max(3, dim // 2)
    singular = [gaussian_of(x[:few]) for x in (one, two)]
    out["singular"] = compare(f"the same, singular: {few} rows", traces(singular[0], singular[1]), rounds)
    out["statistics"] = compare(f"statistics of {count} x {dim}", collectors(one), rounds, count)
    return out


if __name__ == "__main__":
    main()
