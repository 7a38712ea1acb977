"""Which frames of a clip a row takes: by number, or by the time at which they are shown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from condgen.errors import DataError

UNEVEN = 0.5  # of the usual time between frames: more makes a clip one of variable rate


@dataclass(frozen=True)
class Known:
    """What was learnt of a clip: frames, their times in seconds if the container has any, rate, size of a frame."""

    frames: int
    times: np.ndarray | None
    fps: float
    height: int
    width: int


def by_count(known: Known, needed: int, stride: int, where: float, repeat: bool, key: str) -> list[int]:
    """`needed` frame numbers, `stride` apart; `where` in [0, 1] is the place of the window.

    repeat  the last frame stands for those that a short clip lacks; otherwise that is a DataError, as is a clip whose
            rate varies
    """
    _refuse_uneven(known, key)
    span = (needed - 1) * stride + 1
    if span > known.frames and not repeat:
        raise DataError(
            f"{key}: it has {known.frames} frames; {needed} frames by {stride} need {span}. Set data.frames "
            "or data.stride lower, or data.short=repeat"
        )
    spare = max(known.frames - span, 0)
    first = min(int(where * (spare + 1)), spare)  # all places are equally likely; rounding would halve the ends
    return [min(first + i * stride, known.frames - 1) for i in range(needed)]


def by_time(known: Known, needed: int, fps: float, where: float, repeat: bool, key: str) -> list[int]:
    """The frame that is shown at each of `needed` moments, 1 / fps apart."""
    if known.times is None and not known.fps:
        raise DataError(f"{key}: it has no times (a folder, an array or stacked frames); use data.stride, not data.fps")
    times = np.arange(known.frames) / known.fps if known.times is None else known.times - known.times[0]
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 1 / fps
    length, span = float(times[-1]) + usual, (needed - 1) / fps
    if span >= length + 1e-6 and not repeat:
        raise DataError(
            f"{key}: it lasts {length:.2f} s; {needed} frames at {fps:g} a second need {span:.2f}. Set data.frames "
            "lower, data.fps higher, or data.short=repeat"
        )
    start = where * max(0.0, length - usual - span)
    moments = start + np.arange(needed) / fps
    shown = np.searchsorted(times, moments + 1e-6, side="right") - 1
    return [int(number) for number in shown.clip(0, known.frames - 1)]


def _refuse_uneven(known: Known, key: str) -> None:
    if known.times is None or len(known.times) < 3:
        return
    steps = np.diff(known.times)
    usual = float(np.median(steps))
    if float(np.abs(steps - usual).max()) > UNEVEN * usual:
        raise DataError(
            f"{key}: its rate varies ({1000 * steps.min():.0f} to {1000 * steps.max():.0f} ms between frames); "
            "set data.fps to take frames by time"
        )
