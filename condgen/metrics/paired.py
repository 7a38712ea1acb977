"""Scores of pictures against their own true picture and their own source: L1, PSNR, SSIM, LPIPS, input recovery.

SSIM is Wang et al. 2004 (IEEE TIP 13(4)), LPIPS Zhang et al. 2018 (arXiv:1801.03924). Each has measured ends, because
an output that copies its source, or that is the same mean picture for every source, already gets a fair number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from condgen import rng
from condgen.errors import ConfigError, DataError, ShapeError
from condgen.metrics.score import Score
from condgen.metrics.signature import signature
from condgen.nn.fixed_features import SMALLEST, FixedFeatures, packaged, read_state, sha256

WINDOW = 11  # of SSIM, as published
MAX_DECIBELS = 100.0  # of equal pictures, whose PSNR would be infinite
CHUNK = 16  # pictures that a network sees at a time
FLAT = 1e-8  # variance of an edge map below which it shows no edges
# how the sha256 of the weights behind published LPIPS begins: torchvision's network, and the linear weights v0.1
PUBLISHED = {"vgg16": ("397923af", "a78928a0af1e5f0f"), "alexnet": ("7be5be79", "df73285e35b22355")}


class Measure(NamedTuple):
    """each: (picture, true picture) (N, C, H, W) in [-1, 1] -> (N,); fields: its own part of the signature."""

    name: str
    each: Callable[[Tensor, Tensor], Tensor]
    perfect: float | None
    higher_is_better: bool
    fields: Mapping[str, str] = {}


def l1(fake: Tensor, real: Tensor) -> Tensor:
    """Mean absolute difference of each picture (N,), on the scale of [-1, 1]."""
    return (fake - real).abs().flatten(1).mean(1)


def psnr(fake: Tensor, real: Tensor) -> Tensor:
    """Peak signal to noise ratio of each picture (N,) in dB, at most 100; the peak is 2, the span of [-1, 1]."""
    error = (fake - real).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error.clamp_min(1e-30))).clamp_max(MAX_DECIBELS)


def ssim(fake: Tensor, real: Tensor) -> Tensor:
    """Structural similarity of each picture (N,), at most 1; Gaussian window of 11 px, smaller for tiny pictures."""
    from kornia.metrics import ssim as ssim_map

    side = min(WINDOW, min(fake.shape[-2:]) // 2 * 2 - 1)
    return ssim_map((fake + 1) / 2, (real + 1) / 2, window_size=side).flatten(1).mean(1)


def edges(pixels: Tensor) -> Tensor:
    """Sobel edge strength (N, H, W) of pictures with 1 or 3 channels; polarity does not matter."""
    from kornia.filters import sobel

    return sobel(pixels.float().mean(1, keepdim=True))[:, 0]


def edge_agreement(first: Tensor, second: Tensor) -> Tensor:
    """Correlation (N,) of the edge maps of two sets of pictures; 0 where one of them has no edges."""
    a, b = (edges(x).flatten(1) for x in (first, second))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    power = a.square().mean(1) * b.square().mean(1)
    agreement = (a * b).mean(1) / power.clamp_min(FLAT**2).sqrt()
    return torch.where(power > FLAT**2, agreement, 0.0)


class Lpips:
    """LPIPS-type distance (N,) of pictures (N, 1 or 3, H, W) in [-1, 1], 0 for equal ones; pictures keep their size.

    Each position of each layer of a fixed network becomes a unit vector; their squared differences are summed over
    channels, averaged over positions and summed over layers.

    network   a name of `condgen.nn.fixed_features`
    weights   file of the linear weights that Zhang et al. learned for its channels (vgg.pth or alex.pth, v0.1 of the
              official release), for vgg16 and alexnet; None = every channel counts 1

    Only vgg16 or alexnet with torchvision's weights and the official linear weights gives the published LPIPS. The
    name says which it is: "lpips-vgg16-linear", "lpips-vgg16" without linear weights, "lpips-efficientnet_lite0",
    which is no LPIPS of any paper and compares with itself alone; the signature carries literature=yes or no.

    Raises ConfigError for a name or a file that does not fit, ShapeError for pictures that the network cannot see.
    """

    def __init__(self, network: str = "efficientnet_lite0", weights: Path | str | None = None) -> None:
        self.network = FixedFeatures(network).load()
        self.linear: list[Tensor] | None = None
        digest = ""
        if weights is not None:
            file = Path(weights).expanduser()
            self.linear, digest = _linear(file, self.network.kind), sha256(file)
        kind = self.network.kind
        self.name = f"lpips-{kind}" + ("-linear" if digest else "")
        expected = PUBLISHED.get(kind)
        known = expected is not None and digest.startswith(expected[1]) and self.network.digest.startswith(expected[0])
        self.fields = {
            "net": f"{kind}#{self.network.digest[:12]}",
            "linear": digest[:12] or "none",
            "literature": "yes" if known else "no",
        }

    @torch.no_grad()
    def __call__(self, fake: Tensor, real: Tensor) -> Tensor:
        parts = zip(fake.split(CHUNK), real.split(CHUNK), strict=True)
        return torch.cat([self._distance(self.network(a), self.network(b)) for a, b in parts])

    def _distance(self, fake: list[Tensor], real: list[Tensor]) -> Tensor:
        total = torch.zeros(len(fake[0]), device=fake[0].device)
        for layer, (a, b) in enumerate(zip(fake, real, strict=True)):
            apart = (_unit(a) - _unit(b)).square()
            if self.linear is not None:
                apart = apart * self.linear[layer].to(apart.device)
            total = total + apart.sum(1).mean((1, 2))
        return total


def _unit(maps: Tensor) -> Tensor:
    """Unit vectors over channels; 0 stays 0."""
    return maps / (torch.linalg.vector_norm(maps, dim=1, keepdim=True) + 1e-10)


def _linear(file: Path, kind: str) -> list[Tensor]:
    """One (1, C, 1, 1) a layer."""
    channels = {"vgg16": (64, 128, 256, 512, 512), "alexnet": (64, 192, 384, 256, 256)}.get(kind)
    if channels is None:
        raise ConfigError(f"linear weights of LPIPS exist for vgg16 and alexnet, not for {kind}; leave them out")
    state = read_state(file, "LPIPS")
    found = [state.get(f"lin{layer}.model.1.weight") for layer in range(len(channels))]
    good = [t for t, c in zip(found, channels, strict=True) if t is not None and t.shape == (1, c, 1, 1)]
    if len(good) != len(channels):
        raise ConfigError(
            f"{file} does not hold the linear weights of {kind}: lin0.model.1.weight and so on, of {channels} channels"
        )
    return good


MEASURES = (
    Measure("l1", l1, 0.0, False),
    Measure("psnr", psnr, None, True),
    Measure("ssim", ssim, 1.0, True),
)


def paired_scores(
    fake: Tensor,
    real: Tensor,
    source: Tensor,
    seen: Tensor,
    *,
    about: Mapping[str, str],
    seed: int = 0,
    distance: Lpips | Literal["auto"] | None = "auto",
) -> list[Score]:
    """l1, psnr, ssim and an LPIPS against the true picture, the same of the mean picture, and input recovery.

    fake, real  pictures (N, C, H, W) in [-1, 1], row by row for the same source
    source      (N, 1 or C, H, W): what was translated; grey is repeated over the channels
    seen        true pictures that were trained on: `<score>/mean-image` is what their mean gets
    distance    an `Lpips`; "auto" = that of efficientnet_lite0 where its packages are installed and it can see the
                pictures, else none

    Floor of l1, psnr, ssim and lpips: the source copied, or its negative where that is nearer over all rows. Floor of
    input_recovery, the correlation of Sobel edges of output and source: the sources shuffled; ceiling: real pictures.
    Raises ShapeError and DataError.
    """
    if fake.shape != real.shape or source.shape[-2:] != real.shape[-2:] or len(source) != len(real):
        raise ShapeError(f"outputs {tuple(fake.shape)}, truth {tuple(real.shape)}, sources {tuple(source.shape)}")
    if len(fake) < 2:
        raise DataError("paired scores shuffle the sources, which needs at least 2 rows")
    copied = _as_target(source, real)
    mean = seen.mean(0, keepdim=True).expand_as(real)
    found = []
    for measure in _measures(distance, real):
        fields = {**about, **measure.fields, "n": str(len(fake))}
        each = measure.each(fake, real)
        floors = [float(measure.each(sign * copied, real).mean()) for sign in (1, -1)]
        made = Score(
            measure.name, float(each.mean()), floor=max(floors) if measure.higher_is_better else min(floors),
            ceiling=measure.perfect, error=_error(each), higher_is_better=measure.higher_is_better,
            signature=signature(measure.name, **fields, floor="copied-source"),
        )  # fmt: skip
        base = Score(
            f"{measure.name}/mean-image", float(measure.each(mean, real).mean()), floor=made.floor,
            ceiling=measure.perfect, higher_is_better=measure.higher_is_better,
            signature=signature(f"{measure.name}/mean-image", **fields, of=len(seen)),
        )  # fmt: skip
        found += [made, base]
    order = shuffled(len(source), seed)
    each = edge_agreement(fake, source)
    found.append(
        Score(
            "input_recovery",
            float(each.mean()),
            floor=float(edge_agreement(fake, source[order]).mean()),
            ceiling=float(edge_agreement(real, source).mean()),
            error=_error(each),
            signature=signature("input_recovery", **about, n=len(fake), edges="sobel", seed=seed),
        )
    )
    return found


def _measures(distance: Lpips | Literal["auto"] | None, real: Tensor) -> list[Measure]:
    if distance == "auto":
        fits = real.shape[1] in (1, 3) and min(real.shape[-2:]) >= SMALLEST["efficientnet_lite0"]
        distance = Lpips() if fits and packaged() else None
    if distance is None:
        return list(MEASURES)
    return [*MEASURES, Measure(distance.name, distance, 0.0, False, distance.fields)]


def shuffled(rows: int, seed: int) -> Tensor:
    """A permutation of range(rows), at least 2, without a fixed point: one cycle."""
    order = rng.permutation(rows, seed, "shuffled sources")
    out = torch.empty_like(order)
    out[order] = order.roll(1)
    return out


def _as_target(source: Tensor, real: Tensor) -> Tensor:
    channels = real.shape[1]
    if source.shape[1] == channels:
        return source
    return source.mean(1, keepdim=True).expand(-1, channels, -1, -1)


def _error(each: Tensor) -> float:
    """Standard error of the mean."""
    return float(each.std() / len(each) ** 0.5)
