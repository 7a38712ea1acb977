"""Reads a whole data set before training does, and says what is wrong with it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from statistics import median

from torch import Tensor

from condgen.data.base import RowDataset, collate, expect_row, too_many_bad
from condgen.errors import CondgenError, DataError
from condgen.types import FIELDS, Sample

SHOWN = 5
_SAMPLE_FIELDS = {"text": "caption"}  # where a field of Condition has another name in Sample


@dataclass
class Report:
    """What `check` found. `str(report)` is the text for people; `exit_code` is 0, or 3 when too many rows are bad.

    rows        rows of the data set; `read` of them were looked at
    bad         key -> reason, of rows that cannot be used
    duplicates  groups of keys whose pictures are equal in every pixel
    leaks       (key here, key in `other`) with the same key or the same pixels
    present     condition field -> rows that have it
    labels      label -> rows
    sizes       text such as "uint8 3x64x64" -> rows
    caption_lengths  characters of each caption
    """

    name: str
    rows: int
    read: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    duplicates: list[list[str]] = field(default_factory=list)
    leaks: list[tuple[str, str]] = field(default_factory=list)
    present: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    caption_lengths: list[int] = field(default_factory=list)
    label_names: tuple[str, ...] = ()

    @property
    def good(self) -> int:
        return self.read - len(self.bad)

    @property
    def exit_code(self) -> int:
        return DataError.exit_code if self.read == 0 or too_many_bad(len(self.bad), self.read) else 0

    def reasons(self) -> list[tuple[str, int, str]]:
        """(reason, rows, one key) with the most frequent first; numbers and names inside a reason do not count."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for key, reason in self.bad.items():
            groups.setdefault(_family(reason, key), []).append((reason.replace(f"{key}: ", ""), key))
        ordered = sorted(groups.values(), key=len, reverse=True)
        return [(found[0][0], len(found), found[0][1]) for found in ordered]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.read} of {self.rows} rows read, {self.good} good, {len(self.bad)} bad"]
        for reason, count, key in self.reasons()[:SHOWN]:
            lines.append(f"  bad       {count} x {reason} (such as {key})")
        lines += [f"  target    {count} x {kind}" for kind, count in self.sizes.most_common(SHOWN)]
        for name, count in self.present.items():
            lines.append(f"  {name:<9} in {count} of {self.good} rows")
        if self.caption_lengths:
            lengths = self.caption_lengths
            lines.append(
                f"  captions  {min(lengths)} / {median(lengths):g} / {max(lengths)} characters (least/median/most)"
            )
        if self.labels:
            lines += self._label_lines()
        if self.duplicates:
            extra = sum(len(keys) - 1 for keys in self.duplicates)
            lines.append(
                f"  twice     {extra} pictures repeat another one, such as {' = '.join(self.duplicates[0][:3])}"
            )
        if self.leaks:
            here, there = self.leaks[0]
            lines.append(f"  LEAK      {len(self.leaks)} rows are also in the other split, such as {here} = {there}")
        if self.exit_code:
            lines.append("  TOO MANY BAD ROWS: training would stop. Repair or remove them")
        return "\n".join(lines)

    def _label_lines(self) -> list[str]:
        def shown(label: int) -> str:
            return self.label_names[label] if label < len(self.label_names) else str(label)

        common = self.labels.most_common()
        lines = [f"  labels    {len(common)} classes, {common[-1][1]}..{common[0][1]} rows each"]
        lines.append("            " + ", ".join(f"{shown(label)} {count}" for label, count in common[:SHOWN]))
        empty = [name for i, name in enumerate(self.label_names) if i not in self.labels]
        if empty:
            lines.append(f"            without rows: {', '.join(empty[:SHOWN])}{' ...' if len(empty) > SHOWN else ''}")
        return lines


def check(data: RowDataset, limit: int | None = None, *, other: RowDataset | None = None, name: str = "") -> Report:
    """Reads every row without augmentation, or `limit` rows spread evenly.

    `other` is another split of the same data: rows that are in both, by key or by pixels, are leaks.
    Never raises for a bad row; a data set that cannot be built raises before it comes here.
    """
    report = Report(name or type(data).__name__, len(data))
    spec = data.provides.label
    report.label_names = spec.names if spec is not None else ()
    pixels: dict[bytes, list[str]] = {}
    for index in _spread(len(data), limit):
        report.read += 1
        key = data.key(index)
        try:
            data.verify(index)
            sample = data.sample(index, None)
            _check_row(data, sample)
        except (CondgenError, ValueError, TypeError) as error:
            report.bad[key] = str(error)
            continue
        pixels.setdefault(_digest(sample.target), []).append(key)
        _count(report, sample)
    report.duplicates = [keys for keys in pixels.values() if len(keys) > 1]
    if other is not None:
        report.leaks = _leaks(pixels, other, limit)
    return report


def _check_row(data: RowDataset, sample: Sample) -> None:
    """Shapes, ranges and labels of one row. Raises DataError (ShapeError)."""
    expect_row(data, sample)
    points, value = data.provides.keypoints, sample.keypoints
    if points is not None and value is not None and tuple(value.shape) != (points.num_points, 2):
        raise DataError(f"keypoints has shape {tuple(value.shape)}; the data set says {(points.num_points, 2)}")
    # a field that this row lacks is legal, and collating it alone could not tell its shape
    given = [name for name in FIELDS if getattr(sample, _SAMPLE_FIELDS.get(name, name)) is not None]
    batch = collate([sample], data.provides.only(given)).as_float()
    batch.condition.check_values()
    text = batch.condition.text
    if text is not None and text.strings is not None and not text.strings[0].strip():
        raise DataError("the caption is empty")


def _count(report: Report, sample: Sample) -> None:
    shape = "x".join(str(s) for s in sample.target.shape)
    report.sizes[f"{str(sample.target.dtype).removeprefix('torch.')} {shape}"] += 1
    for name in FIELDS:
        if getattr(sample, _SAMPLE_FIELDS.get(name, name)) is not None:
            report.present[name] += 1
    if sample.label is not None:
        report.labels[sample.label] += 1
    if sample.caption is not None:
        report.caption_lengths += [len(text) for text in sample.caption.split("\n")]


def _leaks(pixels: dict[bytes, list[str]], other: RowDataset, limit: int | None) -> list[tuple[str, str]]:
    keys = {key for group in pixels.values() for key in group}
    found = []
    for index in _spread(len(other), limit):
        theirs = other.key(index)
        if theirs in keys:
            found.append((theirs, theirs))
            continue
        try:
            same = pixels.get(_digest(other.sample(index, None).target))
        except DataError:
            continue  # a bad row of the other split is that split's report
        if same:
            found.append((same[0], theirs))
    return found


def _spread(rows: int, limit: int | None) -> list[int]:
    if limit is None or limit >= rows:
        return list(range(rows))
    return [i * rows // limit for i in range(max(limit, 0))]


def _digest(pixels: Tensor) -> bytes:
    head = f"{pixels.dtype}{tuple(pixels.shape)}".encode()
    return hashlib.blake2b(head + pixels.contiguous().numpy().tobytes(), digest_size=16).digest()


def _family(reason: str, key: str) -> str:
    """A reason without what differs from row to row."""
    return re.sub(r"'[^']*'|\d+(\.\d+)?", "#", reason.replace(key, ""))
