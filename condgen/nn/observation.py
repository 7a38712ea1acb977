"""p(x | z) of a decoder: maps of numbers -> log-probabilities of pixels, means and draws."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.losses import likelihood
from condgen.pixels import pixels_to_float, pixels_to_uint8
from condgen.rng import Random

Law = Literal["bernoulli", "gaussian", "logistic"]
Scale = Literal["fixed", "learned", "predicted"]
Dequantisation = Literal["interval", "uniform"]
LOG_SCALE_RANGE = (-7.0, 1.0)  # a quarter of a grey level .. more than the whole range


class Observation(nn.Module):
    """Independent pixels given z, from `outputs` raw maps: `channels` means, then log scales where they are predicted.

    law              "bernoulli" of black and white, "gaussian", or "logistic" (always by its interval)
    scale            standard deviation or logistic scale: "fixed", one "learned" a channel, or "predicted" for
                     each pixel
    initial          its value at the start, on [-1, 1]
    dequantisation   "interval": the law's mass on each grey level; "uniform": its density at the pixel plus uniform
                     noise, a lower bound of ln P in expectation
    bounded          the mean passes tanh; without it, the decoder of a flow
    """

    def __init__(
        self,
        law: Law,
        channels: int,
        *,
        scale: Scale = "learned",
        initial: float = 0.1,
        dequantisation: Dequantisation = "interval",
        bounded: bool = True,
    ) -> None:
        super().__init__()
        self.law, self.channels, self.bounded = law, channels, bounded
        self.dequantisation = "none" if law == "bernoulli" else dequantisation
        self.predicted = law != "bernoulli" and scale == "predicted"
        self.outputs = channels * (2 if self.predicted else 1)
        self.offset = math.log(initial)
        self.log_scale: nn.Parameter | None = None
        if law != "bernoulli" and scale == "learned":
            self.log_scale = nn.Parameter(torch.full((channels, 1, 1), self.offset))

    def parameters_of(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """raw (R, outputs, H, W) -> mean (bernoulli: logits) and log scale, float32, broadcastable to pixels."""
        raw = raw.float()
        mean = raw[:, : self.channels]
        if self.law == "bernoulli":
            return mean, torch.zeros_like(mean[:, :, :1, :1])
        if self.bounded:
            mean = torch.tanh(mean)
        if self.predicted:
            log_scale = raw[:, self.channels :] + self.offset
        else:
            log_scale = raw.new_tensor(self.offset) if self.log_scale is None else self.log_scale
        return mean, log_scale.clamp(*LOG_SCALE_RANGE)

    def log_prob(self, raw: Tensor, pixels: Tensor, random: Random | None = None) -> Tensor:
        """ln p(pixels | raw) (R,) in nats, in float32 whatever surrounds it.

        R may be a multiple of the B pixels, k draws for each in a row. `random` is drawn from for uniform
        dequantisation alone: fresh noise for each draw.
        """
        with torch.autocast(raw.device.type, enabled=False):
            pixels, (mean, log_scale) = pixels.float(), self.parameters_of(raw)
            draws = len(raw) // len(pixels)
            if self.dequantisation == "uniform":
                assert random is not None
                noise = random.rand(draws, *pixels.shape[1:]).flatten(0, 1)
                pixels = likelihood.dequantise(pixels.repeat_interleave(draws, 0), noise)
                each = likelihood.gaussian_log_prob if self.law == "gaussian" else _logistic_log_prob
                return (each(pixels, mean, log_scale) + likelihood.LOG_STEP).flatten(1).sum(1)
            pixels = pixels.repeat_interleave(draws, 0)
            if self.law == "bernoulli":
                return likelihood.bernoulli_log_prob(mean, pixels).flatten(1).sum(1)
            gaussian = self.law == "gaussian"
            mass = likelihood.gaussian_interval_log_prob if gaussian else likelihood.logistic_interval_log_prob
            return mass(pixels, mean, log_scale).flatten(1).sum(1)

    def mean(self, raw: Tensor) -> Tensor:
        """The expected picture, in [-1, 1] where `bounded`."""
        mean, _ = self.parameters_of(raw)
        return torch.tanh(mean / 2) if self.law == "bernoulli" else mean

    def draw(self, raw: Tensor, random: Random) -> Tensor:
        """A picture drawn from p(x | z): one of the 256 (bernoulli: 2) values a pixel."""
        mean, log_scale = self.parameters_of(raw)
        shape = mean.shape[1:]
        if self.law == "bernoulli":
            return (random.rand(*shape) < torch.sigmoid(mean)).float() * 2 - 1
        if self.law == "gaussian":
            noise = random.randn(*shape)
        else:
            noise = torch.logit(random.rand(*shape), eps=1e-6)
        # rounding and clamping is what the intervals with open ends say
        return pixels_to_float(pixels_to_uint8(mean + torch.exp(log_scale) * noise))


def _logistic_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """The logistic density."""
    at = (x - mean) * torch.exp(-log_scale)
    return F.logsigmoid(at) + F.logsigmoid(-at) - log_scale
