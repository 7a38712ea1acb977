"""FID and KID of one set of pictures against another, with the anchors that make them readable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condgen.errors import DataError
from condgen.metrics.evaluator import Evaluator
from condgen.metrics.extractors import extractor
from condgen.metrics.frechet import MIN_SAMPLES, fid
from condgen.metrics.kernel import kid
from condgen.metrics.score import Score
from condgen.metrics.signature import signature

MIN_OF_CLASS = 50  # pictures of one class in each set, for a KID of the class


@dataclass(frozen=True)
class Labels:
    """Class numbers of the three sets (N,) and the classes' names: scores for each class too."""

    fake: Tensor
    real: Tensor
    other: Tensor
    names: Sequence[str] = ()


def quality_scores(
    fake: Tensor,
    real: Tensor,
    other: Tensor,
    *,
    name: str = "auto",
    about: Mapping[str, str],
    evaluator: Evaluator | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    labels: Labels | None = None,
) -> list[Score]:
    """KID always, FID where there are 2,048 pictures on both sides.

    fake, real   pictures (N, C, H, W); real ones from a split that was not trained on
    other        real pictures of another split: what a perfect generator would get (the ceiling)
    name         the extractor, see `condgen.metrics.extractors`
    about        signature fields that the caller knows: data, split
    labels       also `kid/<class>` for each class with 50 pictures in every set, and `fid/<class>` from 2,048
    The floor is uniform noise of the same shape, under the same extractor.
    """
    if min(len(fake), len(real), len(other)) < 4:
        raise DataError(f"KID needs at least 4 pictures a side; got {len(fake)}, {len(real)} and {len(other)}")
    network = extractor(name, evaluator=evaluator, device=device)
    noise = torch.rand(fake.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    sets = [network.features(x) for x in (fake, real, other, noise)]
    fields = {**about, **network.signature_fields(), "seed": str(seed)}
    found = _scores("", *sets, fields=fields, seed=seed)
    if labels is None:
        return found
    numbers = [x.cpu() for x in (labels.fake, labels.real, labels.other, labels.fake)]
    for number in numbers[0].unique().tolist():
        parts = [x[(of == number).to(x.device)] for x, of in zip(sets, numbers, strict=True)]
        if min(map(len, parts)) >= MIN_OF_CLASS:
            label = labels.names[number] if number < len(labels.names) else str(number)
            found += _scores(f"/{label}", *parts, fields=fields, seed=seed)
    return found


def _scores(
    suffix: str, fake: Tensor, real: Tensor, other: Tensor, noise: Tensor, *, fields: Mapping[str, str], seed: int
) -> list[Score]:
    """KID, and FID where there are enough, of features (n, d); `suffix` ends the names."""
    fields = {**fields, "n": str(len(fake)), "ref": str(len(real))}
    measured = kid(real, fake, seed=seed)
    subsets = {"subsets": measured.subsets, "subset_size": measured.subset_size}
    found = [
        Score(
            name=f"kid{suffix}",
            value=measured.value,
            floor=kid(real, noise, seed=seed).value,
            ceiling=kid(real, other, seed=seed).value,
            error=measured.error,
            signature=signature(f"kid{suffix}", **fields, **subsets),
            higher_is_better=False,
        )
    ]
    if min(len(fake), len(real)) >= MIN_SAMPLES:
        found.append(
            Score(
                name=f"fid{suffix}",
                value=fid(real, fake),
                floor=fid(real, noise),
                ceiling=fid(real, other) if len(other) >= MIN_SAMPLES else None,
                signature=signature(f"fid{suffix}", **fields),
                higher_is_better=False,
            )
        )
    return found
