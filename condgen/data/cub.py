"""CUB-200-2011: birds of 200 species with ten captions, a box and 15 named parts each.

Wah et al., Caltech CNS-TR-2011-001; captions of Reed et al. (CVPR 2016, arXiv:1605.05395), drawn as in Reed et al.
(ICML 2016, arXiv:1605.05396). The crop of StackGAN (Zhang et al., ICCV 2017, arXiv:1612.03242) is an option.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch

from condgen.data._captions import Texts, draw, text_folder, zero_shot_classes
from condgen.data._manifest import inside
from condgen.data._view import Framing, Region, corner_boxes, parse_kinds, pixel_points
from condgen.data.archive import check_name
from condgen.data.base import RowDataset
from condgen.data.decode import decode_image
from condgen.errors import ConfigError, DataError
from condgen.specs import BoxesSpec, ConditionSpec, KeypointsSpec, LabelSpec, TargetSpec, TextSpec
from condgen.types import Sample

ANNOTATIONS = ("captions", "labels", "boxes", "parts")
PARTS = (
    "back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape", "right eye",
    "right leg", "right wing", "tail", "throat",
)  # fmt: skip
FLIP_PAIRS = ((6, 10), (7, 11), (8, 12))
SPLITS = ("zero_shot", "zero_shot_val", "official")
PARTITIONS = ("train", "val", "test")
CROPS = ("none", "box")
TEXT_PLACES = ("cvpr2016_cub/text_c10", "text_c10", "birds/text_c10", "text", "birds/text")
LIST_PLACES = ("cvpr2016_cub", ".", "birds", "CUB_200_2011")
BOX_MARGIN = 0.75  # StackGAN: half the side of the crop, in units of the larger side of the box

T = TypeVar("T")


class Cub(RowDataset):
    """One row per line of `images.txt`, key = image id; files that are not listed there are ignored.

    root                the folder that holds `CUB_200_2011/` and `cvpr2016_cub/` (docs/data.md has the tree)
    splits              "zero_shot": train on 150 classes, test on 50 others (Reed et al.); "zero_shot_val": 100 / 50 /
                        50; "official": `train_test_split.txt`, where every class is in both
    annotations         what rows carry, joined by "+": captions, labels (200 classes), boxes (one), parts (15 points)
    captions_per_image  how many captions a row joins by newlines, drawn with replacement (Reed et al.: 4)
    crop                "none", or "box": 1.5 times the box, as StackGAN
    load_size, resize, flip, swap_on_flip   see `condgen.data._view.Framing`
    """

    def __init__(
        self,
        *,
        root: str,
        size: int = 64,
        split: str = "train",
        splits: str = "zero_shot",
        annotations: str = "captions+labels",
        captions_per_image: int = 1,
        crop: str = "none",
        load_size: int = 0,
        resize: str = "stretch",
        flip: bool = True,
        swap_on_flip: bool = True,
    ) -> None:
        for name, given, allowed in (("splits", splits, SPLITS), ("split", split, PARTITIONS), ("crop", crop, CROPS)):
            if given not in allowed:
                raise ConfigError(f"data.{name}={given!r}; allowed: {', '.join(allowed)}")
        if captions_per_image < 1:
            raise ConfigError(f"data.captions_per_image={captions_per_image} must be at least 1")
        self.kinds = parse_kinds(annotations, ANNOTATIONS)
        self.framing = Framing(size, load_size, resize, flip, swap_on_flip)
        self.captions_per_image, self.crop = captions_per_image, crop
        top = Path(root)
        self.folder = next((f for f in (top / "CUB_200_2011", top) if (f / "images.txt").is_file()), top)
        if not (self.folder / "images.txt").is_file():
            raise DataError(
                f"{root} holds neither CUB_200_2011/images.txt nor images.txt; "
                "set data.root to the folder of the unpacked download"
            )
        self.names = dict(read_table(self.folder / "classes.txt", _class_row))
        self._files = dict(read_table(self.folder / "images.txt", lambda p: (int(p[0]), check_name(" ".join(p[1:])))))
        self._labels = dict(read_table(self.folder / "image_class_labels.txt", lambda p: (int(p[0]), int(p[1]) - 1)))
        self._ids = self._rows(top, splits, split)
        if not self._ids:
            raise DataError(f"no image of {self.folder / 'images.txt'} belongs to split {split} of {splits}")
        self._texts = Texts(text_folder(top, TEXT_PLACES)) if "captions" in self.kinds else None
        wants_box = "boxes" in self.kinds or crop == "box"
        self._boxes = dict(read_table(self.folder / "bounding_boxes.txt", _box_row)) if wants_box else {}
        self._parts = self._read_parts() if "parts" in self.kinds else {}
        self.target = TargetSpec(3, size, size)
        self.provides = ConditionSpec(
            label=LabelSpec(len(self.names), tuple(self.names.values())) if "labels" in self.kinds else None,
            text=TextSpec() if "captions" in self.kinds else None,
            boxes=BoxesSpec(1) if "boxes" in self.kinds else None,
            keypoints=KeypointsSpec(15, PARTS, FLIP_PAIRS) if "parts" in self.kinds else None,
        )

    def __len__(self) -> int:
        return len(self._ids)

    def key(self, index: int) -> str:
        return str(self._ids[index])

    def captions(self) -> list[str]:
        """Single captions of every readable text file; a row whose file is missing is quarantined when it is drawn."""
        return self._texts.every(self._text_name(i) for i in self._ids) if self._texts is not None else []

    @property
    def fingerprint(self) -> str:
        """Hash of every row's annotations and of the sizes of the caption files; the pixels are not read."""
        digest = hashlib.sha256()
        for i in self._ids:
            text = self._texts.size(self._text_name(i)) if self._texts is not None else 0
            row = (i, self._files[i], self._labels[i], self._boxes.get(i), self._parts.get(i), text)
            digest.update(repr(row).encode())
        return digest.hexdigest()[:16]

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        ident = self._ids[index]
        folder = self.folder / "images"  # may itself be a link: people keep pictures on another disk
        picture = decode_image(inside(folder, folder, self._files[ident]), channels=3)
        height, width = picture.shape[-2:]
        view = self.framing.view(picture, random, self._region(ident, width, height))
        fields: dict[str, Any] = {}
        if self._texts is not None:
            fields["caption"] = draw(
                self._texts.lines(self._text_name(ident)), self.captions_per_image, random, replacement=True
            )
        if "labels" in self.kinds:
            fields["label"] = self._labels[ident]
        if "boxes" in self.kinds:
            xyxy, _ = corner_boxes(torch.tensor([self._box(ident)]), width, height)
            fields["boxes"], _ = view.boxes(xyxy)
        if "parts" in self.kinds:
            if ident not in self._parts:
                raise DataError(f"image {ident} has no lines in parts/part_locs.txt")
            xyv = torch.tensor(self._parts[ident]).view(15, 3)
            points, visible = pixel_points(xyv, width, height)
            fields["keypoints"], fields["visible"] = view.points(points, visible, FLIP_PAIRS)
        return Sample(self.key(index), view.pixels, **fields)

    def _rows(self, root: Path, splits: str, split: str) -> list[int]:
        bad = [i for i in self._files if self._labels.get(i, -1) not in range(len(self.names))]
        if bad:
            raise DataError(
                f"image {bad[0]}: class {self._labels.get(bad[0], -1) + 1} in image_class_labels.txt "
                f"must be in 1..{len(self.names)}"
            )
        if splits == "official":
            if split == "val":
                raise ConfigError(
                    "data.splits=official has train and test only; use data.splits=zero_shot_val for split=val"
                )
            table = dict(read_table(self.folder / "train_test_split.txt", lambda p: (int(p[0]), p[1] == "1")))
            return [i for i in self._files if table.get(i) is (split == "train")]
        classes = zero_shot_classes(root, LIST_PLACES, splits, split)
        unknown = classes - {name.split("/")[0] for name in self._files.values()}
        if unknown:
            raise DataError(f"the class lists name {min(unknown)!r}, which no line of images.txt has")
        return [i for i, name in self._files.items() if name.split("/")[0] in classes]

    def _text_name(self, ident: int) -> str:
        return str(PurePosixPath(self._files[ident]).with_suffix(".txt"))

    def _box(self, ident: int) -> list[float]:
        if ident not in self._boxes:
            raise DataError(f"image {ident} has no line in bounding_boxes.txt")
        return self._boxes[ident]

    def _region(self, ident: int, width: int, height: int) -> Region | None:
        """The square of side 1.5 x the larger side of the box, cut off at the picture's edges."""
        if self.crop == "none":
            return None
        x, y, w, h = self._box(ident)
        if not (w > 0 and h > 0):
            raise DataError(f"image {ident}: its box has no area, so it cannot be cropped to it")
        reach, middle_x, middle_y = int(max(w, h) * BOX_MARGIN), int(x + w / 2), int(y + h / 2)
        return (
            max(0, middle_x - reach), max(0, middle_y - reach),
            min(width, middle_x + reach), min(height, middle_y + reach),
        )  # fmt: skip

    def _read_parts(self) -> dict[int, list[float]]:
        """Image id -> 15 x (x, y, visible), flat."""
        table: dict[int, list[float]] = {}
        for ident, part, xyv in read_table(self.folder / "parts" / "part_locs.txt", _part_row):
            table.setdefault(ident, [0.0] * 45)[3 * part : 3 * part + 3] = xyv
        return table


def _class_row(parts: list[str]) -> tuple[int, str]:
    return int(parts[0]), re.sub(r"^\d+\.", "", " ".join(parts[1:])).replace("_", " ")


def _box_row(parts: list[str]) -> tuple[int, list[float]]:
    ident, *xywh = parts
    if len(xywh) != 4:
        raise ValueError("a box has 4 numbers")
    return int(ident), [float(v) for v in xywh]


def _part_row(parts: list[str]) -> tuple[int, int, list[float]]:
    ident, part, *xyv = parts
    if not 1 <= int(part) <= 15 or len(xyv) != 3:
        raise ValueError("a line is image id, part id 1..15, x, y, visible")
    return int(ident), int(part) - 1, [float(v) for v in xyv]


def read_table(path: Path, parse: Callable[[list[str]], T]) -> Iterator[T]:
    """The rows of a text file with values between spaces. DataError names the line that cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"{path.parent.name}/{path.name}: {error.strerror}; it belongs to the CUB-200-2011 download"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield parse(line.split())
        except (ValueError, IndexError, DataError) as error:
            raise DataError(f"{path.name} line {number}: {line[:80]!r} cannot be read ({error})") from error
