"""Tensors -> PIL pictures, and PNG files that hold pixels and nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from condgen.errors import ShapeError
from condgen.pixels import pixels_to_uint8

MIN_TILE = 96  # px; smaller pictures are enlarged to at least this
PAPER = "#ffffff"


def to_pil(pixels: Tensor) -> Image.Image:
    """(C, H, W), uint8 or float in [-1, 1], C = 1 (grey), 3 (RGB) or 4 (RGBA) -> PIL. Raises ShapeError."""
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3, 4):
        raise ShapeError(f"a picture needs shape (1, 3 or 4, H, W); got {tuple(pixels.shape)}. Use the tensor instead")
    array = pixels_to_uint8(pixels.detach().cpu()).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def by_class(pixels: Tensor, *, sure: bool = False) -> Tensor:
    """Maps of classes (..., C, H, W), +1 in the channel of a pixel's class and -1 in the others, -> uint8
    (..., 3, H, W): one colour and brightness a class. Anything else is returned as it is.

    sure   they are maps of classes. Otherwise 3 channels are an RGB picture, in red, green and blue if need be."""
    classes = pixels.shape[-3]
    if not sure and (classes in (1, 3) or not _one_hot(pixels)):
        return pixels
    at = torch.arange(classes)
    hue, light = (at * 0.7548777) % 1, (at * 0.5698403 + 0.5) % 1  # the R2 sequence: far apart for any number
    wheel = (6 * ((hue[:, None] + torch.tensor([0.0, 2 / 3, 1 / 3])) % 1) - 3).abs().sub(1).clamp(0, 1)
    colours = ((0.25 + 0.75 * wheel) * (0.3 + 0.7 * light[:, None]) * 255).round().to(torch.uint8)
    return colours[pixels.argmax(-3).cpu()].movedim(-1, -3)


def _one_hot(pixels: Tensor) -> bool:
    low, high = (0, 255) if pixels.dtype == torch.uint8 else (-1, 1)
    ends = ((pixels == low) | (pixels == high)).all()
    return bool(ends) and bool(((pixels == high).sum(-3) == 1).all())


def to_rgb(pixels: Tensor) -> Image.Image:
    """For looking at: classes in colours, alpha on white; of 2 or more than 4 other channels the first in grey."""
    if pixels.dim() == 3:
        pixels = by_class(pixels)
    if pixels.dim() == 3 and pixels.shape[0] not in (1, 3, 4):
        pixels = pixels[:1]
    picture = to_pil(pixels)
    if picture.mode == "RGBA":
        return Image.alpha_composite(Image.new("RGBA", picture.size, PAPER), picture).convert("RGB")
    return picture.convert("RGB")


def enlarge(picture: Image.Image, least: int = MIN_TILE) -> Image.Image:
    """Enlarged by the smallest whole number that makes the longer side at least `least` px."""
    times = max(1, math.ceil(least / max(picture.size)))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def into(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled to fit a tile of `size`: by whole numbers where they fit, smoothly otherwise; centred on paper."""
    ratio = min(size[0] / picture.width, size[1] / picture.height)
    scaled = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    whole = ratio >= 1 and float(ratio).is_integer()
    kind = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    out = Image.new("RGB", size, PAPER)
    out.paste(picture.resize(scaled, kind), ((size[0] - scaled[0]) // 2, (size[1] - scaled[1]) // 2))
    return out


def clean(picture: Image.Image) -> Image.Image:
    """The same pixels without metadata (EXIF, comments, profiles)."""
    out = picture.copy()
    out.info.clear()
    return out


def save_png(picture: Image.Image, path: Path | str) -> Path:
    """A PNG that holds pixels only; the file appears whole or not at all."""
    return save_clip_png([picture], path)


def save_clip_png(frames: Sequence[Image.Image], path: Path | str, fps: float = 8) -> Path:
    """An animated PNG: lossless, plays in browsers; one frame is a plain PNG."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    first, *rest = [clean(frame) for frame in frames]
    if rest:
        first.save(temp, format="PNG", save_all=True, append_images=rest, duration=1000 / fps, loop=0)
    else:
        first.save(temp, format="PNG")
    os.replace(temp, path)
    return path
