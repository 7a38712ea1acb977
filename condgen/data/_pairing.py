"""Which pictures of a folder are pairs, and which pairs belong to which split; for data/pairs.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from condgen import rng
from condgen.data._manifest import SPLITS, scan
from condgen.errors import DataError

NAMED = 5  # names in one message
HELD_OUT = 2  # pairs that are held out at least, from 4 pairs on


@dataclass(frozen=True)
class Pair:
    """Row `key`: two files, or one joined file as both."""

    key: str
    a: Path
    b: Path

    @property
    def joined(self) -> bool:
        return self.a == self.b


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


def choose(everything: Mapping[str, list[Pair]], split: str, holdout: float) -> list[Pair]:
    """The pairs of a split; without split folders `holdout` is the share of test, by a hash of the name."""
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
