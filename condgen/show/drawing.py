"""Pictures of samples: what was asked on the left, what came out on the right.

Tiles are enlarged by whole numbers without smoothing, so every pixel shown is a pixel that was generated.
Nothing is written into the files beside pixels: no caption, path or date.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from condgen.errors import ShapeError
from condgen.show.asked import INK, QUIET, AskedCell, asked_cells, fit, printable, text_width, wrap
from condgen.show.pictures import MIN_TILE, PAPER, enlarge, save_png, to_pil, to_rgb
from condgen.types import Condition

__all__ = ["MIN_TILE", "draw_clip_strip", "draw_grid", "save_png", "to_pil"]

GAP, MARGIN = 6, 16  # px at a 96 px tile
EDGE = "#dfe3e8"


@dataclass(frozen=True)
class _Layout:
    """Sizes in px, derived from the tile (width, height)."""

    tile: tuple[int, int]
    text: int  # width of the caption column, 0 = none
    unit: float  # 1 at a 96 px tile

    def px(self, at_96: float) -> int:
        return round(at_96 * self.unit)

    @property
    def font(self) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        return ImageFont.load_default(max(11, self.px(12)))


def draw_grid(
    images: Tensor,
    conditions: Condition | None = None,
    *,
    real: Tensor | None = None,
    label_names: Sequence[str] = (),
    title: str = "",
    columns: int | None = None,
    column_names: Sequence[str] = (),
    attribution: str = "",
    tile: int = MIN_TILE,
    overlay: bool = False,
) -> Image.Image:
    """Rows are conditions, columns are samples of them.

    images       (rows, columns, C, H, W), or (N, C, H, W): columns of one condition each when there are
                 conditions, otherwise a near-square field
    conditions   `rows` rows; drawn on the left: caption, label name, layout of boxes and keypoints, source
                 image, past frames
    real         (rows, C, H, W) of the data set, in a column of its own
    attribution  licence line of the data, drawn below; pictures made from OpenMoji must carry it
    tile         least width or height of a tile in px; tiles are enlarged by whole numbers
    overlay      draw boxes and keypoints over the samples too
    """
    images = _as_grid(images.detach().cpu(), conditions, columns)
    rows = images.shape[0]
    if conditions is not None and len(conditions) != rows:
        raise ShapeError(f"{len(conditions)} conditions for {rows} rows of samples; give one condition per row")
    pictures = [[enlarge(to_rgb(p), tile) for p in row] for row in images]
    size = pictures[0][0].size
    unit = max(size) / 96
    font = ImageFont.load_default(max(11, round(12 * unit)))
    cells = asked_cells(conditions, size, label_names) if conditions is not None else []
    reals = [enlarge(to_rgb(p), tile) for p in real.detach().cpu()] if real is not None else []
    if real is not None and len(reals) != rows:
        raise ShapeError(f"{len(reals)} real pictures for {rows} rows of samples; give one per row")
    width_of_text = text_width(cells, size, font)
    layout = _Layout(size, width_of_text, unit)
    names = list(column_names) or ["samples"]
    return _compose(layout, cells, reals, pictures, names, title, attribution, overlay)


def draw_clip_strip(
    clips: Tensor,
    conditions: Condition | None = None,
    *,
    label_names: Sequence[str] = (),
    title: str = "",
    attribution: str = "",
    tile: int = MIN_TILE,
    most: int = 16,
) -> Image.Image:
    """Clips (rows, T, C, H, W), one per row, time from left to right; `most` evenly spaced frames are shown."""
    if clips.dim() != 5:
        raise ShapeError(f"clips have shape (rows, T, C, H, W); got {tuple(clips.shape)}")
    shown = torch.linspace(0, clips.shape[1] - 1, min(most, clips.shape[1])).round().long()
    return draw_grid(
        clips[:, shown.to(clips.device)],
        conditions,
        label_names=label_names,
        title=title,
        attribution=attribution,
        tile=tile,
        column_names=[f"t={int(t)}" for t in shown],
    )


def _as_grid(images: Tensor, conditions: Condition | None, columns: int | None) -> Tensor:
    """(rows, columns, C, H, W); a field without conditions is padded with white tiles."""
    if images.dim() == 5 and images.numel():
        return images
    if images.dim() != 4 or not images.numel():
        raise ShapeError(f"images have shape (rows, columns, C, H, W) or (N, C, H, W); got {tuple(images.shape)}")
    count = len(images)
    if conditions is not None and len(conditions):
        if count % len(conditions):
            raise ShapeError(f"{count} samples cannot be shared out over {len(conditions)} conditions")
        return images.unflatten(0, (len(conditions), count // len(conditions)))
    wide = min(columns or math.ceil(math.sqrt(count)), count)
    missing = -count % wide
    white = 255 if images.dtype == torch.uint8 else 1
    blank = torch.full((missing, *images.shape[1:]), white, dtype=images.dtype)
    return torch.cat([images, blank]).unflatten(0, (-1, wide))


def _compose(
    layout: _Layout,
    cells: Sequence[AskedCell],
    reals: Sequence[Image.Image],
    pictures: Sequence[Sequence[Image.Image]],
    names: Sequence[str],
    title: str,
    attribution: str,
    overlay: bool,
) -> Image.Image:
    """Places header, rows and footer."""
    (tile_w, tile_h), px, font = layout.tile, layout.px, layout.font
    margin, gap, step = px(MARGIN), px(GAP), px(GAP * 2.5)
    small = ImageFont.load_default(max(10, px(10)))
    asked_names = [name for name, _ in cells[0].pictures] if cells else []
    # x of every column, each with its header
    heads: list[tuple[int, str]] = []
    x = margin
    if layout.text:
        heads.append((x, "asked"))
        x += layout.text + step
    asked_x = []
    for name in asked_names:
        heads.append((x, name))
        asked_x.append(x)
        x += tile_w + gap
    x += step - gap if asked_names else 0
    real_x = x
    if reals:
        heads.append((x, "real"))
        x += tile_w + step
    first = x
    heads += [(first + i * (tile_w + gap), name) for i, name in enumerate(names)]
    width = first + len(pictures[0]) * (tile_w + gap) - gap + margin
    title_h = px(26) if title else 0
    # a plain field of samples needs no header
    header_h = px(18) if len(heads) > 1 else 0
    foot = wrap(printable(attribution), small, width - 2 * margin)[:4]
    line_h = px(14)
    top = margin + title_h + header_h
    height = top + len(pictures) * (tile_h + gap) - gap + margin + (len(foot) * line_h + px(2) if foot else 0)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        line = fit(printable(title), ImageFont.load_default(max(13, px(15))), width - 2 * margin)
        draw.text((margin, margin - px(4)), line, fill=INK, font=ImageFont.load_default(max(13, px(15))))
    for at, name in heads if header_h else ():
        draw.text((at, margin + title_h - px(2)), name, fill=QUIET, font=small)
    for i, row in enumerate(pictures):
        y = top + i * (tile_h + gap)
        if cells:
            cells[i].draw_text(draw, (margin, y), layout.text, tile_h, font)
            for at, (_, picture) in zip(asked_x, cells[i].pictures, strict=True):
                _place(page, draw, picture, (at, y))
        if reals:
            _place(page, draw, reals[i], (real_x, y))
        for j, picture in enumerate(row):
            shown = cells[i].layout_over(picture) if overlay and cells else picture
            _place(page, draw, shown, (first + j * (tile_w + gap), y))
    for i, line in enumerate(foot):
        draw.text((margin, height - margin - (len(foot) - i) * line_h + px(6)), line, fill=QUIET, font=small)
    return page


def _place(page: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image, at: tuple[int, int]) -> None:
    """Pastes a tile with a hairline around it, outside its pixels, so that white pictures have an edge."""
    page.paste(picture, at)
    x, y = at
    draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=EDGE)
