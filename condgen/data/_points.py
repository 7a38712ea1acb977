"""Files of points and of captions beside pictures, as people have them: .npz, .json, .csv, .tsv."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condgen.data._captions import clean
from condgen.errors import DataError

ARRAYS = ("xy", "keypoints", "joints", "landmarks", "points")
NAMES = ("names", "joint_names", "keypoint_names")
FILES = ("files", "file_names", "filenames")


@dataclass(frozen=True)
class PointTable:
    """Names of the points ((), where unknown), how many, and picture -> float (K, 3): x, y, visible."""

    names: tuple[str, ...]
    count: int
    rows: dict[str, Tensor]


def read_points(file: Path, pictures: Mapping[str, Sequence[str]]) -> PointTable:
    """pictures: split name -> paths below root, as keys of the table. Raises DataError."""
    try:
        made = {".npz": _from_npz, ".json": _from_json, ".csv": _from_csv}[file.suffix.lower()](file, pictures)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise DataError(f"{file.name} cannot be read as a file of points ({error})") from error
    if made.names and len(made.names) != made.count:
        raise DataError(f"{file.name} has {len(made.names)} names for {made.count} points")
    return made


def _from_npz(file: Path, pictures: Mapping[str, Sequence[str]]) -> PointTable:
    with np.load(file, allow_pickle=False) as held:
        names = next((tuple(map(str, held[n])) for n in NAMES if n in held), ())
        rows: dict[str, Tensor] = {}
        for split, paths in pictures.items():
            prefixes = [f"{split}_"] if split else [""]
            prefixes += ["train_"] if not split else []
            key = next((p + n for p in prefixes for n in ARRAYS if p + n in held), None)
            if key is None:
                if split:
                    continue
                raise DataError(f"{file.name} holds {', '.join(held)}; the points must be called one of {ARRAYS}")
            listed = next((held[p + n] for p in prefixes for n in FILES if p + n in held), None)
            files = _placed(map(str, listed), pictures) if listed is not None else list(paths)
            array = held[key]
            if array.ndim != 3 or array.shape[-1] not in (2, 3) or len(array) != len(files):
                raise DataError(
                    f"{file.name}: {key} has shape {array.shape}; give (N, K, 2) or (N, K, 3) for "
                    f"{len(files)} pictures of {split or 'the folder'}"
                )
            rows |= {name: _triples(points) for name, points in zip(files, array, strict=True)}
    return _table(file, names, rows)


def _from_json(file: Path, pictures: Mapping[str, Sequence[str]]) -> PointTable:
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise DataError(f"{file.name} must hold an object: picture -> points")
    names = tuple(map(str, data.get("names", ()))) if isinstance(data.get("points"), dict) else ()
    listed = data["points"] if isinstance(data.get("points"), dict) else data
    if not names:
        named = [list(points) for points in listed.values() if isinstance(points, dict)]
        names = tuple(dict.fromkeys(name for one in named for name in one))
    rows = {}
    for key, (name, points) in zip(_placed(listed, pictures), listed.items(), strict=True):
        if isinstance(points, dict):
            unknown = set(points) - set(names)
            if unknown:
                raise DataError(f"{file.name}: {name} has a point {min(unknown)!r}, which names does not list")
            points = [points.get(one) for one in names]
        try:
            rows[key] = torch.tensor([_triple(point) for point in points], dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise DataError(f"{file.name}: {name}: a point is [x, y], [x, y, visible] or null") from error
    return _table(file, names, rows)


def _from_csv(file: Path, pictures: Mapping[str, Sequence[str]]) -> PointTable:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        lines = [line for line in csv.reader(opened) if line]
    header, body = lines[0] if lines else [], lines[1:]
    kinds = [cell.strip().lower()[-2:] for cell in header[1:]]
    step = 3 if kinds[:3] == ["_x", "_y", "_v"] else 2
    if len(header) < 3 or (len(header) - 1) % step:
        raise DataError(f"{file.name}: the first line must be file, then NAME_x, NAME_y (and NAME_v) of each point")
    named = kinds == ["_x", "_y", "_v"][:step] * (len(kinds) // step)
    names = tuple(cell.strip()[:-2] for cell in header[1::step]) if named else ()
    rows = {}
    for number, (key, line) in enumerate(zip(_placed((one[0] for one in body), pictures), body, strict=True), 2):
        if len(line) != len(header):
            raise DataError(f"{file.name} line {number} has {len(line)} cells; the first line has {len(header)}")
        try:
            cells = [float(cell) if cell.strip() else None for cell in line[1:]]
        except ValueError as error:
            raise DataError(f"{file.name} line {number}: {error}") from error
        points = [cells[i : i + step] for i in range(0, len(cells), step)]
        rows[key] = torch.tensor([_triple(None if None in one else one) for one in points], dtype=torch.float32)
    return _table(file, names, rows)


def _triple(point: Any) -> list[float]:
    if point is None:
        return [0.0, 0.0, 0.0]
    if len(point) not in (2, 3):
        raise ValueError("two or three numbers")
    return [float(point[0]), float(point[1]), 1.0 if len(point) == 2 else float(point[2])]


def _triples(points: np.ndarray) -> Tensor:
    """(K, 2) or (K, 3) -> (K, 3); a point with NaN is not visible."""
    xy = torch.from_numpy(points[:, :2].astype(np.float32))
    seen = torch.from_numpy(points[:, 2].astype(np.float32)) if points.shape[1] == 3 else torch.ones(len(xy))
    seen = torch.where(torch.isfinite(xy).all(1), seen, torch.zeros(()))
    return torch.cat([xy.nan_to_num(0, 0, 0), seen[:, None]], dim=1)


def _placed(names: Iterable[Any], pictures: Mapping[str, Sequence[str]]) -> list[str]:
    """Names as a file writes them -> paths below root: as they are, or by their last part where that is unique."""
    paths = [path for listed in pictures.values() for path in listed]
    known = set(paths)
    last: dict[str, str] = {}
    for path in paths:
        short = path.rsplit("/", 1)[-1]
        last[short] = "" if short in last else path
    return [name if name in known else last.get(name.rsplit("/", 1)[-1]) or name for name in map(str, names)]


def _table(file: Path, names: tuple[str, ...], rows: dict[str, Tensor]) -> PointTable:
    counts = {len(points) for points in rows.values()}
    if len(counts) != 1:
        raise DataError(f"{file.name}: every picture needs the same number of points; found {sorted(counts)[:5]}")
    return PointTable(names, counts.pop(), rows)


def read_captions(file: Path, pictures: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Picture -> sentences, of a .json object or a .tsv (or .csv) file of lines file, caption. Raises DataError."""
    try:
        if file.suffix.lower() == ".json":
            data = json.loads(file.read_text(encoding="utf-8"))
            pairs = [(k, one) for k, v in data.items() for one in ([v] if isinstance(v, str) else v)]
        else:
            mark = "\t" if file.suffix.lower() == ".tsv" else ","
            with file.open(encoding="utf-8-sig", newline="") as opened:
                pairs = [(line[0], line[1]) for line in csv.reader(opened, delimiter=mark) if line]
    except (OSError, ValueError, IndexError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{file.name} cannot be read as captions ({error}); give file and caption") from error
    found: dict[str, list[str]] = {}
    for name, (_, text) in zip(_placed((name for name, _ in pairs), pictures), pairs, strict=True):
        sentence = clean(str(text))
        if sentence:
            found.setdefault(name, []).append(sentence)
    return found
