"""Variational auto-encoders: AEVB, IWAE, the IAF posterior and the ResNet VAE, conditional or not.

Kingma, Welling 2013, "Auto-Encoding Variational Bayes", arXiv:1312.6114. Burda, Grosse, Salakhutdinov 2016, IWAE,
arXiv:1509.00519. Kingma et al. 2016, inverse autoregressive flow, arXiv:1606.04934. Conditional: Sohn, Lee, Yan 2015.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from condgen.conditions.stack import ConditionStack, assign_forms
from condgen.errors import ConfigError, ShapeError
from condgen.losses import likelihood
from condgen.nn.iaf import Iaf
from condgen.nn.ladder import LadderVae
from condgen.nn.latent import Inferred, VectorVae
from condgen.nn.observation import Dequantisation, Law, Observation, Scale
from condgen.nn.vae_nets import conv_decoder, conv_encoder, mlp_decoder, mlp_encoder
from condgen.options import Range
from condgen.pixels import PIXEL_TOLERANCE
from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec

SampleMode = Literal["mean", "noisy"]


class Vae(System):
    """architecture "mlp", law "bernoulli" is the paper's MNIST model; "ladder" with "iaf" and "logistic" that of 2016.

    architecture    "conv" or "mlp": one latent vector (`condgen.nn.vae_nets`); "ladder": maps of latents at several
                    sizes with bidirectional inference (`condgen.nn.ladder`)
    width           maps of the outermost convolution, hidden units of "mlp", maps everywhere in "ladder"
    latent_dim      elements of z; of "ladder": channels of z in every layer
    depth, scales   of "ladder": layers a scale; sizes, the first half of the picture's
    posterior       "gaussian", or "iaf": followed by iaf_steps autoregressive steps of iaf_layers hidden layers of
                    iaf_width units or maps
    prior           of "conv" and "mlp": "standard" N(0, I), or "conditional", a normal law with moments from the
                    condition. That of "ladder" is always learned
    law             of a pixel given z: "bernoulli", "gaussian" or "logistic", see `condgen.nn.observation`
    scale, initial_scale   standard deviation or logistic scale on [-1, 1]: "fixed" at initial_scale, or starting there
                    and "learned", one a channel, or "predicted" by the decoder
    dequantisation  "interval" (mass of a grey level) or "uniform" (density, uniform noise on the pixels)
    binarise        of "bernoulli": "threshold" at the middle, "dynamic": white with the probability of its grey level,
                    drawn at every visit; "none": the cross-entropy of grey levels, which is no likelihood
    importance      draws k of the bound that training maximises: 1 = ELBO, above = IWAE
    free_bits       nats below which the KL of a group costs nothing more; a group is an element of z, or a channel of
                    a layer. The mean is over one micro-batch of every process
    beta            weight of the KL (beta-VAE); anything but 1 is no bound
    kl_warmup       updates over which the weight rises from near 0 to beta, in equal parts
    sample_mode     "mean" of p(x | z), or "noisy": a draw from it

    Any condition that has a vector form enters encoder and decoder beside their features.

    Pictures (B, C, H, W). sample: (B, C, H, W) in [-1, 1]. encode gives z (B, N) at zero noise.
    """

    consumes: ClassVar[tuple[str, ...]] = ("vector",)

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        architecture: Literal["conv", "mlp", "ladder"] = "conv",
        width: Annotated[int, Range(1)] = 32,
        latent_dim: Annotated[int, Range(1)] = 64,
        depth: Annotated[int, Range(1)] = 2,
        scales: Annotated[int, Range(1)] = 2,
        posterior: Literal["gaussian", "iaf"] = "gaussian",
        iaf_steps: Annotated[int, Range(1)] = 2,
        iaf_layers: Annotated[int, Range(1)] = 1,
        iaf_width: Annotated[int, Range(1)] = 128,
        prior: Literal["standard", "conditional"] = "standard",
        law: Law = "logistic",
        scale: Scale = "learned",
        initial_scale: Annotated[float, Range(0.001, 2)] = 0.1,
        dequantisation: Dequantisation = "interval",
        binarise: Literal["none", "threshold", "dynamic"] = "none",
        importance: Annotated[int, Range(1)] = 1,
        free_bits: Annotated[float, Range(0)] = 0.0,
        beta: Annotated[float, Range(0)] = 1.0,
        kl_warmup: Annotated[int, Range(0)] = 0,
        sample_mode: SampleMode = "mean",
    ) -> None:
        super().__init__(condition=condition, target=target)
        if target.frames:
            raise ShapeError(f"vae makes pictures; the data give clips of {target.frames} frames")
        if binarise != "none" and law != "bernoulli":
            raise ConfigError(f"system.binarise={binarise} is for law=bernoulli; the law is {law}")
        if importance > 1 and (free_bits or beta != 1 or kl_warmup):
            raise ConfigError(
                "the bound with importance above 1 has no KL term: free_bits, beta and kl_warmup stay off"
            )
        self.binarise, self.importance, self.sample_mode = binarise, importance, sample_mode
        self.free_bits, self.beta, self.kl_warmup = free_bits, beta, kl_warmup
        stack = ConditionStack(condition, assign_forms(condition, self.consumes))
        given = stack.widths["vector"]
        if prior == "conditional" and (not given or architecture == "ladder"):
            raise ConfigError("system.prior=conditional needs a condition and architecture conv or mlp")
        self.stack = stack if given else None
        self.observation = Observation(
            law, target.channels, scale=scale, initial=initial_scale, dequantisation=dequantisation
        )
        outputs, steps = self.observation.outputs, iaf_steps if posterior == "iaf" else 0
        hidden = [iaf_width] * iaf_layers
        self.model: VectorVae | LadderVae
        if architecture == "ladder":
            self.model = LadderVae(
                target.shape, given, outputs=outputs, width=width, latent=latent_dim, depth=depth, scales=scales,
                iaf_steps=steps, iaf_hidden=hidden,
            )  # fmt: skip
        else:
            encoder, decoder = {"conv": (conv_encoder, conv_decoder), "mlp": (mlp_encoder, mlp_decoder)}[architecture]
            context = iaf_width if steps else 0
            self.model = VectorVae(
                encoder(target.shape, given, latent_dim, width=width, context=context),
                decoder(target.shape, given, latent_dim, width=width, outputs=outputs),
                latent_dim,
                Iaf(latent_dim, context, hidden, steps=steps) if steps else None,
                given if prior == "conditional" else 0,
            )
        self.updates: Tensor
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def phases(self) -> Sequence[Phase]:
        trains = dict.fromkeys(name.split(".")[0] for name, _ in self.named_parameters())
        return [Phase("bound", self.bound_loss, trains=tuple(trains))]

    def bound_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """Minus the objective, in bits per dimension; `elbo_bits` is the bound itself, `kl` and `distortion` are its
        two parts in nats a picture."""
        pixels, k = self.observed(batch.target, random), self.importance
        found = self._infer(pixels, batch.condition, random, draws=k)
        log_pixels = self.observation.log_prob(found.raw, pixels, random)
        scale = 1 / (pixels[0].numel() * math.log(2))
        kl, distortion = found.kl.sum(1).mean(), -log_pixels.mean()
        losses = {"elbo_bits": (distortion + kl) * scale, "distortion": distortion, "kl": kl}
        if k > 1:
            bound = likelihood.log_mean_exp((log_pixels - found.ratio.sum(1)).unflatten(0, (-1, k)), 1).mean()
            return {"loss": -bound * scale, **losses}
        weight = self._kl_weight(random)
        return {"loss": (distortion + weight * likelihood.free_bits(found.kl, self.free_bits)) * scale, **losses}

    def sample(self, condition: Condition, *, random: Random, sample_mode: SampleMode | None = None) -> Tensor:
        """`sample_mode` overrides the option of the system."""
        noise = [random.randn(*shape) for shape in self.model.noise_shapes]
        raw = self.model.generate(self._given(condition), noise)
        if (sample_mode or self.sample_mode) == "noisy":
            return self.observation.draw(raw, random)
        return self.observation.mean(raw)

    @property
    def sample_fields(self) -> dict[str, str]:
        return {"sample_mode": self.sample_mode}

    # likelihood

    @property
    def likelihood(self) -> str:
        """ "none" where grey levels are the targets of a Bernoulli law."""
        if self.observation.law == "bernoulli" and self.binarise == "none":
            return "none (cross-entropy of grey levels)"
        return "lower bound (ELBO)"

    @property
    def dequantisation(self) -> str:
        return self.observation.dequantisation

    def log_prob(self, target: Tensor, condition: Condition, *, random: Random) -> Tensor:
        """ln p(x | z) + ln p(z) - ln q(z | x) of one z (and one dequantisation) a row; see `HasLikelihood`.

        Raises ConfigError where there is no likelihood, ShapeError for grey pixels under a law of black and white.
        """
        if self.likelihood.startswith("none"):
            raise ConfigError(
                "system.law=bernoulli on grey levels is a cross-entropy, which is no likelihood. Train with "
                "system.binarise=threshold or dynamic, or with system.law=logistic"
            )
        if self.observation.law == "bernoulli" and bool(((target.abs() - 1).abs() > PIXEL_TOLERANCE).any()):
            raise ShapeError("this model knows black and white alone (system.binarise); binarise the pictures first")
        found = self._infer(target, condition, random, draws=1)
        return self.observation.log_prob(found.raw, target, random) - found.ratio.sum(1)

    def observed(self, target: Tensor, random: Random) -> Tensor:
        """The pixels that the model is about: as they are, or black and white."""
        if self.binarise == "none":
            return target
        bar = random.rand(*target.shape[1:]) if self.binarise == "dynamic" else 0.5
        return ((target.float() + 1) / 2 > bar).float() * 2 - 1

    # latents

    def encode(self, target: Tensor, condition: Condition) -> Tensor:
        """z (B, N) of q(z | x) at zero noise."""
        zeros = [torch.zeros(len(target), *shape, device=target.device) for shape in self.model.noise_shapes]
        return self.model.infer(target, self._given(condition), zeros).latent

    def decode(self, latent: Tensor, condition: Condition) -> Tensor:
        """The mean of p(x | z): (B, C, H, W) in [-1, 1]."""
        return self.observation.mean(self.model.decode(latent, self._given(condition)))

    def _given(self, condition: Condition) -> Tensor | None:
        return None if self.stack is None else self.stack(condition).vector

    def _infer(self, pixels: Tensor, condition: Condition, random: Random, *, draws: int) -> Inferred:
        noise = [random.randn(draws, *shape).flatten(0, 1) for shape in self.model.noise_shapes]
        return self.model.infer(pixels, self._given(condition), noise)

    def _kl_weight(self, random: StepRandom) -> Tensor | float:
        """beta, or its part of the warm-up. An update counts once, with the last of its micro-batches."""
        if not self.kl_warmup:
            return self.beta
        weight = self.beta * ((self.updates + 1) / self.kl_warmup).clamp(max=1)
        if self.training and random.offset + (random.world - random.rank) * random.rows >= random.total:
            self.updates += 1
        return weight
