"""Clips from pictures or past frames, longer than trained by rolling forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from condgen.errors import ConfigError, ShapeError
from condgen.inference.sample import sample_rows
from condgen.rng import derive
from condgen.systems.base import System
from condgen.types import Condition, Frames, Image


def animate(
    system: System,
    condition: Condition,
    frames: int,
    *,
    overlap: bool,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    batch_size: int = 16,
    precision: str = "fp32",
    **options: Any,
) -> Tensor:
    """(B, frames, C, H, W) float32 in [-1, 1] that go on from `condition.frames` or `condition.image`.

    overlap   the system was trained on clips that start with what they are given (data.overlap=true); every system that
              takes an image is. What is given again is cut off where two parts join
    options   keyword options of the system's `sample`, such as temperature

    Beyond the trained length a system that `rolls` goes on with all that it remembers. With others the newest frames
    become the next condition, with other noise, and so on: nothing older is remembered. Either way errors add up, and
    the first trained length is what `sample_rows` gives. Other fields stay as they are. Raises ConfigError and
    ShapeError.
    """
    if not system.target_spec.frames:
        raise ConfigError("this system makes pictures; animating needs one that makes clips")
    if frames < 1:
        raise ConfigError(f"{frames} frames; give at least 1")
    known = given_frames(condition)
    if system.rolls:
        named = list(ids) if ids is not None else list(range(len(condition)))
        return sample_rows(
            system,
            condition,
            seed=seed,
            ids=named,
            batch_size=batch_size,
            precision=precision,
            length=frames,
            **options,
        )
    keeps = known.shape[1]
    trained, gain = system.target_spec.frames, system.target_spec.frames - (keeps if overlap else 0)
    if frames > trained and (gain < 1 or known.shape[2:] != torch.Size(system.target_spec.shape[1:])):
        raise ConfigError(
            f"{frames} frames need rolling forward, but what this system makes (({trained}, ...) of "
            f"{system.target_spec.shape[1:]}) cannot become its next condition {tuple(known.shape[1:])}; "
            f"ask for at most {trained} frames"
        )
    names = list(ids) if ids is not None else list(range(len(condition)))
    made = torch.empty(len(condition), 0, *system.target_spec.shape[1:])
    part = 0
    while made.shape[1] < frames:
        asked = condition if part == 0 else next_condition(condition, torch.cat([known, made], dim=1)[:, -keeps:])
        new = sample_rows(
            system, asked, seed=seed if part == 0 else derive(seed, "part", part), ids=names, batch_size=batch_size,
            precision=precision, **options,
        )  # fmt: skip
        made = torch.cat([made, new[:, keeps:] if overlap and part else new], dim=1)
        part += 1
    return made[:, :frames]


def given_frames(condition: Condition) -> Tensor:
    """(B, K, C, H, W) that the clip goes on from. Raises ShapeError where there are none."""
    if condition.frames is not None:
        return condition.frames.pixels
    if condition.image is not None:
        return condition.image.pixels[:, None]
    raise ShapeError(
        f"animating needs frames or an image; the condition holds {', '.join(condition.given) or 'nothing'}"
    )


def next_condition(condition: Condition, newest: Tensor) -> Condition:
    """The same condition with other past frames (B, K, C, H, W); where it has both fields, both."""
    frames, image = condition.frames, condition.image
    if frames is not None and frames.actions is not None:
        raise ConfigError(
            "this system also needs actions, which are known for the given frames only: do not roll forward"
        )
    if frames is not None:
        frames = Frames(newest, torch.ones(newest.shape[:2], dtype=torch.bool))
    if image is not None:
        image = Image(newest[:, -1], image.mask)
    return replace(condition, frames=frames, image=image)
