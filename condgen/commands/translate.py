"""`condgen translate RUN IN -o OUT`: a file, a folder or a glob of pictures of any size, names kept."""

from __future__ import annotations

import glob
import io
import itertools
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
RECORD = "translate.json"
SHOW_SECONDS = 10.0

EPILOG = """\
examples:
  condgen translate runs/NAME photo.jpg -o drawing.png
  condgen translate runs/NAME photos/ -o out/          goes on where it stopped: finished files are skipped
  condgen translate runs/NAME "photos/*.jpg" -o out/ --batch-size 16 --precision bf16

Any size: pictures are padded to what the network takes and cut back (up to 4 megapixels), or worked on in tiles of
the trained size that overlap by half and are blended (--fit tile). --fit stretch resizes to the trained size and back.
Transparency is laid on white and EXIF orientation is applied. A file that cannot be read is reported, the rest goes
on, and the exit code is 3.
"""


def main(words: Sequence[str]) -> int:
    parser = arguments.parser("translate", "Translate pictures with a trained run.", EPILOG)
    parser.add_argument("run", help="a run folder, an export folder, or owner/name on the Hugging Face Hub")
    parser.add_argument("source", metavar="IN", help="a picture, a folder (with its subfolders) or a quoted glob")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="a folder, or a file for one picture")
    parser.add_argument("--fit", default="auto", choices=("auto", "pad", "tile", "stretch"), help="other sizes (auto)")
    parser.add_argument("--format", default="png", choices=[s[1:] for s in SUFFIXES], help="of a folder's files (png)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures (0)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--overwrite", action="store_true", help="translate again what is already there")
    given = parser.parse_args(words)
    if given.batch_size < 1:
        raise ConfigError(f"--batch-size {given.batch_size}: give at least 1")
    out = Path(given.out)
    jobs, folder = planned(given.source, out, f".{given.format}")
    todo = [job for job in jobs if given.overwrite or not job[1].exists()]

    import condgen

    pipe = condgen.load(given.run, device=given.device, precision=given.precision)
    if pipe.spec.image is None:
        raise ConfigError(f"{given.run} was trained with {', '.join(pipe.spec.given) or 'no condition'}, not pictures")
    if folder:
        _record(out, pipe, given)
    failed = _run(pipe, todo, given)
    for name, reason in failed:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    done = len(todo) - len(failed)
    print(f"{done} translated, {len(jobs) - len(todo)} already there, {len(failed)} failed: {out}")
    return DataError.exit_code if failed else 0


Job = tuple[str, Path, Path]
"""(name, target file, source file)"""


def planned(source: str, out: Path, suffix: str) -> tuple[list[Job], bool]:
    """Every picture with the file that it becomes, and whether OUT is a folder. Raises DataError and ConfigError."""
    found, base = _inputs(source, out)
    if Path(source).is_file() and out.suffix.lower() in SUFFIXES and not out.is_dir():
        if out.resolve() == found[0].resolve():
            raise ConfigError(f"-o {out} is the source itself; give another file")
        return [(found[0].name, out, found[0])], False
    if out.suffix.lower() in SUFFIXES or out.is_file():
        raise ConfigError(f"-o {out}: {len(found)} pictures need a folder")
    names = [path.relative_to(base) for path in found]
    taken = Counter(name.with_suffix("").as_posix() for name in names)
    jobs = []
    for path, name in zip(found, names, strict=True):
        single = taken[name.with_suffix("").as_posix()] == 1
        # a.jpg and a.png of one folder become a.jpg.png and a.png.png
        target = out / (name.with_suffix(suffix) if single else name.with_name(name.name + suffix))
        if target.resolve() == path.resolve():
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
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in READABLE and p.is_file())
        base = path
    else:
        found = sorted(p for p in map(Path, glob.glob(source, recursive=True)) if p.is_file())
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        base = Path(*plain)
    inside = out.resolve()
    found = [p for p in found if not p.resolve().is_relative_to(inside)]
    if not found:
        raise DataError(f"{source}: no pictures there ({', '.join(READABLE)}); quote a glob so that it arrives whole")
    return found, base


def _record(out: Path, pipe: Pipeline, given: Any) -> None:
    """Notes what OUT is made with. ConfigError where its pictures were made otherwise: they would be taken as done."""
    from condgen.engine.disk import from_json, replace_file, to_json

    record = {"run": str(given.run), "step": pipe.info.step, "seed": given.seed, "fit": given.fit}
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
    from condgen.engine.translate import translate
    from condgen.rng import derive

    def asked(pixels: Tensor) -> Any:
        from condgen.types import Condition, Image

        return pipe.encode(pipe.condition({}, Condition(image=Image(pixels))))

    failed: list[tuple[str, str]] = []
    began = shown = time.monotonic()
    for start in range(0, len(todo), given.batch_size):
        part = todo[start : start + given.batch_size]
        good = list(_readable(pipe, part, failed))
        ids = [derive("translate", job[0]) for job, _ in good]
        made = translate(
            pipe.system, [pixels for _, pixels in good], ids, fit=given.fit, seed=given.seed,
            batch_size=given.batch_size, precision=given.precision, asked=asked,
        )  # fmt: skip
        for ((_, target, _), _), pixels in zip(good, made, strict=True):
            _save(target, pixels)
        now, at = time.monotonic(), start + len(part)
        if sys.stderr.isatty() or now - shown > SHOW_SECONDS:
            end = "\r" if sys.stderr.isatty() and at < len(todo) else "\n"
            rate = f"{at / max(now - began, 1e-9):.1f} pictures/s"
            print(f"{at}/{len(todo)}  {100 * at // len(todo)}%  {rate}", end=end, file=sys.stderr, flush=True)
            shown = now
    return failed


def _readable(pipe: Pipeline, part: Sequence[Job], failed: list[tuple[str, str]]) -> Iterator[tuple[Job, Tensor]]:
    from condgen.data.decode import decode_image
    from condgen.pixels import pixels_to_float

    assert pipe.spec.image is not None
    for job in part:
        try:
            yield job, pixels_to_float(decode_image(job[2], channels=pipe.spec.image.channels))
        except (DataError, OSError) as error:
            failed.append((job[0], str(error)))


def _save(target: Path, pixels: Tensor) -> None:
    from condgen.engine.disk import replace_file
    from condgen.engine.pictures import to_pil

    data = io.BytesIO()
    kind = SUFFIXES[target.suffix.lower()]
    to_pil(pixels).save(data, kind, **({"quality": 95} if kind != "PNG" else {}))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, data.getvalue())
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; choose another place with -o") from error
