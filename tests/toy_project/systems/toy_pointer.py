"""A toy that cannot work without keypoints, and that takes maps alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec


class ToyPointer(System):
    consumes: ClassVar[tuple[str, ...]] = ("temporal",)
    requires: ClassVar[tuple[str, ...]] = ("keypoints",)

    def __init__(self, *, condition: ConditionSpec, target: TargetSpec, width: int) -> None:
        super().__init__(condition=condition, target=target)
        self.level = nn.Parameter(torch.zeros(width))

    def phases(self) -> Sequence[Phase]:
        return []

    def loss(self, batch: Batch, random: StepRandom) -> Losses:
        return {"loss": self.level.sum()}

    def sample(self, condition: Condition, *, random: Random) -> Tensor:
        return random.randn(*self.target_spec.shape)
