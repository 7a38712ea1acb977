"""MPII Human Pose: single people in pictures of 410 activities, with 16 joints and the centre of the head.

Andriluka et al., CVPR 2014. Cropped and chosen as in GAWWN (Reed et al. 2016, arXiv:1610.02454), whose collected
captions were never published: the name of the activity stands in for them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from condgen import registry, rng
from condgen.data._captions import clean
from condgen.data._manifest import inside
from condgen.data._matlab import read_variable
from condgen.data._view import Framing, Region, parse_kinds, pixel_points
from condgen.data.archive import check_name
from condgen.data.base import RowDataset
from condgen.data.decode import decode_image
from condgen.errors import ConfigError, DataError
from condgen.options import Range
from condgen.specs import ConditionSpec, KeypointsSpec, LabelSpec, TargetSpec, TextSpec
from condgen.types import Sample

ANNOTATIONS = ("captions", "labels", "keypoints")
JOINTS = (
    "right ankle", "right knee", "right hip", "left hip", "left knee", "left ankle", "pelvis", "thorax", "upper neck",
    "head top", "right wrist", "right elbow", "right shoulder", "left shoulder", "left elbow", "left wrist", "head",
)  # fmt: skip
FLIP_PAIRS = ((0, 5), (1, 4), (2, 3), (10, 15), (11, 14), (12, 13))
HEAD = len(JOINTS) - 1
MAT_PLACES = (
    "mpii_human_pose_v1_u12_2/mpii_human_pose_v1_u12_1.mat",
    "mpii_human_pose_v1_u12_1.mat",
    "annotations/mpii_human_pose_v1_u12_1.mat",
)
PERSON = 220.0  # pixels of the crop: 200 x 1.1, in units of the annotated scale
PARTITIONS = ("train", "val", "test")


@dataclass(frozen=True)
class Person:
    """One row. points: 17 x (x, y, visible) in pixels of the picture; position and scale as annotated."""

    picture: str
    activity: str
    category: str
    group: str
    position: tuple[float, float]
    scale: float
    points: tuple[tuple[float, float, float], ...]


class Mpii(RowDataset):
    """One row per picture with exactly one person who stands free and has a marked joint, key = file name.

    root          the folder that holds `images/` and the .mat file (docs/data.md has the tree); needs scipy
    split         "train", or "test" (= "val"). The published test pictures have no joints, so a hash of the video
                  decides: two pictures of one video are never on both sides
    holdout       share of the videos in test
    annotations   what rows carry, joined by "+": captions, labels (categories of activities), keypoints
    activities    keep only these activities or categories, such as (skiing, swimming, tennis, frisbee, golf, yoga) of
                  GAWWN; a name also stands for every activity that begins with it and a comma
    caption       template with {activity} and {category}
    hidden        true: joints that are marked but out of sight count as given; false: only those in sight
    crop          "person": the square of side 220 x scale around the person, cut off at the edges, as GAWWN; "none"
    load_size, resize, flip, swap_on_flip   see `condgen.data._view.Framing`
    """

    def __init__(
        self,
        *,
        root: str,
        size: int = 64,
        split: str = "train",
        holdout: Annotated[float, Range(0, 0.99)] = 0.1,
        annotations: str = "captions+keypoints",
        activities: Sequence[str] = (),
        caption: str = "{activity}",
        hidden: bool = True,
        crop: str = "person",
        load_size: int = 0,
        resize: str = "stretch",
        flip: bool = True,
        swap_on_flip: bool = True,
    ) -> None:
        for name, given, allowed in (("split", split, PARTITIONS), ("crop", crop, ("person", "none"))):
            if given not in allowed:
                raise ConfigError(f"data.{name}={given!r}; allowed: {', '.join(allowed)}")
        if "{" in caption.replace("{activity}", "").replace("{category}", ""):
            raise ConfigError(f"data.caption={caption!r}: use {{activity}} and {{category}} and no other braces")
        self.kinds = parse_kinds(annotations, ANNOTATIONS)
        self.framing = Framing(size, load_size, resize, flip, swap_on_flip)
        self.caption, self.crop = caption, crop
        top = Path(root).expanduser()
        file = next((top / place for place in MAT_PLACES if (top / place).is_file()), None)
        if file is None:
            raise DataError(f"{root} holds no {MAT_PLACES[1]}; looked for {', '.join(MAT_PLACES)} (docs/data.md)")
        self.folder = top / "images"
        everyone = read_people(file, hidden=hidden)
        chosen = _active(everyone, (activities,) if isinstance(activities, str) else tuple(activities))
        self.rows = [p for p in chosen if (_share(p.group) < holdout) == (split != "train")]
        if not self.rows:
            raise DataError(f"{file.name}: none of {len(chosen)} people is in split {split} with holdout={holdout}")
        self.categories = tuple(sorted({p.category for p in everyone}))
        self.target = TargetSpec(3, size, size)
        self.provides = ConditionSpec(
            label=LabelSpec(len(self.categories), self.categories) if "labels" in self.kinds else None,
            text=TextSpec() if "captions" in self.kinds else None,
            keypoints=KeypointsSpec(len(JOINTS), JOINTS, FLIP_PAIRS) if "keypoints" in self.kinds else None,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return self.rows[index].picture

    def captions(self) -> list[str]:
        return list(dict.fromkeys(map(self._caption, self.rows))) if "captions" in self.kinds else []

    @property
    def fingerprint(self) -> str:
        """Hash of every row's annotations and of the caption; the pixels are not read."""
        return hashlib.sha256(repr((self.caption, self.rows)).encode()).hexdigest()[:16]

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        person = self.rows[index]
        picture = decode_image(inside(self.folder, self.folder, person.picture), channels=3)
        height, width = picture.shape[-2:]
        view = self.framing.view(picture, random, self._region(person, width, height))
        fields: dict[str, Any] = {}
        if "captions" in self.kinds:
            fields["caption"] = self._caption(person)
        if "labels" in self.kinds:
            fields["label"] = self.categories.index(person.category)
        if "keypoints" in self.kinds:
            points, visible = pixel_points(torch.tensor(person.points), width, height)
            fields["keypoints"], fields["visible"] = view.points(points, visible, FLIP_PAIRS)
        return Sample(person.picture, view.pixels, **fields)

    def _caption(self, person: Person) -> str:
        return self.caption.replace("{activity}", person.activity).replace("{category}", person.category)

    def _region(self, person: Person, width: int, height: int) -> Region | None:
        if self.crop == "none":
            return None
        side, (x, y) = math.ceil(person.scale * PERSON), person.position
        left, top = math.floor(x - side / 2), math.floor(y - side / 2)
        region = (max(0, left), max(0, top), min(width, left + side), min(height, top + side))
        if region[0] >= region[2] or region[1] >= region[3]:
            raise DataError(f"{person.picture}: its person at {person.position} is outside the picture")
        return region


def read_people(file: Path, *, hidden: bool = True) -> list[Person]:
    """Every person whom GAWWN would train on, in the order of the file. Raises DataError.

    What lacks an annotation (an empty annorect, no points, no scale) is left out: a third of the release does.
    """
    release = read_variable(file, "RELEASE", struct_as_record=False, squeeze_me=True)
    try:
        pictures, people, acts = (_rows(getattr(release, name)) for name in ("annolist", "single_person", "act"))
        trained = _rows(release.img_train)
    except AttributeError as error:
        raise DataError(f"{file.name}: RELEASE has no such field ({error})") from error
    if not len(pictures) == len(people) == len(acts) == len(trained):
        raise DataError(
            f"{file.name}: annolist, single_person, act and img_train have {len(pictures)}, {len(people)}, "
            f"{len(acts)} and {len(trained)} rows; they must agree"
        )
    found = []
    for picture, alone, act, train in zip(pictures, people, acts, trained, strict=True):
        numbers = _rows(alone)
        rects = _rows(getattr(picture, "annorect", None))
        if not train or len(numbers) != 1 or not 1 <= int(numbers[0]) <= len(rects):
            continue
        person = _person(picture, rects[int(numbers[0]) - 1], act, hidden)
        found += [person] if person is not None else []
    if not found:
        raise DataError(f"{file.name}: no picture has exactly one person with marked joints")
    return found


def _person(picture: Any, rect: Any, act: Any, hidden: bool) -> Person | None:
    name = check_name(str(picture.image.name))
    position = getattr(rect, "objpos", None)
    scale, x, y = (_number(v) for v in (getattr(rect, "scale", None), *(getattr(position, c, None) for c in "xy")))
    points = [(0.0, 0.0, 0.0)] * len(JOINTS)
    for point in _rows(getattr(getattr(rect, "annopoints", None), "point", None)):
        joint, px, py = (_number(getattr(point, field, None)) for field in ("id", "x", "y"))
        seen = _number(getattr(point, "is_visible", None))
        if joint is None or px is None or py is None or int(joint) not in range(HEAD):
            continue
        points[int(joint)] = (px, py, float(hidden or seen == 1))
    if scale is None or scale <= 0 or x is None or y is None or not any(p[2] for p in points):
        return None
    head = [_number(getattr(rect, corner, None)) for corner in ("x1", "y1", "x2", "y2")]
    if None not in head and head[2] > head[0]:  # type: ignore[operator]
        points[HEAD] = ((head[0] + head[2]) / 2, (head[1] + head[3]) / 2, 1.0)  # type: ignore[operator]
    activity, category = (clean(_words(getattr(act, field, None))) for field in ("act_name", "cat_name"))
    video = _number(getattr(picture, "vididx", None))
    group = name if video is None else f"video {int(video)}"
    return Person(name, activity or "a person", category or "unknown", group, (x, y), scale, tuple(points))


def _active(people: list[Person], wanted: tuple[str, ...]) -> list[Person]:
    if not wanted:
        return people
    known = {name for p in people for name in (p.activity, p.category, p.activity.split(",")[0])}
    for name in wanted:
        if name not in known:
            raise ConfigError(registry.unknown("MPII activity or category", str(name), sorted(known)))
    return [p for p in people if {p.activity, p.category, p.activity.split(",")[0]} & set(wanted)]


def _share(group: str) -> float:
    return rng.derive("mpii", "split", group) / 2**63


def _rows(value: Any) -> list[Any]:
    """What MATLAB squeezed: nothing, one thing or an array of them -> a list."""
    if value is None or (isinstance(value, str) and not value):
        return []
    return list(value.reshape(-1)) if isinstance(value, np.ndarray) else [value]


def _number(value: Any) -> float | None:
    """A finite number; None for what is missing, empty or text that is no number ("1" is how some are stored)."""
    try:
        found = float(value if isinstance(value, str) else np.asarray(value, dtype=np.float64).reshape(()))
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _words(value: Any) -> str:
    return value if isinstance(value, str) else ""
