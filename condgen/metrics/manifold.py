"""Fidelity and variety apart: precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991), density and coverage
(Naeem et al. 2020, arXiv:2002.09797). Each set is the union of balls around its features up to their k-th neighbour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condgen import rng
from condgen.errors import DataError
from condgen.metrics.neighbours import radii, tiles
from condgen.metrics.score import Score
from condgen.metrics.signature import signature

K_PRECISION, K_DENSITY = 3, 5  # as published
NAMES = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Manifold:
    """precision  share of samples inside a ball of a real picture (border included): do they look real?
    recall     share of real pictures inside a ball of a sample (border included): is everything drawn?
    density    real balls a sample lies in, over k: unlike precision not fooled by one far real picture; may exceed 1
    coverage   share of real balls that hold a sample: unlike recall not fooled by one far sample
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(
    real: Tensor,
    fake: Tensor,
    *,
    k: int = K_PRECISION,
    k_density: int = K_DENSITY,
    known: Sequence[Tensor] | None = None,
) -> Manifold:
    """Of features (N, d) and (M, d), float64, in tiles. Compare only equal N = M: all four depend on both.

    known   `radii(real, k, k_density)`, where several sets are held against one
    Raises DataError where a set has no k-th neighbour.
    """
    real_k, real_d = known or radii(real, k, k_density)
    (fake_k,) = radii(fake, k)
    precise = torch.zeros(len(fake), dtype=torch.bool)
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool) for _ in range(2))
    inside = 0
    for rows, columns, square in tiles(fake, real):
        near = square.cpu()
        precise[rows] |= (near <= real_k[columns]).any(1)
        recalled[columns] |= (near <= fake_k[rows, None]).any(0)
        within = near < real_d[columns]
        inside += int(within.sum())
        covered[columns] |= within.any(0)
    shares = [float(x.double().mean()) for x in (precise, recalled, covered)]
    return Manifold(shares[0], shares[1], inside / (k_density * len(fake)), shares[2])


def manifold_scores(
    fake: Tensor,
    real: Tensor,
    other: Tensor,
    noise: Tensor,
    *,
    fields: Mapping[str, object],
    seed: int = 0,
    suffix: str = "",
) -> list[Score]:
    """The four scores of features (n, d), of as many rows of each set as the smallest has, drawn by seed.

    Floor: noise. Ceiling: real pictures of another split.
    """
    count = min(map(len, (fake, real, other, noise)))
    if count <= K_DENSITY:
        raise DataError(f"precision and density need more than {K_DENSITY} pictures in every set; got {count}")
    drawn = [x[rng.permutation(len(x), seed, "manifold", i)[:count]] for i, x in enumerate((fake, real, other, noise))]
    known = radii(drawn[1], K_PRECISION, K_DENSITY)
    value, best, worst = (manifold(drawn[1], drawn[i], known=known) for i in (0, 2, 3))
    out = []
    for name in NAMES:
        k = K_PRECISION if name in NAMES[:2] else K_DENSITY
        out.append(Score(
            f"{name}{suffix}", getattr(value, name), floor=getattr(worst, name), ceiling=getattr(best, name),
            signature=signature(f"{name}{suffix}", **fields, neighbours=k, n=count, ref=count, seed=seed),
        ))  # fmt: skip
    return out
