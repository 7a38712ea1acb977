"""Pairs of pictures for image-to-image translation, as they lie on disk: joined A|B, or folders A and B.

    root/[train|val|test/]1.jpg                    A and B side by side in one picture (the left half is A)
    root/A/[train|val|test/]1.jpg, root/B/...      one name in both; the suffix may differ
    root/[train|val|test/]A/1.jpg, .../B/1.jpg     the same with the split outside
    root/trainA/1.jpg, root/trainB/1.jpg           the same as one word

Nothing is converted. Without split folders a hash of the name splits.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen.data._manifest import SPLITS
from condgen.data._pairing import NAMED, Pair, choose, find_pairs
from condgen.data.base import RowDataset
from condgen.data.decode import (
    LUMA,
    Header,
    cut,
    decode_classes,
    decode_image,
    has_end_mark,
    read_header,
    read_numbers,
    resize,
)
from condgen.errors import ConfigError, DataError
from condgen.options import Range
from condgen.pixels import pixels_to_float
from condgen.types import ConditionSpec, ImageSpec, Sample, TargetSpec

PROBED = 32  # pairs whose headers are read to learn channels and to find what is wrong with all of them
CHECKED = 4096  # pairs of a split that are looked at before training; later ones when their turn comes
MAX_CLASSES = 1024
PUBLISHED_JITTER = 286 / 256


class Pairs(RowDataset):
    """Pairs in a folder; see the head of data/pairs.py for the layouts.

    root         the folder
    size         pixels of a side of source and target
    direction    "AtoB": A is the source; "BtoA": B is (facades, cityscapes: the label map is B)
    split        "train", "val", "test" or "all". A missing test folder is served by val, and the other way round
    holdout      without split folders: share of the pairs in test, chosen by a hash of the name
    jitter       training: resize to `load_size`, then cut `size` at random, the same place of both
    load_size    0 = size * 286 / 256, the published rule
    flip         mirror half of the training pairs, both together
    resize       "stretch" as published, or "crop": aspect ratio kept, then cut
    source_resample   "area" for photos and drawings; "nearest" for label maps, whose colours must not mix
    source_classes    above 0: source pixels are class numbers below it (palette PNG, or one channel of 8 or 16 bits),
                      and the source has one channel a class, +1 where the pixel is of it, else -1; always "nearest"
    source_channels, channels   of source and target: 1, 3, or 0 = as the files have
    palette      pictures whose pixels are numbers of colours: "refuse", because an editor that saves label maps so
                 may mean the numbers; "colours": use the colours; "numbers": those of sources, with source_classes
    unpaired     names that only one folder has: "refuse", or "skip"
    broken       pairs that cannot be used (sizes differ, damaged file): "refuse" before training starts, or "skip":
                 left out and reported when their turn comes. The first 4096 pairs of a split are looked at
    background   0..255 under transparent pixels

    Grey of 16 bits becomes float, 0 -> -1 and 65535 -> +1, so it keeps its depth; as class numbers it stays as it is.

    Raises DataError for names without partner, an empty folder, and where no pair that was looked at can be used.
    """

    def __init__(
        self,
        *,
        root: str,
        size: Annotated[int, Range(1, 4096)] = 256,
        split: str = "train",
        direction: Literal["AtoB", "BtoA"] = "AtoB",
        holdout: Annotated[float, Range(0, 0.99)] = 0.1,
        jitter: bool = True,
        load_size: Annotated[int, Range(0, 8192)] = 0,
        flip: bool = True,
        resize: Literal["stretch", "crop"] = "stretch",
        source_resample: Literal["area", "nearest"] = "area",
        source_classes: Annotated[int, Range(0, MAX_CLASSES)] = 0,
        source_channels: Literal[0, 1, 3] = 0,
        channels: Literal[0, 1, 3] = 0,
        palette: Literal["refuse", "colours", "numbers"] = "refuse",
        unpaired: Literal["refuse", "skip"] = "refuse",
        broken: Literal["refuse", "skip"] = "refuse",
        background: Annotated[int, Range(0, 255)] = 255,
    ) -> None:
        if split not in (*SPLITS, "all"):
            raise ConfigError(f"data.split={split!r}: choose one of {', '.join(SPLITS)}, all")
        if 0 < load_size < size:
            raise ConfigError(f"data.load_size={load_size} is smaller than data.size={size}; 0 = the published rule")
        if source_classes == 1 or (source_classes and source_channels):
            raise ConfigError(
                f"data.source_classes={source_classes} with data.source_channels={source_channels}: give 2 classes or "
                "more, and no channels beside them: a class is a channel"
            )
        self.size, self.direction, self.flip = size, direction, flip
        self.classes = source_classes
        self.load_size = (load_size or round(size * PUBLISHED_JITTER)) if jitter else size
        self.policy, self.source_resample = resize, "nearest" if source_classes else source_resample
        self.palette, self.background = palette, background
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DataError(f"data.root={root!r} is not a folder")
        everything = find_pairs(self.root, skip_unpaired=unpaired == "skip")
        self.rows = choose(everything, split, holdout)
        known = [pair for pairs in everything.values() for pair in pairs]
        if palette == "numbers" and not source_classes:
            raise ConfigError(self._count_missing(known))
        if broken == "refuse":
            self._refuse_broken(self.rows[:CHECKED])
        a, b = self._probe(known)
        source, target = (a, b) if direction == "AtoB" else (b, a)
        self._asked = (source_channels or None, channels or None)
        self.channels: tuple[int, int] = (
            source_classes or int(source_channels) or max(h.channels for h in source),
            int(channels) or max(h.channels for h in target),
        )  # fmt: skip
        self.deep = (any(h.deep for h in source) and not source_classes, any(h.deep for h in target))
        self.provides = ConditionSpec(image=ImageSpec(self.channels[0], size, size, classes=source_classes))
        self.target = TargetSpec(self.channels[1], size, size)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        return self.rows[index].key

    @property
    def fingerprint(self) -> str:
        """Hash of names, file sizes and direction."""
        digest = hashlib.sha256(self.direction.encode())
        for pair in self.rows:
            sizes = [path.stat().st_size if path.is_file() else -1 for path in (pair.a, pair.b)]
            digest.update(f"{pair.key}\0{sizes}".encode())
        return digest.hexdigest()[:16]

    def sample(self, index: int, random: torch.Generator | None) -> Sample:
        pair = self.rows[index]
        self._headers(pair)
        a, b = self._halves(pair)
        source, target = (a, b) if self.direction == "AtoB" else (b, a)
        draws = (0.5, 0.5, 1.0) if random is None else tuple(torch.rand(3, generator=random).tolist())
        side = self.size if random is None else self.load_size
        frame = resize(target, (side, side), self.policy)[0]
        if self.source_resample == "nearest":
            beside = F.interpolate(source[None], size=frame.shape[-2:], mode="nearest-exact")[0]
        else:
            beside = resize(source, (side, side), self.policy)[0]
        cuts = [cut(x, (self.size, self.size), (draws[0], draws[1]))[0] for x in (beside, frame)]
        if self.flip and random is not None and draws[2] < 0.5:
            cuts = [x.flip(-1) for x in cuts]
        image, made = (x.clone(memory_format=torch.contiguous_format) for x in cuts)
        return Sample(key=pair.key, target=made, image=image)

    def _halves(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A and B at full size, with the channels of their side."""
        roles = (0, 1) if self.direction == "AtoB" else (1, 0)  # role 0 is the source
        if pair.joined:
            pixels = self._decoded(pair.a)
            middle = pixels.shape[-1] // 2
            halves = (pixels[..., :middle], pixels[..., middle:])
        else:
            halves = (self._decoded(pair.a, roles[0]), self._decoded(pair.b, roles[1]))
        return self._fitted(halves[0], pair, roles[0]), self._fitted(halves[1], pair, roles[1])

    def _decoded(self, path: Path, role: int | None = None) -> Tensor:
        try:
            if role == 0 and self.classes:
                return decode_classes(path, self.classes)
            channels = None if role is None else self._asked[role]
            return decode_image(path, channels=channels, background=self.background)
        except DataError as error:
            raise DataError(f"{self._name(path)}: {error}") from error

    def _fitted(self, pixels: Tensor, pair: Pair, role: int) -> Tensor:
        wanted, what = self.channels[role], ("source_channels", "channels")[role]
        if len(pixels) > wanted:
            if self._asked[role] is None:
                raise DataError(f"{pair.key}: it has colour where the others are grey; set data.{what} to 1 or 3")
            grey = (torch.tensor(LUMA)[:, None, None] * pixels.float()).sum(0, keepdim=True)
            pixels = grey if pixels.is_floating_point() else grey.round().to(torch.uint8)
        if pixels.is_floating_point() and not self.deep[role]:
            raise DataError(f"{pair.key}: it has 16 bits a channel among pictures of 8; convert one or the other")
        pixels = pixels_to_float(pixels) if self.deep[role] else pixels
        return pixels.expand(wanted, -1, -1)

    def _headers(self, pair: Pair) -> tuple[Header, Header]:
        """Headers of A and B. Raises DataError for what can be seen in them."""
        found = []
        for path in dict.fromkeys((pair.a, pair.b)):
            try:
                header = read_header(path)
            except DataError as error:
                raise DataError(f"{self._name(path)}: {error}") from error
            source = path == (pair.a if self.direction == "AtoB" else pair.b)
            if header.palette and self.palette != "colours" and not (source and self.classes):
                raise DataError(
                    f"{self._name(path)}: a palette picture; its pixels are numbers of colours in a table. Set "
                    "data.palette=colours to use the colours, or save it as RGB"
                    + (", or data.source_classes=N if the numbers are classes 0..N-1" if source else "")
                )
            found.append(header)
        if pair.joined and self.classes:
            raise DataError(
                f"{pair.key}: class numbers cannot be joined with a picture; data.source_classes={self.classes} needs "
                "folders A and B"
            )
        if pair.joined:
            if found[0].width % 2:
                raise DataError(
                    f"{pair.key}: {found[0].width} pixels wide; a joined pair has A and B of the same width side by "
                    "side. For two folders, name them A and B"
                )
            return found[0], found[0]
        a, b = found
        if (a.width, a.height) != (b.width, b.height):
            raise DataError(
                f"{pair.key}: A has {a.width} x {a.height} pixels and B {b.width} x {b.height}; the two pictures of "
                "a pair must have one size, and show the same thing at the same place"
            )
        return a, b

    def _refuse_broken(self, rows: Sequence[Pair]) -> None:
        """Raises DataError where pairs differ in size, or files break off or are no pictures at all.

        Headers and last bytes are read, which takes a tenth of a millisecond a file; a file without its end mark is
        decoded to be sure. Of class numbers the first maps are read.
        """
        problems: dict[str, list[str]] = {}  # reason -> names
        for at, pair in enumerate(rows):
            try:
                self._headers(pair)
                if self.classes and at < PROBED:
                    self._decoded(pair.a if self.direction == "AtoB" else pair.b, 0)
                for path in dict.fromkeys((pair.a, pair.b)):
                    if not has_end_mark(path):
                        self._decoded(path)
            except DataError as error:
                name, _, reason = str(error).partition(": ")
                problems.setdefault(reason, []).append(name)
        if not problems:
            return
        count = sum(map(len, problems.values()))
        said = [f"{_listed(names)}: {reason}" for reason, names in list(problems.items())[:NAMED]]
        more = f"; {len(problems) - NAMED} more reasons" if len(problems) > NAMED else ""
        left = len(rows) - count
        hint = f". Repair or remove them, or set data.broken=skip to train on the other {left}" if left else ""
        raise DataError(f"{count} of {len(rows)} pairs cannot be used. {'; '.join(said)}{more}{hint}")

    def _count_missing(self, known: Sequence[Pair]) -> str:
        """data.palette=numbers without their count: what to write, from the first sources."""
        numbers = []
        for pair in known[:PROBED]:
            with contextlib.suppress(DataError):
                numbers.append(int(read_numbers(pair.a if self.direction == "AtoB" else pair.b).max()))
        seen = f"; the first {len(numbers)} hold numbers up to {max(numbers)}" if numbers else ""
        return f"data.palette=numbers: say with data.source_classes=N how many classes the sources have{seen}"

    def _probe(self, known: Sequence[Pair]) -> tuple[list[Header], list[Header]]:
        """Headers of the first pairs. Raises the first problem where every one of them has one."""
        good, problems = [], []
        for pair in known[:PROBED]:
            try:
                good.append(self._headers(pair))
            except DataError as error:
                problems.append(error)
        if not good:
            raise DataError(f"none of the first {len(problems)} pairs can be used. {problems[0]}")
        return [a for a, _ in good], [b for _, b in good]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
