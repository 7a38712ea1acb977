"""How the small judges are trained: one loop, one augmentation, one way to read rows and one cache, for all of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from condgen import rng
from condgen.data.base import RowDataset, too_many_bad
from condgen.errors import CheckpointError, DataError
from condgen.nn.image_tower import resize
from condgen.pixels import pixels_to_float, pixels_to_uint8
from condgen.types import Sample

SHIFT = 0.125  # of half a side: random translation
TURN = 0.3  # radians
SCALE = 0.2
MAX_ROWS = 20_000  # pictures that are held in memory for training

Judge = TypeVar("Judge", bound=nn.Module)
Kept = TypeVar("Kept")


def fit(
    network: nn.Module,
    count: int,
    loss: Callable[[Tensor], Tensor],
    *,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    steps: int,
    batch_size: int,
    draws: torch.Generator,
    replacement: bool = False,
) -> None:
    """`steps` updates on `loss` of row numbers (B,), which run through permutations of `count` rows, or are drawn with
    replacement."""
    batch = min(batch_size, count)
    order = torch.empty(0, dtype=torch.int64)
    network.train()
    for _ in range(steps):
        if replacement:
            order = torch.randint(count, (batch,), generator=draws)
        elif len(order) < batch:
            order = torch.randperm(count, generator=draws)
        rows, order = order[:batch], order[batch:]
        value = loss(rows)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        schedule.step()


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """The learning rate goes up over the first tenth of the steps, then down a half cosine."""
    return LambdaLR(optimizer, lambda step: rate(step, steps))


def rate(step: int, steps: int) -> float:
    """Share of the learning rate; see `cosine`."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def readable(
    dataset: RowDataset,
    size: int | None,
    take: Callable[[Sample], Kept | None],
    *,
    judge: str,
    needs: str,
    seed: int = 0,
    most: int = MAX_ROWS,
) -> tuple[Tensor, list[Kept]]:
    """uint8 pictures (N, C, size, size) and what `take` keeps of their rows, at most `most` drawn by seed; size None =
    as they are.

    Rows that cannot be read, and those of which it keeps None, are left out. Raises DataError, which names `judge`
    (such as "evaluator") and `needs` (such as "captions"), when too few remain.
    """
    rows = rng.permutation(len(dataset), seed, f"{judge} rows")[:most].tolist()
    images, kept, bad = [], [], 0
    for index in rows:
        try:
            row = dataset.sample(index, None)
        except DataError:
            bad += 1
            continue
        value = take(row)
        if row.target.dim() == 3 and value is not None:
            pixels = pixels_to_float(row.target)[None]
            images.append(pixels_to_uint8(pixels if size is None else resize(pixels, size))[0])
            kept.append(value)
    if too_many_bad(bad, len(rows)) or len(images) < 2:
        raise DataError(
            f"the {judge} needs pictures with {needs}; of {len(rows)} rows {bad} could not be read and "
            f"{len(images)} have both. Choose data with {needs}, or run `condgen check-data`"
        )
    return torch.stack(images), kept


def cached(
    folder: Path,
    stem: str,
    key: Mapping[str, Any],
    *,
    load: Callable[[Path], Judge],
    train: Callable[[], Judge],
    save: Callable[[Judge, Path], None],
    what: str,
    say: Callable[[str], None],
) -> Judge:
    """The judge of this key under `folder`; trained and saved when there is none, or when it is damaged."""
    place = folder / f"{stem}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    if place.exists():
        try:
            return load(place)
        except CheckpointError as error:
            say(f"{error}; training it again")
    say(f"training the {stem} on {what}; it will be kept in {place}")
    made = train()
    save(made, place)
    return made


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture (B, C, H, W) moved, turned and scaled a little, with mild contrast and colour changes; in [-1, 1].

    Never mirrored: arrows and letters have a direction.
    """
    return shade(moved(images, motions(len(images), generator)), generator)


def motions(count: int, generator: torch.Generator, turn: float = TURN) -> Tensor:
    """(count, 2, 3): from a place in the moved picture to its place in the picture, both in [-1, 1], x before y."""
    scale, angle = 1 + SCALE * _spread(generator, count, 1), turn * _spread(generator, count, 1)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    x, y = SHIFT * _spread(generator, count, 1), SHIFT * _spread(generator, count, 1)
    return torch.cat([cosine, -sine, x, sine, cosine, y], dim=1).view(count, 2, 3)


def moved(images: Tensor, motion: Tensor) -> Tensor:
    grid = F.affine_grid(motion, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def moved_points(xy: Tensor, motion: Tensor) -> Tensor:
    """Points (B, K, 2) in [0, 1] of pictures -> of the moved pictures; they may leave [0, 1]."""
    away = (2 * xy - 1) - motion[:, None, :, 2]
    return (torch.linalg.solve(motion[:, :, :2], away.transpose(1, 2)).transpose(1, 2) + 1) / 2


def shade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mild contrast and colour changes of pictures in [-1, 1]."""
    count, channels = images.shape[:2]
    contrast = 1 + 0.1 * _spread(generator, count, channels, 1, 1)
    return (images * contrast + 0.1 * _spread(generator, count, 1, 1, 1)).clamp(-1, 1)


def _spread(generator: torch.Generator, *shape: int) -> Tensor:
    return 2 * torch.rand(*shape, generator=generator) - 1
