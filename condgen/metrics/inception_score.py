"""Inception score (Salimans et al. 2016, arXiv:1606.03498): exp of the mean KL(p(y|x) || p(y)) over a classifier.

It is the published one only with the head of the 2015 Inception; with another classifier the signature names it.
It looks at no real picture and at no variety within a class: one perfect picture a class gets the best value, K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from condgen import rng
from condgen.errors import DataError, ShapeError
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.metrics.statistics import to_float64

SPLITS = 10
BLOCK = 4096  # rows of probabilities in float64


@dataclass(frozen=True)
class Inception:
    """value: mean over splits; error: standard deviation over splits, as papers print it."""

    value: float
    error: float
    splits: int


def inception_score(logits: Tensor, *, splits: int = SPLITS, seed: int | None = 0) -> Inception:
    """Of logits (N, K), in float64. The rows are shuffled by `seed` (None = their own order) and cut into `splits`
    runs of equal length; fewer rows a split make the value lower. Raises DataError below 2 rows a split.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ShapeError(f"logits of shape {tuple(logits.shape)}; give (N, K) of at least 2 classes")
    if splits < 1 or len(logits) < 2 * splits:
        raise DataError(f"{splits} splits need at least {2 * max(1, splits)} pictures; there are {len(logits)}")
    if not bool(torch.isfinite(logits).all()):
        raise DataError("the logits hold NaN or inf; check the pictures and the extractor")
    order = torch.arange(len(logits)) if seed is None else rng.permutation(len(logits), seed, "inception score")
    count = len(logits)
    values = torch.tensor([
        _score(logits, order[i * count // splits : (i + 1) * count // splits]) for i in range(splits)
    ], dtype=torch.float64)  # fmt: skip
    return Inception(float(values.mean()), float(values.std(unbiased=False)), splits)


def _score(logits: Tensor, rows: Tensor) -> float:
    """KL(p(y|x) || p(y)) is the entropy of the mean less the mean of the entropies."""
    mean = torch.zeros(logits.shape[1], dtype=torch.float64)
    negative_entropy = 0.0
    for part in rows.split(BLOCK):
        log_p = to_float64(logits[part.to(logits.device)]).log_softmax(1).cpu()
        p = log_p.exp()
        mean += p.sum(0)
        negative_entropy += float((p * log_p).sum())
    mean /= len(rows)
    entropy = -float(torch.special.xlogy(mean, mean).sum())
    return float(torch.tensor(entropy + negative_entropy / len(rows), dtype=torch.float64).exp())


def inception_scores(
    fake: Tensor, real: Tensor, noise: Tensor, *, head: str, fields: Mapping[str, object], seed: int = 0
) -> list[Score]:
    """`is` of logits (n, K). Floor: noise. Ceiling: held-out real pictures, as many as there are of both.

    head: the classifier's name and hash, for the signature.
    """
    count = min(len(fake), len(real))
    splits = min(SPLITS, count // 2)
    if splits < 1:
        raise DataError(f"an Inception score needs at least 2 pictures; got {count}")
    value, worst = (inception_score(x, splits=splits, seed=seed) for x in (fake, noise))
    best = inception_score(real[:count], splits=splits, seed=seed)
    text = signature("is", **fields, head=head, classes=fake.shape[1], splits=splits, n=len(fake), ref=count, seed=seed)
    return [Score("is", value.value, floor=worst.value, ceiling=best.value, error=value.error, signature=text)]
