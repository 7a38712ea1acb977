"""Discretised mixtures of logistics: probabilities of 8-bit pixels and draws from them.

Salimans, Karpathy, Chen, Kingma 2017, "PixelCNN++", ICLR, arXiv:1701.05517. Layout of the parameters as released:
K logits, then per colour K means, K log scales and (RGB) K coefficients; green's mean is moved by red, blue's by both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.errors import ShapeError

LOWEST_LOG_SCALE = -7.0
NOISE_FLOOR = 1e-7  # uniforms are kept this far from 0 and 1, where their logits are infinite


def parameter_count(mixtures: int, colours: int) -> int:
    """Channels that a network must give: 10 K for RGB, 3 K for grey. ShapeError for other numbers of colours."""
    if colours not in (1, 3):
        raise ShapeError(
            f"a mixture of logistics knows 1 or 3 colours, not {colours}; choose system.likelihood=softmax"
        )
    return mixtures * (10 if colours == 3 else 3)


@dataclass(frozen=True)
class Mixture:
    """logits (B, K, *), means and log_scales (B, C, K, *), coefficients (B, 3, K, *) in (-1, 1) or None for grey."""

    logits: Tensor
    means: Tensor
    log_scales: Tensor
    coefficients: Tensor | None


def unpack(parameters: Tensor, colours: int) -> Mixture:
    """parameters (B, P, *) -> Mixture; log scales are at least -7, as released."""
    parts = 3 if colours == 3 else 2
    mixtures = parameters.shape[1] // (1 + parts * colours)
    logits, rest = parameters[:, :mixtures], parameters[:, mixtures:]
    means, scales, *more = rest.unflatten(1, (colours, parts, mixtures)).unbind(2)
    return Mixture(logits, means, scales.clamp(min=LOWEST_LOG_SCALE), torch.tanh(more[0]) if more else None)


def mixture_log_prob(parameters: Tensor, pixels: Tensor, *, values: int = 256, released: bool = False) -> Tensor:
    """log p of each pixel in nats: parameters (B, P, *), pixels (B, C, *) in [-1, 1] -> (B, *).

    values     how many equally spaced values a pixel can have, from -1 to 1
    released   the formula of the public code, which replaces improbable bins by density times width and then does
               not sum to one (off by up to 2.1 nats at log scale -7): for parity alone
    """
    mixture = unpack(parameters, pixels.shape[1])
    x = pixels.unsqueeze(2)  # (B, C, 1, *)
    means = _moved_means(mixture, x)
    each = _released_log_mass if released else logistic_log_mass
    log_mass = each(x, means, mixture.log_scales, values).sum(1)  # (B, K, *)
    return torch.logsumexp(F.log_softmax(mixture.logits, 1) + log_mass, 1)


def logistic_log_mass(x: Tensor, mean: Tensor, log_scale: Tensor, values: int = 256) -> Tensor:
    """log of a logistic's mass in the bin of x; the first and the last bin reach to infinity.

    Exact for every mean and scale, and never a difference of two nearly equal numbers: with a, b the scaled edges,
    log(s(a) - s(b)) = log s(a) + log s(-b) + log(1 - e^(b - a)).
    """
    half = 1 / (values - 1)
    inverse = torch.exp(-log_scale)
    upper, lower = inverse * (x - mean + half), inverse * (x - mean - half)
    below, above = F.logsigmoid(upper), F.logsigmoid(-lower)
    log_width = math.log(2 * half) - log_scale
    width = torch.exp(log_width).clamp(min=1e-6)  # below that (1 - e^-w) / w is 1 to the last bit of a float32
    inside = below + above + log_width + torch.log(-torch.expm1(-width) / width)
    return torch.where(x < half - 1, below, torch.where(x > 1 - half, above, inside))


def _released_log_mass(x: Tensor, mean: Tensor, log_scale: Tensor, values: int = 256) -> Tensor:
    half = 1 / (values - 1)
    inverse = torch.exp(-log_scale)
    upper, lower, middle = (inverse * (x - mean + shift) for shift in (half, -half, 0.0))
    mass = torch.sigmoid(upper) - torch.sigmoid(lower)
    density = middle - log_scale - 2 * F.softplus(middle) + math.log(2 * half)
    inside = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-12)), density)
    return torch.where(x < -0.999, F.logsigmoid(upper), torch.where(x > 0.999, F.logsigmoid(-lower), inside))


def _moved_means(mixture: Mixture, x: Tensor) -> Tensor:
    if mixture.coefficients is None:
        return mixture.means
    red, green, blue = mixture.means.unbind(1)
    one, two, three = mixture.coefficients.unbind(1)
    return torch.stack([red, green + one * x[:, 0], blue + two * x[:, 0] + three * x[:, 1]], 1)


def quantise(pixels: Tensor, values: int = 256) -> Tensor:
    """The nearest of `values` equally spaced values in [-1, 1]; 256 gives exactly what uint8 pixels become."""
    top = values - 1
    return (pixels.clamp(-1, 1) + 1).mul_(top / 2).round_().mul_(2 / top).sub_(1)


def mixture_noise(uniform: Tensor, mixtures: int) -> tuple[Tensor, Tensor]:
    """Uniforms (..., K + C) in [0, 1) -> Gumbel (..., K) to choose a component, logistic (..., C) for its colours."""
    kept = uniform.clamp(NOISE_FLOOR, 1 - NOISE_FLOOR)
    return -torch.log(-torch.log(kept[..., :mixtures])), torch.logit(kept[..., mixtures:])


def mixture_sample(
    parameters: Tensor, gumbel: Tensor, logistic: Tensor, *, values: int = 256, temperature: float = 1.0
) -> Tensor:
    """parameters (B, P) and noise (B, K), (B, C) -> pixels (B, C) of `values` values in [-1, 1].

    Red is rounded before green is drawn and green before blue: the network was trained on rounded pixels, and only
    so are draws distributed as `mixture_log_prob` says. A temperature divides the logits and multiplies the scales.
    """
    colours, mixtures = logistic.shape[1], gumbel.shape[1]
    tempered: Any = parameters[:, :mixtures]
    chosen = ((tempered if temperature == 1.0 else tempered / temperature) + gumbel).argmax(1)
    rest = parameters[:, mixtures:].unflatten(1, (-1, mixtures))
    picked = rest.gather(2, chosen[:, None, None].expand(-1, rest.shape[1], 1)).view(len(rest), colours, -1)
    scale = picked[:, :, 1].clamp(min=LOWEST_LOG_SCALE).exp()
    drawn = torch.addcmul(picked[:, :, 0], scale, logistic, value=temperature)
    if colours == 1:
        return quantise(drawn, values)
    one, two, three = torch.tanh(picked[:, :, 2]).unbind(1)
    red = quantise(drawn[:, 0], values)
    green = quantise(torch.addcmul(drawn[:, 1], one, red), values)
    blue = quantise(torch.addcmul(torch.addcmul(drawn[:, 2], two, red), three, green), values)
    return torch.stack([red, green, blue], 1)
