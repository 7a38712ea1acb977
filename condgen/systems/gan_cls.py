"""Text-to-image GAN with matching-aware discriminator and manifold interpolation: GAN-CLS, GAN-INT, GAN-INT-CLS.

Reed, Akata, Yan, Logeswaran, Schiele, Lee 2016, "Generative Adversarial Text to Image Synthesis", ICML,
arXiv:1605.05396. Any condition that has a vector form works: a sentence, a class, boxes, keypoints, or several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.conditions.stack import ConditionStack, assign_forms
from condgen.errors import ConfigError, ShapeError
from condgen.losses.adversarial import AdversarialLoss, fake_loss, generator_loss, r1_penalty, real_loss
from condgen.nn import matching, reed
from condgen.nn.diffaugment import diffaugment
from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec

INTERPOLATED = ("text", "label", "keypoints")


class GanCls(System):
    """cls_weight 0.5, interp_weight 1 is GAN-INT-CLS (CUB, flowers); interp_weight 0 GAN-CLS (COCO); cls_weight 0
    GAN-INT; both 0 the plain conditional GAN.

    architecture            "reed" as published (64 px), "compact" for CPUs (condition-modulated upsampling)
    generator_width         ngf of the paper: 128 (CUB, flowers), 196 (COCO)
    discriminator_width     ndf: 64 or 196
    noise_dim               width of z ~ N(0, 1)
    condition_dim           width of the projected condition, separate in G and D
    text_batchnorm, trunk_activation   the released CUB script has batch norm on D's text and no activation after
                            D's third convolution; the COCO script has neither quirk (False, True)
    cls_weight              weight w of log(1 - D(wrong image, text)); the fakes get 1 - w
    interp_weight           weight of G's loss on interpolated conditions
    interp_beta             beta of beta c1 + (1 - beta) c2
    loss                    "bce" as published, or "hinge", "lsgan"
    spectral_norm           on every layer of D (Miyato et al. 2018, arXiv:1802.05957)
    projection              adds <E(condition), features> to D's logit (Miyato & Koyama 2018, arXiv:1802.05637)
    r1_weight, r1_every     gamma of the R1 penalty and its lazy interval in steps (0 = off)
    diffaugment             of "color", "translation", "cutout"; geometry moves with the pixels
    style_start             first step of the style encoder's phase, None = no style encoder

    Images (B, C, S, S) with S = 4 * 2^n, condition as vectors. sample: (B, C, S, S) in [-1, 1].
    """

    consumes: ClassVar[tuple[str, ...]] = ("vector",)
    noise: ClassVar[str] = "normal"

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        architecture: Literal["reed", "compact"] = "reed",
        generator_width: int = 128,
        discriminator_width: int = 64,
        noise_dim: int = 100,
        condition_dim: int = 128,
        text_batchnorm: bool = True,
        trunk_activation: bool = False,
        cls_weight: float = 0.5,
        interp_weight: float = 1.0,
        interp_beta: float = 0.5,
        loss: AdversarialLoss = "bce",
        spectral_norm: bool = False,
        projection: bool = False,
        r1_weight: float = 0.0,
        r1_every: int = 16,
        diffaugment: Sequence[Literal["color", "translation", "cutout"]] = (),
        style_start: int | None = None,
    ) -> None:
        super().__init__(condition=condition, target=target)
        if not condition.given:
            raise ConfigError("gan_cls needs a condition; this data set provides none (data.ignore may be too wide)")
        if not 0 <= cls_weight < 1:
            raise ConfigError(
                f"system.cls_weight={cls_weight} must lie in [0, 1); the paper uses 0.5, and 0 turns CLS off"
            )
        text = condition.text
        if interp_weight > 0 and text is not None and text.tokens and not text.pooled:
            raise ConfigError(
                f"system.interp_weight={interp_weight:g} mixes pooled text; the encoder gives only tokens; "
                "choose minilm or char_cnn_rnn:<run of task=text_embedding>, or system.interp_weight=0"
            )
        side = _side(target)
        self.noise_dim, self.cls_weight, self.interp_weight, self.interp_beta = (
            noise_dim, cls_weight, interp_weight, interp_beta,
        )  # fmt: skip
        self.loss, self.r1_weight, self.r1_every = loss, r1_weight, r1_every
        self.diffaugment, self.style_start = tuple(diffaugment), style_start
        nets = reed if architecture == "reed" else matching
        forms = assign_forms(condition, self.consumes)
        stacks = [ConditionStack(condition, forms) for _ in range(2)]
        vector = stacks[0].widths["vector"]
        self.generator = Conditioned(
            stacks[0], nets.Generator(vector, side, target.channels, generator_width, noise_dim, condition_dim)
        )
        extra = {"text_batchnorm": text_batchnorm, "trunk_activation": trunk_activation} if nets is reed else {}
        critic = nets.Discriminator(
            vector, side, target.channels, discriminator_width, condition_dim,
            projection=projection, spectral_norm=spectral_norm, **extra,
        )  # fmt: skip
        self.discriminator = Conditioned(stacks[1], critic)
        self.style_encoder: nn.Module | None = None
        if style_start is not None:
            self.style_encoder = reed.StyleEncoder(side, target.channels, discriminator_width, noise_dim)
        self.r1_clock: Tensor
        self.register_buffer("r1_clock", torch.zeros((), dtype=torch.int64))

    @property
    def generates(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("generator", "style_encoder") if self.style_encoder is not None else ("generator",)

    def phases(self) -> Sequence[Phase]:
        phases = [
            Phase("discriminator", self.discriminator_loss, trains=("discriminator",)),
            Phase("generator", self.generator_loss, trains=("generator",)),
        ]
        if self.style_encoder is not None:
            start = self.style_start or 0
            phases.append(Phase("style", self.style_loss, trains=("style_encoder",), start=start))
        return phases

    def discriminator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """-log D(x, t) - w log(1 - D(x', t)) - (1 - w) log(1 - D(G(z, t), t)), x' a mismatched image.

        Three passes, not one concatenated batch: D's batch norm must see one kind of pair at a time, as released.
        """
        condition = batch.condition
        with torch.no_grad():
            fake = self.generator(random.randn(self.noise_dim), condition)
        real = self._judge(batch.target, condition, random)
        losses = {
            "real": real_loss(real, self.loss),
            "fake": fake_loss(self._judge(fake, condition, random), self.loss),
        }
        total = losses["real"] + (1 - self.cls_weight) * losses["fake"]
        if self.cls_weight > 0:
            wrong = batch.target[condition.mismatch(random.local).to(batch.target.device)]
            losses["wrong"] = fake_loss(self._judge(wrong, condition, random), self.loss)
            total = total + self.cls_weight * losses["wrong"]
        if self.r1_weight > 0:
            if int(self.r1_clock) % self.r1_every == 0:
                losses["r1"] = self._r1(batch.target, condition)
                total = total + self.r1_weight * self.r1_every * losses["r1"]
            self.r1_clock += 1
        return {"loss": total, **losses}

    def generator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """-log D(G(z, t), t), plus the same on interpolated conditions for half a batch more (GAN-INT).

        One pass over 1.5 B rows and one mean over them, with `interp_weight` on the last half batch, as released.
        """
        condition, noise, weight = batch.condition, random.randn(self.noise_dim), None
        half = len(batch) // 2
        if self.interp_weight > 0 and half > 0:
            mixed = self._interpolated(condition, half)
            condition = Condition.cat([_without_sequences(self._soft(condition)), mixed])
            noise = torch.cat([noise, random.randn(self.noise_dim)[:half]])
            weight = torch.ones(len(noise), device=noise.device)
            weight[len(batch) :] = self.interp_weight
        fake = self.generator(noise, condition)
        logits = self._judge(fake, condition, random)
        return {"loss": generator_loss(logits, self.loss, weight)}

    def style_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """E ||z - S(G(z, t))||^2 with G fixed (section 4.4 of the paper); mean over the noise's width."""
        assert self.style_encoder is not None
        noise = random.randn(self.noise_dim)
        was_training = self.generator.training
        self.generator.eval()  # its running statistics belong to the generator's own phase
        with torch.no_grad():
            fake = self.generator(noise, batch.condition)
        self.generator.train(was_training)
        return {"loss": F.mse_loss(self.style_encoder(fake).float(), noise)}

    def sample(self, condition: Condition, *, random: Random) -> Tensor:
        return self.decode(self.draw(random), condition)

    def draw(self, random: Random) -> Tensor:
        """z (rows, noise_dim), standard normal."""
        return random.randn(self.noise_dim)

    def encode(self, target: Tensor, condition: Condition) -> Tensor:
        """target (B, C, S, S) -> the style z (B, noise_dim) that G would have drawn it with."""
        if self.style_encoder is None:
            raise ConfigError("this model has no style encoder; train with system.style_start=STEP to get one")
        return self.style_encoder(target).float()

    def decode(self, latent: Tensor, condition: Condition) -> Tensor:
        """z (B, noise_dim) and its condition -> (B, C, S, S) in [-1, 1]."""
        return self.generator(latent, condition).float()

    def _judge(self, pixels: Tensor, condition: Condition, random: StepRandom) -> Tensor:
        if self.diffaugment:
            pixels, condition = diffaugment(pixels.float(), condition, random, self.diffaugment)
        return self.discriminator(pixels, condition)

    def _r1(self, pixels: Tensor, condition: Condition) -> Tensor:
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = pixels.detach().float().requires_grad_()
            return r1_penalty(self.discriminator(pixels, condition), pixels)

    def _interpolated(self, condition: Condition, half: int) -> Condition:
        """Row i mixed with row i + B/2, for i < B/2."""
        first, second = condition.index(slice(0, half)), condition.index(slice(half, 2 * half))
        fields = [name for name in condition.given if name in INTERPOLATED]
        return self._soft(first).interpolate(self._soft(second), self.interp_beta, fields)

    def _soft(self, condition: Condition) -> Condition:
        label, spec = condition.label, self.condition_spec.label
        if label is None or spec is None or label.is_floating_point():
            return condition
        return replace(condition, label=F.one_hot(label.clamp(min=0), spec.num_classes).float() * (label >= 0)[:, None])


class Conditioned(nn.Module):
    """A network and the condition stack that feeds it: net(x, vector of the condition)."""

    def __init__(self, stack: ConditionStack, net: nn.Module) -> None:
        super().__init__()
        self.stack, self.net = stack, net

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        return self.net(x, self.stack(condition).vector)


def _without_sequences(condition: Condition) -> Condition:
    """Only what an interpolated row has as well, so that the two can be joined."""
    text = condition.text
    return condition if text is None else replace(condition, text=replace(text, tokens=None, mask=None, strings=None))


def _side(target: TargetSpec) -> int:
    side = target.height
    if target.frames or target.width != side or side < 16 or side & (side - 1):
        raise ShapeError(
            f"gan_cls makes square images of 16, 32, 64, 128, ... px; the data give {target.height} x {target.width}"
            + (f" x {target.frames} frames" if target.frames else "")
        )
    return side
