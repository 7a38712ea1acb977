"""Generative adversarial what-where networks: a sentence says what, a box or keypoints say where.

Reed, Akata, Mohan, Tenka, Schiele, Lee 2016, "Learning What and Where to Draw", NIPS, arXiv:1610.02454. The
published model is 128 px with one box, or with the 15 parts of CUB-200.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from condgen.conditions.keypoints import point_maps, union_map
from condgen.conditions.stack import ConditionStack
from condgen.errors import ConfigError, ShapeError
from condgen.losses.adversarial import AdversarialLoss, fake_loss, generator_loss, real_loss
from condgen.nn import gawwn_box, gawwn_keypoints
from condgen.nn.diffaugment import diffaugment
from condgen.nn.gawwn_parts import grid_of, without_batch_norm
from condgen.nn.initialise import add_spectral_norm
from condgen.nn.matching import whiten
from condgen.nn.reed import expect_two_rows
from condgen.options import Range
from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec

FIELDS = {"box": "boxes", "keypoints": "keypoints"}
SCORE_DECAY, REST = 0.99, 0.2  # of D's score of fakes, variant "mpii"


class Gawwn(System):
    """layout "box" places a thing with a spatial transformer, "keypoints" its parts with maps; "auto" takes the one
    that the data provide. Every other condition joins the words as a vector.

    layout               "auto", "box" or "keypoints"
    generator_width      ngf of the paper: 128
    discriminator_width  ndf: 128
    noise_dim            width of z ~ N(0, 1); every box has its own
    condition_dim        width of the projected words in D
    mismatch_weight      weight w of log(1 - D(real, where, other words)); the fakes get 1 - w. No other place is
                         ever given as wrong, as published
    mismatch             "other": each row gets the words of another row, of another class where the batch allows;
                         "released": of any row, its own included, as the released code shuffles
    text_map             box D only: "crop" as released, "paste" as the paper's figure suggests
    variant              keypoints only: "cub" or "mpii", the networks released for birds or for people; with the
                         latter D rests while its mean score of fakes, averaged over steps, is at most 0.2
    render               "cell" marks the cell that holds a keypoint, "released" half a cell up and left of it
    whiten_words         words to zero mean and unit variance; unit-length sentence vectors are else nearly invisible
    loss                 "bce" as published, or "hinge", "lsgan"
    critic_norm          "batch" as published, "none" for D without batch norm: with it D starts slowly
    spectral_norm        on every layer of D (Miyato et al. 2018, arXiv:1802.05957)
    projection           D's logit gains <V words, scene features> (Miyato, Koyama 2018, arXiv:1802.05637)
    diffaugment          of "color", "translation", "cutout"; boxes and points move with the pixels

    Images (B, C, S, S) with S = 2^n from 16; boxes (B, N, 4) or keypoints (B, K, 2), each of which may be missing.
    sample: (B, C, S, S) in [-1, 1].
    """

    consumes: ClassVar[tuple[str, ...]] = ("vector",)
    requires: ClassVar[tuple[str, ...]] = ("text",)
    needs_one_of: ClassVar[tuple[str, ...]] = ("boxes", "keypoints")
    generates: ClassVar[tuple[str, ...]] = ("generator",)

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        layout: Literal["auto", "box", "keypoints"] = "auto",
        generator_width: Annotated[int, Range(1)] = 128,
        discriminator_width: Annotated[int, Range(1)] = 128,
        noise_dim: Annotated[int, Range(1)] = 100,
        condition_dim: Annotated[int, Range(1)] = 128,
        mismatch_weight: Annotated[float, Range(0, 1)] = 0.5,
        mismatch: Literal["other", "released"] = "other",
        text_map: Literal["crop", "paste"] = "crop",
        variant: Literal["cub", "mpii"] = "cub",
        render: Literal["cell", "released"] = "cell",
        whiten_words: bool = False,
        loss: AdversarialLoss = "bce",
        critic_norm: Literal["batch", "none"] = "batch",
        spectral_norm: bool = False,
        projection: bool = False,
        diffaugment: Sequence[Literal["color", "translation", "cutout"]] = (),
    ) -> None:
        super().__init__(condition=condition, target=target)
        self.layout = chosen_layout(layout, condition)
        side = _side(target)
        self.noise_dim, self.mismatch_weight, self.mismatch = noise_dim, mismatch_weight, mismatch
        self.loss, self.diffaugment, self.people = loss, tuple(diffaugment), variant == "mpii"
        if self.people and self.layout == "box":
            raise ConfigError("system.variant=mpii are networks for keypoints; this run draws boxes (system.layout)")
        where, words = FIELDS[self.layout], condition.without([FIELDS[self.layout]])
        stacks = [ConditionStack(words, dict.fromkeys(words.given, "vector")) for _ in range(2)]
        vector, channels = stacks[0].widths["vector"], target.channels
        generator: nn.Module
        critic: nn.Module
        if condition.boxes is not None and self.layout == "box":
            self.noise_shape: tuple[int, ...] = (condition.boxes.max_boxes, noise_dim)
            generator = gawwn_box.Generator(vector, side, channels, generator_width, noise_dim)
            critic = gawwn_box.Discriminator(
                vector, side, channels, discriminator_width, condition_dim, text_map=text_map, projection=projection
            )
        else:
            assert condition.keypoints is not None
            points, self.noise_shape = condition.keypoints.num_points, (noise_dim,)
            generator = gawwn_keypoints.Generator(
                vector, points, side, channels, generator_width, noise_dim, people=self.people
            )
            critic = gawwn_keypoints.Discriminator(
                vector,
                points,
                side,
                channels,
                discriminator_width,
                condition_dim,
                people=self.people,
                projection=projection,
            )
        if critic_norm == "none":
            without_batch_norm(critic)
        if spectral_norm:
            add_spectral_norm(critic)
        self.generator = Placed(stacks[0], generator, where, grid_of(side), render, whiten_words)
        self.fake_score: Tensor
        if self.people:
            self.register_buffer("fake_score", torch.tensor(0.5))
        self.discriminator = Placed(stacks[1], critic, where, grid_of(side), render, whiten_words)

    def phases(self) -> Sequence[Phase]:
        return [
            Phase("discriminator", self.discriminator_loss, trains=("discriminator",)),
            Phase("generator", self.generator_loss, trains=("generator",)),
        ]

    def discriminator_loss(self, batch: Batch, random: StepRandom) -> Losses | None:
        """-log D(x, p, t) - w log(1 - D(x, p, t')) - (1 - w) log(1 - D(G(z, p, t), p, t)), p the place, t' words
        of another row. Three passes, so that D's batch norm sees one kind of pair at a time, as released.
        None while D rests, see `variant`."""
        expect_two_rows(len(batch))
        condition = batch.condition
        with torch.no_grad():
            fake = self.generator(random.randn(*self.noise_shape), condition)
        resting = self.people and float(self.fake_score) <= REST
        losses = {"real": real_loss(self._judge(batch.target, condition, random), self.loss)}
        of_fake = self._scored(self._judge(fake, condition, random))
        if resting:
            return None
        losses["fake"] = fake_loss(of_fake, self.loss)
        total = losses["real"] + (1 - self.mismatch_weight) * losses["fake"]
        if self.mismatch_weight > 0:
            wrong = self.with_other_words(condition, random)
            losses["wrong"] = fake_loss(self._judge(batch.target, wrong, random), self.loss)
            total = total + self.mismatch_weight * losses["wrong"]
        return {"loss": total, **losses}

    def generator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """-log D(G(z, p, t), p, t)."""
        expect_two_rows(len(batch))
        fake = self.generator(random.randn(*self.noise_shape), batch.condition)
        return {"loss": generator_loss(self._scored(self._judge(fake, batch.condition, random)), self.loss)}

    def _scored(self, logits: Tensor) -> Tensor:
        """The logits of fakes as they are; their mean probability enters the running score of variant "mpii"."""
        if self.people:
            with torch.no_grad():
                self.fake_score.lerp_(logits.float().sigmoid().mean(), 1 - SCORE_DECAY)
        return logits

    def sample(self, condition: Condition, *, random: Random) -> Tensor:
        return self.generator(random.randn(*self.noise_shape), condition).float()

    def with_other_words(self, condition: Condition, random: StepRandom) -> Condition:
        """The same places, everything else from other rows."""
        rows = len(condition)
        if self.mismatch == "released":
            order = torch.randperm(rows, generator=random.local)
        else:
            order = condition.mismatch(random.local)
        where, other = FIELDS[self.layout], condition.index(order)
        present = {name: condition.present[name] if name == where else other.present[name] for name in other.present}
        if where == "boxes":
            return replace(other, boxes=condition.boxes, present=present)
        return replace(other, keypoints=condition.keypoints, present=present)

    def _judge(self, pixels: Tensor, condition: Condition, random: StepRandom) -> Tensor:
        if self.diffaugment:
            pixels, condition = diffaugment(pixels.float(), condition, random, self.diffaugment)
        return self.discriminator(pixels, condition)


class Placed(nn.Module):
    """A network fed with the words and the place: net(x, words, *place).

    where  "boxes": the place is corners (B, N, 4) and valid (B, N); "keypoints": maps (B, K, grid, grid) and their
           union. What is not visible, not valid or not present is as if it had not been given.
    """

    def __init__(
        self, stack: ConditionStack, net: nn.Module, where: str, grid: int, render: str, whiten_words: bool
    ) -> None:
        super().__init__()
        self.stack, self.net, self.where = stack, net, where
        self.grid, self.render, self.whiten_words = grid, render, whiten_words

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        words = self.stack(condition).vector
        return self.net(x, whiten(words) if self.whiten_words else words, *self.place(condition))

    def place(self, condition: Condition) -> tuple[Tensor, Tensor]:
        if getattr(condition, self.where) is None:
            given = ", ".join(condition.given) or "nothing"
            raise ShapeError(f"this gawwn was built for {self.where}, which the condition lacks; it holds {given}")
        present = condition.is_present(self.where)[:, None]
        if self.where == "boxes":
            boxes = condition.boxes
            assert boxes is not None
            return boxes.xyxy.float(), boxes.valid & present
        points = condition.keypoints
        assert points is not None
        maps = point_maps(points.xy, points.visible & present, (self.grid, self.grid), render=self.render)
        return maps, union_map(maps)


def chosen_layout(layout: str, condition: ConditionSpec) -> str:
    """ "box" or "keypoints". Raises ConfigError where the data lack it, or where "auto" has two to choose from."""
    given = [name for name, field in FIELDS.items() if getattr(condition, field) is not None]
    has = ", ".join(condition.given) or "no condition"
    if condition.text is None:
        raise ConfigError(f"gawwn needs text, for what to draw; the data give {has}")
    if layout != "auto" and layout not in given:
        raise ConfigError(
            f"gawwn with system.layout={layout} needs {FIELDS[layout]}; the data give {has}. Take {FIELDS[layout]} off "
            "data.ignore, choose a data set that provides it, or another system.layout: auto, box, keypoints"
        )
    if layout != "auto":
        return layout
    if not given:
        raise ConfigError(f"gawwn needs boxes or keypoints, for where to draw; the data give {has}")
    if len(given) > 1:
        raise ConfigError(
            "gawwn is given boxes and keypoints; choose system.layout=box or system.layout=keypoints (the other then "
            "joins the words as a vector), or leave one out with data.ignore"
        )
    return given[0]


def _side(target: TargetSpec) -> int:
    side = target.height
    if target.frames or target.width != side or side < 16 or side & (side - 1):
        raise ShapeError(
            f"gawwn makes square images of 16, 32, 64, 128, ... px; the data give {target.height} x {target.width}"
            + (f" x {target.frames} frames" if target.frames else "")
        )
    return side
