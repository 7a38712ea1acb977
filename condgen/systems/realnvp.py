"""Real NVP: pictures as an invertible map of noise, trained by their likelihood; conditional where data say so.

Dinh, Sohl-Dickstein, Bengio 2017, "Density estimation using Real NVP", ICLR, arXiv:1605.08803.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from condgen.conditions.stack import ConditionStack, kind_class
from condgen.errors import ShapeError
from condgen.nn.coupling import Affine, NetNorm, Norm, Start
from condgen.nn.flow import MultiScaleFlow, dequantise, from_logits, to_logits, to_pixels
from condgen.options import Range
from condgen.rng import Random, StepRandom
from condgen.systems.base import Losses, Phase, System
from condgen.types import Batch, Condition, ConditionSpec, TargetSpec


class RealNvp(System):
    """norm batch, net_norm batch, scales 2, width 64, blocks 8 is the paper's network for CIFAR-10.

    scales            scales of the flow; 0 = until the side is 4 px, or as far as sides can be halved
    width             maps of the first coupling networks, doubled by every squeeze
    blocks            residual blocks of every coupling network: 8, 4 or 2 as published by data set
    norm              after every coupling: "actnorm" (Glow), "batch" as published, or "none"
    net_norm          inside coupling networks: "batch" as published, or "none". With batch norm of either kind a
                      row's training loss depends on the other rows; likelihoods never do
    batch_lag         with norm=batch, the share of running statistics in training; the paper's answer to small
                      batches, 0 in its code
    affine            "released": (x + t) exp(s), "paper": x exp(s) + t
    start             "released", or "identity": the flow starts as the identity on logits
    scale_l2          weight, against nats per picture, of the sum of squares of weight norm's gains and of the
                      factors of s; published 5e-5
    temperature       standard deviation of the noise that `sample` draws

    The loss is in bits per dimension: nats per picture over C H W ln 2, with noise u ~ U[0, 1) under every pixel.
    Each field enters in the form that its kind names first: labels, text, points and boxes as a vector, which gives
    every layer of the coupling networks a bias; pictures and past frames as maps beside their input. The published
    mask channel is left out: of a checkerboard, the network sees where the zeros are.

    Pictures (B, C, H, W) whose sides are multiples of 2 ** (scales - 1). sample: (B, C, H, W) in [-1, 1].
    """

    consumes: ClassVar[tuple[str, ...]] = ("vector", "map")
    likelihood: ClassVar[str] = "lower bound (uniform dequantisation)"
    dequantisation: ClassVar[str] = "uniform"

    def __init__(
        self,
        *,
        condition: ConditionSpec,
        target: TargetSpec,
        scales: Annotated[int, Range(0, 8)] = 0,
        width: Annotated[int, Range(1)] = 32,
        blocks: Annotated[int, Range(0)] = 4,
        norm: Norm = "actnorm",
        net_norm: NetNorm = "none",
        batch_lag: Annotated[float, Range(0, 0.999)] = 0.0,
        affine: Affine = "released",
        start: Start = "released",
        scale_l2: Annotated[float, Range(0)] = 0.0,
        temperature: Annotated[float, Range(0)] = 1.0,
    ) -> None:
        super().__init__(condition=condition, target=target)
        if target.frames:
            raise ShapeError(f"realnvp makes pictures; the data give clips of {target.frames} frames")
        self.scale_l2, self.temperature = scale_l2, temperature
        stack = ConditionStack(condition, _forms(condition, self.consumes))
        self.flow = ConditionalFlow(
            stack, target.channels, scales=_scales(target, scales), width=width, blocks=blocks, norm=norm,
            net_norm=net_norm, lag=batch_lag, affine=affine, start=start,
        )  # fmt: skip

    def phases(self) -> Sequence[Phase]:
        return [Phase("nll", self.nll_loss, trains=("flow",))]

    def nll_loss(self, batch: Batch, random: StepRandom) -> Losses:
        """-log p in bits per dimension, the mean over rows, plus the penalty of scale_l2 in the same unit."""
        unit = 1 / (math.prod(batch.target.shape[1:]) * math.log(2))
        bits = -unit * self._log_weight(batch.target, batch.condition, random).mean()
        losses = {"bits_per_dim": bits}
        if self.scale_l2:
            losses["l2"] = torch.stack([gain.float().square().sum() for gain in self.flow.flow.gains()]).sum()
        return {"loss": bits + unit * self.scale_l2 * losses["l2"] if self.scale_l2 else bits, **losses}

    def sample(self, condition: Condition, *, random: Random, temperature: float | None = None) -> Tensor:
        """`temperature`: instead of the system's."""
        scale = self.temperature if temperature is None else temperature
        return self.decode(scale * random.randn(*self.target_spec.shape), condition)

    @property
    def sample_fields(self) -> dict[str, str]:
        return {} if self.temperature == 1 else {"temperature": f"{self.temperature:g}"}

    def log_prob(self, target: Tensor, condition: Condition, *, random: Random) -> Tensor:
        """(B,) nats: log of the density at pixels + u / 256, times 256 ** -(C H W); its exp is unbiased for p."""
        return self._log_weight(target, condition, random)

    def encode(self, target: Tensor, condition: Condition) -> Tensor:
        """Pixels -> z (B, C, H, W), with u = 1/2; `decode` gives the pixels back."""
        logits, _ = to_logits(dequantise(target.float(), torch.full_like(target, 0.5, dtype=torch.float32)))
        z, _ = self.flow(logits, condition)
        return z

    def decode(self, latent: Tensor, condition: Condition) -> Tensor:
        """z (B, C, H, W) -> pixels in [-1, 1]."""
        if latent.shape[1:] != self.target_spec.shape:
            raise ShapeError(
                f"latent has shape {tuple(latent.shape)}; this system takes (B, *{self.target_spec.shape})"
            )
        return to_pixels(from_logits(self.flow.inverse(latent, condition)))

    def _log_weight(self, target: Tensor, condition: Condition, random: Random) -> Tensor:
        noise = random.rand(*target.shape[1:])
        logits, stretched = to_logits(dequantise(target.float(), noise))
        z, logdet = self.flow(logits, condition)
        prior = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
        return prior + logdet + stretched - math.log(256) * math.prod(target.shape[1:])


class ConditionalFlow(nn.Module):
    """A multi-scale flow of logits and the encoder of its condition."""

    def __init__(
        self, stack: ConditionStack, channels: int, *, scales: int, width: int, blocks: int, norm: Norm,
        net_norm: NetNorm, lag: float, affine: Affine, start: Start,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stack = stack
        self.flow = MultiScaleFlow(
            channels, scales=scales, width=width, blocks=blocks, norm=norm, net_norm=net_norm, lag=lag, affine=affine,
            start=start, vector=stack.widths["vector"], maps=stack.widths["map"],
        )  # fmt: skip

    def forward(self, logits: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        forms = self.stack(condition, (logits.shape[-2], logits.shape[-1]))
        return self.flow(logits, forms.vector, forms.map)

    def inverse(self, latent: Tensor, condition: Condition) -> Tensor:
        forms = self.stack(condition, (latent.shape[-2], latent.shape[-1]))
        return self.flow.inverse(latent, forms.vector, forms.map)


def _forms(condition: ConditionSpec, consumes: Sequence[str]) -> dict[str, str]:
    """Each field enters in the form that its kind names first: labels as vectors, pictures as maps."""
    kinds = {name: kind_class(name).forms for name in condition.given}
    return {name: next(form for form in forms if form in consumes) for name, forms in kinds.items()}


def _scales(target: TargetSpec, asked: int) -> int:
    """Scales of the flow. ShapeError where the sides cannot be halved that often."""
    side = math.gcd(target.height, target.width)
    halvings = (side & -side).bit_length() - 1
    if not halvings or asked > halvings + 1:
        raise ShapeError(
            f"{asked or 2} scales need sides that are multiples of {2 ** max(asked - 1, 1)}; the data give "
            f"{target.height} x {target.width}. Change data.size to a multiple of 4, such as 32"
            + (f", or use system.scales of at most {halvings + 1}" if halvings else "")
        )
    smallest = min(target.height, target.width)
    wanted = max(int(math.log2(smallest)) - 1, 2)  # until the side is 4 px
    return asked or min(wanted, halvings + 1)
