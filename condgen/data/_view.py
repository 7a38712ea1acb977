"""One view of a photograph: region, resize, random crop, mirror; boxes and points go the same way as the pixels.

The defaults are those of Reed et al. (ICML 2016, arXiv:1605.05396): resize without regard to the aspect to 76x76,
a random 64x64 crop, a random mirror.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from condgen.data import decode
from condgen.data.decode import RESIZE, WHOLE, Window, cut, move_boxes, move_points
from condgen.errors import ConfigError, DataError
from condgen.pixels import pixels_to_uint8

REED_RATIO = 76 / 64
Region = tuple[int, int, int, int]  # x0, y0, x1, y1 in whole pixels of the picture


@dataclass(frozen=True)
class View:
    """What a row shows: uint8 pixels (C, S, S), the window of the picture in [0, 1] (xyxy), and whether mirrored.

    swap   a mirror also exchanges left and right points
    """

    pixels: Tensor
    window: Window
    flipped: bool
    swap: bool = True

    def boxes(self, xyxy: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (n, 4) of the whole picture -> (those left in the view (m, 4), their indices (m,)).

        Clipped to the view; a box with less than a quarter of its area left inside is gone.
        """
        moved, valid = move_boxes(xyxy, [self.window], self.flipped)
        kept = valid.nonzero()[:, 0]
        return moved[kept], kept

    def points(self, xy: Tensor, visible: Tensor, flip_pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Points (K, 2), (K,) of the whole picture -> the same in the view; those outside become invisible (0, 0)."""
        return move_points(xy, visible, [self.window], self.flipped, flip_pairs if self.swap else ())


class Framing:
    """How pictures become squares of `size`.

    load_size   side before the random crop; 0 = 76/64 of size, as Reed et al.; equal to size = no random crop
    resize      "stretch" ignores the aspect, as Reed et al.; "crop" keeps it and cuts; "pad" keeps it and adds white
    flip        mirror half of the rows
    swap_on_flip   a mirror also exchanges the left and right points of a pair, so that a left eye stays one. False is
                as GAWWN was released (Reed et al. 2016, arXiv:1610.02454): the left eye of a mirrored row is its right
    Raises ConfigError.
    """

    def __init__(
        self, size: int, load_size: int = 0, resize: str = "stretch", flip: bool = True, swap_on_flip: bool = True
    ) -> None:
        load_size = load_size or round(size * REED_RATIO)
        if size < 1 or load_size < size:
            raise ConfigError(
                f"data.size={size}, data.load_size={load_size}: size >= 1 and load_size >= size are needed"
            )
        if resize not in RESIZE:
            raise ConfigError(f"data.resize={resize!r}; allowed: {', '.join(RESIZE)}")
        self.size, self.load_size, self.policy, self.mirror = size, load_size, resize, flip
        self.swap = swap_on_flip

    def view(self, picture: Tensor, random: torch.Generator | None, region: Region | None = None) -> View:
        """picture: (C, H, W) of `decode_image`. random None: the centre crop, not mirrored, at the scale of training.

        `region` is cut out first. Raises DataError when it is not inside the picture.
        """
        picture = pixels_to_uint8(picture)
        window = WHOLE
        if region is not None:
            height, width = picture.shape[-2:]
            x0, y0, x1, y1 = region
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise DataError(f"the region {region} is not inside a picture of {width} x {height}")
            picture, window = picture[:, y0:y1, x0:x1], (x0 / width, y0 / height, x1 / width, y1 / height)
        frame, part = decode.resize(picture, (self.load_size, self.load_size), self.policy)
        window = _within(window, part)
        at, flipped = (0.5, 0.5), False
        if random is not None:
            left = _uniform(frame.shape[-1] - self.size, random)
            at = (left, _uniform(frame.shape[-2] - self.size, random))
            flipped = bool(torch.rand((), generator=random) < 0.5) and self.mirror
        pixels, part = cut(frame, (self.size, self.size), at)
        return View((pixels.flip(-1) if flipped else pixels).contiguous(), _within(window, part), flipped, self.swap)


def corner_boxes(xywh: Tensor, width: float, height: float) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) as x, y, w, h in pixels -> (xyxy (m, 4) in [0, 1] clipped to the picture, kept indices (m,)).

    Boxes wholly outside or without area are left out. NaN, inf and negative sizes raise DataError.
    """
    if not bool(torch.isfinite(xywh).all()) or bool((xywh[:, 2:] < 0).any()):
        raise DataError("a box is not finite or has a negative size; boxes are x, y, width, height in pixels")
    unit = torch.tensor([width, height, width, height])
    xyxy = (torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1) / unit).clamp(0, 1)
    kept = (xyxy[:, 2:] > xyxy[:, :2]).all(1).nonzero()[:, 0]
    return xyxy[kept], kept


def pixel_points(xyv: Tensor, width: float, height: float) -> tuple[Tensor, Tensor]:
    """Points (K, 3) as x, y, v in pixels -> (xy (K, 2) in [0, 1], visible (K,) = v > 0); invisible ones are 0, 0.

    A visible point outside the picture becomes invisible. NaN or inf in a visible point raises DataError.
    """
    if bool(torch.isnan(xyv[:, 2]).any()) or not bool(torch.isfinite(xyv[xyv[:, 2] > 0]).all()):
        raise DataError("a visible keypoint is not finite; points are x, y, v in pixels")
    xy = xyv[:, :2] / torch.tensor([width, height])
    visible = (xyv[:, 2] > 0) & ((xy >= 0) & (xy <= 1)).all(1)
    return torch.where(visible[:, None], xy, torch.zeros(())), visible


def parse_kinds(given: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """ "captions+boxes" -> the names in the order of `allowed`. ConfigError for unknown names."""
    asked = [part.strip() for part in given.split("+")]
    unknown = [part for part in asked if part not in allowed]
    if unknown:
        raise ConfigError(
            f"data.annotations={given!r}: {unknown[0]!r} is not one of {', '.join(allowed)}; join several with +"
        )
    return tuple(kind for kind in allowed if kind in asked)


def _uniform(slack: int, random: torch.Generator) -> float:
    """A place in [0, 1] such that each of the slack + 1 whole offsets is equally likely."""
    return int(torch.randint(slack + 1, (), generator=random)) / max(1, slack)


def _within(outer: Window, inner: Window) -> Window:
    """`inner`, given in the unit square of `outer`, in the coordinates that `outer` is given in."""
    x0, y0, x1, y1 = outer
    w, h = x1 - x0, y1 - y0
    return (x0 + inner[0] * w, y0 + inner[1] * h, x0 + inner[2] * w, y0 + inner[3] * h)
