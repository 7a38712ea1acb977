"""Keypoint completion from text: the conditional keypoint generator of GAWWN.

Reed et al. 2016, "Learning What and Where to Draw", arXiv:1610.02454, section 3.4. Given a sentence and any of the
points, it draws the others; what it returns goes to `gawwn` as its keypoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from condgen.conditions.stack import ConditionStack
from condgen.errors import ConfigError
from condgen.losses.adversarial import AdversarialLoss, fake_loss, generator_loss, real_loss
from condgen.nn.initialise import initialise
from condgen.nn.matching import whiten
from condgen.nn.reed import expect_two_rows, leaky, relu
from condgen.options import Range
from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, Trainable
from condgen.types import Batch, Condition, ConditionSpec, Keypoints, TargetSpec


class KeypointGan(Trainable):
    """A point is (x, y, visible) in [0, 1]; one that is not visible is three zeros. Given points are returned as
    they are: a hard copy by mask, not a penalty. Every condition besides keypoints joins the words as a vector.

    generator_width, discriminator_width   g and d of the paper: 128
    noise_dim      width of z ~ N(0, 1)
    drop           probability that training hides each point from G: 0.9
    whiten_words   words to zero mean and unit variance; unit-length sentence vectors are else nearly invisible
    loss           "bce" as published, or "hinge", "lsgan"; no mismatched pairs, as published
    """

    consumes: ClassVar[tuple[str, ...]] = ("vector",)
    requires: ClassVar[tuple[str, ...]] = ("text", "keypoints")
    generates: ClassVar[tuple[str, ...]] = ("generator",)

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        generator_width: Annotated[int, Range(1)] = 128,
        discriminator_width: Annotated[int, Range(1)] = 128,
        noise_dim: Annotated[int, Range(1)] = 100,
        drop: Annotated[float, Range(0, 1)] = 0.9,
        whiten_words: bool = False,
        loss: AdversarialLoss = "bce",
    ) -> None:
        super().__init__(condition=condition, target=target)
        if condition.keypoints is None or condition.text is None:
            has = ", ".join(condition.given) or "no condition"
            raise ConfigError(f"keypoint_gan completes keypoints from text and needs both; the data give {has}")
        words = condition.without(["keypoints"])
        stacks = [ConditionStack(words, dict.fromkeys(words.given, "vector")) for _ in range(2)]
        vector, points = stacks[0].widths["vector"], condition.keypoints.num_points
        self.noise_dim, self.drop, self.loss = noise_dim, drop, loss
        self.generator = Completer(stacks[0], vector, points, generator_width, noise_dim, whiten_words)
        self.discriminator = Judge(stacks[1], vector, points, discriminator_width, whiten_words)

    def phases(self) -> Sequence[Phase]:
        return [
            Phase("discriminator", self.discriminator_loss, trains=("discriminator",)),
            Phase("generator", self.generator_loss, trains=("generator",)),
        ]

    def discriminator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """-log D(k, t) - log(1 - D(G(z, t, k~), t)), k~ the points that the drop left."""
        expect_two_rows(len(batch))
        real = as_triples(batch.condition)
        with torch.no_grad():
            fake = self._completed(real, batch.condition, random)
        losses = {
            "real": real_loss(self.discriminator(real, batch.condition), self.loss),
            "fake": fake_loss(self.discriminator(fake, batch.condition), self.loss),
        }
        return {"loss": losses["real"] + losses["fake"], **losses}

    def generator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """-log D(G(z, t, k~), t)."""
        expect_two_rows(len(batch))
        fake = self._completed(as_triples(batch.condition), batch.condition, random)
        return {"loss": generator_loss(self.discriminator(fake, batch.condition), self.loss)}

    def complete(self, condition: Condition, *, random: Random, threshold: float = 0.5) -> Keypoints:
        """The given points exactly as they are, and the drawn ones whose visibility exceeds the threshold."""
        given = as_triples(condition)
        drawn = self.generator(random.randn(self.noise_dim), given, condition).float()
        known = given[..., 2] > 0
        visible = known | (drawn[..., 2] > threshold)
        xy = torch.where(visible[..., None], drawn[..., :2], torch.zeros_like(drawn[..., :2]))
        return Keypoints(xy, visible)

    def _completed(self, real: Tensor, condition: Condition, random: StepRandom) -> Tensor:
        kept = random.rand(real.shape[1]) >= self.drop
        return self.generator(random.randn(self.noise_dim), real * kept[..., None], condition)


def as_triples(condition: Condition) -> Tensor:
    """float (B, K, 3): x, y, visible; zeros for a point that is not visible or not present."""
    points = condition.keypoints
    assert points is not None
    visible = (points.visible & condition.is_present("keypoints")[:, None])[..., None]
    triples = torch.cat([points.xy.float(), visible.float()], dim=-1)
    return torch.where(visible, triples, torch.zeros_like(triples))


class Completer(nn.Module):
    """noise (B, Z), given (B, K, 3), condition -> (B, K, 3) in [0, 1] that holds the given points unchanged."""

    def __init__(
        self, stack: ConditionStack, vector_dim: int, points: int, width: int, noise_dim: int, whiten_words: bool
    ) -> None:
        super().__init__()
        g, self.stack, self.whiten_words = width, stack, whiten_words
        self.noise = nn.Sequential(nn.Linear(noise_dim, 4 * g), relu())
        self.words = nn.Sequential(nn.Linear(vector_dim, 4 * g), relu())
        self.given = _dense([3 * points, 4 * g, 2 * g], relu())
        self.body = nn.Sequential(_dense([10 * g, 8 * g, 4 * g, 2 * g], relu()), nn.Linear(2 * g, 3 * points))
        self.apply(initialise)

    def forward(self, noise: Tensor, given: Tensor, condition: Condition) -> Tensor:
        vector = self.stack(condition).vector
        words = self.words(whiten(vector) if self.whiten_words else vector)
        code = torch.cat([self.noise(noise.to(words.dtype)), words, self.given(given.flatten(1))], dim=1)
        drawn = torch.sigmoid(self.body(code).float()).view_as(given)
        return torch.where(given[..., 2:] > 0, given, drawn)


class Judge(nn.Module):
    """points (B, K, 3), condition -> logits (B,)."""

    def __init__(self, stack: ConditionStack, vector_dim: int, points: int, width: int, whiten_words: bool) -> None:
        super().__init__()
        d, self.stack, self.whiten_words = width, stack, whiten_words
        self.points = _dense([3 * points, 4 * d, 2 * d], leaky())
        self.words = _dense([vector_dim, 4 * d, 2 * d], leaky())
        self.score = nn.Sequential(_dense([4 * d, 2 * d], leaky()), nn.Linear(2 * d, 1))
        self.apply(initialise)

    def forward(self, points: Tensor, condition: Condition) -> Tensor:
        vector = self.stack(condition).vector
        words = self.words(whiten(vector) if self.whiten_words else vector)
        return self.score(torch.cat([self.points(points.flatten(1)), words], dim=1)).flatten()


def _dense(widths: Sequence[int], activation: nn.Module) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), activation]
    return nn.Sequential(*layers)
