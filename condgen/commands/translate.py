"""`condgen translate RUN IN -o OUT`: a file, a folder or a glob of pictures of any size, names kept; or a video."""

from __future__ import annotations

import glob
import io
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condgen.commands import arguments
from condgen.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from condgen.pipeline import Pipeline

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
CLIPS = (".mp4", ".webm", ".gif", ".avi")  # what a video is written as
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv")
RECORD = "translate.json"
SHOW_SECONDS = 10.0

EPILOG = """\
examples:
  condgen translate runs/NAME photo.jpg -o drawing.png
  condgen translate runs/NAME photos/ -o out/          goes on where it stopped: finished files are skipped
  condgen translate runs/NAME "photos/*.jpg" -o out/ --batch-size 16 --precision bf16
  condgen translate runs/NAME clip.mp4 -o drawn.mp4      frame by frame, the same rate; a new folder gets PNG frames

Any size: pictures are padded to what the network takes and cut back (up to 4 megapixels), or worked on in tiles of
the trained size that overlap by half and are blended (--fit tile). --fit stretch resizes to the trained size and back.
Transparency is laid on the background of the training (white) and EXIF orientation is applied. A run that was trained
with data.source_classes reads class numbers here too. A file that cannot be read is reported, the rest goes on, and
the exit code is 3. All frames of a video get the same noise, so that it does not flicker; its sound is left out.
"""


def main(words: Sequence[str]) -> int:
    parser = arguments.parser("translate", "Translate pictures with a trained run.", EPILOG)
    parser.add_argument("run", help="a run folder, an export folder, or owner/name on the Hugging Face Hub")
    parser.add_argument(
        "source", metavar="IN", help="a picture, a folder (with its subfolders), a quoted glob or a video"
    )
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT", help="a folder, or a file for one picture or video"
    )
    parser.add_argument("--fit", default="auto", choices=("auto", "pad", "tile", "stretch"), help="other sizes (auto)")
    parser.add_argument("--format", default="png", choices=[s[1:] for s in SUFFIXES], help="of a folder's files (png)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures (0)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="fp16 needs a GPU (fp32)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--overwrite", action="store_true", help="translate again what is already there")
    given = parser.parse_args(words)
    if given.batch_size < 1:
        raise ConfigError(f"--batch-size {given.batch_size}: give at least 1")
    out = Path(given.out)
    if _is_video(Path(given.source), out):
        return _translate_video(given, Path(given.source), out)
    jobs, folder = planned(given.source, out, f".{given.format}")
    todo = [job for job in jobs if given.overwrite or not job[1].exists()]
    pipe = _load(given)
    if folder:
        _record(out, pipe, given)
    failed = _run(pipe, todo, given)
    for name, reason in failed:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    done = len(todo) - len(failed)
    print(f"{done} translated, {len(jobs) - len(todo)} already there, {len(failed)} failed: {out}")
    return DataError.exit_code if failed else 0


def _load(given: Any) -> Pipeline:
    import condgen
    from condgen.inference.sample import sampling

    pipe = condgen.load(given.run, device=given.device, precision=given.precision)
    if pipe.spec.image is None:
        raise ConfigError(f"{given.run} was trained with {', '.join(pipe.spec.given) or 'no condition'}, not pictures")
    with sampling(pipe.system, given.precision):  # says now what the device cannot do
        return pipe


Job = tuple[str, Path, Path]
"""(name, target file, source file)"""


def planned(source: str, out: Path, suffix: str) -> tuple[list[Job], bool]:
    """Every picture with the file that it becomes, and whether OUT is a folder. Raises DataError and ConfigError."""
    found, base = _inputs(source, out)
    if Path(source).is_file() and out.suffix.lower() in SUFFIXES and not out.is_dir():
        if out.resolve() == found[0].resolve():
            raise ConfigError(f"-o {out} is the source itself; give another file")
        return [(found[0].name, out, found[0])], False
    if out.suffix.lower() in (*SUFFIXES, *CLIPS) or out.is_file():
        raise ConfigError(f"-o {out}: {len(found)} pictures need a folder")
    names = [path.relative_to(base) for path in found]
    taken = Counter(name.with_suffix("").as_posix() for name in names)
    jobs = []
    for path, name in zip(found, names, strict=True):
        single = taken[name.with_suffix("").as_posix()] == 1
        # a.jpg and a.png of one folder become a.jpg.png and a.png.png
        target = out / (name.with_suffix(suffix) if single else name.with_name(name.name + suffix))
        if os.path.realpath(target) == os.path.realpath(path):
            raise ConfigError(f"{target} would replace its source; give another folder with -o")
        jobs.append((name.as_posix(), target, path))
    return jobs, True


def _inputs(source: str, out: Path) -> tuple[list[Path], Path]:
    """Pictures by suffix, sorted, and the folder that their names are relative to. What lies in OUT is left out."""
    from condgen.data.decode import SUFFIXES as READABLE

    path = Path(source)
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix.lower() in READABLE and _is_file(p)]
        base = path
    else:
        base, found = _globbed(path)
    inside = os.path.realpath(out)  # a link in a circle has no other kind of resolution
    found = sorted(p for p in found if inside not in (real := os.path.realpath(p), *map(str, Path(real).parents)))
    if not found:
        raise DataError(f"{source}: no pictures there ({', '.join(READABLE)}); quote a glob so that it arrives whole")
    return found, base


def _is_file(path: Path) -> bool:
    """A file, or a link without one, which is then reported as failed."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _globbed(path: Path) -> tuple[Path, list[Path]]:
    """The folder before the first wildcard, and what matches. `**` does not follow links, which may go in circles."""
    plain = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    base, rest = Path(*plain), list(path.parts[len(plain) :])
    if not rest:
        return base, [path] if path.is_symlink() else []
    rest += ["*"] if rest[-1] == "**" else []
    hidden = any(part.startswith(".") for part in rest)
    try:
        found = [p for p in base.glob("/".join(rest)) if _is_file(p)]
    except ValueError as error:
        raise ConfigError(f"{path} is no glob that can be read: {error}") from error
    return base, [p for p in found if hidden or not any(x.startswith(".") for x in p.relative_to(base).parts)]


def _record(out: Path, pipe: Pipeline, given: Any) -> None:
    """Notes what OUT is made with. ConfigError where its pictures were made otherwise: they would be taken as done."""
    from condgen.disk import from_json, replace_file, to_json

    record = {
        "run": str(given.run), "step": pipe.info.step, "seed": given.seed, "fit": given.fit,
        "precision": given.precision,
    }  # fmt: skip
    file = out / RECORD
    try:
        out.mkdir(parents=True, exist_ok=True)
        known = from_json(file.read_bytes()) if file.is_file() and not given.overwrite else record
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use {file}: {error}; choose another folder with -o") from error
    if known != record:
        raise ConfigError(f"{out} holds pictures made with {known}, not {record}; use another folder, or --overwrite")
    replace_file(file, to_json(record))


def _run(pipe: Pipeline, todo: Sequence[Job], given: Any) -> list[tuple[str, str]]:
    """Translates in batches; returns what failed and why. Nothing is half written."""
    from condgen.rng import derive

    failed: list[tuple[str, str]] = []
    progress = Progress("pictures", len(todo))
    for at, part in _batches(pipe, todo, given.batch_size, failed):
        ids = [derive("translate", job[0]) for job, _ in part]
        made = _translated(pipe, [pixels for _, pixels in part], ids, given)
        for ((_, target, _), _), pixels in zip(part, made, strict=True):
            _save(target, pixels)
        progress(at)
    return failed


def _translated(pipe: Pipeline, pictures: Sequence[Tensor], ids: Sequence[int], given: Any) -> list[Tensor]:
    from condgen.inference.translate import translate
    from condgen.types import Condition, Image

    def asked(pixels: Tensor) -> Condition:
        return pipe.encode(pipe.condition({}, Condition(image=Image(pixels))))

    return translate(
        pipe.system, pictures, ids, fit=given.fit, seed=given.seed, batch_size=given.batch_size,
        precision=given.precision, asked=asked,
    )  # fmt: skip


def _batches(
    pipe: Pipeline, todo: Sequence[Job], most: int, failed: list[tuple[str, str]]
) -> Iterator[tuple[int, list[tuple[Job, Tensor]]]]:
    """(jobs looked at so far, up to `most` of them with their pixels); fewer where pictures are large."""
    from condgen.inference.translate import LARGEST_WHOLE

    part: list[tuple[Job, Tensor]] = []
    for at, job in enumerate(todo, start=1):
        try:
            part.append((job, _read(pipe, job[2])))
        except (DataError, OSError) as error:
            failed.append((job[0], str(error)))
        if len(part) == most or sum(pixels[0].numel() for _, pixels in part) > 2 * LARGEST_WHOLE:
            yield at, part
            part = []
    yield len(todo), part


def _read(pipe: Pipeline, path: Path) -> Tensor:
    """The picture as the training read it, float in [-1, 1]."""
    from condgen.data.decode import decode_classes, decode_image
    from condgen.pixels import pixels_to_float

    spec, background = pipe.spec.image, pipe.info.data.get("background", 255)
    assert spec is not None
    if spec.classes:
        return pixels_to_float(decode_classes(path, spec.classes))
    behind = min(max(background, 0), 255) if isinstance(background, int) else 255
    return pixels_to_float(decode_image(path, channels=spec.channels, background=behind))


class Progress:
    """A line on the screen while it goes on; every few seconds where the screen is a file."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total = what, total
        self.began = self.shown = time.monotonic()

    def __call__(self, at: int) -> None:
        now, alive = time.monotonic(), sys.stderr.isatty()
        if not at or not (alive or now - self.shown > SHOW_SECONDS):
            return
        share = f"/{self.total}  {100 * at // self.total}%" if self.total else ""
        rate = f"{at / max(now - self.began, 1e-9):.1f} {self.what}/s"
        end = "\r" if alive and at != self.total else "\n"
        print(f"{at}{share}  {rate}", end=end, file=sys.stderr, flush=True)
        self.shown = now


# video


def _is_video(source: Path, out: Path) -> bool:
    """By the suffixes: a GIF is a video where it is to become one."""
    suffix = source.suffix.lower()
    return source.is_file() and (suffix in VIDEOS or (suffix == ".gif" and out.suffix.lower() in CLIPS))


def _translate_video(given: Any, source: Path, out: Path) -> int:
    """Frame by frame in batches; OUT appears when it is whole."""
    from condgen.data.video import probe
    from condgen.show.clips import write_clip

    suffix = out.suffix.lower()
    if suffix and suffix not in CLIPS:
        raise ConfigError(
            f"-o {out}: a video becomes {', '.join(CLIPS)}, or without a suffix a new folder of PNG frames"
        )
    if out.resolve() == source.resolve():
        raise ConfigError(f"-o {out} is the source itself; give another file")
    if out.is_dir():
        raise ConfigError(f"-o {out} is a folder that is there; give a new one, or {out / source.stem}.mp4")
    if out.is_file() and not suffix:
        raise ConfigError(f"-o {out} is a file; frames need a folder")
    if out.is_file() and not given.overwrite:
        print(f"already there: {out}")
        return 0
    pipe, clip, count = _load(given), probe(source), 0

    def counted() -> Iterator[Tensor]:
        nonlocal count
        for frame in _frames(pipe, source, clip.frames, given):
            count += 1
            yield frame

    write_clip(out, counted(), fps=clip.fps, comment=pipe.info.attribution)
    print(f"{count} frames translated at {clip.fps:g} a second, without sound: {out}")
    return 0


def _frames(pipe: Pipeline, source: Path, total: int | None, given: Any) -> Iterator[Tensor]:
    from condgen.data.decode import LUMA
    from condgen.data.video import read_frames
    from condgen.pixels import pixels_to_float
    from condgen.rng import derive

    spec = pipe.spec.image
    assert spec is not None
    if spec.classes or spec.channels not in (1, 3):
        raise ConfigError(f"{given.run} takes {spec.channels} channels, which frames of a video do not have")
    noise, at, progress = derive("translate", source.name), 0, Progress("frames", total)
    frames = read_frames(source)
    while part := [pixels_to_float(frame) for frame in itertools.islice(frames, given.batch_size)]:
        if spec.channels == 1:
            part = [sum(share * band for share, band in zip(LUMA, frame, strict=True))[None] for frame in part]
        made = _translated(pipe, part, [noise] * len(part), given)
        yield from (pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels for pixels in made)
        at += len(part)
        progress(at)


def _save(target: Path, pixels: Tensor) -> None:
    from condgen.disk import replace_file
    from condgen.show.pictures import to_pil

    data = io.BytesIO()
    kind = SUFFIXES[target.suffix.lower()]
    to_pil(pixels).save(data, kind, **({"quality": 95} if kind != "PNG" else {}))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, data.getvalue())
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; choose another place with -o") from error
