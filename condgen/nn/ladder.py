"""The ResNet VAE with bidirectional inference of Kingma et al. 2016 (arXiv:1606.04934): a ladder of latent maps.

A bottom-up path of residual blocks leaves half of each posterior, the top-down path that also generates adds the other
half and the prior. As released: ELU before each convolution, residuals times 0.1, learned constant at the top, a
strided 5x5 convolution at the bottom. Not as released: no weight norm with data-dependent start (the heads of the
moments start at a tenth instead), and IAF steps in the paper's gated form. The condition is added at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.errors import ShapeError
from condgen.nn.iaf import Iaf
from condgen.nn.latent import Draw, Inferred, draw_posterior, repeated

RESIDUAL = 0.1
HEAD_START = 0.1
LOG_STD_RANGE = (-7.0, 5.0)


class LadderLayer(nn.Module):
    """One latent z (Z, h, w) and its two residual blocks.

    halve   z and what lies above have half the size of what lies below
    top     nothing lies above: no features are passed on
    """

    def __init__(
        self, width: int, latent: int, *, halve: bool = False, top: bool = False, flow: Iaf | None = None
    ) -> None:
        super().__init__()
        self.halve, self.flow = halve, flow
        context = 0 if flow is None else width
        self.sizes_up = [latent, latent, context, 0 if top else width]  # q mean, q log std, context, features
        self.sizes_down = [latent, latent, latent, latent, context, width]  # p and q moments, context, features
        self.up_in = nn.Conv2d(width, sum(self.sizes_up), 3, 2 if halve else 1, 1)
        self.up_out = None if top else nn.Conv2d(width, width, 3, 1, 1)
        self.down_in = nn.Conv2d(width, sum(self.sizes_down), 3, 1, 1)
        out = width + latent
        self.down_out = nn.ConvTranspose2d(out, width, 4, 2, 1) if halve else nn.Conv2d(out, width, 3, 1, 1)
        with torch.no_grad():
            self.up_in.weight[: 2 * latent] *= HEAD_START
            self.down_in.weight[: 4 * latent] *= HEAD_START

    def up(self, h: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Features from below -> features for above, and this layer's part of q: mean, log std, context."""
        mean, log_std, context, inner = self.up_in(F.elu(h)).split(self.sizes_up, dim=1)
        if self.up_out is not None:
            h = (h[:, :, ::2, ::2] if self.halve else h) + RESIDUAL * self.up_out(F.elu(inner))
        return h, (mean, log_std, context)

    def down(
        self,
        h: Tensor,
        noise: Tensor | None,
        below: tuple[Tensor, Tensor, Tensor] | None = None,
        latent: Tensor | None = None,
    ) -> tuple[Tensor, Draw]:
        """Features from above -> features for below. z is `latent` if given, else from q where `below` holds what `up`
        left, else from the prior."""
        moments = self.down_in(F.elu(h)).split(self.sizes_down, dim=1)
        prior_mean, prior_log_std, mean, log_std, context, inner = moments
        prior_mean, prior_log_std = prior_mean.float(), prior_log_std.float().clamp(*LOG_STD_RANGE)
        if latent is not None:
            drawn = Draw(latent, torch.zeros_like(latent), torch.zeros_like(latent))
        elif below is None:
            assert noise is not None
            z = prior_mean + torch.exp(prior_log_std) * noise
            drawn = Draw(z, torch.zeros_like(z), torch.zeros_like(z))
        else:
            assert noise is not None
            q_mean, q_log_std, q_context = (part.repeat_interleave(len(h) // len(part), 0) for part in below)
            log_std_q = (q_log_std + log_std).float().clamp(*LOG_STD_RANGE)
            drawn = draw_posterior(
                (q_mean + mean).float(), log_std_q, noise, prior_mean, prior_log_std, self.flow, q_context + context
            )
        out = self.down_out(F.elu(torch.cat([drawn.latent.to(inner.dtype), inner], dim=1)))
        skip = F.interpolate(h, scale_factor=2.0, mode="nearest") if self.halve else h
        return skip + RESIDUAL * out, drawn


class LadderVae(nn.Module):
    """`depth` layers at each of `scales` sizes, the largest half of the picture's; groups of the KL are channels.

    latent       channels Z of every layer's z
    iaf_steps    0 = Gaussian given the layers above; otherwise steps of masked convolutions on every layer
    """

    def __init__(
        self,
        shape: Sequence[int],
        given: int,
        *,
        outputs: int,
        width: int,
        latent: int,
        depth: int,
        scales: int,
        iaf_steps: int = 0,
        iaf_hidden: Sequence[int] = (),
    ) -> None:
        super().__init__()
        channels, height, side = shape
        multiple = 2**scales
        if height % multiple or side % multiple:
            raise ShapeError(
                f"{scales} scales need sides that are multiples of {multiple}; the data give {height} x {side} px. "
                "Change data.size or system.scales"
            )
        self.latent = latent
        self.stem = nn.Conv2d(channels, width, 5, 2, 2)
        self.layers = nn.ModuleList()
        self.sizes: list[tuple[int, int]] = []
        for scale in range(scales):
            for block in range(depth):
                flow = Iaf(latent, width, iaf_hidden, steps=iaf_steps, spatial=True) if iaf_steps else None
                halve, top = scale > 0 and block == 0, scale == scales - 1 and block == depth - 1
                self.layers.append(LadderLayer(width, latent, halve=halve, top=top, flow=flow))
                self.sizes.append((height // 2 ** (scale + 1), side // 2 ** (scale + 1)))
        self.top = nn.Parameter(torch.zeros(width))
        self.given_up = nn.Linear(given, width) if given else None
        self.given_top = nn.Linear(given, width) if given else None
        self.head = nn.ConvTranspose2d(width, outputs, 5, 2, 2, 1)

    @property
    def noise_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the standard normal noise, a row, that `infer` and `generate` take; the bottom layer first."""
        return [(self.latent, *size) for size in self.sizes]

    def infer(self, pixels: Tensor, given: Tensor | None, noise: Sequence[Tensor]) -> Inferred:
        """noise: (R, *shape) for each of `noise_shapes`, R a multiple of the rows of `pixels`."""
        h = self.stem(pixels)
        if self.given_up is not None:
            h = h + self.given_up(given)[:, :, None, None]
        parts = []
        for layer in self.layers:
            assert isinstance(layer, LadderLayer)
            h, part = layer.up(h)
            parts.append(part)
        raw, drawn = self._down(repeated(given, len(noise[0])), len(noise[0]), noise, parts)
        return Inferred(
            raw,
            torch.cat([d.ratio.sum((2, 3)) for d in drawn], dim=1),
            torch.cat([d.kl.sum((2, 3)) for d in drawn], dim=1),
            torch.cat([d.latent.flatten(1) for d in drawn], dim=1),
        )

    def generate(self, given: Tensor | None, noise: Sequence[Tensor]) -> Tensor:
        """Raw maps of z from the prior."""
        return self._down(given, len(noise[0]), noise)[0]

    def decode(self, latent: Tensor, given: Tensor | None) -> Tensor:
        """Raw maps of given z (R, N): the maps of all layers, flattened, as `infer` returns them."""
        parts = latent.split([math.prod(shape) for shape in self.noise_shapes], dim=1)
        maps = [part.unflatten(1, shape) for part, shape in zip(parts, self.noise_shapes, strict=True)]
        return self._down(given, len(latent), latents=maps)[0]

    def _down(
        self,
        given: Tensor | None,
        rows: int,
        noise: Sequence[Tensor] = (),
        parts: Sequence[tuple[Tensor, Tensor, Tensor]] = (),
        latents: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Draw]]:
        """Top-down through all layers; the draws in the order of the layers, the bottom one first."""
        top = self.top[None, :, None, None].expand(rows, -1, *self.sizes[-1])
        if self.given_top is not None:
            top = top + self.given_top(given)[:, :, None, None]
        h, drawn = top, []
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            assert isinstance(layer, LadderLayer)
            h, draw = layer.down(
                h,
                noise[i] if noise else None,
                below=parts[i] if parts else None,
                latent=latents[i] if latents else None,
            )
            drawn.append(draw)
        return self.head(F.elu(h)), drawn[::-1]
