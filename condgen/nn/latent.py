"""A latent vector between an encoder and a decoder, with a Gaussian or an IAF posterior: what VAEs of vectors share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condgen.losses.likelihood import HALF_LOG_2PI, gaussian_kl, gaussian_log_prob
from condgen.nn.iaf import Iaf
from condgen.nn.vae_nets import VectorDecoder, VectorEncoder


@dataclass(frozen=True)
class Inferred:
    """What one pass through q(z | x) and the decoder gives. R = B k rows: k draws for each picture in a row.

    raw     (R, outputs, H, W): the parameters of p(x | z), see `condgen.nn.observation`
    ratio   (R, G) ln q(z | x) - ln p(z) of the drawn z, summed within each of G groups; float32
    kl      (R, G) the same in expectation: in closed form where q is Gaussian given the layers above, else `ratio`
    latent  the drawn z, (R, N)
    """

    raw: Tensor
    ratio: Tensor
    kl: Tensor
    latent: Tensor


@dataclass(frozen=True)
class Draw:
    """z from a posterior, with `ratio` and `kl` elementwise, as in `Inferred`."""

    latent: Tensor
    ratio: Tensor
    kl: Tensor


def draw_posterior(
    mean: Tensor,
    log_std: Tensor,
    noise: Tensor,
    prior_mean: Tensor | float,
    prior_log_std: Tensor | float,
    flow: Iaf | None = None,
    context: Tensor | None = None,
) -> Draw:
    """z = flow(mean + exp(log_std) noise | context), with its KL to N(prior_mean, exp(prior_log_std)^2).

    All in float32. Every tensor has the rows of `noise`. Without a flow the KL is in closed form.
    """
    log_prior = torch.as_tensor(prior_log_std, dtype=mean.dtype, device=mean.device)
    centre = torch.as_tensor(prior_mean, dtype=mean.dtype, device=mean.device)
    latent = mean + torch.exp(log_std) * noise
    log_q = -HALF_LOG_2PI - log_std - 0.5 * noise.square()
    if flow is not None:
        latent, log_keep = flow(latent, context)
        log_q = log_q - log_keep
    ratio = log_q - gaussian_log_prob(latent, centre, log_prior)
    return Draw(latent, ratio, ratio if flow is not None else gaussian_kl(mean, log_std, centre, log_prior))


def repeated(x: Tensor | None, rows: int) -> Tensor | None:
    """Each row of x so often in a row that there are `rows` of them."""
    return x if x is None or len(x) == rows else x.repeat_interleave(rows // len(x), 0)


class VectorVae(nn.Module):
    """z (D,) between `encoder` and `decoder`; groups of the KL are its elements.

    flow         makes the posterior an inverse autoregressive flow; the encoder must give its context
    prior_given  width V of the condition: the prior is N(mean(c), std(c)^2) by a linear layer; 0 = N(0, I)
    """

    def __init__(
        self, encoder: VectorEncoder, decoder: VectorDecoder, latent: int, flow: Iaf | None = None, prior_given: int = 0
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.flow, self.size = encoder, decoder, flow, latent
        self.prior: nn.Linear | None = None
        if prior_given:
            self.prior = nn.Linear(prior_given, 2 * latent)
            nn.init.zeros_(self.prior.weight)
            nn.init.zeros_(self.prior.bias)

    @property
    def noise_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the standard normal noise, a row, that `infer` and `generate` take."""
        return [(self.size,)]

    def infer(self, pixels: Tensor, given: Tensor | None, noise: Sequence[Tensor]) -> Inferred:
        """noise: (R, *shape) for each of `noise_shapes`, R a multiple of the rows of `pixels`."""
        (eps,) = noise
        rows = len(eps)
        mean, log_std, context = self.encoder(pixels, given)
        given = repeated(given, rows)
        prior = self._prior(given)
        moments = (mean.repeat_interleave(rows // len(mean), 0), log_std.repeat_interleave(rows // len(mean), 0))
        drawn = draw_posterior(*moments, eps, *prior, self.flow, repeated(context, rows))
        return Inferred(self.decoder(drawn.latent, given), drawn.ratio, drawn.kl, drawn.latent)

    def generate(self, given: Tensor | None, noise: Sequence[Tensor]) -> Tensor:
        """Raw maps of z from the prior."""
        mean, log_std = self._prior(given)
        return self.decoder(mean + torch.exp(torch.as_tensor(log_std)) * noise[0], given)

    def decode(self, latent: Tensor, given: Tensor | None) -> Tensor:
        """Raw maps of given z (R, D)."""
        return self.decoder(latent, given)

    def _prior(self, given: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        if self.prior is None:
            return 0.0, 0.0
        mean, log_std = self.prior(given).float().chunk(2, dim=1)
        return mean, log_std.clamp(-7, 5)
