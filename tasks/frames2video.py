"""Past frames -> the frames that follow. Scored against the true clip step by step, by motion, KVD and FVD."""

from __future__ import annotations

from typing import ClassVar

from condgen.clip_task import ClipTask


class Frames2Video(ClipTask):
    __doc__ = ClipTask.__doc__

    conditions: ClassVar[tuple[str, ...]] = ("frames",)
