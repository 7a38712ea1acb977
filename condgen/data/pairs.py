"""Pairs of pictures for image-to-image translation, as they lie on disk: joined A|B, or folders A and B.

    root/[train|val|test/]1.jpg                    A and B side by side in one picture (the left half is A)
    root/A/[train|val|test/]1.jpg, root/B/...      one name in both; the suffix may differ
    root/[train|val|test/]A/1.jpg, .../B/1.jpg     the same with the split outside
    root/trainA/1.jpg, root/trainB/1.jpg           the same as one word

Nothing is converted. Without split folders a hash of the name splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from condgen import rng
from condgen.data._manifest import scan
from condgen.data.base import RowDataset
from condgen.data.decode import LUMA, Header, cut, decode_image, read_header, resize
from condgen.errors import ConfigError, DataError
from condgen.options import Range
from condgen.pixels import pixels_to_float
from condgen.types import ConditionSpec, ImageSpec, Sample, TargetSpec

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
PROBED = 32  # pairs whose headers are read to learn channels and to find what is wrong with all of them
NAMED = 5  # names in one message
HELD_OUT = 2  # pairs that are held out at least, from 4 pairs on
PUBLISHED_JITTER = 286 / 256


@dataclass(frozen=True)
class Pair:
    """Row `key`: two files, or one joined file as both."""

    key: str
    a: Path
    b: Path

    @property
    def joined(self) -> bool:
        return self.a == self.b


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
    source_channels, channels   of source and target: 1, 3, or 0 = as the files have
    palette      pictures whose pixels are numbers of colours: "refuse", because an editor that saves label maps so
                 may mean the numbers, or "colours": use the colours
    unpaired     names that only one folder has: "refuse", or "skip"
    background   0..255 under transparent pixels

    Raises DataError for names without partner, an empty folder, and where no pair that was looked at can be used.
    A single pair that cannot be used (sizes differ, damaged file) raises DataError when it is read.
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
        source_channels: Literal[0, 1, 3] = 0,
        channels: Literal[0, 1, 3] = 0,
        palette: Literal["refuse", "colours"] = "refuse",
        unpaired: Literal["refuse", "skip"] = "refuse",
        background: Annotated[int, Range(0, 255)] = 255,
    ) -> None:
        if split not in (*SPLITS, "all"):
            raise ConfigError(f"data.split={split!r}: choose one of {', '.join(SPLITS)}, all")
        if 0 < load_size < size:
            raise ConfigError(f"data.load_size={load_size} is smaller than data.size={size}; 0 = the published rule")
        self.size, self.direction, self.flip = size, direction, flip
        self.load_size = (load_size or round(size * PUBLISHED_JITTER)) if jitter else size
        self.policy, self.source_resample = resize, source_resample
        self.palette, self.background = palette, background
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DataError(f"data.root={root!r} is not a folder")
        everything = find_pairs(self.root, skip_unpaired=unpaired == "skip")
        self.rows = _choose(everything, split, holdout)
        known = [pair for pairs in everything.values() for pair in pairs]
        a, b = self._probe(known)
        source, target = (a, b) if direction == "AtoB" else (b, a)
        self._asked = (source_channels or None, channels or None)
        self.channels: tuple[int, int] = (
            int(source_channels) or max(h.channels for h in source), int(channels) or max(h.channels for h in target),
        )  # fmt: skip
        self.deep = (any(h.deep for h in source), any(h.deep for h in target))
        self.provides = ConditionSpec(image=ImageSpec(self.channels[0], size, size))
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
            pixels = self._decoded(pair.a, None)
            middle = pixels.shape[-1] // 2
            halves = (pixels[..., :middle], pixels[..., middle:])
        else:
            halves = (self._decoded(pair.a, self._asked[roles[0]]), self._decoded(pair.b, self._asked[roles[1]]))
        return self._fitted(halves[0], pair, roles[0]), self._fitted(halves[1], pair, roles[1])

    def _decoded(self, path: Path, channels: int | None) -> Tensor:
        try:
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
            if header.palette and self.palette == "refuse":
                raise DataError(
                    f"{self._name(path)}: a palette picture; its pixels are numbers of colours in a table. Set "
                    "data.palette=colours to use the colours, or save it as RGB (or as grey, to use the numbers)"
                )
            found.append(header)
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


def find_pairs(root: Path, *, skip_unpaired: bool = False) -> dict[str, list[Pair]]:
    """Split name -> pairs; the one name "" where there are no split folders. Raises DataError."""
    if (root / "A").is_dir() or (root / "B").is_dir():
        outer = {name: (root / "A" / f, root / "B" / f) for name, f in _inner(root / "A", root / "B")}
        return _matched_all(outer or {"": (root / "A", root / "B")}, root, skip_unpaired)
    folders = {name: root / f for name, names in SPLITS.items() for f in names if (root / f).is_dir()}
    words = {name: f for name, names in SPLITS.items() for f in names if (root / f"{f}A").is_dir()}
    if words and not folders:
        sides = {name: (root / f"{f}A", root / f"{f}B") for name, f in words.items()}
        return _matched_all(sides, root, skip_unpaired)
    sides = {n: (f / "A", f / "B") for n, f in folders.items() if (f / "A").is_dir() or (f / "B").is_dir()}
    if sides:
        return _matched_all(sides, root, skip_unpaired)
    found = {
        name: [Pair(row.key, row.path, row.path) for row in scan(folder, root)]
        for name, folder in (folders or {"": root}).items()
    }
    if not any(found.values()):
        raise DataError(
            f"{root} holds no pairs; give joined pictures (A|B side by side), or the folders A and B with one name "
            "for the two pictures of a pair, each with or without train, val and test"
        )
    return {name: pairs for name, pairs in found.items() if pairs}


def _inner(*sides: Path) -> list[tuple[str, str]]:
    """(split, folder) of split folders inside A or B."""
    return [(n, f) for n, names in SPLITS.items() for f in names if any((side / f).is_dir() for side in sides)]


def _matched_all(sides: Mapping[str, tuple[Path, Path]], root: Path, skip: bool) -> dict[str, list[Pair]]:
    return {name: _matched(a, b, root, skip) for name, (a, b) in sides.items()}


def _matched(a: Path, b: Path, root: Path, skip: bool) -> list[Pair]:
    one, two = _by_stem(a, root), _by_stem(b, root)
    for folder, files in ((a, one), (b, two)):
        if not files:
            what = "holds no picture" if folder.is_dir() else "is missing"
            raise DataError(f"the folder {folder.relative_to(root).as_posix()} {what}; pairs need pictures in A and B")
    lonely = [(name, a if name in one else b) for name in sorted(one.keys() ^ two.keys())]
    both = sorted(one.keys() & two.keys())
    if lonely and (not skip or not both):
        names = ", ".join(f"{f.relative_to(root).as_posix()}/{name}" for name, f in lonely[:NAMED])
        more = f" and {len(lonely) - NAMED} more" if len(lonely) > NAMED else ""
        raise DataError(
            f"{len(lonely)} pictures have no partner of the same name: {names}{more}. {len(both)} pairs are complete; "
            "rename the files, or set data.unpaired=skip to use the complete pairs"
        )
    prefix = "" if a.name == "A" and a.parent == root else f"{_split_of(a, root)}/"
    return [Pair(prefix + name, one[name], two[name]) for name in both]


def _split_of(a: Path, root: Path) -> str:
    """ "train" of train/A, A/train or trainA."""
    words = [part for part in a.relative_to(root).parts if part != "A"]
    return "/".join(words).removesuffix("A")


def _by_stem(folder: Path, root: Path) -> dict[str, Path]:
    """Path below the folder without suffix -> file."""
    out: dict[str, Path] = {}
    for row in scan(folder, root) if folder.is_dir() else ():
        name = row.path.relative_to(folder).with_suffix("").as_posix()
        if name in out:
            where = folder.relative_to(root).as_posix()
            raise DataError(f"{where} has two pictures named {name}: {out[name].name} and {row.path.name}; keep one")
        out[name] = row.path
    return out


def _choose(everything: Mapping[str, list[Pair]], split: str, holdout: float) -> list[Pair]:
    if split == "all":
        return [pair for pairs in everything.values() for pair in pairs]
    if "" not in everything:
        order = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}[split]
        name = next((n for n in order if n in everything), None)
        if name is None:
            raise DataError(f"data.split={split!r}: the root has only {', '.join(everything)} folders")
        return everything[name]
    pairs = everything[""]
    limit = holdout * 2**63
    numbers = [rng.derive("pairs", "split", pair.key) for pair in pairs]
    held = [number < limit for number in numbers]
    if holdout > 0 and len(pairs) >= 2 * HELD_OUT:  # a small folder must be scorable as well
        for at in sorted(range(len(pairs)), key=numbers.__getitem__)[:HELD_OUT]:
            held[at] = True
    return [pair for pair, out in zip(pairs, held, strict=True) if out == (split != "train")]
