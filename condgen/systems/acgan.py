"""Class-conditional GANs in one system: AC-GAN, the conditional GAN by concatenation or projection, and DCGAN.

AC-GAN: Odena, Olah, Shlens 2017, arXiv:1610.09585. Conditional GAN: Mirza, Osindero 2014, arXiv:1411.1784.
Projection: Miyato, Koyama 2018, arXiv:1802.05637. DCGAN: Radford, Metz, Chintala 2015, arXiv:1511.06434.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.conditions.stack import ConditionStack, assign_forms
from condgen.errors import ConfigError, ShapeError
from condgen.losses.adversarial import AdversarialLoss, fake_loss, generator_loss, real_loss
from condgen.nn import dcgan
from condgen.nn.diffaugment import diffaugment
from condgen.nn.initialise import add_spectral_norm
from condgen.options import Range
from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec

Conditioning = Literal["auxiliary", "concat", "projection", "none"]


class AcGan(System):
    """conditioning "auxiliary" with architecture "acgan" is AC-GAN; "none" with "dcgan" is DCGAN.

    conditioning      how D learns about the condition; G always gets it beside its noise
        "auxiliary"   D is not told the class and names it with a second head, on real and fake pictures
        "concat"      D sees the condition's vector as constant maps beside the pixels
        "projection"  D's logit gains <V vector, features summed over positions>
        "none"        no condition at all; data that carry one are refused
    architecture      "acgan" (16, 32, 64, 128 px) or "dcgan" (16, 32, 64, ... px), see `condgen.nn.dcgan`
    generator_width, discriminator_width   multiples of the published widths
    noise_dim, noise  width and law of z: "normal" N(0, 1), or "uniform" U(-1, 1) as in DCGAN's first release
    dropout, activation_noise   of the "acgan" D, in training: share of dropped units, and the standard deviation of
                      normal noise that is added after every activation (the paper tried 0, 0.1 and 0.2)
    batchnorm         in D, as published; without it spectral_norm keeps D in bounds
    spectral_norm     on every layer of D (Miyato et al. 2018, arXiv:1802.05957)
    loss              "bce" as published, or "hinge", "lsgan"
    auxiliary_weight  of the class term in D; generator_auxiliary_weight in G. Published: 1 and 1; too high a value
                      in G rewards samples that are easy to name and all alike
    auxiliary_fake    D's class head also learns from fakes, as published
    fake_labels       "data": the classes of the batch; "uniform": drawn afresh, as in AC-GAN
    diffaugment       of "color", "translation", "cutout" (Zhao et al. 2020, arXiv:2006.10738)

    "auxiliary" takes the label alone; rows without one (-1) do not enter the class terms. "concat" and "projection"
    take any condition that has a vector form. Dropout draws from torch's generator, which the engine seeds for each
    rank and step: with it, two processes do not repeat the masks of one.

    Pictures (B, C, S, S). sample: (B, C, S, S) in [-1, 1].
    """

    consumes: ClassVar[tuple[str, ...]] = ("vector",)
    generates: ClassVar[tuple[str, ...]] = ("generator",)

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        conditioning: Conditioning = "auxiliary",
        architecture: Literal["acgan", "dcgan"] = "acgan",
        generator_width: Annotated[float, Range(0)] = 1.0,
        discriminator_width: Annotated[float, Range(0)] = 1.0,
        noise_dim: Annotated[int, Range(1)] = 100,
        noise: Literal["normal", "uniform"] = "normal",
        dropout: Annotated[float, Range(0, 1)] = 0.5,
        activation_noise: Annotated[float, Range(0)] = 0.0,
        batchnorm: bool = True,
        spectral_norm: bool = False,
        loss: AdversarialLoss = "bce",
        auxiliary_weight: Annotated[float, Range(0)] = 1.0,
        generator_auxiliary_weight: Annotated[float, Range(0)] = 1.0,
        auxiliary_fake: bool = True,
        fake_labels: Literal["data", "uniform"] = "data",
        diffaugment: Sequence[Literal["color", "translation", "cutout"]] = (),
    ) -> None:
        super().__init__(condition=condition, target=target)
        check_condition(condition, conditioning, fake_labels)
        side = _side(target)
        self.conditioning, self.noise_dim, self.noise, self.loss = conditioning, noise_dim, noise, loss
        self.auxiliary_weight, self.generator_auxiliary_weight = auxiliary_weight, generator_auxiliary_weight
        self.auxiliary_fake, self.fake_labels, self.diffaugment = auxiliary_fake, fake_labels, tuple(diffaugment)
        self.classes = condition.label.num_classes if condition.label is not None else 0
        forms = assign_forms(condition, self.consumes)
        stack = ConditionStack(condition, forms)
        vector = stack.widths["vector"]
        body = dcgan.generator(architecture, noise_dim + vector, side, target.channels, generator_width)
        self.generator = Generator(stack if vector else None, body)
        told = conditioning in ("concat", "projection")
        trunk = dcgan.trunk(
            architecture, target.channels + (vector if conditioning == "concat" else 0), side, discriminator_width,
            batchnorm=batchnorm, dropout=dropout, activation_noise=activation_noise,
        )  # fmt: skip
        outputs = 1 + (self.classes if conditioning == "auxiliary" else 0)
        self.discriminator = Discriminator(
            ConditionStack(condition, forms) if told else None,
            trunk,
            dcgan.head(architecture, trunk, side, outputs),
            match=nn.Linear(vector, dcgan.features(trunk), bias=False) if conditioning == "projection" else None,
            spectral_norm=spectral_norm,
        )

    def phases(self) -> Sequence[Phase]:
        return [
            Phase("discriminator", self.discriminator_loss, trains=("discriminator",)),
            Phase("generator", self.generator_loss, trains=("generator",)),
        ]

    def discriminator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """-(L_S + w L_C): real against fake, plus, with "auxiliary", the classes of both.

        Real and fake pass D separately, so that its batch norm never mixes them.
        """
        asked = self._asked(batch.condition, random)
        with torch.no_grad():
            fake = self.generator(self.draw(random), asked)
        real_logit, real_class = self._judge(batch.target, batch.condition, random)
        fake_logit, fake_class = self._judge(fake, asked, random)
        losses = {"real": real_loss(real_logit, self.loss), "fake": fake_loss(fake_logit, self.loss)}
        total = losses["real"] + losses["fake"]
        if self.conditioning == "auxiliary":
            losses["class_real"] = class_loss(real_class, batch.condition.label)
            losses["class_fake"] = class_loss(fake_class, asked.label)
            total = total + self.auxiliary_weight * losses["class_real"]
            if self.auxiliary_fake:
                total = total + self.auxiliary_weight * losses["class_fake"]
        return {"loss": total, **losses}

    def generator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """-(w L_C - L_S) in its non-saturating form: -log P(real | G(z, c)), plus the class of G(z, c)."""
        asked = self._asked(batch.condition, random)
        logit, named = self._judge(self.generator(self.draw(random), asked), asked, random)
        losses = {"adversarial": generator_loss(logit, self.loss)}
        total = losses["adversarial"]
        if self.conditioning == "auxiliary":
            losses["class"] = class_loss(named, asked.label)
            total = total + self.generator_auxiliary_weight * losses["class"]
        return {"loss": total, **losses}

    def sample(self, condition: Condition, *, random: Random) -> Tensor:
        return self.decode(self.draw(random), condition)

    def decode(self, latent: Tensor, condition: Condition) -> Tensor:
        """z (B, noise_dim) and its condition -> (B, C, S, S) in [-1, 1], for arithmetic and walks in z."""
        if latent.dim() != 2 or latent.shape[1] != self.noise_dim:
            raise ShapeError(f"latent has shape {tuple(latent.shape)}; this system takes (B, {self.noise_dim})")
        return self.generator(latent, condition).float()

    def draw(self, random: Random) -> Tensor:
        """z (rows, noise_dim) of the law `noise`."""
        return random.randn(self.noise_dim) if self.noise == "normal" else random.rand(self.noise_dim) * 2 - 1

    def _asked(self, condition: Condition, random: StepRandom) -> Condition:
        """What the fakes of this step are asked to be."""
        return Condition(label=random.randint(self.classes)) if self.fake_labels == "uniform" else condition

    def _judge(self, pixels: Tensor, condition: Condition, random: StepRandom) -> tuple[Tensor, Tensor]:
        if self.diffaugment:
            pixels, condition = diffaugment(pixels.float(), condition, random, self.diffaugment)
        return self.discriminator(pixels, condition)


class Generator(nn.Module):
    """noise (B, Z) and a condition -> (B, C, S, S) in [-1, 1]; the condition's vector is appended to the noise."""

    def __init__(self, stack: ConditionStack | None, body: nn.Module) -> None:
        super().__init__()
        self.stack, self.body = stack, body

    def forward(self, noise: Tensor, condition: Condition) -> Tensor:
        if self.stack is not None:
            vector = self.stack(condition).vector
            noise = torch.cat([noise.to(vector.dtype), vector], dim=1)
        return self.body(noise)


class Discriminator(nn.Module):
    """pixels (B, C, S, S) and a condition -> (logits (B,), class logits (B, K); K = 0 without an auxiliary head).

    stack None = not told the condition; otherwise `match` None appends it to the pixels, and `match` projects.
    """

    def __init__(
        self,
        stack: ConditionStack | None,
        trunk: nn.Sequential,
        head: nn.Module,
        *,
        match: nn.Linear | None,
        spectral_norm: bool,
    ) -> None:
        super().__init__()
        self.stack, self.trunk, self.head, self.match = stack, trunk, head, match
        if match is not None:
            dcgan.initialise_all(match)
        if spectral_norm:
            for part in (trunk, head, match):
                if part is not None:
                    add_spectral_norm(part)

    def forward(self, pixels: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        vector = self.stack(condition).vector if self.stack is not None else None
        if vector is not None and self.match is None:
            maps = vector[:, :, None, None].expand(-1, -1, *pixels.shape[-2:])
            pixels = torch.cat([pixels, maps.to(pixels.dtype)], dim=1)
        features = self.trunk(pixels)
        outputs = self.head(features).flatten(1)
        logits = outputs[:, 0]
        if vector is not None and self.match is not None:
            logits = logits + (self.match(vector) * features.sum((2, 3))).sum(1)
        return logits, outputs[:, 1:]


def class_loss(logits: Tensor, label: Tensor | None) -> Tensor:
    """Mean cross entropy of logits (B, K) in nats over rows with a label: int64 (B,), -1 = none, or soft (B, K)."""
    assert label is not None
    if label.is_floating_point():
        given = label.sum(1) > 0
        each = F.cross_entropy(logits.float(), label.float(), reduction="none")
    else:
        given = label >= 0
        each = F.cross_entropy(logits.float(), label, ignore_index=-1, reduction="none")
    return each.sum() / given.sum().clamp(min=1)


def check_condition(spec: ConditionSpec, conditioning: Conditioning, fake_labels: str) -> None:
    """Raises ConfigError where the way of conditioning does not fit the fields of the data."""
    given = ",".join(spec.given)
    if conditioning == "none" and given:
        raise ConfigError(
            f"system.conditioning=none makes pictures without a condition, but the data carry {given}: "
            f"set data.ignore=[{given}], or choose auxiliary, concat or projection"
        )
    if conditioning != "none" and not given:
        raise ConfigError(
            f"system.conditioning={conditioning} needs a condition and the data carry none; "
            "set system.conditioning=none, or check data.ignore"
        )
    if conditioning == "auxiliary" and spec.label is None:
        raise ConfigError(
            f"system.conditioning=auxiliary needs label, and the data carry {given}; "
            "choose system.conditioning=projection or concat, which take any condition"
        )
    others = ",".join(name for name in spec.given if name != "label")
    if conditioning == "auxiliary" and others:
        raise ConfigError(
            f"system.conditioning=auxiliary ties pictures to their label alone, so {others} would be lost; "
            f"set data.ignore=[{others}], or choose projection or concat"
        )
    if fake_labels == "uniform" and conditioning != "auxiliary":
        raise ConfigError(
            f"system.fake_labels=uniform belongs to conditioning=auxiliary, not {conditioning}: a D that is told the "
            "condition would learn how often each one occurs instead of what it looks like"
        )


def _side(target: TargetSpec) -> int:
    side = target.height
    if target.frames or target.width != side or side < 16 or side & (side - 1):
        raise ShapeError(
            f"acgan makes square pictures of 16, 32, 64, 128, ... px; the data give {target.height} x {target.width}"
            + (f" x {target.frames} frames" if target.frames else "")
            + ". Set data.size"
        )
    return side
