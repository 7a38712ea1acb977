"""Oxford-102 flowers: photographs of 102 kinds of flowers with ten captions each.

Nilsback and Zisserman, ICVGIP 2008; captions of Reed et al. (CVPR 2016, arXiv:1605.05395), drawn as in Reed et al.
(ICML 2016, arXiv:1605.05396).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from condgen.data._captions import Texts, draw, text_folder, zero_shot_classes
from condgen.data._manifest import inside
from condgen.data._matlab import read_variable
from condgen.data._view import Framing, parse_kinds
from condgen.data.base import RowDataset
from condgen.data.decode import decode_image
from condgen.errors import ConfigError, DataError
from condgen.specs import ConditionSpec, LabelSpec, TargetSpec, TextSpec
from condgen.types import Sample

ANNOTATIONS = ("captions", "labels")
CLASSES = 102
SPLITS = ("zero_shot", "zero_shot_val", "official")
SET_KEYS = {"train": "trnid", "val": "valid", "test": "tstid"}
PLACES = ("cvpr2016_flowers", ".", "flowers", "102flowers")
TEXT_PLACES = ("cvpr2016_flowers/text_c10", "text_c10", "flowers/text_c10", "102flowers/text_c10")


class Oxford102(RowDataset):
    """One row per picture, key = its number; label = class number - 1.

    root                the folder that holds `jpg/` and `text_c10/` (docs/data.md has the tree)
    splits              "zero_shot": the class lists of Reed et al. (82 trained on, 20 for test); "zero_shot_val": 62 /
                        20 / 20; "official": `setid.mat` (1,020 / 1,020 / 6,149 pictures of all classes)
    annotations         what rows carry, joined by "+": captions, labels
    captions_per_image  how many captions a row joins by newlines, drawn with replacement (Reed et al.: 4)
    load_size, resize, flip   see `condgen.data._view.Framing`

    Classes come from `imagelabels.mat` (needs scipy) or, where that file is absent, from the caption folders.
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
        load_size: int = 0,
        resize: str = "stretch",
        flip: bool = True,
    ) -> None:
        for name, given, allowed in (("splits", splits, SPLITS), ("split", split, tuple(SET_KEYS))):
            if given not in allowed:
                raise ConfigError(f"data.{name}={given!r}; allowed: {', '.join(allowed)}")
        if captions_per_image < 1:
            raise ConfigError(f"data.captions_per_image={captions_per_image} must be at least 1")
        self.kinds = parse_kinds(annotations, ANNOTATIONS)
        self.framing = Framing(size, load_size, resize, flip)
        self.captions_per_image = captions_per_image
        top = Path(root)
        self._jpg = self._find(top, "jpg")
        labels_file = next((p for place in PLACES if (p := top / place / "imagelabels.mat").is_file()), None)
        folder = text_folder(top, TEXT_PLACES) if "captions" in self.kinds or labels_file is None else top
        self._texts = Texts(folder) if "captions" in self.kinds else None
        self._labels = labels_of_mat(labels_file) if labels_file is not None else labels_of_folders(folder)
        self._ids = self._rows(top, splits, split)
        if not self._ids:
            raise DataError(f"no picture belongs to split {split} of {splits} below {root}")
        self.target = TargetSpec(3, size, size)
        self.provides = ConditionSpec(
            label=LabelSpec(CLASSES) if "labels" in self.kinds else None,
            text=TextSpec() if "captions" in self.kinds else None,
        )

    def __len__(self) -> int:
        return len(self._ids)

    def key(self, index: int) -> str:
        return f"{self._ids[index]:05d}"

    def captions(self) -> list[str]:
        """Single captions of every readable text file; a row whose file is missing is quarantined when it is drawn."""
        return self._texts.every(self._text_name(i) for i in self._ids) if self._texts is not None else []

    @property
    def fingerprint(self) -> str:
        """Hash of every row's label and of the sizes of the caption files; the pixels are not read."""
        digest = hashlib.sha256()
        for i in self._ids:
            text = self._texts.size(self._text_name(i)) if self._texts is not None else 0
            digest.update(repr((i, self._labels[i], text)).encode())
        return digest.hexdigest()[:16]

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        ident = self._ids[index]
        folder = self._jpg  # may itself be a link: people keep pictures on another disk
        picture = decode_image(inside(folder, folder, f"image_{ident:05d}.jpg"), channels=3)
        view = self.framing.view(picture, random)
        fields: dict[str, Any] = {}
        if self._texts is not None:
            fields["caption"] = draw(
                self._texts.lines(self._text_name(ident)), self.captions_per_image, random, replacement=True
            )
        if "labels" in self.kinds:
            fields["label"] = self._labels[ident]
        return Sample(self.key(index), view.pixels, **fields)

    def _text_name(self, ident: int) -> str:
        return f"{class_folder(self._labels[ident])}/image_{ident:05d}.txt"

    def _rows(self, root: Path, splits: str, split: str) -> list[int]:
        if splits == "official":
            numbers = read_mat(self._find(root, "setid.mat"), SET_KEYS[split])
            unknown = [i for i in numbers if i not in self._labels]
            if unknown:
                raise DataError(
                    f"setid.mat names picture {unknown[0]}, which has no class; is imagelabels.mat complete?"
                )
            return sorted(numbers)
        classes = zero_shot_classes(root, PLACES, splits, split)
        return sorted(i for i, label in self._labels.items() if class_folder(label) in classes)

    @staticmethod
    def _find(root: Path, name: str) -> Path:
        for place in PLACES:
            if (root / place / name).exists():
                return root / place / name
        raise DataError(f"{name} not found below {root}; looked in {', '.join(PLACES)} (docs/data.md has the tree)")


def class_folder(label: int) -> str:
    return f"class_{label + 1:05d}"


def labels_of_mat(path: Path) -> dict[int, int]:
    """Picture number -> label 0..101. Raises DataError for a class outside 1..102."""
    classes = read_mat(path, "labels")
    for number, value in enumerate(classes, 1):
        if not 1 <= value <= CLASSES:
            raise DataError(f"{path.name}: picture {number} has class {value}; allowed 1..{CLASSES}")
    return {number: value - 1 for number, value in enumerate(classes, 1)}


def labels_of_folders(texts: Path) -> dict[int, int]:
    """The same from `class_00001/image_06734.txt`. Raises DataError for an odd name or a picture in two classes."""
    labels: dict[int, int] = {}
    for path in sorted(texts.glob("class_*/image_*.txt")):
        match = re.fullmatch(r"class_(\d{5})/image_(\d{5})\.txt", path.relative_to(texts).as_posix())
        if match is None or not 1 <= int(match[1]) <= CLASSES:
            raise DataError(f"{path.parent.name}/{path.name} is not class_00001..{CLASSES:05d}/image_NNNNN.txt")
        if labels.setdefault(int(match[2]), int(match[1]) - 1) != int(match[1]) - 1:
            raise DataError(f"picture {int(match[2])} has captions in two class folders")
    return labels


def read_mat(path: Path, key: str) -> Sequence[int]:
    """A row of integers from a MATLAB file. DataError when scipy is missing or the file does not hold `key`."""
    values = read_variable(path, key, instead=" (or use data.splits=zero_shot without imagelabels.mat)").reshape(-1)
    try:
        numbers = [int(v) for v in values]
    except (TypeError, ValueError) as error:
        raise DataError(f"{path.name} cannot be read as a MATLAB file with {key!r} ({error!r})") from error
    if any(n != v for n, v in zip(numbers, values, strict=True)):
        raise DataError(f"{path.name}: {key!r} must hold whole numbers")
    return numbers
