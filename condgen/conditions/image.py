"""Source pictures and label maps -> resized map, pooled vector, or patch tokens."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.conditions._features import expect_map_size, expect_size, null_sequence, null_vector, zero_rows
from condgen.conditions.base import ConditionKind, Feature
from condgen.errors import ConfigError, ShapeError
from condgen.pixels import pixels_to_float
from condgen.types import Condition, ImageSpec

DEFAULT_WIDTH = 128


class ImageMap(ConditionKind):
    """image -> map (B, C, h, w): the picture resized, and the mask as one more channel where the spec has one, or a
    1x1 convolution of those to `width`; vector (B, width) from a small convolutional encoder, 128 wide by default;
    sequence (B, patches, width) of patches with learned positions, 128 wide by default.

    Pixels that the mask does not give are set to 0 before anything reads them, so their content cannot matter.

    resample   "area" for photos: mean over the source area, no aliasing; "nearest" for label ids coded as pixels, and
               always for maps of classes (spec.classes)
    patch      side of a patch in source pixels
    """

    field: ClassVar[str] = "image"
    forms: ClassVar[tuple[str, ...]] = ("map", "vector", "sequence")

    def __init__(
        self,
        spec: ImageSpec,
        form: str,
        *,
        width: int | None = None,
        nullable: bool = False,
        resample: Literal["area", "nearest"] = "area",
        patch: int = 8,
    ) -> None:
        super().__init__(spec, form, width=width, nullable=nullable)
        if resample not in ("area", "nearest") or patch < 1:
            raise ConfigError(f"image resample={resample!r}, patch={patch}; choose area or nearest, and patch >= 1")
        self.resample, self.patch = "nearest" if spec.classes else resample, patch
        channels = spec.channels + int(spec.mask)
        self.width = width or (channels if form == "map" else DEFAULT_WIDTH)
        self.null = nn.Parameter(torch.zeros(self.width)) if nullable and form != "map" else None
        if form == "map":
            self.project = nn.Conv2d(channels, width, 1, bias=False) if width else None
        elif form == "vector":
            self.encode = ConvEncoder(channels, min(spec.height, spec.width), self.width)
        else:
            self.grid = (max(1, round(spec.height / patch)), max(1, round(spec.width / patch)))
            self.token = nn.Conv2d(channels, self.width, patch, patch)
            self.position = nn.Parameter(torch.randn(self.grid[0] * self.grid[1], self.width) * 0.02)

    def forward(self, condition: Condition, size: tuple[int, int] | None = None) -> Feature:
        pixels, weight, given = self._read(condition)
        stacked = torch.cat([pixels, weight], dim=1) if self.spec.mask else pixels
        if self.form == "map":
            out = resize(stacked, expect_map_size(size), self.resample)
            return Feature(self.project(out) if self.project is not None else out)
        if self.form == "vector":
            return Feature(null_vector(self.encode(stacked), given, self.null))
        side = (self.grid[0] * self.patch, self.grid[1] * self.patch)
        tokens = self.token(resize(stacked, side, self.resample)).flatten(2).mT + self.position  # (B, L, V)
        covered = F.max_pool2d(resize(weight, side, self.resample), self.patch).flatten(1) > 0
        return Feature(*null_sequence(tokens, covered & given[:, None], self.null))

    def _read(self, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """(pixels with what is not given set to 0, weight (B, 1, H, W), rows given (B,))."""
        image = condition.image
        assert image is not None
        expect_size("the number of image channels", image.pixels.shape[1], self.spec.channels)
        if image.mask is not None and not self.spec.mask:
            raise ShapeError("the image has a mask, which this system was not built for; remove the mask")
        pixels = pixels_to_float(image.pixels)
        if image.mask is None:
            weight = torch.ones_like(pixels[:, :1])
        else:
            weight = image.mask.to(pixels.dtype)
        pixels = torch.where(weight > 0, pixels, torch.zeros_like(pixels)) * weight
        known = weight if image.mask is not None else pixels
        given = condition.is_present("image") & (known != 0).flatten(1).any(1)
        return zero_rows(pixels, given), zero_rows(weight, given), given


class ConvEncoder(nn.Module):
    """(B, C, H, W) -> (B, width): strided convolutions until about 4 px are left, then the mean over space.

    No normalisation over the batch: a row's code never depends on other rows, in training either.
    """

    def __init__(self, channels: int, side: int, width: int, base: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        wide = base
        while True:
            layers += [nn.Conv2d(channels, wide, 4, 2, 1), nn.LeakyReLU(0.2)]
            channels, side = wide, side // 2
            if side <= 4:
                break
            wide = min(2 * wide, 4 * base)
        self.trunk = nn.Sequential(*layers)
        self.output = nn.Linear(channels, width)

    def forward(self, pixels: Tensor) -> Tensor:
        smallest = 2 ** (len(self.trunk) // 2)
        if min(pixels.shape[-2:]) < smallest:  # smaller than it was built for: keep every layer defined
            pixels = resize(pixels, (max(smallest, pixels.shape[-2]), max(smallest, pixels.shape[-1])), "area")
        return self.output(self.trunk(pixels).mean((-2, -1)))


def resize(pixels: Tensor, size: tuple[int, int], resample: str = "area") -> Tensor:
    """(B, C, H, W) -> (B, C, h, w).

    area      mean over the covered source pixels where the factor is whole, else antialiased bilinear
    nearest   the source pixel under each centre, for label ids
    """
    height, width = pixels.shape[-2:]
    if (height, width) == tuple(size):
        return pixels
    if resample == "nearest":
        return F.interpolate(pixels, size=size, mode="nearest-exact")
    if height % size[0] == 0 and width % size[1] == 0:
        return F.avg_pool2d(pixels, (height // size[0], width // size[1]))
    out = F.interpolate(pixels.to(torch.float32), size=size, mode="bilinear", align_corners=False, antialias=True)
    return out.to(pixels.dtype)
