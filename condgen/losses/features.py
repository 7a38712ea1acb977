"""Distance between the activations that two sets of pictures raise in one network: feature matching, perceptual loss.

Feature matching of a discriminator: Wang et al. 2018, arXiv:1711.11585. Perceptual loss: Johnson et al. 2016,
arXiv:1603.08155, there with squares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def feature_distance(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of each layer (B, ...), then the mean over layers: a float32 scalar."""
    gaps = [(a.float() - b.float()).abs().mean() for a, b in zip(fake, real, strict=True)]
    return torch.stack(gaps).mean()
