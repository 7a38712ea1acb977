"""Captions on disk and how rows draw them, as Reed et al. (ICML 2016, arXiv:1605.05396) trained.

Shared by the data sets whose pictures have several captions each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from condgen.data._manifest import MAX_CAPTION, clean_caption, inside
from condgen.errors import ConfigError, DataError

TENSOR_FILES = (".t7", ".h5", ".pickle", ".pkl")
TENSOR_ADVICE = (
    "files of Torch (.t7), HDF5 and Python pickles hold ready-made vectors of one encoder, and loading a pickle can "
    "run code, so they are not read. Use the text files: cvpr2016_cub/text_c10 or cvpr2016_flowers/text_c10, one .txt "
    "per picture"
)


def clean(text: str) -> str:
    """One line, NFC, without control characters and doubled spaces. "" for what is no sentence, or a damaged file."""
    if len(text) > MAX_CAPTION:
        return ""
    plain = text.isascii() and text.isprintable()  # nearly all of 600,000 captions: skip the look at each character
    return " ".join(text.split()) if plain else clean_caption(text)


def read_lines(path: Path) -> list[str]:
    """The captions of one text file, one a line; broken UTF-8 becomes the replacement sign, empty lines vanish."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"captions {path.name}: {error.strerror}; every picture needs its text file") from error
    found = [line for line in map(clean, text.split("\n")) if line]
    if not found:
        raise DataError(f"captions {path.name} holds no sentence")
    return found


class Texts:
    """Caption files below a folder, each read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, list[str]] = {}

    def lines(self, name: str) -> list[str]:
        """The captions of one file. Raises DataError when it is missing, empty or leads out of the folder."""
        if name not in self._known:
            self._known[name] = read_lines(inside(self.folder, self.folder, name))
        return self._known[name]

    def every(self, names: Iterable[str]) -> list[str]:
        """Distinct captions of the files that can be read; the others are reported when their rows are drawn."""
        found: dict[str, None] = {}
        for name in names:
            with contextlib.suppress(DataError):
                found.update(dict.fromkeys(self.lines(name)))
        return list(found)

    def size(self, name: str) -> int:
        path = self.folder / name
        return path.stat().st_size if path.is_file() else -1


def draw(captions: Sequence[str], count: int, random: torch.Generator | None, *, replacement: bool) -> str:
    """`count` captions joined by newlines: the text encoder averages their vectors.

    Drawn from `random`, with or without replacement (without: at most all of them); None takes the first `count`.
    """
    if random is None:
        return "\n".join(captions[:count])
    if replacement:
        at = torch.randint(len(captions), (count,), generator=random)
    else:
        at = torch.randperm(len(captions), generator=random)[:count]
    return "\n".join(captions[i] for i in at.tolist())


def text_folder(root: Path, places: Sequence[str]) -> Path:
    """The folder with one sub-folder of .txt files per class: the first of `places` below root that has any.

    Some copies nest a folder `text` inside. Raises DataError; where only .t7 or pickles are found it says why.
    """
    for place in places:
        for folder in (root / place, root / place / "text"):
            if folder.is_dir() and next(folder.glob("*/*.txt"), None) is not None:
                return folder
    other = [name for place in places for name in _tensor_files(root / place)] or _tensor_files(root)
    if other:
        raise DataError(f"no caption text below {root}, only {other[0]}: {TENSOR_ADVICE}")
    raise DataError(f"no captions below {root}; looked for CLASS/NAME.txt in {', '.join(places)} (see docs/data.md)")


def _tensor_files(folder: Path) -> list[str]:
    patterns = [f"{depth}*{ending}" for depth in ("", "*/", "*/*/") for ending in TENSOR_FILES]
    return sorted(p.name for pattern in patterns for p in folder.glob(pattern))[:1] if folder.is_dir() else []


def class_list(root: Path, places: Sequence[str], name: str) -> list[str] | None:
    """The class folders that `name`.txt lists, one a line, or None when no place has that file."""
    for place in places:
        path = root / place / f"{name}.txt"
        if path.is_file():
            lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
            return [line for line in lines if line]
    return None


def zero_shot_classes(root: Path, places: Sequence[str], splits: str, split: str) -> set[str]:
    """Class folders of a split whose test classes are never trained on.

    splits="zero_shot": train = train + validation classes, as Reed et al.; "zero_shot_val": train alone, so that
    "val" can choose hyper-parameters. Raises DataError when lists are missing or share a class.
    """
    lists = {name: class_list(root, places, f"{name}classes") for name in ("train", "val", "trainval", "test")}
    both = lists["trainval"]
    if both is None and lists["train"] is not None and lists["val"] is not None:
        both = lists["train"] + lists["val"]
    parts = {"train": both if splits == "zero_shot" else lists["train"], "val": lists["val"], "test": lists["test"]}
    if splits == "zero_shot" and split == "val":
        raise ConfigError(
            "data.splits=zero_shot trains on the val classes; use data.splits=zero_shot_val for split=val"
        )
    if splits == "zero_shot":
        del parts["val"]
    missing = [
        f"{'trainval' if p == 'train' and splits == 'zero_shot' else p}classes.txt" for p, v in parts.items() if not v
    ]
    if missing:
        raise DataError(f"{', '.join(missing)} not found below {root}; looked in {', '.join(places)}")
    sets = {part: set(found or ()) for part, found in parts.items()}
    for a, b in (("train", "test"), ("train", "val"), ("val", "test")):
        shared = sets.get(a, set()) & sets.get(b, set())
        if shared:
            raise DataError(f"class {min(shared)} is in both the {a} and the {b} list below {root}")
    return sets[split]
