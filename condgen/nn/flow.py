"""The multi-scale flow of Real NVP (arXiv:1605.08803) and the way from 8-bit pixels to its real numbers and back."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.errors import ShapeError
from condgen.nn.coupling import Affine, Area, Coupling, Given, NetNorm, Norm, Start, checkerboards

LOGIT_MARGIN = 0.05
ORDER = (0, 3, 1, 2)  # of the four pixels of a 2x2 block: top left and bottom right go on, the others are factored out


class MultiScaleFlow(nn.Module):
    """An invertible map of (B, C, H, W) onto itself with a tractable Jacobian, conditional if asked.

    Per scale but the last: `checkerboard` couplings, squeeze, `channelwise` couplings, then one half of the values,
    a checkerboard, leaves; the last scale has `final` checkerboard couplings. What leaves is put back in its place,
    so that z has the layout of x: z[..., i, j] comes from the 2x2 block of x[..., i, j], at every scale.

    channels      C
    scales        1 = no squeeze. Published: 2 for CIFAR-10, else until the side is 4
    width         maps of the first coupling networks; doubled by every squeeze
    blocks        residual blocks of every coupling network
    checkerboard, channelwise, final   couplings; published 3, 3, 4. final=0 and scales=2 is one squeeze and no more
    vector, maps  widths of a vector condition (B, V) and of a map condition (B, M, h, w) of any size; 0 = none
    norm, net_norm, affine, start, lag   see `Coupling` and `FlowNorm`

    Sides must be multiples of 2 ** (scales - 1), else ShapeError. x keeps its number format, float32 at least; under
    autocast only the coupling networks are narrower, and then `inverse` returns x to within that format's rounding.
    With batch norm of either kind `inverse` inverts what evaluation mode computes.

    In training mode the first forward pass sets ActNorm from its batch.
    """

    def __init__(
        self, channels: int, *, scales: int = 2, width: int = 64, blocks: int = 8, checkerboard: int = 3,
        channelwise: int = 3, final: int = 4, norm: Norm = "actnorm", net_norm: NetNorm = "none",
        affine: Affine = "released", start: Start = "released", lag: float = 0.0, vector: int = 0, maps: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels, self.scales, self.vector, self.maps = channels, scales, vector, maps

        def couplings(kind: str, count: int, at: int, wide: int) -> nn.ModuleList:
            return nn.ModuleList(
                Coupling(
                    at, "checkerboard" if kind == "checkerboard" else "channel", flip=i % 2 == 1, width=wide,
                    blocks=blocks, norm=norm, net_norm=net_norm, affine=affine, start=start, lag=lag,
                    vector=vector, maps=maps,
                )
                for i in range(count)
            )  # fmt: skip

        self.spatial, self.deep = nn.ModuleList(), nn.ModuleList()
        for scale in range(scales):
            here, wide = channels * 2**scale, width * 2**scale
            last = scale == scales - 1
            self.spatial.append(couplings("checkerboard", final if last else checkerboard, here, wide))
            if not last:
                self.deep.append(couplings("channel", channelwise, 4 * here, 2 * wide))
        self.initialised: Tensor
        self.register_buffer("initialised", torch.tensor(norm != "actnorm"))

    @property
    def multiple(self) -> int:
        """Sides must be multiples of this."""
        return int(2 ** (self.scales - 1))

    def forward(self, x: Tensor, vector: Tensor | None = None, map: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x -> (z of the same shape, log|det dz/dx| (B,))."""
        x = self._checked(x)
        initialise = self.training and not bool(self.initialised)
        logdet = x.new_zeros(len(x))
        left: list[Tensor] = []
        for scale in range(self.scales):
            for coupling, area, given in self._couplings(self.spatial[scale], x, vector, map):
                x, change = coupling(x, area, given, initialise=initialise)
                logdet = logdet + change
            if scale < self.scales - 1:
                x = F.pixel_unshuffle(x, 2)
                for coupling, area, given in self._couplings(self.deep[scale], x, vector, map):
                    x, change = coupling(x, area, given, initialise=initialise)
                    logdet = logdet + change
                x, out = reorder(x).chunk(2, dim=1)
                left.append(out)
        if initialise:
            self.initialised.fill_(True)
        while left:
            x = F.pixel_shuffle(restore(torch.cat([x, left.pop()], dim=1)), 2)
        return x, logdet

    def inverse(self, z: Tensor, vector: Tensor | None = None, map: Tensor | None = None) -> Tensor:
        """z -> x with forward(x) = z."""
        x, *left = self.parts(self._checked(z))
        for scale in reversed(range(self.scales)):
            if scale < self.scales - 1:
                x = restore(torch.cat([x, left.pop(0)], dim=1))
                for coupling, area, given in reversed(list(self._couplings(self.deep[scale], x, vector, map))):
                    x = coupling.inverse(x, area, given)
                x = F.pixel_shuffle(x, 2)
            for coupling, area, given in reversed(list(self._couplings(self.spatial[scale], x, vector, map))):
                x = coupling.inverse(x, area, given)
        return x

    def parts(self, z: Tensor) -> list[Tensor]:
        """z (B, C, H, W) -> what the last scale gave and what left at each scale before, from the coarsest to the
        finest: (B, C 2^s, H / 2^s, W / 2^s) for s = scales - 1, scales - 1, scales - 2, ..., 1.
        """
        left: list[Tensor] = []
        for _ in range(self.scales - 1):
            z, out = reorder(F.pixel_unshuffle(z, 2)).chunk(2, dim=1)
            left.insert(0, out)
        return [z, *left]

    def gains(self) -> list[Tensor]:
        """The parameters that Real NVP penalises: gains of weight-normalised layers and factors of log-scales."""
        return [p for name, p in self.named_parameters() if name.endswith((".gain", ".factor"))]

    def _couplings(
        self, layers: nn.Module, x: Tensor, vector: Tensor | None, map: Tensor | None
    ) -> Iterator[tuple[Coupling, Area, Given]]:
        """Each coupling with the area that it changes and its condition at the size of x."""
        assert isinstance(layers, nn.ModuleList)
        if not len(layers):
            return
        given = Given(vector, None if map is None else fit(map, (x.shape[-2], x.shape[-1])))
        everywhere = Area(None, x.shape[-2] * x.shape[-1])
        boards = checkerboards(x)
        for layer in layers:
            assert isinstance(layer, Coupling)
            yield layer, boards[int(layer.flip)] if layer.kind == "checkerboard" else everywhere, given

    def _checked(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ShapeError(f"this flow takes (B, {self.channels}, H, W); got shape {tuple(x.shape)}")
        if height % self.multiple or width % self.multiple:
            raise ShapeError(
                f"{height} x {width} cannot be squeezed {self.scales - 1} times: both sides must be multiples of "
                f"{self.multiple}. Pad or resize the pictures (data.size), or use fewer scales"
            )
        return x if x.dtype == torch.float64 else x.float()


def reorder(x: Tensor) -> Tensor:
    """Channels of a squeezed (B, 4 C, H, W), from c0 c0 c0 c0 c1 ... (`pixel_unshuffle`) to all of one pixel of the
    2x2 block after all of another: top left, bottom right, top right, bottom left.
    """
    blocks = x.unflatten(1, (-1, 4))
    return torch.stack([blocks[:, :, at] for at in ORDER], dim=1).flatten(1, 2)


def restore(x: Tensor) -> Tensor:
    """The inverse of `reorder`."""
    blocks = x.unflatten(1, (4, -1))
    return torch.stack([blocks[:, ORDER.index(at)] for at in range(4)], dim=2).flatten(1, 2)


def fit(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """maps (B, M, h, w) at another size: means over the covered area, or the nearest cell where it must grow."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    if maps.shape[-2] >= size[0] and maps.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size=size, mode="nearest")


def to_logits(unit: Tensor, margin: float = LOGIT_MARGIN) -> tuple[Tensor, Tensor]:
    """x in [0, 1] -> (logit(margin + (1 - 2 margin) x), its log|det| (B,)).

    The released form; the paper's alpha + (1 - alpha) x has no finite value at x = 1.
    """
    p = margin + (1 - 2 * margin) * unit
    low, high = p.log(), (-p).log1p()
    return low - high, (math.log(1 - 2 * margin) - low - high).flatten(1).sum(1)


def from_logits(y: Tensor, margin: float = LOGIT_MARGIN) -> Tensor:
    """The inverse of `to_logits`: below 0 or above 1 where y is outside its image."""
    return (y.sigmoid() - margin) / (1 - 2 * margin)


def dequantise(pixels: Tensor, noise: Tensor) -> Tensor:
    """Pixels k / 127.5 - 1 and u in [0, 1) -> (k + u) / 256 in [0, 1)."""
    return (pixels.add(1).mul(127.5).round().clamp(0, 255) + noise) / 256


def to_pixels(unit: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], clamped: the middle of the k-th of 256 intervals becomes k / 127.5 - 1, so that rounding to
    the nearest of 256 values finds the interval.
    """
    return ((unit * 256 - 0.5) / 127.5 - 1).clamp(-1, 1)
