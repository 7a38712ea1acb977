"""Clips like those of a data set, without a condition or with a label or a sentence. Scored by KVD, FVD, motion, masks.

The task file leaves every condition field out, whatever the data set; `data.ignore=[frames]` keeps label and text.
"""

from __future__ import annotations

from condgen.clip_task import ClipTask


class Video(ClipTask):
    __doc__ = ClipTask.__doc__
