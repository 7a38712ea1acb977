"""The feature network of the user's own data: trained on real training pictures, kept, never comparable with papers.

Data with labels get the classifier of `condgen.metrics.classifier`; others get one that tells by how many quarter
turns a picture was rotated (Gidaris et al. 2018, arXiv:1803.07728), which needs no label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condgen.data.base import RowDataset
from condgen.metrics import fit, kept
from condgen.metrics.classifier import (
    Classifier,
    ClassifierOptions,
    cached_classifier,
    load_classifier,
    train_classifier,
)
from condgen.pixels import pixels_to_float

RECIPE = 1  # part of the key of the network of turns
TURNS = 4
STEM = "turns"


def own_classifier(
    data: RowDataset,
    folder: Path,
    *,
    about: Mapping[str, str],
    device: torch.device | str = "cpu",
    options: ClassifierOptions | None = None,
    say: Callable[[str], None] = print,
) -> Classifier:
    """The classifier of classes, or of quarter turns where `data`, the training split, has no labels."""
    make = cached_classifier if data.provides.label is not None else turns_classifier
    return make(data, folder, about=about, device=device, options=options or ClassifierOptions(), say=say)


def turns_classifier(
    data: RowDataset,
    folder: Path,
    *,
    about: Mapping[str, str],
    seed: int = 0,
    device: torch.device | str = "cpu",
    options: ClassifierOptions | None = None,
    say: Callable[[str], None] = print,
) -> Classifier:
    """Tells 0, 90, 180 and 270 degrees apart. Cached under `folder` like every judge."""
    chosen = options or ClassifierOptions()
    key: dict[str, Any] = {
        **about, "data_fingerprint": data.fingerprint, "rows": len(data), "channels": data.target.channels,
        "seed": seed, "recipe": RECIPE, "options": asdict(chosen),
    }  # fmt: skip

    def train() -> Classifier:
        images, _ = fit.readable(data, chosen.size, lambda row: True, judge=STEM, needs="pixels", seed=seed)
        made = train_classifier(*turned(images), TURNS, seed=seed, device=device, options=chosen)
        made.about = key
        return made

    def save(made: Classifier, place: Path) -> None:
        sizes = {"options": asdict(chosen), "channels": made.channels, "classes": made.classes}
        kept.write(place, "classifier", made, {**sizes, "about": key})

    return fit.cached(
        folder, STEM, key, load=lambda place: load_classifier(place).to(device), train=train, save=save, say=say,
        what=f"{len(data)} real pictures, each turned four ways ({chosen.steps} steps)",
    )  # fmt: skip


def turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Squares (N, C, S, S) -> all four turns of each (4 N, C, S, S), and by how many quarters (4 N,)."""
    turns = torch.cat([images.rot90(quarters, (2, 3)) for quarters in range(TURNS)])
    return turns, torch.arange(TURNS).repeat_interleave(len(images))


def features_of(judge: Classifier, pixels: Tensor) -> Tensor:
    """What the last linear layer of a classifier sees: uint8 (B, 3, H, W) -> (B, d).

    Pictures of one channel were repeated to three on their way here.
    """
    return judge.tower.features(pixels_to_float(pixels)[:, : judge.channels])
