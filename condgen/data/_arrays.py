"""Labelled pictures of one size held in one array: the rows of `npz` and `torchvision_sets`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from condgen import rng
from condgen.data import decode
from condgen.data._classes import chosen_classes
from condgen.data.base import RowDataset
from condgen.errors import ConfigError, DataError
from condgen.types import ConditionSpec, LabelSpec, Sample, TargetSpec

Fit = Literal["resize", "pad"]
Split = Literal["train", "val", "test"]


class ArrayRows(RowDataset):
    """Rows of uint8 pictures (N, H, W) or (N, H, W, C) and class numbers (N,).

    size     pixels of a side; 0 = the array's own
    fit      how pictures reach `size`: "resize" (the aspect is ignored), or "pad" in the middle of black
    flip     mirror half of the rows in training
    classes  keep only these, by number, range or name, renumbered in this order; () = all
    """

    def __init__(
        self,
        pictures: np.ndarray,
        labels: np.ndarray,
        names: Sequence[str],
        *,
        prefix: str,
        size: int = 0,
        fit: Fit = "resize",
        flip: bool = False,
        classes: Sequence[int | str] = (),
    ) -> None:
        if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4) or pictures.shape[3:] not in ((), (1,), (3,)):
            raise DataError(
                f"{prefix}: the pictures are {pictures.dtype} {pictures.shape}; uint8 (N, H, W) or (N, H, W, 1 or 3) "
                "is needed"
            )
        if labels.ndim != 1 or len(labels) != len(pictures) or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"{prefix}: the labels are {labels.dtype} {labels.shape} for {len(pictures)} pictures; integers "
                f"({len(pictures)},) are needed"
            )
        if not len(pictures):
            raise DataError(f"{prefix}: there are no rows")
        if labels.min() < 0 or labels.max() >= len(names):
            raise DataError(f"{prefix}: labels span {labels.min()}..{labels.max()}; there are {len(names)} classes")
        kept = chosen_classes(classes, names)
        side = size or pictures.shape[1]
        if (not size and pictures.shape[1] != pictures.shape[2]) or (fit == "pad" and side < max(pictures.shape[1:3])):
            raise ConfigError(
                f"data.size={size} with data.fit={fit} does not fit pictures of {pictures.shape[1]} x "
                f"{pictures.shape[2]}; give a data.size" + (" that is no smaller" if fit == "pad" else "")
            )
        renumbered = np.full(len(names), -1, dtype=np.int64)
        renumbered[list(kept)] = np.arange(len(kept))
        self._rows = np.flatnonzero(renumbered[labels] >= 0)
        if not len(self._rows):
            raise DataError(f"{prefix}: no row has one of data.classes={list(classes)}")
        self._pictures = pictures[..., None] if pictures.ndim == 3 else pictures
        self._labels, self._prefix = renumbered[labels], prefix
        self._side, self._fit, self._flip = side, fit, flip
        self.target = TargetSpec(self._pictures.shape[3], side, side)
        self.provides = ConditionSpec(label=LabelSpec(len(kept), tuple(names[number] for number in kept)))

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        return f"{self._prefix}-{self._rows[index]:06d}"

    @property
    def fingerprint(self) -> str:
        """Hash of the kept rows and their labels, and of about a thousand of their pictures."""
        digest = hashlib.sha256(self._rows.tobytes() + self._labels[self._rows].tobytes())
        digest.update(np.ascontiguousarray(self._pictures[self._rows[:: max(1, len(self) // 1000)]]).tobytes())
        return digest.hexdigest()[:16]

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        row = int(self._rows[index])
        pixels = torch.from_numpy(np.array(self._pictures[row])).permute(2, 0, 1)
        pixels = self._framed(pixels)
        if self._flip and random is not None and bool(torch.rand((), generator=random) < 0.5):
            pixels = pixels.flip(-1)
        return Sample(self.key(index), pixels.contiguous(), label=int(self._labels[row]))

    def _framed(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        if (height, width) == (self._side, self._side):
            return pixels
        if self._fit == "resize":
            return decode.resize(pixels, (self._side, self._side), "stretch")[0]
        frame = torch.zeros(pixels.shape[0], self._side, self._side, dtype=torch.uint8)
        top, left = (self._side - height) // 2, (self._side - width) // 2
        frame[:, top : top + height, left : left + width] = pixels
        return frame


def held_out(rows: int, share: float, split: str) -> np.ndarray:
    """Rows of the training part that belong to "train" or "val": a fixed permutation's first `share` are "val"."""
    if not 0 <= share < 1:
        raise ConfigError(f"data.val_share={share} must lie in [0, 1)")
    order = rng.permutation(rows, "validation rows").numpy()
    count = round(rows * share)
    if split == "val" and not count:
        raise ConfigError("this data set has no val split of its own; set data.val_share=0.1 to take one from train")
    return np.sort(order[:count] if split == "val" else order[count:])
