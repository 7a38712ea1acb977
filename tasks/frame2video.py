"""One frame -> the clip that starts with it. Scored against the true clip step by step, by motion, masks, KVD, FVD."""

from __future__ import annotations

from typing import ClassVar

from condgen.clip_task import ClipTask


class Frame2Video(ClipTask):
    __doc__ = ClipTask.__doc__

    conditions: ClassVar[tuple[str, ...]] = ("frames",)
