"""Placing an icon in a picture and measuring what it covers: the geometry of data/openmoji.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

POINTS = ("top", "bottom", "left", "right", "centre")
MAX_SPEED = 0.08  # of the picture, per frame
INK = 32  # alpha from which a pixel counts as ink: thin lines of small icons never reach full cover


@dataclass(frozen=True)
class Place:
    """Where the icon's frame lies in the picture: `edge` pixels wide, its corner at (left, top)."""

    edge: int
    left: int
    top: int
    flip: bool = False


def measure(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Ink of uint8 (H, W) -> box (1, 4) xyxy at the ink's pixel edges, points (5, 2) in the order of POINTS.

    All in [0, 1]. The box is exact: it holds every ink pixel and no empty row or column.
    """
    grid = alpha.numpy()
    height, width = grid.shape
    x0, y0, x1, y1 = ink_bounds(grid, INK)
    ink = grid[y0:y1, x0:x1] >= INK if grid[y0:y1, x0:x1].max() >= INK else grid[y0:y1, x0:x1] > 0
    across, down = np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5
    mass = max(int(ink.sum()), 1)
    points = np.array(
        [
            (across[ink[0]].mean(), down[0]),
            (across[ink[-1]].mean(), down[-1]),
            (across[0], down[ink[:, 0]].mean()),
            (across[-1], down[ink[:, -1]].mean()),
            (across @ ink.sum(0) / mass, down @ ink.sum(1) / mass),
        ],
        np.float32,
    )
    scale = np.array((width, height), np.float32)
    box = np.array([[x0, y0, x1, y1]], np.float32) / np.concatenate([scale, scale])
    return torch.from_numpy(box), torch.from_numpy(points / scale)


def ink_bounds(grid: np.ndarray, threshold: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 in pixels of what reaches the threshold; of anything visible where nothing does."""
    for level in (threshold, 1):
        ink = grid >= level
        columns, rows = np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
        if len(columns):
            return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return 0, 0, grid.shape[1], grid.shape[0]


def room(
    ink: tuple[int, int, int, int], size: int, edge: int, flip: bool = False
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Ranges of (left, top) that keep the ink (x0, y0, x1, y1 of `size`) inside the picture at this edge."""
    x0, y0, x1, y1 = ink
    if flip:
        x0, x1 = size - x1, size - x0
    ratio = edge / size
    return (-int(x0 * ratio), size - math.ceil(x1 * ratio)), (-int(y0 * ratio), size - math.ceil(y1 * ratio))


def resize(icon: Tensor, place: Place) -> Tensor:
    """The five layers at the width of the place, mirrored where it says so."""
    if place.flip:
        icon = icon.flip(-1)
    if icon.shape[-1] == place.edge:
        return icon
    # bilinear weights are not negative, so a premultiplied colour stays at or below its alpha, rounded too
    return F.interpolate(icon[None], size=(place.edge, place.edge), mode="bilinear", antialias=True)[0]


def paste(art: Tensor, place: Place, size: int) -> Tensor:
    """uint8 (5, size, size): the art at its place, cut at the frame; transparent with white lines elsewhere."""
    if place.edge == size and place.left == place.top == 0:
        return art
    out = torch.zeros(5, size, size, dtype=torch.uint8)
    out[4] = 255
    x0, y0 = max(place.left, 0), max(place.top, 0)
    x1, y1 = min(place.left + place.edge, size), min(place.top + place.edge, size)
    if x1 > x0 and y1 > y0:
        out[:, y0:y1, x0:x1] = art[:, y0 - place.top : y1 - place.top, x0 - place.left : x1 - place.left]
    return out


def pick(low: int, high: int, share: float) -> int:
    """The whole number at a share [0, 1) of low..high; low where the range is empty."""
    return low + min(int(share * (high - low + 1)), high - low) if high > low else low


def bounce(start: float, speed: float, low: int, high: int, t: int, size: int) -> int:
    """Position at frame t of something that starts at a share of [low, high] and is reflected at both ends."""
    reach = max(high - low, 0)
    if reach == 0:
        return low
    run = start * reach + (2 * speed - 1) * MAX_SPEED * size * t
    return low + round(reach - abs(run % (2 * reach) - reach))
