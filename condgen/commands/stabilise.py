"""`condgen prepare stabilise IN OUT`: videos of a moving camera -> clips of a still one, which data=clips reads."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condgen.commands import arguments
from condgen.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from condgen.data._manifest import Row
    from condgen.data.stabilise import StabiliseOptions

FORMATS = {"mp4": ".mp4", "webm": ".webm", "avi": ".avi", "gif": ".gif", "png": "", "jpeg": ".jpg"}
SETTINGS, JOURNAL = "stabilise.json", "stabilise.jsonl"
STILL_FPS = 8.0  # of frames that have no time

EPILOG = """\
examples:
  condgen prepare stabilise videos/ clips/                      every video and folder of frames below videos/
  condgen prepare stabilise walk.mp4 clips/ --size 64 --format jpeg      VGAN's stacked frames
  condgen prepare stabilise videos/ clips/ --format png --frames 65 --feature-side 480
  condgen train task=video data=clips data.root=clips

Folders stay as they are: videos/beach/a.mp4 becomes clips/beach/a-000002.mp4, a-000035.mp4, ..., named by the frame
that the clip starts at; captions and actions go along. A clip ends after --frames, with the video, where the camera has
turned away, or where a frame cannot be matched; it is discarded then, or when it is short. The next starts after it.
Nothing is replaced: started again, the command goes on where it stopped. OUT/stabilise.jsonl says of each video which
clips came of it, how far the camera moved, and why others were discarded. A video that cannot be read or gives no clip
is reported, the rest goes on, and the exit code is 3. Clips of one video look alike: divide videos into train/ and
test/ folders before, so that none is in both.
"""


@dataclass(frozen=True)
class Source:
    """name: below IN, as it is reported. stem: of its clips, below OUT. clip: which one of an array."""

    name: str
    stem: Path
    row: Row
    clip: int


def main(words: Sequence[str]) -> int:
    parser = arguments.parser("prepare stabilise", "Clips of a still camera from videos of a moving one.", EPILOG)
    parser.add_argument("source", metavar="IN", help="a video, a folder of frames, or a folder of these")
    parser.add_argument("out", metavar="OUT", help="a new folder, or one that this command has begun")
    parser.add_argument("--format", default="mp4", choices=tuple(FORMATS), help="of the clips (mp4)")
    parser.add_argument("--lossless", action="store_true", help="every pixel comes back, for mp4 and webm")
    parser.add_argument("--fps", type=float, default=0.0, help="of the clips (0 = that of the video)")
    parser.add_argument("--size", type=int, default=128, help="pixels of a side, cut from the centre (128)")
    parser.add_argument("--frames", type=int, default=33, help="of a clip at most (33)")
    parser.add_argument("--min-frames", type=int, default=16, help="shorter clips are discarded (16)")
    parser.add_argument("--skip", type=int, default=2, help="frames at the start of each video to leave out (2)")
    parser.add_argument(
        "--keep-before-failure", action="store_true", help="keep long enough clips that end where a frame has no match"
    )
    parser.add_argument("--ratio", type=float, default=0.7, help="of the ratio test (0.7)")
    parser.add_argument("--min-matches", type=int, default=10, help="that agree with one motion (10)")
    parser.add_argument("--threshold", type=float, default=5.0, help="of RANSAC, in pixels of the video (5)")
    parser.add_argument("--features", type=int, default=2000, help="in a frame at most (2000)")
    parser.add_argument("--feature-side", type=int, default=0, help="shrink to find features, faster (0 = full size)")
    parser.add_argument("--seed", type=int, default=0, help="of RANSAC (0)")
    given = parser.parse_args(words)
    if given.skip < 0 or not 0 <= given.fps <= 240:
        raise ConfigError(f"--skip {given.skip} --fps {given.fps}: --skip is at least 0, --fps lies in 0..240")
    if given.lossless and given.format in ("gif", "jpeg"):
        raise ConfigError(f"--lossless --format {given.format}: choose png, avi, mp4 or webm")
    return run(given, Path(given.source), Path(given.out))


def run(given: Any, source: Path, out: Path) -> int:
    from condgen.commands.translate import Progress
    from condgen.data.stabilise import StabiliseOptions
    from condgen.disk import Appender

    options = StabiliseOptions(**{name: getattr(given, name) for name in StabiliseOptions.__dataclass_fields__})
    sources = planned(source, out, dotless=given.format == "png")
    _settings(out, {"format": given.format, "lossless": given.lossless, "fps": given.fps, "skip": given.skip,
                    **asdict(options)})  # fmt: skip
    records = _journal(out)
    journal, progress, known = Appender(out / JOURNAL), Progress("videos", len(sources)), 0
    for at, one in enumerate(sources, start=1):
        record = records.get(one.name)
        if record is not None and record["file"] == _identity(one) and all((out / c).exists() for c in record["clips"]):
            known += 1
            continue
        records[one.name] = _one(one, out, options, given)
        journal.line(json.dumps(records[one.name]))
        progress(at)
    used = [records[one.name] for one in sources]
    _manifests(source, out, sources, records)
    return _summary(used, known, out)


# what there is to do


def planned(source: Path, out: Path, *, dotless: bool = False) -> list[Source]:
    """Everything below IN that is a clip. Raises DataError where there is none.

    dotless  folders of frames are named without dots, which would look like suffixes
    """
    from condgen.data._clip_files import all_splits, clips_in
    from condgen.data._manifest import Row

    if not source.exists():
        raise DataError(f"there is no {source}")
    rows = [row for found in all_splits(source).values() for row in found] if source.is_dir() else []
    if source.is_file() or [row.path for row in rows] == [source]:  # one video, or one folder of frames
        rows = [Row(key=source.resolve().name, path=source)]
    inside = Path(os.path.realpath(out))
    rows = [row for row in rows if not Path(os.path.realpath(row.path)).is_relative_to(inside)]
    if not rows:
        raise DataError(f"{source}: no videos or frames there")

    def stem(row: Row, whole: bool) -> Path:
        name = Path(row.key)
        base = name.name if whole or row.path.is_dir() else name.stem
        return name.with_name(base.replace(".", "_") if dotless else base)

    taken = Counter(stem(row, False) for row in rows)
    found = []
    for row in rows:
        clips = clips_in(row)
        # a.mp4 and a.avi of one folder become a.mp4-000002 and a.avi-000002
        base = stem(row, taken[stem(row, False)] > 1)
        for number in range(clips):
            several = f"#{number}" if clips > 1 else ""
            found.append(Source(row.key + several, base.with_name(base.name + several.replace("#", "-")), row, number))
    return found


def _settings(out: Path, settings: dict[str, Any]) -> None:
    """Notes what OUT is made with. ConfigError where it holds anything else: it would be taken as done."""
    from condgen.disk import from_json, replace_file, to_json

    file = out / SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        known = from_json(file.read_bytes()) if file.is_file() else None
        if known is None and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty and was not begun by this command; give a new folder")
        if known not in (None, settings):
            raise ConfigError(f"{out} holds clips made with {known}, not {settings}; give another folder")
        replace_file(file, to_json(settings))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use {file}: {error}; give another folder") from error


def _journal(out: Path) -> dict[str, dict[str, Any]]:
    """Name of a source -> its last record; half a line, left by a crash, is passed over."""
    found = {}
    file = out / JOURNAL
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
            found[str(record["source"])] = {**record, "clips": list(record["clips"]), "file": list(record["file"])}
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _identity(source: Source) -> list[int]:
    """Size and time of the file, or of all frames of a folder: a video that was mended is done again."""
    path = source.row.path
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [file.stat() for file in files if file.exists()]
    return [sum(f.st_size for f in facts), max((f.st_mtime_ns for f in facts), default=0), len(facts)]


# one video


def _one(source: Source, out: Path, options: StabiliseOptions, given: Any) -> dict[str, Any]:
    """Writes the clips of one video and returns its line of the journal."""
    from condgen.data import video
    from condgen.data._actions import rows_of

    record: dict[str, Any] = {"source": source.name, "file": _identity(source), "clips": [], "discarded": [],
                              "moved": [], "problem": ""}  # fmt: skip
    try:
        if source.row.problem:
            raise DataError(source.row.problem)
        fps = given.fps or video.probe(source.row.path).fps or STILL_FPS
        frames = video.read_frames(source.row.path, start=given.skip, clip=source.clip)
        for start, target, made in _clips(source, frames, out, options, given):
            if made is not None and made.problem:
                record["discarded"].append(f"frame {start}: {made.problem}")
                continue
            actions = rows_of(source.row.path, source.clip, start, len(made.frames)) if made is not None else None
            record["clips"].append(target.relative_to(out).as_posix())
            if made is not None:
                record["moved"].append(round(made.camera_moved(), 1))
                fps = min(fps, 50.0 if given.format == "gif" else 240.0)
                _write(target, made.frames, source.row, actions, fps, given)
    except DataError as error:
        record["problem"] = str(error)
    except OSError as error:
        raise ConfigError(
            f"cannot write {out}: {error.strerror or error}; free space or give another folder"
        ) from error
    if not record["clips"] and not record["problem"]:
        record["problem"] = "it gives no clip; " + (record["discarded"] or ["it ends before the first frame"])[0]
    return record


def _clips(
    source: Source, frames: Iterator[Tensor], out: Path, options: StabiliseOptions, given: Any
) -> Iterator[tuple[int, Path, Any]]:
    """(first frame, target, StableClip) one after the other; None for a clip that is there from an earlier start."""
    from condgen.data import video
    from condgen.data.stabilise import stabilise

    at, first = given.skip, next(frames, None)
    while first is not None:
        target = out / source.stem.with_name(f"{source.stem.name}-{at:06d}{FORMATS[given.format]}")
        if target.exists():
            length = sum(1 for _ in video.read_frames(target))
            first = next(itertools.islice(frames, length - 1, None), None)
            yield at, target, None
        else:
            made = stabilise(first, frames, options)
            first, length = made.next, len(made.frames)
            yield at, target, made
        at += length


def _write(
    target: Path, frames: Sequence[Tensor], row: Row, actions: np.ndarray | None, fps: float, given: Any
) -> None:
    """The clip last: it is there only with what belongs to it."""
    import numpy as np

    from condgen.data._actions import SUFFIX
    from condgen.disk import replace_file
    from condgen.show.clips import write_clip, write_column

    target.parent.mkdir(parents=True, exist_ok=True)
    if row.captions:
        replace_file(target.with_suffix(".txt"), ("\n".join(row.captions) + "\n").encode())
    if actions is not None:
        name = target.name if given.format == "png" else target.stem
        held = io.BytesIO()
        np.save(held, actions, allow_pickle=False)
        replace_file(target.with_name(name + SUFFIX), held.getvalue())
    if given.format == "jpeg":
        write_column(target, frames)
    else:
        write_clip(target, frames, fps=fps, lossless=given.lossless)


# the end


def _manifests(source: Path, out: Path, sources: Sequence[Source], records: dict[str, dict[str, Any]]) -> None:
    """Where IN has a metadata.jsonl, OUT gets one at the same place with the clips of each row."""
    from condgen.data._manifest import MANIFEST
    from condgen.disk import replace_file

    folders = {source / Path(*Path(one.row.key).parts[:depth]) for one in sources for depth in (0, 1)}
    for folder in sorted(folder for folder in folders if source.is_dir() and (folder / MANIFEST).is_file()):
        place = folder.relative_to(source)
        lines = []
        for one in (one for one in sources if Path(one.row.key).is_relative_to(place)):
            facts = {"captions": list(one.row.captions), "label": one.row.label}
            kept = {name: value for name, value in facts.items() if value not in ([], None)}
            names = [Path(clip).relative_to(place).as_posix() for clip in records[one.name]["clips"]]
            lines += [json.dumps({"file_name": name, **kept}) + "\n" for name in names]
        (out / place).mkdir(parents=True, exist_ok=True)
        replace_file(out / place / MANIFEST, "".join(lines).encode())


def _summary(records: Sequence[dict[str, Any]], known: int, out: Path) -> int:
    clips = sum(len(record["clips"]) for record in records)
    discarded = [reason for record in records for reason in record["discarded"]]
    failed = [record for record in records if record["problem"]]
    for record in failed:
        print(f"quarantined: {record['source']}: {record['problem']}", file=sys.stderr)
    far = max((moved for record in records for moved in record["moved"]), default=0.0)
    print(
        f"{clips} clips of {len(records)} videos ({known} done before), {len(discarded)} tries discarded, "
        f"{len(failed)} videos quarantined: {out}"
    )
    print(f"the camera moved by up to {far:.0f} pixels; {out / JOURNAL} has each video with its reasons")
    return DataError.exit_code if failed else 0
