"""Past frames and actions -> frame features over time, stacked map, pooled vector, or one token per frame."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condgen.conditions._features import expect_map_size, expect_size, masked_mean, null_sequence, null_vector
from condgen.conditions.base import ConditionKind, Feature
from condgen.conditions.image import ConvEncoder, resize
from condgen.errors import ShapeError
from condgen.nn.fourier import fourier_features, fourier_width
from condgen.pixels import pixels_to_float
from condgen.types import Condition, FramesSpec

DEFAULT_WIDTH = 128
TIME_BANDS = 4


class FrameHistory(ConditionKind):
    """frames -> temporal (B, T, C + A, H, W) at the frames' own resolution, actions replicated over space, with mask
    (B, T); map (B, T*(C + A + 1), h, w): frames, actions and one mask plane per frame stacked on channels;
    vector (B, width): a convolutional encoder of each frame, averaged over the given frames, 128 wide by default;
    sequence (B, T, width): one token per frame, 128 wide by default.

    `width` asks for a 1x1 convolution where the form is temporal or a map. The vector and the tokens know the time
    of a frame by Fourier features of its place in the history. A frame that is not given contributes nothing.
    """

    field: ClassVar[str] = "frames"
    forms: ClassVar[tuple[str, ...]] = ("temporal", "map", "sequence", "vector")

    def __init__(self, spec: FramesSpec, form: str, *, width: int | None = None, nullable: bool = False) -> None:
        super().__init__(spec, form, width=width, nullable=nullable)
        natural = spec.channels + spec.actions
        if form == "map":
            natural = spec.frames * (natural + 1)
        if form in ("temporal", "map"):
            self.width = width or natural
            self.project = nn.Conv2d(natural, width, 1, bias=False) if width else None
        else:
            self.width = width or DEFAULT_WIDTH
            self.encode = ConvEncoder(spec.channels, min(spec.height, spec.width), self.width)
            self.extra = nn.Linear(fourier_width(1, TIME_BANDS) + spec.actions, self.width, bias=False)
            self.mix = nn.Linear(self.width, self.width)
        self.null = nn.Parameter(torch.zeros(self.width)) if nullable and form != "map" else None

    def forward(self, condition: Condition, size: tuple[int, int] | None = None) -> Feature:
        pixels, actions, mask = self._read(condition)
        if self.form == "temporal":
            return self._temporal(pixels, actions, mask)
        if self.form == "map":
            return Feature(self._map(pixels, actions, mask, expect_map_size(size)))
        codes = self.encode(pixels.flatten(0, 1)).unflatten(0, mask.shape)
        codes = codes + self.extra(torch.cat([self._times(mask), actions], dim=-1))
        # pixels, time and action must meet in a nonlinearity, or the mean over frames would forget their order
        codes = self.mix(F.leaky_relu(codes, 0.2))
        if self.form == "sequence":
            return Feature(*null_sequence(codes, mask, self.null))
        return Feature(null_vector(masked_mean(codes, mask), mask.any(1), self.null))

    def _temporal(self, pixels: Tensor, actions: Tensor, mask: Tensor) -> Feature:
        value = torch.cat([pixels, _planes(actions, pixels.shape[-2:])], dim=2)
        if self.project is not None:
            value = self.project(value.flatten(0, 1)).unflatten(0, mask.shape)
        if self.null is not None:
            null = self.null.to(value.dtype)[None, None, :, None, None]
            value = torch.where(mask.any(1)[:, None, None, None, None], value, null)
        return Feature(value, mask)

    def _map(self, pixels: Tensor, actions: Tensor, mask: Tensor, size: tuple[int, int]) -> Tensor:
        expect_size("the number of frames", mask.shape[1], self.spec.frames)
        small = resize(pixels.flatten(0, 1), size).unflatten(0, mask.shape)
        extra = _planes(torch.cat([actions, mask[..., None].to(actions.dtype)], dim=-1), size)
        stacked = torch.cat([small, extra.to(small.dtype)], dim=2).flatten(1, 2)  # (B, T * (C + A + 1), h, w)
        return self.project(stacked) if self.project is not None else stacked

    def _times(self, mask: Tensor) -> Tensor:
        """(B, T, fourier width): the place of each frame, in histories of the spec's length."""
        place = torch.arange(mask.shape[1], device=mask.device, dtype=torch.float32) / self.spec.frames
        return fourier_features(place[:, None], TIME_BANDS).expand(len(mask), -1, -1)

    def _read(self, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """(pixels (B, T, C, H, W), actions (B, T, A), mask (B, T)), zeros where a frame is not given."""
        frames = condition.frames
        assert frames is not None
        expect_size("the number of frame channels", frames.pixels.shape[2], self.spec.channels)
        width = 0 if frames.actions is None else frames.actions.shape[-1]
        if width != self.spec.actions:
            raise ShapeError(f"frames.actions has width {width}; the system was built for {self.spec.actions}")
        mask = frames.mask & condition.is_present("frames")[:, None]
        pixels = pixels_to_float(frames.pixels)
        pixels = torch.where(mask[:, :, None, None, None], pixels, torch.zeros_like(pixels))
        actions = pixels.new_zeros((*mask.shape, 0)) if frames.actions is None else frames.actions
        return pixels, torch.where(mask[..., None], actions, torch.zeros_like(actions)), mask


def _planes(values: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(B, T, A) -> (B, T, A, h, w), each value replicated over space."""
    return values[..., None, None].expand(*values.shape, *size)
