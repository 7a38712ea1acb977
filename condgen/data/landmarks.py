"""Pictures with named points that you have: folders of pictures and one .npz, .json or .csv file of points.

    root/train/..., root/test/...   pictures in split folders; without them (root/images/... or root/...) a hash splits
    root/POINTS.npz                 xy, or train_xy and test_xy: (N, K, 2), or (N, K, 3) with visible last; row i is the
                                    i-th picture by name, or that of the array `files`. Names: joint_names or names
    root/POINTS.json                {"train/0.jpg": [[x, y], null, [x, y, 0]]}, or {"names": [...], "points": {...}}
    root/POINTS.csv                 file, NAME_x, NAME_y [, NAME_v], ...; an empty cell is a point that is not visible

Coordinates are pixels of the picture as it is shown, x to the right and y down, or shares of it (data.unit=share).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch

from condgen import rng
from condgen.data._manifest import inside
from condgen.data._points import PointTable, read_captions, read_points
from condgen.data._skeletons import flip_pairs_of
from condgen.data._view import Framing, pixel_points
from condgen.data.base import RowDataset
from condgen.data.decode import SUFFIXES, decode_image
from condgen.errors import ConfigError, DataError
from condgen.options import Range
from condgen.specs import ConditionSpec, KeypointsSpec, TargetSpec, TextSpec
from condgen.types import Sample

PARTITIONS = ("train", "val", "test")
FILES = (".npz", ".json", ".csv")


class Landmarks(RowDataset):
    """One row per picture that the points file knows, key = its path below root.

    root          the folder; see the head of data/landmarks.py
    points        the points file below root; "" = the only .npz, .json or .csv there
    split         "train", "val" or "test"; without split folders val and test are the same rows
    holdout       share of the pictures in test where there are no split folders, chosen by a hash of the name
    unit          "pixels" or "share" of the width and height
    names         of the points, in order; () = those of the file
    skeleton      which points a mirror swaps: "auto" pairs names that differ in left and right (l_, left, ...), and 68
                  unnamed points as iBUG; "face68", "coco17", "lsp14", "mpii16" by order; "none"
    flip_pairs    (left, right) indices instead of a skeleton
    caption       one sentence for every picture; "" = none
    captions      a file below root with captions: .json {"train/0.jpg": "..." or [...]}, or .tsv file, caption
    load_size, resize, flip, swap_on_flip   see `condgen.data._view.Framing`

    Pictures without points are left out. Points outside the picture become invisible.
    """

    def __init__(
        self,
        *,
        root: str,
        size: int = 64,
        points: str = "",
        split: str = "train",
        holdout: Annotated[float, Range(0, 0.99)] = 0.1,
        unit: str = "pixels",
        names: Sequence[str] = (),
        skeleton: str = "auto",
        flip_pairs: Sequence[Sequence[int]] = (),
        caption: str = "",
        captions: str = "",
        load_size: int = 0,
        resize: str = "stretch",
        flip: bool = True,
        swap_on_flip: bool = True,
    ) -> None:
        for name, given, allowed in (("split", split, PARTITIONS), ("unit", unit, ("pixels", "share"))):
            if given not in allowed:
                raise ConfigError(f"data.{name}={given!r}; allowed: {', '.join(allowed)}")
        if caption and captions:
            raise ConfigError("data.caption gives one sentence for all and data.captions a file of them; choose one")
        self.framing = Framing(size, load_size, resize, flip, swap_on_flip)
        self.root, self.unit = Path(root).expanduser(), unit
        if not self.root.is_dir():
            raise DataError(f"data.root={root!r} is not a folder")
        pictures = find_pictures(self.root)
        file = _points_file(self.root, points, besides=captions)
        table = read_points(file, pictures)
        self.table = _named(table, tuple(names))
        pairs = tuple((int(a), int(b)) for a, b in flip_pairs)
        self.pairs = pairs or flip_pairs_of(skeleton, self.table.names, self.table.count)
        if any(not 0 <= i < self.table.count for pair in self.pairs for i in pair):
            raise ConfigError(f"data.flip_pairs={list(pairs)} needs indices in 0..{self.table.count - 1}")
        told = read_captions(inside(self.root, self.root, captions), pictures) if captions else {}
        known = [p for p in _choose(pictures, split, holdout) if p in self.table.rows]
        self.rows = [p for p in known if not captions or p in told]
        if not self.rows:
            raise DataError(
                f"{file.name}: none of the {split} pictures has points{' and a caption' if captions else ''}; "
                f"the file names {next(iter(self.table.rows), 'nothing')!r}"
            )
        self._captions = {p: tuple(told[p]) if captions else ((caption,) if caption else ()) for p in self.rows}
        self.target = TargetSpec(3, size, size)
        self.provides = ConditionSpec(
            text=TextSpec() if caption or captions else None,
            keypoints=KeypointsSpec(self.table.count, self.table.names, self.pairs),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return self.rows[index]

    def captions(self) -> list[str]:
        return list(dict.fromkeys(text for row in self.rows for text in self._captions[row]))

    @property
    def fingerprint(self) -> str:
        """Hash of every row's points and captions; the pixels are not read."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr((row, self.table.rows[row].tolist(), self._captions[row])).encode())
        return digest.hexdigest()[:16]

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        row = self.rows[index]
        picture = decode_image(inside(self.root, self.root, row), channels=3)
        height, width = picture.shape[-2:] if self.unit == "pixels" else (1, 1)
        points, visible = pixel_points(self.table.rows[row], width, height)
        view = self.framing.view(picture, random)
        points, visible = view.points(points, visible, self.pairs)
        fields: dict[str, Any] = {"keypoints": points, "visible": visible}
        texts = self._captions[row]
        if texts:
            at = 0 if random is None else int(torch.randint(len(texts), (), generator=random))
            fields["caption"] = texts[at]
        return Sample(row, view.pixels, **fields)


def find_pictures(root: Path) -> dict[str, list[str]]:
    """Split name -> paths below root in the order of their names; the one name "" where there are no split folders."""
    folders = {name: root / name for name in PARTITIONS if (root / name).is_dir()}
    if not folders:
        folders = {"": root / "images" if (root / "images").is_dir() else root}
    found = {}
    for name, folder in folders.items():
        paths = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        found[name] = sorted(p.relative_to(root).as_posix() for p in paths)
    if not any(found.values()):
        raise DataError(f"{root} holds no picture ({', '.join(sorted(SUFFIXES))}) in train/, test/, images/ or itself")
    return found


def _points_file(root: Path, name: str, besides: str) -> Path:
    if name:
        file = inside(root, root, name)
        if file.suffix.lower() not in FILES or not file.is_file():
            raise DataError(f"data.points={name!r}: give a {', '.join(FILES)} file below {root}")
        return file
    found = sorted(p for p in root.iterdir() if p.suffix.lower() in FILES and p.is_file() and p.name != besides)
    if len(found) != 1:
        listed = ", ".join(p.name for p in found) or "none"
        raise DataError(
            f"{root} needs one file of points ({', '.join(FILES)}); found {listed}. Choose with data.points"
        )
    return found[0]


def _named(table: PointTable, names: tuple[str, ...]) -> PointTable:
    if names and len(names) != table.count:
        raise ConfigError(f"data.names has {len(names)} names for {table.count} points")
    return PointTable(names or table.names, table.count, table.rows)


def _choose(pictures: dict[str, list[str]], split: str, holdout: float) -> list[str]:
    if "" not in pictures:
        order = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}[split]
        name = next((n for n in order if pictures.get(n)), None)
        if name is None:
            raise DataError(f"{split} rows are asked for, and data.root has pictures only in {', '.join(pictures)}")
        return pictures[name]
    rows = pictures[""]
    draws = [rng.derive("landmarks", "split", row) / 2**63 for row in rows]
    limit = holdout
    if holdout > 0 and len(rows) > 1:  # a small folder too has a row on each side
        ordered = sorted(draws)
        limit = min(max(limit, (ordered[0] + ordered[1]) / 2), ordered[-1])
    return [row for row, draw in zip(rows, draws, strict=True) if (draw < limit) == (split != "train")]
