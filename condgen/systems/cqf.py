"""Coverage and quality driven training: one system from VAE to GAN, with an invertible decoder.

Lucas, Shmelkov, Alahari, Schmid, Verbeek 2018, "Coverage and Quality Driven Training of Generative Image Models",
arXiv:1901.01091 (NeurIPS 2019: "Adaptive Density Estimation for Generative Models").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from condgen.conditions.stack import ConditionStack, assign_forms
from condgen.errors import ConfigError, ShapeError
from condgen.losses import likelihood
from condgen.losses.adversarial import fake_loss, real_loss
from condgen.nn import cqf_nets
from condgen.nn.flow import MultiScaleFlow, dequantise, from_logits, to_logits, to_pixels
from condgen.nn.iaf import Iaf
from condgen.nn.latent import Draw, draw_posterior
from condgen.nn.observation import Observation, Scale
from condgen.nn.vae_nets import VectorDecoder, VectorEncoder
from condgen.options import Range
from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec

SampleMode = Literal["mean", "noisy"]
LN2, LN256 = math.log(2), math.log(256)


class Cqf(System):
    """VAE: quality, flow off. VAE-F: quality off. CQ: flow off. CQ-F: all on. GAN: coverage, flow off.

    coverage          trains on L_C, minus the ELBO
    quality           trains on L_Q, minus the mean logit of D on samples: the sum of the saturating and the
                      non-saturating loss of a generator, and for the best D the KL from samples to data
    flow              y = f(x) with an invertible f lies between pixels and the decoder: p(x | z) = N(f(x); mean,
                      std) |det df/dx|. Without it y is the pixel itself
    residual, iaf, large_discriminator, two_scales   the rows further down the published tables: residual networks;
                      inverse autoregressive posterior; D with twice the maps (and two more blocks); a flow whose half
                      leaves after the squeeze and whose other half passes four more couplings
    width             maps next to the picture, of encoder and decoder; discriminator_width the same of D
    latent_dim        elements of z
    flow_width, flow_blocks   maps and residual blocks of each of the three checkerboard and three channel couplings
    iaf_steps, iaf_layers, iaf_width   of the posterior: autoregressive steps, their hidden layers and units
    scale, initial_scale   standard deviation of y given z: "predicted" for each pixel as published, "learned", one a
                      channel, or "fixed" at initial_scale, where the others start. "auto" = predicted, for the GAN
                      learned; initial_scale null = 0.25, with a flow 0.5
    sample_mode       a sample is the decoder's "mean", sent through the flow, or "noisy": with the noise of N(y; mean,
                      std). L_Q judges what `sample` gives
    quality_weight    of L_Q beside L_C in bits per dimension. Published: none, or not known
    literal_sum       L_C + L_Q in nats a picture instead: quality_weight becomes 1 / (C H W ln 2)
    quality_start     updates with L_C alone; D and L_Q begin there
    discriminator_steps   updates of D a step
    kl_warmup         updates over which the weight of the KL rises from near 0 to 1
    free_bits         nats below which the KL of an element of z costs nothing more
    bound_start       of the GAN: the step from which D and decoder rest, and encoder and standard deviation learn the
                      ELBO under the frozen decoder, which gives the GAN a likelihood. 0 = never. A finished GAN goes
                      on so: train.resume=RUN train.steps=MORE system.bound_start=STEPS

    Any condition that has a vector form enters encoder and decoder beside their features, and D by projection. f does
    not depend on it. Schedules of optim.<phase> end where their phase does. With bound_start the averaged decoder
    moves on to the one that rests, so leave it (1 / (1 - ema_decay)) steps several times over.

    Pictures (B, C, H, W), sides even. sample: (B, C, H, W) in [-1, 1]. encode gives z (B, latent_dim) at zero noise.
    """

    consumes: ClassVar[tuple[str, ...]] = ("vector",)
    generates: ClassVar[tuple[str, ...]] = ("encoder", "decoder", "flow", "observation")
    dequantisation: ClassVar[str] = "uniform"

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        coverage: bool = True,
        quality: bool = True,
        flow: bool = True,
        residual: bool = False,
        iaf: bool = False,
        large_discriminator: bool = False,
        two_scales: bool = False,
        width: Annotated[int, Range(1)] = 64,
        discriminator_width: Annotated[int, Range(1)] = 64,
        latent_dim: Annotated[int, Range(1)] = 128,
        flow_width: Annotated[int, Range(1)] = 32,
        flow_blocks: Annotated[int, Range(0)] = 2,
        iaf_steps: Annotated[int, Range(1)] = 2,
        iaf_layers: Annotated[int, Range(1)] = 1,
        iaf_width: Annotated[int, Range(1)] = 512,
        scale: Scale | Literal["auto"] = "auto",
        initial_scale: Annotated[float | None, Range(0.001, 2)] = None,
        sample_mode: SampleMode = "mean",
        quality_weight: Annotated[float, Range(0)] = 0.1,
        literal_sum: bool = False,
        quality_start: Annotated[int, Range(0)] = 0,
        discriminator_steps: Annotated[int, Range(1)] = 1,
        kl_warmup: Annotated[int, Range(0)] = 0,
        free_bits: Annotated[float, Range(0)] = 0.0,
        bound_start: Annotated[int, Range(0)] = 0,
    ) -> None:
        super().__init__(condition=condition, target=target)
        chosen: Scale = scale if scale != "auto" else "predicted" if coverage else "learned"
        _check(target, coverage, quality, flow, quality_start, bound_start, chosen)
        self.coverage, self.quality, self.sample_mode, self.latent_dim = coverage, quality, sample_mode, latent_dim
        self.unit = 1 / (math.prod(target.shape) * LN2)  # nats a picture -> bits per dimension
        self.quality_weight = self.unit if literal_sum else quality_weight
        self.quality_start, self.discriminator_steps, self.bound_start = quality_start, discriminator_steps, bound_start
        self.kl_warmup, self.free_bits = kl_warmup, free_bits
        forms = assign_forms(condition, self.consumes)

        def stack() -> ConditionStack | None:  # one for each network: phases share no parameter
            made = ConditionStack(condition, forms)
            return made if made.widths["vector"] else None

        shape, first = target.shape, stack()
        given = 0 if first is None else first.widths["vector"]
        start = initial_scale or (0.5 if flow else 0.25)
        self.observation = Observation("gaussian", target.channels, scale=chosen, initial=start, bounded=not flow)
        context = iaf_width if iaf else 0
        self.encoder = Encoder(
            first,
            cqf_nets.encoder(shape, given, latent_dim, width=width, context=context, residual=residual),
            Iaf(latent_dim, context, [iaf_width] * iaf_layers, steps=iaf_steps) if iaf else None,
        )
        outputs = self.observation.outputs
        self.decoder = Decoder(
            stack(),
            cqf_nets.decoder(shape, given, latent_dim, width=width, outputs=outputs, residual=residual),
        )
        body = MultiScaleFlow(
            target.channels, scales=2, width=flow_width, blocks=flow_blocks, checkerboard=3, channelwise=3,
            final=4 if two_scales else 0, affine="paper",
        ) if flow else None  # fmt: skip
        self.flow = PixelMap(body)
        if quality:
            judge = cqf_nets.Discriminator(
                shape, given, width=discriminator_width, residual=residual, large=large_discriminator
            )
            self.discriminator = Judge(stack(), judge)
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def phases(self) -> Sequence[Phase]:
        """discriminator, generator; "encoder" of the GAN runs from bound_start on, when the others have stopped."""
        learned = ("encoder", "observation") if self.observation.log_scale is not None else ("encoder",)
        stop, found = self.bound_start or None, []
        if self.quality:
            found.append(
                Phase(
                    "discriminator", self.discriminator_loss, trains=("discriminator",), start=self.quality_start,
                    stop=stop, repeats=self.discriminator_steps,
                )
            )  # fmt: skip
        if self.coverage:
            flow = () if self.flow.body is None else ("flow",)
            return [*found, Phase("generator", self.generator_loss, trains=(*learned, "decoder", *flow))]
        found.append(Phase("generator", self.generator_loss, trains=("decoder",), stop=stop))
        # it exists without a bound too, so that a finished GAN can go on with one
        never = None if self.bound_start else 0
        return [*found, Phase("encoder", self.encoder_loss, trains=learned, start=self.bound_start, stop=never)]

    def discriminator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """-E ln D(x) - E ln(1 - D(G(z))). Real pictures carry the noise of the likelihood: D must not know them by
        their 256 levels."""
        with torch.no_grad():
            fake = self._generate(random.randn(self.latent_dim), batch.condition, random, self.sample_mode)
        real = dequantise(batch.target.float(), random.rand(*batch.target.shape[1:]))
        judged = [self.discriminator(2 * unit - 1, batch.condition) for unit in (real, fake)]
        losses = {"real": real_loss(judged[0]), "fake": fake_loss(judged[1])}
        return {"loss": losses["real"] + losses["fake"], **losses}

    def generator_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """L_C in bits per dimension + weight L_Q. `elbo_bits`, `distortion` and `kl` as in `coverage_loss`."""
        active = self.quality and (not self.quality_start or int(self.updates) >= self.quality_start)
        losses: Losses = {}
        if self.coverage:
            losses = self.coverage_loss(batch, random)
        if active:
            fake = self._generate(random.randn(self.latent_dim), batch.condition, random, self.sample_mode)
            losses["quality"] = quality_loss(self.discriminator(2 * fake - 1, batch.condition))
            weighed = self.quality_weight * losses["quality"] if self.coverage else losses["quality"]
            losses["loss"] = losses["loss"] + weighed if self.coverage else weighed
        return losses

    def encoder_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """L_C under a decoder that rests."""
        return self.coverage_loss(batch, random)

    def coverage_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """Minus the objective in bits per dimension; `elbo_bits` is the bound itself, `kl` and `distortion` are its
        parts in nats a picture."""
        log_pixels, drawn = self._weigh(batch.target, batch.condition, random)
        kl, distortion = drawn.kl.sum(1).mean(), -log_pixels.mean()
        weighed = self._kl_weight(random) * likelihood.free_bits(drawn.kl, self.free_bits)
        bound = (distortion + kl) * self.unit
        return {"loss": (distortion + weighed) * self.unit, "elbo_bits": bound, "distortion": distortion, "kl": kl}

    def sample(self, condition: Condition, *, random: Random, sample_mode: SampleMode | None = None) -> Tensor:
        """`sample_mode` overrides the option of the system."""
        drawn = random.randn(self.latent_dim)
        return to_pixels(self._generate(drawn, condition, random, sample_mode or self.sample_mode))

    @property
    def sample_fields(self) -> dict[str, str]:
        return {"sample_mode": self.sample_mode}

    # likelihood

    @property
    def likelihood(self) -> str:
        if self.coverage:
            return "lower bound (ELBO)"
        return "lower bound (frozen decoder)" if self.bound_start else "none (a GAN; system.bound_start gives a bound)"

    def log_prob(self, target: Tensor, condition: Condition, *, random: Random) -> Tensor:
        """ln p(x | z) + ln p(z) - ln q(z | x) (B,) of one z and one dequantisation a row; see `HasLikelihood`."""
        if self.likelihood.startswith("none"):
            raise ConfigError(
                "a GAN has no likelihood by itself. Go on with system.bound_start=STEP, the step from which an encoder "
                "learns its bound: train.resume=RUN train.steps=MORE system.bound_start=STEPS"
            )
        log_pixels, drawn = self._weigh(target, condition, random)
        return log_pixels - drawn.ratio.sum(1)

    # latents

    def encode(self, target: Tensor, condition: Condition) -> Tensor:
        """z (B, latent_dim) of q(z | x) at zero noise, x in the middle of its grey level. A GAN without bound_start has
        learned none."""
        unit = dequantise(target.float(), torch.full_like(target, 0.5, dtype=torch.float32))
        zeros = torch.zeros(len(target), self.latent_dim, device=target.device)
        return self.encoder(2 * unit - 1, condition, zeros).latent

    def decode(self, latent: Tensor, condition: Condition) -> Tensor:
        """The decoder's mean as a picture (B, C, H, W) in [-1, 1]."""
        if latent.dim() != 2 or latent.shape[1] != self.latent_dim:
            raise ShapeError(f"latent has shape {tuple(latent.shape)}; this system takes (B, {self.latent_dim})")
        mean, _ = self.observation.parameters_of(self.decoder(latent, condition))
        return to_pixels(self.flow.inverse(mean))

    def _generate(self, latent: Tensor, condition: Condition, random: Random, mode: SampleMode) -> Tensor:
        """z -> x on the scale where pictures fill [0, 1]."""
        mean, log_std = self.observation.parameters_of(self.decoder(latent, condition))
        if mode == "noisy":
            mean = mean + torch.exp(log_std) * random.randn(*mean.shape[1:])
        return self.flow.inverse(mean)

    def _weigh(self, pixels: Tensor, condition: Condition, random: Random) -> tuple[Tensor, Draw]:
        """ln p(x | z) in nats (B,), in float32 whatever surrounds it, and the z of q(z | x) that it was drawn with."""
        unit = dequantise(pixels.float(), random.rand(*pixels.shape[1:]))
        drawn = self.encoder(2 * unit - 1, condition, random.randn(self.latent_dim))
        raw = self.decoder(drawn.latent, condition)
        y, log_det = self.flow(unit)
        with torch.autocast(pixels.device.type, enabled=False):
            density = likelihood.gaussian_log_prob(y, *self.observation.parameters_of(raw)).flatten(1).sum(1)
            return density + log_det - LN256 * unit[0].numel(), drawn

    def _kl_weight(self, random: StepRandom) -> Tensor | float:
        """1, or its part of the warm-up. An update counts once, with the last of its micro-batches."""
        weight = ((self.updates + 1) / self.kl_warmup).clamp(max=1) if self.kl_warmup else 1.0
        if self.training and random.offset + (random.world - random.rank) * random.rows >= random.total:
            self.updates += 1
        return weight


def quality_loss(logits: Tensor) -> Tensor:
    """-E l for D's logits l (B,) on samples: -ln D + ln(1 - D), unbounded on both sides."""
    return -logits.float().mean()


class PixelMap(nn.Module):
    """f: pictures x on the scale where they fill [0, 1] -> y of the same shape, with ln|det dy/dx| (B,).

    body: a flow of the logits; None: y = 2 x - 1.
    """

    def __init__(self, body: MultiScaleFlow | None) -> None:
        super().__init__()
        self.body = body

    def forward(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        if self.body is None:
            return 2 * unit - 1, unit.new_full((len(unit),), LN2 * unit[0].numel())
        logits, stretched = to_logits(unit)
        y, log_det = self.body(logits)
        return y, stretched + log_det

    def inverse(self, y: Tensor) -> Tensor:
        """y -> x, a little outside [0, 1] at most."""
        return (y + 1) / 2 if self.body is None else from_logits(self.body.inverse(y))


class Encoder(nn.Module):
    """q(z | x, c): pixels (B, C, H, W), a condition and noise (B, D) -> z with its KL to N(0, I), in float32."""

    def __init__(self, stack: ConditionStack | None, net: VectorEncoder, iaf: Iaf | None) -> None:
        super().__init__()
        self.stack, self.net, self.iaf = stack, net, iaf

    def forward(self, pixels: Tensor, condition: Condition, noise: Tensor) -> Draw:
        mean, log_std, context = self.net(pixels, _vector(self.stack, condition))
        return draw_posterior(mean, log_std, noise, 0.0, 0.0, self.iaf, context)


class Decoder(nn.Module):
    """z (B, D) and a condition -> raw maps of p(y | z, c), see `condgen.nn.observation`."""

    def __init__(self, stack: ConditionStack | None, net: VectorDecoder) -> None:
        super().__init__()
        self.stack, self.net = stack, net

    def forward(self, latent: Tensor, condition: Condition) -> Tensor:
        return self.net(latent, _vector(self.stack, condition))


class Judge(nn.Module):
    """Pixels (B, C, H, W) and a condition -> logits (B,) that they are real."""

    def __init__(self, stack: ConditionStack | None, net: cqf_nets.Discriminator) -> None:
        super().__init__()
        self.stack, self.net = stack, net

    def forward(self, pixels: Tensor, condition: Condition) -> Tensor:
        return self.net(pixels, _vector(self.stack, condition))


def _vector(stack: ConditionStack | None, condition: Condition) -> Tensor | None:
    return None if stack is None else stack(condition).vector


def _halved(target: TargetSpec) -> int:
    """How often both sides can be halved."""
    common = math.gcd(target.height, target.width)
    return (common & -common).bit_length() - 1


def _check(
    target: TargetSpec, coverage: bool, quality: bool, flow: bool, quality_start: int, bound_start: int, scale: Scale
) -> None:
    """Raises ConfigError for switches that contradict each other, ShapeError for clips and odd sides."""
    if target.frames:
        raise ShapeError(f"cqf makes pictures; the data give clips of {target.frames} frames")
    side, count = max(target.height, target.width), _halved(target)
    if not count or side >> count > 16:
        raise ShapeError(
            "cqf needs sides that can be halved to 16 px or less, such as 16, 28, 32, 48 or 64; the data give "
            f"{target.height} x {target.width}. Change data.size"
        )
    if not coverage and not quality:
        raise ConfigError("system.coverage and system.quality are both false, so nothing is learned; set one to true")
    if coverage and bound_start:
        raise ConfigError("system.bound_start is for the GAN (coverage=false); with coverage the model has its ELBO")
    if coverage:
        return
    if flow:
        raise ConfigError("system.flow=true needs system.coverage=true: nothing else trains its density")
    if quality_start:
        raise ConfigError("system.quality_start delays L_Q behind L_C; with coverage=false there is nothing before it")
    if scale != "learned":
        raise ConfigError(
            f"system.scale={scale} cannot follow a decoder that rests; the bound of a GAN needs system.scale=learned"
        )
