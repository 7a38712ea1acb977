"""A folder of pictures, read as it is: metadata.jsonl, captions in .txt files, class folders, split folders.

    root/train/..., root/test/...     split folders; without them a hash of the file name splits
    root/[split/]metadata.jsonl       one JSON object a line: file_name, text | caption | captions, label, boxes (xyxy),
                                      box_labels, keypoints ([x, y, v]), normalised, image, frames, sha256
    root/[split/]CLASS/name.png       without a manifest: the folder is the label
    root/[split/]name.png + name.txt  one caption a line

Coordinates are pixels of the picture as shown (after EXIF orientation), or shares with "normalised": true.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from condgen import rng
from condgen.data._classes import chosen_classes, class_values
from condgen.data._manifest import SPLITS, Row, rows_by_split
from condgen.data.base import RowDataset
from condgen.data.decode import RESIZE, Window, cut, decode_image, move_boxes, move_points, read_header, resize
from condgen.errors import ConfigError, DataError
from condgen.pixels import pixels_to_float
from condgen.types import (
    BoxesSpec,
    ConditionSpec,
    FramesSpec,
    ImageSpec,
    KeypointsSpec,
    LabelSpec,
    Sample,
    TargetSpec,
    TextSpec,
)

PROBED = 64  # headers read to learn the number of channels


class Folder(RowDataset):
    """Pictures of a folder as a data set; see the head of data/folder.py for the layout.

    root         the folder
    size         pixels of a side of the square target
    split        "train", "val", "test" or "all". A missing test folder is served by val, and the other way round
    holdout      without split folders: share of the files in test (and val), chosen by a hash of the name; at least
                 one row each way. 0 = none, which needs eval.split=train
    channels     1, 3, or 0 = as the first files have. Colour is never turned to grey unless 1 is given
    resize       "crop" (short side, then cut), "stretch" or "pad"
    load_size    training: resize to this first, then cut `size` at random; 0 = size
    flip         mirror half of the training rows, geometry with them
    flip_pairs   (left, right) keypoint indices that a mirror swaps
    captions     "one": a random one in training, the first otherwise; "mean": all, joined by newlines, so that
                 the text encoder averages them
    classes      keep only rows with these labels, renumbered in this order: names, numbers in the order of the names,
                 and ranges of them, such as ["30-39"]; () = all
    max_boxes    boxes kept of a row, the first ones
    background   0..255 under transparent pixels and beside padded ones
    cache_mib    memory for decoded, resized pictures, of each process that loads

    Boxes are clipped; with less than 25 % left they are dropped. Keypoints outside become invisible.
    Raises DataError for a manifest with bad lines and for a path that leaves root.
    """

    def __init__(
        self,
        *,
        root: str,
        size: int = 64,
        split: str = "train",
        holdout: float = 0.1,
        channels: int = 0,
        resize: str = "crop",
        load_size: int = 0,
        flip: bool = False,
        flip_pairs: Sequence[Sequence[int]] = (),
        captions: str = "one",
        classes: Sequence[int | str] = (),
        max_boxes: int = 16,
        background: int = 255,
        cache_mib: int = 256,
    ) -> None:
        _check_options(locals())
        self.size, self.policy, self.load_size = size, resize, load_size or size
        self.flip, self.caption_use, self.background, self.max_boxes = flip, captions, background, max_boxes
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DataError(f"data.root={root!r} is not a folder")
        everything = rows_by_split(self.root)
        names = class_values("label", [row.label for rows in everything.values() for row in rows])
        self.label_names = names
        self._grouped = bool(classes)
        if classes:
            self.label_names = tuple(names[number] for number in chosen_classes(classes, [str(name) for name in names]))
            everything = _only(everything, self.label_names)
        self.rows = choose_rows(everything, split, holdout)
        known = [row for rows in everything.values() for row in rows]
        self.box_names = class_values("box_labels", [c for row in known for c in row.box_labels or ()])
        self._label_index = {name: i for i, name in enumerate(self.label_names)}
        self._box_index = {name: i for i, name in enumerate(self.box_names)}
        self._asked = channels or None
        self.channels, self.deep = _probe(known, channels)
        self._cache = _FrameCache(cache_mib * 2**20)
        self.target = TargetSpec(self.channels, size, size)
        self.provides = self._provides(known, flip_pairs)
        self.num_points = self.provides.keypoints.num_points if self.provides.keypoints else 0

    def _provides(self, rows: Sequence[Row], flip_pairs: Sequence[Sequence[int]]) -> ConditionSpec:
        points = _same("keypoints", [len(r.keypoints) for r in rows if r.keypoints is not None])
        past = _same("frames", [len(r.frames) for r in rows if r.frames])
        pairs = tuple((int(a), int(b)) for a, b in flip_pairs)
        if any(not 0 <= i < points for pair in pairs for i in pair):
            raise ConfigError(f"data.flip_pairs={list(pairs)} needs indices in 0..{points - 1} (keypoints of a row)")
        most = max((len(r.boxes) for r in rows if r.boxes is not None), default=0)
        has_boxes = any(r.boxes is not None for r in rows)
        return ConditionSpec(
            label=LabelSpec(len(self.label_names), tuple(map(str, self.label_names))) if self.label_names else None,
            text=TextSpec() if any(r.captions for r in rows) else None,
            boxes=BoxesSpec(max(1, min(most, self.max_boxes)), len(self.box_names)) if has_boxes else None,
            keypoints=KeypointsSpec(points, flip_pairs=pairs) if points else None,
            image=ImageSpec(self.channels, self.size, self.size) if any(r.image for r in rows) else None,
            frames=FramesSpec(past, self.channels, self.size, self.size) if past else None,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return self.rows[index].key

    def captions(self) -> list[str]:
        if self.caption_use == "mean":
            return list(dict.fromkeys("\n".join(r.captions) for r in self.rows if r.captions))
        return list(dict.fromkeys(text for row in self.rows for text in row.captions))

    @property
    def fingerprint(self) -> str:
        """Hash of every row's entry and of its file's size; of a group of classes, also of their order."""
        digest = hashlib.sha256(repr(self.label_names).encode() if self._grouped else b"")
        for row in self.rows:
            size = row.path.stat().st_size if row.path.is_file() else -1
            digest.update(repr((replace(row, path=Path(), image=None, frames=()), size)).encode() + b"\0")
        return digest.hexdigest()[:16]

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        row = self.rows[index]
        if row.problem:
            raise DataError(f"{row.key}: {row.problem}")
        draws = (0.5, 0.5, 1.0, 0.0) if random is None else torch.rand(4, generator=random).tolist()
        frame, whole, shown = self._frame(row.path, None if random is None else self.load_size, row.sha256)
        target, window = cut(frame, (self.size, self.size), (draws[0], draws[1]))
        flip = self.flip and random is not None and draws[2] < 0.5
        view = ([whole, window], flip)

        def beside(path: Path) -> Tensor:
            other = self._frame(path, None if random is None else self.load_size)[0]
            if other.shape != frame.shape:
                raise DataError(f"{row.key}: {path.name} has another shape than the picture; pairs must match")
            part = cut(other, (self.size, self.size), (draws[0], draws[1]))[0]
            return part.flip(-1) if flip else part.clone(memory_format=torch.contiguous_format)

        boxes, box_labels = self._boxes(row, shown, *view)
        xy, visible = self._points(row, shown, *view)
        return Sample(
            key=row.key,
            # a copy: the frame stays in the cache and must not change with the sample
            target=target.flip(-1) if flip else target.clone(memory_format=torch.contiguous_format),
            label=None if row.label is None else self._label_index[row.label],
            caption=self._caption(row, draws[3]),
            boxes=boxes,
            box_labels=box_labels,
            keypoints=xy,
            visible=visible,
            image=beside(row.image) if row.image else None,
            frames=torch.stack([beside(path) for path in row.frames]) if row.frames else None,
        )

    def _caption(self, row: Row, draw: float) -> str | None:
        if not row.captions:
            return None
        if self.caption_use == "mean":
            return "\n".join(row.captions)
        return row.captions[min(int(draw * len(row.captions)), len(row.captions) - 1)]

    def _frame(self, path: Path, load: int | None, sha256: str = "") -> tuple[Tensor, Window, tuple[int, int]]:
        """The resized picture before cutting, its window in the source, and the source's (width, height)."""
        side = load or self.size
        found = self._cache.get((str(path), side))
        if found is not None:
            return found
        name = path.relative_to(self.root).as_posix()
        try:
            if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                raise DataError("its sha256 is not the one in the manifest")
            pixels = decode_image(path, channels=self._asked, background=self.background)
        except (DataError, OSError) as error:
            raise DataError(f"{name}: {error}") from error
        if len(pixels) > self.channels:
            raise DataError(f"{name}: it has colour in a grey data set; set data.channels=3, or 1 to drop colour")
        if pixels.is_floating_point() and not self.deep:
            raise DataError(f"{name}: it has 16 bits a channel among pictures of 8; convert one or the other")
        pixels = pixels_to_float(pixels) if self.deep else pixels
        shown = (pixels.shape[-1], pixels.shape[-2])
        if len(pixels) < self.channels:
            pixels = pixels.expand(self.channels, -1, -1)
        frame, window = resize(pixels, (side, side), self.policy, background=self.background)
        return self._cache.put((str(path), side), (frame, window, shown))

    def _boxes(
        self, row: Row, shown: tuple[int, int], windows: Sequence[Window], flip: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if row.boxes is None:
            return None, None
        xyxy = torch.tensor(row.boxes, dtype=torch.float64).view(-1, 4)
        if not row.normalised:
            xyxy = xyxy / torch.tensor([*shown, *shown])
        if not bool(torch.isfinite(xyxy).all()) or bool((xyxy[:, 2:] <= xyxy[:, :2]).any()):
            raise DataError(f"{row.key}: a box must be finite numbers x0, y0, x1, y1 with x1 > x0 and y1 > y0")
        clipped = xyxy.clamp(0, 1)
        if bool((clipped[:, 2:] <= clipped[:, :2]).any()):
            raise DataError(f"{row.key}: a box lies outside the picture of {shown[0]} x {shown[1]} pixels")
        boxes, valid = move_boxes(clipped.float(), windows, flip)
        labels = None
        if self.box_names:
            classes = row.box_labels if row.box_labels is not None else ()
            if len(classes) != len(boxes):
                raise DataError(f"{row.key}: it has boxes without box_labels, other rows have them")
            labels = torch.tensor([self._box_index[c] for c in classes], dtype=torch.int64)[valid][: self.max_boxes]
        return boxes[valid][: self.max_boxes], labels

    def _points(
        self, row: Row, shown: tuple[int, int], windows: Sequence[Window], flip: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if row.keypoints is None:
            return None, None
        points = torch.tensor(row.keypoints, dtype=torch.float64)
        xy, visible = points[:, :2], points[:, 2] > 0
        if not row.normalised:
            xy = xy / torch.tensor(shown)
        if not bool(torch.isfinite(xy[visible]).all()):
            raise DataError(f"{row.key}: a visible keypoint is not a finite number")
        visible = visible & ((xy >= 0) & (xy <= 1)).all(-1)
        xy = torch.where(visible[:, None], xy, 0.0)
        pairs = self.provides.flip_pairs
        return move_points(xy.float(), visible, windows, flip, pairs)


Frame = tuple[Tensor, Window, tuple[int, int]]


class _FrameCache:
    """The frames used last, up to a number of bytes. A pickled copy starts empty."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.frames: OrderedDict[tuple[str, int], Frame] = OrderedDict()

    def get(self, key: tuple[str, int]) -> Frame | None:
        if key in self.frames:
            self.frames.move_to_end(key)
        return self.frames.get(key)

    def put(self, key: tuple[str, int], frame: Frame) -> Frame:
        size = frame[0].nbytes
        if size <= self.limit:
            self.frames[key] = frame
            self.used += size
        while self.used > self.limit:
            _, (old, _, _) = self.frames.popitem(last=False)
            self.used -= old.nbytes
        return frame

    def __getstate__(self) -> dict[str, object]:
        return {"limit": self.limit, "used": 0, "frames": OrderedDict()}


def _check_options(given: dict[str, object]) -> None:
    allowed: dict[str, tuple[object, ...]] = {
        "split": (*SPLITS, "all"), "channels": (0, 1, 3), "resize": RESIZE, "captions": ("one", "mean"),
    }  # fmt: skip
    for name, choices in allowed.items():
        if given[name] not in choices:
            raise ConfigError(f"data.{name}={given[name]!r}: choose one of {', '.join(map(str, choices))}")
    ranges = {
        "size": (1, 4096),
        "holdout": (0, 0.99),
        "background": (0, 255),
        "max_boxes": (1, 10_000),
        "cache_mib": (0, 2**20),
    }
    for name, (low, high) in ranges.items():
        value = given[name]
        if not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"data.{name}={value!r} is outside {low}..{high}")
    load, size = given["load_size"], given["size"]
    if isinstance(load, int) and isinstance(size, int) and load and load < size:
        raise ConfigError(f"data.load_size={load} is smaller than data.size={size}; 0 means the same")


def _only(everything: dict[str, list[Row]], labels: Sequence[int | str]) -> dict[str, list[Row]]:
    kept = {name: [row for row in rows if row.label in frozenset(labels)] for name, rows in everything.items()}
    if not any(kept.values()):
        raise DataError(f"no picture has one of the labels {', '.join(map(str, labels))}")
    return kept


def choose_rows(everything: dict[str, list[Row]], split: str, holdout: float) -> list[Row]:
    """The rows of a split; `everything` has one list for each split folder, or one under "" that a hash divides."""
    if split == "all":
        return [row for rows in everything.values() for row in rows]
    if "" not in everything:
        order = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}[split]
        name = next((n for n in order if n in everything), None)
        if name is None:
            only = next(iter(everything))
            raise DataError(
                f"{split} rows are asked for, and data.root has only {', '.join(everything)} folders; "
                f"with data.root=.../{only} a share of that folder is held out (data.holdout)"
            )
        return everything[name]
    rows = everything[""]
    hashes = [rng.derive("folder", "split", row.key) for row in rows]
    limit = int(holdout * 2**63)
    if holdout > 0 and len(rows) > 1:  # a small folder too has a row on each side
        ordered = sorted(hashes)
        limit = min(max(limit, ordered[0] + 1), ordered[-1])
    return [row for row, value in zip(rows, hashes, strict=True) if (value < limit) == (split != "train")]


def _same(name: str, counts: Sequence[int]) -> int:
    if len(set(counts)) > 1:
        raise DataError(f"every row needs the same number of {name}; found {sorted(set(counts))[:5]}")
    return counts[0] if counts else 0


def _probe(rows: Sequence[Row], channels: int) -> tuple[int, bool]:
    """Channels and bit depth of the data set, from the first headers that can be read."""
    headers = []
    for row in rows[:PROBED]:
        try:
            headers.append(read_header(row.path))
        except (DataError, OSError):
            continue  # the loader will quarantine the row
    found = max((h.channels for h in headers), default=3)
    return channels or found, any(h.deep for h in headers)
