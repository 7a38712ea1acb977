"""Which clips a folder holds, without opening a video: split folders, a manifest, class folders, captions, lists."""

from __future__ import annotations

import os
import re
from pathlib import Path

from condgen.data import _actions, video
from condgen.data._manifest import SHOWN, Row, inside, rows_by_split
from condgen.data.decode import SUFFIXES, read_header
from condgen.errors import DataError

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
PROBED = 32  # pictures looked at to tell frames from columns of frames


def all_splits(root: Path, train_list: str | None = None, test_list: str | None = None) -> dict[str, list[Row]]:
    """Split name -> rows; the one name "" where root has no split folders.

    train_list, test_list   text files that name the rows instead; see data/clips.py
    """
    everything = rows_by_split(root, lambda folder: _clips_below(folder, root))
    if train_list is None and test_list is None:
        return everything
    known = {row.key: row for rows in everything.values() for row in rows}
    if test_list is None:
        return {"": _listed(root, train_list or "", known)}
    test = _listed(root, test_list, known)
    held = {row.key for row in test}
    if train_list is None:
        return {"train": [row for row in known.values() if row.key not in held], "test": test}
    train = _listed(root, train_list, known)
    both = held & {row.key for row in train}
    if both:
        raise DataError(f"{len(both)} clips are in both {train_list} and {test_list}, such as {min(both)}")
    return {"train": train, "test": test}


def _listed(root: Path, name: str, known: dict[str, Row]) -> list[Row]:
    """The rows that a list names, one path below root a line, in its order. Raises DataError with the bad lines."""
    file = Path(name).expanduser()
    file = file if file.is_file() else root / name
    if not file.is_file():
        raise DataError(f"there is no list {name}, neither here nor in {root}")
    found: dict[str, Path] = {}
    wrong: list[str] = []
    for number, line in enumerate(file.read_bytes().decode("utf-8", errors="replace").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        bare = re.sub(r"\s+[0-9]+$", "", text)  # UCF-101's lists repeat the number of the class
        try:
            if ADDRESS.match(text):
                raise DataError(f"{text!r} is an address; only files below the data folder are read")
            path = inside(root, root, text)
            path = path if bare == text or path.exists() else inside(root, root, bare)
            if found.setdefault(path.relative_to(root).as_posix(), path) is not path:
                raise DataError(f"{text!r} is there twice")
        except DataError as error:
            wrong.append(f"line {number}: {error}")
    if wrong or not found:
        more = f"\n... and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        reason = f"has {len(wrong)} bad lines:\n" + "\n".join(wrong[:SHOWN]) + more if wrong else "names no clip"
        raise DataError(f"{file.name} {reason}")
    # one that is missing is a row all the same: the loader quarantines it
    return [known.get(key, Row(key=key, path=path)) for key, path in found.items()]


def _clips_below(folder: Path, root: Path) -> list[Path]:
    """Clip files, folders of frames, and pictures that are columns of frames, sorted."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        place = Path(where)
        shown = sorted(name for name in names if not name.startswith("."))
        clips = [name for name in shown if not name.lower().endswith(_actions.SUFFIX)]
        found += [place / name for name in clips if name.lower().endswith(video.CLIP_SUFFIXES)]
        stills = [
            place / name for name in shown if name.lower().endswith(SUFFIXES) and not name.lower().endswith(".gif")
        ]
        for link in (still for still in stills if still.is_symlink()):  # the others cannot leave the folder
            inside(root, place, link.name)
        if stills:
            found += stills if any(map(_is_column, stills[:PROBED])) else [place]
    return found


def _is_column(picture: Path) -> bool:
    try:
        header = read_header(picture)
    except (DataError, OSError):
        return False
    return header.height >= 2 * header.width and header.height % header.width == 0


def clips_in(row: Row) -> int:
    """Clips in the row's file: several in an array; a file that cannot be opened is one row, to be quarantined."""
    if row.path.suffix.lower() != ".npy":
        return 1
    try:
        return video.probe(row.path).clips
    except DataError:
        return 1
