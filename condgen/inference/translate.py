"""Pictures of any size through a system that translates pictures: padded to what its network takes, or in tiles."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.errors import ConfigError
from condgen.inference.sample import checked, sampling
from condgen.rng import RowRandom, derive
from condgen.systems.base import System
from condgen.types import Condition, Image

FITS = ("auto", "pad", "tile", "stretch")
LARGEST_WHOLE = 2048 * 2048  # pixels that "auto" still gives to the network at once, in one picture or in several

Asked = Callable[[Tensor], Condition]
"""Source pictures (B, C, H, W) in [-1, 1] -> the whole condition."""


def only_image(pixels: Tensor) -> Condition:
    return Condition(image=Image(pixels))


def draws_any_size(system: System) -> bool:
    """Whether the system's sampler takes `height` and `width`."""
    return {"height", "width"} <= set(inspect.signature(system.sample).parameters)


def choose_fit(system: System, fit: str, height: int, width: int) -> str:
    """ "auto" -> "pad", or "tile" for large pictures and systems that draw one size only. Raises ConfigError."""
    if fit not in FITS:
        raise ConfigError(f"fit is {fit!r}; choose one of {', '.join(FITS)}")
    anything = draws_any_size(system)
    if fit == "pad" and not anything:
        raise ConfigError("this system draws one size only; use fit=tile or fit=stretch")
    if fit == "auto":
        return "pad" if anything and height * width <= LARGEST_WHOLE else "tile"
    return fit


def translate(
    system: System,
    pictures: Sequence[Tensor],
    ids: Sequence[int],
    *,
    fit: str = "auto",
    seed: int = 0,
    batch_size: int = 8,
    precision: str = "fp32",
    asked: Asked = only_image,
) -> list[Tensor]:
    """Pictures (C, H, W) in [-1, 1], each of its own size -> pictures of the same sizes, float32 on the CPU.

    pad      the border is continued to the right and below until the network takes the size, and cut off again
    tile     windows of the trained size that overlap by half, blended with weights that fall to their edges
    stretch  resized to the trained size, and back

    Maps of classes (ImageSpec.classes) are one-hot, as `decode_classes` reads them, and are resized by nearest pixel.
    At most batch_size pictures, and `LARGEST_WHOLE` pixels, are worked on at once.
    The result of one picture is a function of (picture, seed, its id), not of the others.
    """
    spec = system.target_spec
    image = system.condition_spec.image
    classes = image is not None and image.classes > 0
    out: list[Tensor] = [torch.empty(0)] * len(pictures)
    whole: dict[tuple[int, int], list[int]] = {}
    ready: dict[int, Tensor] = {}
    for at, picture in enumerate(pictures):
        height, width = picture.shape[-2:]
        how = choose_fit(system, fit, height, width)
        if how == "tile":
            out[at] = _tiled(system, picture, ids[at], seed, batch_size, precision, asked)
            continue
        if how == "pad":
            multiple = int(getattr(system, "multiple", 1))
            ready[at] = _padded(picture, -(-height // multiple) * multiple, -(-width // multiple) * multiple)
        else:
            ready[at] = _resized(picture, spec.height, spec.width, nearest=classes)
        whole.setdefault((ready[at].shape[-2], ready[at].shape[-1]), []).append(at)
    for (height, width), places in whole.items():
        rows = max(1, min(batch_size, LARGEST_WHOLE // (height * width)))
        for start in range(0, len(places), rows):
            part = places[start : start + rows]
            made = _sample(
                system, torch.stack([ready[at] for at in part]), [ids[at] for at in part], seed, precision, asked
            )
            for at, pixels in zip(part, made, strict=True):
                height, width = pictures[at].shape[-2:]
                fits = choose_fit(system, fit, height, width) == "pad"
                out[at] = pixels[:, :height, :width] if fits else _resized(pixels, height, width)
    return out


def _sample(system: System, pixels: Tensor, ids: Sequence[int], seed: int, precision: str, asked: Asked) -> Tensor:
    spec, size = system.target_spec, (pixels.shape[-2], pixels.shape[-1])
    options = {"height": size[0], "width": size[1]} if size != (spec.height, spec.width) else {}
    with sampling(system, precision) as device:
        made = system.sample(asked(pixels).to(device), random=RowRandom(seed, ids, device=device), **options)
    return checked(made, (len(pixels), spec.channels, *size))


def _tiled(
    system: System, picture: Tensor, name: int, seed: int, batch_size: int, precision: str, asked: Asked
) -> Tensor:
    spec = system.target_spec
    height, width = picture.shape[-2:]
    padded = _padded(picture, max(height, spec.height), max(width, spec.width))
    places = [
        (top, left) for top in starts(padded.shape[-2], spec.height) for left in starts(padded.shape[-1], spec.width)
    ]
    weight = window(spec.height, spec.width)
    total = torch.zeros(spec.channels, *padded.shape[-2:])
    mass = torch.zeros(1, *padded.shape[-2:])
    for start in range(0, len(places), batch_size):
        part = places[start : start + batch_size]
        tiles = torch.stack([padded[:, t : t + spec.height, x : x + spec.width] for t, x in part])
        ids = [derive(name, "tile", t, x) for t, x in part]
        for (t, x), made in zip(part, _sample(system, tiles, ids, seed, precision, asked), strict=True):
            total[:, t : t + spec.height, x : x + spec.width] += made * weight
            mass[:, t : t + spec.height, x : x + spec.width] += weight
    return (total / mass)[:, :height, :width]


def starts(length: int, side: int) -> list[int]:
    """Where windows of `side` begin so that they cover `length` and overlap by at least half."""
    count = max(1, -(-2 * (length - side) // side) + 1)
    return [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]


def window(height: int, width: int) -> Tensor:
    """Weights (height, width) of a tile: triangles that fall towards its edges and stay above 0."""
    sides = [1 - ((torch.arange(n) + 0.5) / n * 2 - 1).abs() for n in (height, width)]
    return torch.outer(*sides)


def _padded(picture: Tensor, height: int, width: int) -> Tensor:
    """Continued to the right and below: mirrored where the picture is large enough, else its last row and column."""
    below, right = height - picture.shape[-2], width - picture.shape[-1]
    if not below and not right:
        return picture
    mirrored = below < picture.shape[-2] and right < picture.shape[-1]
    return F.pad(picture[None], (0, right, 0, below), mode="reflect" if mirrored else "replicate")[0]


def _resized(picture: Tensor, height: int, width: int, nearest: bool = False) -> Tensor:
    if picture.shape[-2:] == (height, width):
        return picture
    if nearest:
        return F.interpolate(picture[None], (height, width), mode="nearest-exact")[0]
    return F.interpolate(picture[None], (height, width), mode="bilinear", antialias=True)[0].clamp(-1, 1)
