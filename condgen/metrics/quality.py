"""FID and KID of one set of pictures against another, with the anchors that make them readable."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from condgen.errors import DataError
from condgen.metrics.evaluator import Evaluator
from condgen.metrics.extractors import extractor
from condgen.metrics.frechet import MIN_SAMPLES, fid
from condgen.metrics.kernel import kid
from condgen.metrics.score import Score
from condgen.metrics.signature import signature


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
) -> list[Score]:
    """KID always, FID where there are 2,048 pictures on both sides.

    fake, real   pictures (N, C, H, W); real ones from a split that was not trained on
    other        real pictures of another split: what a perfect generator would get (the ceiling)
    name         the extractor, see `condgen.metrics.extractors`
    about        signature fields that the caller knows: data, split
    The floor is uniform noise of the same shape, under the same extractor.
    """
    if min(len(fake), len(real), len(other)) < 4:
        raise DataError(f"KID needs at least 4 pictures a side; got {len(fake)}, {len(real)} and {len(other)}")
    network = extractor(name, evaluator=evaluator, device=device)
    noise = torch.rand(fake.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    of_fake, of_real, of_other, of_noise = (network.features(x) for x in (fake, real, other, noise))
    fields = {**about, **network.signature_fields(), "n": str(len(fake)), "ref": str(len(real)), "seed": str(seed)}
    measured = kid(of_real, of_fake, seed=seed)
    found = [
        Score(
            name="kid",
            value=measured.value,
            floor=kid(of_real, of_noise, seed=seed).value,
            ceiling=kid(of_real, of_other, seed=seed).value,
            error=measured.error,
            signature=signature("kid", **fields, subsets=measured.subsets, subset_size=measured.subset_size),
            higher_is_better=False,
        )
    ]
    if min(len(fake), len(real)) >= MIN_SAMPLES:
        found.append(
            Score(
                name="fid",
                value=fid(of_real, of_fake),
                floor=fid(of_real, of_noise),
                ceiling=fid(of_real, of_other) if len(other) >= MIN_SAMPLES else None,
                signature=signature("fid", **fields),
                higher_is_better=False,
            )
        )
    return found
