"""Log-probabilities of 8-bit pixels, KL divergences and bounds, all in nats and in float32 or what was given.

Pixels are k / 127.5 - 1 with integer k in 0..255; a grey level is STEP wide. "Interval" means the mass that a law on
the real line puts between two half levels, the outermost two reaching to infinity, so that the 256 probabilities sum
to 1 (Salimans et al. 2017, arXiv:1701.05517, against the release of Kingma et al. 2016, which lets the ends go).
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from condgen.nn.sync_norm import sum_over_ranks

LEVELS = 256
STEP = 2 / (LEVELS - 1)
HALF_STEP = STEP / 2
LOG_STEP = math.log(STEP)
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
TAIL = -30.0
EDGE = 1 - HALF_STEP  # beyond it lies the darkest or the brightest level


def bernoulli_log_prob(logits: Tensor, pixels: Tensor) -> Tensor:
    """ln p(pixel), elementwise, of black (-1) and white (1) pixels with p(white) = sigmoid(logits).

    For grey levels x in between it is the cross-entropy x ln p + (1 - x) ln(1 - p) of x on [0, 1], which is the log of
    no normalised probability: good for training, not for bits.
    """
    return -F.binary_cross_entropy_with_logits(logits, (pixels + 1) / 2, reduction="none")


def grey_entropy(pixels: Tensor) -> Tensor:
    """-x ln x - (1 - x) ln(1 - x), elementwise, of grey levels x on [0, 1]: the least value of their cross-entropy."""
    white = ((pixels + 1) / 2).clamp(0, 1)
    return -torch.xlogy(white, white) - torch.xlogy(1 - white, 1 - white)


def gaussian_log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """ln N(x; mean, exp(log_std)^2), elementwise: a density."""
    return -HALF_LOG_2PI - log_std - 0.5 * ((x - mean) * torch.exp(-log_std)).square()


def gaussian_interval_log_prob(pixels: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """ln P(level), elementwise: the normal law's mass on the pixel's interval."""
    low, high = _ends(pixels, mean, log_std)
    outside = log_ndtr(torch.where(pixels < 0, high, -low))  # one end of the first and last level is open
    # ln Phi is accurate on the left, so an interval on the right is mirrored to the left
    right = low + high > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    below, upto = log_ndtr(low), log_ndtr(high)
    inside = upto + log1mexp((upto - below).clamp_min(1e-12))
    return torch.where(pixels.abs() > EDGE, outside, inside)


def logistic_interval_log_prob(pixels: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """ln P(level), elementwise: the logistic law's mass on the pixel's interval (Kingma et al. 2016).

    sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), which needs no case for tiny masses.
    """
    low, high = _ends(pixels, mean, log_scale)
    inside = F.logsigmoid(high) + F.logsigmoid(-low) + log1mexp(STEP * torch.exp(-log_scale))
    inside = torch.where(pixels < -EDGE, F.logsigmoid(high), inside)
    return torch.where(pixels > EDGE, F.logsigmoid(-low), inside)


def log_ndtr(x: Tensor) -> Tensor:
    """ln Phi(x). torch's own has no float32 gradient far to the left (at -10,000 it is 6 times too large, at -65,000
    infinite), so there the asymptotic series takes over."""
    tail = x < TAIL
    far = torch.where(tail, x, TAIL)
    inverse = far.square().reciprocal()
    series = torch.log1p(-inverse * (1 - inverse * (3 - 15 * inverse)))
    return torch.where(
        tail, series - 0.5 * far.square() - torch.log(-far) - HALF_LOG_2PI, torch.special.log_ndtr(x.clamp_min(TAIL))
    )


def log1mexp(x: Tensor) -> Tensor:
    """ln(1 - exp(-x)) for x > 0, accurate at both ends; safe in gradients."""
    small = x < math.log(2)
    near = torch.log(-torch.expm1(-torch.where(small, x, 1.0)))
    far = torch.log1p(-torch.exp(-torch.where(small, 1.0, x)))
    return torch.where(small, near, far)


def dequantise(pixels: Tensor, noise: Tensor) -> Tensor:
    """Pixels spread over their intervals by noise in [0, 1). A density there, plus LOG_STEP a pixel, bounds ln P."""
    return pixels + (noise - 0.5) * STEP


def gaussian_kl(mean: Tensor, log_std: Tensor, prior_mean: Tensor | float, prior_log_std: Tensor | float) -> Tensor:
    """KL(N(mean, exp(log_std)^2) || N(prior_mean, exp(prior_log_std)^2)), elementwise."""
    prior_log_std = torch.as_tensor(prior_log_std, dtype=mean.dtype, device=mean.device)
    square = torch.exp(2 * log_std) + (mean - prior_mean).square()
    return prior_log_std - log_std + 0.5 * (square * torch.exp(-2 * prior_log_std) - 1)


def free_bits(groups: Tensor, floor: float) -> Tensor:
    """KL of groups (B, G) in nats -> the term of the objective, a scalar: for each group the larger of `floor` and its
    mean over the batch, summed (Kingma et al. 2016, arXiv:1606.04934). floor 0 = the plain mean KL.

    With several processes, which hold equally many rows, a floor is compared with the mean over all of them.
    """
    means = groups.mean(0)
    if floor <= 0:
        return means.sum()
    if dist.is_initialized() and dist.get_world_size() > 1:
        means = sum_over_ranks(means) / dist.get_world_size()
    return means.clamp_min(floor).sum()


def log_mean_exp(log_weights: Tensor, dim: int) -> Tensor:
    """ln of the mean weight: the bound of Burda et al. 2016 (arXiv:1509.00519)."""
    return torch.logsumexp(log_weights, dim) - math.log(log_weights.shape[dim])


def _ends(pixels: Tensor, mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends of the pixel's interval, in units of the law's scale."""
    narrow = torch.exp(-log_scale)
    centre = pixels - mean
    return (centre - HALF_STEP) * narrow, (centre + HALF_STEP) * narrow
