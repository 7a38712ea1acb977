"""Image-to-image translation with a conditional patch discriminator and L1: pix2pix.

Isola, Zhu, Zhou, Efros 2017, "Image-to-Image Translation with Conditional Adversarial Networks", CVPR,
arXiv:1611.07004. The source is usually a picture; any condition that has a map form will do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from condgen.conditions.stack import ConditionStack, assign_forms
from condgen.errors import ConfigError, ShapeError
from condgen.losses.adversarial import (
    CriticLoss,
    fake_loss,
    generator_loss,
    gradient_penalty,
    interpolates,
    r1_penalty,
    real_loss,
)
from condgen.losses.features import feature_distance
from condgen.nn.fixed_features import FixedFeatures, check_pictures
from condgen.nn.patchgan import LAYERS, Patch, PatchGan, PatchNorm, smallest_side
from condgen.nn.unet import NormKind, ResNet, Statistics, UNet
from condgen.options import Range
from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec

Architecture = Literal["unet", "encoder_decoder", "resnet_6", "resnet_9"]


class Pix2Pix(System):
    """l1_weight 100, adversarial_weight 1 is the paper; l1_weight 0 its "cGAN", adversarial_weight 0 its "L1".

    generator           "unet", "encoder_decoder" (the same without skips), "resnet_6" or "resnet_9"
    generator_width     ngf, 64 as published
    levels              halvings of the U-Net and the encoder-decoder; 0 = down to 1 px (8 at 256 px, 7 at 128 px)
    discriminator_width ndf, 64 as published
    patch               side in pixels of what D judges: 1 (PixelGAN), 16, 34, 70 (published), 142 or 286 (ImageGAN)
    conditional         False: D sees the picture alone, the paper's "GAN"
    norm                "batch" as published or "instance"; see below
    statistics          of batch norm when sampling: "image" as published, or "running"
    noise               "dropout": decoder activations (in a ResNet, those inside every block) are multiplied by random
                        masks, in training and when sampling, drawn from the `random` that a method is given; "none"
    noise_rate          share of the activations that a mask sets to 0
    noise_blocks        decoder blocks with noise, 1 = after the bottleneck; 1, 2, 3 as published in Lua, 2, 3, 4 in
                        PyTorch. Blocks that a smaller U-Net lacks are left out
    loss                "bce" as published, "lsgan" or "hinge"; D's is halved, as published. "wgan": the critic's mean
                        logit is the score of a picture, and its loss is not halved (arXiv:1701.07875)
    gradient_penalty    weight of (|dD/dy| - 1)^2 between real and generated pictures of one source, with any `loss`;
                        10 in WGAN-GP (arXiv:1704.00028), 0 = off, which "wgan" does not allow
    critic_repeats      updates of D a step, each on a fresh batch; 5 in WGAN-GP
    discriminator_norm  "batch", "instance" or "none"; "auto" = `norm`, or "instance" with a gradient penalty, which
                        batch norm would make a penalty on pairs of pictures
    feature_matching    weight of the L1 distance between D's activations of fakes and of real pictures (pix2pixHD,
                        arXiv:1711.11585), the mean over its blocks; 0 = off
    perceptual_weight   of the L1 distance between the layers of a fixed network (arXiv:1603.08155) of fake and true
                        picture, the mean over layers; 0 = off
    perceptual_network  "efficientnet_lite0", or torchvision's weights: "vgg19:<file>", "vgg16:<file>",
                        "alexnet:<file>". It is read again when training goes on, and no checkpoint holds it
    spectral_norm       on every convolution of D (arXiv:1802.05957)
    r1_weight, r1_every gamma of the R1 penalty on D's mean logit and its lazy interval in steps; 0 = off

    Batch of one: in training batch norm then uses the statistics of that one picture, which makes it instance norm
    with a learned scale. With statistics="image" sampling does the same for every picture, so a model trained with
    batch 1 samples as it was trained, and a picture never depends on the others of its batch. A model trained with
    large batches may do better with "running". The bottleneck has no norm, since it is 1 x 1. `sample` does what
    `statistics` says in train() and in eval() alike.

    Pictures (B, C, H, W). sample: (B, C, H, W) in [-1, 1].
    """

    consumes: ClassVar[tuple[str, ...]] = ("map",)
    generates: ClassVar[tuple[str, ...]] = ("generator",)

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        generator: Architecture = "unet",
        generator_width: Annotated[int, Range(1)] = 64,
        levels: Annotated[int, Range(0, 12)] = 0,
        discriminator_width: Annotated[int, Range(1)] = 64,
        patch: Patch = 70,
        conditional: bool = True,
        norm: NormKind = "batch",
        statistics: Statistics = "image",
        noise: Literal["dropout", "none"] = "dropout",
        noise_rate: Annotated[float, Range(0, 0.99)] = 0.5,
        noise_blocks: Sequence[int] = (1, 2, 3),
        loss: CriticLoss = "bce",
        l1_weight: Annotated[float, Range(0)] = 100.0,
        adversarial_weight: Annotated[float, Range(0)] = 1.0,
        gradient_penalty: Annotated[float, Range(0)] = 0.0,
        critic_repeats: Annotated[int, Range(1)] = 1,
        discriminator_norm: PatchNorm | Literal["auto"] = "auto",
        feature_matching: Annotated[float, Range(0)] = 0.0,
        perceptual_weight: Annotated[float, Range(0)] = 0.0,
        perceptual_network: str = "efficientnet_lite0",
        spectral_norm: bool = False,
        r1_weight: Annotated[float, Range(0)] = 0.0,
        r1_every: Annotated[int, Range(1)] = 16,
    ) -> None:
        super().__init__(condition=condition, target=target)
        if not condition.given:
            raise ConfigError("pix2pix needs a condition; this data set provides none (data.ignore may be too wide)")
        if target.frames:
            raise ShapeError(f"pix2pix makes pictures; the data give clips of {target.frames} frames")
        if not (l1_weight or adversarial_weight or feature_matching or perceptual_weight):
            raise ConfigError("system.l1_weight and the other weights are all 0: nothing to learn")
        self.loss, self.l1_weight, self.adversarial_weight = loss, l1_weight, adversarial_weight
        self.feature_matching, self.r1_weight, self.r1_every = feature_matching, r1_weight, r1_every
        self.gradient_penalty, self.critic_repeats = gradient_penalty, critic_repeats
        self.noise_rate, self.perceptual_weight = noise_rate, perceptual_weight
        forms = assign_forms(condition, self.consumes)
        stack = ConditionStack(condition, forms)
        blocks = noise_blocks if noise == "dropout" else None
        net = _generator(generator, stack, target, generator_width, levels, norm, statistics, blocks)
        self.generator = Translator(stack, net)
        self.discriminator: Judge | None = None
        if adversarial_weight or feature_matching:
            judged = _discriminator_norm(discriminator_norm, norm, loss, gradient_penalty)
            own = ConditionStack(condition, forms) if conditional else None
            _check_patch(target, patch)
            seen = target.channels + (own.widths["map"] if own is not None else 0)
            critic = PatchGan(seen, patch=patch, width=discriminator_width, norm=judged, spectral_norm=spectral_norm)
            self.discriminator = Judge(own, critic)
        self.perceptual = FixedFeatures(perceptual_network) if perceptual_weight else None
        if self.perceptual is not None:
            check_pictures(self.perceptual.kind, target.channels, min(target.height, target.width))
        self.r1_clock: Tensor
        self.register_buffer("r1_clock", torch.zeros((), dtype=torch.int64))

    def phases(self) -> Sequence[Phase]:
        if self.perceptual is not None:
            self.perceptual.load()  # what is missing must be said before step 0, and sampling needs none of it
        generator = Phase("generator", self.generator_loss, trains=("generator",))
        if self.discriminator is None:
            return [generator]
        critic = Phase("discriminator", self.discriminator_loss, ("discriminator",), repeats=self.critic_repeats)
        return [critic, generator]

    def shared(self, batch: Batch, random: StepRandom) -> Tensor:
        """The generated pictures of this step, with their graph; D's phase detaches them."""
        return self.translate(batch.condition, random, batch.target.shape[-2:])

    def discriminator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """0.5 (-log D(x, y) - log(1 - D(x, G(x, z)))), each the mean over patches and rows, or D(x, G) - D(x, y).

        Two passes, not one concatenated batch: D's batch norm must see one kind of picture at a time, as released.
        """
        assert self.discriminator is not None
        with torch.no_grad():
            fake = self._generated(batch, random).detach()
        losses = {
            "real": real_loss(self.discriminator(batch.target, batch.condition), self.loss),
            "fake": fake_loss(self.discriminator(fake, batch.condition), self.loss),
        }
        total = (losses["real"] + losses["fake"]) * (1.0 if self.loss == "wgan" else 0.5)
        if self.gradient_penalty > 0:
            losses["gradient_penalty"] = self._penalty(batch.target, fake, batch.condition, random)
            total = total + self.gradient_penalty * losses["gradient_penalty"]
        if self.r1_weight > 0:
            if int(self.r1_clock) % self.r1_every == 0:
                losses["r1"] = self._r1(batch.target, batch.condition)
                total = total + self.r1_weight * self.r1_every * losses["r1"]
            self.r1_clock += 1
        return {"loss": total, **losses}

    def generator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """adversarial_weight (-log D(x, G)) + l1_weight |y - G| + feature_matching |D_i(x, y) - D_i(x, G)|
        + perceptual_weight |F_i(y) - F_i(G)|.

        D is evaluated anew, after its step, as in the PyTorch release.
        """
        fake = self._generated(batch, random)
        losses = {"l1": (fake.float() - batch.target.float()).abs().mean()}
        total = self.l1_weight * losses["l1"]
        if self.discriminator is not None:
            *inner, logits = self.discriminator.features(fake, batch.condition)
            losses["adversarial"] = generator_loss(logits, self.loss)
            total = total + self.adversarial_weight * losses["adversarial"]
            if self.feature_matching:
                with torch.no_grad():
                    *real, _ = self.discriminator.features(batch.target, batch.condition)
                losses["features"] = feature_distance(inner, real)
                total = total + self.feature_matching * losses["features"]
        if self.perceptual is not None:
            with torch.no_grad():
                wanted = self.perceptual(batch.target)
            losses["perceptual"] = feature_distance(self.perceptual(fake), wanted)
            total = total + self.perceptual_weight * losses["perceptual"]
        return {"loss": total, **losses}

    def sample(self, condition: Condition, *, random: Random, height: int = 0, width: int = 0) -> Tensor:
        """`height`, `width`: the size to draw, 0 = as trained; multiples of `multiple`."""
        spec, training = self.target_spec, self.generator.training
        self.generator.eval()
        try:
            return self.translate(condition, random, (height or spec.height, width or spec.width)).float()
        finally:
            self.generator.train(training)

    @property
    def multiple(self) -> int:
        """Sides that `sample` can draw are multiples of this."""
        return int(self.generator.net.multiple)

    def translate(self, condition: Condition, random: Random, size: Sequence[int]) -> Tensor:
        """(B, C, *size) in [-1, 1]. Raises ShapeError for a side that is no multiple of `multiple`."""
        height, width = size
        if height % self.multiple or width % self.multiple:
            raise ShapeError(
                f"a picture of {height} x {width} does not fit this generator: both sides must be multiples of "
                f"{self.multiple}; pad it, as `condgen translate` does"
            )
        masks = [self._mask(random, shape) for shape in self.generator.net.noise_shapes(height, width)]
        return self.generator(condition, masks, (height, width))

    def _mask(self, random: Random, shape: tuple[int, int, int]) -> Tensor:
        return (random.rand(*shape) >= self.noise_rate).float() / (1 - self.noise_rate)

    def _generated(self, batch: Batch, random: StepRandom) -> Tensor:
        return batch.shared if isinstance(batch.shared, Tensor) else self.shared(batch, random)

    def _penalty(self, real: Tensor, fake: Tensor, condition: Condition, random: StepRandom) -> Tensor:
        """Only the picture is mixed: its source is the same at both ends."""
        assert self.discriminator is not None
        with torch.autocast(real.device.type, enabled=False):
            mixed = interpolates(real, fake, random.rand())
            return gradient_penalty(self.discriminator(mixed, condition).flatten(1).mean(1), mixed)

    def _r1(self, pixels: Tensor, condition: Condition) -> Tensor:
        assert self.discriminator is not None
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = pixels.detach().float().requires_grad_()
            return r1_penalty(self.discriminator(pixels, condition).flatten(1).mean(1), pixels)


class Translator(nn.Module):
    """The generator: a condition as maps -> a picture."""

    def __init__(self, stack: ConditionStack, net: UNet | ResNet) -> None:
        super().__init__()
        self.stack, self.net = stack, net

    def forward(self, condition: Condition, masks: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        return self.net(self.stack(condition, size).map, masks)


class Judge(nn.Module):
    """The discriminator: a picture, beside its condition as maps, -> logits of patches (B, 1, h, w)."""

    def __init__(self, stack: ConditionStack | None, net: PatchGan) -> None:
        super().__init__()
        self.stack, self.net = stack, net

    def features(self, pixels: Tensor, condition: Condition) -> list[Tensor]:
        if self.stack is not None:
            maps = self.stack(condition, tuple(pixels.shape[-2:])).map
            assert maps is not None
            pixels = torch.cat([maps.to(pixels.dtype), pixels], dim=1)
        return self.net.features(pixels)

    def forward(self, pixels: Tensor, condition: Condition) -> Tensor:
        return self.features(pixels, condition)[-1]


def _generator(
    name: Architecture,
    stack: ConditionStack,
    target: TargetSpec,
    width: int,
    levels: int,
    norm: NormKind,
    statistics: Statistics,
    noise_blocks: Sequence[int] | None,
) -> UNet | ResNet:
    """noise_blocks None = no noise."""
    inputs = stack.widths["map"]
    net: UNet | ResNet
    if name in ("unet", "encoder_decoder"):
        depth = levels or _levels(target)
        net = UNet(
            inputs, target.channels, levels=depth, width=width, norm=norm, statistics=statistics,
            skips=name == "unet", noise_blocks=_noise_blocks(noise_blocks or (), depth),
        )  # fmt: skip
    else:
        net = ResNet(
            inputs, target.channels, blocks=6 if name == "resnet_6" else 9, width=width, norm=norm,
            statistics=statistics, noise=noise_blocks is not None,
        )  # fmt: skip
    _check_size(target, net.multiple, name)
    return net


def _discriminator_norm(
    asked: PatchNorm | Literal["auto"], norm: NormKind, loss: CriticLoss, penalty: float
) -> PatchNorm:
    if loss == "wgan" and not penalty:
        raise ConfigError(
            "system.loss=wgan has no bound without a gradient penalty; set system.gradient_penalty=10, as published"
        )
    if penalty and asked == "batch":
        raise ConfigError(
            "system.discriminator_norm=batch lets pictures of a batch see each other, so system.gradient_penalty would "
            "not be the slope at one of them; choose instance or none"
        )
    if asked != "auto":
        return asked
    return "instance" if penalty else norm


def _levels(target: TargetSpec) -> int:
    """Halvings that take the shorter side to 1 px, or as far as it can be halved."""
    side = math.gcd(target.height, target.width)
    return (side & -side).bit_length() - 1


def _noise_blocks(given: Sequence[int], levels: int) -> tuple[int, ...]:
    if any(block < 1 for block in given):
        raise ConfigError(f"system.noise_blocks={list(given)}: blocks are numbered from 1, after the bottleneck")
    return tuple(block for block in dict.fromkeys(given) if block < levels)


def _check_size(target: TargetSpec, multiple: int, generator: str) -> None:
    low = 8 if generator.startswith("resnet") else 4
    if multiple < 4 or target.height % multiple or target.width % multiple or min(target.height, target.width) < low:
        raise ShapeError(
            f"{generator} needs sides that are multiples of {max(multiple, 4)} and at least {low} px; the data give "
            f"{target.height} x {target.width}. Change data.size, or system.levels of a U-Net"
        )


def _check_patch(target: TargetSpec, patch: int) -> None:
    side = min(target.height, target.width)
    if side < smallest_side(patch):
        fits = [str(p) for p in LAYERS if smallest_side(p) <= side]
        raise ConfigError(
            f"system.patch={patch} needs pictures of at least {smallest_side(patch)} px; the data give {side} px. "
            f"Choose system.patch of {', '.join(fits)}"
        )
