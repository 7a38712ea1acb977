"""MS-COCO: photographs with captions, boxes of 80 classes and the 17 body points of people.

Lin et al., ECCV 2014, arXiv:1405.0312. Reads the 2014 and 2017 releases as published, and any data set saved in the
same form. Captions are drawn as in Reed et al. (ICML 2016, arXiv:1605.05396).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from condgen.data._captions import clean, draw
from condgen.data._manifest import inside
from condgen.data._view import Framing, corner_boxes, parse_kinds, pixel_points
from condgen.data.archive import check_name
from condgen.data.base import RowDataset
from condgen.data.decode import decode_image
from condgen.errors import ConfigError, DataError
from condgen.specs import BoxesSpec, ConditionSpec, KeypointsSpec, TargetSpec, TextSpec
from condgen.types import Sample

ANNOTATIONS = ("captions", "instances", "keypoints")
FILES = {"captions": "captions", "instances": "instances", "keypoints": "person_keypoints"}
POINTS = (
    "nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
    "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee", "left ankle",
    "right ankle",
)  # fmt: skip
FLIP_PAIRS = ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16))
ASPECT_TOLERANCE = 0.03  # rounding of a copy that was made smaller, not a picture turned on its side


class Coco(RowDataset):
    """One row per image, key = image id.

    root                the folder that holds `annotations/` and the image folders (docs/data.md has the tree)
    split               "train" or "val"; "test" reads val, because no test captions are published
    year                "2014" or "2017"; "" = the one that is there
    annotations         what rows carry, joined by "+": captions, instances (boxes), keypoints (the largest person).
                        Images without a caption, or without a person with points, are left out when these are asked for
    captions_per_image  how many captions a row joins by newlines, drawn without replacement (Reed et al.: 3)
    load_size, resize, flip, swap_on_flip   see `condgen.data._view.Framing`
    max_boxes, min_area     the largest boxes are kept, and only those that cover at least this share of the image
                            (0.02 as in layout-to-image work: Johnson et al., CVPR 2018, arXiv:1804.01622)

    Coordinates refer to `width` and `height` of the JSON, so smaller copies of the images work unchanged.
    """

    attribution: ClassVar[str] = "COCO annotations: COCO Consortium, CC BY 4.0; photographs: their Flickr authors"

    def __init__(
        self,
        *,
        root: str,
        size: int = 64,
        split: str = "train",
        year: str = "",
        annotations: str = "captions",
        captions_per_image: int = 1,
        load_size: int = 0,
        resize: str = "stretch",
        flip: bool = True,
        swap_on_flip: bool = True,
        max_boxes: int = 8,
        min_area: float = 0.02,
    ) -> None:
        self.kinds = parse_kinds(annotations, ANNOTATIONS)
        if captions_per_image < 1 or max_boxes < 1 or not 0 <= min_area < 1:
            raise ConfigError(
                f"data.captions_per_image={captions_per_image}, max_boxes={max_boxes}, min_area={min_area}: "
                "the first two must be at least 1 and min_area in [0, 1)"
            )
        self.framing = Framing(size, load_size, resize, flip, swap_on_flip)
        self.captions_per_image, self.max_boxes, self.min_area = captions_per_image, max_boxes, min_area
        name, files = find_annotations(Path(root), self.kinds, split, str(year))
        self._images: dict[int, dict[str, Any]] = {}
        self._captions: dict[int, list[str]] = {}
        self._boxes: dict[int, list[tuple[Any, Any]]] = {}
        self._people: dict[int, dict[str, Any]] = {}
        self.classes: tuple[str, ...] = ()
        self._class_of: dict[int, int] = {}
        for kind in self.kinds:
            self._read(kind, files[kind])
        needed: list[dict[int, Any]] = [
            t for k, t in (("captions", self._captions), ("keypoints", self._people)) if k in self.kinds
        ]
        self._ids = sorted(i for i in self._images if all(i in table for table in needed))
        if not self._ids:
            raise DataError(f"{', '.join(f.name for f in files.values())}: no image has {' and '.join(self.kinds)}")
        self._folder = find_images(Path(root), name, str(self._images[self._ids[0]]["file_name"]))
        self.target = TargetSpec(3, size, size)
        self.provides = ConditionSpec(
            text=TextSpec() if "captions" in self.kinds else None,
            boxes=BoxesSpec(max_boxes, len(self.classes)) if "instances" in self.kinds else None,
            keypoints=KeypointsSpec(17, POINTS, FLIP_PAIRS) if "keypoints" in self.kinds else None,
        )

    def __len__(self) -> int:
        return len(self._ids)

    def key(self, index: int) -> str:
        return str(self._ids[index])

    def captions(self) -> list[str]:
        """Single captions; rows with several join them by newlines, and the text encoder averages."""
        if "captions" not in self.kinds:
            return []
        return list(dict.fromkeys(c for i in self._ids for c in self._captions[i]))

    @property
    def fingerprint(self) -> str:
        """Hash of every row's annotations; the pixels are not read."""
        digest = hashlib.sha256()
        for i in self._ids:
            row = (self._images[i], self._captions.get(i), self._boxes.get(i), self._people.get(i))
            digest.update(repr((i, *row)).encode())
        return digest.hexdigest()[:16]

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        ident = self._ids[index]
        image = self._images[ident]
        folder = self._folder  # may itself be a link: people keep pictures on another disk
        picture = decode_image(inside(folder, folder, image["file_name"]), channels=3)
        width, height = float(image["width"]), float(image["height"])
        self._check_aspect(ident, width / height, picture)
        view = self.framing.view(picture, random)
        fields: dict[str, Any] = {}
        if "captions" in self.kinds:
            fields["caption"] = draw(self._captions[ident], self.captions_per_image, random, replacement=False)
        if "instances" in self.kinds:
            xyxy, labels = self._layout(ident, width, height)
            xyxy, kept = view.boxes(xyxy)
            fields["boxes"], fields["box_labels"] = xyxy[: self.max_boxes], labels[kept][: self.max_boxes]
        if "keypoints" in self.kinds:
            xyv = torch.tensor(self._people[ident]["keypoints"], dtype=torch.float32).view(17, 3)
            points, visible = pixel_points(xyv, width, height)  # v: 1 = behind something but marked, 2 = in sight
            fields["keypoints"], fields["visible"] = view.points(points, visible, FLIP_PAIRS)
        return Sample(self.key(index), view.pixels, **fields)

    def _layout(self, ident: int, width: float, height: float) -> tuple[Tensor, Tensor]:
        """Boxes (n, 4) and classes (n,) of an image, largest first."""
        found = self._boxes.get(ident, [])
        try:
            xywh = torch.tensor([bbox for bbox, _ in found], dtype=torch.float32).view(-1, 4)
            labels = torch.tensor([self._class_of[category] for _, category in found], dtype=torch.int64)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"image {ident}: box or category_id is malformed or unknown ({error})") from error
        xyxy, kept = corner_boxes(xywh, width, height)
        area = (xyxy[:, 2:] - xyxy[:, :2]).prod(1)
        order = area.argsort(descending=True, stable=True)
        order = order[area[order] >= self.min_area]
        return xyxy[order], labels[kept][order]

    def _check_aspect(self, ident: int, aspect: float, picture: Tensor) -> None:
        found = picture.shape[-1] / picture.shape[-2]
        rounding = 1 / min(picture.shape[-2:])
        if abs(math.log(found / aspect)) > ASPECT_TOLERANCE + rounding:
            raise DataError(
                f"image {ident} is {picture.shape[-1]}x{picture.shape[-2]} but the JSON's aspect is {aspect:.3f}; "
                "boxes and points would not fit. Was the copy turned or cropped?"
            )

    def _read(self, kind: str, path: Path) -> None:
        data = read_json(path)
        for number, image in enumerate(data["images"]):
            self._add_image(image, f"{path.name}: images[{number}]", new=kind == self.kinds[0])
        if kind == "instances":
            categories = sorted(data.get("categories") or [], key=lambda c: int(c["id"]))
            self.classes = tuple(str(c["name"]) for c in categories)
            self._class_of = {int(c["id"]): at for at, c in enumerate(categories)}
            if not categories:
                raise DataError(f"{path.name} has no categories, so boxes would have no class")
        for number, row in enumerate(data["annotations"]):
            where = f"{path.name}: annotations[{number}]"
            ident = row.get("image_id") if isinstance(row, dict) else None
            if ident not in self._images:
                raise DataError(f"{where}: image_id {ident!r} is not among the images")
            if kind == "captions":
                text = clean(str(row.get("caption", "")))
                if text:
                    self._captions.setdefault(ident, []).append(text)
            elif kind == "instances":
                if not row.get("iscrowd"):
                    self._boxes.setdefault(ident, []).append((row.get("bbox"), row.get("category_id")))
            else:
                self._add_person(ident, row, where)

    def _add_image(self, image: Any, where: str, new: bool) -> None:
        try:
            ident, name = int(image["id"]), check_name(str(image["file_name"]))
            width, height = float(image["width"]), float(image["height"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where} needs id, file_name, width and height ({error!r})") from error
        if not (math.isfinite(width) and math.isfinite(height) and width >= 1 and height >= 1):
            raise DataError(f"{where}: width {width} and height {height} must be at least 1")
        record = {"file_name": name, "width": width, "height": height}
        if self._images.get(ident, record) != record or (new and ident in self._images):
            raise DataError(f"{where}: id {ident} is there twice, or differs between the annotation files")
        self._images[ident] = record

    def _add_person(self, ident: int, row: dict[str, Any], where: str) -> None:
        """Keeps the largest person of an image that has marked points."""
        points = row.get("keypoints")
        if row.get("iscrowd") or not points:
            return
        if len(points) != 51 or not all(isinstance(v, int | float) for v in points):
            raise DataError(f"{where}: keypoints must be 17 x (x, y, v); got {len(points)} values")
        if not any(v > 0 for v in points[2::3]):
            return
        area = float(row.get("area") or math.prod((row.get("bbox") or [0, 0, 0, 0])[2:]))
        if ident not in self._people or area > self._people[ident]["area"]:
            self._people[ident] = {"keypoints": points, "area": area}


def find_annotations(root: Path, kinds: Sequence[str], split: str, year: str) -> tuple[str, dict[str, Path]]:
    """(name of the published split such as "train2014", the JSON of each kind). Raises DataError or ConfigError."""
    if split not in ("train", "val", "test"):
        raise ConfigError(f"data.split={split!r}; allowed: train, val, test")
    part = "train" if split == "train" else "val"
    found: dict[str, dict[str, Path]] = {}
    for name in [f"{part}{year}"] if year else [f"{part}2014", f"{part}2017", part]:
        paths = {kind: root / folder / f"{FILES[kind]}_{name}.json" for kind in kinds for folder in ("", "annotations")
                 if (root / folder / f"{FILES[kind]}_{name}.json").is_file()}  # fmt: skip
        if len(paths) == len(kinds):
            found[name] = paths
    if len(found) > 1:
        raise ConfigError(f"{root} holds {' and '.join(found)}; choose with data.year=2014 or data.year=2017")
    if not found:
        wanted = ", ".join(f"annotations/{FILES[kind]}_{part}{year or '2014'}.json" for kind in kinds)
        raise DataError(f"{root} has no {wanted} (2017 works too); unzip annotations_trainval there, or set data.root")
    return next(iter(found.items()))


def find_images(root: Path, name: str, first: str) -> Path:
    """The folder of the pictures: train2014/, images/train2014/ or images/; the first that holds `first`."""
    places = [root / name, root / "images" / name, root / "images", root]
    for folder in places:
        if (folder / first).is_file():
            return folder
    existing = next((folder for folder in places[:2] if folder.is_dir()), None)
    if existing is not None:
        return existing  # one missing file is a bad row, not a bad data set
    raise DataError(
        f"{first} is in none of {', '.join(str(p.relative_to(root)) + '/' for p in places[:3])} below {root}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A COCO file, without the segmentation polygons that make up most of it. NaN and Infinity are refused."""

    def refuse(token: str) -> float:
        raise ValueError(f"{token} is not a number")

    def slim(row: dict[str, Any]) -> dict[str, Any]:
        row.pop("segmentation", None)
        return row

    try:
        with path.open(encoding="utf-8") as file:
            data = json.load(file, object_hook=slim, parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path.name} is not valid COCO JSON: {error}") from error
    if not (
        isinstance(data, dict) and isinstance(data.get("images"), list) and isinstance(data.get("annotations"), list)
    ):
        raise DataError(f'{path.name} must hold {{"images": [...], "annotations": [...]}}')
    if not data["images"] or not data["annotations"]:
        raise DataError(f"{path.name} has {len(data['images'])} images and {len(data['annotations'])} annotations")
    return data
