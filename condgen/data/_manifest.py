"""What a folder of pictures says about its rows: metadata.jsonl, .txt files beside pictures, class folders.

A manifest that is wrong as a file (malformed line, unknown type, path out of the folder) is an error with its
line numbers. A row whose values cannot be used is kept with its `problem`, so that the loader quarantines it.
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from condgen.data.decode import SUFFIXES
from condgen.errors import DataError

MANIFEST = "metadata.jsonl"
MAX_CAPTION = 2000  # characters
SHOWN = 5  # problems listed in one error
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # split -> names of its folder


@dataclass(frozen=True)
class Row:
    """One picture and what is known of it. Coordinates are as in the file; `normalised` says in which unit.

    problem  why the row cannot be used, or ""
    """

    key: str  # path inside the root, with /
    path: Path
    captions: tuple[str, ...] = ()
    label: int | str | None = None
    boxes: tuple[tuple[float, ...], ...] | None = None  # xyxy
    box_labels: tuple[int | str, ...] | None = None
    keypoints: tuple[tuple[float, ...], ...] | None = None  # x, y, v
    normalised: bool = False
    image: Path | None = None
    frames: tuple[Path, ...] = ()
    sha256: str = ""
    problem: str = ""


def clean_caption(text: str) -> str:
    """NFC, control characters and runs of white space become one space, ends trimmed."""
    text = unicodedata.normalize("NFC", text)
    kept = (" " if c.isspace() or unicodedata.category(c) in ("Cc", "Cs") else c for c in text)
    return " ".join("".join(kept).split())


def inside(root: Path, folder: Path, name: str) -> Path:
    """The file `name` of a folder under root. Raises DataError for a path that leaves root, also by a link."""
    if not name or "\0" in name:
        raise DataError(f"the path {name!r} is empty or holds a NUL")
    given = Path(name)
    if given.is_absolute() or ".." in given.parts or "\\" in name:
        raise DataError(f"the path {name!r} must be relative and stay inside the data folder")
    path = folder / given
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"the path {name!r} leads out of the data folder through a link")
    return path


def read_manifest(file: Path, root: Path) -> list[Row]:
    """Rows of a metadata.jsonl, one JSON object a line. Raises DataError naming every bad line (the first few)."""
    rows: list[Row] = []
    seen: dict[str, int] = {}
    wrong: list[str] = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line, file.parent, root)
            if row.key in seen:
                raise DataError(f"file_name {row.key!r} is also on line {seen[row.key]}")
            seen[row.key] = number
            rows.append(row)
        except DataError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f"\n... and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise DataError(f"{file.name} has {len(wrong)} bad lines:\n" + "\n".join(wrong[:SHOWN]) + more)
    return rows


def rows_by_split(root: Path, files: Callable[[Path], Sequence[Path]] | None = None) -> dict[str, list[Row]]:
    """Split name -> rows; the one name "" where root has no split folders, or a manifest of them all.

    files   what counts below a folder without manifest; None = pictures
    """

    def rows(folder: Path) -> list[Row]:
        file = folder / MANIFEST
        return read_manifest(file, root) if file.is_file() else scan(folder, root, files and files(folder))

    found = {name: root / folder for name, names in SPLITS.items() for folder in names if (root / folder).is_dir()}
    if found and not (root / MANIFEST).is_file():
        return {name: rows(folder) for name, folder in found.items()}
    return {"": rows(root)}


def scan(folder: Path, root: Path, files: Sequence[Path] | None = None) -> list[Row]:
    """Rows of a folder without manifest: every picture under it, its .txt captions, its class folder as label.

    The first folder below `folder` is the class where every picture lies in one. `files`: these instead of pictures.
    """
    files = list(_pictures(folder)) if files is None else list(files)
    for path in files:
        inside(root, folder, path.relative_to(folder).as_posix())
    has_classes = bool(files) and all(len(p.relative_to(folder).parts) > 1 for p in files)
    rows = []
    for path in files:
        label = path.relative_to(folder).parts[0] if has_classes else None
        beside = path.with_suffix(".txt")
        given = _lines(inside(root, folder, beside.relative_to(folder).as_posix())) if beside.is_file() else None
        captions, problem = _captions(given)
        key = path.relative_to(root).as_posix()
        rows.append(Row(key=key, path=path, captions=captions, label=label, problem=problem))
    return rows


def _pictures(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield Path(where) / name


def _lines(file: Path) -> list[str]:
    # captions come from everywhere; a stray byte should cost a character, not the row
    return [line for line in file.read_bytes().decode("utf-8", errors="replace").split("\n") if line.strip()]


def _captions(given: list[str] | None) -> tuple[tuple[str, ...], str]:
    """Cleaned captions and the problem. None = the row has none, which is legal; all empty is not."""
    if given is None:
        return (), ""
    cleaned = [text for text in map(clean_caption, given) if text]
    longest = max(map(len, cleaned), default=0)
    if longest > MAX_CAPTION:
        return (), f"a caption has {longest} characters; at most {MAX_CAPTION}"
    return tuple(dict.fromkeys(cleaned)), "" if cleaned else "the caption is empty"


# one line


def _parse(line: bytes, folder: Path, root: Path) -> Row:
    try:
        data = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise DataError(f"it must be a JSON object, not {type(data).__name__}")
    name = _text(data, "file_name")
    if name is None:
        raise DataError('it has no "file_name"')
    path = inside(root, folder, name)
    captions, problem = _captions(_caption_list(data))
    boxes = _numbers(data, "boxes", 4)
    box_labels = _list(data, "box_labels", _class, "whole numbers >= 0 or names")
    if box_labels is not None and len(box_labels) != len(boxes or ()):
        raise DataError(f"box_labels has {len(box_labels)} entries for {len(boxes or ())} boxes")
    source = _text(data, "image")
    frames = _list(data, "frames", lambda v: v if isinstance(v, str) else None, "file names") or ()
    normalised = data.get("normalised", False)
    if not isinstance(normalised, bool):
        raise DataError(f"normalised is {normalised!r}; give true or false")
    return Row(
        key=path.relative_to(root).as_posix(),
        path=path,
        captions=captions,
        label=None if data.get("label") is None else _label(data["label"]),
        boxes=boxes,
        box_labels=box_labels,
        keypoints=_numbers(data, "keypoints", 3),
        normalised=normalised,
        image=inside(root, folder, source) if source is not None else None,
        frames=tuple(inside(root, folder, f) for f in frames),
        sha256=(_text(data, "sha256") or "").lower(),
        problem=problem,
    )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _text(data: dict[str, Any], name: str) -> str | None:
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{name} is {value!r}; give a string")
    return value


def _caption_list(data: dict[str, Any]) -> list[str] | None:
    given = [data[name] for name in ("text", "caption", "captions") if data.get(name) is not None]
    if not given:
        return None
    flat = [text for value in given for text in (value if isinstance(value, list) else [value])]
    if not all(isinstance(text, str) for text in flat):
        raise DataError("captions must be strings, or a list of strings")
    return flat


def _class(value: Any) -> int | str | None:
    is_index = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if is_index or (isinstance(value, str) and value) else None


def _label(value: Any) -> int | str:
    found = _class(value)
    if found is None:
        raise DataError(f"label is {value!r}; give a whole number >= 0 or a class name")
    return found


def _list(data: dict[str, Any], name: str, take: Callable[[Any], Any], what: str) -> tuple[Any, ...] | None:
    value = data.get(name)
    if value is None:
        return None
    taken = [take(v) for v in value] if isinstance(value, list) else [None]
    if any(t is None for t in taken):
        raise DataError(f"{name} must be a list of {what}")
    return tuple(taken)


def _numbers(data: dict[str, Any], name: str, width: int) -> tuple[tuple[float, ...], ...] | None:
    def take(value: Any) -> tuple[float, ...] | None:
        if not isinstance(value, list) or len(value) != width:
            return None
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
            return None
        # JSON can still say 1e999 or a whole number that no float holds
        return tuple(float(v) if abs(v) < 1e30 else math.inf for v in value)

    return _list(data, name, take, f"lists of {width} numbers")
