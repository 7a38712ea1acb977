"""A toy: pictures of one colour, regressed from the condition by a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from condgen.conditions.stack import ConditionStack, assign_forms
from condgen.options import Range
from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec


class ToyRegressor(System):
    """noise is the standard deviation of what is added to a sample."""

    consumes: ClassVar[tuple[str, ...]] = ("vector",)

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        width: Annotated[int, Range(1, 64)] = 4,
        noise: float = 0.1,
        norm: Literal["l1", "l2"] = "l2",
        scales: tuple[float, float] = (1.0, 1.0),
        levels: Sequence[int] = (),
        warm: float | None = None,
        bias: bool = True,
        title: str = "toy",
    ) -> None:
        super().__init__(condition=condition, target=target)
        self.stack = ConditionStack(condition, assign_forms(condition, self.consumes))
        self.body = nn.Sequential(nn.Linear(self.stack.widths["vector"], width), nn.Linear(width, 3, bias=bias))
        self.noise, self.norm = noise, norm

    def phases(self) -> Sequence[Phase]:
        return [Phase("regression", self.loss, ("stack", "body"))]

    def colours(self, condition: Condition) -> Tensor:
        vector = self.stack(condition).vector
        return torch.tanh(self.body(vector))[:, :, None, None]

    def loss(self, batch: Batch, random: StepRandom) -> Losses:
        difference = self.colours(batch.condition) - batch.target
        return {"loss": difference.abs().mean() if self.norm == "l1" else difference.square().mean()}

    def sample(self, condition: Condition, *, random: Random) -> Tensor:
        colour = self.colours(condition)
        noise = random.randn(3, self.target_spec.height, self.target_spec.width).to(colour)
        return (colour + self.noise * noise).clamp(-1, 1)
