"""A small system for tests, in a project folder as a user would write one: any condition, one linear generator."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec

NOISE = 4


class _Generator(nn.Module):
    """Batch norm makes rows depend on each other in training mode, which tests of sampling need."""

    def __init__(self, condition: ConditionSpec, target: TargetSpec, widths: Sequence[int]) -> None:
        super().__init__()
        self.fields = condition.given
        self.classes = condition.label.num_classes if condition.label is not None else 0
        self.shape = target.shape
        sizes = [*widths, torch.Size(target.shape).numel()]
        layers: list[nn.Module] = [nn.Linear(NOISE + self.width(condition), sizes[0])]
        for low, high in pairwise(sizes):
            layers += [nn.BatchNorm1d(low), nn.ReLU(), nn.Linear(low, high)]
        self.layers = nn.Sequential(*layers)

    @staticmethod
    def width(condition: ConditionSpec) -> int:
        sizes = {
            "label": lambda s: s.num_classes,
            "text": lambda s: s.pooled,
            "boxes": lambda s: 5 * s.max_boxes,
            "keypoints": lambda s: 3 * s.num_points,
            "image": lambda s: s.channels * s.height * s.width,
            "frames": lambda s: s.frames * s.channels * s.height * s.width,
        }
        return sum(sizes[name](spec) for name, spec in condition.items())

    def features(self, condition: Condition) -> Tensor:
        parts = []
        for name in self.fields:
            value = getattr(condition, name)
            if name == "label":
                flat = [nn.functional.one_hot(value.clamp(min=0), self.classes).float()]
            elif name == "text":
                flat = [value.pooled]
            elif name == "boxes":
                flat = [value.xyxy.flatten(1), value.valid.float()]
            elif name == "keypoints":
                flat = [value.xy.flatten(1), value.visible.float()]
            else:
                flat = [value.pixels.flatten(1)]
            parts.append(torch.cat(flat, dim=1) * condition.is_present(name)[:, None])
        return torch.cat(parts, dim=1)

    def forward(self, noise: Tensor, condition: Condition) -> Tensor:
        given = [noise, self.features(condition)] if self.fields else [noise]
        return torch.tanh(self.layers(torch.cat(given, dim=1))).view(-1, *self.shape)


class Toy(System):
    """widths: hidden widths; scale: multiplies the output; broken: "nan" or "shape" for tests of checks."""

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        widths: tuple[int, ...] = (16, 16),
        scale: float = 1.0,
        broken: str = "",
        style: bool = True,
    ) -> None:
        super().__init__(condition=condition, target=target)
        assert isinstance(widths, tuple)
        self.scale, self.broken = scale, broken
        self.generator = _Generator(condition, target, widths)
        self.style_encoder = nn.Linear(torch.Size(target.shape).numel(), NOISE) if style else None
        self.critic = nn.Linear(torch.Size(target.shape).numel(), 64)
        self.register_buffer("pool", torch.zeros(32, 8))

    @property
    def generates(self) -> tuple[str, ...]:  # type: ignore[override]
        """An option may decide it, so it is known of an instance only."""
        return ("generator", "style_encoder") if self.style_encoder is not None else ("generator",)

    def phases(self) -> Sequence[Phase]:
        return [Phase("generator", self.loss, ("generator",))]

    def loss(self, batch: Batch, random: StepRandom) -> Losses:
        made = self.generator(random.randn(NOISE), batch.condition)
        return {"loss": (made - batch.target).square().mean()}

    def sample(self, condition: Condition, *, random: Random, shift: float = 0.0) -> Tensor:
        made = self.decode(random.randn(NOISE), condition) + shift
        if self.broken == "nan":
            made = made / 0 * 0
        return made[..., 1:] if self.broken == "shape" else made

    def encode(self, target: Tensor, condition: Condition) -> Tensor:
        return self.style_encoder(target.flatten(1))

    def decode(self, latent: Tensor, condition: Condition) -> Tensor:
        return self.generator(latent, condition) * self.scale
