"""The tensors of each condition kind, and what null, flip and crop mean for them. See `condgen.types`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from condgen.errors import ShapeError
from condgen.pixels import crop_pixels, expect, expect_pixels, expect_start

MIN_VISIBLE_AREA = 0.25  # of a box: with less of it left inside a crop, the box is no longer valid


@dataclass(frozen=True)
class Record:
    """Tensors that share their first dimension. Subclasses say what null, flip and crop mean for them."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                yield f.name, value

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {name: fn(value) for name, value in self.tensors()}
        return replace(self, **changed)

    def index(self, rows: Tensor) -> Self:
        return self.map(lambda t: t[rows.to(t.device)])

    def __len__(self) -> int:
        for _, value in self.tensors():
            return value.shape[0]
        return 0

    def null_like(self) -> Self:
        """The same shapes holding "nothing given"."""
        return self.map(torch.zeros_like)

    def where(self, keep: Tensor, other: Self) -> Self:
        """Rows of self where keep (B,) is True, rows of `other` elsewhere."""
        theirs = dict(other.tensors())

        def pick(name: str, mine: Tensor) -> Tensor:
            mask = keep.to(mine.device).view(-1, *[1] * (mine.dim() - 1))
            return torch.where(mask, mine, theirs[name])

        picked: dict[str, Any] = {name: pick(name, t) for name, t in self.tensors()}
        return replace(self, **picked)

    def hflip(self, flip_pairs: Sequence[tuple[int, int]] = ()) -> Self:
        return self

    def crop(self, windows: Tensor, size: tuple[int, int] | None) -> Self:
        return self

    def check(self) -> None:
        """Ranks and dtypes, cheap enough for every construction. Raises ShapeError."""

    def check_values(self) -> None:
        """Value ranges; reads the tensors, so for loaders and tests only. Raises ShapeError."""


@dataclass(frozen=True)
class Text(Record):
    """A sentence: pooled (B, D) and/or tokens (B, L, D) with mask (B, L), True = real token."""

    pooled: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    strings: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.strings) if self.strings is not None else super().__len__()

    def index(self, rows: Tensor) -> Self:
        out = super().index(rows)
        if self.strings is None:
            return out
        at = torch.arange(len(self.strings))[rows.cpu()].tolist()
        return replace(out, strings=tuple(self.strings[i] for i in at))

    def null_like(self) -> Self:
        out = super().null_like()
        return out if self.strings is None else replace(out, strings=("",) * len(self.strings))

    def where(self, keep: Tensor, other: Self) -> Self:
        out = super().where(keep, other)
        if self.strings is None or other.strings is None:
            return out
        pairs = zip(keep.tolist(), self.strings, other.strings, strict=True)
        return replace(out, strings=tuple(mine if k else theirs for k, mine, theirs in pairs))

    def check(self) -> None:
        expect("text.pooled", self.pooled, rank=2, floating=True)
        expect("text.tokens", self.tokens, rank=3, floating=True)
        expect("text.mask", self.mask, rank=2, dtype=torch.bool)
        if (self.tokens is None) != (self.mask is None):
            raise ShapeError("text.tokens and text.mask come together; give both or neither")
        if self.tokens is not None:
            expect_start("text.mask", self.mask, self.tokens.shape[:2])
        rows = len(self)
        expect_start("text.pooled", self.pooled, (rows,))
        expect_start("text.tokens", self.tokens, (rows,))


@dataclass(frozen=True)
class Boxes(Record):
    """Regions: xyxy (B, N, 4) in [0, 1], valid (B, N), label (B, N) int64 class of each box or None."""

    xyxy: Tensor
    valid: Tensor
    label: Tensor | None = None

    def hflip(self, flip_pairs: Sequence[tuple[int, int]] = ()) -> Self:
        x0, y0, x1, y1 = self.xyxy.unbind(-1)
        flipped = torch.stack([1 - x1, y0, 1 - x0, y1], dim=-1)
        return replace(self, xyxy=torch.where(self.valid[..., None], flipped, self.xyxy))

    def crop(self, windows: Tensor, size: tuple[int, int] | None) -> Self:
        low, span = windows[:, None, :2], windows[:, None, 2:] - windows[:, None, :2]
        moved = (self.xyxy.view(*self.xyxy.shape[:-1], 2, 2) - low[:, :, None]) / span[:, :, None]
        clipped = moved.clamp(0, 1)
        area = (moved[..., 1, :] - moved[..., 0, :]).prod(-1)
        left = (clipped[..., 1, :] - clipped[..., 0, :]).prod(-1)
        valid = self.valid & (left >= MIN_VISIBLE_AREA * area) & (left > 0)
        xyxy = torch.where(valid[..., None], clipped.flatten(-2), torch.zeros_like(self.xyxy))
        return replace(self, xyxy=xyxy, valid=valid)

    def check(self) -> None:
        expect("boxes.xyxy", self.xyxy, rank=3, floating=True)
        expect("boxes.valid", self.valid, rank=2, dtype=torch.bool)
        expect("boxes.label", self.label, rank=2, dtype=torch.int64)
        if self.xyxy.shape[-1] != 4:
            raise ShapeError(f"boxes.xyxy has shape {tuple(self.xyxy.shape)}; the last size must be 4 (x0, y0, x1, y1)")
        expect_start("boxes.valid", self.valid, self.xyxy.shape[:2])
        expect_start("boxes.label", self.label, self.xyxy.shape[:2])

    def check_values(self) -> None:
        xyxy = self.xyxy[self.valid]
        if not bool(torch.isfinite(self.xyxy).all()):
            raise ShapeError("boxes.xyxy holds NaN or inf; drop the box or mark it valid=False")
        if bool(((xyxy < 0) | (xyxy > 1)).any()):
            raise ShapeError("boxes.xyxy must be corners in [0, 1]; divide pixel values by the width and height")
        if bool((xyxy[:, 2:] <= xyxy[:, :2]).any()):
            raise ShapeError("boxes.xyxy needs x1 > x0 and y1 > y0; boxes given as (x, y, w, h) must be converted")


@dataclass(frozen=True)
class Keypoints(Record):
    """Named points: xy (B, K, 2) in [0, 1], visible (B, K). Invisible points are stored as 0, 0."""

    xy: Tensor
    visible: Tensor

    def hflip(self, flip_pairs: Sequence[tuple[int, int]] = ()) -> Self:
        """Mirror, and swap each (left, right) pair of indices: a left eye must stay a left eye."""
        order = list(range(self.xy.shape[1]))
        for left, right in flip_pairs:
            order[left], order[right] = order[right], order[left]
        xy, visible = self.xy[:, order], self.visible[:, order]
        flipped = torch.stack([1 - xy[..., 0], xy[..., 1]], dim=-1)
        return replace(self, xy=torch.where(visible[..., None], flipped, xy), visible=visible)

    def crop(self, windows: Tensor, size: tuple[int, int] | None) -> Self:
        xy = (self.xy - windows[:, None, :2]) / (windows[:, None, 2:] - windows[:, None, :2])
        visible = self.visible & ((xy >= 0) & (xy <= 1)).all(-1)
        return replace(self, xy=torch.where(visible[..., None], xy, torch.zeros_like(xy)), visible=visible)

    def check(self) -> None:
        expect("keypoints.xy", self.xy, rank=3, floating=True)
        expect("keypoints.visible", self.visible, rank=2, dtype=torch.bool)
        expect_start("keypoints.visible", self.visible, self.xy.shape[:2])
        if self.xy.shape[-1] != 2:
            raise ShapeError(f"keypoints.xy has shape {tuple(self.xy.shape)}; the last size must be 2 (x, y)")

    def check_values(self) -> None:
        xy = self.xy[self.visible]
        if not bool(torch.isfinite(self.xy).all()) or bool(((xy < 0) | (xy > 1)).any()):
            raise ShapeError("visible keypoints must lie in [0, 1]; divide pixels by the size or mark them invisible")


@dataclass(frozen=True)
class Image(Record):
    """A source picture or map: pixels (B, C, H, W) in [-1, 1]; mask (B, 1, H, W), 1 = given, or None."""

    pixels: Tensor
    mask: Tensor | None = None

    def hflip(self, flip_pairs: Sequence[tuple[int, int]] = ()) -> Self:
        return self.map(lambda t: t.flip(-1))

    def crop(self, windows: Tensor, size: tuple[int, int] | None) -> Self:
        return self.map(lambda t: crop_pixels(t, windows, size))

    def check(self) -> None:
        expect("image.pixels", self.pixels, rank=4)
        expect("image.mask", self.mask, rank=4)
        expect_start("image.mask", self.mask, (self.pixels.shape[0], 1, *self.pixels.shape[2:]))

    def check_values(self) -> None:
        expect_pixels("image.pixels", self.pixels)


@dataclass(frozen=True)
class Frames(Record):
    """History: pixels (B, T, C, H, W) in [-1, 1], mask (B, T) True = given, actions (B, T, A) or None."""

    pixels: Tensor
    mask: Tensor
    actions: Tensor | None = None

    def hflip(self, flip_pairs: Sequence[tuple[int, int]] = ()) -> Self:
        return replace(self, pixels=self.pixels.flip(-1))

    def crop(self, windows: Tensor, size: tuple[int, int] | None) -> Self:
        flat = self.pixels.flatten(0, 1)
        each = windows.repeat_interleave(self.pixels.shape[1], dim=0)
        cropped = crop_pixels(flat, each, size)
        return replace(self, pixels=cropped.view(*self.pixels.shape[:2], *cropped.shape[1:]))

    def check(self) -> None:
        expect("frames.pixels", self.pixels, rank=5)
        expect("frames.mask", self.mask, rank=2, dtype=torch.bool)
        expect("frames.actions", self.actions, rank=3, floating=True)
        expect_start("frames.mask", self.mask, self.pixels.shape[:2])
        expect_start("frames.actions", self.actions, self.pixels.shape[:2])

    def check_values(self) -> None:
        expect_pixels("frames.pixels", self.pixels)
